"""An ONNX file as a module of PyTorch operations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dynlrp.errors import InputError, UnsupportedOperatorError
from dynlrp.onnx import movement, operators, quantized, recurrent, resize  # noqa: F401  # which fill the table
from dynlrp.onnx.node import OPERATORS, Node, operator
from dynlrp.onnx.written import Written, domain_of, graphs_of, inliner, joined, kind_of, onnx, tensor


class OnnxModel(nn.Module):
    """An ONNX graph, run operator by operator.

    Weights are frozen parameters by their names in the file, other floating point numbers buffers. Every operator is a
    module whose path is its name in the file, with ``/`` as ``.``. ``float()``, ``double()`` and ``half()`` change the
    precision of all that the file has in float32.

    It takes the graph's inputs by position or by name, and returns its output, or a dict where there are several.
    """

    def __init__(self, model: Any) -> None:
        """``model``: a ``ModelProto`` with its weights."""
        super().__init__()
        model = _inlined(model)
        opsets = {domain_of(entry): entry.version for entry in model.opset_import}
        _check(model.graph)
        self.graph = Graph(model.graph, opsets, self, Names())
        self.inputs = [
            value.name for value in model.graph.input if value.name not in {*self.graph.constants, *self.graph.held}
        ]
        self.outputs = [value.name for value in model.graph.output]
        self.kinds = {value.name: kind_of(value) for value in model.graph.input if value.name in self.inputs}
        """Dtype and sizes of every input; a name, "" for none, where any size will do."""
        self.register_buffer("precision", torch.zeros(()), persistent=False)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.inputs, args, strict=False))
        unknown = [*kwargs.keys() - set(self.inputs), *kwargs.keys() & values.keys()]
        missing = [name for name in self.inputs if name not in values and name not in kwargs]
        if len(args) > len(self.inputs) or unknown or missing:
            raise InputError(
                f"the file's inputs are {', '.join(self.inputs)}; "
                + (f"not there: {', '.join(missing)}" if missing else f"too many: {', '.join(unknown) or len(args)}")
            )
        results = self.graph({**values, **kwargs}, self._dtype())
        return results[0] if len(results) == 1 else dict(zip(self.outputs, results, strict=True))

    def _dtype(self) -> torch.dtype:
        """What float32 has become."""
        precision = self.precision
        assert isinstance(precision, Tensor)
        return precision.dtype


class Names:
    """Paths for modules and numbers, each once."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    def path(self, name: str, instead: str) -> list[str]:
        parts = [re.sub(r"\W+", "_", part) for part in re.split(r"[/.]|::", name) if part] or [instead]
        whole = ".".join(parts)
        self._taken[whole] += 1
        if self._taken[whole] > 1:
            parts[-1] += f"_{self._taken[whole]}"
        return parts


def place(root: nn.Module, path: Sequence[str], value: Tensor | nn.Module) -> tuple[nn.Module, str]:
    """Put a parameter, a buffer or a module where a path says; returns its owner and name there."""
    for part in path[:-1]:
        if not isinstance(getattr(root, part, None), nn.Module):
            while hasattr(root, part):
                part += "_"
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    name = path[-1]
    while hasattr(root, name):
        name += "_"
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
    return root, name


class Step(NamedTuple):
    """A node of a graph, the names of what it takes, and of what nobody takes after it."""

    node: Node
    inputs: tuple[str, ...]
    dropped: tuple[str, ...]
    settled: bool
    """What it makes depends on shapes and constants alone."""


class Graph:
    """The nodes of a graph in their order, and its constants."""

    def __init__(self, proto: Any, opsets: Mapping[str, int], root: nn.Module, names: Names) -> None:
        self.inputs = [value.name for value in proto.input]
        self.outputs = [value.name for value in proto.output]
        self.constants: dict[str, Tensor] = {}
        """Integers, which stay on the CPU."""
        self.held: dict[str, tuple[nn.Module, str]] = {}
        """Owner and name of all others."""
        nodes = []
        for initializer in proto.initializer:
            self._hold(initializer.name, tensor(initializer), root, names)
        for written in joined(proto):
            if written.kind == "Constant" and isinstance(written.attributes.get("value"), Tensor):
                self._hold(written.outputs[0], written.attributes["value"], root, names)
            elif written.kind == "DequantizeLinear" and {*self.constants, *self.held, ""}.issuperset(written.inputs):
                self._hold(written.outputs[0], self._dequantized(written, opsets), root, names)
            else:
                nodes.append((self._node(written, opsets, root, names), tuple(written.inputs)))
        self.steps = self._steps(nodes)

    def _hold(self, name: str, value: Tensor, root: nn.Module, names: Names) -> None:
        if not value.is_floating_point():
            self.constants[name] = value
            return
        weight = value.ndim > 0 and value.numel() > 1
        held = nn.Parameter(value, requires_grad=False) if weight else value
        self.held[name] = place(root, names.path(name, "constant"), held)

    def _dequantized(self, written: Written, opsets: Mapping[str, int]) -> Tensor:
        """A weight that the file has in integers, which have no gradient."""
        node = Node(written.kind, written.domain, opsets.get("", 1), written.attributes, written.outputs)
        found: Tensor = node(*(self.constants[n] if n in self.constants else self._held(n) for n in written.inputs))[0]
        return found.detach()

    def _held(self, name: str) -> Any:
        return getattr(*self.held[name]) if name else None

    def _node(self, written: Written, opsets: Mapping[str, int], root: nn.Module, names: Names) -> Node:
        attributes = {
            name: Graph(value, opsets, root, names) if isinstance(value, onnx.GraphProto) else value
            for name, value in written.attributes.items()
        }
        node = Node(written.kind, written.domain, opsets.get(written.domain, 1), attributes, written.outputs)
        place(root, names.path(written.name, written.kind), node)
        return node

    def _steps(self, nodes: Sequence[tuple[Node, tuple[str, ...]]]) -> list[Step]:
        settled, fixed = {"", *self.constants}, []
        for node, inputs in nodes:
            fixed.append(node.kind in ("Shape", "Size") or (settled.issuperset(inputs) and not _graphs(node)))
            settled.update(node.names if fixed[-1] else ())
        steps, kept = [], set(self.outputs)
        for (node, inputs), known in zip(reversed(nodes), reversed(fixed), strict=True):
            used = {*inputs, *_outer(node)} - {""}
            steps.append(Step(node, inputs, tuple(used - kept), known))
            kept |= used
        return steps[::-1]

    def __call__(self, values: dict[str, Any], floats: torch.dtype) -> list[Any]:
        """``values`` by name, of inputs and of what the graph around this one has."""
        values = {"": None, **values, **self.constants}
        values.update((name, self._held(name)) for name in self.held)
        for node, inputs, dropped, settled in self.steps:
            node.floats = floats
            given = [values[name] for name in inputs]
            if _graphs(node):
                given.append(values)
            # Where operations are traced, what shapes are made of is known all the same.
            with _disable_current_modes() if settled else nullcontext():
                results = node(*_together(given))
            values.update(zip(node.names, results, strict=False))
            for name in dropped:
                values.pop(name, None)
        return [values[name] for name in self.outputs]


def _graphs(node: Node) -> list[Graph]:
    return [value for value in node.attributes.values() if isinstance(value, Graph)]


def _outer(node: Node) -> Iterator[str]:
    """What the graphs inside of a node take from around it."""
    for graph in _graphs(node):
        for step in graph.steps:
            yield from step.inputs
            yield from _outer(step.node)
        yield from graph.outputs


def _together(given: list[Any]) -> list[Any]:
    """Numbers of the file stay on the CPU; beside a tensor elsewhere they are brought there."""
    devices = {value.device for value in given if isinstance(value, Tensor) and value.device.type != "cpu"}
    if not devices:
        return given
    (device, *_) = devices
    return [
        value.to(device) if isinstance(value, Tensor) and value.ndim and value.device.type == "cpu" else value
        for value in given
    ]


def _inlined(model: Any) -> Any:
    """Functions of the file are written out."""
    return inliner.inline_local_functions(model) if model.functions else model


def _check(graph: Any) -> None:
    unknown: dict[str, list[str]] = {}
    for node in (node for part in graphs_of(graph) for node in part.node):
        domain = domain_of(node)
        if (domain, node.op_type) not in OPERATORS:
            unknown.setdefault(f"{domain}.{node.op_type}" if domain else node.op_type, []).append(node.name)
    if unknown:
        raise UnsupportedOperatorError(unknown)


# Control flow ---------------------------------------------------------------------------------------------------------


@operator("If")
def _if(node: Node, condition: Tensor, values: dict[str, Any]) -> tuple[Any, ...]:
    branch = node.attributes["then_branch" if bool(condition) else "else_branch"]
    return tuple(branch(values, node.floats))


@operator("Loop")
def _loop(node: Node, count: Tensor | None, going: Tensor | None, *more: Any) -> tuple[Any, ...]:
    *carried, values = more
    body = node.attributes["body"]
    found: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    step = 0
    while (count is None or step < int(count)) and (going is None or bool(going)):
        now = going if going is not None else torch.tensor(True)
        inner = {**values, **dict(zip(body.inputs, [torch.tensor(step), now, *carried], strict=True))}
        going_on, *results = body(inner, node.floats)
        going = going_on if going is not None else None
        carried, scanned = results[: len(carried)], results[len(carried) :]
        for row, value in zip(found, scanned, strict=True):
            row.append(value)
        step += 1
    return (*carried, *(torch.stack(row) for row in found))


def read(source: str | Path | Any) -> OnnxModel:
    """See :func:`dynlrp.load_onnx`."""
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise InputError(f"there is no file {path}")
        try:
            source = onnx.load(path)
        except Exception as error:
            raise InputError(f"{path} is no ONNX file: {type(error).__name__}: {error}") from error
    if not isinstance(source, onnx.ModelProto):
        raise InputError(f"give the path of an ONNX file or a ModelProto, not {type(source).__name__}")
    return OnnxModel(source)

"""Values of the graph, kept in a forward pass for promises that nobody else can keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dynlrp.catalogue import operand_names
from dynlrp.graph import next_number


class Everything:
    """Contains whatever is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


EVERYTHING = Everything()
Wanted = Everything | Set[tuple[int, int]]
"""Tensors, by the number of their node since the recording began, and the number of the output."""


class Recorder(TorchFunctionMode):
    """Keeps a copy of the ``wanted`` tensors of the graph, for promises that nobody else can keep.

    What a function makes is seen where it is called or used, and the steps inside it below autograd, where the node
    of each has just been numbered.
    """

    def __init__(self, wanted: Wanted = EVERYTHING) -> None:
        super().__init__()
        self._wanted, self._start = wanted, next_number()
        self._inner = _Inner(wanted, self._start)
        self._kept: dict[tuple[Any, int], Tensor] = {}

    def __enter__(self) -> Recorder:
        self._inner.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._inner.__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__set__":  # custom functions call it while they hold the lock of a view
            return func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs)):  # what custom functions made is seen where it is used
            self._keep(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            self._keep(tensor)
        return result

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor._base is not None:  # a write into a view changes its base
            self._keep(tensor._base)
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            key = (tensor.grad_fn, tensor.output_nr)
            place = (tensor.grad_fn._sequence_nr() - self._start, tensor.output_nr)
            if place in self._wanted and key not in self._kept and self._inner.find(*key) is None:
                self._kept[key] = tensor.detach().clone()
                self._inner.drop(tensor.grad_fn)

    def values(self, nodes: Iterable[Any]) -> Iterator[tuple[Any, int, Tensor]]:
        """Node, output number and value, in the order of the nodes; for an operand that is a constant, ``~`` its
        number."""
        for node in nodes:
            for number in range(len(node._input_metadata)):
                value = self._kept.get((node, number), self._inner.find(node, number))
                if value is not None:
                    yield node, number, value
            for position, (child, _) in enumerate(node.next_functions):
                value = self._inner.constant(node, position) if child is None else None
                if value is not None:
                    yield node, ~position, value


class _Inner(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations make by the number of the node that autograd recorded before it ran them."""

    def __init__(self, wanted: Wanted, start: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted, self._start = wanted, start
        self._made: dict[int, tuple[str, list[Any]]] = {}
        self._given: dict[int, list[tuple[str, dict[str, tuple[Tensor, int]]]]] = {}
        """By number, operations and their arguments that do not require grad, with their versions."""
        self._constants: set[int] | None = None if isinstance(wanted, Everything) else {n for n, o in wanted if o < 0}
        """Numbers of nodes whose arguments are wanted, None for all."""
        self._written: dict[int, Tensor] = {}
        """What a tensor held after a write into a view of it, by the number of the node that stands for the write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = next_number() - 1
        result = func(*args, **(kwargs or {}))
        base = args[0]._base if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
        if base is not None and (number + 1 - self._start, 0) in self._wanted:  # the write's own node comes first
            self._written[number + 1] = base.detach().clone()
        if number >= self._start and number not in self._made:  # later ones with this number have no node
            made = [
                t.detach().clone() if isinstance(t, Tensor) and (number - self._start, output) in self._wanted else None
                for output, t in enumerate(pytree.tree_leaves(result))
            ]
            self._made[number] = (_bare(func.__name__.partition(".")[0]), made)
        if number >= self._start and (self._constants is None or number - self._start in self._constants):
            named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
            constants = {
                name: (value, value._version)
                for name, value in [*named, *(kwargs or {}).items()]
                if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
            }
            if constants:
                self._given.setdefault(number, []).append((_bare(func.__name__.partition(".")[0]), constants))
        return result

    def drop(self, node: Any) -> None:
        """Let go of what ran inside a custom function: it is no result of the function's node."""
        number = node._sequence_nr()
        if not self._made_by(node):
            self._made[number] = ("", [])

    def constant(self, node: Any, position: int) -> Tensor | None:
        names = operand_names(node.name())
        for name, given in self._given.get(node._sequence_nr(), ()):
            if position < len(names) and names[position] in given and _ran(name, node):
                value, version = given[names[position]]
                return value if value._version == version else None
        return None

    def find(self, node: Any, number: int) -> Tensor | None:
        made = self._made_by(node)
        if number >= len(made):
            return None
        value, expected = made[number], node._input_metadata[number]
        if value is None or value.dtype is not expected.dtype or value.is_nested != expected.is_nested_tensor:
            return None
        return value if value.is_nested or list(value.shape) == expected.shape else None

    def _made_by(self, node: Any) -> Sequence[Any]:
        if node.name() == "torch::autograd::CopySlices":
            return [self._written.get(node._sequence_nr())]
        name, made = self._made.get(node._sequence_nr(), ("", []))
        return made if name and _ran(name, node) else []


def _ran(name: str, node: Any) -> bool:
    """Whether an operation of this name is a node's."""
    return _bare(node.name()).startswith(name + "backward")


def _bare(name: str) -> str:
    return name.replace("_", "").lower()

"""The two ways in: :func:`explain` runs a model, :func:`relevance` takes a graph that already exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dynlrp.capture import Aliases, Recording, frozen_parameters, same_state, survey
from dynlrp.composite import Composite, composite_named
from dynlrp.errors import InputError, NonFiniteError, NoPathError, UnknownOperationError
from dynlrp.explanation import Explanation
from dynlrp.graph import Edge, Graph, Structure
from dynlrp.ledger import Ledger
from dynlrp.plan import Plan, UnknownNodes, make_plan
from dynlrp.promise import Promises
from dynlrp.target import Seed, Target, find_output, make_seed
from dynlrp.walk import Walk

Names = str | Iterable[str]
OnUnknown = Literal["error", "gradient"]


def explain(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    output: str | int | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
) -> Explanation:
    """Explain one output of a model per sample by Layer-wise Relevance Propagation.

    The model runs once; its parameters, gradients, buffers, flags, hooks, mode and the random state stay as they are.

    Args:
        model: an ``nn.Module`` or any function of tensors.
        inputs: a tensor; a tuple or list of positional arguments; a mapping of keyword arguments (a tokenizer's
            output). Floating point tensors get relevance of their shape; integer tensors that index an embedding get
            one number per id; others are passed through and get None.
        target: what to explain of an output of shape ``(batch, ...)``: None, the largest output of each sample; an
            int, or one per sample; an index tuple such as ``(position, token)``, or a list of one per sample; a
            floating point tensor of the output's shape, the initial relevance; a function from the output to one
            number per sample.
        composite: which rules, as a name in ``dynlrp.COMPOSITES`` or a :class:`Composite`.
        layers: names or globs of modules whose output relevance is wanted, in ``explanation.layers``.
        parameters: the same for parameters, in ``explanation.parameters``.
        output: which entry of a structured output, by key, attribute or position. By default ``logits``, else the
            first floating point tensor.
        on_unknown: ``"gradient"`` explains operations without a rule by their gradient and lists them in the ledger.
        allow_training: explain although dropout or batch statistics are active.

    Raises:
        DynLRPError: one of its subclasses, saying what is wrong, where, and the cure.
    """
    rules = composite_named(composite)
    if on_unknown not in ("error", "gradient"):
        raise InputError(f"on_unknown is 'error' or 'gradient', not {on_unknown!r}")
    frozen = survey(model, allow_training)
    request = _Request(model, inputs, target, rules, _names(layers), _names(parameters), output, on_unknown, frozen)
    with same_state(model, allow_training):
        run = request.forward()
    explanation = run.explain(check=False)
    if not explanation.finite():
        with same_state(model, allow_training=True):
            request.diagnose()
    return explanation


def relevance(
    output: Tensor,
    wrt: Tensor | Sequence[Tensor],
    *,
    initial: Tensor | None = None,
    composite: str | Composite = "auto",
    on_unknown: OnUnknown = "error",
) -> Explanation:
    """Explain a tensor that autograd already has a graph for, beside ordinary backprop.

    The graph stays as it is: a later ``backward()`` gives the gradients it would have given.

    Args:
        output: the tensor to explain.
        wrt: a tensor, or several, that ``output`` depends on; ``.relevance`` of the result mirrors it. A tensor that
            does not take part gets None.
        initial: relevance of ``output``, of its shape; by default the output itself.
        composite, on_unknown: as in :func:`explain`.
    """
    rules = composite_named(composite)
    tensors = [wrt] if isinstance(wrt, Tensor) else list(wrt)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise InputError("wrt must be a tensor or a sequence of tensors")
    for number, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise InputError(f"tensor {number} of wrt does not require grad, so the graph does not know it")
    if initial is None:
        if not output.requires_grad:
            raise NoPathError("the output does not require grad: it was computed without a graph")
        batch = output.shape[0] if output.ndim else 1
        seed = Seed(output, torch.ones_like(output), output.detach().reshape(batch, -1).sum(1), False)
    else:
        seed = make_seed(output, initial)
    run = _Run(seed, rules, on_unknown, release=False)
    for tensor in tensors:
        run.want(tensor, tensor.detach())
    explanation = run.explain(check=False)
    if not explanation.finite():
        run.explain(check=True)
        raise NonFiniteError("relevance is not finite")
    found = explanation.relevance
    explanation.relevance = found[0] if isinstance(wrt, Tensor) else type(wrt)(found) if isinstance(wrt, list) else tuple(found)
    return explanation


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class _Run:
    """A graph with what is wanted of it."""

    def __init__(self, seed: Seed, composite: Composite, on_unknown: OnUnknown, release: bool) -> None:
        node, number = get_gradient_edge(seed.root)[:2]
        self.graph = Graph(node)
        root = self.graph.edge(node, number)
        assert root is not None
        self.root, self.start, self.value, self.seeded = root, seed.start, seed.value, seed.relevance
        self.composite, self.on_unknown, self.release = composite, on_unknown, release
        self.recording: Recording | None = None
        self.wanted: list[tuple[Edge | None, str]] = []
        """One entry per source: its edge and how to read it (``"whole"`` or ``"rows"``)."""
        self.groups: list[list[int]] = []
        """Positions in ``wanted`` per result."""
        self.shapes: list[torch.Size] = []
        self.captured: dict[Edge, tuple[Tensor, int]] = {}
        self.taps: dict[str, list[Edge | None]] = {}
        self.leaves: dict[str, Edge | None] = {}
        self.rebuild: Callable[[list[Tensor | None]], Any] = lambda values: values

    def want(self, tensor: Tensor, value: Tensor) -> None:
        """Ask for the relevance of a tensor of the graph."""
        edge = self._edge(tensor)
        self.groups.append([len(self.wanted)])
        self.shapes.append(value.shape)
        self.wanted.append((edge, "whole"))
        if edge is not None:
            self.captured[edge] = (value, value._version)

    def want_rows(self, ids: Tensor) -> None:
        """Ask for one number per id of the embeddings that ``ids`` indexes."""
        group = []
        for index, name in enumerate(self.graph.names):
            if name == "EmbeddingBackward0" and _same_ids(self.graph.nodes[index]._saved_indices, ids):
                group.append(len(self.wanted))
                self.wanted.append((Edge(index, 0), "rows"))
        self.groups.append(group)
        self.shapes.append(ids.shape)

    def want_nothing(self) -> None:
        self.groups.append([])
        self.shapes.append(torch.Size())

    def tap(self, name: str, tensor: Tensor, value: Tensor, version: int) -> None:
        """Ask for the relevance of a layer's output on the way."""
        edge = self._edge(tensor)
        self.taps.setdefault(name, []).append(edge)
        if edge is not None and edge not in self.captured:
            self.captured[edge] = (value, version)

    def observe(self, name: str, parameter: Tensor) -> None:
        self.leaves[name] = self._edge(parameter) if parameter.requires_grad else None

    def _edge(self, tensor: Tensor) -> Edge | None:
        node, number = get_gradient_edge(tensor)[:2]
        return self.graph.edge(node, number)

    @torch.no_grad()
    def explain(self, check: bool) -> Explanation:
        """One pass."""
        sources = [edge for edge, _ in self.wanted if edge is not None]
        if not sources:
            raise NoPathError(
                "the output does not depend on any of the inputs through differentiable operations: integer inputs "
                "count where they index an embedding, and torch.no_grad, detach and numpy cut the graph"
            )
        path: Callable[[int], str] = self.recording.path if self.recording is not None else lambda sequence: ""
        paths = None
        if self.composite.by_path:
            paths = tuple(path(node._sequence_nr()) for node in self.graph.nodes)
        tapped = [edge for edges in self.taps.values() for edge in edges if edge is not None]
        leaves = [edge for edge in self.leaves.values() if edge is not None]
        structure = self.graph.structure(self.root, sources, self.seeded, [edge.node for edge in leaves], paths)
        plan = self._plan(structure, path)
        ledger = Ledger()
        ledger._output, ledger._path = self.value.sum(), path
        promises = Promises(self.graph, plan.consumers, self.captured)
        walk = Walk(plan, self.graph, promises, ledger, path, check=check, release=self.release)
        keep = list(dict.fromkeys([*sources, *tapped, *leaves]))
        walk.settle([edge for edge in keep if edge not in plan.relevance_edges])
        visited = len(plan.steps)
        sequences = {edge: self.graph.nodes[edge.node]._sequence_nr() for edge in sources}
        if self.release:
            self.graph.index.clear()
        arrived = walk.run(self.start, self.root, keep)

        def read(edge: Edge | None) -> Tensor | None:
            if edge is None or edge not in arrived:
                return None
            if edge in plan.relevance_edges:
                return arrived[edge]
            return arrived[edge] * promises.take(edge)

        found = {edge: read(edge) for edge in keep}
        for edge in dict.fromkeys(sources):
            value = found[edge]
            if value is not None and edge in plan.ends:
                ledger.book("inputs", self.graph.names[edge.node], sequences[edge], value.sum())
        results: list[Tensor | None] = []
        for group, shape in zip(self.groups, self.shapes, strict=True):
            parts = []
            for position in group:
                edge, how = self.wanted[position]
                part = found.get(edge) if edge is not None else None
                if part is not None:
                    parts.append(part.sum(-1).reshape(shape) if how == "rows" else part)
            results.append(sum(parts[1:], parts[0]) if parts else None)
        return Explanation(
            relevance=self.rebuild(results),
            value=self.value,
            ledger=ledger,
            layers={name: _single([found.get(e) if e else None for e in edges]) for name, edges in self.taps.items()},
            parameters={name: found.get(edge) if edge else None for name, edge in self.leaves.items()},
            promises=promises.report(visited),
            composite=self.composite.name,
        )

    def _plan(self, structure: Structure, path: Callable[[int], str]) -> Plan:
        try:
            return make_plan(structure, self.composite, self.on_unknown)
        except UnknownNodes as error:
            raise UnknownOperationError(
                [(name, path(self.graph.nodes[index]._sequence_nr())) for index, name in error.nodes]
            ) from None


def _single(values: list[Tensor | None]) -> Any:
    return values[0] if len(values) == 1 else values


def _same_ids(indices: Tensor, ids: Tensor) -> bool:
    if indices.numel() != ids.numel():
        return False
    return indices.data_ptr() == ids.data_ptr() or torch.equal(indices.reshape(-1), ids.reshape(-1))


@dataclass
class _Request:
    """What :func:`explain` was asked, so that a failed run can be repeated for diagnosis."""

    model: Any
    inputs: Any
    target: Target
    composite: Composite
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    output: str | int | None
    on_unknown: OnUnknown
    frozen: bool

    def forward(self, release: bool = True) -> _Run:
        """Run the model and gather what is wanted."""
        with torch.inference_mode(False), torch.enable_grad():
            inputs = dict(self.inputs) if isinstance(self.inputs, Mapping) else self.inputs
            leaves, spec = pytree.tree_flatten(inputs)
            given = [_prepare(leaf) for leaf in leaves]
            if not any(isinstance(leaf, Tensor) for leaf in leaves):
                raise InputError("the inputs hold no tensor")
            arguments = pytree.tree_unflatten(given, spec)
            recording = Recording(self.model, self.layers)
            frozen = frozen_parameters(self.model) if self.frozen else {}
            names = self._parameter_names()
            aliases = Aliases(frozen, names) if frozen else None
            with recording.watching():
                if aliases is None:
                    result = _call(self.model, arguments)
                else:
                    with aliases:
                        result = _call(self.model, arguments)
            seed = make_seed(find_output(result, self.output), self.target)
            del result
            run = _Run(seed, self.composite, self.on_unknown, release)
            del seed
            run.recording = recording
            run.rebuild = lambda values: pytree.tree_unflatten(values, spec)
            for leaf, argument in zip(leaves, given, strict=True):
                if not isinstance(leaf, Tensor):
                    run.want_nothing()
                elif argument.requires_grad:
                    run.want(argument, leaf.detach())
                elif argument.is_floating_point() or argument.is_complex() or argument.dtype == torch.bool:
                    run.want_nothing()
                else:
                    run.want_rows(argument)
            for name, outputs in recording.outputs.items():
                for tensor, value, version in outputs:
                    run.tap(name, tensor, value, version)
            recording.outputs.clear()
            for name in names:
                stand_in = aliases.tensors.get(name) if aliases is not None else None
                run.observe(name, self.model.get_parameter(name) if stand_in is None else stand_in)
        return run

    def diagnose(self) -> None:
        """Run again with every value looked at, and raise for the first that is not finite."""
        run = self.forward(release=False)
        run.explain(check=True)
        raise NonFiniteError("relevance is not finite")

    def _parameter_names(self) -> list[str]:
        if not self.parameters:
            return []
        if not isinstance(self.model, nn.Module):
            raise InputError("parameters= needs an nn.Module")
        everything = [name for name, _ in self.model.named_parameters()]
        names: list[str] = []
        for pattern in self.parameters:
            found = [name for name in everything if fnmatchcase(name, pattern)]
            if not found:
                raise InputError(f"no parameter is called {pattern!r}; the model has {everything[:8]} ...")
            names += found
        return list(dict.fromkeys(names))


def _prepare(leaf: Any) -> Any:
    """A copy of an input that the model may do with as it likes; floating point copies are in the graph."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point() or leaf.is_complex():
        return leaf.detach().requires_grad_().clone()
    return leaf.detach().clone()


def _call(model: Any, arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return model(**arguments)
    if isinstance(arguments, tuple | list):
        return model(*arguments)
    return model(arguments)

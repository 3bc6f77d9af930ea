"""The two ways in: :func:`explain` runs a model, :func:`relevance` takes a graph that already exists."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dynlrp.capture import (
    EVERYTHING,
    Aliases,
    Everything,
    Recorder,
    Recording,
    Wanted,
    frozen_parameters,
    same_state,
    survey,
)
from dynlrp.composite import Composite, composite_named, innermost
from dynlrp.errors import (
    BrokenPromiseError,
    FreedGraphError,
    InputError,
    NonFiniteError,
    NoPathError,
    TargetError,
    UnknownOperationError,
)
from dynlrp.expansion import Expander, Paths
from dynlrp.explanation import Explanation
from dynlrp.graph import CHANGED, FREED, Edge, Graph, Node, Structure, saved
from dynlrp.ledger import Ledger
from dynlrp.plan import Plan, StepPlan, UnknownNodes, make_plan
from dynlrp.precision import Wide
from dynlrp.promise import Operands, Promises
from dynlrp.rules.operation import REGISTRY, product
from dynlrp.submodule import Gathered
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
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
) -> Explanation:
    """Explain one output of a model per sample by Layer-wise Relevance Propagation.

    The model runs once (once more, recording what is missing, where a rule or the ledger needs an activation that the
    graph did not keep and that cannot be recomputed); its parameters, gradients, buffers, flags, hooks, mode and the
    random state stay as they are.

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
        precision: ``torch.float32`` or ``torch.float64``, where relevance shall be computed in at least this dtype,
            whatever the model's. The model itself runs as it is.
        on_unknown: ``"gradient"`` explains operations without a rule by their gradient and lists them in the ledger.
        allow_training: explain although dropout or batch statistics are active.

    Raises:
        DynLRPError: one of its subclasses, saying what is wrong, where, and the cure.
    """
    rules = composite_named(composite)
    _check(on_unknown)
    frozen, buffers = survey(model, allow_training)
    wide = None if precision is None else Wide(precision)
    request = _Request(
        model, inputs, target, rules, _names(layers), _names(parameters), output, on_unknown, frozen, wide
    )
    missing: Missing | None = None
    while True:
        with same_state(buffers, allow_training):
            run = request.forward(None if missing is None else missing.wanted)
        if missing is None or missing.fits(run):
            final = missing is not None and missing.wanted is EVERYTHING
            try:
                explanation = run.explain(check=False)
                if not explanation.ledger.unresolved or not run.missing or final:
                    break
            except BrokenPromiseError:
                if not run.missing or final:
                    raise
        missing = Missing.of(run) if missing is None else Missing(EVERYTHING)
        del run  # its graph
    if not explanation.finite():
        with same_state(buffers, allow_training=True):
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
            does not take part gets None. Parameters beside other tensors are weights whose own relevance is read on
            the way, as with ``explain(parameters=...)``: they change nothing for the others.
        initial: relevance of ``output``, of its shape; by default the output itself.
        composite, on_unknown: as in :func:`explain`.
    """
    rules = composite_named(composite)
    _check(on_unknown)
    tensors = [wrt] if isinstance(wrt, Tensor) else list(wrt)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise InputError("wrt must be a tensor or a sequence of tensors")
    for number, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise InputError(f"tensor {number} of wrt does not require grad, so the graph does not know it")
    if all(isinstance(t, nn.Parameter) for t in tensors):
        raise InputError("wrt holds parameters alone; name an input beside them, whose relevance they pass on")
    if initial is None:
        if not output.requires_grad:
            raise NoPathError("the output does not require grad: it was computed without a graph")
        batch = output.shape[0] if output.ndim else 1
        seed = Seed(
            output, torch.ones_like(output), output.detach().reshape(batch, output.shape[1:].numel()).sum(1), False
        )
    elif isinstance(initial, Tensor) and initial.is_floating_point():
        seed = make_seed(output, initial)
    else:
        raise InputError("initial must be a floating point tensor of the output's shape")
    run = _Run(seed, rules, on_unknown, release=False)
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            run.observe(str(number), tensor)
        else:
            run.want(*get_gradient_edge(tensor)[:2], tensor.detach())
    explanation = run.explain(check=False)
    if not explanation.finite():
        run.explain(check=True)
        raise NonFiniteError("relevance is not finite")
    attributed = iter(explanation.relevance)
    found = [
        explanation.parameters.pop(str(number)) if str(number) in run.leaves else next(attributed)
        for number in range(len(tensors))
    ]
    explanation.relevance = (
        found[0] if isinstance(wrt, Tensor) else type(wrt)(found) if isinstance(wrt, list) else tuple(found)
    )
    return explanation


def settle(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    output: str | int | None = None,
    allow_training: bool = False,
) -> tuple[Settled, int]:
    """What :func:`explain` does up to the point where relevance moves, and the runs of the model that it takes.

    Operations without a rule are no error: their steps are marked as fallbacks.
    """
    frozen, buffers = survey(model, allow_training)
    request = _Request(model, inputs, target, composite_named(composite), (), (), output, "gradient", frozen, None)
    fake = active_fake_mode() is not None  # draws nothing, and the model is a copy
    missing: Missing | None = None
    for runs in range(1, 4):
        with nullcontext() if fake else same_state(buffers, allow_training):
            run = request.forward(None if missing is None else missing.wanted, release=False)
        if missing is None or missing.fits(run):
            final = missing is not None and missing.wanted is EVERYTHING
            try:
                settled = run.settle(check=False)
                if not settled.ledger.unresolved or not run.missing or final:
                    return settled, runs
            except BrokenPromiseError:
                if not run.missing or final:
                    raise
        missing = Missing.of(run) if missing is None else Missing(EVERYTHING)
    raise AssertionError("the last run records everything")


def _check(on_unknown: str) -> None:
    if on_unknown not in ("error", "gradient"):
        raise InputError(f"on_unknown is 'error' or 'gradient', not {on_unknown!r}")


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class Settled(NamedTuple):
    """A graph that relevance can travel through."""

    graph: Graph
    structure: Structure
    plan: Plan
    walk: Walk
    promises: Promises
    ledger: Ledger
    keep: tuple[Edge, ...]
    """Tensors whose relevance is wanted."""
    path: Callable[[int], str]
    """Module path of an operation by its sequence number."""

    def steps(self) -> dict[int, StepPlan]:
        """What happens at every node that relevance meets; at all nodes of a chain the same."""
        return {index: step for step in self.plan.steps for index in step.chain or (step.index,)}

    def facts(self) -> dict[int, Hashable]:
        """What nodes tell of themselves beyond their name."""
        skeleton = self.structure.skeleton
        return {index: fact for (index, _), fact in zip(skeleton.telling, self.structure.facts, strict=True)}


@dataclass(frozen=True)
class Missing:
    """What a second run of the model must record."""

    wanted: Wanted
    names: tuple[str, ...] = ()
    """Of the first run's graph."""

    @classmethod
    def of(cls, run: _Run) -> Missing:
        """What the promises of ``run`` lacked. Two runs of a model number their operations in the same way."""
        assert run.recording is not None
        start = run.recording.start
        return cls({(number - start, edge.output): edge.node for edge, number in run.missing.items()}, run.graph.names)

    def fits(self, run: _Run) -> bool:
        """Whether ``run`` has the same operations with the same numbers."""
        if isinstance(self.wanted, Everything):
            return True
        assert run.recording is not None
        nodes, start = run.graph.nodes, run.recording.start
        return run.graph.names == self.names and all(
            nodes[index]._sequence_nr() - start == number for (number, _), index in self.wanted.items()
        )


class _Run:
    """A graph with what is wanted of it."""

    def __init__(
        self,
        seed: Seed,
        composite: Composite,
        on_unknown: OnUnknown,
        release: bool,
        recording: Recording | None = None,
        wide: Wide | None = None,
    ) -> None:
        node, number = get_gradient_edge(seed.root)[:2]
        calls = recording.take_calls() if recording is not None else []
        self.graph = Gathered(node, calls) if calls else Graph(node)
        root = self.graph.edge(node, number)
        assert root is not None
        self.root, self.start, self.value, self.seeded = root, seed.start, seed.value, seed.relevance
        self.composite, self.on_unknown, self.release = composite, on_unknown, release
        self.recording = recording
        self._running: Callable[[int], tuple[str, ...]] = lambda sequence: ()
        """Paths of the modules that an operation ran in, innermost last, by its number."""
        if recording is not None:
            self._running = recording.modules
        self.wide = wide
        if wide is not None:
            self.start = wide.cast(self.start)
        self.aliases: Aliases | None = None
        self.wanted: list[tuple[Edge | None, Rows | None]] = []
        """One entry per source: its edge, and how ids read their embedding's relevance."""
        self.groups: list[list[int]] = []
        """Positions in ``wanted`` per result."""
        self.shapes: list[torch.Size] = []
        self.captured: dict[Edge, tuple[Tensor, int]] = self.graph.values()
        self.captured[root] = (seed.root.detach(), seed.root._version)
        self.recorded: list[tuple[Node, int, Tensor]] = []
        self.missing: dict[Edge, int] = {}
        """Tensors whose values nobody keeps, with the number of their node."""
        self.taps: dict[str, list[Edge | None]] = {}
        self.leaves: dict[str, Edge | None] = {}
        self.rebuild: Callable[[list[Tensor | None]], Any] = lambda values: values

    def want(self, node: Node, number: int, value: Tensor) -> int:
        """Ask for the relevance of a tensor of the graph; returns its group number."""
        edge = self.graph.edge(node, number)
        self.groups.append([len(self.wanted)])
        self.shapes.append(value.shape)
        self.wanted.append((edge, None))
        if edge is not None:
            self.captured[edge] = (value, value._version)
        return len(self.groups) - 1

    def want_rows(self, inputs: Sequence[Tensor]) -> list[int]:
        """Ask for one number per id of every embedding that one of ``inputs`` indexes; returns their group numbers.

        An embedding belongs to the input whose memory its indices lie in, be it a view; else, where the model copied
        its ids, to the first input without such an embedding that holds the same numbers, maybe transposed, padded
        or cut.
        """
        groups: list[list[int]] = [[] for _ in inputs]
        copied: list[tuple[int, Tensor]] = []
        memory = {ids.untyped_storage()._cdata: number for number, ids in enumerate(inputs)}
        for index in self.graph.skeleton.lookups:
            operation = REGISTRY[self.graph.names[index]]
            indices = saved(self.graph.nodes[index], operation.lookup)
            number = memory.get(indices.untyped_storage()._cdata)
            if number is None:
                copied.append((index, indices))
            else:
                places = torch.arange(inputs[number].numel(), device=indices.device)
                places = places.as_strided(indices.shape, indices.stride(), indices.storage_offset())
                groups[number].append(self._want_edge(index, places))
        taken = [bool(group) for group in groups]
        for step in self.graph.steps:
            for node in step.nodes:
                entry = REGISTRY.get(node.name())
                indices = saved(node, entry.lookup) if entry is not None and entry.lookup else None
                if indices is not None and any(_reads(indices, ids) for ids in inputs):
                    raise InputError(
                        f"the embedding of integer inputs lies inside of {step.path!r}, which the composite explains "
                        f"as one step: select modules behind it"
                    )
        if any(taken) and active_fake_mode() is not None:  # no numbers tell where the others come from
            copied = []
        for index, indices in copied:
            for number, ids in enumerate(inputs):
                found = None if taken[number] else _places(indices, ids)
                if found is not None:
                    groups[number].append(self._want_edge(index, found))
                    break
        numbers = []
        for group, ids in zip(groups, inputs, strict=True):
            numbers.append(len(self.groups))
            self.groups.append(group)
            self.shapes.append(ids.shape)
        return numbers

    def _want_edge(self, index: int, places: Tensor) -> int:
        operation = REGISTRY[self.graph.names[index]]
        table = self.graph.operands[index][0] if operation.rows is not None else None
        self.wanted.append((Edge(index, 0), Rows(places, operation.rows, self.graph.nodes[index], table)))
        return len(self.wanted) - 1

    def tap(self, name: str, node: Node, number: int, value: Tensor, version: int) -> None:
        """Ask for the relevance of a layer's output on the way."""
        edge = self.graph.edge(node, number)
        self.taps.setdefault(name, []).append(edge)
        if edge is not None and edge not in self.captured:
            self.captured[edge] = (value, version)

    def keep(self, recorder: Recorder) -> None:
        """Values of tensors, for promises."""
        self.recorded = list(recorder.values(self.graph.recorded()))
        for node, number, value in self.recorded:
            edge = self.graph.edge(node, number)
            if edge is not None:
                self.captured[edge] = (value, value._version)

    def observe(self, name: str, parameter: Tensor) -> None:
        """Ask for the relevance of a parameter."""
        self.leaves[name] = None
        if parameter.requires_grad:
            node, number = get_gradient_edge(parameter)[:2]
            for step in self.graph.steps:
                if node in step.leaves:
                    raise InputError(
                        f"parameter {name!r} is used inside of {step.path!r}, which the composite explains as one step"
                    )
            self.leaves[name] = self.graph.edge(node, number)

    def explain(self, check: bool) -> Explanation:
        """One pass."""
        try:
            again = self.aliases if self.aliases is not None and self.aliases.reruns else nullcontext()
            with torch.no_grad(), torch.autocast(self.start.device.type, enabled=False), again:
                return self._explain(check)
        except RuntimeError as error:
            if CHANGED in str(error):
                raise BrokenPromiseError(f"a tensor that the graph saved was changed in place: {error}") from error
            if FREED not in str(error):
                raise
            raise FreedGraphError(
                "the saved tensors of this graph are gone: a backward pass freed them. Explain before backward(), or "
                "call backward(retain_graph=True)."
            ) from error

    def settle(self, check: bool) -> Settled:
        """The rule of every operation and the keeper of every promise, without touching data."""
        sources = [edge for edge, _ in self.wanted if edge is not None]
        if not sources:
            raise NoPathError(
                "the output does not depend on any of the inputs through differentiable operations: integer inputs "
                "count where they index an embedding, and torch.no_grad, detach and numpy cut the graph"
            )
        tapped = [edge for edges in self.taps.values() for edge in edges if edge is not None]
        leaves = [edge for edge in self.leaves.values() if edge is not None]
        keep = tuple(dict.fromkeys([*sources, *tapped, *leaves]))
        structure = self.graph.structure(
            self.root,
            sources,
            kept=keep,
            seeded=self.seeded,
            observed=tuple([edge.node for edge in leaves]),
            modules=self._modules() if self.composite.by_path else None,
        )
        plan = self._plan(structure)
        ledger = Ledger()
        promises = Promises(self.graph, plan.consumers, self.captured, self.wide)
        places = Paths(self._running)
        ledger._path = places.path
        expand = Expander(self.composite, self.on_unknown, ledger, places)
        walk = Walk(plan, self.graph, promises, ledger, expand, check=check, release=self.release, wide=self.wide)
        tables = [rows.table for _, rows in self.wanted if rows is not None and rows.table is not None]
        try:
            walk.settle([edge for edge in keep if edge not in plan.relevance_edges] + tables)
        finally:
            self.missing = {edge: self.graph.nodes[edge.node]._sequence_nr() for edge in promises.missing}
        return Settled(self.graph, structure, plan, walk, promises, ledger, keep, self._path)

    def _path(self, sequence: int) -> str:
        """Path of the innermost module that an operation ran in."""
        return innermost(self._running(sequence))

    def _explain(self, check: bool) -> Explanation:
        _, _, plan, walk, promises, ledger, keep, _ = self.settle(check)
        ledger._output = self.value.sum(dtype=torch.promote_types(self.value.dtype, torch.float32))
        sources = [edge for edge, _ in self.wanted if edge is not None]
        visited = plan.visited
        sequences = {edge: self.graph.nodes[edge.node]._sequence_nr() for edge in sources}
        if self.release:
            self.graph.forget()
        arrived = walk.run(self.start, self.root, keep)

        def read(edge: Edge | None) -> Tensor | None:
            if edge is None or edge not in arrived:
                return None
            if edge in plan.relevance_edges:
                return arrived[edge]
            return product(arrived[edge], promises.take(edge))

        found = {edge: read(edge) for edge in keep}
        for source in dict.fromkeys(sources):
            value = found[source]
            if value is not None and source in plan.ends:
                ledger.book("inputs", self.graph.names[source.node], sequences[source], value.sum())
        if ledger.unresolved and ledger.closes:
            ledger.unresolved.clear()  # constants that nobody kept add up to nothing: paddings and masks
        results: list[Tensor | None] = []
        for group, shape in zip(self.groups, self.shapes, strict=True):
            parts = []
            for position in group:
                edge, rows = self.wanted[position]
                part = found.get(edge) if edge is not None else None
                if part is not None:
                    table = None if rows is None or rows.table is None else promises.take(rows.table)
                    parts.append(part if rows is None else rows.read(part, shape, table))
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

    def _modules(self) -> tuple[tuple[str, ...], ...]:
        """The same of every node, for a composite that selects by them."""
        found = tuple([self._running(node._sequence_nr()) for node in self.graph.nodes])
        paths = {innermost(modules) for modules in found}
        matched = self.recording.matched if self.recording is not None else ()
        for when in self.composite.conditions:
            if when.path is not None and not fnmatch.filter(paths, when.path):
                raise InputError(
                    f"composite {self.composite.name!r} selects by path {when.path!r}, where no operation runs"
                )
            if when.module is not None and when not in matched:
                raise InputError(
                    f"composite {self.composite.name!r} selects the module {when.module!r}: "
                    + (
                        "no module that has this as its first name ran, or only inside of one that is a step already"
                        if self.recording is not None
                        else "a graph alone does not tell which modules it is from, use explain()"
                    )
                )
        return found

    def _plan(self, structure: Structure) -> Plan:
        try:
            return make_plan(structure, self.composite, self.on_unknown, REGISTRY.version)
        except UnknownNodes as error:
            numbers = [(name, self.graph.nodes[index]._sequence_nr()) for index, name in error.nodes]
            places = [(name, innermost(self._running(number))) for name, number in numbers]
            raise UnknownOperationError(places, error.reasons) from None


def _single(values: list[Tensor | None]) -> Any:
    return values if len(values) > 1 else values[0] if values else None


@dataclass(frozen=True)
class Rows:
    """How the relevance of an embedding becomes one number per id: ``places`` are the ids' positions in the input,
    one past the last for ids that the model added. ``split`` is the operation's ``rows``, ``table`` its operand."""

    places: Tensor
    split: Callable[..., Tensor] | None
    node: Node
    table: Edge | None

    def read(self, relevance: Tensor, shape: torch.Size, table: Tensor | None) -> Tensor:
        rows = relevance.sum(-1) if self.split is None else self.split(Operands(self.node), relevance, table)
        flat = torch.zeros(shape.numel() + 1, dtype=rows.dtype, device=rows.device)
        return flat.index_add_(0, self.places.reshape(-1), rows.reshape(-1))[:-1].reshape(shape)


def _reads(indices: Tensor, ids: Tensor) -> bool:
    """Whether an embedding is indexed by an input, or by a copy of it."""
    own = indices.untyped_storage()._cdata == ids.untyped_storage()._cdata
    return own or _places(indices, ids) is not None


def _places(indices: Tensor, ids: Tensor) -> Tensor | None:
    """Where in ``ids`` copied ``indices`` come from; None where they do not.

    They may be transposed, have more or fewer at either end of their sequence, or be in another shape.
    """
    order = torch.arange(ids.numel(), device=indices.device)
    if indices.numel() == ids.numel() and _same(indices.reshape(-1), ids.reshape(-1)):
        return order
    order = order.reshape(ids.shape)
    if ids.ndim != indices.ndim or not ids.numel() or not indices.numel():
        return None
    if ids.ndim == 2 and ids.shape == indices.shape[::-1] and _same(indices.t(), ids):
        return order.t()
    length = min(ids.shape[-1], indices.shape[-1])
    if ids.shape[:-1] != indices.shape[:-1] or ids.shape == indices.shape:
        return None
    for part in (slice(0, length), slice(-length, None)):
        if _same(indices[..., part], ids[..., part]):
            places = torch.full_like(indices, ids.numel(), dtype=torch.long)
            places[..., part] = order[..., part]
            return places
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, or may: fake ones have none."""
    return a.shape == b.shape and (isinstance(a, FakeTensor) or torch.equal(a, b))


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
    wide: Wide | None

    def forward(self, record: Wanted | None = None, release: bool = True) -> _Run:
        """Run the model and gather what is wanted; the values of the tensors in ``record`` are kept on the way."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves, spec = pytree.tree_flatten(as_dicts(self.inputs))
            given = [_prepare(leaf) for leaf in leaves]
            if not any(isinstance(leaf, Tensor) for leaf in leaves):
                raise InputError("the inputs hold no tensor")
            arguments = pytree.tree_unflatten(given, spec)
            # Before the model can change them in place.
            entries = [_entry(argument) for argument in given]
            recording = Recording(self.model, self.layers, self.composite)
            frozen = frozen_parameters(self.model) if self.frozen else []
            names = self._parameter_names()
            aliases = Aliases(frozen, [self.model.get_parameter(n) for n in names]) if frozen else None
            recorder = None if record is None else Recorder(record)
            saving = nullcontext() if self.wide is None else self.wide.saving()
            with recording.watching(), saving, aliases or nullcontext(), recorder or nullcontext():
                result = call(self.model, arguments)
            found = find_output(result, self.output)
            sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
            plain = self.target is None or isinstance(self.target, int)
            if plain and found.ndim == 1 and sizes and len(found) not in sizes:
                raise TargetError(
                    f"the output of shape {tuple(found.shape)} has no batch dimension that fits the inputs; add one "
                    f"in front of the inputs (x.unsqueeze(0)) so that the output is (batch, ...)"
                )
            with recorder or nullcontext():
                seed = make_seed(found, self.target)
            del result, found
            run = _Run(seed, self.composite, self.on_unknown, release, recording, self.wide)
            del seed
            run.aliases = aliases
            if recorder is not None:
                run.keep(recorder)
            order: list[int | None] = []
            ids: list[Tensor] = []
            for leaf, argument, entry in zip(leaves, given, entries, strict=True):
                order.append(None)
                if entry is not None:
                    order[-1] = run.want(*entry, leaf.detach())
                elif isinstance(leaf, Tensor) and not argument.is_floating_point() and argument.dtype != torch.bool:
                    order[-1] = -1 - len(ids)
                    ids.append(argument)
            rows = run.want_rows(ids)
            places = [None if n is None else n if n >= 0 else rows[-1 - n] for n in order]
            run.rebuild = lambda found: pytree.tree_unflatten([None if n is None else found[n] for n in places], spec)
            run.taps = {name: [] for name in recording.requested()}
            for name, outputs in recording.outputs.items():
                for node, number, value, version in outputs:
                    run.tap(name, node, number, value, version)
            recording.outputs.clear()
            for name in names:
                parameter = self.model.get_parameter(name)
                run.observe(name, parameter if aliases is None else aliases.stand_in(parameter))
        return run

    def diagnose(self) -> None:
        """Run again with every value looked at, and raise for the first that is not finite."""
        for number, leaf in enumerate(pytree.tree_leaves(as_dicts(self.inputs))):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise NonFiniteError(f"input {number} holds NaN or infinity")
        run = self.forward(EVERYTHING, release=False)
        assert run.recording is not None
        for node, _, value in run.recorded:
            operation = REGISTRY.get(node.name())
            if operation is not None and operation.copies:
                continue
            if bool((torch.isnan(value) | (value == torch.inf)).any()):  # scores may be masked with -inf
                path = run.recording.path(node._sequence_nr())
                raise NonFiniteError(f"an activation is not finite first behind {node.name()} in {path or 'the model'}")
        if not bool(torch.isfinite(run.value).all()):
            raise NonFiniteError("the explained output is not finite")
        run.explain(check=True)
        raise NonFiniteError("relevance is not finite")

    def _parameter_names(self) -> list[str]:
        if not self.parameters:
            return []
        if not isinstance(self.model, nn.Module):
            raise InputError("parameters= needs an nn.Module")
        everything = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        names: list[str] = []
        for pattern in self.parameters:
            found = [name for name in everything if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                raise InputError(f"no parameter is called {pattern!r}; the model has {everything[:8]} ...")
            names += found
        return list(dict.fromkeys(names))


def as_dicts(inputs: Any) -> Any:
    """Mappings of any kind as dicts."""
    if isinstance(inputs, Mapping):
        return {key: as_dicts(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(as_dicts(value) for value in inputs)
    return inputs


def _prepare(leaf: Any) -> Any:
    """A copy of an input that the model may do with as it likes; floating point copies are in the graph."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point() or leaf.is_complex():
        leaf = leaf.clone() if leaf.is_inference() else leaf.detach()
        return leaf.requires_grad_().clone()
    return leaf.detach().clone(memory_format=torch.contiguous_format)


def _entry(argument: Any) -> tuple[Node, int] | None:
    """Node and output number of a floating point input."""
    if not isinstance(argument, Tensor) or not argument.requires_grad:
        return None
    node, number = get_gradient_edge(argument)[:2]
    return node, number


def call(model: Any, arguments: Any) -> Any:
    """Run a model on a tensor, on positional or on keyword arguments."""
    if isinstance(arguments, dict):
        return model(**arguments)
    if isinstance(arguments, tuple | list):
        return model(*arguments)
    return model(arguments)

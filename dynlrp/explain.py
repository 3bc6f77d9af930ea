"""The ways in: :func:`explain` and :func:`explain_many` run a model, :func:`relevance` takes a graph that exists."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dynlrp.auditor import AuditedLedger, Auditor
from dynlrp.capture import (
    EVERYTHING,
    Aliases,
    Call,
    Recorder,
    Recording,
    Wanted,
    frozen_parameters,
    same_state,
    survey,
)
from dynlrp.composite import Composite, composite_named, innermost
from dynlrp.condition import Condition, channel_axis, mask
from dynlrp.errors import (
    BrokenPromiseError,
    FreedGraphError,
    InputError,
    NonFiniteError,
    NoPathError,
    RuleError,
    TargetError,
    UnknownOperationError,
)
from dynlrp.expansion import Expander, Paths
from dynlrp.explanation import Explanation
from dynlrp.graph import CHANGED, FREED, Edge, Graph, Node, Operands, Structure, saved
from dynlrp.ledger import Ledger
from dynlrp.places import ATTENTION, Tap, attention, parse
from dynlrp.plan import Plan, StepPlan, UnknownNodes, make_plan
from dynlrp.precision import Wide
from dynlrp.promise import Promises
from dynlrp.rules.operation import REGISTRY, product
from dynlrp.submodule import Gathered
from dynlrp.target import Seed, Target, all_targets, find_output, make_seed
from dynlrp.walk import Walk

Names = str | Iterable[str]
OnUnknown = Literal["error", "gradient"]

aten: Any = torch.ops.aten
functorch: Any = torch._C._functorch

MEMORY = 2**30
"""Bytes that the multipliers of one pass over many targets may take, roughly."""


TWICE = "audit=True and create_graph=True do not go together: relevance is the same in both, so ask twice"


def explain(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    condition: Condition | None = None,
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
    audit: bool = False,
    create_graph: bool = False,
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
            number per sample; a :class:`Contrast` of two outputs.
        composite: which rules, as a name in ``dynlrp.COMPOSITES`` or a :class:`Composite`.
        layers: names or globs of modules whose output's relevance is wanted, in ``explanation.layers``.
            ``"name:input"`` is what the module was given, with all that uses it; ``:query``, ``:key``, ``:value``,
            ``:weights`` and ``:heads`` (the output of each head) are what attention in that module makes, ``(batch,
            heads, ...)``.
        parameters: names or globs of parameters, for ``explanation.parameters``; relevance is summed over all uses. A
            glob finds a tied parameter once, by its first name.
        condition: what relevance may pass through, by name as in ``layers``: channel numbers, a :class:`Part`, several
            of them, or a mask. The rest is held back, as the ledger shows (Achtibat et al. 2023).
        output: which entry of a structured output, by key, attribute or position. By default ``logits``, else the
            first floating point tensor.
        precision: ``torch.float32`` or ``torch.float64``, where relevance shall be computed in at least this dtype,
            whatever the model's. The model itself runs as it is.
        on_unknown: ``"gradient"`` explains operations without a rule by their gradient and lists them in the ledger.
        allow_training: explain although dropout or batch statistics are active.
        audit: balance every operation and module, in ``explanation.audit``. Every tensor is recorded for that, so it
            takes more memory and time; relevance stays the same.
        create_graph: relevance (of inputs, layers and parameters) becomes part of a graph of its own, as a function of
            the parameters and of inputs that require grad, so that it may stand in a loss. What the model returned is
            in ``explanation.output``, and one ``backward()`` serves both. The forward pass is then the caller's own:
            where the model trains, batch statistics and random state are left as one call of it leaves them.

    Raises:
        DynLRPError: one of its subclasses, saying what is wrong, where, and the cure.
    """
    ((_, explanation),) = explanations(
        model, inputs, [target], conditions=[condition or {}], composite=composite, layers=layers,
        parameters=parameters, output=output, precision=precision, on_unknown=on_unknown,
        allow_training=allow_training, create_graph=create_graph, audit=audit,
    )  # fmt: skip
    return explanation


def explain_many(
    model: Callable[..., Any],
    inputs: Any,
    targets: Iterable[Target] | Literal["all"] = (None,),
    *,
    conditions: Iterable[Condition] = ({},),
    chunk: int | None = None,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
    audit: bool = False,
) -> list[Explanation]:
    """Explain many outputs of a model, or one under many conditions, from one forward pass.

    Targets and conditions are paired; one alone goes with all of the others. Multipliers get a dimension for the
    pairs, so that one traversal of the graph serves ``chunk`` of them; each gets what :func:`explain` gives it alone.
    Targets that are functions are graphs of their own and take a traversal each, as do graphs with an operation that
    cannot take several multipliers at once.

    Args:
        targets: each as in :func:`explain`; ``"all"`` for every output of a sample.
        conditions: each as in :func:`explain`; ``{}`` for none.
        chunk: pairs per traversal; by default as many as some 1 GiB holds multipliers for.

    Returns:
        An explanation per pair. Other arguments and errors are those of :func:`explain`.
    """
    found = dict(
        explanations(
            model, inputs, targets, conditions=conditions, chunk=chunk, composite=composite, layers=layers,
            parameters=parameters, output=output, precision=precision, on_unknown=on_unknown,
            allow_training=allow_training, audit=audit,
        )
    )  # fmt: skip
    return [found[number] for number in sorted(found)]


def explanations(
    model: Callable[..., Any],
    inputs: Any,
    targets: Iterable[Target] | Literal["all"],
    *,
    conditions: Iterable[Condition] = ({},),
    chunk: int | None = None,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
    audit: bool = False,
    create_graph: bool = False,
) -> Iterator[tuple[int, Explanation]]:
    """The explanations of :func:`explain_many` one by one, each with the number of its pair, as they are ready."""
    rules = composite_named(composite)
    _check(on_unknown)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be positive, not {chunk}")
    frozen, buffers = survey(model, allow_training)
    if precision is not None and create_graph:
        raise InputError("precision= and create_graph=True do not go together: bring the model to that dtype instead")
    if audit and create_graph:
        raise InputError(TWICE)
    wide = None if precision is None else Wide(precision)
    asked, conditions = targets if targets == "all" else list(targets), list(conditions)
    if create_graph:
        _are_constants((asked, conditions))
    request = _Request(
        model, inputs, asked, conditions, rules, _names(layers), _names(parameters), output, on_unknown, frozen,
        wide, audit, create_graph,
    )  # fmt: skip
    done: set[int] = set()
    record: Wanted | None = None
    while True:
        with same_state(buffers, allow_training) as state:
            runs = request.forward(record)
            found = _explained(runs, chunk, done, record is EVERYTHING)
            if create_graph:  # the state is kept if all is well
                ready = list(found)
                state.keep = bool(ready) and all(explanation.finite() for _, explanation in ready)
                found = iter(ready)
        for number, explanation in found:
            if not explanation.finite():
                with same_state(buffers, allow_training=True):
                    request.diagnose(number)
            done.add(number)
            yield number, explanation
        if len(done) == sum(len(numbers) for _, numbers in runs):
            return
        record = _lacking(runs) if record is None else EVERYTHING
        del runs, found  # their graph


def _explained(
    runs: Sequence[tuple[_Run, list[int]]], chunk: int | None, done: Set[int], final: bool
) -> Iterator[tuple[int, Explanation]]:
    """What ``runs`` explain and is not yet ``done``; stops where a value is missing that another run could record,
    unless this is the ``final`` one."""
    for run, numbers in runs:
        places = [place for place, number in enumerate(numbers) if number not in done]
        size = chunk or run.room()
        for first in range(0, len(places), size):
            some = places[first : first + size]
            try:
                found = run.explain(some)
            except BrokenPromiseError:
                if final or not run.missing:
                    raise
                return
            if run.missing and not final and any(explanation.ledger.unresolved for explanation in found):
                return
            yield from zip([numbers[place] for place in some], found, strict=True)


def relevance(
    output: Tensor,
    wrt: Tensor | Sequence[Tensor],
    *,
    initial: Tensor | None = None,
    composite: str | Composite = "auto",
    on_unknown: OnUnknown = "error",
    audit: bool = False,
    create_graph: bool = False,
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
        audit: balance every operation, in ``explanation.audit``; those whose activations are neither in the graph nor
            to be recomputed are listed as unresolved.
        create_graph: relevance becomes part of a graph of its own, so that it may stand in a loss beside ``output``.
    """
    if audit and create_graph:
        raise InputError(TWICE)
    if create_graph:
        _are_constants(initial)
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
    run = _Run([seed], rules, on_unknown, create_graph=create_graph)
    run.audit = audit
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            run.observe(str(number), tensor)
        else:
            run.want(*get_gradient_edge(tensor)[:2], tensor if create_graph else tensor.detach())
    (explanation,) = run.explain([0])
    if not explanation.finite():
        run.explain([0], check=True)
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
    rules = composite_named(composite)
    request = _Request(model, inputs, [target], [{}], rules, (), (), output, "gradient", frozen, None)
    fake = active_fake_mode() is not None  # draws nothing, and the model is a copy
    record: Wanted | None = None
    for count in range(1, 4):
        with nullcontext() if fake else same_state(buffers, allow_training):
            runs = request.forward(record, release=False)
        ((run, _),) = runs
        final = record is EVERYTHING
        try:
            settled = run.settle({})
            if not settled.ledger.unresolved or not run.missing or final:
                return settled, count
        except BrokenPromiseError:
            if not run.missing or final:
                raise
        record = _lacking(runs) if record is None else EVERYTHING
    raise AssertionError("the last run records everything")


def _are_constants(given: Any) -> None:
    """Relevance that is to be differentiated is not differentiated by what it starts with or passes through."""
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(given)):
        raise InputError(
            "with create_graph=True, initial relevance and masks are constants: detach() those that require grad, or "
            "make them a function of the output (target=lambda y: ...)"
        )


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


def _lacking(runs: Sequence[tuple[_Run, list[int]]]) -> Wanted:
    """What the promises of a run lacked. Two runs of a model number their operations in the same way, or lack more."""
    lacking = [run for run, _ in runs if run.missing]
    if len(lacking) != 1:  # several graphs, with numbers of their own
        return EVERYTHING
    (run,) = lacking
    assert run.recording is not None
    return {(number - run.recording.start, edge.output) for edge, number in run.missing.items()}


class _Run:
    """A graph with what is wanted of it."""

    def __init__(
        self,
        seeds: Sequence[Seed],
        composite: Composite,
        on_unknown: OnUnknown,
        *,
        create_graph: bool = False,
        release: bool = False,
        recording: Recording | None = None,
        calls: Sequence[Call] = (),
        wide: Wide | None = None,
    ) -> None:
        """``seeds`` start from one tensor; ``calls`` are those of modules that are one step each."""
        node, number = get_gradient_edge(seeds[0].root)[:2]
        self.graph = Gathered(node, calls) if calls else Graph(node)
        root = self.graph.edge(node, number)
        assert root is not None
        self.root, self.seeded = root, seeds[0].relevance
        self.starts = [seed.start for seed in seeds]
        self.values = [seed.value for seed in seeds]
        self.conditions: list[dict[Edge, Tensor]] = [{} for _ in seeds]
        """Masks by the tensor they are for, for each seed."""
        self.axes: dict[str, int] = {}
        self.structure: Structure | None = None
        self.plan: Plan | None = None
        self.alone = False
        """Some operation cannot take the multipliers of several seeds at once."""
        self.composite, self.on_unknown = composite, on_unknown
        self.create_graph, self.release = create_graph, release
        self.recording = recording
        self._running: Callable[[int], tuple[str, ...]] = lambda sequence: ()
        """Paths of the modules that an operation ran in, innermost last, by its number."""
        if recording is not None:
            self._running = recording.modules
        self.wide = wide
        if wide is not None:
            self.starts = [wide.cast(start) for start in self.starts]
        self.aliases: Aliases | None = None
        self.wanted: list[tuple[Edge | None, Rows | None]] = []
        """One entry per source: its edge, and how ids read their embedding's relevance."""
        self.groups: list[list[int]] = []
        """Positions in ``wanted`` per result."""
        self.shapes: list[torch.Size] = []
        self.captured: dict[Edge, tuple[Tensor, int]] = self.graph.values()
        whole = seeds[0].root
        self.captured[root] = (whole if create_graph else whole.detach(), whole._version)
        self.unlinked: dict[Edge, Tensor] = {}
        self.recorded: list[tuple[Node, int, Tensor]] = []
        self.audit = False
        self.auditor: Auditor | None = None
        """Who watched the last pass."""
        self.seen: dict[Edge, tuple[Tensor, int]] = {}
        """What was recorded, by edge."""
        self.missing: dict[Edge, int] = {}
        """Tensors whose values nobody keeps, with the number of their node."""
        self.taps: dict[str, list[Tap | None]] = {}
        self.leaves: dict[str, Edge | None] = {}
        self.rebuild: Callable[[list[Tensor | None]], Any] = lambda values: values
        self.output: Any = None
        """What the model returned, where relevance is to stand in a loss beside it."""

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
        """Ask for the relevance of a tensor on the way."""
        edge = self.graph.edge(node, number)
        shape = tuple(value.shape)
        self.taps.setdefault(name, []).append(None if edge is None else Tap(edge, shape, shape))
        if edge is not None and edge not in self.captured:
            self.captured[edge] = (value, version)

    def tap_attention(self, patterns: Sequence[tuple[str, str]]) -> None:
        """Ask for what attention makes, by glob of the module and kind."""
        assert self.recording is not None
        sources = [edge for edge, _ in self.wanted if edge is not None]
        found = list(attention(self.graph, sources, self.recording.path, len(self.values[0])))
        for glob, kind in patterns:
            fits = [
                (f"{path}:{kind}", tap) for path, of, tap in found if of == kind and fnmatch.fnmatchcase(path, glob)
            ]
            if not fits:
                there = list(dict.fromkeys(f"{path}:{of}" for path, of, _ in found))
                raise InputError(
                    f"no attention makes {glob + ':' + kind!r}; there are {there[:10] or 'none at all'}"
                    + (" (a fused kernel makes no weights)" if kind == "weights" else "")
                )
            for name, tap in dict.fromkeys(fits):
                if tap not in self.taps.setdefault(name, []):
                    self.taps[name].append(tap)

    def place(self, conditions: Sequence[Condition]) -> None:
        """Find the channels of tapped tensors, and make the masks of every seed's condition."""
        for name, taps in self.taps.items():
            self.axes.update((name, self._axis(tap)) for tap in taps[:1] if tap is not None)
        for condition, masks in zip(conditions, self.conditions, strict=True):
            for pattern, selection in condition.items():
                glob, kind = parse(pattern)
                names = [n for n in self.taps if parse(n)[1] == kind and fnmatch.fnmatchcase(parse(n)[0], glob)]
                found = [(name, tap) for name in names for tap in self.taps[name] if tap is not None]
                if not found:
                    raise InputError(f"the condition on {pattern!r} cannot hold: no relevance passes through it")
                for name, tap in found:
                    chosen = tap.place(mask(selection, tap.shape, self._axis(tap), name))
                    chosen = chosen.to(self.graph.nodes[tap.edge.node]._input_metadata[tap.edge.output].device)
                    masks[tap.edge] = chosen if tap.edge not in masks else masks[tap.edge] * chosen

    def _axis(self, tap: Tap) -> int:
        return channel_axis(self.graph, tap.edge, tap.shape) if tap.axis is None else tap.axis

    def keep(self, recorder: Recorder, promised: Wanted | None) -> None:
        """Values of tensors: for an audit, and those that are ``promised`` to rules."""
        start = 0 if self.recording is None else self.recording.start
        self.recorded = list(recorder.values(self.graph.recorded()))
        for node, number, value in self.recorded:
            edge = self.graph.edge(node, number)
            if edge is not None and self.create_graph:
                self.unlinked[edge] = value
            elif edge is not None:
                self.seen[edge] = (value, value._version)
                if promised is not None and (node._sequence_nr() - start, number) in promised:
                    self.captured[edge] = self.seen[edge]

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

    def explain(self, numbers: Sequence[int], check: bool = False) -> list[Explanation]:
        """The explanations of some seeds, in one pass where that can be."""
        try:
            again = self.aliases if self.aliases is not None and self.aliases.reruns else nullcontext()
            recording = torch.set_grad_enabled(self.create_graph)
            with recording, torch.autocast(self.starts[0].device.type, enabled=False), again:
                return self._together(numbers, check)
        except RuntimeError as error:
            if CHANGED in str(error):
                raise BrokenPromiseError(f"a tensor that the graph saved was changed in place: {error}") from error
            if FREED not in str(error):
                raise
            raise FreedGraphError(
                "the saved tensors of this graph are gone: a backward pass freed them. Explain before backward(), or "
                "call backward(retain_graph=True)."
            ) from error

    def room(self) -> int:
        """How many multipliers of the largest tensor on the way ``MEMORY`` holds a few times over."""
        if len(self.starts) == 1:
            return 1
        self.plan = self.plan or self._settled()
        nodes = (self.graph.nodes[index] for step in self.plan.steps for index in step.chain or (step.index,))
        sizes = [math.prod(made.shape) * made.dtype.itemsize for node in nodes for made in node._input_metadata if made]
        return max(1, MEMORY // (8 * max(sizes, default=1)))

    def _together(self, numbers: Sequence[int], check: bool) -> list[Explanation]:
        """One pass for several seeds; where an operation cannot take several at once, one pass for each."""
        if len(numbers) > 1 and not self.alone and not self.audit:
            half = 0
            try:
                return self._batched(numbers)
            except torch.OutOfMemoryError:
                half = len(numbers) // 2  # tried when the error, which holds tensors, is gone
            except (RuleError, RuntimeError):
                self.alone = True  # what is wrong with the seeds themselves shows again
            if half:
                return self._together(numbers[:half], check) + self._together(numbers[half:], check)
        found = []
        for number in numbers:
            release = self.release and number == len(self.starts) - 1
            explanation = self._pass(self.starts[number], self.conditions[number], check, release)
            found.append(self._finish(explanation, number))
        return found

    def _batched(self, numbers: Sequence[int]) -> list[Explanation]:
        """One pass whose multipliers have a dimension for the seeds."""
        edges = list(dict.fromkeys(edge for number in numbers for edge in self.conditions[number]))
        masks = []
        for edge in edges:
            given = [self.conditions[number].get(edge) for number in numbers]
            all_of_it = next(torch.ones_like(m, dtype=torch.bool) for m in given if m is not None)
            masks.append(torch.stack(aten.broadcast_tensors([all_of_it if m is None else m for m in given])))
        made: list[Explanation] = []

        def run(start: Tensor, masks: list[Tensor]) -> list[Tensor]:
            explanation = self._pass(start, dict(zip(edges, masks, strict=True)), False, False)
            made.append(explanation)
            return [*_tensors(explanation), *explanation.ledger.tensors()]

        with quiet_vmap():
            found = torch.func.vmap(run)(torch.stack([self.starts[number] for number in numbers]), masks)
        return [self._finish(_filled(made[0], [t[place] for t in found]), n) for place, n in enumerate(numbers)]

    def _finish(self, explanation: Explanation, number: int) -> Explanation:
        ledger = explanation.ledger
        explanation.value = self.values[number]
        ledger._output = explanation.value.sum(dtype=torch.promote_types(explanation.value.dtype, torch.float32))
        if self.auditor is not None:
            explanation.audit, self.auditor = self.auditor.audit(explanation.value.dtype), None
        if ledger.unresolved and ledger.closes:
            ledger.unresolved.clear()  # constants that nobody kept add up to nothing: paddings and masks
        return explanation

    def _settled(self) -> Plan:
        """The plan of this graph."""
        sources = [edge for edge, _ in self.wanted if edge is not None]
        if not sources:
            raise NoPathError(
                "the output does not depend on any of the inputs through differentiable operations: integer inputs "
                "count where they index an embedding, and torch.no_grad, detach and numpy cut the graph"
            )
        self.structure = self.graph.structure(
            self.root,
            sources,
            kept=self._keep(),
            seeded=self.seeded,
            observed=tuple([edge.node for edge in self.leaves.values() if edge is not None]),
            modules=self._modules() if self.composite.by_path else None,
        )
        return self._plan(self.structure)

    def _keep(self) -> tuple[Edge, ...]:
        """Edges whose relevance is wanted."""
        sources = (edge for edge, _ in self.wanted)
        tapped = (None if tap is None else tap.edge for taps in self.taps.values() for tap in taps)
        return tuple(dict.fromkeys(e for e in (*sources, *tapped, *self.leaves.values()) if e is not None))

    def settle(self, masks: Mapping[Edge, Tensor], check: bool = False, release: bool = False) -> Settled:
        """The rule of every operation and the keeper of every promise, without touching data."""
        self.plan = plan = self.plan or self._settled()
        keep = self._keep()
        ledger = AuditedLedger() if self.audit else Ledger()
        promises = Promises(self.graph, plan.consumers, self.captured, self.wide, self.unlinked)
        places = Paths(self._running)
        ledger._path = places.path
        expand = Expander(self.composite, self.on_unknown, ledger, places)
        auditor = None
        if isinstance(ledger, AuditedLedger):
            seen = {**self.captured, **self.seen}
            auditor = Auditor(plan, self.graph, seen, ledger, places.path, self.root)
        walk = Walk(
            plan, self.graph, promises, ledger, expand, masks=masks, check=check, release=release, wide=self.wide,
            auditor=auditor,
        )  # fmt: skip
        tables = [rows.table for _, rows in self.wanted if rows is not None and rows.table is not None]
        values = (plan.activation(edge) for edge in (*keep, *masks))
        try:
            walk.settle([edge for edge in values if edge is not None] + tables)
        finally:
            self.missing |= {edge: self.graph.nodes[edge.node]._sequence_nr() for edge in promises.missing}
        assert self.structure is not None
        return Settled(self.graph, self.structure, plan, walk, promises, ledger, keep, places.path)

    def _pass(self, start: Tensor, masks: Mapping[Edge, Tensor], check: bool, release: bool) -> Explanation:
        """One pass; the explanation's value is left open."""
        _, _, plan, walk, promises, ledger, keep, _ = self.settle(masks, check, release)
        sources = list(dict.fromkeys(edge for edge, _ in self.wanted if edge is not None))
        visited = plan.visited
        sequences = {edge: self.graph.nodes[edge.node]._sequence_nr() for edge in sources}
        if release:
            self.graph.forget()
        self.auditor = walk.auditor
        arrived = walk.run(start, self.root, keep)

        def read(edge: Edge | None) -> Tensor | None:
            if edge is None or edge not in arrived:
                return None
            activation = plan.activation(edge)
            return arrived[edge] if activation is None else product(arrived[edge], promises.take(activation))

        found = {edge: read(edge) for edge in keep}
        for source in sources:
            value = found[source]
            if value is not None and source in plan.ends:
                if walk.auditor is not None:
                    walk.auditor.leaves(source)
                ledger.book("inputs", self.graph.names[source.node], sequences[source], value.sum())
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

        def shown(tap: Tap | None) -> Tensor | None:
            value = None if tap is None else found.get(tap.edge)
            return value if value is None or tap is None else tap.show(value)

        return Explanation(
            relevance=self.rebuild(results),
            value=start,
            ledger=ledger,
            layers={name: _single([shown(tap) for tap in taps]) for name, taps in self.taps.items()},
            parameters={name: found.get(edge) if edge else None for name, edge in self.leaves.items()},
            promises=promises.report(visited),
            composite=self.composite.name,
            axes=self.axes,
            output=self.output,
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


def _tensors(explanation: Explanation) -> list[Tensor]:
    """All relevance, in a fixed order."""
    trees = (explanation.relevance, explanation.layers, explanation.parameters)
    return [t for t in pytree.tree_leaves(trees) if isinstance(t, Tensor)]


def _filled(explanation: Explanation, tensors: Sequence[Tensor]) -> Explanation:
    """The same explanation with other relevance and other amounts."""
    rest = iter(tensors)
    trees = (explanation.relevance, explanation.layers, explanation.parameters)
    relevance, layers, parameters = pytree.tree_map(lambda t: next(rest) if isinstance(t, Tensor) else t, trees)
    ledger = explanation.ledger.with_tensors(list(rest))
    return replace(explanation, relevance=relevance, layers=layers, parameters=parameters, ledger=ledger)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Without a warning for each kernel that vmap runs once per seed, such as fused attention."""
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


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
        flat = rows.new_zeros(shape.numel() + 1)
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
    """What was asked, so that a failed run can be repeated for diagnosis."""

    model: Any
    inputs: Any
    targets: list[Target] | Literal["all"]
    conditions: list[Condition]
    composite: Composite
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    output: str | int | None
    on_unknown: OnUnknown
    frozen: bool
    wide: Wide | None
    audit: bool = False
    create_graph: bool = False

    def forward(self, record: Wanted | None = None, release: bool = True) -> list[tuple[_Run, list[int]]]:
        """Run the model and gather what is wanted; the values of the tensors in ``record`` are kept on the way.

        Returns a run for every tensor that relevance starts from, with the numbers of the pairs it is for.
        """
        attached = self.create_graph and release  # else it is only to be looked at
        with torch.inference_mode(False), torch.enable_grad():
            leaves, spec = pytree.tree_flatten(as_dicts(self.inputs))
            given = [_prepare(leaf, attached) for leaf in leaves]
            if not any(isinstance(leaf, Tensor) for leaf in leaves):
                raise InputError("the inputs hold no tensor")
            arguments = pytree.tree_unflatten(given, spec)
            # Before the model can change them in place.
            entries = [_entry(argument) for argument in given]
            places = list(dict.fromkeys([*self.layers, *(name for c in self.conditions for name in c)]))
            recording = Recording(self.model, places, self.composite, attached)
            frozen = frozen_parameters(self.model) if self.frozen else []
            names = self._parameter_names()
            aliases = Aliases(frozen, [self.model.get_parameter(n) for n in names]) if frozen else None
            wanted = EVERYTHING if self.audit else record
            recorder = None if wanted is None else Recorder(wanted)
            saving = nullcontext() if self.wide is None else self.wide.saving()
            with recording.watching(), saving, aliases or nullcontext(), recorder or nullcontext():
                result = call(self.model, arguments)
            found = find_output(result, self.output)
            sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
            targets = all_targets(found) if self.targets == "all" else self.targets
            plain = any(target is None or isinstance(target, int) for target in targets)
            if plain and found.ndim == 1 and sizes and len(found) not in sizes:
                raise TargetError(
                    f"the output of shape {tuple(found.shape)} has no batch dimension that fits the inputs; add one "
                    f"in front of the inputs (x.unsqueeze(0)) so that the output is (batch, ...)"
                )
            targets, conditions = _paired(targets, self.conditions)
            groups: dict[tuple[int, bool], list[tuple[int, Seed]]] = {}
            with recorder or nullcontext():
                for number, target in enumerate(targets):
                    seed = make_seed(found, target)
                    groups.setdefault((id(seed.root), seed.relevance), []).append((number, seed))
            returned = result if attached else None
            del result, found
            calls = recording.take_calls()
            runs = []
            for group in groups.values():
                numbers = [number for number, _ in group]
                seeds = [seed for _, seed in group]
                run = _Run(
                    seeds, self.composite, self.on_unknown, create_graph=attached,
                    release=release and not attached, recording=recording, calls=calls, wide=self.wide,
                )  # fmt: skip
                run.output = returned
                runs.append((run, numbers))
                run.aliases = aliases
                run.audit = self.audit
                if recorder is not None:
                    run.keep(recorder, record)
                order: list[int | None] = []
                ids: list[Tensor] = []
                for leaf, argument, entry in zip(leaves, given, entries, strict=True):
                    order.append(None)
                    if entry is not None:
                        order[-1] = run.want(*entry, leaf if attached else leaf.detach())
                    elif isinstance(leaf, Tensor) and not argument.is_floating_point() and argument.dtype != torch.bool:
                        order[-1] = -1 - len(ids)
                        ids.append(argument)
                rows = run.want_rows(ids)
                run.rebuild = _Rebuild([None if n is None else n if n >= 0 else rows[-1 - n] for n in order], spec)
                run.taps = {name: [] for name in recording.requested()}
                for name, outputs in recording.outputs.items():
                    for node, number, value, version in outputs:
                        run.tap(name, node, number, value, version)
                heads = [pattern for pattern in map(parse, places) if pattern[1] in ATTENTION]
                if heads:
                    run.tap_attention(heads)
                run.place([conditions[number] for number in numbers])
                for name in names:
                    parameter = self.model.get_parameter(name)
                    run.observe(name, parameter if aliases is None else aliases.stand_in(parameter))
            recording.outputs.clear()
        return runs

    def diagnose(self, number: int) -> None:
        """Run again with every value looked at, and raise for the first that is not finite."""
        for place, leaf in enumerate(pytree.tree_leaves(as_dicts(self.inputs))):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise NonFiniteError(f"input {place} holds NaN or infinity")
        run, numbers = next(pair for pair in self.forward(EVERYTHING, release=False) if number in pair[1])
        assert run.recording is not None
        for node, _, value in run.recorded:
            operation = REGISTRY.get(node.name())
            if operation is not None and operation.copies:
                continue
            if bool((torch.isnan(value) | (value == torch.inf)).any()):  # scores may be masked with -inf
                path = run.recording.path(node._sequence_nr())
                raise NonFiniteError(f"an activation is not finite first behind {node.name()} in {path or 'the model'}")
        place = numbers.index(number)
        if not bool(torch.isfinite(run.values[place]).all()):
            raise NonFiniteError("the explained output is not finite")
        run.explain([place], check=True)
        raise NonFiniteError("relevance is not finite")

    def _parameter_names(self) -> list[str]:
        if not self.parameters:
            return []
        if not isinstance(self.model, nn.Module):
            raise InputError("parameters= needs an nn.Module")
        everything = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        names: dict[str, int] = {}
        for pattern in self.parameters:
            found = [name for name in everything if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                raise InputError(f"no parameter is called {pattern!r}; the model has {everything[:8]} ...")
            for name in found:
                parameter = id(self.model.get_parameter(name))
                if name == pattern or parameter not in names.values():  # a glob finds a tied one once
                    names[name] = parameter
        return list(names)


def _paired(targets: Sequence[Target], conditions: Sequence[Condition]) -> tuple[list[Target], list[Condition]]:
    """Targets and conditions of the same length."""
    if not targets or not conditions:
        raise InputError("there are no targets" if not targets else "there are no conditions")
    count = max(len(targets), len(conditions))
    if {len(targets), len(conditions)} - {1, count}:
        raise InputError(f"{len(targets)} targets do not pair with {len(conditions)} conditions")
    return [targets[n % len(targets)] for n in range(count)], [conditions[n % len(conditions)] for n in range(count)]


@dataclass(frozen=True)
class _Rebuild:
    """Results in the structure of the inputs; ``places`` are their numbers, None for inputs without."""

    places: Sequence[int | None]
    spec: Any

    def __call__(self, found: Sequence[Tensor | None]) -> Any:
        return pytree.tree_unflatten([None if n is None else found[n] for n in self.places], self.spec)


def as_dicts(inputs: Any) -> Any:
    """Mappings of any kind as dicts."""
    if isinstance(inputs, Mapping):
        return {key: as_dicts(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(as_dicts(value) for value in inputs)
    return inputs


def _prepare(leaf: Any, attached: bool) -> Any:
    """A copy of an input that the model may do with as it likes; floating point copies are in the graph, and if
    ``attached`` in that of the input."""
    if not isinstance(leaf, Tensor):
        return leaf
    if attached and leaf.requires_grad:
        return leaf.clone()
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

"""A graph with what is wanted of it, and the passes through it that answer."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dynlrp.aliases import Aliases
from dynlrp.auditor import AuditedLedger, Auditor
from dynlrp.capture import Call, Kept, Recording, Shared
from dynlrp.catalogue import view_nodes
from dynlrp.composite import innermost
from dynlrp.condition import Condition, channel_axis, mask
from dynlrp.errors import (
    BrokenPromiseError,
    FreedGraphError,
    InputError,
    NoPathError,
    RuleError,
    UnknownOperationError,
)
from dynlrp.expansion import Expander, Paths
from dynlrp.explanation import Explanation
from dynlrp.graph import CHANGED, DEEP, FREED, KEEPS_NODE, LEAF, Edge, Graph, Node, Structure
from dynlrp.ledger import Ledger
from dynlrp.names import matching
from dynlrp.options import Options
from dynlrp.places import Tap, attention, parse
from dynlrp.plan import Plan, StepPlan, UnknownNodes, make_plan
from dynlrp.promise import Promises, is_changed
from dynlrp.recorder import Recorder, Wanted
from dynlrp.rows import Rows, find_rows
from dynlrp.rules.operation import REGISTRY, product
from dynlrp.submodule import Gathered
from dynlrp.target import Seed
from dynlrp.walk import Walk

aten: Any = torch.ops.aten
functorch: Any = torch._C._functorch

EXACT = torch.finfo(torch.float64).eps
MEMORY = 2**30
"""Bytes that the multipliers of one pass over many targets may take, roughly."""


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


class Group(NamedTuple):
    """One result: the tensors whose relevance makes it, and how ids read that of their embeddings."""

    sources: Sequence[tuple[Edge, Rows | None]]
    shape: torch.Size


class Run:
    """A graph with what is wanted of it."""

    def __init__(
        self,
        seeds: Sequence[Seed],
        options: Options,
        *,
        attached: bool = False,
        release: bool = False,
        recording: Recording | None = None,
        calls: Sequence[Call] = (),
    ) -> None:
        """``seeds`` start from one tensor; ``calls`` are those of modules that are one step each. ``attached``:
        relevance is to be part of a graph. ``release``: this one is free to go."""
        node, number = get_gradient_edge(seeds[0].root)[:2]
        self.graph = Gathered(node, calls) if calls else Graph(node)
        self._whole: Tensor | None = None
        """Holds the graph together, where a node of a custom function goes with what uses it."""
        if not KEEPS_NODE and any(isinstance(n, torch._C._FunctionBase) for n in self.graph.recorded()):
            self._whole, release = seeds[0].root, False
        if not release:
            self.graph.outlast(node)
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
        self.options, self.attached, self.release = options, attached, release
        self.recording = recording
        self._running: Callable[[int], tuple[str, ...]] = lambda sequence: ()
        """Paths of the modules that an operation ran in, innermost last, by its number."""
        if recording is not None:
            self._running = recording.modules
        self.wide = wide = options.wide
        if wide is not None:
            self.starts = [wide.cast(start) for start in self.starts]
        self.aliases: Aliases | None = None
        self.groups: list[Group] = []
        self.captured: dict[Edge, tuple[Tensor, int]] = self.graph.values()
        whole = seeds[0].root
        self.captured[root] = (whole if attached else whole.detach(), whole._version)
        self.unlinked: dict[Edge, Tensor] = {}
        self.recorded: list[tuple[Node, int, Tensor]] = []
        self.auditor: Auditor | None = None
        """Who watched the last pass."""
        self.seen: dict[Edge, tuple[Tensor, int]] = {}
        """What was recorded, by edge."""
        self.missing: dict[Edge, int] = {}
        """Tensors whose values nobody keeps, with the number of their node."""
        self.taps: dict[str, list[Tap | None]] = {}
        self.beside: dict[str, list[Tap]] = {}
        """What a module returned beside that."""
        self.leaves: dict[str, Edge | None] = {}
        self.rebuild: Callable[[list[Tensor | None]], Any] = lambda values: values
        self.output: Any = None
        """What the model returned, where relevance is to stand in a loss beside it."""

    def want(self, node: Node, number: int, value: Tensor) -> int:
        """Ask for the relevance of a tensor of the graph; returns the number of the result."""
        edge = self.graph.edge(node, number)
        if edge is not None:
            self.captured[edge] = (value, value._version)
        self.groups.append(Group([] if edge is None else [(edge, None)], value.shape))
        return len(self.groups) - 1

    def want_rows(self, inputs: Sequence[Tensor]) -> list[int]:
        """Ask for one number per id of every embedding that one of ``inputs`` indexes; returns the numbers of the
        results."""
        first = len(self.groups)
        with self._again():
            found = find_rows(self.graph, inputs, self.sources())
        self.groups += [Group(embeddings, ids.shape) for embeddings, ids in zip(found, inputs, strict=True)]
        return list(range(first, len(self.groups)))

    def sources(self) -> list[Edge]:
        """Tensors whose relevance makes the results."""
        return list(dict.fromkeys(edge for group in self.groups for edge, _ in group.sources))

    def tell_apart(self, shared: Shared) -> None:
        """Refuse two tensors that have one memory where one of them is changed in place and the other is used behind
        that: the graph does not know."""
        tensors = (shared.given, shared.output)
        for tensor, (node, _), other in zip(tensors, shared.edges, reversed(shared.edges), strict=True):
            written, below = None, tensor.grad_fn
            while below is not None and below is not node:
                written, below = below, next((child for child, _ in below.next_functions), None)
            edge = self.graph.edge(*other)
            if written is None or below is None or edge is None:
                continue
            last = self._last_use(edge)
            if last is not None and last._sequence_nr() > written._sequence_nr():
                write, use = (
                    f"{node.name()} in {innermost(self._running(node._sequence_nr())) or 'the model'}"
                    for node in (written, last)
                )
                raise InputError(
                    f"{shared.name!r} returns a tensor whose memory has another name in the model: it is changed in "
                    f"place under one name ({write}) and used later under the other ({use}), where the graph does not "
                    f"tell whether that is the same part. Write it out of place (x = x + 1, not x += 1), or return a "
                    f"copy (x.clone())"
                )

    def _last_use(self, edge: Edge) -> Node:
        """The last operation that uses a tensor or one of its views; None where there is none."""
        views, edges, last = view_nodes(), {edge}, None
        for index, operands in enumerate(self.graph.operands):  # which come before their consumers
            if edges.intersection(operands):
                node = self.graph.nodes[index]
                if last is None or node._sequence_nr() > last._sequence_nr():
                    last = node
                if self.graph.names[index] in views:
                    edges.update(Edge(index, output) for output in range(len(node._input_metadata)))
        return last

    def tap(self, name: str, kept: Sequence[Kept]) -> None:
        """Ask for the relevance of a tensor on the way; what came with it may be masked."""
        first, *others = [self._tap(name, tensor) for tensor in kept]
        self.taps.setdefault(name, []).append(first)
        self.beside.setdefault(name, []).extend(tap for tap in others if tap is not None)

    def _tap(self, name: str, kept: Kept) -> Tap | None:
        edge = self.graph.edge(kept.node, kept.number)
        if edge is None:
            if kept.base is not None and kept.value._version != kept.version and self.graph.edge(*kept.base):
                raise InputError(
                    f"{name!r} is a view of another tensor and was changed in place, so that it is no part of the "
                    f"graph any more: ask for the output of the module that made it as well, or write the change out "
                    f"of place (nn.ReLU() instead of nn.ReLU(inplace=True))"
                )
            return None
        self.captured.setdefault(edge, (kept.value, kept.version))
        shape = tuple(kept.value.shape)
        return Tap(edge, shape, shape, kept.order)

    def tap_attention(self, patterns: Sequence[tuple[str, str]]) -> None:
        """Ask for what attention makes, by glob of the module and kind."""
        assert self.recording is not None
        found = list(attention(self.graph, self.sources(), self.recording.path, len(self.values[0])))
        for glob, kind in patterns:
            names = [f"{path}:{of}" for path, of, _ in found]
            why = "a fused kernel makes no weights" if kind == "weights" else ""
            fits = set(matching(f"{glob}:{kind}", names, "tensor of an attention", why))
            for name, (_, _, tap) in zip(names, found, strict=True):
                if name in fits and tap not in self.taps.setdefault(name, []):
                    self.taps[name].append(tap)

    def place(self, conditions: Sequence[Condition]) -> None:
        """Find the channels of tapped tensors, and make the masks of every seed's condition."""
        for name, taps in self.taps.items():
            self.axes.update((name, self._axis(tap)) for tap in taps[:1] if tap is not None)
        for condition, masks in zip(conditions, self.conditions, strict=True):
            for pattern, selection in condition.items():
                glob, kind = parse(pattern)
                names = [n for n in self.taps if parse(n)[1] == kind and fnmatch.fnmatchcase(parse(n)[0], glob)]
                found = [(name, tap) for name in names for tap in self._returned(name)]
                if not found:
                    raise InputError(f"the condition on {pattern!r} cannot hold: no relevance passes through it")
                for name, tap in found:
                    chosen = tap.place(mask(selection, tap.shape, self._axis(tap), name))
                    chosen = chosen.to(self.graph.nodes[tap.edge.node]._input_metadata[tap.edge.output].device)
                    masks[tap.edge] = chosen if tap.edge not in masks else masks[tap.edge] * chosen

    def _returned(self, name: str) -> list[Tap]:
        """All tensors of this name, and those that a module returned beside it: relevance passes all of them."""
        taps = [tap for tap in self.taps[name] if tap is not None]
        beside = self.beside.get(name, [])
        if beside:
            taps = [*taps, *beside]
            if len({(len(tap.shape), *(tap.shape[self._axis(tap)] for _ in tap.shape[:1])) for tap in taps}) > 1:
                raise InputError(
                    f"{name!r} stands for several tensors that relevance passes through, with no channels in common: "
                    f"{', '.join(dict.fromkeys(str(tap.shape) for tap in taps))}. Name one by its number, "
                    f"{name + ':0'!r} or {name + ':1'!r}."
                )
        return taps

    def _axis(self, tap: Tap) -> int:
        return channel_axis(self.graph, tap.edge, tap.shape) if tap.axis is None else tap.axis

    def keep(self, recorder: Recorder, promised: Wanted | None) -> None:
        """Values of tensors: for an audit, and those that are ``promised`` to rules."""
        start = 0 if self.recording is None else self.recording.start
        self.recorded = list(recorder.values(self.graph.recorded()))
        for node, number, value in self.recorded:
            edge = self.graph.edge(node, number)
            if edge is not None and self.attached and number >= 0:  # constants have no graph
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

    def changed(self) -> str:
        """An operation that saved a leaf that was changed in place since, if any."""
        names, nodes = self.graph.names, self.graph.nodes
        for node, name, operands in zip(nodes, names, self.graph.operands, strict=True):
            kept = REGISTRY[name].saved if name in REGISTRY else {}
            for position, edge in enumerate(operands):
                leaf = edge is not None and position in kept and names[edge.node] == LEAF and nodes[edge.node].variable
                if isinstance(leaf, Tensor) and leaf._version and is_changed(node, kept[position]):
                    return name
        return ""

    def explain(self, numbers: Sequence[int], check: bool = False) -> list[Explanation]:
        """The explanations of some seeds, in one pass where that can be."""
        try:
            with self._passing():
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

    def bare(self) -> tuple[Tensor, Explanation]:
        """The explained output and the explanation of the first seed, without a look at any number."""
        with self._passing():
            return self.values[0], self._pass(self.starts[0], self.conditions[0], False, self.release)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        recording = torch.set_grad_enabled(self.attached)
        with recording, torch.autocast(self.starts[0].device.type, enabled=False), self._again():
            yield

    def _again(self) -> AbstractContextManager[object]:
        """Where saved tensors are read, which may run parts of the model again."""
        return self.aliases if self.aliases is not None and self.aliases.reruns else nullcontext()

    def room(self) -> int:
        """How many multipliers of the largest tensor on the way ``MEMORY`` holds a few times over."""
        if len(self.starts) == 1:
            return 1
        self.plan = self.plan or self._settled()
        flat = (made for made in self._made(self.plan) if not made.is_nested_tensor)  # which have no shape
        sizes = [math.prod(made.shape) * made.dtype.itemsize for made in flat]
        return max(1, MEMORY // (8 * max(sizes, default=1)))

    def _made(self, plan: Plan) -> Iterator[Any]:
        """Shape and dtype of all that is made on the way, and of the sources."""
        steps = (index for step in plan.steps for index in step.chain or (step.index,))
        for index in (*steps, *(source.node for source in self.sources())):
            yield from filter(None, self.graph.nodes[index]._input_metadata)

    def _is_coarse(self, plan: Plan) -> bool:
        """Whether a model of float64 computes in a coarser dtype on the way, as some do in norms."""
        if self.values[0].dtype is not torch.float64:
            return False
        dtypes = {made.dtype for made in self._made(plan)}
        return any(torch.finfo(d).eps > EXACT for d in dtypes if d.is_floating_point or d.is_complex)

    def _together(self, numbers: Sequence[int], check: bool) -> list[Explanation]:
        """One pass for several seeds; where an operation cannot take several at once, one pass for each."""
        if len(numbers) > 1 and not self.alone and not self.options.audit:
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
            return explanation.everything()

        with quiet_vmap():
            found = torch.func.vmap(run)(torch.stack([self.starts[number] for number in numbers]), masks)
        return [self._finish(made[0].filled([t[place] for t in found]), n) for place, n in enumerate(numbers)]

    def _finish(self, explanation: Explanation, number: int) -> Explanation:
        explanation.complete(self.values[number])
        if self.auditor is not None:
            explanation.audit, self.auditor = self.auditor.audit(explanation.value.dtype), None
        return explanation

    def _settled(self) -> Plan:
        """The plan of this graph."""
        sources = self.sources()
        if not sources:
            raise NoPathError(
                "the output does not depend on any of the inputs through differentiable operations: integer inputs "
                "count where they index an embedding or a parameter (a buffer is no part of the graph: make it a "
                "Parameter that does not require grad), one tensor of them at a time; and torch.no_grad, detach and "
                "numpy cut the graph"
            )
        aside = [tap.edge for taps in self.taps.values() for tap in taps if tap is not None]
        aside += [edge for edge in self.leaves.values() if edge is not None]
        self.structure = self.graph.structure(
            self.root,
            sources,
            kept=self._keep(),
            seeded=self.seeded,
            observed=tuple(dict.fromkeys(edge.node for edge in aside)),
            modules=self._modules() if self.options.composite.by_path else None,
        )
        return self._plan(self.structure)

    def _keep(self) -> tuple[Edge, ...]:
        """Edges whose relevance is wanted, or masked."""
        tapped = (None if tap is None else tap.edge for taps in self.taps.values() for tap in taps)
        masked = (edge for masks in self.conditions for edge in masks)
        edges = (*self.sources(), *tapped, *masked, *self.leaves.values())
        return tuple(dict.fromkeys(edge for edge in edges if edge is not None))

    def settle(self, masks: Mapping[Edge, Tensor], check: bool = False, release: bool = False) -> Settled:
        """The rule of every operation and the keeper of every promise, without touching data."""
        self.plan = plan = self.plan or self._settled()
        keep = self._keep()
        ledger = AuditedLedger() if self.options.audit else Ledger()
        promises = Promises(self.graph, plan.consumers, self.captured, self.wide, self.unlinked)
        places = Paths(self._running)
        ledger._path, ledger._coarse = places.path, self._is_coarse(plan)
        expand = Expander(self.options.composite, self.options.on_unknown, ledger, places)
        auditor = None
        if isinstance(ledger, AuditedLedger):
            seen = {**self.captured, **self.seen}
            auditor = Auditor(plan, self.graph, seen, ledger, places.path, self.root)
        walk = Walk(
            plan, self.graph, promises, ledger, expand, masks=masks, check=check, release=release, wide=self.wide,
            auditor=auditor,
        )  # fmt: skip
        embeddings = [rows for group in self.groups for _, rows in group.sources if rows is not None]
        tables = [rows.table for rows in embeddings if rows.table is not None]
        values = (plan.activation(edge) for edge in (*keep, *masks))
        try:
            walk.settle([edge for edge in values if edge is not None] + tables)
        except BaseException:
            walk.forget()
            raise
        finally:
            self.missing |= {edge: self.graph.nodes[edge.node]._sequence_nr() for edge in promises.missing}
        assert self.structure is not None
        return Settled(self.graph, self.structure, plan, walk, promises, ledger, keep, places.path)

    def _pass(self, start: Tensor, masks: Mapping[Edge, Tensor], check: bool, release: bool) -> Explanation:
        """One pass; the explanation's value is left open."""
        _, _, plan, walk, promises, ledger, keep, _ = self.settle(masks, check, release)
        sources = self.sources()
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
                ledger.book_inputs(self.graph.names[source.node], sequences[source], value)
        results: list[Tensor | None] = []
        for group in self.groups:
            parts = []
            for edge, rows in group.sources:
                part = found.get(edge)
                if part is not None:
                    table = None if rows is None or rows.table is None else promises.take(rows.table)
                    parts.append(part if rows is None else rows.read(part, group.shape, table))
            results.append(sum(parts[1:], parts[0]) if parts else None)

        def shown(tap: Tap | None) -> Tensor | None:
            value = None if tap is None else found.get(tap.edge)
            return value if value is None or tap is None else tap.show(value)

        explanation = Explanation(
            relevance=self.rebuild(results),
            value=start,
            ledger=ledger,
            layers={name: _single([shown(tap) for tap in taps]) for name, taps in self.taps.items()},
            parameters={name: found.get(edge) if edge else None for name, edge in self.leaves.items()},
            promises=promises.report(visited),
            composite=self.options.composite.name,
            axes=self.axes,
            output=self.output,
        )
        if self.attached and visited > DEEP:
            for tensor in explanation.everything():
                if tensor.grad_fn is not None:
                    Graph(tensor.grad_fn).outlast(tensor.grad_fn)
        return explanation

    def _modules(self) -> tuple[tuple[str, ...], ...]:
        """The same of every node, for a composite that selects by them."""
        found = tuple([self._running(node._sequence_nr()) for node in self.graph.nodes])
        paths = {innermost(modules) for modules in found}
        matched = self.recording.matched if self.recording is not None else ()
        composite = self.options.composite
        for when in composite.conditions:
            if when.path is not None and not fnmatch.filter(paths, when.path):
                raise InputError(f"composite {composite.name!r} selects by path {when.path!r}, where no operation runs")
            if when.module is not None and when not in matched:
                raise InputError(
                    f"composite {composite.name!r} selects the module {when.module!r}: "
                    + (
                        "no module that has this as its first name ran, or only inside of one that is a step already"
                        if self.recording is not None
                        else "a graph alone does not tell which modules it is from, use explain()"
                    )
                )
        return found

    def _plan(self, structure: Structure) -> Plan:
        try:
            return make_plan(structure, self.options.composite, self.options.on_unknown, REGISTRY.version)
        except UnknownNodes as error:
            numbers = [(name, self.graph.nodes[index]._sequence_nr()) for index, name in error.nodes]
            places = [(name, innermost(self._running(number))) for name, number in numbers]
            raise UnknownOperationError(places, error.reasons) from None


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

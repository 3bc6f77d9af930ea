"""Explaining one operation by plain operations: its re-run is a graph of its own that relevance walks through."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import get_gradient_edge

from dynlrp.composite import Composite, innermost
from dynlrp.errors import BrokenPromiseError, NoPathError, RuleError, UnknownOperationError
from dynlrp.graph import Edge, Graph, Structure, next_number
from dynlrp.ledger import Ledger
from dynlrp.plan import Kind, Plan, UnknownNodes, make_plan
from dynlrp.promise import Promises, plain
from dynlrp.recorder import Recorder
from dynlrp.rules.operation import REGISTRY, Grads, Replay, divide, dot
from dynlrp.walk import LiveStep, Walk


class Paths:
    """Where an operation ran, by its sequence number; one that is a part of another ran where that one did."""

    def __init__(self, modules: Callable[[int], tuple[str, ...]]) -> None:
        self._modules = modules
        self._starts: list[int] = []
        """First sequence number of every re-run; they grow, as the numbers do."""
        self._stands_for: list[int] = []
        """Sequence number of the operation that was re-run."""

    def runs_again(self, sequence: int) -> None:
        """What is recorded from now on is a part of the operation with this number."""
        self._starts.append(next_number())
        self._stands_for.append(sequence)

    def modules(self, sequence: int) -> tuple[str, ...]:
        """Paths of the modules that an operation ran in, or the one that it is a part of, innermost last."""
        while self._starts and sequence >= self._starts[0]:
            sequence = self._stands_for[bisect_right(self._starts, sequence) - 1]
        return self._modules(sequence)

    def path(self, sequence: int) -> str:
        """Path of the innermost of them."""
        return innermost(self.modules(sequence))


class Expander:
    """Walks through re-runs of operations under one composite, booking into one ledger."""

    def __init__(self, composite: Composite, on_unknown: str, ledger: Ledger, paths: Paths) -> None:
        self.composite = composite
        self.on_unknown = on_unknown
        self.ledger = ledger
        self.paths = paths
        self._recorded: set[str] = set()
        """Operations whose re-runs keep too little by themselves."""

    def path(self, sequence: int) -> str:
        return self.paths.path(sequence)

    def __call__(
        self, step: LiveStep, function: Replay, values: Sequence[Tensor | None], grads: Grads
    ) -> list[Tensor | None]:
        """Multipliers of the operands from those of the outputs."""
        if step.auditor is None and step.name not in self._recorded:
            found = self._through(step, function, values, grads, None)
            if found is not None:
                return found
            self._recorded.add(step.name)
        found = self._through(step, function, values, grads, Recorder())
        assert found is not None
        return found

    def _through(
        self,
        step: LiveStep,
        function: Replay,
        values: Sequence[Tensor | None],
        grads: Grads,
        recorder: Recorder | None,
    ) -> list[Tensor | None] | None:
        """The same; None where nothing was recorded and a value is missing that a recorder would keep."""
        results: list[Tensor | None] = [None] * len(values)
        self.paths.runs_again(step.node._sequence_nr())
        attached = torch.is_grad_enabled()
        with torch.enable_grad(), temporarily_clear_interpreter_stack():  # multipliers of many targets are vmapped
            leaves = [_leaf(value, attached) for value in values]
            with recorder or nullcontext():
                made = function(step, *leaves)
                outputs = made if isinstance(made, tuple) else (made,)
                _agree(step, outputs, grads)
                pairs = [(y, g) for y, g in zip(outputs, grads, strict=False) if y is not None and g is not None]
                if not pairs:
                    return results
                # Several roots are one after a concatenation.
                root = pairs[0][0] if len(pairs) == 1 else torch.cat([y.reshape(-1) for y, _ in pairs])
        start = pairs[0][1] if len(pairs) == 1 else torch.cat([g.reshape(-1) for _, g in pairs])
        if not root.requires_grad:
            step.book("held back", dot(start, root))
            return results
        node, number = get_gradient_edge(root)[:2]
        graph = Graph(
            node, ends={leaf.grad_fn: leaf for leaf in leaves if leaf is not None and leaf.grad_fn is not None}
        )
        edges = [None if leaf is None or not leaf.requires_grad else _edge(graph, leaf) for leaf in leaves]
        present = [(place, edge) for place, edge in enumerate(edges) if edge is not None]
        try:
            plan, structure = self._plan(step, graph, Edge(len(graph.nodes) - 1, number), present)
        except NoPathError:
            step.book("held back", dot(start, root.detach()))
            return results
        recorded = {
            edge: value
            for made_by, output, value in (() if recorder is None else recorder.values(graph.nodes))
            if (edge := graph.edge(made_by, output)) is not None
        }
        captured = {} if attached else {edge: (value, value._version) for edge, value in recorded.items()}
        promises = Promises(graph, plan.consumers, captured, unlinked=recorded if attached else {})
        # What leads to observed weights alone is in no account.
        expander = self if step.plan.travels else Expander(self.composite, self.on_unknown, Ledger(), self.paths)
        auditor = step.auditor
        if auditor is not None:
            auditor = auditor.inside(plan, graph, captured, structure.root)
        notes = Ledger()
        walk = Walk(plan, graph, promises, notes, expander, auditor=auditor)
        try:
            walk.settle([])
        except BrokenPromiseError:
            if recorder is None and promises.missing:
                return None
            raise
        if recorder is None and promises.missing:
            walk.forget()
            return None
        expander.ledger.note(notes)
        walk.ledger = expander.ledger
        wanted = [(place, edge) for place, edge in present if step.wants[place]]
        arrived = walk.run(start, structure.root, [edge for _, edge in wanted])
        for place, edge in wanted:
            m, leaf = arrived.get(edge), leaves[place]
            if m is not None and leaf is not None and edge in plan.relevance_edges:
                m = divide(m, plain(leaf).conj(), 0.0)
            results[place] = m
        return results

    def _plan(
        self, step: LiveStep, graph: Graph, root: Edge, present: Sequence[tuple[int, Edge]]
    ) -> tuple[Plan, Structure]:
        """The rules for a re-run; ``present`` are the step's operands by number."""
        signals = step.signals if step.plan.travels else step.wants
        kinds, modules = step.plan.kinds, self.paths.modules(step.node._sequence_nr())
        structure = graph.structure(
            root,
            [edge for place, edge in present if signals[place]],
            kept=tuple(edge for _, edge in present),
            observed=tuple(edge.node for place, edge in present if step.plan.observed[place]),
            coefficients=tuple(
                edge.node for place, edge in present if kinds[place] >= Kind.COEFFICIENT and not signals[place]
            ),
            traits=tuple((edge.node, trait) for place, edge in present if any(trait := step.plan.traits[place])),
            modules=(modules,) * len(graph.nodes) if self.composite.by_path else None,
            first=step.plan.first,
            last=step.plan.last,
        )
        try:
            return make_plan(structure, self.composite, self.on_unknown, REGISTRY.version), structure
        except UnknownNodes as error:
            path = self.paths.path(step.node._sequence_nr())
            raise UnknownOperationError([(name, path) for _, name in error.nodes], error.reasons) from None


def _agree(step: LiveStep, outputs: Sequence[Tensor | None], grads: Grads) -> None:
    """A re-run gives what the operation gave, at least where relevance arrives."""
    for number, g in enumerate(grads):
        if g is None:
            continue
        y = outputs[number] if number < len(outputs) else None
        if not isinstance(y, Tensor) or (not y.is_nested and y.shape != g.shape):
            given = tuple(y.shape) if isinstance(y, Tensor) else y
            raise RuleError(
                f"the re-run of {step.name} gives {given} as output {number}, where the operation gave {tuple(g.shape)}"
            )


def _leaf(value: Tensor | None, attached: bool) -> Tensor | None:
    """An operand of the re-run; ``attached``: it stays part of the graph that it comes from."""
    if value is None:
        return None
    if attached and value.requires_grad:
        return value.clone()
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() or value.is_complex() else value


def _edge(graph: Graph, leaf: Tensor) -> Edge | None:
    node, number = get_gradient_edge(leaf)[:2]
    return graph.edge(node, number)

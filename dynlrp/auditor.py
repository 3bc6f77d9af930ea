"""Watching a walk: what arrives at every node, what it sends on and what it books.

Nothing here takes part in the walk. Activations that tell how much relevance a multiplier stands for come from promises
of the auditor's own, so that those of the rules are what they are without an audit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynlrp.audit import Audit, Flow, Row, total
from dynlrp.errors import BrokenPromiseError
from dynlrp.graph import LEAF, Edge, Graph
from dynlrp.ledger import Ledger
from dynlrp.plan import PassThrough, Plan, StepPlan
from dynlrp.promise import Promises
from dynlrp.rules.operation import VJP, Account, Grads, inner


@dataclass
class Entry:
    """One node while it is watched; None stands for an amount that nobody can know."""

    operation: str
    module: str
    sequence: int
    """The larger, the later it ran."""
    rule: str
    incoming: float | None
    flows: list[tuple[int, float | None]] = field(default_factory=list)
    """Node that gets something, and how much."""
    booked: dict[str, float] = field(default_factory=dict)
    inside: list[Row] = field(default_factory=list)
    """What the operation was re-run as."""
    unresolved: str = ""

    def book(self, account: str, amount: float) -> None:
        self.booked[account] = self.booked.get(account, 0.0) + amount


class AuditedLedger(Ledger):
    """A ledger that also tells the entry of the node that is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.entry: Entry | None = None

    def book(self, account: Account, name: str, sequence: int, amount: Tensor) -> None:
        super().book(account, name, sequence, amount)
        self._tell(account, amount)

    def book_later(self, account: Account, name: str, sequence: int, multiplier: Tensor, value: Tensor) -> None:
        entries = len(self)
        super().book_later(account, name, sequence, multiplier, value)
        if len(self) == entries:
            self._tell(account, inner(multiplier, value.detach()))

    def _tell(self, account: str, amount: Tensor) -> None:
        if self.entry is not None:
            self.entry.book(account, float(amount.detach()))


class Auditor:
    """Watches one walk from ``root``. ``captured`` holds values of tensors with their versions."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        captured: Mapping[Edge, tuple[Tensor, int]],
        ledger: AuditedLedger,
        path: Callable[[int], str],
        root: Edge,
    ) -> None:
        self._order: list[Entry] = []
        self._plan, self._graph, self._ledger, self._path = plan, graph, ledger, path
        self._promises = Promises(graph, plan.consumers, captured)
        self._root = root
        self._at: dict[int, Entry] = {}
        self._unknown: dict[Edge, str] = {}
        self._rounding = 0.0
        """Of the coarsest dtype that a node made."""
        self._outer = ledger.entry
        """The node that was re-run, if this walk is inside one."""

    def settle(self) -> None:
        """Find a keeper for the value of every tensor that a multiplier travels through, or note why there is none."""
        for step in self._plan.steps:
            for edge in self._uses(step):
                self._settle(edge)
        for edge in self._plan.ends - self._plan.relevance_edges:
            self._settle(edge)

    def _settle(self, edge: Edge) -> None:
        if edge in self._unknown:
            return
        try:
            problem = self._promises.settle(edge)
        except RuntimeError as error:  # a saved tensor that was changed in place
            problem = str(error)
        if problem:
            self._unknown[edge] = problem

    def _uses(self, step: StepPlan) -> Iterator[Edge]:
        if not step.travels:
            return
        if step.merged is None:
            edges = [Edge(step.index, output) for output in step.outputs]
            yield from (edge for edge in edges if edge not in self._plan.relevance_edges)
        if step.emits_relevance or isinstance(step.rule, PassThrough):
            return
        operands = self._graph.operands
        for index in step.chain or (step.index,):
            for position, edge in enumerate(operands[index]):
                if edge is not None and step.signals[position]:
                    yield edge

    def arrive(self, step: StepPlan, grads: Grads) -> None:
        """A node, or a chain of them, is about to be visited."""
        if not step.travels:
            self.end(step.index, grads)
            return
        if step.merged is not None:  # its batch norm was here first
            entry = self._at[step.index] = self._at[step.merged.index]
            sequence = self._graph.nodes[step.index]._sequence_nr()
            entry.operation, entry.rule = f"{step.name} + {step.merged.name}", repr(step.rule)
            entry.module, entry.sequence = self._path(sequence), sequence
        else:
            entry = self._enter(step.index, repr(step.rule), 0.0)
            self._receive(entry, step.index, grads)
        self._ledger.entry = entry

    def _receive(self, entry: Entry, index: int, grads: Grads) -> None:
        for output, g in enumerate(grads):
            if g is not None:
                edge = Edge(index, output)
                amount = self._measure(entry, edge, g, edge in self._plan.relevance_edges)
                entry.incoming = _plus(entry.incoming, amount)

    def leave(self, step: StepPlan, index: int, position: int, value: Tensor) -> None:
        """Node ``index`` of a step sends ``value`` to an operand."""
        if not step.travels or not step.signals[position] or isinstance(step.rule, PassThrough):
            return
        edge, entry = self._graph.operands[index][position], self._at[index]
        assert edge is not None
        amount = self._measure(entry, edge, value, step.emits_relevance)
        entry.flows.append((edge.node, amount))
        if step.chain and edge != step.target:
            self._enter(edge.node, repr(VJP()), amount)

    def end(self, index: int, grads: Grads) -> None:
        """Relevance has come to a node that no relevance of the inputs passes: it ends there if that is a source."""
        if self._outer is None and any(Edge(index, output) in self._plan.ends for output in range(len(grads))):
            entry = self._ledger.entry = self._enter(index, "", 0.0)
            self._receive(entry, index, grads)

    def leaves(self, source: Edge) -> None:
        """What is booked next left the graph at this source."""
        self._ledger.entry = self._at.get(source.node)

    def inside(self, plan: Plan, graph: Graph, captured: Mapping[Edge, tuple[Tensor, int]], root: Edge) -> Auditor:
        """Another auditor, for the walk through what the node at work was re-run as."""
        return Auditor(plan, graph, captured, self._ledger, self._path, root)

    def close(self) -> None:
        """The walk is over; what it was for goes on, if it was inside another one."""
        outer = self._ledger.entry = self._outer
        if outer is not None:
            outer.inside += self._rows()
            for entry in self._order:
                for account, amount in entry.booked.items():
                    outer.book(account, amount)

    def audit(self, dtype: torch.dtype) -> Audit:
        """What was seen. The error of one balance may be as large as that of the whole, or some roundings of the
        coarsest dtype on the way; ``dtype`` is that of the output."""
        _, places = self._ordered()
        tolerance = max(self._ledger.tolerance, 4 * max(self._rounding, torch.finfo(dtype).eps))
        return Audit(self._rows(), places[self._root.node], self._ledger.output, tolerance)

    def _rows(self) -> list[Row]:
        """All entries, in the order in which the operations ran."""
        entries, places = self._ordered()
        flows = [tuple(Flow(places.get(node), amount) for node, amount in entry.flows) for entry in entries]
        received: list[list[float | None]] = [[] for _ in entries]
        first = places.get(self._root.node)
        if first is not None:
            received[first].append(entries[first].incoming if self._outer is not None else self._ledger.output)
        for flow in (flow for out in flows for flow in out):
            if flow.row is not None:
                received[flow.row].append(flow.amount)
        counts: Counter[tuple[str, str]] = Counter()
        rows = []
        for entry, out, amounts in zip(entries, flows, received, strict=True):
            key = entry.operation, entry.module
            rows.append(
                Row(
                    incoming=entry.incoming,
                    outgoing=total(flow.amount for flow in out),
                    accounts=entry.booked,
                    operation=entry.operation,
                    module=entry.module,
                    occurrence=counts[key],
                    rule=entry.rule,
                    received=total(amounts),
                    flows=out,
                    unresolved=entry.unresolved,
                    inside=tuple(entry.inside),
                )
            )
            counts[key] += 1
        return rows

    def _ordered(self) -> tuple[list[Entry], dict[int, int]]:
        """Entries in the order of their operations, and for nodes their entry's number."""
        entries = sorted(self._order, key=lambda entry: entry.sequence)
        numbers = {id(entry): number for number, entry in enumerate(entries)}
        return entries, {node: numbers[id(entry)] for node, entry in self._at.items()}

    def _enter(self, index: int, rule: str, incoming: float | None) -> Entry:
        name, sequence = self._graph.names[index], self._graph.nodes[index]._sequence_nr()
        order = -1 if name == LEAF else sequence  # leaves have no number
        made = [of.dtype for of in self._graph.nodes[index]._input_metadata if of is not None]
        self._rounding = max([self._rounding, *(torch.finfo(d).eps for d in made if d.is_floating_point)])
        entry = self._at[index] = Entry(name, self._path(sequence), order, rule, incoming)
        self._order.append(entry)
        return entry

    def _measure(self, entry: Entry, edge: Edge, value: Tensor, is_relevance: bool) -> float | None:
        """How much relevance a value at an edge stands for."""
        problem = "" if is_relevance else self._unknown.get(edge, "")
        if not problem:
            try:
                if is_relevance:
                    return float(_dense(value).sum())
                return float(inner(_dense(value), _dense(self._promises.take(edge))))
            except torch.OutOfMemoryError:
                raise
            except (BrokenPromiseError, RuntimeError) as error:
                problem = str(error).partition("\n")[0]
        entry.unresolved = f"the value made by {self._graph.names[edge.node]}: {problem}"
        return None


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _dense(value: Tensor) -> Tensor:
    """The elements, in float64, of a tensor of any layout."""
    value = value.detach()
    if value.is_nested:
        value = value.values()
    if value.layout is not torch.strided:
        value = value.to_dense()
    return value.to(torch.promote_types(value.dtype, torch.float64))

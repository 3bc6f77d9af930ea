"""One rule for every node, settled from the structure alone, so that a plan serves every call of the same graph."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from dynlrp.composite import Composite, Site
from dynlrp.errors import InputError, NoPathError
from dynlrp.graph import LEAF, NO_TRAIT, Edge, Structure, Trait
from dynlrp.roles import NO_ROLE, read
from dynlrp.rules import Ungated
from dynlrp.rules.operation import (
    REGISTRY,
    VJP,
    Account,
    Gauge,
    Gradient,
    Grads,
    Hold,
    Need,
    Operation,
    Rule,
    Step,
    letter,
)
from dynlrp.rules.submodule import SUBMODULE


class Kind(IntEnum):
    """What a tensor is to the explanation."""

    CONSTANT = 0  # depends on nothing that requires grad
    PARAMETER = 1  # depends on leaves that are not explained: parameters
    COEFFICIENT = 2  # depends on the inputs, but only through operands that carry no relevance
    SIGNAL = 3  # relevance travels on through it


@dataclass(frozen=True)
class PassThrough(Rule):
    """A batch norm that its linear operation absorbed: what that operation is to get goes on unchanged."""

    gauge: Gauge

    @property
    def consumes(self) -> Gauge:
        return self.gauge

    @property
    def emits(self) -> Gauge:
        return self.gauge

    def __call__(self, step: Step, grads: Grads) -> tuple[Tensor | None, ...]:
        return (grads[0], *[None] * (len(step.wants) - 1))


class Link(NamedTuple):
    """An operand that gets something."""

    position: int
    node: int
    output: int
    account: Account | Literal[""]
    """Where its relevance is booked, if it ends here."""
    passes: bool
    """It goes on to the node."""
    leaf: bool
    scaled: bool
    """Its multiplier must become relevance, as another consumer of the tensor emits relevance."""


@dataclass
class StepPlan:
    """What happens at one node. Also what :class:`~dynlrp.rules.operation.StepShape` promises to rules."""

    index: int
    name: str
    operation: Operation
    rule: Rule
    operands: tuple[Edge | None, ...]
    kinds: tuple[Kind, ...]
    signals: tuple[bool, ...]
    traits: tuple[Trait, ...]
    """What operands are as factors, for products that the operation is made of."""
    booked: tuple[bool, ...]
    """Operands whose relevance ends here, in the ledger (parameters, coefficients)."""
    observed: tuple[bool, ...]
    present: tuple[bool, ...]
    nonnegative: bool
    hidden: bool
    """Autograd did not record a constant that adds to the output."""
    fallback: bool
    """The gradient stands in for a rule."""
    first: bool
    """No linear operation lies between it and the inputs."""
    last: bool
    """No linear operation lies between it and the output."""
    merged: StepPlan | None
    travels: bool
    """It passes relevance of the inputs; else that of an observed weight alone, which is no account."""
    aside: Account | Literal[""] = ""
    """What goes in and does not come out goes into this account: a product of other tensors that adds to the signal,
    what a module explained as one step does not conserve."""
    wants: tuple[bool, ...] = ()
    gated: bool = False
    outputs: tuple[int, ...] = ()
    """Outputs through which relevance arrives."""
    relevance_in: bool = False
    """The gauge in which the rule works: relevance, or multipliers."""
    emits_relevance: bool = False
    converts: tuple[int, ...] = ()
    """Outputs that arrive in the other gauge."""
    scaled: tuple[bool, ...] = ()
    """Operands whose multiplier must become relevance, as another consumer of the tensor emits relevance."""
    needs: tuple[Need, ...] = ()
    links: tuple[Link, ...] = ()
    """Operands that get something."""
    promised: tuple[bool, ...] = ()
    """Booked operands whose value must be promised (leaves are at hand)."""
    kept: bool = False
    """Somebody wants to know what arrives here."""
    plain: bool = False
    """The node's own VJP is all there is to do."""
    chain: tuple[int, ...] = ()
    """Nodes to call one after the other, this one first: of one operand, with nothing to do but their own VJP."""
    target: Edge | None = None
    """The edge that the last of a chain gives to."""
    exact: bool = False
    """What the chain gives has the shape and dtype of that edge."""

    @property
    def settles(self) -> bool:
        """Whether promises must be settled for this step."""
        return bool(
            self.needs
            or self.converts
            or self.balances
            or self.unshared
            or self.merged
            or any(self.scaled)
            or any(self.promised)
        )

    @property
    def counted(self) -> tuple[bool, ...]:
        """Operands whose relevance is accounted for elsewhere."""
        return tuple(a or b for a, b in zip(self.signals, self.booked, strict=True))

    @property
    def unshared(self) -> bool:
        """A constant that was added takes no share."""
        return self.travels and self.hidden and self.rule.recorded_only

    @property
    def balances(self) -> bool:
        """Only the activations on both sides tell how much was lost here."""
        unknown = (self.hidden and self.rule.consumes == "multiplier") or self.fallback or bool(self.aside)
        return self.travels and unknown


@dataclass(frozen=True)
class Plan:
    """The steps from output to sources, without those that are in the chain of an earlier one, and the gauge of every
    edge that carries relevance, not a multiplier."""

    steps: tuple[StepPlan, ...]
    settling: tuple[StepPlan, ...]
    """The steps that need activations."""
    visited: int
    """Nodes that relevance meets."""
    apart: str
    """The name of one that takes one multiplier at a time, or an empty string."""
    relevance_edges: frozenset[Edge]
    ends: frozenset[Edge]
    """Sources with no other source behind them: here relevance leaves the graph."""
    consumers: dict[Edge, list[tuple[int, int]]]
    """Who uses a tensor: node and operand number."""
    merged: dict[Edge, Edge]
    """Outputs of linear operations that took a batch norm in, and the output of that norm."""

    def activation(self, edge: Edge) -> Edge | None:
        """The tensor whose value makes relevance of what arrives at ``edge``; None where that is relevance already."""
        return None if edge in self.relevance_edges else self.merged.get(edge, edge)


# Plans hold no tensors and their keys are complete, so calls from anywhere may share them.
@lru_cache(maxsize=64)
def make_plan(structure: Structure, composite: Composite, on_unknown: str = "error", version: int = 0) -> Plan:
    """Settle the rule, the operands to follow and the gauges for every node on a path from root to a source.

    ``version`` is the registry's, whose entries the plan depends on. Raises :class:`UnknownNodes` with every node
    nobody has a rule for, and :class:`NoPathError` where no relevance can reach a source.
    """
    return _Planner(structure, composite, on_unknown).plan()


class UnknownNodes(Exception):
    """Nodes without a rule, as ``(index, name)``, and why, where that is on purpose; the caller knows their paths."""

    def __init__(self, nodes: list[tuple[int, str]], reasons: dict[str, str]) -> None:
        super().__init__(nodes)
        self.nodes = nodes
        self.reasons = reasons


WEIGHTED = ("dense", "convolution", "recurrent", SUBMODULE)
"""Families of layers with weights."""
ASIDE: dict[Kind, Account] = {
    Kind.CONSTANT: "constants",
    Kind.PARAMETER: "parameters",
    Kind.COEFFICIENT: "held back",
}
"""Where a sum without a signal goes."""
ENDS: dict[Kind, Account] = {Kind.PARAMETER: "parameters", Kind.COEFFICIENT: "held back"}
"""Where relevance goes that ends in an operand."""
_NOTHING = Operation("", "unknown")


class _Planner:
    def __init__(self, structure: Structure, composite: Composite, on_unknown: str) -> None:
        self.s = structure
        self.composite = composite
        self.on_unknown = on_unknown
        self.count = len(structure.names)
        self.facts = {index: fact for (index, _), fact in zip(structure.skeleton.telling, structure.facts, strict=True)}
        self.operations = [REGISTRY.get(name) for name in structure.names]
        for index, fact in self.facts.items():
            operation = self.operations[index]
            if operation is not None and operation.variants:
                self.operations[index] = operation.variants.get(fact, operation)
        self.roles, self.traits = read(structure)
        self.sources = frozenset(structure.sources)
        self.consumers: dict[Edge, list[tuple[int, int]]] = {}
        for index, operands in enumerate(structure.operands):
            for position, edge in enumerate(operands):
                if edge is not None:
                    self.consumers.setdefault(edge, []).append((index, position))

    def plan(self) -> Plan:
        self._upwards()
        if self._kind(self.s.root) is not Kind.SIGNAL:
            raise NoPathError(
                "no relevance can reach the inputs from this output: every path ends in an operation that carries "
                "none (an integer or boolean result, argmax, a denominator, a logarithm, a normalisation statistic)"
            )
        return self._downwards()

    # Operands first: what every tensor is, and which rule its node has.

    def _upwards(self) -> None:
        s = self.s
        observed, sources = set(s.observed), {edge.node for edge in s.sources}
        self.kinds: list[Kind] = []
        self.rules: list[Rule | None] = []
        self.letters: list[str] = []
        self.leads: list[bool] = []
        """An observed node is among what its operands were made of."""
        self.observes: list[bool] = []
        """It leads to one, or is one."""
        self.nonnegative: list[bool] = []
        self.outermost = self._nearest_output() if self.composite.positional else frozenset()
        self.first: list[bool] = []
        below: list[bool] = []  # a linear operation on the way from a source
        self.reaches: list[bool] = []
        for index, name in enumerate(s.names):
            operands = s.operands[index]
            operation = self.operations[index]
            carried = [edge for edge in operands if edge is not None]
            reached = [edge for edge in carried if edge in self.sources or self.reaches[edge.node]]
            self.leads.append(any(self.observes[edge.node] for edge in carried))
            own = index in observed and not reached and index not in sources
            self.observes.append(own or self.leads[index])
            self.reaches.append(bool(reached))
            linear = not s.first or any(below[edge.node] for edge in reached if not self._ends(edge))
            self.first.append(not linear)
            below.append(linear or (operation is not None and self._has_weights(index, operation)))
            self.nonnegative.append(self._never_negative(index, operation))
            if operation is None:
                self.rules.append(None)
                self.letters.append("+")
            else:
                family = self._family(index, operation)
                role = self.roles.get(index, NO_ROLE)
                usual = operation.rule
                if family != operation.family and operation.bilinear is not None:
                    usual = operation.bilinear
                if "softmax" in role.names and operation.softmax is not None:
                    usual = operation.softmax
                site = Site(
                    family=family,
                    name=name,
                    roles=role.names,
                    modules=s.modules[index] if s.modules is not None else (),
                    first=not linear,
                    last=index in self.outermost,
                )
                picked = self.composite.pick(site)
                if not reached:  # only weights whose relevance is wanted lie behind it
                    chosen = picked if isinstance(picked, Gradient) else operation.rule
                    self.rules.append(chosen)
                    self.letters.append(chosen.operands(operation, None))
                    self.kinds.append(self._node_kind(index, name))
                    continue
                if picked is None and operation.obstacle(self.facts.get(index)):
                    self.rules.append(None)
                    self.letters.append("+")
                    self.kinds.append(self._node_kind(index, name))
                    continue
                ungated = family == "product" and role.names & {"self gate", "transition"}
                chosen = picked or (Ungated() if ungated else usual)
                holds = operation.holds is not None and operation.holds(self.facts.get(index))
                if holds and not isinstance(chosen, Gradient):
                    chosen = Hold()
                if chosen.families and family not in chosen.families:
                    raise InputError(
                        f"composite {self.composite.name!r} gives {type(chosen).__name__} to {name}, which is of "
                        f"family {family!r}; that rule is for {', '.join(sorted(chosen.families))}"
                    )
                self.rules.append(chosen)
                self.letters.append(chosen.operands(operation, role.gate))
            self.kinds.append(self._node_kind(index, name))

    def _node_kind(self, index: int, name: str) -> Kind:
        if name == LEAF:
            return Kind.COEFFICIENT if index in self.s.coefficients else Kind.PARAMETER
        best = Kind.CONSTANT
        for position, edge in enumerate(self.s.operands[index]):
            kind = self._kind(edge)
            if kind is Kind.SIGNAL and letter(self.letters[index], position) == "-":
                kind = Kind.COEFFICIENT
            best = max(best, kind)
        return best

    def _kind(self, edge: Edge | None) -> Kind:
        if edge is None:
            return Kind.CONSTANT
        return Kind.SIGNAL if edge in self.sources else self.kinds[edge.node]

    def _ends(self, edge: Edge) -> bool:
        """Whether relevance leaves the graph here: a source with no other behind it."""
        return edge in self.sources and not self.reaches[edge.node]

    def _is_its_gradient(self, index: int, operation: Operation) -> bool:
        """Whether the plain derivative is the operation's own rule, in all its operands."""
        operands = enumerate(self.s.operands[index])
        coefficients = any(edge is not None and operation.letter(position) == "-" for position, edge in operands)
        held = operation.holds is not None and operation.holds(self.facts.get(index))
        return type(operation.rule) is VJP and not coefficients and not held

    def _is_linear(self, index: int, operation: Operation) -> bool:
        return operation.family in ("dense", "convolution") and self._family(index, operation) == operation.family

    def _has_weights(self, index: int, operation: Operation) -> bool:
        return operation.family in ("recurrent", SUBMODULE) or self._is_linear(index, operation)

    def _family(self, index: int, operation: Operation) -> str:
        """A matrix product or convolution is a linear layer only where no more than one factor depends on inputs, and a
        quotient may be a softmax."""
        role = self.roles.get(index, NO_ROLE)
        if role.family:
            return role.family
        if operation.family not in ("dense", "convolution"):
            return operation.family
        factors = [
            self._kind(edge) >= Kind.COEFFICIENT
            for position, edge in enumerate(self.s.operands[index])
            if operation.letter(position) == "*"
        ]
        return "product" if sum(factors) > 1 else operation.family

    def _never_negative(self, index: int, operation: Operation | None) -> bool:
        if operation is None:
            return False
        sign = operation.sign(self.facts.get(index)) if callable(operation.sign) else operation.sign
        if sign != "same":
            return sign == "nonnegative"
        operands = self.s.operands[index]
        return all(edge is not None and edge not in self.sources and self.nonnegative[edge.node] for edge in operands)

    def _nearest_output(self) -> frozenset[int]:
        """Operations with no linear operation between them and the output."""
        clear = {self.s.root.node} if self.s.last else set()
        for index in range(self.count - 1, -1, -1):
            if index in clear and (self.operations[index] or _NOTHING).family not in WEIGHTED:
                clear.update(edge.node for edge in self.s.operands[index] if edge is not None)
        return frozenset(clear)

    # Output first: the nodes relevance meets, with the gauge it has there.

    def _downwards(self) -> Plan:
        walked = {self.s.root.node}
        arrivals: dict[int, set[int]] = {self.s.root.node: {self.s.root.output}}
        followers: dict[Edge, list[int]] = {}
        relevance: set[Edge] = {self.s.root} if self.s.seeded else set()
        absorbed: dict[int, StepPlan] = {}
        steps: list[StepPlan] = []
        unknown: list[tuple[int, str]] = []
        for index in range(self.s.root.node, -1, -1):
            if index not in walked or self.s.names[index] == LEAF:
                continue
            step = self._step(index, absorbed, unknown)
            steps.append(step)
            step.outputs = tuple(sorted(arrivals.get(index, ())))
            copies = isinstance(step.rule, VJP) and step.operation.copied(self.facts.get(index))
            in_relevance = any(Edge(index, output) in relevance for output in step.outputs)
            step.relevance_in = step.rule.consumes == "relevance" or (copies and in_relevance)
            step.emits_relevance = step.rule.emits == "relevance" or (copies and step.relevance_in)
            carrier = step if step.merged is None else step.merged
            heads = followers.get(Edge(carrier.index, 0), [])
            sees_all = step.name == SUBMODULE or step.rule.whole_output
            inner = bool(heads) and Edge(carrier.index, 0) != self.s.root and not sees_all
            step.gated = inner and all(map(self._gates, heads))
            for position, edge in enumerate(step.operands):
                if edge is None or not (step.signals[position] or step.observed[position]):
                    continue
                carries = step.signals[position] and (edge not in self.sources or self.reaches[edge.node])
                if carries or self.leads[edge.node]:
                    walked.add(edge.node)
                if step.signals[position]:
                    followers.setdefault(edge, []).append(index)
                arrivals.setdefault(edge.node, set()).add(edge.output)
                if step.emits_relevance:
                    relevance.add(edge)
        if unknown:
            reasons = {n: REGISTRY[n].obstacle(self.facts.get(i)) for i, n in unknown if n in REGISTRY}
            raise UnknownNodes(unknown, reasons)
        for step in steps:
            step.scaled = tuple(
                edge in relevance and (signal or observed) and not step.emits_relevance
                for edge, signal, observed in zip(step.operands, step.signals, step.observed, strict=True)
            )
            step.converts = tuple(
                output for output in step.outputs if (Edge(step.index, output) in relevance) != step.relevance_in
            )
            step.needs = tuple(step.rule.needs(step)) if any(step.wants) else ()
            step.links = tuple(
                Link(
                    position,
                    edge.node,
                    edge.output,
                    ENDS[step.kinds[position]] if step.booked[position] else "",
                    step.observed[position] or not step.booked[position],
                    self.s.names[edge.node] == LEAF,
                    step.scaled[position],
                )
                for position, edge in enumerate(step.operands)
                if edge is not None and step.wants[position]
            )
            step.promised = tuple(
                booked and edge is not None and self.s.names[edge.node] != LEAF and not step.emits_relevance
                for booked, edge in zip(step.booked, step.operands, strict=True)
            )
            step.plain = type(step.rule) is VJP and not step.settles
        kept = {edge.node for edge in self.s.kept}
        for step in steps:
            step.kept = step.index in kept
            if step.plain and step.signals == (True,):
                step.chain, step.target, step.exact = (step.index,), step.operands[0], step.operation.exact
        visited, apart = len(steps), next((step.name for step in steps if step.operation.apart), "")
        steps = _chained(steps)
        ends = frozenset(edge for edge in self.sources if not self.reaches[edge.node])
        settling = tuple(step for step in steps if step.settles)
        merged = {Edge(inner, 0): Edge(norm.index, 0) for inner, norm in absorbed.items()}
        return Plan(tuple(steps), settling, visited, apart, frozenset(relevance), ends, self.consumers, merged)

    def _step(self, index: int, absorbed: dict[int, StepPlan], unknown: list[tuple[int, str]]) -> StepPlan:
        name = self.s.names[index]
        operands = self.s.operands[index]
        operation = self.operations[index]
        rule = self.rules[index]
        fallback = isinstance(rule, Gradient) and operation is not None and not self._is_its_gradient(index, operation)
        if operation is None or rule is None:
            if self.on_unknown != "gradient":
                unknown.append((index, name))
            operation, rule, fallback = Operation(name, "unknown", rule=Gradient(), operands="*"), Gradient(), True
        kinds = tuple(self._kind(edge) for edge in operands)
        letters = [letter(self.letters[index], position) for position in range(len(operands))]
        signals = tuple(k is Kind.SIGNAL and a != "-" for k, a in zip(kinds, letters, strict=True))
        travels = self.kinds[index] is Kind.SIGNAL
        booked = tuple(
            travels and not rule.books and a == "+" and k in (Kind.PARAMETER, Kind.COEFFICIENT)
            for k, a in zip(kinds, letters, strict=True)
        )
        present = tuple(edge is not None for edge in operands)
        step = StepPlan(
            index=index,
            name=name,
            operation=operation,
            rule=rule,
            operands=operands,
            kinds=kinds,
            signals=signals,
            traits=tuple(NO_TRAIT if edge is None else self.traits[edge.node] for edge in operands),
            booked=booked,
            observed=tuple(
                edge is not None and kind is Kind.PARAMETER and self.observes[edge.node]
                for edge, kind in zip(operands, kinds, strict=True)
            ),
            present=present,
            nonnegative=all(
                edge is not None and edge not in self.sources and self.nonnegative[edge.node]
                for edge, signal in zip(operands, signals, strict=True)
                if signal
            ),
            hidden=travels and operation.hides is not None and operation.hides(self.facts.get(index), present),
            fallback=fallback,
            first=self.first[index],
            last=index in self.outermost,
            merged=absorbed.get(index),
            travels=travels,
        )
        step.aside = operation.leftover
        factors = [kind for a, kind in zip(letters, kinds, strict=True) if a == "*"]
        if travels and len(factors) > 1 and Kind.SIGNAL not in factors and not fallback:
            step.rule, step.aside = VJP(), ASIDE[max(factors)]
        inner = self._absorber(step)
        if inner is not None:
            absorbing = self.rules[inner]
            assert absorbing is not None
            step.rule, step.hidden = PassThrough(absorbing.consumes), False
            step.booked = step.observed = (False,) * len(operands)
            absorbed[inner] = step
        step.wants = tuple(a or b or c for a, b, c in zip(step.signals, step.booked, step.observed, strict=True))
        return step

    def _absorber(self, step: StepPlan) -> int | None:
        """The linear operation that takes this batch norm into its weights, if its rule asks for that."""
        edge = step.operands[0] if step.operands else None
        affine = step.operation.affine
        if affine is None or edge is None or self._ends(edge) or not step.signals[0]:
            return None
        operation, rule = self.operations[edge.node], self.rules[edge.node]
        if operation is None or rule is None or not rule.merges_norm or not affine(self.facts.get(step.index)):
            return None
        if operation.absorbs is None or len(self.consumers[edge]) > 1 or not self._is_linear(edge.node, operation):
            return None
        source = self.s.operands[edge.node][operation.absorbs]
        return edge.node if self._kind(source) is Kind.SIGNAL else None

    def _gates(self, index: int) -> bool:
        operation = self.operations[index]
        if operation is None or self.rules[index] != operation.rule:
            return False
        return operation.gates(self.facts.get(index)) if callable(operation.gates) else operation.gates


def _chained(steps: Sequence[StepPlan]) -> list[StepPlan]:
    """Join steps that follow one another and nothing else, whose shapes need no look in between."""
    single = {step.index: step for step in steps if step.chain}
    givers = Counter([link.node for step in steps for link in step.links])
    chains: dict[int, deque[int]] = {}
    joined: set[int] = set()
    for step in reversed(single.values()):  # the end of a chain first
        assert step.target is not None
        after = single.get(step.target.node)
        if after is None or after.kept or not (step.exact and after.exact) or givers[after.index] > 1:
            chains[step.index] = deque([step.index])
            continue
        chains[step.index] = chains[after.index]
        chains[step.index].appendleft(step.index)
        step.target = after.target
        joined.add(after.index)
    for index in single.keys() - joined:
        single[index].chain = tuple(chains[index])
    return [step for step in steps if step.index not in joined]

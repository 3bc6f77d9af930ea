"""Roles that operations play, read from the structure of the graph and never from names of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dynlrp.graph import NO_TRAIT, Edge, Graph, Structure, Trait
from dynlrp.rules.operation import REGISTRY, VJP, Operation

POINTWISE = frozenset({"elementwise", "piecewise linear", "scaling", "addition", "product", "quotient"})
STATISTICS = POINTWISE | {"reduction", "choice", "statistic"}
MULTIPLES = frozenset({"product", "scaling", "movement"})
SMALL = 32
"""Longest written-out activation that is looked for, in operations."""


class Role(NamedTuple):
    """``names`` are what a composite selects by."""

    names: frozenset[str]
    gate: int | None = None
    """The operand that gates a product."""
    family: str = ""
    """The family it counts as, where that is not its operation's."""
    weighs: tuple[int, int] | None = None
    """Of a softmax that is attention, the first product that weighs with it: its node, and the operand."""


NO_ROLE = Role(frozenset())


def roles(graph: Structure | Graph, sources: Iterable[Edge] = ()) -> dict[int, Role]:
    """Roles by node index, see :func:`read`."""
    return read(graph, sources)[0]


def read(graph: Structure | Graph, sources: Iterable[Edge] = ()) -> tuple[dict[int, Role], list[Trait]]:
    """Roles by node index, and the traits of every node's outputs.

    Tensors that no source lies behind are constants, recorded or not; a structure has its own sources.

    ``attention``: a softmax whose rows weigh another signal in a product, and that product.
    ``softmax``: a softmax written out, as the quotient of exponentials by their own sum (or a product with the
    reciprocal of that), or the exponential of its logarithm; the last operation is of the family ``softmax``.
    ``self gate``: a product ``x * g(x)`` of a tensor and a pointwise function of the same tensor.
    ``transition``: a product of a signal and an exponential of another, the decay of a state (Mamba); a matrix product
    where it is the exponential of a running sum, the decay over many steps at once (Mamba-2).
    ``gate``: a product with another operand that comes through a sigmoid, silu, gelu or tanh. Of two such operands
    the one that is never negative is the gate (a sigmoid before a tanh).

    Gates and attention weights may be multiplied by constants, have constants added and be kept within bounds.
    """
    if isinstance(graph, Structure):
        sources = (*graph.sources, *(Edge(index, 0) for index in graph.coefficients))
    reader = _Reader(graph, sources)
    return reader.roles(), reader.traits


class _Reader:
    """Reads a graph from its operands to its output, a bounded number of steps for every node."""

    def __init__(self, graph: Structure | Graph, sources: Iterable[Edge]) -> None:
        sources = frozenset(sources)
        reaches: list[bool] = []
        self.names = graph.names
        self.leaves = dict(graph.traits) if isinstance(graph, Structure) else {}
        self.known = [REGISTRY.get(name) for name in graph.names]
        self.operands: list[tuple[Edge | None, ...]] = []
        """Those that a source lies behind; the others are None, as what autograd did not record. What a module returned
        is what it is made of."""
        same: dict[Edge, Edge] = {}
        for index, operands in enumerate(graph.operands):
            kept = tuple(
                [same.get(e, e) if e is not None and (e in sources or reaches[e.node]) else None for e in operands]
            )
            self.operands.append(kept)
            reaches.append(any(edge is not None for edge in kept))
            operation = self.known[index]
            if operation is not None and operation.identity:
                made = {Edge(index, number): edge for number, edge in enumerate(kept) if edge is not None}
                same.update((one, other) for one, other in made.items() if one not in sources)
        self.present = [[edge for edge in operands if edge is not None] for operands in self.operands]
        self.rearranged = self._ends(self._copies)
        """For every node, the first tensor below that is more than a rearrangement; None for the node's own."""
        self.multiplied = self._ends(self._multiplies)
        """The same with constant multiples."""
        self.scaled = self._ends(
            lambda index: self._multiplies(index) and self._family(index) in ("product", "quotient")
        )
        """Constant multiples that are no rearrangements."""
        self.softmax = self._written_softmaxes()

    def _ends(self, passes: Callable[[int], bool]) -> list[Edge | None]:
        ends: list[Edge | None] = []
        for index in range(len(self.names)):
            below = self._alone(index) if passes(index) else None
            ends.append(None if below is None else ends[below.node] or below)
        return ends

    def _alone(self, index: int) -> Edge | None:
        """The only operand."""
        present = self.present[index]
        return present[0] if len(present) == 1 else None

    def _family(self, index: int) -> str:
        operation = self.known[index]
        return "" if operation is None else operation.family

    def _copies(self, index: int) -> bool:
        operation = self.known[index]
        return operation is not None and bool(operation.copies)

    def _multiplies(self, index: int) -> bool:
        """Whether a tensor is a constant multiple of an only operand, or moves its entries."""
        if self._family(index) == "quotient":
            return self.operands[index][0] is not None
        return self._copies(index) or self._family(index) in MULTIPLES

    def roles(self) -> dict[int, Role]:
        whole = Role(frozenset({"softmax"}), family="softmax")
        found: dict[int, Role] = {}
        for index, parts in self.softmax.items():
            found.update(dict.fromkeys(parts, whole._replace(family="")))
            found[index] = whole
        self.traits: list[Trait] = []
        users: dict[int, tuple[int, int]] = {}
        """Nodes that make attention weights, and the first product that takes them."""
        for index, operation in enumerate(self.known):
            self.traits.append(self._trait(index, operation))
            if operation is None or index in self.softmax:
                continue
            if operation.family == "product" or operation.bilinear is not None:
                role = self._product(index, operation, users)
                if role is not NO_ROLE:
                    found[index] = role
        for index in range(len(self.names) - 1, -1, -1):
            if index not in users:
                continue
            if self._is_softmax(index):
                role = found.get(index, NO_ROLE)
                found[index] = role._replace(names=role.names | {"attention"}, weighs=users[index])
                continue
            for edge in self._carried(index):
                users[edge.node] = min(users[index], users.get(edge.node, users[index]))
        return found

    def _product(self, index: int, operation: Operation, users: dict[int, tuple[int, int]]) -> Role:
        factors = [(i, e) for i, e in enumerate(self.operands[index]) if e is not None and operation.letter(i) == "*"]
        if len(factors) < 2:
            return NO_ROLE
        traits = {i: self.traits[edge.node] for i, edge in factors}
        router = next((i for i, trait in traits.items() if trait.routed), None)
        if router is not None and operation.family == "product":
            return Role(frozenset({"gate"}), gate=router)
        weights = [(i, edge) for i, edge in factors if traits[i].weights]
        for i, edge in weights:
            users.setdefault(edge.node, (index, i))
        if weights:
            return Role(frozenset({"attention"}))
        over = next((i for i, trait in traits.items() if trait.summed), None)
        if over is not None:
            return Role(frozenset({"transition"}), gate=over)
        if operation.family != "product":
            return NO_ROLE
        (i, one), (j, other) = factors[0], factors[-1]
        own = i if self._gates_itself(other, one) else j if self._gates_itself(one, other) else None
        if own is not None:
            return Role(frozenset({"self gate"}), gate=own)
        gates = [i for i, trait in traits.items() if trait.gate]
        if gates:
            gate = next((i for i in gates if traits[i].nonnegative), gates[0])
            return Role(frozenset({"gate"}), gate=gate)
        decay = next((i for i, trait in traits.items() if trait.decay), None)
        return NO_ROLE if decay is None else Role(frozenset({"transition"}), gate=decay)

    # What tensors are.

    def _trait(self, index: int, operation: Operation | None) -> Trait:
        if operation is None:
            trait = self.leaves.get(index, NO_TRAIT)
            # The softmax lies outside, where no role of a product in here reaches: the product is its gate.
            return trait._replace(routed=trait.routed or trait.weights)
        if self._is_softmax(index):
            return Trait(weights=True)
        if operation.gate:
            return Trait(gate=True, nonnegative=operation.sign == "nonnegative")
        if operation.decay:
            return Trait(decay=True, summed=self._sums(index))
        below = [self.traits[edge.node] for edge in self._carried(index)]
        if len(below) != 1:
            return Trait(weights=bool(below) and all(trait.weights for trait in below))
        (trait,) = below
        if operation.family in ("choice", "indexing") or len(self.present[index]) > 1:
            trait = trait._replace(routed=trait.routed or trait.weights or trait.nonnegative)
        if len(self.present[index]) > 1 and not trait.routed:
            return NO_TRAIT
        return trait if self._multiplies(index) else trait._replace(decay=False, summed=False)

    def _is_softmax(self, index: int) -> bool:
        operation = self.known[index]
        return index in self.softmax or (operation is not None and operation.family == "softmax")

    def _carried(self, index: int) -> list[Edge]:
        """The operands that hand on what they are: what is multiplied by constants, bounded, added to constants or
        divided by its own sum; all of several that are added or joined."""
        operation, present = self.known[index], self.present[index]
        if operation is None:
            return []
        if operation.family == "quotient":
            numerator, denominator = self.operands[index]
            alone = denominator is None or self._is_statistic_of(denominator, numerator)
            return [numerator] if numerator is not None and alone else []
        if self._copies(index) or operation.family == "addition":
            return present
        return present if len(present) == 1 and (operation.bounds or self._multiplies(index)) else []

    # Parts of functions that are written out.

    def _written_softmaxes(self) -> dict[int, set[int]]:
        """The operations that make a softmax, and those that they are a softmax with."""
        found: dict[int, set[int]] = {}
        for index in range(len(self.names)):
            parts: set[int] | None = None
            if self._may_be(index, "quotient"):
                parts = self._normalised(*self.operands[index])
            elif self._may_be(index, "product") and len(self.present[index]) == 2:
                one, other = self.present[index]
                parts = self._by_reciprocal(one, other) or self._by_reciprocal(other, one)
            elif self._may_be(index, "elementwise") and self.present[index]:
                parts = self._of_logarithm(self.present[index][0])
            if parts is not None:
                found[index] = parts
        return found

    def _may_be(self, index: int, family: str) -> bool:
        """Whether an operation may be the part of this family of a softmax that is written out."""
        operation = self.known[index]
        return operation is not None and operation.softmax is not None and operation.family == family

    def _by_reciprocal(self, numerator: Edge, factor: Edge) -> set[int] | None:
        """The exponentials and the reciprocal, where one tensor is an exponential and another one over its sum."""
        reciprocal = self._through(self.multiplied, factor).node
        if not self._may_be(reciprocal, "coefficient"):
            return None
        parts = self._normalised(numerator, self._alone(reciprocal))
        return None if parts is None else {*parts, reciprocal}

    def _of_logarithm(self, edge: Edge) -> set[int] | None:
        """What makes a tensor a logarithm of softmax, which may be a tensor less its own log-sum-exp."""
        edge = self._through(self.rearranged, edge)
        if self._family(edge.node) == "log softmax":
            return set()
        if not self._may_be(edge.node, "addition") or len(self.present[edge.node]) != 2:
            return None
        scores, subtrahend = (self._through(self.rearranged, e) for e in self.present[edge.node])
        whole = subtrahend.node
        if not self._may_be(whole, "reduction") or self._through(self.rearranged, self.present[whole][0]) != scores:
            return None
        return {edge.node, whole}

    def _normalised(self, numerator: Edge | None, denominator: Edge | None) -> set[int] | None:
        """The exponentials, where one tensor is an exponential and another its sum."""
        summed = None if denominator is None else self._summand(denominator)
        if numerator is None or summed is None:
            return None
        above, below = (self._through(self.multiplied, edge).node for edge in (numerator, summed))
        # The same tensor, or the same function of the same tensor.
        again = self.names[above] == self.names[below] and self.operands[above] == self.operands[below]
        same = summed == self._through(self.rearranged, numerator) or (again and summed.node == below)
        return {above, below} if same and self._may_be(above, "elementwise") else None

    def _summand(self, edge: Edge) -> Edge | None:
        """What a tensor is the sum of over some of its entries, maybe with a constant added."""
        for _ in range(SMALL):
            edge = self._through(self.rearranged, edge)
            operation, below = self.known[edge.node], self._alone(edge.node)
            if operation is None or below is None or not isinstance(operation.rule, VJP):
                return None
            if operation.family == "reduction":
                return self._through(self.rearranged, below)
            if operation.family != "addition":
                return None
            edge = below
        return None

    def _is_statistic_of(self, edge: Edge | None, summand: Edge | None) -> bool:
        """Whether a tensor is a function of another's sum, norm or largest entry alone."""
        summand = None if summand is None else self._through(self.multiplied, summand)
        for _ in range(SMALL):
            edge = None if edge is None else self._through(self.multiplied, edge)
            if edge is None or edge == summand:
                return edge is not None
            operation = self.known[edge.node]
            if operation is None or operation.family not in STATISTICS:
                return False
            edge = self._alone(edge.node)
        return False

    def _sums(self, index: int) -> bool:
        """Whether an exponential is one of running sums or of their differences."""
        stack, seen = self.present[index], set[Edge]()
        while stack and len(seen) < SMALL:
            edge = self._through(self.rearranged, stack.pop())
            operation = self.known[edge.node]
            if operation is None or edge in seen:
                continue
            if operation.running:
                return True
            seen.add(edge)
            if operation.copies or operation.family == "addition":
                stack.extend(self.present[edge.node])
        return False

    def _gates_itself(self, carrier: Edge, gate: Edge) -> bool:
        """Whether ``gate`` is a pointwise function of the tensor that ``carrier`` is a multiple of."""
        carrier = self._through(self.scaled, carrier)
        if gate == carrier:
            return False
        stack, seen = [gate], {carrier}
        while stack:
            edge = stack.pop()
            if edge in seen:
                continue
            seen.add(edge)
            operation, below = self.known[edge.node], self.present[edge.node]
            if operation is None or operation.family not in POINTWISE or not below or len(seen) > SMALL:
                return False
            stack.extend(below)
        return True

    def _through(self, ends: Sequence[Edge | None], edge: Edge) -> Edge:
        return ends[edge.node] or edge

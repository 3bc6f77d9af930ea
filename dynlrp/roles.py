"""Roles that operations play, read from the structure of the graph and never from names of models."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from dynlrp.graph import Edge, Graph, Structure
from dynlrp.rules.operation import REGISTRY, VJP

POINTWISE = frozenset({"elementwise", "piecewise linear", "scaling", "addition", "product", "quotient"})
STATISTICS = POINTWISE | {"reduction", "choice", "statistic"}
SMALL = 32
"""Longest written-out activation that is looked for, in operations."""


class Role(NamedTuple):
    """``names`` are what a composite selects by; ``gate`` is the operand that gates a product."""

    names: frozenset[str]
    gate: int | None = None


NO_ROLE = Role(frozenset())


def roles(structure: Structure | Graph) -> dict[int, Role]:
    """Roles by node index.

    ``attention``: a softmax whose rows weigh another signal in a product, and that product.
    ``softmax``: exponentials and their quotient by their own sum, a softmax written out; of the family ``softmax``.
    ``self gate``: a product ``x * g(x)`` of a tensor and a pointwise function of the same tensor.
    ``transition``: a product of a signal and an exponential of another, the decay of a state (Mamba); a matrix product
    where it is the exponential of a running sum, the decay over many steps at once (Mamba-2).
    ``gate``: a product with another operand that comes through a sigmoid, silu, gelu or tanh. Of two such operands
    the one that is never negative is the gate (a sigmoid before a tanh).
    """
    written = _written_softmaxes(structure)
    softmax = Role(frozenset({"softmax"}))
    found: dict[int, Role] = {index: softmax for quotient, parts in written.items() for index in (quotient, *parts)}
    for index, (name, operands) in enumerate(zip(structure.names, structure.operands, strict=True)):
        operation = REGISTRY.get(name)
        if operation is None or (operation.family != "product" and operation.bilinear is None):
            continue
        factors = [(i, edge) for i, edge in enumerate(operands) if edge is not None and operation.letter(i) == "*"]
        if len(factors) < 2:
            continue
        router = next((i for i, edge in factors if _routes(structure, edge, written)), None)
        if router is not None and operation.family == "product":
            found[index] = Role(frozenset({"gate"}), gate=router)
            continue
        ends = {i: through_copies(structure, edge) for i, edge in factors}
        for end in ends.values():
            weights = REGISTRY.get(structure.names[end.node])
            if end.node in written or (weights is not None and weights.family == "softmax"):
                found[index] = Role(frozenset({"attention"}))
                found[end.node] = Role(found.get(end.node, NO_ROLE).names | {"attention"})
        over = next((i for i, end in ends.items() if _decays_by_sums(structure, end)), None)
        if over is not None:
            found[index] = Role(frozenset({"transition"}), gate=over)
            continue
        if operation.family != "product":
            continue
        own = next((i for i, _ in factors if _gates_itself(structure, operands[1 - i], operands[i])), None)
        if own is not None:
            found[index] = Role(frozenset({"self gate"}), gate=own)
            continue
        below = {i: REGISTRY.get(structure.names[end.node]) for i, end in ends.items()}
        gates = {i: operation for i, operation in below.items() if operation is not None and operation.gate}
        if gates:
            gate = next((i for i, operation in gates.items() if operation.sign == "nonnegative"), min(gates))
            found[index] = Role(frozenset({"gate"}), gate=gate)
            continue
        decay = next((i for i, edge in factors if _decays(structure, edge)), None)
        if decay is not None:
            found[index] = Role(frozenset({"transition"}), gate=decay)
    return found


def through_copies(structure: Structure | Graph, edge: Edge) -> Edge:
    """The first tensor below that is more than a rearrangement."""
    while True:
        operation = REGISTRY.get(structure.names[edge.node])
        operands = structure.operands[edge.node]
        if operation is None or not operation.copies or len(operands) != 1 or operands[0] is None:
            return edge
        edge = operands[0]


def _through_multiples(structure: Structure | Graph, edge: Edge) -> Edge:
    """The first tensor below that is more than a rearrangement and a constant multiple."""
    while True:
        edge = through_copies(structure, edge)
        operation = REGISTRY.get(structure.names[edge.node])
        factors = [e for e in structure.operands[edge.node] if e is not None]
        if operation is None or operation.family not in ("product", "scaling") or len(factors) != 1:
            return edge
        edge = factors[0]


def _written_softmaxes(structure: Structure | Graph) -> dict[int, set[int]]:
    """Quotients of exponentials by their own sum, and the exponentials."""
    found: dict[int, set[int]] = {}
    for index, (name, operands) in enumerate(zip(structure.names, structure.operands, strict=True)):
        operation = REGISTRY.get(name)
        if operation is None or operation.softmax is None or operation.family != "quotient":
            continue
        numerator, denominator = operands
        summed = None if denominator is None else _summand(structure, denominator)
        if numerator is None or summed is None:
            continue
        above, below = (_through_multiples(structure, edge).node for edge in (numerator, summed))
        exponential = REGISTRY.get(structure.names[above])
        # The same tensor, or the same function of the same tensor.
        again = (
            structure.names[above] == structure.names[below] and structure.operands[above] == structure.operands[below]
        )
        same = summed == through_copies(structure, numerator) or (again and summed.node == below)
        if exponential is not None and exponential.softmax is not None and same:
            found[index] = {above, below}
    return found


def _summand(structure: Structure | Graph, edge: Edge) -> Edge | None:
    """What a tensor is the sum of over some of its entries, maybe with a constant added."""
    while True:
        edge = through_copies(structure, edge)
        operation = REGISTRY.get(structure.names[edge.node])
        present = [e for e in structure.operands[edge.node] if e is not None]
        if operation is None or len(present) != 1 or not isinstance(operation.rule, VJP):
            return None
        if operation.family == "reduction":
            return through_copies(structure, present[0])
        if operation.family != "addition":
            return None
        edge = present[0]


def _routes(structure: Structure | Graph, edge: Edge, written: Container[int]) -> bool:
    """Whether a tensor holds entries of a softmax or gate that were chosen, or divided by their sum or norm."""
    routed = False
    while True:
        operation, operands = REGISTRY.get(structure.names[edge.node]), structure.operands[edge.node]
        present = [e for e in operands if e is not None]
        if operation is None or not present:
            return False
        if operation.family == "softmax" or operation.gate or edge.node in written:
            return routed
        alone = len(present) == 1
        if operation.family == "quotient" and operands[0] is not None:
            normalised = _is_statistic_of(structure, operands[1], operands[0])
            routed = routed or normalised
            if not (alone or normalised):
                return False
        elif not alone or not (operation.copies or operation.family in ("product", "scaling")):
            return False
        routed = routed or operation.family in ("choice", "indexing")
        edge = present[0]


def _is_statistic_of(structure: Structure | Graph, edge: Edge | None, summand: Edge) -> bool:
    """Whether a tensor is a function of another's sum, norm or largest entry alone."""
    summand = _through_multiples(structure, summand)
    for _ in range(SMALL):
        edge = None if edge is None else _through_multiples(structure, edge)
        if edge is None or edge == summand:
            return edge == summand
        operation = REGISTRY.get(structure.names[edge.node])
        present = [e for e in structure.operands[edge.node] if e is not None]
        if operation is None or operation.family not in STATISTICS or len(present) != 1:
            return False
        edge = present[0]
    return False


def _decays(structure: Structure | Graph, edge: Edge) -> bool:
    """Whether a tensor is an exponential, maybe masked by a constant factor."""
    operation = REGISTRY.get(structure.names[_through_multiples(structure, edge).node])
    return operation is not None and operation.decay


def _decays_by_sums(structure: Structure | Graph, end: Edge) -> bool:
    """Whether a tensor is the exponential of running sums or of their differences."""
    operation = REGISTRY.get(structure.names[end.node])
    if operation is None or not operation.decay:
        return False
    stack, seen = [edge for edge in structure.operands[end.node] if edge is not None], {end}
    while stack and len(seen) <= SMALL:
        edge = through_copies(structure, stack.pop())
        operation = REGISTRY.get(structure.names[edge.node])
        if operation is None or edge in seen:
            continue
        if operation.running:
            return True
        seen.add(edge)
        if operation.copies or operation.family == "addition":
            stack.extend(e for e in structure.operands[edge.node] if e is not None)
    return False


def _gates_itself(structure: Structure | Graph, carrier: Edge | None, gate: Edge | None) -> bool:
    """Whether ``gate`` is a pointwise function of the tensor that ``carrier`` is a multiple of."""
    if carrier is None or gate is None or carrier == gate:
        return False
    while True:  # constant factors of the carrier
        operands = structure.operands[carrier.node]
        operation = REGISTRY.get(structure.names[carrier.node])
        present = [edge for edge in operands if edge is not None]
        if operation is None or operation.family not in ("product", "quotient") or len(present) != 1:
            break
        carrier = present[0]
    stack, seen = [gate], {carrier}
    if gate == carrier:
        return False
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        operation = REGISTRY.get(structure.names[edge.node])
        below = [e for e in structure.operands[edge.node] if e is not None]
        if operation is None or operation.family not in POINTWISE or not below or len(seen) > SMALL:
            return False
        stack.extend(below)
    return True

"""Roles that operations play, read from the structure of the graph and never from names of models."""

from __future__ import annotations

from typing import NamedTuple

from dynlrp.graph import Edge, Structure
from dynlrp.rules.operation import REGISTRY

POINTWISE = frozenset({"elementwise", "piecewise linear", "addition", "product", "quotient"})
SMALL = 32
"""Longest written-out activation that is looked for, in operations."""


class Role(NamedTuple):
    """``names`` are what a composite selects by; ``gate`` is the operand that gates a product."""

    names: frozenset[str]
    gate: int | None = None


NO_ROLE = Role(frozenset())


def roles(structure: Structure) -> dict[int, Role]:
    """Roles by node index.

    ``attention``: a softmax whose rows weigh another signal in a product, and that product.
    ``self gate``: a product ``x * g(x)`` of a tensor and a pointwise function of the same tensor.
    ``gate``: a product with another operand that comes through a sigmoid, silu, gelu or tanh.
    """
    found: dict[int, Role] = {}
    for index, (name, operands) in enumerate(zip(structure.names, structure.operands, strict=True)):
        operation = REGISTRY.get(name)
        if operation is None or (operation.family != "product" and operation.bilinear is None):
            continue
        factors = [(i, edge) for i, edge in enumerate(operands) if edge is not None and operation.letter(i) == "*"]
        if len(factors) < 2:
            continue
        ends = {i: _through_copies(structure, edge) for i, edge in factors}
        for end in ends.values():
            below = REGISTRY.get(structure.names[end.node])
            if below is not None and below.family == "softmax":
                found[end.node] = found[index] = Role(frozenset({"attention"}))
        if operation.family != "product":
            continue
        own = next((i for i, _ in factors if _gates_itself(structure, operands[1 - i], operands[i])), None)
        if own is not None:
            found[index] = Role(frozenset({"self gate"}), gate=own)
            continue
        gate = next((i for i, end in ends.items() if _is_gate(structure.names[end.node])), None)
        if gate is not None:
            found[index] = Role(frozenset({"gate"}), gate=gate)
    return found


def _is_gate(name: str) -> bool:
    operation = REGISTRY.get(name)
    return operation is not None and operation.gate


def _through_copies(structure: Structure, edge: Edge) -> Edge:
    """The first tensor below that is more than a rearrangement."""
    while True:
        operation = REGISTRY.get(structure.names[edge.node])
        operands = structure.operands[edge.node]
        if operation is None or not operation.copies or len(operands) != 1 or operands[0] is None:
            return edge
        edge = operands[0]


def _gates_itself(structure: Structure, carrier: Edge | None, gate: Edge | None) -> bool:
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

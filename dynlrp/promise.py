"""Promises: activations that rules need and the graph may not have kept, resolved by pull.

Who keeps a promise is settled before any relevance moves. A value comes from the first of: a leaf; what was captured
during the forward pass; what the node saved of its own result; what a consumer of the tensor saved; replaying the node
from its operands' promises. Values that several wait for are kept once and freed after the last has taken them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynlrp.errors import BrokenPromiseError
from dynlrp.graph import LEAF, Edge, Graph, Node, saved
from dynlrp.rules.operation import REGISTRY, Operation

FREED = "after they have already been freed"
"""What torch says of saved tensors that are gone."""


@dataclass
class Recipe:
    """How one promise is kept."""

    node: Node = None
    attribute: str | int = ""
    """Saved attribute to read, for a promise that a node keeps."""
    value: Tensor | None = None
    """A leaf or a captured tensor."""
    replay: Operation | None = None
    inputs: tuple[Edge | None, ...] = ()
    output: int = 0
    """Which of the replayed outputs it is."""
    length: int = 0
    """Replayed nodes on the longest chain down to kept tensors."""
    broken: str = ""
    """Why nobody can keep it."""
    waiting: int = 0
    """Rules and replays that have yet to take the value."""
    kept: Tensor | None = None
    """The replayed value, as long as somebody waits for it."""


@dataclass(frozen=True)
class PromiseReport:
    """Figures of one explanation: ``count`` promises, ``internal`` nodes replayed for them, chain ``lengths`` (delta
    is the longest), and ``density`` rho = internal nodes per node that relevance visited."""

    count: int
    internal: int
    lengths: tuple[int, ...]
    visited: int

    @property
    def delta(self) -> int:
        return max(self.lengths, default=0)

    @property
    def density(self) -> float:
        return self.internal / self.visited if self.visited else 0.0

    def __repr__(self) -> str:
        return f"{self.count} promises, {self.internal} nodes replayed, delta {self.delta}, rho {self.density:.3f}"


@dataclass
class Operands:
    """The view of a node that replay functions get."""

    node: Node

    def saved(self, name: str | int) -> Any:
        return saved(self.node, name)


class Promises:
    """All promises of one pass."""

    def __init__(
        self,
        graph: Graph,
        consumers: Mapping[Edge, list[tuple[int, int]]],
        captured: Mapping[Edge, tuple[Tensor, int]],
    ) -> None:
        self._nodes: list[Node] = graph.nodes
        self._names = graph.names
        self._operands = graph.operands
        self._consumers = consumers
        self._captured = captured
        self._recipes: dict[tuple[Edge, bool], Recipe] = {}
        self._lengths: list[int] = []
        self._internal: set[int] = set()

    def settle(self, edge: Edge, gated: bool = False) -> str:
        """Find a keeper for the value of ``edge``; returns why there is none, or an empty string.

        ``gated``: every consumer that relevance comes from is a relu, so its result will do.
        """
        key = (edge, gated)
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._resolve(edge, gated)
        if recipe.broken:
            return recipe.broken
        self._await(recipe)
        self._lengths.append(recipe.length)
        return ""

    def take(self, edge: Edge, gated: bool = False) -> Tensor:
        """The value of a settled promise; freed with its last taker."""
        recipe = self._recipes[(edge, gated)]
        value = self._value(recipe)
        self._release(recipe)
        return value

    def report(self, visited: int) -> PromiseReport:
        return PromiseReport(len(self._lengths), len(self._internal), tuple(self._lengths), visited)

    # Resolution: which recipe, without touching data.

    def _resolve(self, edge: Edge, gated: bool) -> Recipe:
        stack = [edge]
        while stack:
            current = stack[-1]
            if (current, False) in self._recipes:
                stack.pop()
                continue
            recipe = self._kept(current, False)
            if recipe is None:
                operation = REGISTRY.get(self._names[current.node])
                inputs = self._operands[current.node]
                if operation is None or operation.replay is None:
                    recipe = Recipe(broken=f"{self._names[current.node]} cannot be recomputed")
                elif self._hidden(operation, current.node):
                    recipe = Recipe(broken=f"{self._names[current.node]} adds a constant that the graph did not record")
                elif self._lost(operation, current.node):
                    recipe = Recipe(broken=f"{self._names[current.node]} did not save a constant factor")
                else:
                    waiting = [e for e in inputs if e is not None and (e, False) not in self._recipes]
                    if waiting:
                        stack.extend(waiting)
                        continue
                    below = [self._recipes[(e, False)] for e in inputs if e is not None]
                    broken = next((r.broken for r in below if r.broken), "")
                    if broken:
                        recipe = Recipe(broken=broken)
                    else:
                        length = 1 + max((r.length for r in below), default=0)
                        recipe = Recipe(
                            self._nodes[current.node],
                            replay=operation,
                            inputs=inputs,
                            output=current.output,
                            length=length,
                        )
                        self._internal.add(current.node)
            self._recipes[(current, False)] = recipe
            stack.pop()
        if not gated:
            return self._recipes[(edge, False)]
        recipe = self._kept(edge, True) or self._recipes[(edge, False)]
        self._recipes[(edge, True)] = recipe
        return recipe

    def _hidden(self, operation: Operation, index: int) -> bool:
        if operation.hides is None:
            return False
        facts = operation.facts(self._nodes[index]) if operation.facts is not None else None
        return operation.hides(facts, tuple(edge is not None for edge in self._operands[index]))

    def _lost(self, operation: Operation, index: int) -> bool:
        """A factor that is not recorded and was not saved either, as nothing recorded is multiplied with it."""
        return any(
            edge is None
            and operation.letter(position) == "*"
            and position in operation.saved
            and saved(self._nodes[index], operation.saved[position]) is None
            for position, edge in enumerate(self._operands[index])
        )

    def _kept(self, edge: Edge, gated: bool) -> Recipe | None:
        """Someone who holds the tensor itself."""
        node, name = self._nodes[edge.node], self._names[edge.node]
        if name == LEAF:
            return Recipe(value=node.variable.detach())
        captured = self._captured.get(edge)
        if captured is not None and captured[0]._version == captured[1]:
            return Recipe(value=captured[0])
        operation = REGISTRY.get(name)
        if operation is not None and operation.result and edge.output == 0:
            return Recipe(node, operation.result)
        for consumer, position in self._consumers.get(edge, ()):
            operation = REGISTRY.get(self._names[consumer])
            if operation is None:
                continue
            attribute = operation.saved.get(position)
            if attribute is None and gated and operation.gates is True:
                attribute = operation.result
            if attribute is not None and saved(self._nodes[consumer], attribute) is not None:
                return Recipe(self._nodes[consumer], attribute)
        return None

    # Keeping: reading and replaying.

    def _read(self, recipe: Recipe) -> Tensor:
        if recipe.value is not None:
            return recipe.value
        try:
            value: Tensor = saved(recipe.node, recipe.attribute).detach()
        except RuntimeError as error:
            if FREED in str(error):
                raise
            raise BrokenPromiseError(
                f"the tensor saved by {recipe.node.name()} was changed in place after the forward pass: {error}"
            ) from error
        return value

    def _await(self, recipe: Recipe) -> None:
        """Count one more taker; the first makes the recipe's own inputs awaited."""
        stack = [recipe]
        while stack:
            current = stack.pop()
            current.waiting += 1
            if current.replay is not None and current.waiting == 1:
                stack.extend(self._recipes[(edge, False)] for edge in current.inputs if edge is not None)

    def _release(self, recipe: Recipe) -> None:
        recipe.waiting -= 1
        if recipe.waiting <= 0:
            recipe.kept = None

    def _value(self, recipe: Recipe) -> Tensor:
        """Read, or replay from operands up; every node is replayed once."""
        stack = [recipe]
        while stack:
            current = stack[-1]
            if current.replay is None or current.kept is not None:
                stack.pop()
                continue
            below = [None if edge is None else self._recipes[(edge, False)] for edge in current.inputs]
            missing = [r for r in below if r is not None and r.replay is not None and r.kept is None]
            if missing:
                stack.extend(missing)
                continue
            values = [None if r is None else self._at_hand(r) for r in below]
            assert current.replay.replay is not None
            made = current.replay.replay(Operands(current.node), *values)
            if current.output and not isinstance(made, tuple | list):
                raise BrokenPromiseError(f"{current.node.name()} recomputes its first output alone")
            current.kept = made[current.output] if isinstance(made, tuple | list) else made
            for r in below:
                if r is not None:
                    self._release(r)
            stack.pop()
        return self._at_hand(recipe)

    def _at_hand(self, recipe: Recipe) -> Tensor:
        return recipe.kept if recipe.kept is not None else self._read(recipe)

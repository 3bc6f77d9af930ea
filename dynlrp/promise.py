"""Promises: activations that rules need and the graph may not have kept, resolved by pull.

Who keeps a promise is settled before any relevance moves. A value comes from the first of: a leaf; what was captured
during the forward pass; what the node saved of its own result; what a consumer of the tensor saved; replaying the node
from its operands' promises. Values that several wait for are kept once and freed after the last has taken them.

Only what gives the same numbers again is replayed: a random draw with the numbers that its node saved (the mask of a
dropout) or not at all, and saved tensors that were changed in place since keep nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dynlrp.errors import BrokenPromiseError
from dynlrp.graph import CHANGED, LEAF, Edge, Graph, Node, Operands, saved
from dynlrp.precision import Wide
from dynlrp.rules.operation import REGISTRY, Operation, Replay
from dynlrp.twice import loses

SINCE = "saved was changed in place after the forward pass"


def intact(node: Node, attribute: str | int) -> bool | None:
    """Whether a node has a tensor as it saved it: False where it was changed in place, None where there is none."""
    try:
        return None if saved(node, attribute) is None else True
    except RuntimeError as error:
        if CHANGED not in str(error):
            raise
        return False


def is_changed(node: Node, attribute: str | int) -> bool:
    """Whether a tensor was changed in place since a node saved it, as far as that shows without running hooks."""
    raw = getattr(node, f"_raw_saved_{attribute}", None)
    try:
        return isinstance(getattr(raw, "data", None), Tensor) and intact(node, attribute) is False
    except RuntimeError:  # it is gone
        return False


def plain(value: Tensor) -> Tensor:
    """A tensor as the pass uses it: without its graph, unless relevance is to be differentiated. A number is left as
    it is: dispatch modes take it for a Python number."""
    return value.detach() if value.requires_grad and not torch.is_grad_enabled() else value


NOWHERE = Edge(-1, 0)


@dataclass
class Recipe:
    """How one promise is kept."""

    node: Node = None
    attribute: str | int = ""
    """Saved attribute to read, for a promise that a node keeps."""
    value: Tensor | None = None
    """A leaf or a captured tensor."""
    replay: Replay | None = None
    inputs: tuple[Edge | None, ...] = ()
    edge: Edge = NOWHERE
    """What a replay makes: an output of a node."""
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
    """Figures of one explanation, by the definitions of promise depth and promise density in Lee et al. (2025).

    An operation that waits for activations makes one promise, for all its operands.
    """

    lengths: tuple[int, ...]
    """Per promise, the operations on the longest chain down to kept tensors, d(v): 0 where somebody kept them."""
    internal: int
    """Operations that are replayed, each once."""
    visited: int
    """Operations that relevance visited, |V|."""

    @property
    def count(self) -> int:
        """Promises, |V_P|."""
        return len(self.lengths)

    @property
    def delta(self) -> int:
        """The sum of all lengths."""
        return sum(self.lengths)

    @property
    def density(self) -> float:
        """Rho = |V_P| / |V|."""
        return self.count / self.visited if self.visited else 0.0

    def __repr__(self) -> str:
        return f"{self.count} promises, {self.internal} nodes replayed, delta {self.delta}, rho {self.density:.3f}"


class Linked(torch.autograd.Function):
    """A value that a node made once, as a function of the node's operands: its derivative is the node's own."""

    @staticmethod
    def forward(ctx: Any, node: Node, output: int, value: Tensor, *operands: Tensor | None) -> Tensor:
        ctx.node, ctx.output = node, output
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # By the engine, as a node that is called while the engine runs leaves out what that run does not ask for.
        edges = [None if child is None else GradientEdge(child, number) for child, number in ctx.node.next_functions]
        wanted = list(dict.fromkeys(edge for edge in edges if edge is not None))
        found = torch.autograd.grad(
            GradientEdge(ctx.node, ctx.output),
            wanted,
            grads,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        passed: dict[GradientEdge | None, Tensor | None] = dict(zip(wanted, found, strict=True))
        return (None, None, None, *(passed.pop(edge, None) for edge in edges))  # once, where operands are one tensor


def link(output: int, value: Tensor, step: Operands, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """A replay that gives ``value`` for one of the outputs."""
    linked: Tensor = Linked.apply(step.node, output, value, *operands)  # type: ignore[no-untyped-call]
    return (*[None] * output, linked)


class Promises:
    """All promises of one pass."""

    def __init__(
        self,
        graph: Graph,
        consumers: Mapping[Edge, list[tuple[int, int]]],
        captured: Mapping[Edge, tuple[Tensor, int]],
        wide: Wide | None = None,
        unlinked: Mapping[Edge, Tensor] = MappingProxyType({}),
    ) -> None:
        """``captured`` are values with their versions. ``unlinked`` are values that are no part of a graph, where
        relevance is to be differentiated: they are joined to the values of their node's operands."""
        self._nodes: list[Node] = graph.nodes
        self._names = graph.names
        self._operands = graph.operands
        self._consumers = consumers
        self._captured = captured
        self._wide = wide
        self._unlinked = unlinked
        self._recipes: dict[tuple[Edge, bool], Recipe] = {}
        self._replayed: dict[int, list[Recipe]] = {}
        """Recipes of one node's outputs, which one replay makes together."""
        self._lengths: dict[int, int] = {}
        """Longest chain for each node that waits."""
        self.missing: set[Edge] = set()
        """Tensors that nobody keeps and no replay makes: with their values, every promise can be kept."""

    def settle(self, edge: Edge, gated: bool = False, waiter: int | None = None) -> str:
        """Find a keeper for the value of ``edge``; returns why there is none, or an empty string.

        ``gated``: every consumer that relevance comes from is a relu, so its result will do. ``waiter`` is the node
        whose rule needs the value, for the report.
        """
        key = (edge, gated)
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = (self._kept(edge, True) if gated else None) or self._resolve(edge)
            self._recipes[key] = recipe
        if recipe.broken:
            return recipe.broken
        self._await(recipe)
        if waiter is not None:
            self._lengths[waiter] = max(recipe.length, self._lengths.get(waiter, 0))
        return ""

    def close(self) -> None:
        """Forget the promises that were looked at and nobody waits for: they would hold nodes to the end."""
        self._recipes = {key: recipe for key, recipe in self._recipes.items() if recipe.waiting}

    def take(self, edge: Edge, gated: bool = False) -> Tensor:
        """The value of a settled promise; freed with its last taker."""
        recipe = self._recipes[(edge, gated)]
        value = self._value(recipe)
        self._release(recipe)
        return value

    def report(self, visited: int) -> PromiseReport:
        return PromiseReport(tuple(self._lengths.values()), len(self._replayed), visited)

    # Resolution: which recipe, without touching data.

    def _resolve(self, edge: Edge) -> Recipe:
        stack = [edge]
        while stack:
            current = stack[-1]
            if (current, False) in self._recipes:
                stack.pop()
                continue
            recipe = self._kept(current, False)
            if recipe is None and current.output < 0:
                recipe = Recipe(broken="autograd did not record this constant")
                self.missing.add(current)
            elif recipe is None:
                operation = REGISTRY.get(self._names[current.node])
                inputs, replay = self._operands[current.node], None if operation is None else operation.replay
                obstacle = self._obstacle(operation, current.node)
                if current in self._unlinked:
                    obstacle, replay = "", partial(link, current.output, self._unlinked[current])
                if obstacle or replay is None:
                    recipe = Recipe(broken=obstacle)
                    self.missing.add(current)
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
                            replay=replay,
                            inputs=inputs,
                            edge=current,
                            length=length,
                        )
            self._recipes[(current, False)] = recipe
            stack.pop()
        return self._recipes[(edge, False)]

    def _obstacle(self, operation: Operation | None, index: int) -> str:
        """Why a node cannot be replayed, or an empty string."""
        name = self._names[index]
        if operation is None or operation.replay is None:
            return f"{name} cannot be recomputed"
        if torch.is_grad_enabled() and loses(self._nodes[index]):
            return f"{name} cannot be recomputed by what it saved: {loses(self._nodes[index])}"
        if self._hidden(operation, index):
            return f"{name} adds a constant that the graph did not record"
        return self._lost(operation, index)

    def _hidden(self, operation: Operation, index: int) -> bool:
        if operation.hides is None:
            return False
        facts = operation.facts(self._nodes[index]) if operation.facts is not None else None
        return operation.hides(facts, tuple(edge is not None for edge in self._operands[index]))

    def _lost(self, operation: Operation, index: int) -> str:
        """What became of a factor that is not recorded: it may not be saved either, as nothing recorded is multiplied
        with it."""
        for position, edge in enumerate(self._operands[index]):
            if edge is None and operation.letter(position) == "*" and position in operation.saved:
                found = intact(self._nodes[index], operation.saved[position])
                if not found:
                    name = self._names[index]
                    return f"{name} did not save a constant factor" if found is None else f"what {name} {SINCE}"
        return ""

    def _kept(self, edge: Edge, gated: bool) -> Recipe | None:
        """Someone who holds the tensor itself."""
        node, name = self._nodes[edge.node], self._names[edge.node]
        if name == LEAF:
            return Recipe(value=plain(node.variable))
        captured = self._captured.get(edge)
        if captured is not None and captured[0]._version == captured[1]:
            return Recipe(value=captured[0])
        operation = REGISTRY.get(name)
        if operation is not None and operation.result and edge.output == 0 and intact(node, operation.result):
            return Recipe(node, operation.result)
        for consumer, position in self._consumers.get(edge, ()):
            operation = REGISTRY.get(self._names[consumer])
            if operation is None:
                continue
            attribute = operation.saved.get(position)
            if attribute is None and gated and operation.gates is True:
                attribute = operation.result
            if attribute is not None and intact(self._nodes[consumer], attribute):
                return Recipe(self._nodes[consumer], attribute)
        return None

    # Keeping: reading and replaying.

    def _read(self, recipe: Recipe) -> Tensor:
        if recipe.value is not None:
            return recipe.value
        node, name = recipe.node, recipe.attribute
        return plain(saved(node, name) if self._wide is None else self._wide.saved(node, name))

    def _await(self, recipe: Recipe) -> None:
        """Count one more taker; the first makes the recipe's own inputs awaited."""
        stack = [recipe]
        while stack:
            current = stack.pop()
            current.waiting += 1
            if current.replay is not None and current.waiting == 1:
                self._replayed.setdefault(current.edge.node, []).append(current)
                stack.extend(self._recipes[(edge, False)] for edge in current.inputs if edge is not None)

    def _release(self, recipe: Recipe) -> None:
        recipe.waiting -= 1
        if recipe.waiting <= 0:
            recipe.kept = recipe.value = recipe.node = None

    def _value(self, recipe: Recipe) -> Tensor:
        """Read, or replay from operands up; every node is replayed once, for all its outputs."""
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
            made = current.replay(Operands(current.node, self._wide), *values)
            if not isinstance(made, tuple | list):
                made = (made,)
            if current.edge.output >= len(made):
                raise BrokenPromiseError(f"{current.node.name()} recomputes its first output alone")
            for output in self._replayed[current.edge.node]:
                if output.waiting and output.kept is None and output.replay is current.replay:
                    value = made[output.edge.output]
                    # As the forward pass rounded it.
                    output.kept = (
                        value
                        if self._wide is None
                        else value.to(current.node._input_metadata[output.edge.output].dtype)
                    )
                    for r in below:
                        if r is not None:
                            self._release(r)
            stack.pop()
        return self._at_hand(recipe)

    def _at_hand(self, recipe: Recipe) -> Tensor:
        value = recipe.kept if recipe.kept is not None else self._read(recipe)
        return value if self._wide is None else cast(Tensor, self._wide.cast(value))

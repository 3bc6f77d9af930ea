"""The recorded operations between an output and its sources, as plain indices that a plan can be made and kept for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dynlrp.rules.operation import REGISTRY

Node = Any
"""An autograd node (``torch.autograd.graph.Node`` or a node of a custom function)."""

LEAF = "torch::autograd::AccumulateGrad"


class Edge(NamedTuple):
    """A tensor of the graph: output ``output`` of node ``node``."""

    node: int
    output: int


@dataclass(frozen=True)
class Structure:
    """Everything a plan depends on, hashable. Nodes are numbered so that operands come before their consumers."""

    names: tuple[str, ...]
    operands: tuple[tuple[Edge | None, ...], ...]
    facts: tuple[Hashable, ...]
    """What some operations tell of themselves beyond their name (the bounds of a clamp, say)."""
    root: Edge
    sources: tuple[Edge, ...]
    seeded: bool = False
    """The root is given relevance instead of a multiplier."""
    observed: tuple[int, ...] = ()
    """Leaf nodes whose relevance is asked for although they are weights."""
    coefficients: tuple[int, ...] = ()
    """Leaf nodes that stand for coefficients of a larger graph."""
    paths: tuple[str, ...] | None = None
    """Module path of every node; only where the composite selects by path."""
    first: bool = True
    """No linear operation lies between this graph and the inputs (False inside an operation that is re-run)."""
    last: bool = True
    """None lies between it and the output."""


class Graph:
    """The live autograd nodes behind a :class:`Structure`, in the same order."""

    def __init__(self, root: Node) -> None:
        self.nodes, self.operands = _topological(root)
        self.index: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self.names = tuple([node.name() for node in self.nodes])

    def edge(self, node: Node, output: int) -> Edge | None:
        """The edge of a tensor's ``(grad_fn, output_nr)``, None where it is not part of the graph."""
        index = self.index.get(node)
        return None if index is None else Edge(index, output)

    def structure(
        self,
        root: Edge,
        sources: Iterable[Edge],
        seeded: bool = False,
        observed: Iterable[int] = (),
        coefficients: Iterable[int] = (),
        paths: tuple[str, ...] | None = None,
        first: bool = True,
        last: bool = True,
    ) -> Structure:
        """The hashable description of this graph for an explanation of ``root`` by ``sources``."""
        facts: list[Hashable] = []
        for name, node in zip(self.names, self.nodes, strict=True):
            operation = REGISTRY.get(name)
            facts.append(operation.facts(node) if operation is not None and operation.facts is not None else None)
        return Structure(
            self.names,
            self.operands,
            tuple(facts),
            root,
            tuple(sources),
            seeded,
            tuple(observed),
            tuple(coefficients),
            paths,
            first,
            last,
        )


def saved(node: Node, name: str | int) -> Any:
    """What a node saved: an attribute of its own; of a custom function, an entry of ``ctx.saved_tensors`` by number or
    an attribute of ``ctx``."""
    if isinstance(name, int):
        return node.saved_tensors[name]
    return getattr(node, name if isinstance(node, torch._C._FunctionBase) else "_saved_" + name)


def _topological(root: Node) -> tuple[list[Node], tuple[tuple[Edge | None, ...], ...]]:
    """Nodes reachable from ``root``, operands first, without recursion."""
    index: dict[Node, int] = {}
    nodes: list[Node] = []
    operands: list[tuple[Edge | None, ...]] = []
    opened: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node in index:
            stack.pop()
            continue
        following = opened.get(node)
        if following is None:
            opened[node] = following = node.next_functions
            waiting = [child for child, _ in following if child is not None and child not in index]
            if waiting:
                stack.extend(waiting)
                continue
        stack.pop()
        index[node] = len(nodes)
        nodes.append(node)
        operands.append(tuple([None if child is None else Edge(index[child], output) for child, output in following]))
    return nodes, tuple(operands)

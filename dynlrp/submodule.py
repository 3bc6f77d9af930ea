"""Calls of modules as single nodes: what a module recorded is gathered behind a node with the interface of autograd's.

A node belongs to a call if its sequence number lies between entry and exit. What uses its results outside was recorded
after the exit, and what it uses itself before the entry, so the gathered graph has no cycle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import Tensor, nn

from dynlrp.capture import Call
from dynlrp.errors import BrokenPromiseError, InputError
from dynlrp.graph import LEAF, Children, Edge, Graph, Node, fit, vjp
from dynlrp.rules.submodule import SUBMODULE


class Submodule:
    """One call of a module, as a node.

    Its outputs are what the module returned, and behind them whatever else of it is used outside; its operands what it
    was called with, and behind them whatever else it used: results of outer operations, and its parameters, which get
    nothing.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.path = call.modules[-1]
        self.nodes: list[Node] = []
        """What is inside, operands first."""
        self.leaves: set[Node] = set()
        """Parameters that were not handed in."""
        self.operands: list[tuple[Node, int] | None] = []
        self.outputs: dict[tuple[Node, int], int] = {}
        """Output number by inner node and its output."""
        self._input_metadata: list[Any] = [None] * len(call.outputs.edges)

    def name(self) -> str:
        return SUBMODULE

    def _sequence_nr(self) -> int:
        return self.call.start

    @property
    def _saved_module(self) -> nn.Module:
        return self.call.module

    @property
    def _saved_returned(self) -> int:
        return len(self.call.outputs.edges)

    @property
    def _saved_inputs(self) -> tuple[Tensor, ...]:
        given = self.call.inputs
        for edge, value, version in zip(given.edges, given.values, given.versions, strict=True):
            if edge is None and value._version != version:
                raise BrokenPromiseError(
                    f"an input of {self.path!r}, which the composite explains as one step, was changed in place later"
                )
        return given.values

    def output(self, node: Node, number: int) -> int:
        """Number of the output that an inner node makes."""
        place = self.outputs.get((node, number))
        if place is None:
            place = self.outputs[node, number] = len(self._input_metadata)
            self._input_metadata.append(node._input_metadata[number])
        return place

    def close(self) -> None:
        """Find what goes in and out, once all of ``nodes`` are there."""
        inside = set(self.nodes)
        for place, edge in enumerate(self.call.outputs.edges):
            if edge is not None and edge[0] in inside:
                self.outputs.setdefault(edge, place)
                self._input_metadata[place] = edge[0]._input_metadata[edge[1]]
        used = dict.fromkeys(
            edge for node in self.nodes for edge in node.next_functions if edge[0] is not None and edge[0] not in inside
        )
        given = self.call.inputs.edges
        others = [edge for edge in used if edge not in given]
        self.leaves = {node for node, _ in others if node.name() == LEAF}
        self.operands = [*(edge if edge in used else None for edge in given), *others]

    def __call__(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The module's own vector-Jacobian product."""
        slots: dict[tuple[Node, int], Tensor] = {}
        for edge, place in self.outputs.items():
            g = grads[place]
            if g is not None:
                slots[edge] = g
        for node in reversed(self.nodes):
            arrived = [slots.pop((node, number), None) for number in range(len(node._input_metadata))]
            if all(g is None for g in arrived):
                continue
            for edge, value in zip(node.next_functions, vjp(node, arrived), strict=True):
                child, number = edge
                if child is not None and value is not None and child not in self.leaves:
                    expected = child._input_metadata[number]
                    value = fit(value, expected, expected.dtype)
                    before = slots.get(edge)
                    slots[edge] = value if before is None else before + value
        return tuple(None if edge is None else slots.pop(edge, None) for edge in self.operands)


class Gathered(Graph):
    """A graph in which calls of modules are single nodes."""

    def __init__(self, root: Node, calls: Sequence[Call]) -> None:
        starts = [call.start for call in calls]
        steps = [Submodule(call) for call in calls]
        self._owners: dict[Node, Submodule] = {}
        plain = Graph(root).nodes
        for node in plain:
            number = node._sequence_nr()
            place = bisect_right(starts, number) - 1
            if place >= 0 and number < calls[place].stop:
                steps[place].nodes.append(node)
                self._owners[node] = steps[place]
        self.steps = [step for step in steps if step.nodes]
        for step in self.steps:
            step.close()
        children: dict[Node, Children] = {
            node: tuple([self._outer(edge) for edge in node.next_functions])
            for node in plain
            if node not in self._owners
        }
        for step in self.steps:
            children[step] = tuple([self._outer(edge) for edge in step.operands])
        try:
            TopologicalSorter({n: [c for c, _ in below if c is not None] for n, below in children.items()}).prepare()
        except CycleError as error:
            path = next(node.path for node in error.args[1] if isinstance(node, Submodule))
            raise InputError(
                f"module {path!r} cannot be one step: an operation outside of it lies between two inside"
            ) from None
        super().__init__(self._owners.get(root, root), children)

    def _outer(self, edge: tuple[Node | None, int] | None) -> tuple[Node | None, int]:
        if edge is None:
            return None, 0
        step = self._owners.get(edge[0])
        return edge if step is None else (step, step.output(*edge))

    def edge(self, node: Node, output: int) -> Edge | None:
        step = self._owners.get(node)
        if step is None:
            return super().edge(node, output)
        number = step.outputs.get((node, output))
        return None if number is None else super().edge(step, number)

    def forget(self) -> None:
        super().forget()
        self._owners.clear()
        self.steps = []

    def recorded(self) -> Iterator[Node]:
        for node in self.nodes:
            yield from node.nodes if isinstance(node, Submodule) else (node,)

    def values(self) -> dict[Edge, tuple[Tensor, int]]:
        found: dict[Edge, tuple[Tensor, int]] = {}
        for step in self.steps:
            for side in (step.call.inputs, step.call.outputs):
                for place, value, version in zip(side.edges, side.values, side.versions, strict=True):
                    edge = None if place is None else self.edge(*place)
                    if edge is not None:
                        found[edge] = (value, version)
        return found

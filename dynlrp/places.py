"""Tensors inside a model by name: a module's output or input, and what attention makes on its way.

A name is that of a module, or a glob; what stands behind a colon says which tensor: ``block.0`` is the module's output
and ``block.0:input`` its input; of several, ``block.0:1`` and ``block.0:input:1`` are the second. ``query``, ``key``,
``value``, ``weights`` and ``heads`` (the output of every head, before they are joined) are those of the attention that
ran in the module, fused or written out, found by structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.graph import Edge, Graph
from dynlrp.roles import NO_ROLE, roles
from dynlrp.rules.operation import REGISTRY

ATTENTION = ("query", "key", "value", "weights", "heads")
NEARBY = 32
"""Operations between a softmax and the product of queries and keys, at most."""


def parse(pattern: str) -> tuple[str, str]:
    """The glob of a module, and which of its tensors: ``output``, ``input``, a number of one of those (``1``,
    ``input:1``), or one of ``ATTENTION``."""
    glob, *kinds = pattern.split(":")
    number = kinds[-1:] if kinds and kinds[-1].isdecimal() else []
    kind = kinds[: len(kinds) - len(number)]
    if len(kind) > 1 or any(k != "input" and (number or k not in ATTENTION) for k in kind):
        raise InputError(
            f"{pattern!r} ends in {':'.join(kinds)!r}; behind a colon stands one of input, {', '.join(ATTENTION)}, or "
            f"the number of an output"
        )
    return glob, ":".join(kinds) or "output"


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph and how it is shown."""

    edge: Edge
    stands: tuple[int, ...]
    """The shape it has in the graph."""
    split: tuple[int, ...]
    """The same with a dimension for heads."""
    order: tuple[int, ...]
    """The dimensions of that in the order they are shown in."""
    axis: int | None = None
    """The axis of its channels, where that is known of this kind of tensor."""

    @classmethod
    def plain(cls, edge: Edge, shape: tuple[int, ...], axis: int | None = None) -> Tap:
        """A tensor that is shown as it is."""
        return cls(edge, shape, shape, tuple(range(len(shape))), axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it is shown in."""
        return tuple(self.split[place] for place in self.order)

    def show(self, tensor: Tensor) -> Tensor:
        """A tensor of the graph's shape in the shape it is shown in."""
        return tensor.reshape(self.split).permute(self.order)

    def place(self, mask: Tensor) -> Tensor:
        """A mask that broadcasts to the shown shape, in one that broadcasts to the graph's."""
        if self.shape == self.stands and self.order == tuple(sorted(self.order)):
            return mask
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return mask.expand(self.shape).permute(back).reshape(self.stands)


def attention(
    graph: Graph, sources: Iterable[Edge], path: Callable[[int], str], batch: int
) -> Iterator[tuple[str, str, Tap]]:
    """Module path, kind and tensor for every attention, in the order they ran. ``sources`` are what is explained and
    ``batch`` is the number of samples."""
    played = roles(graph, sources)
    for index, name in enumerate(graph.names):
        operation = REGISTRY.get(name)
        if operation is None:
            continue
        runs = index
        if operation.family == "attention":
            found = _fused(graph, index)
        elif (weighs := played.get(index, NO_ROLE).weighs) is not None:
            runs = weighs[0]  # a softmax may be a module of its own
            found = _written_out(graph, index, *weighs, batch)
        else:
            continue
        where = path(graph.nodes[runs]._sequence_nr())
        for kind, tap in found:
            yield where, kind, tap


def _fused(graph: Graph, index: int) -> Iterator[tuple[str, Tap]]:
    edges = dict(zip(("query", "key", "value"), graph.operands[index], strict=False))
    for kind, edge in {**edges, "heads": Edge(index, 0)}.items():
        if edge is not None:
            yield kind, Tap.plain(edge, _shape(graph, edge), axis=1)


def _written_out(graph: Graph, index: int, product: int, position: int, batch: int) -> Iterator[tuple[str, Tap]]:
    """``product`` weighs with this softmax, which is its operand ``position``."""
    weights = Edge(index, 0)
    lead = _shape(graph, weights)[:-2]
    if not lead:
        return
    if len(lead) == 1 and batch and lead[0] % batch == 0:
        lead = (batch, lead[0] // batch)
    found: list[tuple[str, Edge | None, bool]] = [("weights", weights, False)]
    scores = _product_below(graph, graph.operands[index])
    if scores is not None:
        found += [("query", scores[0], False), ("key", scores[1], True)]
    if REGISTRY[graph.names[product]].bilinear is not None:
        first, second = _factors(graph, product)
        value = second if first == graph.operands[product][position] else first
        found += [("value", value, False), ("heads", Edge(product, 0), False)]
    for kind, edge, transposed in found:
        stands = () if edge is None else _shape(graph, edge)
        if edge is not None and math.prod(stands[:-2]) == math.prod(lead):
            count = len(lead)
            order = (*range(count), *((count + 1, count) if transposed else (count, count + 1)))
            yield kind, Tap(edge, stands, (*lead, *stands[-2:]), order, axis=1)


def _shape(graph: Graph, edge: Edge) -> tuple[int, ...]:
    return tuple(graph.nodes[edge.node]._input_metadata[edge.output].shape)


def _factors(graph: Graph, index: int) -> list[Edge | None]:
    """The two factors of a matrix product that has no weights of its own; none of any other operation."""
    operation = REGISTRY.get(graph.names[index])
    if operation is None or operation.bilinear is None:
        return []
    return [edge for position, edge in enumerate(graph.operands[index]) if operation.letter(position) == "*"]


def _product_below(graph: Graph, edges: Sequence[Edge | None]) -> tuple[Edge, Edge] | None:
    """The two factors of the nearest product of two signals below some tensors, the first summand first."""
    stack = [edge for edge in reversed(edges) if edge is not None]
    for _ in range(NEARBY):
        if not stack:
            return None
        index = stack.pop().node
        factors = [edge for edge in _factors(graph, index) if edge is not None]
        if len(factors) == 2:
            return factors[0], factors[1]
        stack.extend(edge for edge in reversed(graph.operands[index]) if edge is not None)
    return None

"""One number per id: which embeddings the integer inputs of a model index, and how their relevance is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dynlrp.errors import InputError
from dynlrp.graph import Edge, Graph, Node, Operands, Skeleton, saved
from dynlrp.rules.operation import REGISTRY


@dataclass(frozen=True)
class Rows:
    """How the relevance of an embedding becomes one number per id: ``places`` are the ids' positions in the input,
    one past the last for ids that the model added. ``split`` is the operation's ``rows``, ``table`` its operand;
    without it, the output's dimensions ``beside`` those of the ids are summed."""

    places: Tensor
    beside: tuple[int, ...]
    split: Callable[..., Tensor] | None
    node: Node
    table: Edge | None

    def read(self, relevance: Tensor, shape: torch.Size, table: Tensor | None) -> Tensor:
        if self.split is not None:
            rows = self.split(Operands(self.node), relevance, table)
        else:
            rows = relevance.sum(self.beside) if self.beside else relevance
        flat = rows.new_zeros(shape.numel() + 1)
        return flat.index_add_(0, self.places.reshape(-1), rows.reshape(-1))[:-1].reshape(shape)


class Lookup(NamedTuple):
    """A node that looks up rows of a table, the indices, and the output's dimensions beside theirs."""

    node: int
    indices: Tensor
    beside: tuple[int, ...]


def find_rows(graph: Graph, inputs: Sequence[Tensor], sources: Sequence[Edge]) -> list[list[tuple[Edge, Rows]]]:
    """The embeddings that each of some integer inputs indexes, ``sources`` being tensors that are no tables.

    An embedding belongs to the input whose memory its indices lie in, be it a view; else, where the model copied its
    ids, to the first input without such an embedding that holds the same numbers, maybe transposed, padded or cut.
    """
    found: list[list[tuple[Edge, Rows]]] = [[] for _ in inputs]
    copied: list[Lookup] = []
    memory = {ids.untyped_storage()._cdata: number for number, ids in enumerate(inputs)}
    for lookup in _lookups(graph, sources) if inputs else ():
        given = lookup.indices
        number = memory.get(given.untyped_storage()._cdata)
        if number is None:
            copied.append(lookup)
        else:
            order = torch.arange(inputs[number].numel(), device=given.device)
            order = order.as_strided(given.shape, given.stride(), given.storage_offset())
            found[number].append(_rows(graph, lookup, order))
    taken = [bool(embeddings) for embeddings in found]
    for step in graph.steps:
        for node in step.nodes:
            entry = REGISTRY.get(node.name())
            indices = saved(node, entry.lookup) if entry is not None and entry.lookup else None
            if indices is not None and any(_reads(indices, ids) for ids in inputs):
                raise InputError(
                    f"the embedding of integer inputs lies inside of {step.path!r}, which the composite explains as "
                    f"one step: select modules behind it"
                )
    if any(taken) and active_fake_mode() is not None:  # no numbers tell where the others come from
        copied = []
    for lookup in copied:
        for number, ids in enumerate(inputs):
            places = None if taken[number] else _places(lookup.indices, ids)
            if places is not None:
                found[number].append(_rows(graph, lookup, places))
                break
    return found


def _lookups(graph: Graph, sources: Sequence[Edge]) -> Iterator[Lookup]:
    """Look-ups in tables, and choices of entries by index where these are made of parameters alone, as a bare one."""
    for index in graph.skeleton.lookups:
        node = graph.nodes[index]
        last = len(node._input_metadata[0].shape) - 1
        yield Lookup(index, saved(node, REGISTRY[graph.names[index]].lookup), (last,))
    for index in _choices(graph.skeleton, tuple(sources)):
        selects = REGISTRY[graph.names[index]].selects
        chosen = None if selects is None else selects(Operands(graph.nodes[index]))
        if chosen is not None:
            yield Lookup(index, *chosen)


@lru_cache(maxsize=64)
def _choices(skeleton: Skeleton, sources: tuple[Edge, ...]) -> tuple[int, ...]:
    """The choices by index behind which there is no source, nor another look-up or choice."""
    if not skeleton.selections:
        return ()
    signals = {edge.node for edge in sources}.union(skeleton.lookups)
    chosen, found = frozenset(skeleton.selections), []
    for index, operands in enumerate(skeleton.operands):  # which come before their consumers
        if any(edge is not None and edge.node in signals for edge in operands):
            signals.add(index)
        elif index in chosen:
            found.append(index)
            signals.add(index)
    return tuple(found)


def _rows(graph: Graph, lookup: Lookup, places: Tensor) -> tuple[Edge, Rows]:
    index = lookup.node
    operation = REGISTRY[graph.names[index]]
    table = graph.operands[index][0] if operation.rows is not None else None
    return Edge(index, 0), Rows(places, lookup.beside, operation.rows, graph.nodes[index], table)


def _reads(indices: Tensor, ids: Tensor) -> bool:
    """Whether an embedding is indexed by an input, or by a copy of it."""
    own = indices.untyped_storage()._cdata == ids.untyped_storage()._cdata
    return own or _places(indices, ids) is not None


def _places(indices: Tensor, ids: Tensor) -> Tensor | None:
    """Where in ``ids`` copied ``indices`` come from; None where they do not.

    They may be transposed, have more or fewer at either end of their sequence, or be in another shape.
    """
    order = torch.arange(ids.numel(), device=indices.device)
    if indices.numel() == ids.numel() and _same(indices.reshape(-1), ids.reshape(-1)):
        return order
    order = order.reshape(ids.shape)
    if ids.ndim != indices.ndim or not ids.numel() or not indices.numel():
        return None
    if ids.ndim == 2 and ids.shape == indices.shape[::-1] and _same(indices.t(), ids):
        return order.t()
    length = min(ids.shape[-1], indices.shape[-1])
    if ids.shape[:-1] != indices.shape[:-1] or ids.shape == indices.shape:
        return None
    for part in (slice(0, length), slice(-length, None)):
        if _same(indices[..., part], ids[..., part]):
            places = torch.full_like(indices, ids.numel(), dtype=torch.long)
            places[..., part] = order[..., part]
            return places
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, or may: fake ones have none. Of a trace, those it is made with."""
    if a.shape != b.shape or isinstance(a, FakeTensor):
        return a.shape == b.shape
    with _disable_current_modes():
        return torch.equal(a, b)

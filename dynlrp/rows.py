"""One number per id: which embeddings the integer inputs of a model index, and how their relevance is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dynlrp.errors import InputError
from dynlrp.graph import Edge, Graph, Node, Operands, saved
from dynlrp.rules.operation import REGISTRY


@dataclass(frozen=True)
class Rows:
    """How the relevance of an embedding becomes one number per id: ``places`` are the ids' positions in the input,
    one past the last for ids that the model added. ``split`` is the operation's ``rows``, ``table`` its operand."""

    places: Tensor
    split: Callable[..., Tensor] | None
    node: Node
    table: Edge | None

    def read(self, relevance: Tensor, shape: torch.Size, table: Tensor | None) -> Tensor:
        rows = relevance.sum(-1) if self.split is None else self.split(Operands(self.node), relevance, table)
        flat = rows.new_zeros(shape.numel() + 1)
        return flat.index_add_(0, self.places.reshape(-1), rows.reshape(-1))[:-1].reshape(shape)


def find_rows(graph: Graph, inputs: Sequence[Tensor]) -> list[list[tuple[Edge, Rows]]]:
    """The embeddings that each of some integer inputs indexes.

    An embedding belongs to the input whose memory its indices lie in, be it a view; else, where the model copied its
    ids, to the first input without such an embedding that holds the same numbers, maybe transposed, padded or cut.
    """
    found: list[list[tuple[Edge, Rows]]] = [[] for _ in inputs]
    copied: list[tuple[int, Tensor]] = []
    memory = {ids.untyped_storage()._cdata: number for number, ids in enumerate(inputs)}
    for index in graph.skeleton.lookups:
        indices = saved(graph.nodes[index], REGISTRY[graph.names[index]].lookup)
        number = memory.get(indices.untyped_storage()._cdata)
        if number is None:
            copied.append((index, indices))
        else:
            order = torch.arange(inputs[number].numel(), device=indices.device)
            order = order.as_strided(indices.shape, indices.stride(), indices.storage_offset())
            found[number].append(_rows(graph, index, order))
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
    for index, indices in copied:
        for number, ids in enumerate(inputs):
            places = None if taken[number] else _places(indices, ids)
            if places is not None:
                found[number].append(_rows(graph, index, places))
                break
    return found


def _rows(graph: Graph, index: int, places: Tensor) -> tuple[Edge, Rows]:
    operation = REGISTRY[graph.names[index]]
    table = graph.operands[index][0] if operation.rows is not None else None
    return Edge(index, 0), Rows(places, operation.rows, graph.nodes[index], table)


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

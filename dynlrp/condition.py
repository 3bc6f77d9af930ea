"""Conditional relevance: only what passes through chosen parts of a module's output (Achtibat et al. 2023, concept
relevance propagation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.graph import LEAF, Edge, Graph
from dynlrp.rules.operation import REGISTRY


@dataclass(frozen=True)
class Part:
    """Entries ``index`` of a tensor along ``axis``; ``axis=None`` are its channels (see :func:`channel_axis`)."""

    index: int | Sequence[int] | slice
    axis: int | None = None


Selection = int | Sequence[int] | Part | Sequence[Part] | Tensor
"""What relevance passes through: channels by number, a :class:`Part`, several of which an entry must be in all, or a
mask that broadcasts to the tensor (boolean, or weights)."""
Condition = Mapping[str, Selection]
"""Selections by name or glob of the tensor; relevance passes through all of them."""


def mask(selection: Selection, shape: Sequence[int], axis: int, name: str) -> Tensor:
    """The mask of a selection, in a shape that broadcasts to ``shape``; float64 weights or booleans.

    ``axis`` is that of the channels and ``name`` what errors call the tensor.
    """
    if isinstance(selection, Tensor) and (selection.dtype == torch.bool or selection.is_floating_point()):
        try:
            torch.broadcast_to(selection, tuple(shape))
        except RuntimeError:
            raise InputError(
                f"a mask of shape {tuple(selection.shape)} does not broadcast to {name!r}, which has {tuple(shape)}"
            ) from None
        return selection.detach()
    parts = _parts(selection, name)
    found = torch.ones([1] * len(shape), dtype=torch.bool)
    for part in parts:
        along = axis if part.axis is None else part.axis
        if not -len(shape) <= along < len(shape):
            raise InputError(f"{name!r} of shape {tuple(shape)} has no axis {along}")
        size = shape[along]
        chosen = torch.zeros(size, dtype=torch.bool)
        if isinstance(part.index, slice):
            chosen[part.index] = True
        else:
            index = [part.index] if isinstance(part.index, int) else list(part.index)
            wrong = [i for i in index if not -size <= i < size]
            if wrong:
                raise InputError(
                    f"{name!r} has {size} entries along axis {along} of its shape {tuple(shape)}, not {wrong[0]}"
                )
            chosen[index] = True
        found = found & chosen.reshape([-1 if d == along % len(shape) else 1 for d in range(len(shape))])
    return found


def _parts(selection: Selection, name: str) -> list[Part]:
    if isinstance(selection, Tensor):
        selection = selection.tolist()
    entries: list[Any] = list(selection) if isinstance(selection, Sequence) else [selection]
    if entries and all(isinstance(entry, Part) for entry in entries):
        return entries
    if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        return [Part(entries)]
    raise InputError(
        f"the condition on {name!r} must be channel numbers, a Part, several of them, or a mask, not {selection!r}"
    )


SEARCHED = 1000
"""Operations below a tensor that are looked at for the one that made its channels."""


def channel_axis(graph: Graph, edge: Edge, shape: Sequence[int]) -> int:
    """Which axis of a tensor its channels lie along: axis 1 where the nearest layer with weights below it is a
    convolution, else the last; of these two the one that has as many entries as that layer has outputs.
    """
    last = len(shape) - 1
    if last < 2:
        return last
    queue, seen = [edge.node], {edge.node}
    for index in queue:
        family = _layer(graph, index)
        made = graph.nodes[index]._input_metadata[0].shape if family else ()
        if len(made) > 1:
            usual = 1 if family == "convolution" else last
            count = made[1 if family == "convolution" else -1]
            fits = [axis for axis in (1, last) if shape[axis] == count]
            return fits[0] if len(fits) == 1 else usual
        for operand in graph.operands[index]:
            if operand is not None and operand.node not in seen and len(seen) < SEARCHED:
                seen.add(operand.node)
                queue.append(operand.node)
    return 1 if last > 2 else last


def _layer(graph: Graph, index: int) -> str:
    """The family of a layer with weights: one factor of its product is a leaf, or is not recorded."""
    operation = REGISTRY.get(graph.names[index])
    if operation is None:
        return ""
    if operation.lookup:
        return operation.family
    if operation.family not in ("convolution", "dense"):
        return ""
    for position, edge in enumerate(graph.operands[index]):
        if operation.letter(position) == "*":
            end = None if edge is None else _through_copies(graph, edge)
            if end is None or graph.names[end.node] == LEAF:
                return operation.family
    return ""


def _through_copies(graph: Graph, edge: Edge) -> Edge:
    """The first tensor below that is more than a rearrangement."""
    while True:
        operation = REGISTRY.get(graph.names[edge.node])
        operands = graph.operands[edge.node]
        if operation is None or not operation.copies or len(operands) != 1 or operands[0] is None:
            return edge
        edge = operands[0]

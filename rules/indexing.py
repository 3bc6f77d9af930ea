"""Gathering, masking and choosing: every output element is one element of an operand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import Operation, register
from dynlrp.rules.shape import signed


def _embedding(step: Any, weight: Tensor) -> Tensor:
    return weight[step.saved("indices")]


def _index(step: Any, x: Tensor) -> Tensor:
    indices = [slice(None) if i is None else i for i in step.saved("indices")]
    return x[tuple(indices)]


def _where(step: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(step.saved("condition"), a, b)


def _missing(facts: Any, present: tuple[bool, ...]) -> bool:
    return not all(present)


register(Operation("EmbeddingBackward0", "embedding", operands="+", copies=True, replay=_embedding))
register(Operation("IndexBackward0", "indexing", operands="+", copies=True, sign="same", replay=_index))
register(
    Operation(
        "IndexSelectBackward0",
        "indexing",
        operands="+",
        copies=True,
        sign="same",
        replay=lambda step, x: x.index_select(signed(step.saved("dim")), step.saved("index")),
    )
)
register(
    Operation(
        "GatherBackward0",
        "indexing",
        operands="+",
        copies=True,
        sign="same",
        replay=lambda step, x: x.gather(signed(step.saved("dim")), step.saved("index")),
    )
)
register(Operation("WhereBackward0", "indexing", operands="++", copies=True, replay=_where, hides=_missing))
# The fill value is not recorded; relevance of a value other than 0 shows in the ledger.
register(
    Operation(
        "MaskedFillBackward0", "indexing", operands="+", copies=True, hides=lambda facts, present: True
    )
)
register(Operation("MaskedFillBackward1", "indexing", operands="++", copies=True, hides=_missing))

"""Gathering, masking and choosing: every output element is one element of an operand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import Grads, Operation, Rule, Step, missing, register
from dynlrp.rules.shape import signed


def _embedding(step: Any, weight: Tensor) -> Tensor:
    return weight[step.saved("indices")]


def _index(step: Any, x: Tensor) -> Tensor:
    indices = [slice(None) if i is None else i for i in step.saved("indices")]
    return x[tuple(indices)]


def _where(step: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(step.saved("condition"), a, b)


@dataclass(frozen=True)
class Lookup(Rule):
    """Relevance of an embedding table: every use of a row adds up. The VJP would leave out the padding row, and weigh
    rows by their frequency where the layer asks for that in training."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None]
        rows: Any = step.saved("weight_sym_argsize_0")
        table = torch.zeros(rows, g.shape[-1], dtype=g.dtype, device=g.device)
        return [table.index_add_(0, step.saved("indices").reshape(-1), g.reshape(-1, g.shape[-1]))]


register(
    Operation(
        "EmbeddingBackward0", "embedding", lookup="indices", rule=Lookup(), operands="+", copies=True, replay=_embedding
    )
)
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
register(Operation("WhereBackward0", "indexing", operands="++", copies=True, replay=_where, hides=missing))
# The fill value is not recorded; relevance of a value other than 0 shows in the ledger.
register(Operation("MaskedFillBackward0", "indexing", operands="+", copies=True, hides=lambda facts, present: True))
register(Operation("MaskedFillBackward1", "indexing", operands="++", copies=True, hides=missing))
# Written values and what they are written into are both added to nothing else. Accumulating adds them up.
register(Operation("IndexPutBackward0", "indexing", operands="++", copies=True, hides=missing))

"""Sparse tensors: they are made, read and multiplied as dense ones are, and only their entries carry relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.linalg import multilinear
from dynlrp.rules.linear import adds, lost_summand
from dynlrp.rules.operation import Grads, Operation, Rule, Step, Taylor, linear_operation, register
from dynlrp.rules.shape import dims

linear_operation(
    "ToSparseBackward0",
    "ToSparseBackward1",
    "ToSparseBscBackward0",
    "ToSparseBsrBackward0",
    "ToSparseCscBackward0",
    "ToSparseCsrBackward0",
    "SparseCooTensorWithDimsAndTensorsBackward0",
    family="movement",
)
linear_operation("SparseCompressedTensorBackward0", family="movement", saved={0: "values"}, result="result")
linear_operation("ToDenseBackward0", family="movement", replay=lambda step, x: x.to_dense())
linear_operation(
    "ValuesBackward0", "ValuesBackward0_copy", family="movement", saved={0: "self"}, replay=lambda step, x: x.values()
)
linear_operation("CoalesceBackward0", family="movement", replay=lambda step, x: x.coalesce())


@dataclass(frozen=True)
class Masked(Rule):
    """m_x = m where the mask has an entry (exact: linear): the VJP, which is for sparse multipliers, while products
    also pass dense ones."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        return step.vjp([g if g is None or g.layout is not torch.strided else g.sparse_mask(step.saved("mask"))])


linear_operation(
    "SparseMaskBackward0",
    family="movement",
    rule=Masked(),
    replay=lambda step, x: x.sparse_mask(step.saved("mask")),
)
linear_operation(
    "SparseSumBackward0", family="reduction", saved={0: "self"}, replay=lambda step, x: torch.sparse.sum(x, dims(step))
)


def _sampled(step: Any, c: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    a, b = step.saved("mat1") if a is None else a, step.saved("mat2") if b is None else b
    y: Tensor = torch.sparse.sampled_addmm(c, a, b, beta=step.saved("beta"), alpha=step.saved("alpha"))
    return y


def _reduced(step: Any, a: Tensor | None, b: Tensor | None) -> Tensor:
    a, b = step.saved("self") if a is None else a, step.saved("other") if b is None else b
    y: Tensor = torch.sparse.mm(a, b, step.saved("reduce"))
    return y


multilinear(
    "SparseSampledAddmmBackward0", "+**", (None, "mat1", "mat2"), replay=_sampled, facts=adds, hides=lost_summand
)
multilinear("SparseMmReduceImplBackward0", "**", ("self", "other"), replay=_reduced)
for _name in ("SparseSoftmaxBackward0", "SparseLogSoftmaxBackward0"):
    register(Operation(_name, "softmax", rule=Taylor(), operands="+", saved={0: "self"}, result="result"))

"""Sums of two signals: residual connections, biases, differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import (
    OUTPUT,
    VJP,
    Grads,
    Need,
    Operation,
    Rule,
    Step,
    StepShape,
    divide,
    missing,
    register,
)


@dataclass(frozen=True)
class EpsilonSum(Rule):
    """R_a = a / (z + epsilon sign(z)) R: each summand by its share, with a stabiliser (Bach et al. 2015, eq. 58).

    With ``epsilon=0`` it is the VJP, which every sum has without this rule. ``relative``: epsilon is in units of the
    root mean square of z, as on linear layers.
    """

    families = frozenset({"addition"})

    epsilon: float = 1e-6
    relative: bool = False

    @property
    def whole_output(self) -> bool:
        return self.relative

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g, z = grads[0], step.output()
        if g is None:
            return [None] * len(step.wants)
        relevance = g * z
        s = divide(relevance, z, self.epsilon, self.relative)
        step.book("absorbed", (relevance - s * z).sum())
        return step.vjp([s])


@dataclass(frozen=True)
class Magnitude(Rule):
    """R_a = |a| / (|a| + |b|) R: shares by magnitude, whatever the signs  (Lee & Millan Arias 2025).

    A parameter takes its share too; what autograd did not record, a number or a buffer, takes none, and the ledger
    lists the operation. Where both are 0 the relevance is absorbed.
    """

    families = frozenset({"addition"})

    consumes = "relevance"
    emits = "relevance"
    recorded_only = True

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(i) for i, present in enumerate(step.present) if present] if len(step.present) > 1 else []

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        r = grads[0]
        results: list[Tensor | None] = [None] * len(step.wants)
        if r is None:
            return results
        if not all(step.present) or len(step.present) == 1:
            return [r if signal else None for signal in step.signals]
        sizes = [step.operand(0).abs(), step.operand(1).abs()]
        scaled: int = step.operation.math
        sizes[scaled] = sizes[scaled] * abs(step.saved("alpha"))
        whole = sizes[0] + sizes[1]
        unit = divide(r, whole, 0.0)
        step.book("absorbed", torch.where(whole == 0, r, 0.0).sum())
        for position, size in enumerate(sizes):
            share = size * unit
            if step.wants[position]:
                results[position] = share
            else:
                step.book("constants", share.sum())
        return results


def _add(step: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.add(a, b, alpha=step.saved("alpha"))


def _sub(step: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.sub(a, b, alpha=step.saved("alpha"))


def _rsub(step: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.rsub(a, b, alpha=step.saved("alpha"))


# ``math`` is the operand that ``alpha`` multiplies.
register(
    Operation(
        "AddBackward0",
        "addition",
        operands="++",
        replay=_add,
        hides=missing,
        math=1,
        facts=lambda node: bool(node._saved_alpha >= 0),
        sign=lambda adds: "same" if adds else "",
    )
)
register(Operation("SubBackward0", "addition", operands="++", replay=_sub, hides=missing, math=1, softmax=VJP()))
register(Operation("RsubBackward0", "addition", operands="++", replay=_rsub, hides=missing, math=0))
for _name in ("AddBackward1", "SubBackward1", "RsubBackward1"):  # a number is added, and not recorded
    register(Operation(_name, "addition", operands="+", hides=lambda facts, present: True))

"""Softmax and fused scaled-dot-product attention.

AttnLRP (Achtibat et al. 2024) gives softmax its own VJP and shares both matrix products equally. For
O = softmax(Q K^T) V that is the kernel's own backward with its results scaled: Q / 4, K / 4, V / 2. CP-LRP (Ali et
al. 2022) treats the attention weights as coefficients: 0, 0, 1. So the fused kernel's backward is called once and
memory stays linear in the sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.errors import NotDifferentiableError
from dynlrp.rules.operation import (
    OUTPUT,
    Grads,
    Need,
    Operation,
    Rule,
    Step,
    StepShape,
    dot,
    follow,
    inner,
    register,
)
from dynlrp.rules.shape import number


@dataclass(frozen=True)
class Attention(Rule):
    """The kernel's own backward, scaled per operand: m_q = dQ / 4, m_k = dK / 4, m_v = dV / 2 (Achtibat et al. 2024),
    or 0, 0 and dV (Ali et al. 2022).

    ``scores`` is the share of the attention weights in the product with the values (1/2 in AttnLRP, 0 in CP-LRP), and
    ``query`` the share of the queries in the scores. Where only queries or only keys carry the signal, they take the
    whole score.
    """

    families = frozenset({"attention"})

    scores: float = 0.5
    query: float = 0.5

    def operands(self, operation: Operation, gate: int | None) -> str:
        return operation.operands if self.scores else "--" + operation.operands[2:].replace("+", "-")

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        output = grads[0]
        if output is None:
            return [None] * len(step.wants)
        query, key, value = step.signals[:3]
        scores = self.scores if value and (query or key) else float(not value)
        both = query and key
        shares = [
            scores * (self.query if both else 1.0),
            scores * (1 - self.query if both else 1.0),
            1 - scores,
            scores,
        ]
        if not (query or key or value):  # weights alone lie behind it
            shares = [1.0] * 4
        # What goes in is scaled once, for all results that have the smallest share.
        common = min(share for share in shares if share)
        g = output if common == 1 else output * common
        own = step.vjp([g, *grads[1:]])
        own = _twice(step, g, own) if torch.is_grad_enabled() else own
        if query or key or value:
            self._book(step, output, own, scores, common)
        results: list[Tensor | None] = [None] * len(step.wants)
        for position, (m, share) in enumerate(zip(own, shares, strict=False)):
            if m is not None and step.wants[position] and share:
                results[position] = m if share == common else m.mul_(share / common)
        return results

    def _book(self, step: Step, output: Tensor, own: Sequence[Tensor | None], scores: float, common: float) -> None:
        """What softmax does not conserve. The values' own share is sum(m O) and queries and keys have the same,
        sum(m_S S), so one of them tells the scores' share. ``own`` are multipliers times ``common``."""
        if not scores:
            return
        side = 0 if step.signals[0] else 1
        through = own[side]
        if through is None:
            return
        passed = dot(through, step.saved(step.operation.saved[side]))
        bias = own[3] if len(own) > 3 and step.wants[3] else None
        if bias is not None:
            mask = step.saved(step.operation.saved[3])  # infinite where nothing passes
            passed = passed + dot(bias, torch.where(bias == 0, 0.0, mask))
        step.book("offsets", torch.sub(scores * dot(output, step.saved("output")), passed, alpha=scores / common))


BIASES = {
    "ScaledDotProductFlashAttentionForCpuBackward0": "attn_mask",
    "ScaledDotProductCudnnAttentionBackward0": "attn_bias",
    "ScaledDotProductEfficientAttentionBackward0": "attn_bias",
    "ScaledDotProductFusedAttentionOverrideableBackward0": "attn_bias",
}
"""Where kernels keep what they add to the scores."""


def _twice(step: Step, g: Tensor, own: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The kernel's backward, followed by the same in plain operations, as the kernels have no second derivative. All
    attention weights are in memory then. Kernels for sequences of several lengths are left as they are."""
    if not step.name.startswith("ScaledDotProduct"):
        return own
    if step.saved("dropout_p"):
        raise NotDifferentiableError(
            f"relevance cannot be differentiated through the dropout of {step.name}, whose draw the kernel does not "
            f"tell: set the attention's dropout to 0"
        )
    q, k, v = (step.saved(name) for name in ("query", "key", "value"))
    scale = step.saved("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    times = q.shape[1] // k.shape[1]  # queries that share a head of keys
    keys, values = (x.repeat_interleave(times, 1) if times > 1 else x for x in (k, v))
    scores = q @ keys.mT * scale
    if step.saved("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).tril().logical_not(), -torch.inf)
    kept = BIASES.get(step.name)
    bias = None if kept is None else step.saved(kept)
    if bias is not None:
        scores = scores + bias
    p = torch._safe_softmax(scores, -1)
    m_p = g @ values.mT
    m_scores = p * (m_p - (p * m_p).sum(-1, keepdim=True))
    formulas = [m_scores @ keys * scale, m_scores.mT @ q * scale, p.mT @ g]
    if times > 1:
        formulas[1:] = (m.unflatten(1, (-1, times)).sum(2) for m in formulas[1:])
    if bias is not None:
        formulas.append(m_scores.sum_to_size(bias.shape))
    return [None if m is None else follow(m, formulas[position]) for position, m in enumerate(own)]


@dataclass(frozen=True)
class SoftmaxVJP(Rule):
    """Softmax is a Taylor expansion at the input: m_x = p * (m - sum(m p)); its constant term is booked (Achtibat et
    al. 2024).

    Rows of m_x sum to zero, so sum(m_x x) = sum(m_x log p), which needs no input and holds for masked scores too.
    """

    families = frozenset({"softmax"})

    def __call__(self, step: Any, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None or g.dtype is step.node._input_metadata[0].dtype:
            (m,) = step.vjp(grads)
        else:  # wider than the kernel takes
            p = step.saved("result")
            m = p * (g - (g * p).sum(number(step), keepdim=True))
        if m is not None:
            g, passed, p = _elements(grads[0], m, step.saved("result"))
            step.book("offsets", dot(g, p) - (passed * torch.where(p > 0, p, 1.0).log()).sum())
        return [m]


@dataclass(frozen=True)
class LogSoftmaxVJP(Rule):
    """log p = x - log sum exp x is a Taylor expansion at the input: m_x = m - p * sum(m); its constant term is booked
    (as for softmax, Achtibat et al. 2024).

    That is sum(m) times the sum of p log p, so it needs no input either.
    """

    families = frozenset({"log softmax"})

    def __call__(self, step: Any, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None or g.dtype is step.node._input_metadata[0].dtype:
            (m,) = step.vjp(grads)
        else:
            m = g - step.saved("result").exp() * g.sum(number(step), keepdim=True)
        if m is not None:
            g, passed, log = _elements(grads[0], m, step.saved("result"))
            step.book("offsets", dot(g - passed, torch.where(log == -torch.inf, 0.0, log)))
        return [m]


@dataclass(frozen=True)
class Normalised(Rule):
    """The quotient of a softmax that is written out, p = e / sum(e), by its VJP: m_e = (m - sum(m p)) / sum(e). It is
    of ``degree`` 0 in e, so all of m p is an offset, as softmax has it (Achtibat et al. 2024). Where it is written as a
    product p = e r with r = 1 / sum(e), that is of degree 2 and the reciprocal of degree -1."""

    degree: int = 0

    def operands(self, operation: Operation, gate: int | None) -> str:
        return "+"

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        if grads[0] is not None:
            step.book("offsets", (1 - self.degree) * inner(grads[0], step.output()))
        return step.vjp(grads)


@dataclass(frozen=True)
class Exponential(Rule):
    """The exponential of a softmax that is written out, e = exp(x), by its VJP: m_x = m e. What that leaves over,
    m e - m e log e, is an offset, as softmax has it (Achtibat et al. 2024)."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        (m,) = step.vjp(grads)
        if m is not None:
            e = step.saved("result")
            step.book("offsets", m.sum() - dot(m, torch.where(e > 0, e, 1.0).log()))
        return [m]


def _elements(*tensors: Any) -> list[Tensor]:
    """The elements of nested tensors in one row."""
    return [t.values() if t.is_nested else t for t in tensors]


for _name in ("SoftmaxBackward0", "SafeSoftmaxBackward0", "MaskedSoftmaxBackward0"):
    register(Operation(_name, "softmax", rule=SoftmaxVJP(), operands="+", result="result", sign="nonnegative"))
register(Operation("LogSoftmaxBackward0", "log softmax", rule=LogSoftmaxVJP(), operands="+", result="result"))

_factors = {0: "query", 1: "key", 2: "value"}
for _name, _operands in (
    ("ScaledDotProductFlashAttentionForCpuBackward0", _factors),
    ("ScaledDotProductFlashAttentionBackward0", _factors),
    ("ScaledDotProductCudnnAttentionBackward0", _factors),
    ("ScaledDotProductEfficientAttentionBackward0", {**_factors, 3: "attn_bias"}),
    ("ScaledDotProductFusedAttentionOverrideableBackward0", {**_factors, 3: "attn_bias"}),
    ("FlashAttentionBackward0", _factors),
    ("CudnnAttentionBackward0", _factors),
    ("EfficientAttentionBackward0", {**_factors, 3: "bias"}),
):
    register(Operation(_name, "attention", rule=Attention(), operands="***+", saved=_operands, result="output"))

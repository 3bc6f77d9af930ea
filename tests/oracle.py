"""Every rule once more, slow and obvious, in float64 and without a line of the library.

A linear layer becomes a dense matrix by sending unit vectors through its *forward*. A rule is then a table of shares:
how much of the relevance of output j goes to input i, with the bias as one more input (the last row).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from dynlrp import Explanation

settings.register_profile(
    "dynlrp",
    deadline=None,
    max_examples=10,
    derandomize=bool(os.environ.get("CI")),
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("dynlrp")

TOLERANCE = 1e-10
"""Relative to the largest value. Both sides add up to a thousand float64 terms in another order (1e-13) and divide by
sums that cancel, rarely to less than a thousandth of their terms."""

Affine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A layer as ``function(input, weight, bias)``."""


# Linear layers ----------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """``output[j] = sum_i input[i] * weight[i, j] + bias[j]`` with input and output flat, the whole batch at once."""

    weight: Tensor
    bias: Tensor
    linked: Tensor
    """Whether input i reaches output j, also where the weight is zero."""


def matrix(function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """The matrix ``(inputs, outputs)`` of a linear function."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.stack([function(unit.reshape(shape)).flatten() for unit in units])


@torch.no_grad()
def dense(function: Affine, shape: Sequence[int], weight: Tensor, bias: Tensor | None) -> Dense:
    """The dense matrix of a layer for inputs of ``shape``."""
    return Dense(
        matrix(lambda x: function(x, weight, None), shape),
        function(torch.zeros(*shape, dtype=torch.float64), weight, bias).flatten(),
        matrix(lambda x: function(x, torch.ones_like(weight), None), shape) != 0,
    )


class Relative(NamedTuple):
    """An epsilon in units of the root mean square of each of ``rows`` equal parts."""

    epsilon: float
    rows: int


def stabilised(z: Tensor, epsilon: float | Relative) -> Tensor:
    """``z + epsilon * sign(z)`` with ``sign(0) = 1``."""
    sign = 2.0 * (z >= 0).double() - 1.0
    if not isinstance(epsilon, Relative):
        return z + epsilon * sign
    parts = z.flatten().chunk(epsilon.rows)
    scale = torch.cat([torch.full_like(part, epsilon.epsilon * float((part**2).mean()) ** 0.5) for part in parts])
    return z + scale.reshape(z.shape) * sign


def shared(parts: Tensor, r: Tensor, epsilon: float | Relative, z: Tensor | None = None) -> Tensor:
    """``parts[i, j] / stabilise(sum_i parts[i, j]) * r[j]``; where there is no relevance there is none to share, and
    where all of the sums are zero there is no scale to share it by."""
    z = stabilised(parts.sum(0) if z is None else z, epsilon)
    return torch.where((r == 0) | (z == 0), 0.0, parts / z * r)


def _parts(layer: Dense, x: Tensor, bias: bool) -> Tensor:
    """``x[i] * weight[i, j]``, and below it the bias, or zeros where it takes no part."""
    return torch.cat([x[:, None] * layer.weight, layer.bias[None] * bias])


def epsilon(layer: Dense, x: Tensor, r: Tensor, *, epsilon: float | Relative, bias: bool = True) -> Tensor:
    return shared(_parts(layer, x, bias), r, epsilon)


def gamma(
    layer: Dense, x: Tensor, r: Tensor, *, gamma: float, epsilon: float | Relative = 1e-6, bias: bool = True
) -> Tensor:
    """Contributions of the output's own sign count ``1 + gamma`` times."""
    parts = _parts(layer, x, bias)
    z = x @ layer.weight + layer.bias
    own = torch.where(z > 0, parts.clamp(min=0), parts.clamp(max=0))
    return shared(parts + gamma * own, r * (z != 0), epsilon)


def gamma_unsigned(
    layer: Dense, x: Tensor, r: Tensor, *, gamma: float, epsilon: float | Relative = 1e-6, bias: bool = True
) -> Tensor:
    """Positive weights count ``1 + gamma`` times."""
    raised = Dense(
        layer.weight + gamma * layer.weight.clamp(min=0), layer.bias + gamma * layer.bias.clamp(min=0), layer.linked
    )
    return shared(_parts(raised, x, bias), r, epsilon)


def alpha_beta(
    layer: Dense,
    x: Tensor,
    r: Tensor,
    *,
    alpha: float,
    beta: float,
    epsilon: float | Relative = 1e-6,
    bias: bool = True,
) -> Tensor:
    parts = _parts(layer, x, bias)
    return alpha * shared(parts.clamp(min=0), r, epsilon) - beta * shared(parts.clamp(max=0), r, epsilon)


def z_plus(layer: Dense, x: Tensor, r: Tensor, *, epsilon: float | Relative = 1e-6, bias: bool = True) -> Tensor:
    return shared(_parts(layer, x, bias).clamp(min=0), r, epsilon)


def z_box(layer: Dense, x: Tensor, r: Tensor, *, low: Tensor, high: Tensor, epsilon: float | Relative = 1e-6) -> Tensor:
    """``low`` and ``high`` have an entry per input."""
    w = layer.weight
    parts = x[:, None] * w - low[:, None] * w.clamp(min=0) - high[:, None] * w.clamp(max=0)
    return shared(torch.cat([parts, torch.zeros_like(parts[:1])]), r, epsilon)


def w_square(layer: Dense, x: Tensor, r: Tensor, *, epsilon: float | Relative = 1e-6, bias: bool = True) -> Tensor:
    return shared(_parts(layer, torch.ones_like(x), bias).abs() ** 2, r, epsilon)


def flat(
    layer: Dense, x: Tensor, r: Tensor, *, epsilon: float | Relative = 1e-6, bias: bool = False, biased: bool = True
) -> Tensor:
    """``biased``: the layer has a bias at all."""
    linked = layer.linked.double()
    return shared(torch.cat([linked, torch.ones_like(linked[:1]) * (bias and biased)]), r, epsilon)


# Elementwise functions, normalisation, attention ------------------------------------------------------------


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; ``-inf`` gets nothing."""
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


class AttentionParts(NamedTuple):
    """Output and the multipliers of queries, keys and values."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    scores: float = 0.5,
    query: float = 0.5,
) -> AttentionParts:
    """Attention and its relevance step by step, for one matrix product, one softmax and one matrix product.

    ``scores`` is the share of the attention weights in their product with the values, ``query`` that of the queries in
    the scores.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = torch.einsum("...ld,...sd->...ls", q, k) * scale
    p = softmax(s if mask is None else s + mask)
    output = torch.einsum("...ls,...sd->...ld", p, v)
    # product of weights and values
    m_p = scores * torch.einsum("...ld,...sd->...ls", m, v)
    m_v = (1 - scores) * torch.einsum("...ls,...ld->...sd", p, m)
    # softmax: its Jacobian is diag(p) - p p^T
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    m_s = torch.einsum("...lst,...ls->...lt", jacobian, m_p) * scale
    # product of queries and keys
    m_q = query * torch.einsum("...ls,...sd->...ld", m_s, k)
    m_k = (1 - query) * torch.einsum("...ls,...ld->...sd", m_s, q)
    return AttentionParts(output, m_q, m_k, m_v)


# Comparison -------------------------------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(ours: Tensor | None, expected: Tensor, tolerance: float = TOLERANCE, scale: float = 1e-30) -> None:
    """Largest difference relative to the largest expected value, or ``scale``."""
    assert ours is not None
    assert ours.shape == expected.shape
    assert bool(torch.isfinite(ours).all()), "not finite"
    scale = max(scale, float(expected.abs().max()))
    assert float((ours - expected).abs().max()) <= tolerance * scale


def number(ours: float, expected: Tensor | float, tolerance: float = TOLERANCE) -> None:
    """Relative difference of two numbers."""
    theirs = float(expected.detach() if isinstance(expected, Tensor) else expected)
    assert abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-30), (ours, theirs)


def agrees(
    explanation: Explanation,
    relevance: Tensor | Sequence[Tensor],
    accounts: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
    scale: float = 1e-30,
) -> None:
    """Relevance of the inputs and the named accounts are as expected, and the ledger closes.

    Differences are relative to the largest expected relevance, or ``scale``, and for accounts to the output too.
    """
    wanted = [relevance] if isinstance(relevance, Tensor) else list(relevance)
    scale = max([scale, *(float(w.abs().max()) for w in wanted)])
    for ours, expected in zip(explanation.tensors(), wanted, strict=True):
        same(ours, expected, tolerance, scale)
    ledger = explanation.ledger
    scale = max([scale, abs(ledger.output), *(abs(float(amount)) for amount in (accounts or {}).values())])
    for account, amount in (accounts or {}).items():
        assert abs(ledger.accounts[account] - float(amount)) <= tolerance * scale, (account, amount, ledger)
    assert not ledger.unresolved
    assert ledger.error <= tolerance, ledger

"""Attention: fused, written out, and step by step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import Composite, When, explain
from dynlrp.rules import REGISTRY, Attention, Hold
from tests import oracle
from tests.oracle import agrees, draw, number, same, softmax

SEEDS = st.integers(0, 2**32 - 1)
BATCH, HEADS, LENGTH, KEYS, WIDTH = 2, 4, 5, 6, 3
SHARES = {"attnlrp": 0.5, "cplrp": 0.0}
"""What of the product with the values goes to the attention weights."""


def written(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, *, flat: bool = False
) -> Tensor:
    """Attention in separate operations; ``flat`` uses ``bmm``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if flat:
        q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None and flat:
        mask = mask.expand(BATCH, HEADS, *scores.shape[-2:]).reshape(scores.shape)
    scores = scores if mask is None else scores + mask
    out = torch.softmax(scores, -1) @ v
    return out.reshape(BATCH, HEADS, *out.shape[-2:]) if flat else out


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


WAYS: dict[str, Callable[..., Tensor]] = {
    "fused": fused,
    "written": written,
    "bmm": lambda *a, **k: written(*a, **k, flat=True),
    "scaled queries": lambda q, k, v, mask=None, scale=None: written(
        q * (WIDTH**-0.5 if scale is None else scale), k, v, mask, 1.0
    ),
    "scaled both": lambda q, k, v, mask=None, scale=None: written(
        q * math.sqrt(WIDTH**-0.5 if scale is None else scale),
        k * math.sqrt(WIDTH**-0.5 if scale is None else scale),
        v,
        mask,
        1.0,
    ),
}


def masks(seed: int) -> dict[str, Tensor | None]:
    """Boolean masks mean: True takes part. Every query sees at least the first key."""
    keep = draw(seed, BATCH, 1, LENGTH, KEYS) > 0
    keep[..., 0] = True
    shut = torch.zeros(BATCH, 1, LENGTH, KEYS).double().masked_fill(~keep, -math.inf)
    return {
        "none": None,
        "causal": torch.ones(LENGTH, KEYS, dtype=torch.bool).tril(),
        "bool": keep,
        "float": draw(seed + 1, 1, 1, LENGTH, KEYS),
        "-inf": shut,
        "float and -inf": shut + draw(seed + 1, BATCH, HEADS, LENGTH, KEYS),
        "padding": shut[..., :1, :],
    }


MASKS = list(masks(0))


def added(mask: Tensor | None) -> Tensor | None:
    """A mask as a summand of the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


def tensors(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the multiplier of the output."""
    shapes = (LENGTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (LENGTH, WIDTH)
    q, k, v, m = (draw(seed + i, BATCH, HEADS, *shape) for i, shape in enumerate(shapes))
    return q, k, v, m


def match(ours: Tensor | None, theirs: Tensor, scale: float = 1e-30) -> None:
    """Equal, or nothing where nothing is expected."""
    assert ours is not None or not theirs.any()
    same(torch.zeros_like(theirs) if ours is None else ours, theirs, scale=scale)


@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
@given(seed=SEEDS, scale=st.sampled_from([None, 0.7]))
@oracle.settings(max_examples=4)
def test_attention(way: str, mask: str, composite: str, seed: int, scale: float | None) -> None:
    """Queries and keys get a quarter of their gradient and values half; in CP-LRP values get all."""
    q, k, v, m = tensors(seed)
    bias = masks(seed + 4)[mask]
    expected = oracle.attention(q, k, v, m, mask=added(bias), scale=scale, scores=SHARES[composite])
    given_mask = bias if way == "fused" else added(bias)
    explanation = explain(
        lambda q, k, v: WAYS[way](q, k, v, given_mask, scale), (q, k, v), lambda y: (y * m).sum(), composite=composite
    )
    number(explanation.ledger.output, (expected.output * m).sum())
    wanted = [q * expected.query, k * expected.key, v * expected.value]
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        match(ours, theirs, float(max(w.abs().max() for w in wanted)))
    ledger = explanation.ledger
    rest = ledger.output - float(sum(w.sum() for w in wanted))
    if composite == "cplrp":  # the weights are coefficients: all relevance is with the values
        assert abs(rest) <= 1e-10 * abs(ledger.output)
    # A mask that was added in an operation of its own is a constant; the kernel has it among the offsets.
    offsets = ledger.accounts["offsets"] + ledger.accounts["constants"]
    if ledger.unresolved:
        assert {name for name, _ in ledger.unresolved} == {"AddBackward0"}
        assert math.isfinite(offsets)
    else:
        assert abs(offsets - rest) <= 1e-10 * max(abs(rest), abs(ledger.output))
        assert ledger.closes, ledger


@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("way", ["fused", "written"])
def test_the_causal_flag(way: str, composite: str) -> None:
    q, k, v, m = (draw(i, BATCH, HEADS, LENGTH, WIDTH) for i in range(4))
    mask = added(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    assert mask is not None
    expected = oracle.attention(q, k, v, m, mask=mask, scores=SHARES[composite])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if way == "fused":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        return torch.softmax(scores.masked_fill(mask < 0, -math.inf), -1) @ v

    explanation = explain(attend, (q, k, v), lambda y: (y * m).sum(), composite=composite)
    for ours, theirs in zip(
        explanation.relevance, (q * expected.query, k * expected.key, v * expected.value), strict=True
    ):
        match(ours, theirs)


@given(seed=SEEDS, query=st.sampled_from([0, 0.25, 0.5, 1]), scores=st.sampled_from([0.1, 0.5, 0.8, 1]))
def test_other_shares(seed: int, query: float, scores: float) -> None:
    q, k, v, m = tensors(seed)
    expected = oracle.attention(q, k, v, m, scores=scores, query=query)
    composite = Composite.of("shares", {"attention": Attention(scores, query)})
    explanation = explain(fused, (q, k, v), lambda y: (y * m).sum(), composite=composite)
    wanted = [q * expected.query, k * expected.key, v * expected.value]
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        match(ours, theirs, 1.0)
    assert explanation.ledger.closes


@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("way", ["fused", "written"])
@given(seed=SEEDS)
@oracle.settings(max_examples=8)
def test_self_attention_of_one_signal(way: str, composite: str, seed: int) -> None:
    """Queries, keys and values are linear in the same x, so that their relevance adds up."""
    x, m = draw(seed, BATCH, HEADS, LENGTH, WIDTH), draw(seed + 1, BATCH, HEADS, LENGTH, WIDTH)
    weights = [draw(seed + 2 + i, WIDTH, WIDTH) for i in range(3)]
    parts = oracle.attention(*(x @ w for w in weights), m, scores=SHARES[composite])
    multiplier = sum(p @ w.t() for p, w in zip(parts[1:], weights, strict=True))
    explanation = explain(
        lambda x: WAYS[way](*(x @ w for w in weights)), x, lambda y: (y * m).sum(), composite=composite
    )
    agrees(explanation, x * multiplier, {"parameters": 0.0})


@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("way", ["fused", "written"])
@pytest.mark.parametrize("causal", [False, True])
@given(seed=SEEDS)
@oracle.settings(max_examples=6)
def test_grouped_queries(way: str, composite: str, causal: bool, seed: int) -> None:
    """Two heads share keys and values; their relevance is the sum over the heads."""
    q, m = draw(seed, BATCH, HEADS, LENGTH, WIDTH), draw(seed + 1, BATCH, HEADS, LENGTH, WIDTH)
    k, v = (draw(seed + i, BATCH, HEADS // 2, LENGTH, WIDTH) for i in (2, 3))
    mask = added(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()) if causal else None
    parts = oracle.attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), m, mask=mask, scores=SHARES[composite]
    )
    key, value = (p.reshape(BATCH, HEADS // 2, 2, LENGTH, WIDTH).sum(2) for p in (parts.key, parts.value))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if way == "fused":
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        return torch.softmax(scores if mask is None else scores.masked_fill(mask < 0, -math.inf), -1) @ v

    explanation = explain(attend, (q, k, v), lambda y: (y * m).sum(), composite=composite)
    for ours, theirs in zip(explanation.relevance, (q * parts.query, k * key, v * value), strict=True):
        match(ours, theirs)


# Only some of the operands carry the signal -----------------------------------------------------------------

PARTS = [("v",), ("q",), ("k",), ("q", "k"), ("q", "v"), ("k", "v")]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("signals", PARTS, ids="".join)
@pytest.mark.parametrize("way", ["fused", "written"])
def test_the_other_operands_are_parameters(way: str, signals: tuple[str, ...], composite: str, frozen: bool) -> None:
    """Learned queries, say. A factor without signal is a coefficient, and its partner takes the whole."""
    q, k, v, m = tensors(0)
    given_ = dict(zip("qkv", (q, k, v), strict=True))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in given_.keys() - set(signals):
                self.register_parameter(name, nn.Parameter(given_[name], not frozen))

        def forward(self, **inputs: Tensor) -> Tensor:
            return WAYS[way](*(inputs[n] if n in inputs else getattr(self, n) * 1.0 for n in "qkv"))

    scored = "q" in signals or "k" in signals
    scores = (SHARES[composite] if "v" in signals else 1.0) if scored else 0.0
    query = 0.5 if "q" in signals and "k" in signals else float("q" in signals)
    inputs = {name: given_[name] for name in signals}
    if composite == "cplrp" and "v" not in signals:
        return  # nothing passes: another test
    parts = oracle.attention(q, k, v, m, scores=scores, query=query)
    explanation = explain(Net(), inputs, lambda y: (y * m).sum(), composite=composite)
    for name, part in zip("qkv", parts[1:], strict=True):
        if name in signals:
            ours, theirs = explanation.relevance[name], given_[name] * part
            match(ours, theirs)
    assert explanation.ledger.closes


@pytest.mark.parametrize("way", ["fused", "written"])
def test_constants_may_take_part(way: str) -> None:
    """Queries and keys that autograd does not know of: values take all."""
    q, k, v, m = tensors(0)
    expected = oracle.attention(q, k, v, m, scores=0.0)
    explanation = explain(lambda v: WAYS[way](q, k, v), v, lambda y: (y * m).sum())
    agrees(explanation, v * expected.value, {"offsets": 0.0})


@pytest.mark.parametrize("way", ["fused", "written", "bmm"])
def test_fused_and_written_agree_on_the_whole_ledger(way: str) -> None:
    q, k, v, m = tensors(3)
    found = explain(WAYS[way], (q, k, v), lambda y: (y * m).sum())
    parts = oracle.attention(q, k, v, m)
    wanted = [t * p for t, p in zip((q, k, v), parts[1:], strict=True)]
    rest = found.ledger.output - sum(w.sum() for w in wanted)
    agrees(found, wanted, {"offsets": rest, "constants": 0.0, "held back": 0.0, "absorbed": 0.0})


@pytest.mark.parametrize("learned", [False, True])
def test_a_learned_mask(learned: bool) -> None:
    """Relative positions: a parameter that is added to the scores has relevance of its own."""
    q, k, v, m = tensors(0)
    mask = draw(9, 1, HEADS, LENGTH, KEYS)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(mask, learned)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return written(q, k, v, self.mask)

    parts = oracle.attention(q, k, v, m, mask=mask)
    weights = softmax(q @ k.transpose(-1, -2) * WIDTH**-0.5 + mask)
    passed = 0.5 * m @ v.transpose(-1, -2)
    share = weights * (passed - (passed * weights).sum(-1, keepdim=True))
    explanation = explain(Net(), (q, k, v), lambda y: (y * m).sum())
    wanted = [t * p for t, p in zip((q, k, v), parts[1:], strict=True)]
    agrees(explanation, wanted, {"parameters": (share * mask).sum()})


@pytest.mark.parametrize("mask", ["learned", "three dimensions"])
def test_the_kernel_that_is_not_fused(mask: str) -> None:
    """Where PyTorch cannot use a fused kernel it writes attention out itself, with operations of its own."""
    q, k, v, m = tensors(0)
    if mask == "learned":
        bias = nn.Parameter(draw(9, HEADS, LENGTH, KEYS))
        parts = oracle.attention(q, k, v, m, mask=bias.detach())
        explanation = explain(lambda q, k, v: fused(q, k, v, bias), (q, k, v), lambda y: (y * m).sum())
    else:
        q, k, v, m = q[:, 0], k[:, 0], v[:, 0], m[:, 0]
        parts = oracle.attention(q, k, v, m)
        explanation = explain(fused, (q, k, v), lambda y: (y * m).sum())
    for ours, theirs in zip(explanation.relevance, (q * parts.query, k * parts.key, v * parts.value), strict=True):
        same(ours, theirs)
    assert explanation.ledger.closes


# Softmax ----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, masked=st.booleans(), dim=st.sampled_from([0, 1, -1]))
def test_softmax_by_its_jacobian(seed: int, masked: bool, dim: int) -> None:
    """m_i = sum_j m_j p_j (delta_ij - p_i), one entry at a time."""
    x, m = draw(seed, 4, 4), draw(seed + 1, 4, 4)
    rows, seeds = (x.t(), m.t()) if dim == 0 else (x, m)
    p = softmax(rows)
    expected = torch.zeros_like(rows)
    for row in range(4):
        for i in range(4):
            for j in range(4):
                expected[row, i] += rows[row, i] * seeds[row, j] * p[row, j] * (float(i == j) - p[row, i])
    expected = expected.t() if dim == 0 else expected
    explanation = explain(lambda x: torch.softmax(x, dim), x, lambda y: (y * m).sum())
    agrees(explanation, expected, {"offsets": (p * seeds).sum() - expected.sum()})


def test_softmax_under_hold_passes_nothing() -> None:
    x = draw(0, 3, 4)
    composite = Composite.of("held", {"softmax": Hold()})
    explanation = explain(lambda x: torch.softmax(x, -1) * 2 + x, x, torch.sum, composite=composite)
    agrees(explanation, x, {"held back": 6.0})


def test_softmax_of_masked_rows_is_finite() -> None:
    """A row whose weights underflow to zero, and -inf."""
    x = torch.tensor([[0.0, 1000.0, -1000.0, -math.inf]]).double()
    explanation = explain(lambda x: torch.softmax(x.masked_fill(torch.isinf(x), -math.inf), -1), x[:, :3], torch.sum)
    assert explanation.finite()
    assert all(math.isfinite(amount) for amount in explanation.ledger.accounts.values())


def test_no_softmax_or_kernel_is_forgotten() -> None:
    """Other kernels need a GPU; their nodes save what the one for CPUs does."""
    kernels = {name for name, operation in REGISTRY.items() if operation.family == "attention"}
    assert kernels == {
        f"ScaledDotProduct{kind}Backward0"
        for kind in (
            "FlashAttentionForCpu", "FlashAttention", "CudnnAttention", "EfficientAttention",
            "FusedAttentionOverrideable",
        )
    }  # fmt: skip
    assert {n for n, o in REGISTRY.items() if o.family == "softmax"} == {"SoftmaxBackward0", "SafeSoftmaxBackward0"}


def test_safe_softmax() -> None:
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    plain = explain(lambda x: torch.softmax(x, -1), x, lambda y: (y * m).sum())
    safe = explain(lambda x: torch.ops.aten._safe_softmax(x, -1), x, lambda y: (y * m).sum())
    agrees(safe, plain.relevance, plain.ledger.accounts)


def test_a_quotient_of_exponentials_is_not_softmax() -> None:
    """Written with exp and a sum, the sum is a coefficient and exp its secant: finite, and in the ledger."""
    x, mask = draw(0, 3, 4), torch.zeros(3, 4).double()
    mask[0, 2] = -math.inf

    def written_out(x: Tensor) -> Tensor:
        scores = x + mask
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    explanation = explain(written_out, x, torch.sum)
    assert explanation.finite()
    assert math.isfinite(explanation.ledger.residual)


def test_only_the_softmax_of_attention_is_held_in_cplrp() -> None:
    """The role comes from the product with values, so that a softmax that ends a network keeps its rule."""
    x = draw(0, 3, 4)
    composite = Composite.of("roles", {When("softmax", role="attention"): Hold()})
    plain = explain(lambda x: torch.softmax(x, -1), x, 0)
    same(explain(lambda x: torch.softmax(x, -1), x, 0, composite=composite).relevance, plain.relevance)
    assert float(plain.relevance.abs().sum()) > 0

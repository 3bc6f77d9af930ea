"""Attention: fused, written out, and step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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


# Masks that shut whole rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("kind", ["bool", "-inf", "three dimensions"])
def test_a_query_that_sees_nothing(kind: str, composite: str) -> None:
    """Its output is zero in the fused kernel and in the one that PyTorch writes out, and nobody gets anything."""
    q, k, v, m = tensors(0)
    keep = torch.ones(LENGTH, KEYS, dtype=torch.bool)
    keep[1], keep[2, :3] = False, False
    if kind == "three dimensions":
        q, k, v, m = q[:, 0], k[:, 0], v[:, 0], m[:, 0]
    sees = keep.any(-1, keepdim=True)
    parts = oracle.attention(q, k, v, m * sees, mask=torch.where(sees, added(keep), 0.0), scores=SHARES[composite])
    mask = added(keep) if kind == "-inf" else keep
    explanation = explain(lambda q, k, v: fused(q, k, v, mask), (q, k, v), lambda y: (y * m).sum(), composite=composite)
    for ours, theirs in zip(explanation.relevance, (q * parts.query, k * parts.key, v * parts.value), strict=True):
        match(ours, theirs)
    assert explanation.ledger.closes


# Relative positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fused", "written", "bmm"])
@pytest.mark.parametrize("frozen", [False, True])
def test_relative_positions(way: str, frozen: bool) -> None:
    """T5 (Raffel et al. 2020, section 2.1) looks a bias up by distance; it is the table's relevance, a parameter's."""
    q, k, v, m = tensors(0)
    near = (torch.arange(KEYS)[None] - torch.arange(LENGTH)[:, None]).clamp(-2, 2) + 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, HEADS).double()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return WAYS[way](q, k, v, self.table(near).permute(2, 0, 1)[None])

    net = Net().requires_grad_(not frozen)
    bias = net.table.weight.detach()[near].permute(2, 0, 1)[None]
    parts = oracle.attention(q, k, v, m, mask=bias)
    weights = softmax(q @ k.transpose(-1, -2) * WIDTH**-0.5 + bias)
    passed = 0.5 * m @ v.transpose(-1, -2)
    share = weights * (passed - (passed * weights).sum(-1, keepdim=True)) * bias
    explanation = explain(net, (q, k, v), lambda y: (y * m).sum())
    wanted = [t * p for t, p in zip((q, k, v), parts[1:], strict=True)]
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        same(ours, theirs)
    assert explanation.ledger.closes
    if not frozen:
        number(explanation.ledger.accounts["parameters"], share.sum())
        found = explain(net, (q, k, v), lambda y: (y * m).sum(), parameters="*").parameters["table.weight"]
        rows = torch.zeros(5, HEADS).double().index_add_(0, near.flatten(), share.sum(0).permute(1, 2, 0).flatten(0, 1))
        same(found, rows)


# Modules ----------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """The output of a module that returns weights too."""

    def __init__(self, attention: nn.MultiheadAttention, **settings: Any) -> None:
        super().__init__()
        self.attention, self.settings = attention, settings

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k = q if k is None else k
        output: Tensor = self.attention(q, k, k if v is None else v, **self.settings)[0]
        return output


def _module(**settings: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(6, 2, batch_first=True, **settings).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(20 + i, *parameter.shape))
    return module


def _by_heads(module: nn.MultiheadAttention, mask: Tensor | None, m: Tensor, scores: float, *x: Tensor) -> list[Tensor]:
    """Relevance of query, key and value for the multiplier ``m``: one linear layer each, attention, one more."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.detach().chunk(3)
    else:
        weights = tuple(getattr(module, name + "_proj_weight").detach() for name in "qkv")
    biases = torch.zeros(18).double() if module.in_proj_bias is None else module.in_proj_bias.detach()
    split = lambda t: t.unflatten(-1, (2, 3)).transpose(1, 2)  # noqa: E731
    qkv = [split(t @ w.t() + b) for t, w, b in zip(x, weights, biases.chunk(3), strict=True)]
    parts = oracle.attention(*qkv, split(m @ module.out_proj.weight.detach()), mask=mask, scores=scores)
    return [t * (p.transpose(1, 2).flatten(2) @ w) for t, p, w in zip(x, parts[1:], weights, strict=True)]


@pytest.mark.parametrize("composite", SHARES)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "float", "padding"])
@pytest.mark.parametrize("signals", ["self", "cross", "all"])
def test_the_module(signals: str, mask: str, weights: bool, composite: str) -> None:
    """With or without its weights asked for, which takes another path through PyTorch."""
    module, length, keys = _module(), 4, 4 if signals == "self" else 5
    if signals == "all":
        module = nn.MultiheadAttention(6, 2, batch_first=True, kdim=5, vdim=4, bias=False).double()
    x = [draw(0, 2, length, 6), draw(1, 2, keys, module.kdim), draw(2, 2, keys, module.vdim)]
    m, settings, bias = draw(3, 2, length, 6), {"need_weights": weights}, None
    if mask == "padding":
        shut = torch.arange(keys)[None] >= torch.tensor([[3], [keys]])
        settings["key_padding_mask"], bias = shut, added(~shut)[:, None, None]
    elif mask != "none":
        shut = torch.ones(length, keys, dtype=torch.bool).triu(1)
        bias = added(~shut) if mask == "causal" else draw(4, length, keys)
        settings["attn_mask"] = shut if mask == "causal" else bias
    inputs = x[: {"self": 1, "cross": 2, "all": 3}[signals]]
    parts = _by_heads(module, bias, m, SHARES[composite], *inputs, *inputs[-1:] * (3 - len(inputs)))
    wanted = parts[: len(inputs)]
    for more in parts[len(inputs) :]:
        wanted[-1] = wanted[-1] + more
    explanation = explain(Heads(module, **settings), tuple(inputs), lambda y: (y * m).sum(), composite=composite)
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        match(ours, theirs)
    assert explanation.ledger.closes


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_that_are_parameters(settings: dict[str, bool]) -> None:
    """One more key and value that everybody sees; with relevance of their own, or zero."""
    module, x, m = _module(**settings), draw(0, 2, 4, 6), draw(1, 2, 4, 6)
    split = lambda t: t.unflatten(-1, (2, 3)).transpose(1, 2)  # noqa: E731
    weights, biases = module.in_proj_weight.detach().chunk(3), module.in_proj_bias.detach().chunk(3)
    q, k, v = (x @ w.t() + b for w, b in zip(weights, biases, strict=True))
    more = [torch.zeros(2, 1, 6).double()] * 2
    if module.bias_k is not None:
        more = [b.detach().expand(2, 1, 6) for b in (module.bias_k, module.bias_v)]
    k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
    parts = oracle.attention(split(q), split(k), split(v), split(m @ module.out_proj.weight.detach()))
    wanted = sum(x * (p.transpose(1, 2).flatten(2)[:, :4] @ w) for p, w in zip(parts[1:], weights, strict=True))
    for need_weights in (False, True):
        explanation = explain(Heads(module, need_weights=need_weights), x, lambda y: (y * m).sum())
        same(explanation.relevance, wanted)
        assert explanation.ledger.closes


@pytest.mark.parametrize("first", [False, True])
def test_an_encoder_layer(first: bool) -> None:
    """In eval mode PyTorch has a fast path, which no graph can be recorded of: the slow one is explained."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, norm_first=first, batch_first=True).double().eval()
    x = draw(0, 2, 4, 6)

    def written(x: Tensor) -> Tensor:
        attend = lambda x: Heads(layer.self_attn, need_weights=True)(x)  # noqa: E731
        feed = lambda x: layer.linear2(torch.relu(layer.linear1(x)))  # noqa: E731
        if first:
            x = x + attend(layer.norm1(x))
            return x + feed(layer.norm2(x))
        x = layer.norm1(x + attend(x))
        return layer.norm2(x + feed(x))

    m = draw(1, 2, 4, 6)
    ours, theirs = (explain(f, x, lambda y: (y * m).sum()) for f in (layer, written))
    agrees(ours, theirs.relevance)


# Other kinds of attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fused", "broadcast", "einsum"])
@pytest.mark.parametrize("composite", SHARES)
def test_multi_query_attention(way: str, composite: str) -> None:
    """All heads share one key and value (Shazeer 2019)."""
    q, _, _, m = tensors(0)
    k, v = draw(1, BATCH, 1, KEYS, WIDTH), draw(2, BATCH, 1, KEYS, WIDTH)
    parts = oracle.attention(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1), m, scores=SHARES[composite])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if way == "fused":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if way == "broadcast":
            return torch.softmax(q @ k.mT * WIDTH**-0.5, -1) @ v
        scores = torch.einsum("bhld,bsd->bhls", q, k[:, 0]) * WIDTH**-0.5
        return torch.einsum("bhls,bsd->bhld", torch.softmax(scores, -1), v[:, 0])

    explanation = explain(attend, (q, k, v), lambda y: (y * m).sum(), composite=composite)
    wanted = (q * parts.query, k * parts.key.sum(1, keepdim=True), v * parts.value.sum(1, keepdim=True))
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        match(ours, theirs)
    assert explanation.ledger.closes


@pytest.mark.parametrize("way", ["matmul", "einsum"])
def test_linear_attention(way: str) -> None:
    """Katharopoulos et al. 2020, eq. 7: phi(q) (sum phi(k) v) / phi(q) (sum phi(k)) with phi = elu + 1.

    Two products with equal shares each, over a constant; the secant of elu, whose one is a constant.
    """
    q, k, v, m = tensors(0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if way == "einsum":
            state = torch.einsum("bhsd,bhse->bhde", k, v)
            return torch.einsum("bhld,bhde->bhle", q, state) / torch.einsum("bhld,bhd->bhl", q, k.sum(2)).unsqueeze(-1)
        return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)

    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    m_n = m / (phi_q @ phi_k.sum(2).unsqueeze(-1))
    m_phi_q = 0.5 * m_n @ (phi_k.mT @ v).mT
    m_state = 0.5 * phi_q.mT @ m_n
    m_phi_k, m_v = 0.5 * v @ m_state.mT, 0.5 * phi_k @ m_state
    wanted = [F.elu(q) * m_phi_q, F.elu(k) * m_phi_k, v * m_v]
    constants = m_phi_q.sum() + m_phi_k.sum()
    agrees(explain(attend, (q, k, v), lambda y: (y * m).sum()), wanted, {"constants": constants, "offsets": 0.0})


@pytest.mark.parametrize("composite", SHARES)
def test_cosine_attention(composite: str) -> None:
    """Swin v2 (Liu et al. 2022, eq. 2): norms of queries and keys are coefficients, and so is the learned scale."""
    q, k, v, m = tensors(0)
    scale = nn.Parameter(draw(9, HEADS, 1, 1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale.clamp(max=4.6).exp()
        return torch.softmax(scores, -1) @ v

    lengths = [t.norm(dim=-1, keepdim=True) for t in (q, k)]
    factor = scale.detach().exp()
    parts = oracle.attention(q / lengths[0] * factor, k / lengths[1], v, m, scale=1.0, scores=SHARES[composite])
    wanted = [q * parts.query * factor / lengths[0], k * parts.key / lengths[1], v * parts.value]
    explanation = explain(attend, (q, k, v), lambda y: (y * m).sum(), composite=composite)
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        match(ours, theirs)
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


def _fields(name: str) -> set[str]:
    """What nodes of this name save, as their class tells."""
    return {field[7:] for field in dir(getattr(torch._C._functions, name)) if field.startswith("_saved_")}


def test_no_softmax_or_kernel_is_forgotten() -> None:
    """Other kernels need a GPU; their nodes save what the one for CPUs does."""
    known = {name for name in dir(torch._C._functions) if not name.endswith(("BackwardBackward0", "DataBackward0"))}
    kernels = {name for name in known if "Attention" in name}
    assert kernels == {name for name, operation in REGISTRY.items() if operation.family == "attention"}
    for name in kernels:
        assert {*REGISTRY[name].saved.values(), REGISTRY[name].result} <= _fields(name)
        added = {"bias", "attn_bias"} & set(REGISTRY[name].saved.values())
        assert bool(added) == ("Efficient" in name or "Overrideable" in name)
    for name in known:
        if "Softmax" in name and "Sparse" not in name:
            assert REGISTRY[name].family == ("log softmax" if "Log" in name else "softmax")
            assert REGISTRY[name].result in _fields(name)


def test_safe_softmax() -> None:
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    plain = explain(lambda x: torch.softmax(x, -1), x, lambda y: (y * m).sum())
    safe = explain(lambda x: torch.ops.aten._safe_softmax(x, -1), x, lambda y: (y * m).sum())
    agrees(safe, plain.relevance, plain.ledger.accounts)


@pytest.mark.parametrize("dim", [1, -1])
def test_masked_softmax(dim: int) -> None:
    """A kernel of its own for what is shut; True means shut."""
    x, m, shut = draw(0, 2, 3, 4), draw(1, 2, 3, 4), draw(2, 2, 3, 4) > 0.3
    shut[:, 0], shut[..., 0] = False, False
    ours = explain(lambda x: torch._masked_softmax(x, shut, dim, 2), x, lambda y: (y * m).sum())
    p = softmax(x.masked_fill(shut, -math.inf).movedim(dim, -1)).movedim(-1, dim)
    expected = p * (m - (m * p).sum(dim, keepdim=True)) * x
    agrees(ours, expected, {"offsets": (m * p).sum() - expected.sum()})
    theirs = explain(lambda x: torch.softmax(x.masked_fill(shut, -math.inf), dim), x, lambda y: (y * m).sum())
    same(theirs.relevance, ours.relevance)


@given(seed=SEEDS, dim=st.sampled_from([0, 1, -1]))
def test_log_softmax(seed: int, dim: int) -> None:
    """For log p_j = x_j - log sum exp x it is m_i = sum_j m_j (delta_ij - p_i), and what that leaves is an offset."""
    x, m = draw(seed, 4, 4), draw(seed + 1, 4, 4)
    rows, seeds = (x.t(), m.t()) if dim == 0 else (x, m)
    p = softmax(rows)
    expected = torch.zeros_like(rows)
    for row in range(4):
        for i in range(4):
            for j in range(4):
                expected[row, i] += rows[row, i] * seeds[row, j] * (float(i == j) - p[row, i])
    explanation = explain(lambda x: torch.log_softmax(x, dim), x, lambda y: (y * m).sum())
    entropy = -(p * p.log()).sum(1)
    accounts = {"offsets": -(entropy * seeds.sum(1)).sum()}
    agrees(explanation, expected.t() if dim == 0 else expected, accounts)


def test_log_softmax_of_masked_logits() -> None:
    """What is shut has no probability; a target among the rest gives numbers."""
    x, shut = draw(0, 3, 4), torch.tensor([[False, True, False, False]])

    def model(x: Tensor) -> Tensor:
        return F.log_softmax(x.masked_fill(shut, -math.inf), -1)

    explanation = explain(model, x, 2)
    p = softmax(x.masked_fill(shut, -math.inf))
    same(explanation.relevance, x * (torch.eye(4).double()[2] - p))
    assert explanation.finite()


def test_logits_and_their_log_softmax_differ_by_what_every_class_gets() -> None:
    """Behind a classifier: the target's relevance less the expected one."""
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double(), draw(0, 2, 5)
    ours = explain(nn.Sequential(model, nn.LogSoftmax(1)), x, 1)
    p = softmax(model(x).detach())
    logits = [explain(model, x, i).relevance for i in range(3)]
    agrees(ours, logits[1] - sum(p[:, i : i + 1] * logits[i] for i in range(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_half_precision(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = (draw(0, 3, 8) * 1000).to(dtype)
    explanation = explain(lambda x: function(x, -1)[:, 0], x, torch.sum)
    assert explanation.finite()
    assert all(math.isfinite(amount) for amount in explanation.ledger.accounts.values())


def test_softmax_of_sequences_of_different_length() -> None:
    """Nested tensors, over the dimension that all have."""
    x, m = draw(0, 5, 4), draw(1, 5, 4)
    ends = torch.tensor([0, 2, 5])
    nested = lambda x: torch.nested.nested_tensor_from_jagged(x, ends).softmax(-1).values()  # noqa: E731
    plain = explain(lambda x: torch.softmax(x, -1), x, lambda y: (y * m).sum())
    agrees(explain(nested, x, lambda y: (y * m).sum()), plain.relevance, {"offsets": plain.ledger.accounts["offsets"]})


def _plain_quotient(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def _shifted(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _detached(x: Tensor) -> Tensor:
    e = torch.exp(x - x.detach().max(-1, keepdim=True).values)
    return e / e.sum(-1)[:, None]


def _masked(x: Tensor) -> Tensor:
    e = torch.exp(x) * (torch.arange(x.shape[-1]) < 3)
    return (e.unsqueeze(0) / e.sum(-1, keepdim=True).expand_as(e))[0]


def _twice(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.sum(torch.exp(x), -1, keepdim=True)


def _reciprocal(x: Tensor) -> Tensor:
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e * e.sum(-1, keepdim=True).reciprocal()


def _one_over(x: Tensor) -> Tensor:
    e = x.exp()
    return (1 / e.sum(-1, keepdim=True)) * e


def _less_logsumexp(x: Tensor) -> Tensor:
    return torch.exp(x - x.logsumexp(-1, keepdim=True))


SOFTMAXES = {
    "twice": _twice,
    "plain": _plain_quotient,
    "shifted": _shifted,
    "detached": _detached,
    "masked": _masked,
    "reciprocal": _reciprocal,
    "one over": _one_over,
    "less logsumexp": _less_logsumexp,
    "exp of log_softmax": lambda x: torch.log_softmax(x, -1).exp(),
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("composite", [*SHARES, "gradient_x_input"])
@pytest.mark.parametrize("way", SOFTMAXES)
def test_softmax_written_out(way: str, composite: str, mask: bool) -> None:
    """By exponentials and their sum it is explained as softmax, alone and as the weights of attention."""
    hidden = torch.tensor([[0.0, 0.0, 0.0, -math.inf], [0.0, 0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf, -math.inf]])
    x, v, m = draw(0, 3, 4), draw(1, 4, 2), draw(2, 3, 2)
    bias = hidden.double() if mask or way == "masked" else torch.zeros(3, 4).double()

    def weights(softmax: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return softmax(x + bias)

    for model, inputs in (
        (lambda softmax: lambda x: weights(softmax, x) @ v, (x,)),
        (lambda softmax: lambda x, v: weights(softmax, x) @ v, (x, v)),
        (lambda softmax: lambda x, v: weights(softmax, x @ v), (draw(3, 3, 5), draw(4, 5, 4))),
    ):
        g = m if model(torch.sigmoid)(*inputs).shape == m.shape else draw(5, 3, 4)
        found, expected = (
            explain(model(softmax), inputs, lambda y, g=g: (y * g).sum(-1), composite=composite)
            for softmax in (SOFTMAXES[way], lambda x: torch.softmax(x, -1))
        )
        agrees(found, [r for r in expected.relevance if r is not None], expected.ledger.accounts)


def test_a_softmax_with_a_constant_below() -> None:
    """A quotient by the sum and a constant: multipliers are those of its derivative, and the ledger closes."""
    x, m = draw(0, 3, 4), draw(1, 3, 4)

    def softmax(x: Tensor) -> Tensor:
        e = x.exp()
        return e / (e.sum(-1, keepdim=True) + 0.5)

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((softmax(leaf) * m).sum(), leaf)
    agrees(explain(softmax, x, lambda y: (y * m).sum(-1)), x * gradient)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.exp() / x.tanh().exp().sum(-1, keepdim=True),
        lambda x: x.exp() / x.sum(-1, keepdim=True),
        lambda x: x.exp() / x.exp().prod(-1, keepdim=True),
        lambda x: x.cosh() / x.cosh().sum(-1, keepdim=True),
    ],
    ids=["another exponential", "another sum", "a product", "another function"],
)
def test_other_quotients_are_no_softmax(other: Callable[[Tensor], Tensor]) -> None:
    """What divides is a coefficient."""
    x, m = draw(0, 3, 4).abs(), draw(1, 3, 4)
    ledger = explain(other, x, lambda y: (y * m).sum(-1)).ledger
    assert ("offsets", "DivBackward0") not in ledger.by_operation()
    assert ledger.closes


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.cosh() * x.cosh().sum(-1, keepdim=True).reciprocal(),
        lambda x: x.exp() * x.exp().sum(-1, keepdim=True),
        lambda x: torch.exp(x - (2 * x).logsumexp(-1, keepdim=True)),
        lambda x: torch.exp(x + x.logsumexp(-1, keepdim=True)),
        lambda x: torch.exp(x.logsumexp(-1, keepdim=True) - x),
    ],
    ids=["another function", "times the sum", "another logsumexp", "a sum", "turned round"],
)
def test_other_products_and_exponentials_are_no_softmax(other: Callable[[Tensor], Tensor]) -> None:
    """A composite's rule for the role finds nothing."""
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    spied = Composite.of("spied", {When(role="softmax"): Hold()})
    ours, plain = (explain(other, x, lambda y: (y * m).sum(-1), composite=c) for c in (spied, "attnlrp"))
    same(ours.relevance, plain.relevance)


def test_only_the_softmax_of_attention_is_held_in_cplrp() -> None:
    """The role comes from the product with values, so that a softmax that ends a network keeps its rule."""
    x = draw(0, 3, 4)
    composite = Composite.of("roles", {When("softmax", role="attention"): Hold()})
    plain = explain(lambda x: torch.softmax(x, -1), x, 0)
    same(explain(lambda x: torch.softmax(x, -1), x, 0, composite=composite).relevance, plain.relevance)
    assert float(plain.relevance.abs().sum()) > 0

"""Bits of activations: what is multiplied, rounded, scored and chosen, each against the same written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import Budget, BudgetError, InputError, relevance
from dynlrp.allocation import Activations, Divergence, allocate_activations, find_layers
from dynlrp.allocation.products import multiplied
from tests.conftest import close
from tests.oracle import draw

X = draw(4, 4, 5, 8)
BITS = (2, 4, 8)
Change = Callable[[str, Tensor], Tensor]


class Attention(nn.Module):
    """Two heads; fused, or written out with matrix products."""

    def __init__(self, fused: bool = True, **options: Any) -> None:
        super().__init__()
        self.fused, self.options = fused, options
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.fused:
            heads = F.scaled_dot_product_attention(q, k, v, **self.options)
        else:
            heads = torch.matmul((q @ k.mT / 2).softmax(-1), v)
        return heads.transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self, fused: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention, self.head = Attention(fused, **options), nn.Linear(8, 3)
        self.eval().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x)).mean(1))


def names(fused: bool = True) -> list[str]:
    sides = ("query", "key", "weights", "value") if fused else ("left", "right", "left:1", "right:1")
    inputs = [f"attention.{name}:input" for name in ("query", "key", "value")]
    return [*inputs, *(f"attention:{side}" for side in sides), "head:input"]


def by_hand(net: Net, x: Tensor, change: Change, mask: Tensor | None = None) -> Tensor:
    """The net with every activation that it multiplies given to ``change``."""
    at = net.attention
    q, k, v = (
        getattr(at, name)(change(f"attention.{name}:input", x)).unflatten(-1, (2, 4)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    one, two, three, four = names(at.fused)[3:7]
    scores = change(one, q) @ change(two, k.mT) / math.sqrt(4)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    heads = change(three, weights) @ change(four, v)
    return net.head(change("head:input", (x + heads.transpose(1, 2).flatten(2)).mean(1)))


def rounded(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """The nearest of ``2^b`` numbers ``(q - zero) scale``."""
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    grid = torch.tensor([(q - zero) * scale for q in range(2**bits)], dtype=x.dtype)
    return grid[(x[..., None] - grid).abs().argmin(-1)]


def ranges(net: Net, x: Tensor) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}

    def look(name: str, x: Tensor) -> Tensor:
        found[name] = min(0.0, float(x.detach().min())), max(0.0, float(x.detach().max()))
        return x

    by_hand(net, x, look)
    return found


@pytest.mark.parametrize("fused", [True, False])
def test_rounded_activations(fused: bool) -> None:
    net = Net(fused)
    before = net(X)
    found = allocate_activations(net, X, 4.5, BITS, batch_size=3)
    assert list(found.bits) == names(fused)
    assert len(set(found.bits.values())) > 1
    limits = ranges(net, X)
    for name, both in limits.items():
        assert (found.ranges[name].low, found.ranges[name].high) == pytest.approx(both)
    expected = by_hand(net, X, lambda name, x: rounded(x, *limits[name], found.bits[name]))
    with found.simulated(net):
        outputs = net(X), net(X)  # each run counts anew
        assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))  # no part of the model
    close(outputs[0].detach(), expected.detach())
    close(outputs[1].detach(), expected.detach())
    assert float((expected - before).abs().max()) > 1e-3
    assert torch.equal(net(X), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_costs_are_squared_gradients_times_errors() -> None:
    """Sample by sample, with gradients of the net that is written out."""
    net = Net()
    divergence = Divergence("squared")
    found = allocate_activations(net, X, 5, BITS, divergence=divergence, seed=3, batch_size=3)
    generator, limits = torch.Generator().manual_seed(3), ranges(net, X)
    expected = {name: dict.fromkeys(BITS, 0.0) for name in names()}
    for x in X.split(1):
        taken: dict[str, Tensor] = {}

        def take(name: str, x: Tensor, taken: dict[str, Tensor] = taken) -> Tensor:
            taken[name] = x.clone() if x.requires_grad else x.clone().requires_grad_()
            return taken[name]

        output = by_hand(net, x, take)
        grads = torch.autograd.grad((output * divergence.probe(output, generator)).sum(), list(taken.values()))
        for (name, value), grad in zip(taken.items(), grads, strict=True):
            for bits in BITS:
                error = rounded(value, *limits[name], bits) - value
                expected[name][bits] += float((grad * error).square().sum()) / len(X)
    for name in names():
        assert found.costs[name] == pytest.approx(expected[name], rel=1e-9)


@pytest.mark.parametrize("target", [1, lambda output: output[:, 1]])
def test_costs_by_relevance(target: Any) -> None:
    """The relevance of every activation where it is multiplied, as a share of the sample's, times relative noise."""
    net, expected = Net(), {name: dict.fromkeys(BITS, 0.0) for name in names()}
    found = allocate_activations(net, X, 5, BITS, score="relevance", target=target, composite="cplrp", batch_size=3)
    limits = ranges(net, X)
    for x in X.split(1):
        taken: dict[str, Tensor] = {}

        def take(name: str, x: Tensor, taken: dict[str, Tensor] = taken) -> Tensor:
            taken[name] = x.clone() if x.requires_grad else x.clone().requires_grad_()
            return taken[name]

        output = by_hand(net, x, take)[:, 1]
        parts = relevance(output, list(taken.values()), composite="cplrp").relevance
        sizes = {
            name: 0.0 if part is None else float(part.abs().sum()) for name, part in zip(taken, parts, strict=True)
        }
        for name, value in taken.items():
            for bits in BITS:
                noise = (rounded(value, *limits[name], bits) - value).square().sum() / value.square().sum()
                expected[name][bits] += sizes[name] / sum(sizes.values()) * float(noise) / len(X)
    assert expected["attention:value"][2] > 0
    assert expected["attention:query"][2] == 0  # no relevance passes the weights of attention in CP-LRP
    for name in names():
        assert found.costs[name] == pytest.approx(expected[name], rel=1e-9)


def operations(choice: dict[str, int], weights: dict[str, int]) -> float:
    """Of one sample: 5 tokens, 8 channels, 2 heads of 4."""
    total = sum(5 * 8 * 8 * weights.get(f"attention.{n}", 16) * choice[f"attention.{n}:input"] for n in
                ("query", "key", "value"))  # fmt: skip
    total += 2 * 5 * 5 * 4 * choice["attention:query"] * choice["attention:key"]
    total += 2 * 5 * 5 * 4 * choice["attention:weights"] * choice["attention:value"]
    return total + 8 * 3 * weights.get("head", 16) * choice["head:input"]


@pytest.mark.parametrize("limit", [21_000.0, 30_000.0])
def test_the_best_of_all_choices(limit: float) -> None:
    net, weights = Net(), {"attention.query": 4, "attention.value": 6, "head": 8}
    found = allocate_activations(net, X, Budget(bitops=limit), BITS, weights=weights, batch_size=3)
    best = math.inf
    for bits in itertools.product(BITS, repeat=len(names())):
        choice = dict(zip(names(), bits, strict=True))
        if operations(choice, weights) <= limit:
            best = min(best, sum(found.costs[name][b] for name, b in choice.items()))
    assert math.isfinite(best)
    assert found.cost == pytest.approx(best, rel=1e-5)
    assert found.bitops == pytest.approx(operations(found.bits, weights))
    assert found.bitops <= limit * (1 + 1e-9)


def test_average_bits() -> None:
    net = Net()
    found = allocate_activations(net, X, 4.0, BITS)
    sizes = dict.fromkeys(names(), 2 * 5 * 5 * 4) | dict.fromkeys(names()[:3], 5 * 8 * 8) | {"head:input": 24}
    average = sum(sizes[name] * bits for name, bits in found.bits.items()) / sum(sizes.values())
    assert found.average_bits == pytest.approx(average)
    assert average <= 4
    with pytest.raises(BudgetError, match="from 2 to 8"):
        allocate_activations(net, X, 1.5, BITS)


MASK = torch.tensor([[1, 1, 0, 1, 1]] * 5, dtype=torch.bool)
EMPTY = torch.tensor([[0] * 5] + [[1] * 5] * 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"attn_mask": MASK}, {"attn_mask": EMPTY}, {"attn_mask": MASK.double()}, {"scale": 0.3}],
)
def test_fused_attention_in_two_products(options: dict[str, Any]) -> None:
    net = Net(**options)
    with multiplied(net, find_layers(net), lambda name, x: x) as found:
        output = net(X)
    close(output, net(X), 1e-12)
    assert [product.activations for product in found][3:5] == [
        ("attention:query", "attention:key"), ("attention:weights", "attention:value")
    ]  # fmt: skip


def test_grouped_queries() -> None:
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 2)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True).flatten(1)

    with multiplied(Grouped(), {}, lambda name, x: x):
        output = Grouped()(X)
    close(output, Grouped()(X), 1e-12)


def test_what_cannot_be_reached_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x)[0].mean(1)

    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bij,bkj->bik", x, x).mean(1)

    for model, name in ((Hidden(), "multi_head_attention_forward"), (Einsum(), "einsum")):
        whole = nn.Sequential(nn.Linear(8, 8), model).eval()
        with pytest.raises(InputError, match=f"inside {name}"):
            allocate_activations(whole, X.float())


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = allocate_activations(Net(), X, 5, BITS)
    path = found.save(tmp_path / "bits.json")
    assert Activations.load(path) == found
    path.write_text('{"bits": {}}')
    with pytest.raises(InputError, match="does not hold what"):
        Activations.load(path)


def test_errors() -> None:
    net = Net()
    with pytest.raises(InputError, match="score is one of error, relevance"):
        allocate_activations(net, X, score="luck")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no part of the model's size"):
        allocate_activations(net, X, Budget(size=100))
    with pytest.raises(InputError, match="from 2 to 8 bits"):
        allocate_activations(net, X, candidates=(1, 4))
    found = allocate_activations(net, X, 5, BITS)
    with pytest.raises(InputError, match="'attention:left' did not occur"), found.simulated(other := Net(fused=False)):
        other(X)
    assert not other.attention._forward_pre_hooks

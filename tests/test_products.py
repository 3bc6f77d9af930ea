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
from dynlrp.allocation import OPERAND_SCORES, Activations, Divergence, allocate_activations, find_layers
from dynlrp.allocation.products import multiplied
from tests.conftest import close
from tests.oracle import draw
from tests.test_state import unchanged

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
    assert float((expected - before).detach().abs().max()) > 1e-3
    assert torch.equal(net(X), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


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
                expected[name][bits] += sizes[name] / sum(sizes.values()) * float(noise.detach()) / len(X)
    assert expected["attention:value"][2] > 0
    assert expected["attention:query"][2] == 0  # no relevance passes the weights of attention in CP-LRP
    for name in names():
        assert costs(found, name) == pytest.approx(expected[name], rel=1e-9)


def costs(found: Activations, name: str) -> dict[int, float]:
    row = found.scores.mean[found.scores.layers.index(name)]
    return dict(zip(found.scores.candidates, row.tolist(), strict=True))


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
            best = min(best, sum(costs(found, name)[b] for name, b in choice.items()))
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


class Calls(nn.Module):
    """A function of the input and of a weight that no layer holds."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(draw(5, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize(
    ("function", "names", "count"),
    [
        (lambda x, w: torch.einsum("b i j, bkj -> bik", x, x), ["left", "right"], 4 * 5 * 5 * 8),
        (lambda x, w: torch.einsum("...ij,...kj", x, x[:1]), ["left", "right"], 4 * 5 * 5 * 8),
        (lambda x, w: torch.einsum(x, [0, 1, 2], x, [0, 3, 2]), ["left", "right"], 4 * 5 * 5 * 8),
        (lambda x, w: torch.einsum("bij,jk->bk", x, w), ["input"], 4 * 5 * 8 * 8),
        (lambda x, w: torch.baddbmm(x.mean() * torch.ones(4, 5, 5, dtype=x.dtype), x, x.mT, beta=0.5),
         ["left", "right"], 4 * 5 * 5 * 8),
        (lambda x, w: torch.addmm(w[0], x[0], w), ["input"], 5 * 8 * 8),
        (lambda x, w: x[0].mm(x[1].mT), ["left", "right"], 5 * 5 * 8),
        (lambda x, w: torch.matmul(input=w, other=x.mT), ["input"], 4 * 8 * 8 * 5),
        (lambda x, w: F.linear(x, w), ["input"], 4 * 5 * 8 * 8),
        (lambda x, w: F.linear(x, w.softmax(0)), ["input"], 4 * 5 * 8 * 8),
        (lambda x, w: F.conv1d(x.mT, w[:, :, None]), ["input"], 4 * 5 * 8 * 8),
        (lambda x, w: torch.einsum("bij->bi", x), [], 0),
        (lambda x, w: w @ w, [], 0),
    ],
)  # fmt: skip
def test_products_without_a_layer(function: Callable[[Tensor, Tensor], Tensor], names: list[str], count: int) -> None:
    """Rounded operands are what the function is given: all products here are linear in each."""
    model = Calls(function).double()
    seen: list[str] = []

    def double(name: str, x: Tensor) -> Tensor:
        seen.append(name)
        return 2 * x

    with multiplied(model, {}, double) as found:
        made = model(X)
    assert seen == [f":{name}" for name in names]
    assert [(product.activations, product.multiplications) for product in found] == (
        [(tuple(seen), count)] if names else []
    )
    if function.__code__.co_names[:2] != ("torch", "baddbmm") and "addmm" not in function.__code__.co_names:
        close(made, 2 ** len(names) * model(X), 1e-12)
    else:
        assert not torch.equal(made, model(X))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention(need_weights: bool, masked: bool) -> None:
    """With projections, scores and weights written out."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x, x, x, need_weights=need_weights, attn_mask=MASK.double().log() if masked else None)
            return self.head(hidden[0].mean(1))

    net = Inside().double().eval()
    found = allocate_activations(net, X, 5.5, BITS, batch_size=3)
    sides = ("left", "right", "left:1", "right:1") if need_weights else ("query", "key", "weights", "value")
    names = ["inner:input", *(f"inner:{side}" for side in sides), "inner:input:1", "head:input"]
    assert list(found.bits) == names
    assert len(set(found.bits.values())) > 1

    def by_hand(change: Callable[[str, Tensor], Tensor]) -> Tensor:
        at = net.inner
        every = F.linear(change(names[0], X), at.in_proj_weight, at.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in every)
        scale = math.sqrt(1 / 4)  # of the queries before they are rounded, or of the scores behind
        scores = change(names[1], q * scale if need_weights else q) @ change(names[2], k.mT)
        scores = scores * (1 if need_weights else scale)
        scores = scores + MASK.double().log() if masked else scores
        heads = change(names[3], scores.softmax(-1)) @ change(names[4], v)
        hidden = F.linear(change(names[5], heads.transpose(1, 2).flatten(2)), at.out_proj.weight, at.out_proj.bias)
        return net.head(change(names[6], hidden.mean(1)))

    close(by_hand(lambda name, x: x).detach(), net(X).detach(), 1e-12)
    limits = found.ranges
    with found.simulated(net):
        output = net(X)
    expected = by_hand(lambda name, x: rounded(x, limits[name].low, limits[name].high, found.bits[name]))
    close(output.detach(), expected.detach())
    # Tokens come before samples inside, and still each sample has its own.
    one, three = (
        allocate_activations(net, X, 5, BITS, score="gauss_newton", batch_size=size).scores for size in (1, 3)
    )
    close(one.mean, three.mean, 1e-9)
    close(one.error, three.error, 1e-9)
    row = {row.activation: row.multiplications for row in found.table}
    assert [row[name] for name in names] == [5 * 8 * 24, *[2 * 5 * 5 * 4] * 4, 5 * 8 * 8, 8 * 3]


def test_the_fast_path_of_an_encoder_is_left() -> None:
    """It would run without modules, in one function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3)).eval().requires_grad_(False)
    found = allocate_activations(net, X.float(), 5)
    inside = ["self_attn:input", *(f"self_attn:{side}" for side in ("query", "key", "weights", "value")),
              "self_attn:input:1", "linear1:input", "linear2:input"]  # fmt: skip
    assert list(found.bits) == [*(f"0.layers.{n}.{name}" for n in (0, 1) for name in inside), "2:input"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x, w: torch.einsum("bij,bkj,bkl->bil", x, x, x), "einsum"),
        (lambda x, w: torch.tensordot(x, x, 3)[None], "tensordot"),
        (lambda x, w: F.bilinear(x, x, w), "bilinear"),
    ],
)
def test_what_cannot_be_reached_is_refused(function: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    model = Calls(function).double()
    with pytest.raises(InputError, match=f"inside {name}"):
        allocate_activations(model, X, layers=())


def test_groups_and_pins() -> None:
    net, inputs = Net(), [f"attention.{name}:input" for name in ("query", "key", "value")]
    free = allocate_activations(net, X, 5.5, BITS)
    assert len({free.bits[name] for name in inputs}) > 1
    groups = [[f"*.{name}:input" for name in ("query", "key", "value")], ("attention:key", "attention:value")]
    for budget in (Budget(average_bits=5.5), Budget(bitops=70_000.0)):
        found = allocate_activations(net, X, budget, BITS, groups=groups, pinned={"head:*": None, "*:weights": 8})
        assert len({found.bits[name] for name in inputs}) == 1
        assert found.bits["attention:key"] == found.bits["attention:value"]
        assert found.bits["attention:weights"] == 8
        assert "head:input" not in found.bits
        assert found.provenance["groups"] == [inputs, ["attention:key", "attention:value"]]
        best = math.inf
        for shared, key, query in itertools.product(BITS, repeat=3):
            choice = {**dict.fromkeys(inputs, shared), "attention:query": query, "attention:key": key,
                      "attention:weights": 8, "attention:value": key}  # fmt: skip
            sizes = dict.fromkeys(choice, 200) | dict.fromkeys(inputs, 320)
            average = sum(sizes[name] * b for name, b in choice.items()) / sum(sizes.values())
            used = operations({**choice, "head:input": 16}, {})
            if average <= (budget.average_bits or 8) and used <= (budget.bitops or math.inf):
                best = min(best, sum(costs(found, name)[b] for name, b in choice.items()))
        assert found.cost == pytest.approx(best, rel=1e-6)
        assert math.isfinite(best)
        assert found.bitops == pytest.approx(operations({**found.bits, "head:input": 16}, {}))
        expected = by_hand(
            net, X, lambda n, x, f=found: rounded(x, f.ranges[n].low, f.ranges[n].high, f.bits[n]) if n in f.bits else x
        )
        with found.simulated(net):
            close(net(X).detach(), expected.detach())
    with pytest.raises(InputError, match="no activation is called 'nothing'"):
        allocate_activations(net, X, 5, BITS, groups=[("nothing",)])
    with pytest.raises(InputError, match="nothing to allocate"):
        allocate_activations(net, X, 5, BITS, pinned={"*": None})


def test_too_many_choices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynlrp.allocation.choices.MOST", 8)
    with pytest.raises(InputError, match="bits of 2 activations, from 'attention:query' to 'attention:key'"):
        allocate_activations(Net(), X, Budget(bitops=25_000.0), BITS)
    allocate_activations(Net(), X, 5, BITS)


def rows_of(score: str, divergence: Divergence, seed: int, target: int) -> Tensor:
    """What every candidate costs, ``(samples, activations, candidates)``, sample by sample."""
    net, generator = Net(), torch.Generator().manual_seed(seed)
    limits, rows = ranges(net, X), []
    for x in X.split(1):
        taken: dict[str, Tensor] = {}

        def take(name: str, x: Tensor, taken: dict[str, Tensor] = taken) -> Tensor:
            taken[name] = x.clone() if x.requires_grad else x.clone().requires_grad_()
            return taken[name]

        output = by_hand(net, x, take)
        probe = divergence.probe(output, generator)
        sides = list(taken.values())
        grads = torch.autograd.grad((output * probe).sum(), sides, retain_graph=True)
        slopes = torch.autograd.grad(output[0, target], sides)
        every = sum(float((h * a).abs().sum()) for h, a in zip(slopes, sides, strict=True))
        row = []
        for (name, a), g, h in zip(taken.items(), grads, slopes, strict=True):
            for bits in BITS:
                da = rounded(a, *limits[name], bits) - a
                noise = float(da.square().sum() / a.square().sum())
                other = by_hand(net, x, lambda n, x, c=name, b=bits: rounded(x, *limits[n], b) if n == c else x)
                sizes = dict.fromkeys(names(), 200) | dict.fromkeys(names()[:3], 320) | {"head:input": 24}
                row.append({
                    "error": float((g * da).square().sum()),
                    "gauss_newton": float((g * da).sum()) ** 2,
                    "fisher": float(g.square().mean() * da.square().sum()),
                    "noise": noise,
                    "gradient_x_input": float((h * a).abs().sum()) / every * noise,
                    "measured": float((other - output).square().sum()) / 2,
                    "uniform": sizes[name] / 4**bits,
                }[score])  # fmt: skip
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(X), -1, len(BITS))


def shares(rows: Tensor) -> Tensor:
    return torch.stack([row / row.sum() for row in rows])


@pytest.mark.parametrize(
    ("score", "parts"),
    [
        *(
            (name, [name])
            for name in ("error", "gauss_newton", "fisher", "noise", "measured", "gradient_x_input", "uniform")
        ),
        ("fisher_input", ["fisher", "gradient_x_input"]),
        ("error_relevance", ["error", "gradient_x_input"]),  # which are these rules
    ],
)
def test_other_scores(score: str, parts: list[str]) -> None:
    """The mean over samples, and its standard error."""
    divergence = Divergence("squared")
    found = allocate_activations(
        Net(), X, 5, BITS, score=score, divergence=divergence, seed=3, target=1, batch_size=3,
        composite="gradient_x_input",
    )  # fmt: skip
    expected = rows_of(parts[0], divergence, 3, 1)
    if len(parts) > 1:
        expected = (shares(expected) * shares(rows_of(parts[1], divergence, 3, 1))).sqrt()
    close(found.scores.mean, expected.mean(0), 1e-9)
    assert found.scores.count == (1 if score == "uniform" else len(X))
    if score != "uniform":
        close(found.scores.error, expected.std(0) / math.sqrt(len(X)), 1e-9)
        row = found.table[0]
        assert row.low < row.cost < row.high
        assert row.cost == costs(found, row.activation)[row.bits]


def test_random_differs_by_seed() -> None:
    one, two, same = (
        allocate_activations(Net(), X, 5, BITS, score="random", seed=seed).scores.mean for seed in (0, 1, 0)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, two)


def test_scores_are_measured_once_for_many_budgets() -> None:
    net = Net()
    first = allocate_activations(net, X, 5, BITS, score="error")
    asked: list[int] = []
    again = allocate_activations(net, X, Budget(bitops=70_000.0), (2, 8), score=first.scores, progress=asked.append)
    fresh = allocate_activations(net, X, Budget(bitops=70_000.0), (2, 8), score="error")
    assert again.bits == fresh.bits
    assert again.cost == pytest.approx(fresh.cost)
    assert again.provenance["solver"]["used"] == {"bitops": pytest.approx(again.bitops)}
    assert not asked
    fewer = allocate_activations(net, X, 5, BITS, score=first.scores, pinned={"head:input": None})
    with pytest.raises(InputError, match=r"not of the layers or activations \['head:input'"):
        allocate_activations(net, X, 5, BITS, score=fewer.scores)


def test_plot() -> None:
    found = allocate_activations(Net(), X, 5, BITS)
    left, right = found.plot("Net").axes
    assert [label.get_text() for label in left.get_yticklabels()] == names()
    assert [bar.get_width() for bar in left.patches] == list(found.bits.values())
    assert [bar.get_width() for bar in right.patches] == [row.cost for row in found.table]
    assert right.get_title(loc="left") == "cost by fisher input"


def test_the_model_stays_as_it_is() -> None:
    net = Net().float()
    for score in OPERAND_SCORES:
        with unchanged(net, X.float()):
            allocate_activations(net, X.float(), 5, BITS, score=score)


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = allocate_activations(Net(), X, 5, BITS)
    path = found.save(tmp_path / "bits.json")
    loaded = Activations.load(path)
    for field in ("bits", "ranges", "table", "cost", "average_bits", "bitops", "layers", "provenance"):
        assert getattr(loaded, field) == getattr(found, field), field
    assert torch.equal(loaded.scores.mean, found.scores.mean)
    assert torch.equal(loaded.scores.error, found.scores.error)
    net = Net()
    with found.simulated(net):
        expected = net(X)
    with loaded.simulated(net):
        assert torch.equal(net(X), expected)
    path.write_text('{"bits": {}}')
    with pytest.raises(InputError, match="does not hold what"):
        Activations.load(path)


def test_errors() -> None:
    net = Net()
    with pytest.raises(InputError, match="no score of activations is called 'luck'; there are error, "):
        allocate_activations(net, X, score="luck")
    with pytest.raises(InputError, match="no part of the model's size"):
        allocate_activations(net, X, Budget(size=100))
    with pytest.raises(InputError, match="from 2 to 8 bits"):
        allocate_activations(net, X, candidates=(1, 4))
    found = allocate_activations(net, X, 5, BITS)
    with pytest.raises(InputError, match="'attention:left' did not occur"), found.simulated(other := Net(fused=False)):
        other(X)
    assert not other.attention._forward_pre_hooks

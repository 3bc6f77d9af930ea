"""From a model to bits: what allocate gives, keeps, and says when it cannot."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import Allocation, Budget, BudgetError, InputError, TrainingModeError, allocate, plot
from dynlrp.allocation import SCORES, Calibration, Quantizer, Scores, Task, find_layers, measure, score
from dynlrp.allocation.noise import costs
from tests.test_state import unchanged

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu().flatten(2).mT
        x = x + nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(x.mean(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def given() -> Any:
    """A score that says what a test wants."""
    before = dict(SCORES)
    yield lambda rows, noise="none": score("given", noise=noise, normalise=False)(lambda task: iter([rows]))
    SCORES.clear()
    SCORES.update(before)


def test_the_bits_are_the_best_within_the_budget(net: Net) -> None:
    """Against all 3^5 allocations, with every cost by hand."""
    candidates, found = (2, 4, 8), allocate(net, X, 7, (2, 4, 8), score="relevance")
    layers = find_layers(net)
    scores = measure(Task(net, layers, Calibration(X), candidates), "relevance")
    best, chosen = float("inf"), {}
    for choice in itertools.product(range(3), repeat=5):
        bits = {name: candidates[c] for name, c in zip(layers, choice, strict=True)}
        used = sum(layer.weights * bits[n] + 32 * len(layer.weight) for n, layer in layers.items())
        if used <= 7 * sum(layer.weights for layer in layers.values()):
            cost = 0.0
            for sensitivity, (name, layer) in zip(scores.mean.tolist(), layers.items(), strict=True):
                w = layer.weight.detach()
                error = (Quantizer().round(layer, bits[name]) - w).double().square().sum()
                cost += sensitivity * float(error / w.double().square().sum())
            if cost < best:
                best, chosen = cost, bits
    assert found.bits == chosen
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert sum(row.cost for row in found.table) == pytest.approx(best, rel=1e-9)
    assert len(set(chosen.values())) > 1


def test_sensitive_layers_get_more(net: Net, given: Any) -> None:
    layers = list(find_layers(net))
    for favourite in ("query", "value"):
        given(torch.tensor([[1000.0 if name == favourite else 1.0 for name in layers]]), "relative")
        found = allocate(net, X, 7, score="given").bits
        assert found[favourite] == 8
        assert found["key"] < 8


def test_budgets_hold(net: Net) -> None:
    layers = find_layers(net)
    weights = sum(layer.weights for layer in layers.values())
    for limit in (5, 6.5, 8.0, 10.7):
        found = allocate(net, X, limit, score="weight_mse")
        bits = sum(layer.weights * found.bits[n] + 32 * len(layer.weight) for n, layer in layers.items())
        assert found.average_bits == bits / weights <= limit
        floats = 4 * sum(p.numel() for n, p in net.named_parameters() if n.removesuffix(".weight") not in layers)
        assert found.size == bits / 8 + floats
    counts = {"stem": 36 * 8 * 27, "query": 36 * 64, "key": 36 * 64, "value": 36 * 64, "head": 40}
    for limit in (2.4e5, 4e5):
        found = allocate(net, X, Budget(bitops=limit, activation_bits=8), score="weight_mse")
        assert sum(8 * counts[n] * b for n, b in found.bits.items()) <= limit
        used = found.provenance["solver"]["used"]
        assert used == {"bitops": pytest.approx(sum(8 * counts[n] * b for n, b in found.bits.items()))}
    both = allocate(net, X, Budget(average_bits=7, size=600), score="weight_mse")
    assert both.provenance["solver"]["used"] == pytest.approx({"average_bits": both.average_bits, "size": both.size})
    assert both.average_bits <= 7
    assert both.size <= 600


def test_too_small_budgets_say_what_is_feasible(net: Net) -> None:
    with pytest.raises(BudgetError, match=r"average_bits = 1 cannot be kept: .* take from 4\.64286 to 10\.6429$"):
        allocate(net, X, 1)
    with pytest.raises(BudgetError, match=r"size = 300 cannot be kept: .* take from (\d+)"):
        allocate(net, X, Budget(size=300))
    with pytest.raises(InputError, match="needs a limit"):
        Budget()
    with pytest.raises(InputError, match="positive"):
        Budget(size=-1)


def test_groups_share(net: Net, given: Any) -> None:
    given(torch.tensor([[1.0, 1000, 1, 1, 1]]), "relative")
    free = allocate(net, X, 7, score="given").bits
    assert free["query"] != free["key"]
    found = allocate(net, X, 7, score="given", groups=[("query", "key"), ("key", "value")])
    assert len({found.bits[name] for name in ("query", "key", "value")}) == 1
    assert found.provenance["groups"] == [["query", "key", "value"]]
    with pytest.raises(InputError, match="no layer is called 'nothing'"):
        allocate(net, X, 7, score="uniform", groups=[("query", "nothing")])
    with pytest.raises(InputError, match="not the text 'query'"):
        allocate(net, X, 7, score="uniform", groups=["query"])


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("*.query", "*.key"), [["0.query", "0.key"], ["1.query", "1.key"]]),
        (("[01].query", "?.key"), [["0.query", "0.key", "1.query", "1.key"]]),  # no stars: one text, the empty one
        (("[*0].*", "[!1].k*"), []),  # a star in brackets is none
    ],
)
def test_stars_make_a_group_in_every_block(names: tuple[str, ...], groups: list[list[str]]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.query(x) * self.key(x))

    model = nn.Sequential(Attention(), Attention()).eval()
    found = allocate(model, torch.randn(4, 4), 12, score="uniform", groups=[names])
    assert found.provenance["groups"] == groups


def test_pins(net: Net) -> None:
    found = allocate(net, X, 11, score="uniform", pinned={"*": 4, "head": 7, "stem": None})
    assert found.bits == {"query": 4, "key": 4, "value": 4, "head": 7}
    kept = allocate(net, X, 11, (4, 8), score="uniform", pinned={"stem": None})
    assert torch.equal(kept.apply(tool="float").stem.weight, net.stem.weight)
    with pytest.raises(InputError, match="pinned to 1 bits"):
        allocate(net, X, 11, pinned={"head": 1})
    with pytest.raises(InputError, match="no layer is called 'nothing'"):
        allocate(net, X, 11, pinned={"nothing": 4})
    with pytest.raises(InputError, match="must share bits"):
        allocate(net, X, 11, pinned={"query": 4, "key": 8}, groups=[("query", "key")])
    with pytest.raises(InputError, match="must share bits"):
        allocate(net, X, 11, pinned={"query": None}, groups=[("query", "key")])
    with pytest.raises(InputError, match="nothing to allocate"):
        allocate(net, X, 11, pinned={"*": None})


def test_options_are_checked(net: Net) -> None:
    with pytest.raises(InputError, match="candidates are from 2 to 8"):
        allocate(net, X, 8, (1, 4))
    with pytest.raises(InputError, match=r"no score is called 'nothing'; there are .*relevance"):
        allocate(net, X, 8, score="nothing")
    with pytest.raises(TrainingModeError):
        allocate(net.train(), X, 8)


def test_apply_rounds_a_copy(net: Net) -> None:
    found = allocate(net, X, 7)
    with unchanged(net, X):
        applied = found.apply(tool="float")
    for name, layer in find_layers(applied).items():
        assert torch.equal(layer.weight, Quantizer().round(find_layers(net)[name], found.bits[name]))
    assert not torch.equal(applied(X), net(X))


@pytest.mark.parametrize("name", ["weight_error", "relevance"])
def test_scores_are_measured_once_for_many_budgets(net: Net, name: str) -> None:
    first = allocate(net, X, 9, score=name)
    asked: list[int] = []
    for budget, candidates in ((5.5, (2, 3, 4, 5, 6, 8)), (7, (3, 4, 8))):
        again = allocate(net, X, budget, candidates, score=first.scores, progress=asked.append)
        fresh = allocate(net, X, budget, candidates, score=name)
        assert again.bits == fresh.bits
        assert again.cost == pytest.approx(fresh.cost, rel=1e-5)  # sums of float32 for other candidates
    assert not asked
    fewer = allocate(net, X, 9, score=first.scores, pinned={"stem": None})
    assert "stem" not in fewer.bits
    with pytest.raises(InputError, match=r"not of the layers or activations \['stem'"):
        allocate(net, X, 9, score=fewer.scores)
    if name == "weight_error":
        with pytest.raises(InputError, match="not of all of"):
            allocate(net, X, 9, (2, 7, 8), score=first.scores)
        with pytest.raises(InputError, match="is a cost of b bits already"):
            allocate(net, X, 9, score=first.scores, noise="relative")
    else:
        absolute = allocate(net, X, 7, score=first.scores, noise="absolute")
        assert torch.equal(absolute.costs, allocate(net, X, 7, score=name, noise="absolute").costs)


def test_plot(net: Net) -> None:
    found = allocate(net, X, 7)
    figure = found.plot("Net")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["stem", "query", "key", "value", "head"]
    assert [bar.get_width() for bar in left.patches] == list(found.bits.values())
    assert [bar.get_width() for bar in right.patches] == [row.score for row in found.table]
    assert right.get_title(loc="left") == "weight error"
    ends = [segment[:, 0].tolist() for segment in right.collections[0].get_segments()]
    assert ends == [pytest.approx([row.low, row.high]) for row in found.table]
    many = plot.bits([f"layer {n}" for n in range(1000)], [4] * 1000, *[[0.5] * 1000] * 3)
    assert many.get_size_inches()[1] < 25
    with pytest.raises(ValueError, match="2 names need"):
        plot.bits(["a", "b"], [4], [1], [1], [1])


def test_save_and_load(net: Net, tmp_path: Path) -> None:
    for name in ("relevance", "weight_mse"):
        found = allocate(net, X, 13, score=name, quantizer=Quantizer(False, 4), pinned={"stem": None})
        loaded = Allocation.load(found.save(tmp_path / "bits.json"))
        for field in ("bits", "table", "cost", "average_bits", "size", "quantizer", "provenance"):
            assert getattr(loaded, field) == getattr(found, field), field
        assert torch.equal(loaded.costs, found.costs)
        assert torch.equal(loaded.scores.mean, found.scores.mean)
        assert torch.equal(loaded.scores.interval()[0], found.scores.interval()[0])
        assert loaded.scores.count == found.scores.count
        assert torch.equal(loaded.apply(net, tool="float")(X), found.apply(tool="float")(X))
        with pytest.raises(InputError, match="give the model"):
            loaded.apply()
        other = Net().eval()
        other.query = nn.Linear(8, 9)
        with pytest.raises(InputError, match="'query' of this model has 72 weights"):
            loaded.apply(other)
    (tmp_path / "other.json").write_text('{"bits": {}}')
    with pytest.raises(InputError, match="no allocation"):
        Allocation.load(tmp_path / "other.json")


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_stays_as_it_is(net: Net, name: str, frozen: bool) -> None:
    net.requires_grad_(not frozen)
    net.head.weight.requires_grad_(False)
    with unchanged(net, X):
        allocate(net, X, 7, score=name, batch_size=5)


def test_intervals_hold_the_mean_of_all_samples() -> None:
    """They are those of the mean of independent rows: about 95 of 100 hold the true one."""
    rows = torch.randn(100, 40, 3, dtype=torch.float64) + 2
    scores = []
    for some in rows:
        before = dict(SCORES)
        score("drawn", noise="none", normalise=False)(lambda task, some=some: iter(some.split(7)))
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
        scores.append(measure(Task(model, find_layers(model), Calibration(X)), "drawn"))
        SCORES.clear()
        SCORES.update(before)
    assert all(isinstance(s, Scores) and s.count == 40 for s in scores)
    assert torch.allclose(scores[0].mean, rows[0].mean(0), rtol=1e-12)
    assert torch.allclose(scores[0].error, rows[0].std(0) / 40**0.5, rtol=1e-12)
    held = torch.stack([(s.interval()[0] < 2) & (s.interval()[1] > 2) for s in scores]).double().mean()
    assert 0.9 < float(held) < 0.99  # 300 trials: three standard errors are 0.038


def test_samples_count_alike(net: Net, given: Any) -> None:
    rows = torch.tensor([[1.0, 3], [100, 300], [0, 0]])
    score("given", noise="absolute")(lambda task: iter([rows]))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    task = Task(model, find_layers(model), Calibration(X), (2, 4))
    found = measure(task, "given")
    # The silent sample says the same of both layers.
    assert found.mean.tolist() == pytest.approx([(0.25 + 0.25 + 0.5) / 3, (0.75 + 0.75 + 0.5) / 3])
    for place, layer in enumerate(task.layers.values()):
        errors = [(Quantizer().round(layer, bits) - layer.weight).detach().double() for bits in (2, 4)]
        expected = [float(found.mean[place] * error.square().sum()) for error in errors]
        assert costs(found, task)[place].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_score_that_is_not_finite_names_the_layer(net: Net, given: Any) -> None:
    given(torch.tensor([[1.0, 1, float("nan"), 1, 1]]))
    with pytest.raises(InputError, match="'given' is NaN or infinite for layer 'key'"):
        allocate(net, X, 7, score="given")

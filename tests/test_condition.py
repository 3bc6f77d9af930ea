"""Conditional relevance against a dense net with explicit masks, and the algebra of conditions."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import Composite, InputError, Part, explain, explain_many
from dynlrp.rules import Epsilon, Gamma
from tests import oracle
from tests.conftest import close, same, sample
from tests.peers import models as peers

NET = peers.randomise(
    nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5)
    ),
    4,
).double()
X = oracle.draw(3, 2, 2, 5, 5)
RULES: dict[str, tuple[Composite, Any, Any]] = {
    "epsilon": (
        Composite.of("test", {"convolution": Epsilon(0.01), "dense": Epsilon(0.01)}),
        lambda layer, x, r: oracle.epsilon(layer, x, r, epsilon=0.01),
        lambda layer, x, r: oracle.epsilon(layer, x, r, epsilon=0.01),
    ),
    "gamma": (
        Composite.of("test", {"convolution": Gamma(0.25), "dense": Epsilon()}),
        lambda layer, x, r: oracle.gamma(layer, x, r, gamma=0.25),
        lambda layer, x, r: oracle.epsilon(layer, x, r, epsilon=0.0),
    ),
    "multipliers": (
        Composite("test"),
        lambda layer, x, r: oracle.epsilon(layer, x, r, epsilon=0.0),
        lambda layer, x, r: oracle.epsilon(layer, x, r, epsilon=0.0),
    ),
}


def explicit(x: Tensor, target: int, rule: str, first: Tensor, second: Tensor) -> tuple[Tensor, float, float]:
    """Relevance of one picture layer by layer; ``first`` and ``second`` mask what the convolutions made. Returns what
    the masks take, too."""
    _, convolution, linear = RULES[rule]
    a, b, c = NET[0], NET[2], NET[5]
    one = oracle.dense(lambda x, w, v: nn.functional.conv2d(x[None], w, v, padding=1)[0], (2, 5, 5), a.weight, a.bias)
    two = oracle.dense(lambda x, w, v: nn.functional.conv2d(x[None], w, v)[0], (4, 5, 5), b.weight, b.bias)
    three = oracle.dense(lambda x, w, v: nn.functional.linear(x, w, v), (27,), c.weight, c.bias)
    h0 = x.flatten()
    h1 = (h0 @ one.weight + one.bias).relu()
    h2 = (h1 @ two.weight + two.bias).relu()
    y = h2 @ three.weight + three.bias
    r = torch.zeros_like(y)
    r[target] = y[target]
    r = linear(three, h2, r)[:-1].sum(1)
    kept = (r.reshape(3, 3, 3) * second).flatten()
    taken = float((r - kept).sum())
    r = convolution(two, h1, kept)[:-1].sum(1)
    kept = (r.reshape(4, 5, 5) * first).flatten()
    return convolution(one, h0, kept)[:-1].sum(1).reshape(x.shape), taken, float((r - kept).sum())


def channels(count: int, *chosen: int) -> Tensor:
    return torch.zeros(count, 1, 1, dtype=torch.float64).index_fill_(0, torch.tensor(chosen), 1.0)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_several_modules_at_once(rule: str) -> None:
    explanation = explain(NET, X, 2, composite=RULES[rule][0], condition={"1": [0, 3], "2": 1}, layers=["1", "2"])
    expected, taken = [], [0.0, 0.0]
    for x in X:
        r, second, first = explicit(x, 2, rule, channels(4, 0, 3), channels(3, 1))
        expected.append(r)
        taken = [taken[0] + second, taken[1] + first]
    close(explanation.relevance, torch.stack(expected), 1e-10)
    assert not explanation.layers["1"][:, [1, 2]].any()
    assert explanation.layers["1"][:, [0, 3]].any()
    held = {key: amount for key, amount in explanation.ledger.by_module().items() if key[0] == "held back"}
    assert held == {
        ("held back", "2"): pytest.approx(taken[0], rel=1e-9),
        ("held back", "1"): pytest.approx(taken[1], rel=1e-9),
    }
    assert ("held back", "ReluBackward0") in explanation.ledger.by_operation()
    assert explanation.ledger.closes


@pytest.mark.parametrize("composite", ["auto", "attnlrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("resnet", nn.Conv2d), ("conv_bn", nn.Conv2d), ("conv_bn", nn.BatchNorm2d), ("bert", nn.LayerNorm)],
)
def test_a_partition_of_the_channels_adds_up(name: str, kind: type[nn.Module], composite: str) -> None:
    model, inputs, target = sample(name)
    layer = next(path for path, module in model.named_modules() if isinstance(module, kind))
    whole = explain(model, inputs, target, composite=composite, layers=layer)
    count = whole.layers[layer].shape[1] if whole.axes[layer] == 1 else whole.layers[layer].shape[-1]
    parts = explain_many(
        model, inputs, [target], conditions=[{layer: range(n, count, 3)} for n in range(3)], composite=composite
    )
    for number, expected in enumerate(whole.tensors()):
        passed = sum(part.tensors()[number] for part in parts)
        # What skips the layer passes in every part.
        beside = explain(model, inputs, target, composite=composite, condition={layer: []}).tensors()[number]
        close(passed - 2 * beside, expected, 1e-12)
    assert all(part.ledger.closes for part in parts)
    assert any(abs(part.ledger.accounts["held back"]) > 1e-6 for part in parts)


@pytest.mark.parametrize("composite", ["auto", "attnlrp", "epsilon_plus"])
@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_many_conditions_equal_one_at_a_time(composite: str, chunk: int | None) -> None:
    conditions: list[dict[str, Any]] = [
        {},
        {"1": [0]},
        {"1": 1, "3": [0, 2]},
        {"3": oracle.draw(1, 3, 3, 3) > 0},
        {"0": [Part([0, 1]), Part(slice(2, None), axis=-1)]},
        {"?": Part(0, axis=1)},
    ]
    many = explain_many(NET, X, [3], conditions=conditions, chunk=chunk, composite=composite, layers=["0", "3"])
    for condition, found in zip(conditions, many, strict=True):
        alone = explain(NET, X, 3, condition=condition, composite=composite, layers=["0", "3"])
        same(found, alone, 1e-12)
        for name in ("0", "3"):
            close(found.layers[name], alone.layers[name], 1e-12)
    assert len({float(e.relevance.sum()) for e in many}) == len(conditions)


def test_targets_pair_with_conditions() -> None:
    pairs = list(product([0, 4], [{"1": 2}, {}]))
    many = explain_many(NET, X, [t for t, _ in pairs], conditions=[c for _, c in pairs])
    for (target, condition), found in zip(pairs, many, strict=True):
        same(found, explain(NET, X, target, condition=condition), 1e-12)


def test_entries_must_be_in_all_parts_and_masks_may_weigh() -> None:
    both = explain(NET, X, 1, condition={"1": [Part([1, 2]), Part([0, 1], axis=2)]})
    mask = torch.zeros(4, 5, 1, dtype=torch.bool)
    mask[1:3, :2] = True
    same(both, explain(NET, X, 1, condition={"1": mask}))
    half = explain(NET, X, 1, composite="attnlrp", condition={"1": torch.full((1, 1, 1), 0.5)})
    close(half.relevance, explain(NET, X, 1, composite="attnlrp").relevance / 2)
    assert half.ledger.closes


class Twice(nn.Module):
    """One module that runs twice, on pictures of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu()).flatten(1)


def test_every_call_of_a_module_is_conditioned() -> None:
    torch.manual_seed(1)
    model = Twice().double()
    apart = nn.Sequential(model.conv, nn.ReLU(), nn.Conv2d(2, 2, 3, bias=False), nn.Flatten()).double()
    apart[2].weight = model.conv.weight
    target = int(model(X[:1]).abs().argmax())
    one = explain(model, X[:1], target, condition={"conv": 0})
    same(one, explain(apart, X[:1], target, condition={"0": 0, "2": 0}))


def test_a_glob_is_for_one_kind_of_tensor() -> None:
    """Outputs are no inputs, even where both are asked for."""
    plain = explain(NET, X, 2, condition={"[02]": [0]})
    same(explain(NET, X, 2, condition={"[02]": [0]}, layers=["2:input", "5:input"]), plain, 1e-12)
    other = explain(NET, X, 2, condition={"[02]": [0], "2:input": [1]})
    assert not other.relevance.any()


def test_channels_are_found_by_structure() -> None:
    """Axis 1 behind convolutions, the last behind dense layers, wherever they stand now."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.series = nn.Conv1d(2, 6, 3)
            self.act = nn.ReLU()
            self.tokens = nn.Linear(6, 7)
            self.norm = nn.LayerNorm(7)
            self.back = nn.Identity()
            self.grid = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.tokens(self.act(self.series(x)).mT))
            h = h + self.back(h.mT * 2).mT
            return self.grid(h.reshape(len(h), 2, 2, 7)).sum((1, 2))

    names = ["series", "act", "tokens", "norm", "back", "grid"]
    explanation = explain(Mixed().double(), oracle.draw(0, 3, 2, 6), 0, layers=names)
    assert [explanation.axes[name] for name in names] == [1, 1, 2, 2, 1, 3]
    assert explanation.by_channel("back").shape == (3, 7)


def test_relevance_by_channel() -> None:
    explanation = explain(NET, X, 2, layers=["1", "1:input", "5"])
    r = explanation.layers["1"]
    close(explanation.by_channel("1"), r.sum((2, 3)))
    close(explanation.by_channel("1", axis=-1), r.sum((1, 2)))
    close(explanation.by_channel("5"), explanation.layers["5"])
    ranking = explanation.rank("1", top=2)
    assert ranking.channels.shape == (2, 2)
    for row, (channels, amounts) in zip(r.sum((2, 3)), zip(*ranking, strict=True), strict=True):
        assert max(row.abs().tolist()) == abs(float(amounts[0]))
        close(row[channels], amounts)
    with pytest.raises(InputError, match="no axis 4"):
        explanation.by_channel("1", axis=4)
    with pytest.raises(InputError, match="no relevance of 'nothing'"):
        explanation.by_channel("nothing")


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"1": [4]}, "has 4 entries along axis 1"),
        ({"1": "2"}, "must be channel numbers"),
        ({"1": [True]}, "must be channel numbers"),
        ({"1": [0, Part(1)]}, "must be channel numbers"),
        ({"1": Part(0, axis=4)}, "no axis 4"),
        ({"1": torch.ones(3, 1, 1)}, "does not broadcast"),
        ({"seven": [0]}, "no module is called 'seven'"),
        ({"1:heads": [0]}, "no tensor of an attention is called '1:heads'"),
        ({"1:output": [0]}, "behind a colon"),
    ],
)
def test_conditions_that_do_not_fit(condition: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        explain(NET, X, 0, condition=condition)


def test_a_condition_where_no_relevance_passes_is_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    with pytest.raises(InputError, match="no relevance passes"):
        explain(Aside(), torch.randn(1, 3), 0, condition={"unused": [0]})
    with pytest.raises(InputError, match="2 targets do not pair with 3 conditions"):
        explain_many(NET, X, [0, 1], conditions=[{}, {}, {}])


class Times(nn.Module):
    """A module whose output is a tensor of its own in any case."""

    def forward(self, x: Any) -> Any:
        return x * 1.0


class Both(nn.Module):
    """Returns what it was given beside something that it made."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.detach()


class Shortcut(nn.Module):
    def __init__(self, shortcut: nn.Module, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.shortcut, self.inplace = shortcut, inplace
        self.seen: list[Tensor] = []
        peers.randomise(self, 3)
        shortcut.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        beside = self.second(h).relu()
        passed = self.shortcut(h)
        passed = passed[0] if isinstance(passed, tuple) else passed
        if self.inplace:
            passed += beside
            return self.head(passed.relu_())
        return self.head((passed + beside).relu())


SHORTCUTS = {
    "identity": nn.Identity,
    "empty": nn.Sequential,
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "flatten": nn.Flatten,
    "nested": lambda: nn.Sequential(nn.Identity(), nn.Sequential()),
    "tuple": Both,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_a_module_that_returns_what_it_was_given(kind: str, composite: str, inplace: bool) -> None:
    """Its output is what goes through it, not all that uses the tensor."""
    x = oracle.draw(1, 2, 3)
    model, apart = (Shortcut(m, inplace).double() for m in (SHORTCUTS[kind](), Times()))  # type: ignore[operator]
    options: dict[str, Any] = {"composite": composite, "layers": ["shortcut", "shortcut:input", "second"]}
    for condition in (None, {"shortcut": [1, 2]}, {"shortcut": 0, "second": 3}):
        found, expected = (explain(m, x, 1, condition=condition, **options) for m in (model, apart))
        same(found, expected, 1e-12)
        assert torch.equal(found.value, model(x)[:, 1])
        for name, layer in expected.layers.items():
            close(found.layers[name], layer, 1e-12)
        if condition is None:
            assert not torch.allclose(found.layers["shortcut"], found.layers["shortcut:input"])
    assert all(type(output) is type(model.seen[-1]) for output in model.seen)


def test_a_module_that_returns_a_parameter() -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self) -> Tensor:
            return self.weight

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.head = Prompt(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.prompt() + self.prompt.weight)

    model = peers.randomise(Net(), 2).double()
    x = oracle.draw(1, 2, 4)
    explanation = explain(
        model, x, 1, composite="attnlrp", layers="prompt", parameters="prompt.*", condition={"prompt": 2}
    )
    assert explanation.ledger.closes
    w, m = model.prompt.weight.detach(), model.head.weight.detach()[1]  # type: ignore[union-attr]
    only = torch.zeros(4).double().index_fill_(0, torch.tensor([2]), 1.0)
    close(explanation.parameters["prompt.weight"], w * m * len(x) + only * (x * w * m).sum(0), 1e-12)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], used: str) -> None:
        super().__init__()
        self.cell, self.used = kind(3, 4, batch_first=True), used
        self.states, self.last = Times(), Times()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.cell(x)
        last = last[0] if isinstance(last, tuple) else last
        states, last = self.states(states), self.last(last)
        return self.head((states.mean(1) if "states" in self.used else 0) + (last[-1] if "last" in self.used else 0))


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_all_that_a_module_returns_is_conditioned(kind: type[nn.Module], composite: str) -> None:
    x = oracle.draw(1, 2, 3, 3)
    model = peers.randomise(Recurrent(kind, "states last"), 5).double()

    def found(**condition: Any) -> Any:
        return explain(
            model, x, 1, composite=composite, condition={k.replace("_", ":"): v for k, v in condition.items()}
        )

    same(found(cell=[1, 3]), found(states=[1, 3], last=[1, 3]), 1e-12)
    same(found(cell_0=[1, 3]), found(states=[1, 3]), 1e-12)
    same(found(cell_1=[1, 3]), found(last=[1, 3]), 1e-12)
    assert not torch.allclose(found(cell=1).relevance, found(cell_0=1).relevance)
    layers = explain(model, x, 1, composite=composite, layers=["cell", "cell:0", "cell:1", "states", "last"]).layers
    close(layers["cell"], layers["states"])
    close(layers["cell:0"], layers["states"])
    close(layers["cell:1"], layers["last"])
    one = peers.randomise(Recurrent(kind, "last"), 5).double()
    same(*(explain(one, x, 1, composite=composite, condition={name: [1, 3]}) for name in ("cell", "last")), 1e-12)
    with pytest.raises(InputError, match="there is no 'cell:7'"):
        explain(model, x, 1, layers="cell:7")
    second = explain(model, x, 1, composite=composite, layers="*:1").layers
    close(second["cell:1"], layers["last"])
    assert second["head:1"] is None


def test_outputs_with_no_channels_in_common_must_be_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.mix = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            weights = (self.project(x) @ y.mT).softmax(-1)
            return self.mix(weights @ x), weights.unsqueeze(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = Attention(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            mixed, weights = self.attention(x * 1.5, y=x * 2)
            return self.head(mixed).mean(1) + weights[..., 1:].mean((1, 2, 3))[:, None]

    model, x = peers.randomise(Net(), 1).double(), oracle.draw(1, 2, 3, 4)
    with pytest.raises(InputError, match=r"no channels in common: \(2, 3, 4\), \(2, 1, 3, 3\).*'attention:0' or"):
        explain(model, x, 1, condition={"attention": [0]})
    named = explain(model, x, 1, condition={"attention:0": [0], "attention:1": Part([1, 2], axis=-1)})
    only = explain(model, x, 1, condition={"attention:0": [0]})
    same(named, only, 1e-12)  # nothing passes the weights' first column
    assert named.ledger.closes
    both = explain(model, x, 1, condition={"attention:input": [1]})
    same(both, explain(model, x, 1, condition={"attention:input:0": [1], "attention:input:1": [1]}))
    first = explain(model, x, 1, condition={"attention:input:0": [1]})
    assert not torch.allclose(first.relevance, both.relevance)


@pytest.mark.parametrize("written", ["output", "input"])
def test_one_memory_under_two_names(written: str) -> None:
    """Written to under one name and read under the other, as only a module that returns what it was given allows."""

    class Net(nn.Module):
        def __init__(self, after: bool) -> None:
            super().__init__()
            self.first, self.short, self.head, self.after = nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2), after

        def forward(self, x: Tensor) -> Tensor:
            given = self.first(x)
            output = self.short(given)
            pair = [given, output]
            changed, other = pair[::-1] if written == "output" else pair
            before = other * 2
            changed += 1
            return self.head(before + (other if self.after else changed))

    x = oracle.draw(1, 2, 3)
    model = peers.randomise(Net(after=True), 1).double()
    assert explain(model, x, 1).ledger.closes
    with pytest.raises(InputError, match="'short' returns a tensor whose memory has another name"):
        explain(model, x, 1, layers="short")
    fine = peers.randomise(Net(after=False), 1).double()
    close(explain(fine, x, 1, layers="short").relevance, explain(fine, x, 1).relevance, 1e-12)

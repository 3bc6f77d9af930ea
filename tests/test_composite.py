"""Composites: which rule a place gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import COMPOSITES, Composite, InputError, When, epsilon_gamma_box, explain
from dynlrp.composite import Site, composite_named
from dynlrp.rules import (
    AlphaBeta,
    Attention,
    Epsilon,
    Flat,
    Gamma,
    Hold,
    Magnitude,
    Pass,
    Rule,
    Ungated,
    WSquare,
    ZBox,
    ZPlus,
)
from tests.conftest import close, gradient_x_input, same, sample
from tests.peers import models as peers

SITE = Site("dense", "MmBackward0", frozenset(), ("", "encoder", "encoder.layer.1.fc"), first=False, last=True)
X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_names_of_the_specification() -> None:
    names = {
        "epsilon", "epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1", "epsilon_plus_flat", "attnlrp", "cplrp",
        "dynamiclrp", "gradient_x_input", "auto",
    }  # fmt: skip
    assert names <= set(COMPOSITES)
    for name, composite in COMPOSITES.items():
        assert composite.name == name
        assert composite_named(name) is composite
        assert composite_named(composite) is composite
        assert hash(composite) == hash(Composite(composite.name, composite.entries))


@pytest.mark.parametrize("name", ["", "Auto", "lrp", None, 3, ["auto"]])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(InputError, match="epsilon_plus"):
        composite_named(name)  # type: ignore[arg-type]


CONDITIONS: list[tuple[When, bool]] = [
    (When(), True),
    (When("dense"), True),
    (When("convolution"), False),
    (When(name="MmBackward0"), True),
    (When(name="Mm"), False),
    (When(path="encoder.*"), True),
    (When(path="*.fc"), True),
    (When(path="encoder"), False),
    (When(path="encoder.layer.?.fc"), True),
    (When(path="ENCODER.*"), False),
    (When(first=True), False),
    (When(first=False), True),
    (When(last=True), True),
    (When("dense", last=True, path="*1*"), True),
    (When("dense", last=False, path="*1*"), False),
    (When(role="attention"), False),
]


@pytest.mark.parametrize(("when", "holds"), CONDITIONS)
def test_conditions(when: When, holds: bool) -> None:
    assert when(SITE) is holds


def test_roles_are_conditions() -> None:
    assert When(role="gate")(SITE._replace(roles=frozenset({"gate"})))
    assert not When(role="gate")(SITE._replace(roles=frozenset({"attention"})))


def test_the_first_entry_that_holds_wins() -> None:
    composite = Composite.of("mine", {When("dense", last=True): Flat(), "dense": ZPlus(), When(): WSquare()})
    assert composite.pick(SITE) == Flat()
    assert composite.pick(SITE._replace(last=False)) == ZPlus()
    assert composite.pick(SITE._replace(family="convolution")) == WSquare()
    assert Composite("none").pick(SITE) is None
    assert composite.positional
    assert not composite.by_path
    assert Composite.of("paths", {When(path="*"): Flat()}).by_path


def test_rules_and_composites_are_plain_data() -> None:
    assert Composite.of("a", {"dense": Gamma(0.5)}) == Composite("a", ((When("dense"), Gamma(0.5)),))
    assert Gamma(0.5) != Gamma(0.25)
    assert len({Gamma(0.5), Gamma(0.5), ZPlus(), Pass(), Hold(), Ungated(), Attention(), Magnitude(), ZBox()}) == 8
    with pytest.raises(FrozenInstanceError):
        Gamma(0.5).gamma = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="alpha"):
        AlphaBeta(2.0, 2.0)


def dense() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return peers.randomise(model, 3).double()  # type: ignore[return-value]


def flat(relevance: Tensor) -> bool:
    """Whether every input of a sample has the same relevance, as after the flat rule."""
    return bool(torch.allclose(relevance, relevance[:, :1].expand_as(relevance), rtol=1e-9, atol=1e-12))


@pytest.mark.parametrize(
    ("when", "layer"),
    [
        (When("dense", first=True), 0),
        (When(path="0"), 0),
        (When(path="[0]"), 0),
        (When(path="2"), 2),
        (When("dense", last=True), 4),
        (When(path="4", name="AddmmBackward0"), 4),
        (When("dense", first=False, last=False), 2),
    ],
)
def test_a_rule_reaches_its_place_and_no_other(when: When, layer: int) -> None:
    model = dense()
    composite = Composite.of("mine", {when: Flat(), "dense": Epsilon(1e-9)})
    inputs = [""] + [str(i) for i in range(4)]
    explanation = explain(model, X, 1, composite=composite, layers=inputs[1:])
    arriving = {0: explanation.relevance, 2: explanation.layers["1"], 4: explanation.layers["3"]}
    assert {number: flat(relevance) for number, relevance in arriving.items()} == {n: n == layer for n in arriving}
    assert explanation.ledger.closes


def test_first_and_last_with_branches() -> None:
    """Two stems and two heads: each is the first, or last, of its branch."""
    layers = [peers.randomise(nn.Linear(4, 4), n).double() for n in range(5)]

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.middle, self.c, self.d = layers

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.middle(self.a(x).relu() + self.b(y).relu()).relu()
            return self.c(h) + self.d(h).relu()

    y = X.flip(0)
    first = explain(Branches(), (x := X, y), 1, composite=Composite.of("f", {When("dense", first=True): Flat()}))
    assert all(flat(r) for r in first.relevance)
    last = Composite.of("l", {When("dense", last=True): WSquare()})
    paths = Composite.of("p", {When(path="c"): WSquare(), When(path="d"): WSquare()})
    same(explain(Branches(), (x, y), 1, composite=last), explain(Branches(), (x, y), 1, composite=paths))


def test_epsilon_is_attnlrp_and_auto_differs_on_convolutions_alone() -> None:
    for name in ("bert", "gpt2", "llama", "minilm"):
        model, inputs, target = sample(name)
        reference = explain(model, inputs, target, composite="attnlrp")
        same(explain(model, inputs, target, composite="epsilon"), reference)
        same(explain(model, inputs, target), reference)
    model, inputs, _ = sample("resnet")
    gamma = Composite.of("gamma", {"convolution": Gamma(1.0)})
    same(explain(model, inputs, 1), explain(model, inputs, 1, composite=gamma))
    assert not torch.allclose(
        explain(model, inputs, 1).relevance, explain(model, inputs, 1, composite="attnlrp").relevance
    )


def test_the_box_of_the_first_layer() -> None:
    model, inputs, _ = sample("vgg")
    assert COMPOSITES["epsilon_gamma_box"] == epsilon_gamma_box()
    wide = explain(model, inputs, 1, composite=epsilon_gamma_box(-10.0, 10.0))
    per_sample = explain(model, inputs, 1, composite="epsilon_gamma_box")
    assert not torch.allclose(wide.relevance, per_sample.relevance)
    bounds = [
        explain(
            model, inputs[i : i + 1], 1,
            composite=epsilon_gamma_box(float(inputs[i].min()), float(inputs[i].max())),
        ).relevance
        for i in range(2)
    ]  # fmt: skip
    close(per_sample.relevance, torch.cat(bounds), 1e-10)


# Roles ------------------------------------------------------------------------------------------------------

Q, K, V = (peers.randomise(nn.Linear(4, 4, bias=False), n).double() for n in (1, 2, 3))
SENTENCE = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def attention(x: Tensor, weights: Tensor | None = None) -> Tensor:
    weights = (Q(x) @ K(x).mT / 2).softmax(-1) if weights is None else weights
    return (weights @ V(x)).flatten(1)


def test_cplrp_holds_the_attention_weights() -> None:
    weights = (Q(SENTENCE) @ K(SENTENCE).mT / 2).softmax(-1).detach()
    (expected,) = gradient_x_input(lambda x: attention(x, weights)[:, 5], SENTENCE)
    close(explain(attention, SENTENCE, 5, composite="cplrp").relevance, expected)


def test_attnlrp_halves_products_and_takes_softmax_by_its_gradient() -> None:
    """Queries and keys get a quarter of the gradient each, values half: an independent graph with scaled gradients."""

    def scaled(t: Tensor, factor: float) -> Tensor:
        return t.detach() + factor * (t - t.detach())

    def model(x: Tensor) -> Tensor:
        scores = scaled(Q(x), 0.25) @ scaled(K(x).mT, 0.25) / 2
        return (scores.softmax(-1) @ scaled(V(x), 0.5)).flatten(1)

    (expected,) = gradient_x_input(lambda x: model(x)[:, 5], SENTENCE)
    close(explain(attention, SENTENCE, 5, composite="attnlrp").relevance, expected)


@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, F.gelu, torch.tanh])
def test_gates(function: Callable[[Tensor], Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        return (function(Q(x)) * K(x)).flatten(1)

    g = function(Q(SENTENCE)).detach()
    (ungated,) = gradient_x_input(lambda x: (g * K(x)).flatten(1)[:, 5], SENTENCE)
    close(explain(model, SENTENCE, 5, composite="cplrp").relevance, ungated)
    zero = function(torch.zeros(1, dtype=torch.float64))
    secant = ((g - zero) / Q(SENTENCE)).detach()
    k = K(SENTENCE).detach()
    (through,) = gradient_x_input(lambda x: (secant * Q(x) * k).flatten(1)[:, 5], SENTENCE)
    close(explain(model, SENTENCE, 5, composite="attnlrp").relevance, (ungated + through) / 2)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu tanh", "mish", "hardswish"])
def test_activations_written_out_equal_their_fused_form(name: str) -> None:
    fused = {"silu": F.silu, "gelu": F.gelu, "mish": F.mish, "hardswish": F.hardswish}
    functions = {
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "gelu tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "mish": lambda x: x * torch.tanh(F.softplus(x)),
        "hardswish": lambda x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6,
    }
    one = fused.get(name, lambda x: F.gelu(x, approximate="tanh"))
    layer = dense()
    for composite in ("attnlrp", "epsilon_plus"):
        found = explain(lambda x: functions[name](layer(x)), X, 1, composite=composite)
        close(found.relevance, explain(lambda x: one(layer(x)), X, 1, composite=composite).relevance, 1e-9)


def test_dynamiclrp_splits_sums_by_magnitude() -> None:
    a, b = torch.tensor([[2.0, -3.0]]), torch.tensor([[-1.0, 1.0]])
    found = explain(lambda a, b: a + b, (a, b), 0, composite="dynamiclrp").relevance
    close(found[0], torch.tensor([[2 / 3, 0.0]]), 1e-6)
    close(found[1], torch.tensor([[1 / 3, 0.0]]), 1e-6)
    for rule, expected in ((Magnitude(), 2 / 3), (None, 2.0)):
        rules: dict[str | When, Rule] = {} if rule is None else {"addition": rule}
        relevance = explain(lambda a, b: a + b, (a, b), 0, composite=Composite.of("mine", rules)).relevance[0]
        assert float(relevance.sum()) == pytest.approx(expected, rel=1e-6)

"""The ledger: every unit of the output is in exactly one account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import COMPOSITES, Composite, Explanation, explain, rules
from dynlrp.ledger import ACCOUNTS
from dynlrp.rules import AlphaBeta, Epsilon, EpsilonSum, Flat, Gamma, Rule, WSquare, ZBox, ZPlus
from tests.conftest import SAMPLES, Sample, close, sample
from tests.oracle import draw
from tests.peers import models as peers

CONSERVING = [name for name in COMPOSITES if name != "gradient_x_input"]
FAST = [name for name in SAMPLES if name != "efficientnet"]


def adds_up(explanation: Explanation, tolerance: float) -> None:
    ledger = explanation.ledger
    amounts = ledger.accounts
    assert tuple(amounts) == ACCOUNTS
    assert ledger.unresolved == []
    assert ledger.fallbacks == []
    largest = max(abs(a) for a in [ledger.output, *amounts.values()])
    assert abs(ledger.output - float(explanation.value.sum())) <= tolerance * largest
    inputs = sum(float(r.double().sum()) for r in explanation.tensors())
    assert abs(amounts["inputs"] - inputs) <= tolerance * largest
    assert abs(ledger.output - sum(amounts.values())) <= tolerance * largest, ledger
    assert ledger.closes
    for groups in (ledger.by_operation(), ledger.by_module()):
        for account, amount in amounts.items():
            part = sum(a for (name, _), a in groups.items() if name == account)
            assert abs(part - amount) <= 1e-9 * largest


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", CONSERVING)
@pytest.mark.parametrize("name", FAST)
def test_closes_in_float64(name: str, composite: str, frozen: bool) -> None:
    model, inputs, target = sample(name)
    model.requires_grad_(not frozen)
    adds_up(explain(model, inputs, target, composite=composite), 1e-10)


@pytest.mark.parametrize("composite", ["epsilon", "auto", "epsilon_plus", "dynamiclrp"])
def test_closes_in_float64_in_a_large_net(composite: str) -> None:
    test_closes_in_float64("efficientnet", composite, False)


def test_a_model_of_float64_that_computes_in_float32_closes_to_that() -> None:
    """Llama's norms do, whatever the model's dtype."""
    inputs = {"input_ids": peers.token_ids()}
    explanation = explain(peers.llama().double(), inputs, (-1, 3))
    assert explanation.value.dtype is torch.float64
    assert 1e-10 < explanation.ledger.error < 1e-5
    assert explanation.ledger.tolerance == 1e-4
    layer = nn.Linear(4, 3).double()
    x = torch.randn(2, 4)
    assert explain(lambda x: layer(x.double()), x, 1).ledger.tolerance == 1e-4  # its relevance is of float32
    assert explain(layer, x.double(), 1).ledger.tolerance == 1e-10


_single: dict[str, Sample] = {}


@pytest.mark.parametrize("composite", CONSERVING)
@pytest.mark.parametrize("name", FAST)
def test_closes_in_float32(name: str, composite: str) -> None:
    if name not in _single:
        made = SAMPLES[name]()
        model = peers.randomise(made.model, 9, 0.25 if isinstance(made.inputs, dict) else None).float()
        inputs = made.inputs if isinstance(made.inputs, dict) else made.inputs.float()
        _single[name] = Sample(model, inputs, made.target)
    model, inputs, target = _single[name]
    adds_up(explain(model, inputs, target, composite=composite), 1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_closes_with_attention_written_out_and_masked(name: str) -> None:
    build: dict[str, Any] = peers.TRANSFORMERS
    model = build[name]()
    model.set_attn_implementation("eager")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    for composite in ("attnlrp", "cplrp", "epsilon_plus"):
        explanation = explain(
            model, {"input_ids": peers.token_ids(), "attention_mask": mask}, None if name == "bert" else (-1, 3),
            composite=composite,
        )  # fmt: skip
        adds_up(explanation, 1e-4)


# Where things go --------------------------------------------------------------------------------------------

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LAYER = peers.randomise(nn.Linear(4, 3), 1).double()


def account(explanation: Explanation, name: str) -> float:
    return explanation.ledger.accounts[name]


@pytest.mark.parametrize("frozen", [False, True])
def test_biases_are_parameters(frozen: bool) -> None:
    layer = peers.randomise(nn.Linear(4, 3), 1).double().requires_grad_(not frozen)
    explanation = explain(layer, X, 2)
    adds_up(explanation, 1e-14)
    assert account(explanation, "parameters") == pytest.approx(2 * float(layer.bias[2]), rel=1e-12)
    assert explanation.ledger.by_operation()["parameters", "AddmmBackward0"] == account(explanation, "parameters")


def test_places_are_module_paths() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3))).double()
    explanation = explain(model, X, 2)
    modules = explanation.ledger.by_module()
    assert modules["parameters", "2.0"] == pytest.approx(2 * float(model[2][0].bias[2]), rel=1e-12)
    assert set(modules) == {("parameters", "0"), ("parameters", "2.0"), ("inputs", "")}


OFFSETS: dict[str, tuple[Callable[[Tensor], Tensor], str, float]] = {
    "exp": (torch.exp, "offsets", 2.0),
    "sigmoid": (torch.sigmoid, "offsets", 1.0),
    "cos": (torch.cos, "offsets", 2.0),
    "gelu": (F.gelu, "offsets", 0.0),
    "relu": (torch.relu, "constants", 0.0),
    "plus one": (lambda x: x + 1.0, "constants", 2.0),
    "one minus": (lambda x: 1.0 - x, "constants", 2.0),
    "minus a tensor": (lambda x: x - torch.full((4,), 0.5, dtype=x.dtype), "constants", -1.0),
    "masked fill": (lambda x: x.masked_fill(x > -10, 3.0) + x, "constants", 6.0),
    "where": (lambda x: torch.where(x > -10, 2.0, x) + x, "constants", 4.0),
    "padded": (lambda x: F.pad(x, (1, 0), value=5.0)[:, :2] + x[:, :1], "constants", 0.0),
    "padding explained": (lambda x: F.pad(x, (1, 1), value=5.0)[:, [5, 5, 5]] + x[:, :1], "constants", 10.0),
    "cat with ones": (
        lambda x: torch.cat([torch.ones_like(x), x], 1)[:, [2, 2, 2]] + x[:, :1],
        "constants",
        2.0,
    ),
    "stack": (lambda x: torch.stack([torch.ones_like(x), x]).sum(0), "constants", 2.0),
    "clamp": (lambda x: x.clamp(min=1.0, max=1.5), "offsets", 2.0),
    "maximum with a constant": (lambda x: torch.maximum(x, torch.full_like(x, 9.0)) + x, "constants", 18.0),
    "an in-place constant": (lambda x: (x * 1.0).add_(2.0), "constants", 4.0),
    "bmm with a constant": (
        lambda x: torch.baddbmm(torch.ones(1, 1, 1, dtype=x.dtype), x[None], torch.eye(4, dtype=x.dtype)[None])[0],
        "constants",
        2.0,
    ),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_constants_and_offsets(name: str) -> None:
    function, where, amount = OFFSETS[name]
    explanation = explain(lambda x: function(x), X, 2 if name != "padded" else 1)
    adds_up(explanation, 1e-12)
    assert account(explanation, where) == pytest.approx(amount, abs=1e-12)


SINGLE: list[Rule] = [
    Epsilon(0.1), Epsilon(0.1, bias=False), Gamma(0.3), Gamma(0.3, epsilon=0.1), Gamma(0.3, signed=False),
    AlphaBeta(2.0, 1.0), AlphaBeta(1.0, 0.0), ZPlus(), ZPlus(bias=False), ZBox(-3.0, 3.0), ZBox(), WSquare(), Flat(),
    Flat(bias=True),
]  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rule", SINGLE, ids=repr)
@pytest.mark.parametrize("name", ["dense", "vgg", "conv_bn", "conv1d", "mixed_conv"])
def test_every_linear_rule_closes(name: str, rule: Rule, frozen: bool) -> None:
    model = peers.build(name, peers.NETWORKS).requires_grad_(not frozen)
    x = peers.inputs(peers.NETWORKS[name][1], 3)
    adds_up(explain(model, x, 2, composite=Composite.of("one", {"dense": rule, "convolution": rule})), 1e-10)


def test_a_large_stabiliser_shows_as_absorbed() -> None:
    layer = peers.randomise(nn.Linear(4, 3, bias=False), 1).double()
    explanation = explain(layer, X, 2, composite=Composite.of("one", {"dense": Epsilon(0.5)}))
    z = layer(X)[:, 2].detach()
    expected = float((z - z * z / torch.where(z < 0, z - 0.5, z + 0.5)).sum())
    assert account(explanation, "absorbed") == pytest.approx(expected, rel=1e-12)
    adds_up(explanation, 1e-12)


def test_stabilised_sums_close() -> None:
    model, inputs, _ = sample("resnet")
    adds_up(explain(model, inputs, 2, composite=Composite.of("sum", {"addition": EpsilonSum(0.1)})), 1e-10)


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "-inf added": lambda s: s + torch.full((3, 3), -torch.inf, dtype=s.dtype).triu(1),
    "-inf filled": lambda s: s.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf),
    "where": lambda s: torch.where(torch.ones(3, 3).tril().bool(), s, -torch.inf),
    "lowest": lambda s: s + torch.full((3, 3), torch.finfo(s.dtype).min, dtype=s.dtype).triu(1),
}


def attend(how: str) -> Callable[[Tensor], Tensor]:
    """Causal attention of one head, written out."""
    q, k, v = (peers.randomise(nn.Linear(4, 4), n).double() for n in (1, 2, 3))

    def model(x: Tensor) -> Tensor:
        if how == "fused":
            return F.scaled_dot_product_attention(q(x), k(x), v(x), is_causal=True).flatten(1)
        scores = MASKED[how](q(x) @ k(x).transpose(1, 2) / 2)
        return (scores.softmax(-1) @ v(x)).flatten(1)

    return model


SENTENCE = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("how", MASKED)
def test_masked_scores_stay_finite(how: str, composite: str) -> None:
    found = explain(attend(how), SENTENCE, 7, composite=composite)
    fused = explain(attend("fused"), SENTENCE, 7, composite=composite)
    close(found.relevance, fused.relevance, 1e-10)
    for name, amount in fused.ledger.accounts.items():
        assert account(found, name) == pytest.approx(amount, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp", "dynamiclrp"])
@pytest.mark.parametrize("how", MASKED)
def test_masked_scores_close(how: str, composite: str) -> None:
    explanation = explain(attend(how), SENTENCE, 7, composite=composite)
    assert bool(torch.isfinite(explanation.relevance).all())
    adds_up(explanation, 1e-10)


@pytest.mark.parametrize("name", ["vgg", "conv_bn", "bert", "gpt2", "llama"])
def test_gradient_x_input_books_what_it_loses(name: str) -> None:
    model, inputs, target = sample(name)
    ledger = explain(model, inputs, target, composite="gradient_x_input").ledger
    assert ledger.unresolved == []
    assert ledger.error < 1e-10, ledger


def test_fallbacks_are_listed_and_booked() -> None:
    class Triple(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 3 * ctx.saved_tensors[0] ** 2

    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Triple.apply(x)

    model = nn.Sequential(LAYER, Cube(), nn.ReLU())
    ledger = explain(model, X, lambda y: y.sum(1), on_unknown="gradient").ledger
    assert ledger.fallbacks == [("TripleBackward", "1")]
    assert "TripleBackward" in repr(ledger)
    assert ledger.closes
    # The derivative of x ** 3, times x, is three times too much.
    passed = LAYER(X).clamp(min=0).pow(3).sum()
    assert ledger.accounts["held back"] == pytest.approx(-2 * float(passed), rel=1e-10)


def test_constants_of_the_target_are_constants() -> None:
    explanation = explain(LAYER, X, lambda y: torch.where(y > 0, y, 0.5).sum(1) + 3.0)
    adds_up(explanation, 1e-12)
    replaced = int((LAYER(X) <= 0).sum())
    assert replaced
    assert account(explanation, "constants") == pytest.approx(0.5 * replaced + 2 * 3.0, rel=1e-12)


def test_repr_shows_every_account() -> None:
    text = repr(explain(LAYER, X, 2).ledger)
    for name in (*ACCOUNTS, "output", "residual", "closes"):
        assert name in text
    assert "NOT" not in text


def test_a_ledger_that_does_not_close_says_so(registry: Any) -> None:
    rules.rule("TanhBackward0", family="elementwise")(lambda step, grads: [grads[0] * 2])
    ledger = explain(lambda x: LAYER(x).tanh(), X, 2).ledger
    assert not ledger.closes
    assert ledger.error > 0.01
    assert "does NOT close" in repr(ledger)
    assert ledger.residual == pytest.approx(ledger.output - sum(ledger.accounts.values()))


@pytest.mark.parametrize("learned", [False, True])
def test_masks_of_infinity_may_be_parameters(learned: bool) -> None:
    """Their relevance is 0, as is their multiplier."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.full((3, 3), -torch.inf).triu(1).double(), requires_grad=learned)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT + self.mask).softmax(-1) @ x

    explanation = explain(Masked(), draw(3, 2, 3, 4), lambda y: y.sum((1, 2)), composite="attnlrp")
    assert explanation.ledger.closes
    assert bool(torch.isfinite(explanation.relevance).all())


def test_a_small_leaf_keeps_no_large_tensor() -> None:
    """The multiplier of a class token is a slice of that of all tokens, which is not kept until somebody reads."""
    token, x = nn.Parameter(draw(0, 1, 1, 4)), draw(1, 1, 5000, 4)
    ledger = explain(lambda x: torch.cat([token, x], 1).square().sum((1, 2), keepdim=True), x).ledger
    kept = [m for multipliers, *_ in ledger._kept for m in multipliers]
    assert [m.shape for m in kept] == [token.shape]
    assert kept[0].untyped_storage().nbytes() <= 2 * token.numel() * 8
    assert ledger.closes


class Leaks(torch.autograd.Function):
    """Loses a thousandth of all relevance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_amounts_that_cancel(seed: int, dtype: torch.dtype, registry: Any) -> None:
    """An output of 0 closes to the rounding of what it is a sum of, and a leak shows all the same."""
    rules.linear_operation("LeaksBackward")
    first, second = (peers.randomise(nn.Linear(n, m, bias=False), seed).to(dtype) for n, m in ((32, 64), (64, 1)))
    model = nn.Sequential(first, nn.ReLU(), second)
    x = draw(seed, 4, 32).to(dtype)
    y = model(x).detach()
    start = torch.ones_like(y)
    start[3] = -y[:3].sum() / y[3]
    batch = explain(model, x, start * y)  # the samples cancel
    assert abs(batch.ledger.output) < 1e-5
    assert batch.ledger.closes
    with torch.no_grad():
        first.weight[:, 0] -= first.weight @ x[0] / x[0, 0]
    one = explain(lambda x: second(first(x)), x[:1], 0)  # the inputs of a sample cancel
    assert abs(float(one.value)) < 1e-4
    assert float(one.relevance.abs().sum()) > 1.0
    assert one.ledger.closes
    leaking = explain(lambda x: second(Leaks.apply(first(x)).relu()), x, 0)
    assert not leaking.ledger.closes

"""Products and quotients of signals: gates, squares, activations written out."""

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
from dynlrp.rules import Shares, Ungated
from tests.oracle import agrees, draw, number, same
from tests.test_elementwise import of_family

SEEDS = st.integers(0, 2**32 - 1)


def test_no_product_is_forgotten() -> None:
    """Of single elements; matrices that divide, and weights by their norm, are tested with their like."""
    assert of_family("product", "quotient") == {"MulBackward0", "DivBackward0", "DivBackward2"}


@given(seed=SEEDS)
def test_two_signals_share_equally(seed: int) -> None:
    a, b, m = draw(seed, 2, 3), draw(seed + 1, 2, 3), draw(seed + 2, 2, 3)
    half = a * b * m / 2
    agrees(explain(torch.mul, (a, b), lambda y: (y * m).sum()), [half, half], {"held back": 0.0})


@given(seed=SEEDS)
def test_broadcast_factors(seed: int) -> None:
    a, b, m = draw(seed, 2, 3), draw(seed + 1, 2, 1), draw(seed + 2, 2, 3)
    half = a * b * m / 2
    agrees(explain(torch.mul, (a, b), lambda y: (y * m).sum()), [half, half.sum(1, keepdim=True)])


@given(seed=SEEDS, left=st.floats(-1, 2))
def test_other_shares(seed: int, left: float) -> None:
    a, b, m = draw(seed, 2, 3), draw(seed + 1, 2, 3), draw(seed + 2, 2, 3)
    whole = a * b * m
    composite = Composite.of("shares", {"product": Shares(left, 1 - left)})
    explanation = explain(torch.mul, (a, b), lambda y: (y * m).sum(), composite=composite)
    agrees(explanation, [left * whole, (1 - left) * whole], scale=float(whole.abs().max()))


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("side", ["left", "right", "number", "parameter", "frozen"])
def test_a_constant_factor_leaves_all(side: str, composite: str) -> None:
    x, c = draw(0, 2, 3), draw(1, 3)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(c, side == "parameter")

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    models: dict[str, Callable[[Tensor], Tensor]] = {
        "left": lambda x: c * x, "right": lambda x: x * c, "number": lambda x: x * 3.0,
        "parameter": Scale(), "frozen": Scale(),
    }  # fmt: skip
    explanation = explain(models[side], x, torch.sum, composite=composite)
    agrees(explanation, models[side](x).detach(), {"parameters": 0.0, "constants": 0.0})


@given(seed=SEEDS, numerator=st.sampled_from(["x", "constant"]))
def test_quotients_are_linear_in_the_numerator(seed: int, numerator: str) -> None:
    x, c, m = draw(seed, 2, 3), draw(seed + 1, 3), draw(seed + 2, 2, 3)
    if numerator == "x":
        agrees(explain(lambda x: x / c, x, lambda y: (y * m).sum()), m * x / c)
        agrees(explain(lambda x: x / 0.7, x, lambda y: (y * m).sum()), m * x / 0.7)
    else:  # a coefficient, of which the rest of the output takes what it multiplies
        explanation = explain(lambda x: x + c / x, x, lambda y: (y * m).sum())
        agrees(explanation, m * x, {"held back": (m * c / x).sum()})


@given(seed=SEEDS)
def test_a_quotient_of_two_signals(seed: int) -> None:
    a, b, m = draw(seed, 2, 3), draw(seed + 1, 2, 3), draw(seed + 2, 2, 3)
    explanation = explain(lambda a, b: a / b, (a, b), lambda y: (y * m).sum())
    same(explanation.relevance[0], m * a / b)
    assert explanation.relevance[1] is None or not explanation.relevance[1].any()
    assert explanation.ledger.closes


@pytest.mark.parametrize("rounding", ["floor", "trunc"])
@pytest.mark.parametrize("divisor", ["signal", "constant", "number", "scalar"])
def test_rounded_quotients_are_coefficients(divisor: str, rounding: str) -> None:
    """A step: a factor beside it takes all. Without rounding it is a quotient like any other."""
    a, b, m = 3 * draw(0, 2, 3), draw(1, 3), draw(2, 2, 3)

    def divide(a: Tensor, b: Tensor, rounding: str | None) -> Tensor:
        if divisor == "scalar":
            return torch.ops.aten.div.Scalar_mode(a, 0.7, rounding_mode=rounding)
        return torch.div(
            a, b if divisor == "signal" else 0.7 if divisor == "number" else b.detach(), rounding_mode=rounding
        )

    y = divide(a, b, rounding)
    explanation = explain(lambda a, b: a + divide(a, b, rounding), (a, b), lambda y: (y * m).sum())
    agrees(explanation, [m * a], {"held back": (m * y).sum()})
    explanation = explain(lambda a, b: a * divide(a, b, rounding), (a, b), lambda y: (y * m).sum())
    agrees(explanation, [m * a * y], {"held back": 0.0})
    explanation = explain(lambda a, b: divide(a, b, None), (a, b), lambda y: (y * m).sum())
    agrees(explanation, [m * divide(a, b, None)], {"held back": 0.0})


# A tensor times a function of itself ------------------------------------------------------------------------


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "cplrp"])
@pytest.mark.parametrize(
    ("product", "power"), [(lambda x: x * x, 2), (lambda x: x * x * x, 3), (lambda x: (x * x) * (x * x), 4)]
)
def test_products_equal_powers(product: Callable[[Tensor], Tensor], power: int, composite: str) -> None:
    x, m = draw(0, 7), draw(1, 7)
    written = explain(product, x, lambda y: (y * m).sum(), composite=composite)
    fused = explain(lambda x: x**power, x, lambda y: (y * m).sum(), composite=composite)
    agrees(fused, m * x**power)
    agrees(written, fused.relevance, fused.ledger.accounts)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_tanh_factors(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608028654 * (1.0 + 0.044715 * x * x)))


def gelu_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), F.silu),
    "sigmoid(x) * x": (lambda x: torch.sigmoid(x) * x, F.silu),
    "x / (1 + exp(-x))": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "gelu by tanh": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "gelu by tanh, factored": (gelu_tanh_factors, lambda x: F.gelu(x, approximate="tanh")),
    "gelu by erf": (gelu_erf, F.gelu),
    "hardswish by relu6": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    "hardswish by hardsigmoid": (lambda x: x * F.hardsigmoid(x), F.hardswish),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
}


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@given(seed=SEEDS)
def test_activations_written_out_equal_fused_ones(name: str, composite: str, seed: int) -> None:
    """``x * g(x)`` passes g(x), which is the secant of the whole, whoever wrote it."""
    written, fused = ACTIVATIONS[name]
    x, m = 2 * draw(seed, 9), draw(seed + 1, 9)
    one = explain(written, x, lambda y: (y * m).sum(), composite=composite)
    two = explain(fused, x, lambda y: (y * m).sum(), composite=composite)
    # PyTorch's own fused and written forward differ by rounding.
    agrees(two, m * fused(x))
    agrees(one, two.relevance, two.ledger.accounts, 1e-12)


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@given(seed=SEEDS)
def test_quick_gelu(composite: str, seed: int) -> None:
    x, m = draw(seed, 9), draw(seed + 1, 9)
    explanation = explain(lambda x: x * torch.sigmoid(1.702 * x), x, lambda y: (y * m).sum(), composite=composite)
    agrees(explanation, m * x * torch.sigmoid(1.702 * x), {"offsets": 0.0, "held back": 0.0})


# Gates of another signal ------------------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """``activation(W x) * (V x)``, as in Llama."""

    def __init__(self, activation: Callable[[Tensor], Tensor], swapped: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, 5, bias=False).double(), nn.Linear(4, 5, bias=False).double()
        self.activation, self.swapped = activation, swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.activation(self.gate(x)), self.up(x)
        return up * gate if self.swapped else gate * up


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.tanh], ids=["silu", "gelu", "tanh"])
def test_gated_layers(activation: Callable[[Tensor], Tensor], composite: str, swapped: bool) -> None:
    """AttnLRP gives both factors half; in CP-LRP the gate is a coefficient."""
    model, x, m = GatedMLP(activation, swapped), draw(0, 3, 4), draw(1, 3, 5)
    w, v = model.gate.weight.detach(), model.up.weight.detach()
    a, up = x @ w.t(), x @ v.t()
    gate = activation(a)
    carried = m * gate
    through_gate = m * up * gate / a
    expected = x * (carried @ v) if composite == "cplrp" else x * (0.5 * carried @ v + 0.5 * through_gate @ w)
    agrees(explain(model, x, lambda y: (y * m).sum(), composite=composite), expected)


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
def test_a_sigmoid_gate(composite: str) -> None:
    """Its offset f(0) goes with its half."""
    a, b, m = draw(0, 6), draw(1, 6), draw(2, 6)
    explanation = explain(lambda a, b: a * torch.sigmoid(b), (a, b), lambda y: (y * m).sum(), composite=composite)
    if composite == "cplrp":
        same(explanation.relevance[0], m * a * torch.sigmoid(b))
        assert explanation.relevance[1] is None or not explanation.relevance[1].any()
        number(explanation.ledger.accounts["inputs"], explanation.ledger.output)
    else:
        half = 0.5 * m * a
        agrees(explanation, [half * torch.sigmoid(b), half * (torch.sigmoid(b) - 0.5)], {"offsets": 0.5 * half.sum()})


def test_ungated_everywhere_keeps_ordinary_products() -> None:
    a, b, m = draw(0, 6), draw(1, 6), draw(2, 6)
    composite = Composite.of("ungated", {"product": Ungated()})
    half = m * a * b / 2
    agrees(explain(torch.mul, (a, b), lambda y: (y * m).sum(), composite=composite), [half, half])


# Matrix products and convolutions of two signals ------------------------------------------------------------

BILINEAR: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "MmBackward0": (torch.mm, (3, 4), (4, 2)),
    "BmmBackward0": (torch.bmm, (2, 3, 4), (2, 4, 2)),
    "matmul": (torch.matmul, (2, 2, 3, 4), (2, 2, 4, 2)),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (2, 3, 4), (2, 2, 4)),
    "ConvolutionBackward0": (lambda a, b: F.conv1d(a, b, padding=1, stride=2), (2, 2, 5), (3, 2, 3)),
    "transposed": (lambda a, b: F.conv_transpose2d(a, b, stride=2), (1, 2, 3, 3), (2, 3, 2, 2)),
}


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "auto"])
@pytest.mark.parametrize("name", BILINEAR)
@given(seed=SEEDS)
def test_bilinear_operations(name: str, composite: str, seed: int) -> None:
    """Both factors depend on the inputs: each gets half its gradient, whatever the rule of linear layers is."""
    function, left, right = BILINEAR[name]
    a, b = draw(seed, *left).requires_grad_(), draw(seed + 1, *right).requires_grad_()
    m = draw(seed + 2, *function(a, b).shape)
    grads = torch.autograd.grad(function(a, b), (a, b), m)
    wanted = [x.detach() * g / 2 for x, g in zip((a, b), grads, strict=True)]
    inputs = (a.detach(), b.detach())
    agrees(explain(function, inputs, lambda y: (y * m).sum(), composite=composite), wanted)


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
@pytest.mark.parametrize("added", ["input", "parameter"])
def test_bilinear_operations_with_a_sum(name: str, added: str) -> None:
    """``beta * c + alpha * a @ b``, where c is a third input or a bias."""
    lead = (2,) if name == "baddbmm" else ()
    a, b, c = draw(0, *lead, 3, 4), draw(1, *lead, 4, 5), draw(2, *lead, 3, 5)
    function, m = getattr(torch, name), draw(3, *lead, 3, 5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(c)

        def forward(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
            return function(self.c if c is None else c, a, b, beta=0.5, alpha=-2.0)

    first = -2.0 * a * (m @ b.transpose(-1, -2)) / 2
    second = -2.0 * b * (a.transpose(-1, -2) @ m) / 2
    wanted, inputs = [first, second], (a, b)
    if added == "input":
        wanted, inputs = [*wanted, 0.5 * c * m], (a, b, c)  # type: ignore[assignment]
    bias = 0.0 if added == "input" else (0.5 * c * m).sum()
    agrees(explain(Net(), inputs, lambda y: (y * m).sum()), wanted, {"parameters": bias})


def test_one_factor_is_only_a_coefficient() -> None:
    """Weights made from the inputs, but through a statistic: the other factor takes all."""
    x, m = draw(0, 3, 4), draw(1, 3, 3)
    explanation = explain(lambda x: torch.rsqrt(x @ x.t() + 20) @ (x @ x.t().detach()), x, lambda y: (y * m).sum())
    weights = torch.rsqrt(x @ x.t() + 20)
    agrees(explanation, x * (weights.t() @ m @ x), {"held back": 0.0})


def test_rules_by_role() -> None:
    """A composite may take gates apart from other products."""
    a, b, m = draw(0, 6), draw(1, 6), draw(2, 6)
    composite = Composite.of("roles", {When("product", role="gate"): Shares(1.0, 0.0)})
    explanation = explain(lambda a, b: a * torch.tanh(b) + a * b, (a, b), lambda y: (y * m).sum(), composite=composite)
    agrees(explanation, [m * a * torch.tanh(b) + m * a * b / 2, m * a * b / 2])

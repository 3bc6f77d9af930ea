"""Elementwise functions against their secants in 50 digits, at every size of argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import Composite, explain, relevance
from dynlrp.rules import REGISTRY, Epsilon, EpsilonSum
from tests.oracle import agrees, draw, number, same

SEEDS = st.integers(0, 2**32 - 1)
mp.mp.dps = 50


class Function(NamedTuple):
    """A function in torch and in high precision, with its value at zero and a range to draw arguments from."""

    torch: Callable[[Tensor], Tensor]
    exact: Callable[[Any], Any]
    zero: float = 0.0
    low: float = -6.0
    high: float = 6.0


def _clip(low: float, high: float) -> Callable[[Any], Any]:
    return lambda x: min(max(x, mp.mpf(low)), mp.mpf(high))


def _clamp(low: float | None, high: float | None, function: Callable[..., Tensor] = torch.clamp) -> Function:
    ends = (-math.inf if low is None else low, math.inf if high is None else high)
    bounds = (low, high) if function is torch.clamp else (high if low is None else low,)
    return Function(lambda x: function(x, *bounds), _clip(*ends), min(max(0.0, ends[0]), ends[1]))


def _hardtanh(low: float, high: float) -> Function:
    return Function(lambda x: F.hardtanh(x, low, high), _clip(low, high), min(max(0.0, low), high))


def _softplus(beta: float, threshold: float = 20.0) -> Function:
    def exact(x: Any) -> Any:
        return x if beta * x > threshold else mp.log1p(mp.exp(beta * x)) / beta

    return Function(lambda x: F.softplus(x, beta, threshold), exact, math.log(2) / beta)


def _elu(alpha: float, scale: float = 1.0, inner: float = 1.0, in_place: bool = False) -> Function:
    def exact(x: Any) -> Any:
        return scale * x if x > 0 else scale * alpha * mp.expm1(inner * x)

    if in_place:
        return Function(lambda x: torch.ops.aten.elu_(x * 1, alpha, scale, inner), exact)
    return Function(lambda x: torch.ops.aten.elu(x, alpha, scale, inner), exact)


def _celu(alpha: float, in_place: bool) -> Function:
    def exact(x: Any) -> Any:
        return max(x, 0) + min(0, alpha * mp.expm1(x / alpha))

    return Function(lambda x: F.celu(x * 1 if in_place else x, alpha, in_place), exact)


def _softshrink(size: float) -> Function:
    return Function(lambda x: F.softshrink(x, size), lambda x: mp.sign(x) * max(abs(x) - size, 0))


def _logit(eps: float) -> Function:
    def exact(x: Any) -> Any:
        p = _clip(eps, 1 - eps)(x)
        return mp.log(p) - mp.log1p(-p)

    return Function(lambda x: torch.logit(x, eps), exact, math.log(eps / (1 - eps)), low=-0.5, high=1.5)


def _exponential(base: float) -> Function:
    return Function(lambda x: base**x, lambda x: mp.mpf(base) ** x, 1.0)


def _power(exponent: float) -> Function:
    low = -4.0 if exponent == int(exponent) else 0.0
    return Function(lambda x: x**exponent, lambda x: x**exponent, low=low, high=4.0)


def _gelu_tanh(x: Any) -> Any:
    return x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf(0.044715) * x**3)))


FUNCTIONS: dict[str, list[Function]] = {
    "GeluBackward0": [
        Function(F.gelu, lambda x: x * mp.ncdf(x)),
        Function(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh),
    ],
    "SiluBackward0": [Function(F.silu, lambda x: x / (1 + mp.exp(-x)))],
    "HardswishBackward0": [Function(F.hardswish, lambda x: x * _clip(0, 6)(x + 3) / 6)],
    "MishBackward0": [Function(F.mish, lambda x: x * mp.tanh(mp.log1p(mp.exp(x))))],
    "TanhBackward0": [Function(torch.tanh, mp.tanh)],
    "SinBackward0": [Function(torch.sin, mp.sin)],
    "TanBackward0": [Function(torch.tan, mp.tan, low=-1.4, high=1.4)],
    "SinhBackward0": [Function(torch.sinh, mp.sinh)],
    "AsinBackward0": [Function(torch.asin, mp.asin, low=-1.0, high=1.0)],
    "AsinhBackward0": [Function(torch.asinh, mp.asinh)],
    "AsinhBackward1": [Function(lambda x: (x * 1).asinh_(), mp.asinh)],
    "AtanhBackward0": [Function(torch.atanh, mp.atanh, low=-1.0, high=1.0)],
    "AtanhBackward1": [Function(lambda x: (x * 1).atanh_(), mp.atanh, low=-1.0, high=1.0)],
    "ErfinvBackward0": [Function(torch.erfinv, mp.erfinv, low=-1.0, high=1.0)],
    "SpecialI1Backward0": [Function(torch.special.i1, lambda x: mp.besseli(1, x))],
    "SpecialI1EBackward0": [Function(torch.special.i1e, lambda x: mp.exp(-abs(x)) * mp.besseli(1, x))],
    "SpecialEntrBackward0": [Function(torch.special.entr, lambda x: -x * mp.log(x) if x else x, low=0.0)],
    "SpecialXlog1PyBackward1": [
        Function(lambda x: torch.special.xlog1py(2.5, x), lambda x: 2.5 * mp.log1p(x), low=-0.9)
    ],
    "SoftshrinkBackward0": [_softshrink(0.5), _softshrink(0.0)],
    "CeluBackward0": [_celu(1.0, False), _celu(0.3, False)],
    "CeluBackward1": [_celu(1.0, True), _celu(2.0, True)],
    "EluBackward1": [_elu(1.0, in_place=True), _elu(0.3, 1.7, 0.6, in_place=True)],
    "AtanBackward0": [Function(torch.atan, mp.atan)],
    "ErfBackward0": [Function(torch.erf, mp.erf)],
    "Expm1Backward0": [Function(torch.expm1, mp.expm1)],
    "Log1PBackward0": [Function(torch.log1p, mp.log1p, low=-0.9)],
    "EluBackward0": [_elu(1.0), _elu(0.3, 1.7, 0.6), Function(F.selu, lambda x: _elu(SELU[0], SELU[1]).exact(x))],
    "SqrtBackward0": [Function(torch.sqrt, mp.sqrt, low=0.0)],
    "SigmoidBackward0": [Function(torch.sigmoid, lambda x: 1 / (1 + mp.exp(-x)), 0.5)],
    "ExpBackward0": [Function(torch.exp, mp.exp, 1.0)],
    "Exp2Backward0": [Function(torch.exp2, lambda x: mp.mpf(2) ** x, 1.0)],
    "LogitBackward0": [_logit(0.1), _logit(0.02)],
    "PowBackward2": [_exponential(2.5), _exponential(0.3), _exponential(1.0)],
    "CosBackward0": [Function(torch.cos, mp.cos, 1.0)],
    "CoshBackward0": [Function(torch.cosh, mp.cosh, 1.0)],
    "AcosBackward0": [Function(torch.acos, mp.acos, math.pi / 2, low=-1.0, high=1.0)],
    "ErfcBackward0": [Function(torch.erfc, mp.erfc, 1.0)],
    "SpecialErfcxBackward0": [Function(torch.special.erfcx, lambda x: mp.exp(x * x) * mp.erfc(x), 1.0, low=-3.0)],
    "SpecialLogNdtrBackward0": [Function(torch.special.log_ndtr, lambda x: mp.log(mp.ncdf(x)), -math.log(2))],
    "I0Backward0": [Function(torch.i0, lambda x: mp.besseli(0, x), 1.0)],
    "SpecialI0EBackward0": [Function(torch.special.i0e, lambda x: mp.exp(-abs(x)) * mp.besseli(0, x), 1.0)],
    "SincBackward0": [Function(torch.sinc, mp.sincpi, 1.0)],
    "SoftplusBackward0": [_softplus(1.0), _softplus(0.5), _softplus(2.0, 5.0)],
    "HardsigmoidBackward0": [Function(F.hardsigmoid, lambda x: _clip(0, 6)(x + 3) / 6, 0.5)],
    "LogSigmoidBackward0": [Function(F.logsigmoid, lambda x: -mp.log1p(mp.exp(-x)), -math.log(2))],
    "HardtanhBackward0": [_hardtanh(-1.0, 1.0), _hardtanh(0.0, 6.0), _hardtanh(0.5, 2.0), _hardtanh(-2.0, -0.5)],
    "ClampBackward1": [
        _clamp(low, high)
        for low, high in ((-1.0, 2.0), (0.0, 1.0), (0.5, 2.0), (-2.0, -0.5), (0.0, None), (0.5, None), (None, -0.5))
    ],
    "ClampMinBackward0": [_clamp(low, None, torch.clamp_min) for low in (0.0, -0.5, 0.5)],
    "ClampMaxBackward0": [_clamp(None, high, torch.clamp_max) for high in (0.0, -0.5, 0.5)],
    "PowBackward0": [_power(n) for n in (2, 3, 4, 0.5, 1.5, 2.5, 1)],
}
"""Every node of the family ``elementwise``, with an example per kind of setting."""
SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)

ALL = [pytest.param(name, f, id=f"{name}-{i}") for name, many in FUNCTIONS.items() for i, f in enumerate(many)]


def names(output: Tensor) -> set[str]:
    """Names of all nodes behind a tensor."""
    found, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            found.add(node.name())
            stack += [child for child, _ in node.next_functions]
    return found


def secant(function: Function, x: float) -> float:
    """``(f(x) - f(0)) / x`` in 50 digits behind those that cancel."""
    with mp.workdps(50 + max(0, -math.floor(math.log10(abs(x))))):
        exact = mp.mpf(x)
        start = function.exact(mp.mpf(0))
        number(float(start), function.zero, 1e-15)
        return float((function.exact(exact) - start) / exact)


def of_family(*families: str) -> set[str]:
    """PyTorch's own operations on single elements in these families."""
    found = {name for name, o in REGISTRY.items() if o.family in families and hasattr(torch._C._functions, name)}
    return {name for name in found if not name.startswith(("Linalg", "Cholesky", "Renorm", "Triangular", "Weight"))}


def test_no_function_is_forgotten() -> None:
    """A new elementwise operation needs a line in ``FUNCTIONS``."""
    assert of_family("elementwise") == set(FUNCTIONS)


@pytest.mark.parametrize(("name", "function"), ALL)
def test_the_example_is_of_this_operation(name: str, function: Function) -> None:
    x = torch.tensor([function.low * 0.9, function.high * 0.9], dtype=torch.float64, requires_grad=True)
    y = function.torch(x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    for ours, number_ in zip(y.tolist(), x.tolist(), strict=True):
        assert ours == pytest.approx(float(function.exact(mp.mpf(number_))), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("name", "function"), ALL)
@given(seed=SEEDS)
def test_secant(name: str, function: Function, seed: int) -> None:
    """R = m (f(x) - f(0)), and f(0) m is booked."""
    unit = draw(seed, 12).sigmoid()
    x = function.low + (function.high - function.low) * unit
    m = draw(seed + 1, 12)
    explanation = explain(function.torch, x, lambda y: (y * m).sum())
    expected = torch.tensor([secant(function, v) for v in x.tolist()], dtype=torch.float64) * x * m
    agrees(explanation, expected, {"offsets": m.sum() * function.zero, "constants": 0.0, "absorbed": 0.0})


SMALL = [1e-2, 1e-3, 1e-6, 1e-12, 1e-30, 1e-300]
DIGITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
"""A few roundings of each format."""
KINKED = (
    "ClampBackward1", "HardtanhBackward0", "ClampMinBackward0", "ClampMaxBackward0", "EluBackward0", "EluBackward1",
    "SpecialI0EBackward0",
)  # fmt: skip
"""Functions whose slope at zero may differ between the two sides."""
ROUGH = ("ErfBackward0", "ErfcBackward0")
"""Functions of which PyTorch's own value is off by 6% in bfloat16."""


def _steep(name: str, function: Function) -> bool:
    """Whether the secant is infinite at zero."""
    if name == "PowBackward0":
        return bool(function.exact(mp.mpf(4)) < 4)
    return name in ("SqrtBackward0", "SpecialEntrBackward0")


def _skip_unless_known(function: Function, dtype: torch.dtype) -> None:
    """Not every function exists in 16 bits."""
    try:
        function.torch(torch.full((), 0.5, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(str(error))


def multiplier(function: Function, x: float, dtype: torch.dtype) -> float:
    """What one unit of the argument carries at a point. The argument is ``a * x``, at zero ``a + b``, with a = 1."""
    a = torch.ones((), dtype=dtype, requires_grad=True)
    if x:
        found = relevance(function.torch(a * torch.tensor(x, dtype=dtype)), a).relevance
        return float(found.double() / torch.tensor(x, dtype=dtype).double())
    b = (-torch.ones((), dtype=dtype)).requires_grad_()
    return float(relevance(function.torch(a + b), [a, b]).relevance[0])


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize(("name", "function"), ALL)
def test_secant_of_small_arguments(name: str, function: Function, dtype: torch.dtype) -> None:
    """No digits cancel, as what lies before this operation may add up many such terms of either sign."""
    _skip_unless_known(function, dtype)
    if _steep(name, function) or (name in ROUGH and dtype is torch.bfloat16):
        pytest.skip("steep at zero, or PyTorch's own value is off by 6%")
    least = 10 * torch.finfo(dtype).tiny  # below this the relevance x * m has no digits itself
    for size in SMALL:
        for x in (size, -size)[: 2 if function.low < 0 else 1]:
            if size > least:
                expected = secant(function, float(torch.tensor(x, dtype=dtype)))
                found = multiplier(function, x, dtype)
                assert abs(found - expected) <= DIGITS[dtype] * max(abs(expected), 1.0), (x, found, expected)


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize(("name", "function"), ALL)
def test_secant_at_zero_is_the_slope(name: str, function: Function, dtype: torch.dtype) -> None:
    _skip_unless_known(function, dtype)
    found = multiplier(function, 0.0, dtype)
    sides = [secant(function, side) for side in (1e-25, -1e-25)[: 2 if function.low < 0 else 1]]
    if _steep(name, function):
        assert found == 0
    else:
        assert min(sides) - DIGITS[dtype] <= found <= max(sides) + DIGITS[dtype]
        assert name in KINKED or max(sides) - min(sides) < 1e-12


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize(("name", "function"), ALL)
def test_large_arguments_do_not_overflow(name: str, function: Function, dtype: torch.dtype) -> None:
    """Wherever the function is finite its relevance is, and equals f(x) - f(0)."""
    _skip_unless_known(function, dtype)
    largest = torch.finfo(dtype).max
    sizes = torch.tensor([10.0, 50.0, 300.0, largest**0.5, largest / 2, largest * 0.99], dtype=torch.float64)
    x = torch.cat([sizes, -sizes]).to(dtype)
    x = x[torch.isfinite(function.torch(x))].requires_grad_()
    if function.high == 1:
        pytest.skip("defined near zero alone")
    assert x.numel()
    found = relevance(function.torch(x), x).relevance.double()
    expected = function.torch(x.detach()).double() - function.zero
    assert bool(torch.isfinite(found).all())
    # A secant of f(x) / x may be so small that the format has few digits for it.
    fine = (expected / x.detach().double()).abs() > torch.finfo(dtype).tiny
    assert not bool(((found - expected).abs() > DIGITS[dtype] * (expected.abs() + abs(function.zero)))[fine].any())


@given(seed=SEEDS)
def test_offsets_are_booked_by_operation(seed: int) -> None:
    x, m = draw(seed, 5), draw(seed + 1, 5)
    explanation = explain(lambda x: torch.sigmoid(x) + torch.cos(x), x, lambda y: (y * m).sum())
    found = explanation.ledger.by_operation()
    number(found["offsets", "SigmoidBackward0"], 0.5 * m.sum())
    number(found["offsets", "CosBackward0"], m.sum())


# Powers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1.0, -2.0, -0.5, -1.5])
def test_negative_powers_are_coefficients(exponent: float) -> None:
    """They are infinite at zero. Alone nothing passes them, and a factor beside them takes all."""
    x, m = draw(0, 6).abs() + 0.1, draw(1, 6)
    explanation = explain(lambda x: x + x**exponent, x, lambda y: (y * m).sum())
    agrees(explanation, m * x, {"held back": (m * x**exponent).sum()})
    explanation = explain(lambda x: 3 * x * (x.square() + 1) ** exponent, x, lambda y: (y * m).sum())
    agrees(explanation, m * 3 * x * (x.square() + 1) ** exponent, {"held back": 0.0})


def test_logits_are_coefficients() -> None:
    """Where no eps keeps them finite at zero."""
    x, m = draw(0, 6).sigmoid(), draw(1, 6)
    explanation = explain(lambda x: x + torch.logit(x), x, lambda y: (y * m).sum())
    agrees(explanation, m * x, {"held back": (m * torch.logit(x)).sum()})


@pytest.mark.parametrize("exponent", [0.5, 1.5])
def test_fractional_powers_at_zero(exponent: float) -> None:
    x = torch.tensor([0.0, 4.0]).double()
    agrees(explain(lambda x: x**exponent, x, torch.sum), torch.tensor([0.0, 4.0**exponent]).double())


# Coefficients -----------------------------------------------------------------------------------------------

COEFFICIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "RsqrtBackward0": torch.rsqrt,
    "ReciprocalBackward0": torch.reciprocal,
    "LogBackward0": torch.log,
    "Log2Backward0": torch.log2,
    "Log10Backward0": torch.log10,
    "AcoshBackward0": lambda x: torch.acosh(x + 1),
    "AcoshBackward1": lambda x: (x + 1).acosh_(),
    "LgammaBackward0": torch.lgamma,
    "MvlgammaBackward0": lambda x: torch.mvlgamma(x + 1, 2),
    "DigammaBackward0": lambda x: torch.digamma(x) + (x * 1).digamma_(),
    "PolygammaBackward0": lambda x: torch.polygamma(2, x),
    "PolygammaBackward1": lambda x: (x * 1).polygamma_(1),
    "SpecialNdtriBackward0": lambda x: torch.special.ndtri(x / 10),
    "SpecialZetaBackward0": lambda x: torch.special.zeta(x + 1.1, x),
    "SpecialZetaBackward1": lambda x: torch.special.zeta(2.5, x),
    "SpecialZetaBackward2": lambda x: torch.special.zeta(x + 1.1, 2.5),
    "XlogyBackward1": lambda x: torch.xlogy(2.5, x),
    "FloorBackward0": lambda x: torch.floor(3 * x),
    "CeilBackward0": lambda x: torch.ceil(3 * x),
    "TruncBackward0": lambda x: torch.trunc(3 * x),
    "RoundBackward0": lambda x: torch.round(3 * x),
    "RoundBackward1": lambda x: torch.round(x, decimals=1),
    "SignBackward0": torch.sign,
    "SgnBackward0": torch.sgn,
    "AngleBackward0": lambda x: torch.angle(x - 1),
    "ZeroBackward0": lambda x: (x * 1).zero_(),
    "FillBackward0": lambda x: torch.fill(x, 3.5),
    "FillBackward2": lambda x: (x * 1).fill_(3.5),
    "EqBackward0": lambda x: (x * 1).eq_(0.5),
    "EqBackward1": lambda x: (x * 1).eq_(x),
    "GeBackward0": lambda x: (x * 1).ge_(0.5),
    "GeBackward1": lambda x: (x * 1).ge_(x),
    "GtBackward0": lambda x: (x * 1).gt_(0.5),
    "GtBackward1": lambda x: (x * 2).gt_(x),
    "LeBackward0": lambda x: (x * 1).le_(0.5),
    "LeBackward1": lambda x: (x * 1).le_(x),
    "LtBackward0": lambda x: (x * 1).lt_(0.5),
    "LtBackward1": lambda x: (x / 2).lt_(x),
    "NeBackward0": lambda x: (x * 1).ne_(0.5),
    "NeBackward1": lambda x: (x * 2).ne_(x),
}


def test_no_coefficient_is_forgotten() -> None:
    assert of_family("coefficient") == set(COEFFICIENTS)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_functions_infinite_at_zero_are_coefficients(name: str) -> None:
    function, x, m = COEFFICIENTS[name], draw(0, 6).abs() + 0.1, draw(1, 6)
    assert name in names(function(x.clone().requires_grad_()))
    agrees(
        explain(lambda x: x + function(x), x, lambda y: (y * m).sum()), m * x, {"held back": (m * function(x)).sum()}
    )
    agrees(explain(lambda x: x * function(x), x, lambda y: (y * m).sum()), m * x * function(x), {"held back": 0.0})


# Piecewise linear: the VJP ----------------------------------------------------------------------------------

PIECEWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "ReluBackward0": torch.relu,
    "LeakyReluBackward0": lambda x: F.leaky_relu(x, 0.2),
    "LeakyReluBackward1": lambda x: F.leaky_relu(x * 1, 0.2, inplace=True),
    "AbsBackward0": torch.abs,
    "HardshrinkBackward0": lambda x: F.hardshrink(x, 0.7),
    "CopysignBackward0": lambda x: torch.copysign(x, torch.linspace(-1, 1, 8).double()),
    "CopysignBackward1": lambda x: torch.copysign(x, -2.0),
    "PreluKernelBackward0": lambda x: F.prelu(x, torch.tensor([0.3]).double()),
    "RreluWithNoiseBackward0": lambda x: torch.where(
        x > -0.5, F.rrelu(x, 0.1, 0.9, training=True), F.rrelu(x, 0.1, 0.9)
    ),
    "RreluWithNoiseBackward1": lambda x: F.rrelu(x * 1, 0.1, 0.9, training=True, inplace=True),
    "RreluWithNoiseFunctionalBackward0": lambda x: torch.ops.aten.rrelu_with_noise_functional(
        x, torch.zeros_like(x), 0.1, 0.9, True
    )[0],
    "ThresholdBackward0": lambda x: F.threshold(x, 0.4, 0.0),
    "ThresholdBackward1": lambda x: F.threshold(x * 1, -0.4, 0.0, inplace=True),
    "MulBackward1": lambda x: torch.ops.aten.mul.Scalar(x, 2.5),
    "DivBackward1": lambda x: torch.ops.aten.div.Scalar(x, 2.5),
    "DivBackward3": lambda x: torch.ops.aten.div.Scalar_mode(x, 2.5, rounding_mode=None),
    "XlogyBackward0": lambda x: torch.xlogy(x, torch.arange(1.0, 9.0).double()),
    "XlogyBackward2": lambda x: torch.xlogy(x, 2.5),
    "SpecialXlog1PyBackward2": lambda x: torch.special.xlog1py(x, 2.5),
    "Deg2RadBackward0": torch.deg2rad,
    "Rad2DegBackward0": torch.rad2deg,
    "NativeDropoutBackward0": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "FrexpBackward0": lambda x: torch.frexp(x)[0],
}
"""Linear for the piece, the drawn mask, or the power of two that x is in."""


def test_no_piecewise_linear_function_is_forgotten() -> None:
    # FusedDropout runs on other devices than the CPU alone.
    assert of_family("piecewise linear", "scaling") == {*PIECEWISE, "FusedDropoutBackward0"}


def drawn(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function with the same draw each time."""

    def same_draw(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(x)

    return same_draw


@pytest.mark.parametrize("name", PIECEWISE)
@given(seed=SEEDS)
def test_piecewise_linear_functions(name: str, seed: int) -> None:
    x, m = draw(seed, 8), draw(seed + 1, 8)
    x[3] = 0
    leaf = x.clone().requires_grad_()
    function = drawn(PIECEWISE[name])
    y = function(leaf)
    assert name in names(y)
    if REGISTRY[name].exact:
        assert y.grad_fn is not None
        assert y.grad_fn(m).shape == x.shape
    explanation = explain(function, x, lambda y: (y * m).sum(), allow_training=True)
    agrees(explanation, m * y.detach(), {"offsets": 0.0, "constants": 0.0})
    if name != "RreluWithNoiseFunctionalBackward0":  # whose derivative in PyTorch is that of another draw
        (gradient,) = torch.autograd.grad(y, leaf, m)
        same(explanation.relevance, x * gradient)


@pytest.mark.parametrize("name", sorted({*PIECEWISE, *FUNCTIONS}))
def test_values_are_recomputed(name: str) -> None:
    """A rule on relevance behind an operation whose value nobody kept."""
    if REGISTRY[name].replay is None:
        pytest.skip("it does not keep what that takes")
    function = drawn(PIECEWISE[name] if name in PIECEWISE else FUNCTIONS[name][0].torch)
    composite = Composite.of("e", {"addition": EpsilonSum(0.1)})
    x = torch.linspace(0.1, 0.9, 8).double()
    a = x.clone().requires_grad_()
    z = 0.3 * x.sin() + function(x)
    expected = ((z - function(torch.zeros_like(x)) * (name in FUNCTIONS)) * z / (z + 0.1 * z.sign())).detach()
    same(relevance((0.3 * a.sin() + function(a)) * 1, a, composite=composite).relevance, expected)


# Up to a constant: the VJP, and the rest is booked ----------------------------------------------------------


def _fake(function: Callable[..., Tensor], scale: Tensor | float, zero: Tensor | int) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, scale, zero, -4, 3)


STEPS = torch.tensor([0.25])
ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "FracBackward0": torch.frac,
    "FmodBackward0": lambda x: torch.fmod(x, 0.7),
    "FmodBackward1": lambda x: torch.fmod(x, torch.tensor([0.7, 0.4], dtype=x.dtype)),
    "RemainderBackward0": lambda x: torch.remainder(x, 0.7),
    "RemainderBackward1": lambda x: torch.remainder(x, torch.tensor([0.7, -0.4], dtype=x.dtype)),
    "NextafterBackward0": lambda x: torch.nextafter(x, torch.ones_like(x)),
    "ThresholdBackward0": lambda x: F.threshold(x, 0.4, 2.5),
    "ThresholdBackward1": lambda x: F.threshold(x * 1, 0.4, 2.5, inplace=True),
    "FakeQuantizePerTensorAffineCachemaskBackward0": _fake(torch.fake_quantize_per_tensor_affine, 0.25, 0),
    "FakeQuantizePerTensorAffineCachemaskTensorQparamsBackward0": _fake(
        torch.fake_quantize_per_tensor_affine, STEPS, torch.zeros(1, dtype=torch.int32)
    ),
    "FakeQuantizePerChannelAffineCachemaskBackward0": lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.tensor([0.25, 0.5]), torch.zeros(2, dtype=torch.int32), 1, -4, 3
    ),
    "FakeQuantizeLearnablePerTensorAffineBackward0": _fake(
        torch._fake_quantize_learnable_per_tensor_affine, STEPS, torch.zeros(1)
    ),
    "FakeQuantizeLearnablePerChannelAffineBackward0": lambda x: torch._fake_quantize_learnable_per_channel_affine(
        x, torch.tensor([0.25, 0.5]), torch.zeros(2), 1, -4, 3
    ),
    "FusedMovingAvgObsFqHelperBackward0": lambda x: torch.fused_moving_avg_obs_fake_quant(
        x, torch.tensor([0]), torch.tensor([1]), torch.tensor([-1.0]), torch.tensor([1.0]), STEPS.clone(),
        torch.zeros(1, dtype=torch.int32), 0.1, -4, 3, -1,
    ),
}  # fmt: skip


def test_no_rounding_is_forgotten() -> None:
    assert of_family("rounding") == {name for name in ROUNDED if not name.startswith("Threshold")}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_a_constant(name: str) -> None:
    """The derivative goes straight through, and what the value is off is booked."""
    dtype = torch.float32 if name.startswith(("Fake", "Fused")) else torch.float64
    x, m = draw(0, 6, 2).to(dtype), draw(1, 6, 2).to(dtype)
    leaf = x.clone().requires_grad_()
    y = ROUNDED[name](leaf)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    (gradient,) = torch.autograd.grad(y, leaf, m)
    assert bool(((gradient == m) | (gradient == 0)).all())
    assert not torch.equal(y.detach(), x * (gradient != 0))
    explanation = explain(ROUNDED[name], x, lambda y: (y * m).sum())
    constants = (m * y.detach()).sum() - (x * gradient).sum()
    agrees(explanation, x * gradient, {"constants": constants}, 1e-6 if dtype is torch.float32 else 1e-10)


def test_learnt_quantisation_leaves_all_to_the_input() -> None:
    """Scale and zero point are coefficients, though they have gradients."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.zero = nn.Parameter(torch.tensor([0.25])), nn.Parameter(torch.tensor([1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero, -4, 3)

    x = torch.tensor([-9.0, -0.3, 0.2, 0.45, 9.0])
    explanation = explain(Net(), x, torch.sum)
    agrees(explanation, x * torch.tensor([0, 1, 1, 1, 0]), {"parameters": 0.0}, 1e-6)


def test_numbers_that_replace_what_is_not_finite() -> None:
    x, m = draw(0, 5), draw(1, 5)
    ends = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 0.0]).double()
    explanation = explain(
        lambda x: torch.nan_to_num(torch.where(ends == 0, x, ends), 7.0, 3.0, -5.0), x, lambda y: (y * m).sum()
    )
    agrees(explanation, m * x * (ends == 0), {"constants": (m * torch.tensor([0.0, 3.0, -5.0, 7.0, 0.0])).sum()})


@pytest.mark.parametrize("fill", [torch.fill, lambda x, v: (x * 1).fill_(v)], ids=["fill", "fill_"])
def test_filled_tensors(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The old value is gone; the new one has all the relevance."""
    x, m = draw(0, 4), draw(1, 4)
    explanation = explain(lambda x: fill(x, x[2] * x[1]), x, lambda y: (y * m).sum())
    half = m.sum() * x[1] * x[2] / 2
    agrees(explanation, torch.stack([0 * half, half, half, 0 * half]), {"held back": 0.0})
    explanation = explain(lambda x: x + fill(x, torch.tensor(2.5).double()), x, lambda y: (y * m).sum())
    agrees(explanation, m * x, {"held back": 2.5 * m.sum()})


@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, F.softplus])
def test_masked_arguments_are_constants(function: Callable[[Tensor], Tensor]) -> None:
    """Where an argument is -inf nothing passes, and the offset is the value there, 0, not the value at zero."""
    x, m = draw(0, 2, 3), draw(1, 2, 3)
    mask = torch.tensor([[True, False, False], [False, True, False]])
    zero = float(function(torch.zeros(()).double()))
    explanation = explain(lambda x: function(x.masked_fill(mask, -torch.inf)), x, lambda y: (y * m).sum())
    agrees(explanation, ~mask * m * (function(x) - zero), {"offsets": (~mask * m).sum() * zero, "constants": 0.0})


# Complex numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.cos, torch.sinh, torch.sqrt, lambda z: z**3])
def test_secants_of_complex_functions(function: Callable[[Tensor], Tensor]) -> None:
    """R = Re(conj(m) (f(z) - f(0))): real and imaginary part of an argument together."""
    x, m = draw(0, 5, 2), draw(1, 5, 2)

    def on_parts(x: Tensor) -> Tensor:
        return torch.view_as_real(function(torch.view_as_complex(x)))

    explanation = explain(on_parts, x, lambda y: (y * m).sum())
    zero = on_parts(torch.zeros_like(x))
    same(explanation.relevance.sum(1), (m * (on_parts(x) - zero)).sum(1))
    number(explanation.ledger.accounts["offsets"], (m * zero).sum(), 1e-9 if bool(zero.any()) else math.inf)
    assert explanation.ledger.closes


def test_phases_and_angles() -> None:
    """A phase is its number over a constant magnitude. Turning and scaling are apart: an angle is all offset."""
    x, m = draw(0, 5, 2), draw(1, 5, 2)
    x[2] = 0
    explanation = explain(lambda x: torch.view_as_real(torch.sgn(torch.view_as_complex(x))), x, lambda y: (y * m).sum())
    size = x.norm(dim=1, keepdim=True)
    agrees(explanation, m * x / torch.where(size == 0, 1.0, size))
    x = draw(2, 5, 2)
    explanation = explain(lambda x: torch.angle(torch.view_as_complex(x)), x, lambda y: (y * m[:, 0]).sum())
    across = m[:, 0] * x[:, 0] * x[:, 1] / x.square().sum(1)
    offset = (m[:, 0] * torch.atan2(x[:, 1], x[:, 0])).sum()
    agrees(explanation, torch.stack([-across, across], 1), {"offsets": offset})


def test_relu_carries_nothing_at_zero_and_below() -> None:
    """The multiplier is zero there, so that nothing passes on through a unit that is off."""
    a, b = torch.tensor([1.0, 1.0, 1.0]).double(), torch.tensor([-1.0, -2.0, 1.0]).double()
    one, two = explain(lambda a, b: torch.relu(a + b), (a, b), torch.sum).relevance
    same(one, torch.tensor([0.0, 0.0, 1.0]).double())
    same(two, torch.tensor([0.0, 0.0, 1.0]).double())


@pytest.mark.parametrize("composite", ["attnlrp", "auto"])
def test_a_chain_of_activations(composite: str) -> None:
    """Secants multiply."""
    x = draw(0, 10)
    y = torch.tanh(F.silu(x) + 0.5 * F.gelu(x))
    agrees(explain(lambda x: torch.tanh(F.silu(x) + 0.5 * F.gelu(x)), x, torch.sum, composite=composite), y)


def test_epsilon_behind_an_activation_needs_its_result() -> None:
    """A rule on relevance in front of an activation whose output nobody saved."""
    x, w, b = draw(0, 3, 4), draw(1, 2, 4), draw(2, 2)
    model = nn.Sequential(nn.SiLU(), nn.Linear(4, 2)).double().requires_grad_(False)
    model[1].weight.copy_(w)
    model[1].bias.copy_(b)
    h = F.silu(x)
    z = F.linear(h, w, b)
    share = z / (z + 0.1 * torch.where(z < 0, -1.0, 1.0).double())
    explanation = explain(model, x, torch.sum, composite=Composite.of("e", {"dense": Epsilon(0.1)}))
    same(explanation.relevance, h * (share @ w))


@pytest.mark.parametrize("function", [F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu])
def test_texts_of_several_lengths(function: Callable[[Tensor], Tensor]) -> None:
    texts, w = [draw(1, 3, 4), draw(2, 5, 4)], draw(3, 2, 4)

    def score(*texts: Tensor) -> Tensor:
        x = torch.nested.as_nested_tensor(list(texts), layout=torch.jagged)
        return F.linear(function(x), w).values().sum(0, keepdim=True)

    found = explain(score, tuple(texts), 1).relevance
    for ours, x in zip(found, texts, strict=True):
        same(ours, function(x) * w[1])

"""Elementwise functions of one signal.

The secant rule sends ``m * (f(x) - f(0)) / x``, with the limit ``f'(0)`` at ``x = 0``; the offset ``f(0) * m`` is
booked. Where ``f(0) = 0`` this is the y/x rule of AttnLRP (Achtibat et al. 2024, eq. 9), and it is bounded by the
function's steepest secant. Functions that are infinite at 0 (log, reciprocal, negative powers) and steps (floor, sign)
are coefficients. What is linear but for a constant that jumps (remainders, fake quantisation) passes its VJP.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.attention import Exponential, Normalised
from dynlrp.rules.operation import (
    OUTPUT,
    Grads,
    Hold,
    Need,
    Operation,
    Replay,
    Rule,
    Sign,
    Step,
    StepShape,
    Taylor,
    divide,
    dot,
    follow,
    linear_operation,
    register,
)
from dynlrp.rules.shape import always

NEAR = 0.01
"""Arguments whose secant has no digits to lose."""
_at, _weight = np.polynomial.legendre.leggauss(8)
POINTS: list[tuple[float, float]] = list(zip(((_at + 1) / 2).tolist(), (_weight / 2).tolist(), strict=True))
"""Places between 0 and 1 with their weights."""


class Function(NamedTuple):
    """``value(step, x)`` is the function, ``zero`` and ``slope`` its value and derivative at 0.

    ``secant(step, x)``, where given, is the secant through the origin in a form without division, and ``rise(step, x)``
    is ``f(x) - f(0)`` in a form that keeps its digits near 0. ``smooth``: on either side of 0, all derivatives exist;
    ``near`` is the function around 0 where PyTorch's derivatives of ``value`` have no digits there.
    ``times_secant(step, m, x)`` is a multiplier times the secant in fewer passes over memory, for plain tensors of
    real numbers.
    """

    value: Callable[[Any, Tensor], Tensor]
    zero: float | Callable[[Any], float] = 0.0
    slope: complex | Callable[[Any], complex] = 1.0
    secant: Callable[[Any, Tensor], Tensor] | None = None
    rise: Callable[[Any, Tensor], Tensor] | None = None
    smooth: bool = True
    near: Callable[[Any, Tensor], Tensor] | None = None
    times_secant: Callable[[Any, Tensor, Tensor], Tensor] | None = None

    def at_zero(self, step: Any) -> float:
        return self.zero(step) if callable(self.zero) else self.zero

    def slope_at_zero(self, step: Any) -> complex:
        return self.slope(step) if callable(self.slope) else self.slope

    def through_zero(self, step: Any, x: Tensor) -> Tensor:
        """(f(x) - f(0)) / x, and at x = 0 the slope."""
        if self.secant is not None:
            return self.secant(step, x)
        # Below the smallest normal number the quotient loses its digits; there the slope is exact enough.
        tiny = x.abs() < torch.finfo(x.dtype).tiny
        if torch.is_grad_enabled():
            return self._differentiable(step, x, tiny)
        return self._quotient(step, x, tiny)

    def _quotient(self, step: Any, x: Tensor, tiny: Tensor) -> Tensor:
        if self.rise is not None:
            rise = self.rise(step, x)
        else:
            rise, zero = self.value(step, x), self.at_zero(step)
            rise = rise - zero if zero else rise
        return torch.where(tiny, self.slope_at_zero(step), rise / torch.where(tiny, 1.0, x))

    def _differentiable(self, step: Any, x: Tensor, tiny: Tensor) -> Tensor:
        """The same, whose derivative (f'(x) - secant) / x keeps its digits near 0 too. There the secant is followed by
        the mean of f' between 0 and x, which Gauss and Legendre's eight points give exactly."""
        near = x.abs() < NEAR if self.smooth and not x.is_complex() else tiny
        secant = self._quotient(step, torch.where(near, x.detach(), x), tiny)
        if not self.smooth or x.is_complex() or not x.requires_grad or not bool(near.any()):
            return secant
        close = torch.where(near, x, 0.0)
        mean, function = torch.zeros_like(close), self.near or self.value
        for at, weight in POINTS:
            t = close * at
            mean = mean + weight * torch.autograd.grad(function(step, t).sum(), t, create_graph=True)[0]
        return follow(secant, mean) if bool(near.all()) else torch.where(near, follow(secant, mean), secant)


@dataclass(frozen=True)
class Secant(Rule):
    """m_x = m (f(x) - f(0)) / x, the y/x rule where f(0) = 0 (Achtibat et al. 2024, eq. 9)."""

    families = frozenset({"elementwise"})

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None]
        function = step.operation.math
        x, zero = step.operand(0), function.at_zero(step)
        if zero:
            # Of a masked argument, infinite, the value itself is the constant.
            value = step.output() if step.operation.result else function.value(step, x)
            step.book("offsets", dot(g.real if g.is_complex() else g, torch.where(x.isinf(), value, zero).real))
        if function.times_secant is not None and g.dtype == x.dtype and not (x.is_complex() or x.is_nested):
            return [function.times_secant(step, g, x)]
        return [g * function.through_zero(step, x).conj().to(g.dtype)]


def elementwise(
    name: str,
    function: Function,
    result: str | None = None,
    sign: Sign | Callable[[Any], Sign] = "",
    **traits: Any,
) -> None:
    """Enter a function with the secant rule."""

    def replay(step: Any, x: Tensor) -> Tensor:
        return function.value(step, x)

    saved = {} if result else {0: "self"}
    traits = {"result": result, "sign": sign, "saved": saved, "replay": replay, "math": function, **traits}
    register(Operation(name, "elementwise", rule=Secant(), operands="+", **traits))


def coefficient(name: str, value: Replay | None = None, **traits: Any) -> None:
    """Enter a function that is infinite at 0, or a step: what passes through it is a coefficient."""
    register(Operation(name, "coefficient", rule=Hold(), operands="-", replay=value, **traits))


def linear(name: str, family: str, **traits: Any) -> None:
    """Enter a function whose value is the argument times its derivative: the VJP is the rule, and its replay."""
    linear_operation(name, family=family, **{"operands": "+", "replay": _times_slope, **traits})


def _times_slope(step: Any, x: Tensor) -> Tensor:
    grads = [torch.ones_like(x)] + [None] * (len(step.node._input_metadata) - 1)
    slope: Tensor = step.node(*grads)
    return x * slope


def _gelu(step: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=step.saved("approximate"))


def _gelu_secant(step: Any, x: Tensor) -> Tensor:
    if step.saved("approximate") == "none":
        return (x * -math.sqrt(0.5)).erfc_().mul_(0.5)  # of negative x, 1 + erf has no digits left
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def _times_gelu_secant(step: Any, m: Tensor, x: Tensor) -> Tensor:
    if step.saved("approximate") == "none":
        return torch.addcmul(x.new_zeros(()), (x * -math.sqrt(0.5)).erfc_(), m, value=0.5)
    return times_sigmoid(m, torch.add(x, x.pow(3), alpha=0.044715), 2 * math.sqrt(2 / math.pi))


def times_sigmoid(m: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    """``m * sigmoid(factor * x)`` in one kernel, as sigmoid is the derivative of softplus. Beyond 40 it is 1."""
    result: Tensor = torch.ops.aten.softplus_backward(m, x, factor, 40.0)
    return result


def _elu(step: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.elu(x, step.saved("alpha"), step.saved("scale"), step.saved("input_scale"))  # type: ignore[no-any-return]


def _softshrink(step: Any, x: Tensor) -> Tensor:
    return F.softshrink(x, step.saved("lambd"))


ELU = Function(_elu, slope=lambda s: s.saved("alpha") * s.saved("scale") * s.saved("input_scale"))
CELU = Function(lambda s, x: F.celu(x, s.saved("alpha")))
BOTH: dict[str, Any] = {"result": "result", "saved": {0: "self"}}
"""Traits of functions that save both their argument and their value."""


# f(0) = 0
elementwise(
    "GeluBackward0", Function(_gelu, slope=0.5, secant=_gelu_secant, times_secant=_times_gelu_secant), gate=True
)
elementwise(
    "SiluBackward0",
    Function(
        lambda s, x: F.silu(x),
        slope=0.5,
        secant=lambda s, x: torch.sigmoid(x),
        times_secant=lambda s, m, x: times_sigmoid(m, x),
    ),
    gate=True,
)
elementwise(
    "HardswishBackward0",
    Function(lambda s, x: F.hardswish(x), slope=0.5, secant=lambda s, x: F.hardsigmoid(x)),
)
elementwise("MishBackward0", Function(lambda s, x: F.mish(x), slope=0.6, secant=lambda s, x: F.softplus(x).tanh()))
elementwise("TanhBackward0", Function(lambda s, x: torch.tanh(x)), result="result", gate=True)
elementwise("SinBackward0", Function(lambda s, x: torch.sin(x)))
elementwise("TanBackward0", Function(lambda s, x: torch.tan(x)), result="result")
elementwise("SinhBackward0", Function(lambda s, x: torch.sinh(x)))
elementwise("AsinBackward0", Function(lambda s, x: torch.asin(x)))
elementwise("AsinhBackward0", Function(lambda s, x: torch.asinh(x)))
elementwise("AtanBackward0", Function(lambda s, x: torch.atan(x)))
elementwise("AtanhBackward0", Function(lambda s, x: torch.atanh(x)))
elementwise("ErfBackward0", Function(lambda s, x: torch.erf(x), slope=2 / math.sqrt(math.pi)))
elementwise("Expm1Backward0", Function(lambda s, x: torch.expm1(x)), result="result")
elementwise("Log1PBackward0", Function(lambda s, x: torch.log1p(x)))
elementwise("ErfinvBackward0", Function(lambda s, x: torch.erfinv(x), slope=math.sqrt(math.pi) / 2))
elementwise("EluBackward0", ELU)
elementwise("CeluBackward0", CELU)
elementwise("SoftshrinkBackward0", Function(_softshrink, slope=lambda s: float(s.saved("lambd") == 0), smooth=False))
elementwise("SpecialI1Backward0", Function(lambda s, x: torch.special.i1(x), slope=0.5), **BOTH)
elementwise("SpecialI1EBackward0", Function(lambda s, x: torch.special.i1e(x), slope=0.5), **BOTH)
# The secant of -x log(x) is infinite at 0, as is that of the square root; nothing passes there.
elementwise(
    "SpecialEntrBackward0",
    Function(lambda s, x: torch.special.entr(x), secant=lambda s, x: -torch.where(x == 0, 1.0, x).log()),
)
elementwise(
    "SpecialXlog1PyBackward1",
    Function(lambda s, x: torch.special.xlog1py(s.saved("self"), x), slope=lambda s: s.saved("self")),
    saved={0: "other"},
)
elementwise(
    "SqrtBackward0", Function(lambda s, x: torch.sqrt(x), slope=0.0, smooth=False), result="result", sign="nonnegative"
)

# f(0) is not 0


def _near_softplus(x: Tensor) -> Tensor:
    """softplus(x) - softplus(0) for arguments up to 1, by log cosh."""
    half = x.clamp(-1, 1) / 2
    return half + torch.log1p(2 * torch.sinh(half / 2).square())


def _softplus_rise(step: Any, x: Tensor) -> Tensor:
    beta = step.saved("beta")
    far = F.softplus(x, beta, step.saved("threshold")) - math.log(2) / beta
    return torch.where((x * beta).abs() < 1, _near_softplus(x * beta) / beta, far)


def power_rise(base: complex | Tensor, x: Tensor) -> Tensor:
    """base^x - 1."""
    log = base.log() if isinstance(base, Tensor) else _log(base)
    return torch.where((x * log).abs() < 1, torch.expm1(x * log), base**x - 1)


def _log(base: complex) -> complex:
    """The logarithm of a base; below zero a power is defined at integers alone, and there is none."""
    if isinstance(base, complex) and base != 0:
        return cmath.log(base)
    return math.log(base.real) if base.real > 0 else math.nan


def _base_slope(step: Any) -> complex:
    slope = _log(step.saved("self"))
    return 0.0 if cmath.isnan(slope) else slope


def _series(t: Tensor, ratio: Callable[[int], float]) -> Tensor:
    """``r1 t (1 + r2 t (1 + r3 t (...)))``, enough for float64 where t is small."""
    total = torch.zeros_like(t)
    for k in range(10, 0, -1):
        total = ratio(k) * t * (1 + total)
    return total


def _i0_rise(step: Any, x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, _series(x * x / 4, lambda k: 1 / k**2), torch.special.i0(x) - 1)


def _i0e_rise(step: Any, x: Tensor) -> Tensor:
    near = torch.expm1(-x.abs()) + torch.exp(-x.abs()) * _i0_rise(step, x)
    return torch.where(x.abs() < 1, near, torch.special.i0e(x) - 1)


def _near_sinc(step: Any, x: Tensor) -> Tensor:
    return _series((math.pi * x).square(), lambda k: -1 / (2 * k * (2 * k + 1)))


def _sinc_rise(step: Any, x: Tensor) -> Tensor:
    return torch.where(x.abs() < 0.5, _near_sinc(step, x), torch.sinc(x) - 1)


def _erfcx_rise(step: Any, x: Tensor) -> Tensor:
    square = x * x
    near = torch.expm1(square) - torch.exp(square) * torch.erf(x)
    return torch.where(x.abs() < 1, near, torch.special.erfcx(x) - 1)


def _log_ndtr_rise(step: Any, x: Tensor) -> Tensor:
    near = torch.log1p(torch.erf(x / math.sqrt(2)))
    return torch.where(x.abs() < 1, near, torch.special.log_ndtr(x) + math.log(2))


def _hardsigmoid_secant(step: Any, x: Tensor) -> Tensor:
    return 0.5 / x.abs().clamp(min=3)


elementwise(
    "SigmoidBackward0",
    Function(lambda s, x: torch.sigmoid(x), 0.5, 0.25, rise=lambda s, x: torch.tanh(x / 2) / 2),
    result="result",
    sign="nonnegative",
    gate=True,
)
elementwise(
    "ExpBackward0",
    Function(lambda s, x: torch.exp(x), 1.0, rise=lambda s, x: torch.expm1(x)),
    result="result",
    sign="nonnegative",
    decay=True,
    softmax=Exponential(),
)
elementwise(
    "Exp2Backward0",
    Function(lambda s, x: torch.exp2(x), 1.0, math.log(2), rise=lambda s, x: power_rise(2.0, x)),
    result="result",
    sign="nonnegative",
)
elementwise(  # base^x for a number as base
    "PowBackward2",
    Function(
        lambda s, x: s.saved("self") ** x,
        1.0,
        _base_slope,
        rise=lambda s, x: power_rise(s.saved("self"), x),
    ),
    result="result",
    saved={0: "exponent"},
    facts=lambda node: not isinstance(node._saved_self, complex) and node._saved_self >= 0,
    sign=lambda positive: "nonnegative" if positive else "",
)
elementwise(
    "CosBackward0",
    Function(lambda s, x: torch.cos(x), 1.0, 0.0, rise=lambda s, x: -2 * torch.sin(x / 2).square()),
)
elementwise(
    "CoshBackward0",
    Function(lambda s, x: torch.cosh(x), 1.0, 0.0, rise=lambda s, x: 2 * torch.sinh(x / 2).square()),
    sign="nonnegative",
)
elementwise(
    "AcosBackward0",
    Function(lambda s, x: torch.acos(x), math.pi / 2, -1.0, rise=lambda s, x: -torch.asin(x)),
    sign="nonnegative",
)
elementwise(
    "ErfcBackward0",
    Function(lambda s, x: torch.erfc(x), 1.0, -2 / math.sqrt(math.pi), rise=lambda s, x: -torch.erf(x)),
    sign="nonnegative",
)
elementwise(
    "SpecialErfcxBackward0",
    Function(lambda s, x: torch.special.erfcx(x), 1.0, -2 / math.sqrt(math.pi), rise=_erfcx_rise),
    sign="nonnegative",
    **BOTH,
)
elementwise(
    "SpecialLogNdtrBackward0",
    Function(lambda s, x: torch.special.log_ndtr(x), -math.log(2), math.sqrt(2 / math.pi), rise=_log_ndtr_rise),
    **BOTH,
)
elementwise("I0Backward0", Function(lambda s, x: torch.special.i0(x), 1.0, 0.0, rise=_i0_rise), sign="nonnegative")
elementwise(  # even, with a kink at 0
    "SpecialI0EBackward0",
    Function(lambda s, x: torch.special.i0e(x), 1.0, 0.0, rise=_i0e_rise),
    sign="nonnegative",
    **BOTH,
)
elementwise("SincBackward0", Function(lambda s, x: torch.sinc(x), 1.0, 0.0, rise=_sinc_rise, near=_near_sinc))
elementwise(
    "SoftplusBackward0",
    Function(
        lambda s, x: F.softplus(x, s.saved("beta"), s.saved("threshold")),
        lambda s: math.log(2) / s.saved("beta"),
        0.5,
        rise=_softplus_rise,
    ),
    sign="nonnegative",
)
elementwise(
    "HardsigmoidBackward0",
    Function(lambda s, x: F.hardsigmoid(x), 0.5, 1 / 6, secant=_hardsigmoid_secant),
    sign="nonnegative",
    gate=True,
)
LOG_SIGMOID = Function(
    lambda s, x: F.logsigmoid(x),
    -math.log(2),
    0.5,
    rise=lambda s, x: torch.where(x.abs() < 1, -_near_softplus(-x), F.logsigmoid(x) + math.log(2)),
)
elementwise("LogSigmoidBackward0", LOG_SIGMOID)


def _bounds(node: Any) -> tuple[float | None, float | None]:
    if node.name() == "HardtanhBackward0":
        return node._saved_min_val, node._saved_max_val
    if node.name() == "ClampMinBackward0":
        return node._saved_min, None
    if node.name() == "ClampMaxBackward0":
        return None, node._saved_max
    return node._saved_min, node._saved_max


def _clamp(step: Any, x: Tensor) -> Tensor:
    low, high = _bounds(step.node)
    return x.clamp(min=low, max=high)


def _clamp_zero(step: Any) -> float:
    low, high = _bounds(step.node)
    zero = 0.0 if low is None else max(0.0, low)
    return zero if high is None else min(zero, high)


def _clamp_slope(step: Any) -> float:
    low, high = _bounds(step.node)
    return float((low is None or low <= 0) and (high is None or high >= 0))


def _clamp_sign(bounds: Any) -> Sign:
    return "nonnegative" if bounds[0] is not None and bounds[0] >= 0 else ""


CLAMP = Function(_clamp, _clamp_zero, _clamp_slope, smooth=False)


def _clamp_secant(step: Any, x: Tensor) -> Tensor:
    low, high = _bounds(step.node)
    if low != 0 or high is None or high <= 0:
        return CLAMP.through_zero(step, x)
    return torch.div(x.new_full((), high), x).clamp_(0, 1)  # ReLU6 and its like: 0, 1 or high / x


for _name in ("HardtanhBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0"):
    elementwise(
        _name,
        CLAMP._replace(secant=_clamp_secant),
        facts=_bounds,
        sign=_clamp_sign,
        gates=lambda bounds: bounds[0] is not None and bounds[0] == 0,
        bounds=True,
    )


@dataclass(frozen=True)
class Power(Rule):
    """x^n with n > 0 (of complex n, the real part): the secant through the origin, m_x = m x^(n-1) (the y/x rule,
    Achtibat et al. 2024, eq. 9). Other exponents make a coefficient."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g, exponent = grads[0], step.saved("exponent")
        if g is None:
            return [None]
        x = step.operand(0)
        if exponent == 2:
            secant = x
        elif not isinstance(exponent, complex) and exponent >= 1:
            secant = x ** (exponent - 1)
        else:
            secant = torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x) ** (exponent - 1))
        return [g * secant.conj()]


def _power_sign(exponent: complex) -> Sign:
    if isinstance(exponent, complex):
        return ""
    return "same" if exponent % 2 == 1 else "nonnegative"


register(
    Operation(
        "PowBackward0",
        "elementwise",
        rule=Power(),
        operands="+",
        saved={0: "self"},
        facts=lambda node: node._saved_exponent,
        holds=lambda exponent: exponent.real <= 0,
        sign=_power_sign,
        replay=lambda step, x: x ** step.saved("exponent"),
    )
)


def _logit_of(eps: float) -> float:
    return math.log(eps) - math.log1p(-eps)


def _logit_rise(step: Any, x: Tensor) -> Tensor:
    eps = step.saved("eps")
    above = (x - eps).clamp(0, eps)
    near = torch.log1p(above / eps) - torch.log1p(-above / (1 - eps))
    return torch.where(x < 2 * eps, near, torch.logit(x, eps) - _logit_of(eps))


elementwise(  # infinite at 0 unless eps keeps away from it
    "LogitBackward0",
    Function(
        lambda s, x: torch.logit(x, s.saved("eps")),
        lambda s: _logit_of(s.saved("eps")),
        slope=0.0,
        rise=_logit_rise,
        smooth=False,
    ),
    facts=lambda node: not node._saved_eps,
    holds=lambda infinite: infinite,
)

# Written in place: the argument is gone, unless the operation before it can tell it.
elementwise("AsinhBackward1", Function(lambda s, x: torch.asinh(x)), saved={})
elementwise("AtanhBackward1", Function(lambda s, x: torch.atanh(x)), saved={})
elementwise("EluBackward1", ELU, result="result")
elementwise("CeluBackward1", CELU, result="result")

# Piecewise linear through the origin: the VJP is the rule.
linear(
    "ReluBackward0",
    "piecewise linear",
    result="result",
    sign="nonnegative",
    gates=True,
    exact=True,
    replay=lambda step, x: torch.relu(x),
)
linear(
    "LeakyReluBackward0",
    "piecewise linear",
    saved={0: "self"},
    exact=True,
    replay=lambda step, x: F.leaky_relu(x, step.saved("negative_slope")),
)
linear(
    "LeakyReluBackward1",
    "piecewise linear",
    result="result",
    exact=True,
    replay=lambda step, x: F.leaky_relu(x, step.saved("negative_slope")),
)
linear("AbsBackward0", "piecewise linear", saved={0: "self"}, sign="nonnegative", replay=lambda step, x: x.abs())
linear("HardshrinkBackward0", "piecewise linear", saved={0: "self"})
linear("CopysignBackward1", "piecewise linear", **BOTH)
# For the slopes that were drawn.
linear("RreluWithNoiseBackward0", "piecewise linear", saved={0: "self"})
linear("RreluWithNoiseBackward1", "piecewise linear", result="result")


@dataclass(frozen=True)
class Drawn(Rule):
    """m_x = m f(x) / x, where the node keeps no slopes (its noise is what it was given, not what it drew; the y/x rule,
    Achtibat et al. 2024, eq. 9)."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT, Need(0)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        return [None if g is None else g * divide(step.output(), step.operand(0), 0.0)]


linear("RreluWithNoiseFunctionalBackward0", "piecewise linear", rule=Drawn(), saved={0: "self"}, replay=None)


# Up to a constant that is not recorded: what stands where nothing passes, a multiple of the divisor, a rounding error
# (through which the derivative goes straight: Bengio et al. 2013).
for _name in ("ThresholdBackward0", "ThresholdBackward1"):
    linear(_name, "piecewise linear", saved={0: "self"}, replay=None, hides=always)
linear("NanToNumBackward0", "indexing", copies=True, saved={0: "self"}, replay=None, hides=always)
for _name in ("FracBackward0", "FmodBackward0", "RemainderBackward0"):
    linear(_name, "rounding", replay=None, hides=always)
for _name in (
    "FakeQuantizePerTensorAffineCachemaskBackward0",
    "FakeQuantizePerTensorAffineCachemaskTensorQparamsBackward0",
    "FakeQuantizePerChannelAffineCachemaskBackward0",
    "FusedMovingAvgObsFqHelperBackward0",
):
    linear(_name, "rounding", replay=None, hides=always)
for _name in ("FakeQuantizeLearnablePerTensorAffineBackward0", "FakeQuantizeLearnablePerChannelAffineBackward0"):
    linear(_name, "rounding", operands="+--", saved={0: "self"}, replay=None, hides=always)

# The old value is gone, the new one is copied.
for _name in ("FillBackward1", "FillBackward3"):
    linear(
        _name,
        "indexing",
        operands="-+",
        copies=True,
        replay=lambda step, x, value: value.expand(step.node._input_metadata[0].shape),
        hides=lambda facts, present: not present[1],
    )

# By a number, or a mask that was drawn.
for _name in ("Deg2RadBackward0", "Rad2DegBackward0", "NativeDropoutBackward0", "FusedDropoutBackward0"):
    linear(_name, "scaling", sign="same")
linear("FrexpBackward0", "scaling", sign="same", replay=lambda step, x: torch.frexp(x))  # by a power of two

# Infinite at 0: coefficients.
coefficient("RsqrtBackward0", lambda s, x: torch.rsqrt(x), result="result", sign="nonnegative")
coefficient("ReciprocalBackward0", lambda s, x: x.reciprocal(), result="result", softmax=Normalised(degree=-1))
coefficient("LogBackward0", lambda s, x: torch.log(x), saved={0: "self"})
coefficient("Log2Backward0", lambda s, x: torch.log2(x), saved={0: "self"})
coefficient("Log10Backward0", lambda s, x: torch.log10(x), saved={0: "self"})
coefficient("AcoshBackward0", lambda s, x: torch.acosh(x), saved={0: "self"}, sign="nonnegative")  # none below 1
coefficient("AcoshBackward1", lambda s, x: torch.acosh(x), sign="nonnegative")
coefficient("LgammaBackward0", lambda s, x: torch.lgamma(x), saved={0: "self"})
coefficient("MvlgammaBackward0", lambda s, x: torch.mvlgamma(x, s.saved("p")), saved={0: "self"})
coefficient("DigammaBackward0", lambda s, x: torch.digamma(x), saved={0: "self"})
for _name in ("PolygammaBackward0", "PolygammaBackward1"):
    coefficient(_name, lambda s, x: torch.polygamma(s.saved("n"), x), saved={0: "self"})
coefficient("SpecialNdtriBackward0", lambda s, x: torch.special.ndtri(x), result="result")
coefficient("SpecialZetaBackward1", lambda s, x: torch.special.zeta(s.saved("self"), x), saved={0: "other"})
coefficient("SpecialZetaBackward2")
coefficient("XlogyBackward1", lambda s, x: torch.xlogy(s.saved("self"), x), saved={0: "other"})

# Steps, and what is overwritten or compared.
coefficient("FloorBackward0", lambda s, x: torch.floor(x))
coefficient("CeilBackward0", lambda s, x: torch.ceil(x))
coefficient("TruncBackward0", lambda s, x: torch.trunc(x))
coefficient("RoundBackward0", lambda s, x: torch.round(x))
coefficient("RoundBackward1")
coefficient("SignBackward0", lambda s, x: torch.sign(x))
coefficient("ZeroBackward0", lambda s, x: torch.zeros_like(x), sign="nonnegative")
for _name in ("FillBackward0", "FillBackward2"):
    coefficient(_name)
for _name in ("Eq", "Ge", "Gt", "Le", "Lt", "Ne"):
    for _kind in ("Backward0", "Backward1"):  # with a number, with a tensor
        coefficient(_name + _kind, sign="nonnegative")


# Of complex numbers these are no steps.


def _is_complex(node: Any) -> bool:
    operand, output = node.next_functions[0]
    return bool(operand._input_metadata[output].dtype.is_complex)


@dataclass(frozen=True)
class Phase(Rule):
    """z / |z|: m_z = m / |z|, where the magnitude is a coefficient as other norms are that divide (Ali et al. 2022); 0
    stays 0."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        return [None if g is None else divide(g, step.operand(0).abs(), 0.0)]


for _name, _rule, _function in (("SgnBackward0", Phase(), torch.sgn), ("AngleBackward0", Taylor(), torch.angle)):
    register(
        Operation(
            _name,
            "coefficient",
            rule=_rule,
            operands="+",
            saved={0: "self"},
            replay=lambda step, x, function=_function: function(x),
            facts=_is_complex,
            holds=lambda is_complex: not is_complex,
        )
    )

"""Elementwise functions of one signal.

The secant rule sends ``m * (f(x) - f(0)) / x``, with the limit ``f'(0)`` at ``x = 0``; the offset ``f(0) * m`` is
booked. Where ``f(0) = 0`` this is the y/x rule of AttnLRP (Achtibat et al. 2024, eq. 9), and it is bounded by the
function's steepest secant. Functions that are infinite at 0 (log, reciprocal, negative powers) are coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.operation import Grads, Hold, Need, Operation, Rule, Sign, Step, StepShape, register


class Function(NamedTuple):
    """``value(step, x)`` is the function, ``zero`` and ``slope`` its value and derivative at 0.

    ``secant(step, x)``, where given, is the secant through the origin in a form without division, and ``rise(step, x)``
    is ``f(x) - f(0)`` in a form that keeps its digits near 0.
    """

    value: Callable[[Any, Tensor], Tensor]
    zero: float | Callable[[Any], float] = 0.0
    slope: float | Callable[[Any], float] = 1.0
    secant: Callable[[Any, Tensor], Tensor] | None = None
    rise: Callable[[Any, Tensor], Tensor] | None = None

    def at_zero(self, step: Any) -> float:
        return self.zero(step) if callable(self.zero) else self.zero

    def slope_at_zero(self, step: Any) -> float:
        return self.slope(step) if callable(self.slope) else self.slope


@dataclass(frozen=True)
class Secant(Rule):
    """m_x = m (f(x) - f(0)) / x."""

    families = frozenset({"elementwise"})

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None]
        x, function = step.operand(0), step.operation.math
        zero = function.at_zero(step)
        if zero:
            step.book("offsets", g.sum() * zero)
        if function.secant is not None:
            return [g * function.secant(step, x)]
        if function.rise is not None:
            rise = function.rise(step, x)
        else:
            rise = function.value(step, x)
            rise = rise - zero if zero else rise
        # Below the smallest normal number the quotient loses its digits; there the slope is exact enough.
        tiny = x.abs() < torch.finfo(x.dtype).tiny
        slope = torch.where(tiny, function.slope_at_zero(step), rise / torch.where(tiny, 1.0, x))
        return [g * slope.to(g.dtype)]


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


def coefficient(name: str, value: Callable[[Any, Tensor], Tensor], **traits: Any) -> None:
    """Enter a function that is infinite at 0: what passes through it is a coefficient."""

    def replay(step: Any, x: Tensor) -> Tensor:
        return value(step, x)

    register(Operation(name, "coefficient", rule=Hold(), operands="-", replay=replay, **traits))


def _gelu(step: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=step.saved("approximate"))


def _gelu_secant(step: Any, x: Tensor) -> Tensor:
    if step.saved("approximate") == "none":
        return torch.special.ndtr(x)  # type: ignore[no-any-return]
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _elu(step: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.elu(x, step.saved("alpha"), step.saved("scale"), step.saved("input_scale"))  # type: ignore[no-any-return]


# f(0) = 0
elementwise("GeluBackward0", Function(_gelu, slope=0.5, secant=_gelu_secant), gate=True)
elementwise(
    "SiluBackward0", Function(lambda s, x: F.silu(x), slope=0.5, secant=lambda s, x: torch.sigmoid(x)), gate=True
)
elementwise(
    "HardswishBackward0",
    Function(lambda s, x: F.hardswish(x), slope=0.5, secant=lambda s, x: F.hardsigmoid(x)),
)
elementwise("MishBackward0", Function(lambda s, x: F.mish(x), slope=0.6, secant=lambda s, x: F.softplus(x).tanh()))
elementwise("TanhBackward0", Function(lambda s, x: torch.tanh(x)), result="result", gate=True)
elementwise("SinBackward0", Function(lambda s, x: torch.sin(x)))
elementwise("AsinhBackward0", Function(lambda s, x: torch.asinh(x)))
elementwise("AtanBackward0", Function(lambda s, x: torch.atan(x)))
elementwise("ErfBackward0", Function(lambda s, x: torch.erf(x), slope=2 / math.sqrt(math.pi)))
elementwise("Expm1Backward0", Function(lambda s, x: torch.expm1(x)), result="result")
elementwise("Log1PBackward0", Function(lambda s, x: torch.log1p(x)))
elementwise(
    "EluBackward0", Function(_elu, slope=lambda s: s.saved("alpha") * s.saved("scale") * s.saved("input_scale"))
)
elementwise("SqrtBackward0", Function(lambda s, x: torch.sqrt(x), slope=0.0), result="result", sign="nonnegative")

# f(0) is not 0


def _softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    """softplus(x) - softplus(0), by log cosh near 0."""
    half = (x * beta).clamp(-1, 1) / 2
    near = (half + torch.log1p(2 * torch.sinh(half / 2).square())) / beta
    return torch.where((x * beta).abs() < 1, near, F.softplus(x, beta, threshold) - math.log(2) / beta)


def _exp2_rise(step: Any, x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.expm1(x * math.log(2)), torch.exp2(x) - 1)


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
)
elementwise(
    "Exp2Backward0",
    Function(lambda s, x: torch.exp2(x), 1.0, math.log(2), rise=_exp2_rise),
    result="result",
    sign="nonnegative",
)
elementwise(
    "CosBackward0",
    Function(lambda s, x: torch.cos(x), 1.0, 0.0, rise=lambda s, x: -2 * torch.sin(x / 2).square()),
)
elementwise(
    "SoftplusBackward0",
    Function(
        lambda s, x: F.softplus(x, s.saved("beta"), s.saved("threshold")),
        lambda s: math.log(2) / s.saved("beta"),
        0.5,
        rise=lambda s, x: _softplus(x, s.saved("beta"), s.saved("threshold")),
    ),
    sign="nonnegative",
)
elementwise(
    "HardsigmoidBackward0",
    Function(lambda s, x: F.hardsigmoid(x), 0.5, 1 / 6, secant=_hardsigmoid_secant),
    sign="nonnegative",
    gate=True,
)
elementwise(
    "LogSigmoidBackward0",
    Function(lambda s, x: F.logsigmoid(x), -math.log(2), 0.5, rise=lambda s, x: -_softplus(-x, 1.0, 20.0)),
)


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


for _name in ("HardtanhBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0"):
    elementwise(
        _name,
        Function(_clamp, _clamp_zero, _clamp_slope),
        facts=_bounds,
        sign=_clamp_sign,
        gates=lambda bounds: bounds[0] is not None and bounds[0] == 0,
    )


@dataclass(frozen=True)
class Power(Rule):
    """x^n with n > 0: the secant through the origin is x^(n-1). Other exponents make a coefficient."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g, exponent = grads[0], step.saved("exponent")
        if g is None:
            return [None]
        x = step.operand(0)
        secant = x if exponent == 2 else x ** (exponent - 1)
        return [g * (secant if exponent >= 1 else torch.where(x == 0, 0.0, secant))]


register(
    Operation(
        "PowBackward0",
        "elementwise",
        rule=Power(),
        operands="+",
        saved={0: "self"},
        facts=lambda node: node._saved_exponent,
        holds=lambda exponent: exponent <= 0,
        sign=lambda exponent: (
            "nonnegative" if exponent % 2 == 0 else "same" if exponent == int(exponent) else "nonnegative"
        ),
        replay=lambda step, x: x ** step.saved("exponent"),
    )
)

# Piecewise linear through the origin: the VJP is the rule.
register(
    Operation(
        "ReluBackward0",
        "piecewise linear",
        operands="+",
        result="result",
        sign="nonnegative",
        gates=True,
        replay=lambda step, x: torch.relu(x),
    )
)
register(
    Operation(
        "LeakyReluBackward0",
        "piecewise linear",
        operands="+",
        saved={0: "self"},
        replay=lambda step, x: F.leaky_relu(x, step.saved("negative_slope")),
    )
)
register(
    Operation(
        "AbsBackward0",
        "piecewise linear",
        operands="+",
        saved={0: "self"},
        sign="nonnegative",
        replay=lambda step, x: x.abs(),
    )
)

# Infinite at 0: coefficients.
coefficient("RsqrtBackward0", lambda s, x: torch.rsqrt(x), result="result", sign="nonnegative")
coefficient("ReciprocalBackward0", lambda s, x: x.reciprocal(), result="result")
coefficient("LogBackward0", lambda s, x: torch.log(x), saved={0: "self"})
coefficient("Log2Backward0", lambda s, x: torch.log2(x), saved={0: "self"})
coefficient("Log10Backward0", lambda s, x: torch.log10(x), saved={0: "self"})

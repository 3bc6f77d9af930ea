"""Functions of two operands that are more than a sum, a product or a quotient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.elementwise import coefficient, power_rise
from dynlrp.rules.expansion import expand
from dynlrp.rules.operation import (
    OUTPUT,
    Grads,
    Need,
    Operation,
    Rule,
    Step,
    StepShape,
    divide,
    dot,
    linear_operation,
    missing,
    product,
    register,
)
from dynlrp.rules.shape import always, number

SAVED = {0: "self", 1: "other"}


def _value(step: Any, name: str, operand: Tensor | None) -> Any:
    """An operand; one that autograd did not record may have been saved."""
    return step.saved(name) if operand is None else operand


# Choices: the VJP goes to the operand that was chosen.
for _name, _saved in (
    ("FmaxBackward0", SAVED),
    ("FminBackward0", SAVED),
    ("ClampMinBackward1", {0: "self", 1: "min"}),
    ("ClampMaxBackward1", {0: "self", 1: "max"}),
    ("ClampBackward0", {0: "self", 1: "min", 2: "max"}),
):
    linear_operation(_name, family="choice", copies=True, operands="+", sign="same", saved=_saved, hides=missing)

# Linear in the first operand, or one number off; the second is a coefficient.
linear_operation("CopysignBackward0", family="piecewise linear", operands="+-", saved={0: "self"}, result="result")
linear_operation("NextafterBackward0", family="rounding", operands="+-", saved=SAVED, hides=always)
linear_operation(
    "XlogyBackward0",
    family="scaling",
    operands="*-",
    saved=SAVED,
    replay=lambda step, x, y: torch.xlogy(_value(step, "self", x), _value(step, "other", y)),
)
for _name, _function in (("XlogyBackward2", torch.xlogy), ("SpecialXlog1PyBackward2", torch.special.xlog1py)):
    linear_operation(
        _name,
        family="scaling",
        operands="+",
        saved={0: "self"},
        replay=lambda step, x, function=_function: function(x, step.saved("other")),
    )
coefficient(
    "SpecialZetaBackward0",
    lambda step, x, q: torch.special.zeta(_value(step, "self", x), _value(step, "other", q)),
    saved=SAVED,
)

# Linear in both: x - n * k, for the whole number k that is rounded to.
linear_operation("FmodBackward1", "RemainderBackward1", family="rounding", operands="+", saved=SAVED, hides=missing)
linear_operation(
    "LerpBackward0",
    family="linear map",
    operands="+",
    hides=missing,
    replay=lambda step, a, b: torch.lerp(a, b, step.saved("weight")),
)


@dataclass(frozen=True)
class Hypotenuse(Rule):
    """hypot(a, b), of degree 1 in both together: m_a = m a / hypot(a, b), the VJP, and 0 where both are 0 (exact:
    Euler's theorem)."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT, *(Need(i) for i, wanted in enumerate(step.wants) if wanted)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        whole = step.output()
        return [g * divide(step.operand(i), whole, 0.0) if wanted else None for i, wanted in enumerate(step.wants)]


register(
    Operation(
        "HypotBackward0",
        "statistic",
        rule=Hypotenuse(),
        operands="+",
        saved=SAVED,
        result="result",
        sign="nonnegative",
        hides=missing,
    )
)


@dataclass(frozen=True)
class Angle(Rule):
    """atan2(y, x): the first-order expansion, m_y = m x / r^2 and m_x = -m y / r^2, with no square that overflows. Of
    the angle itself it leaves nothing, as scaling both operands does not turn them: the whole output is an offset
    (exact: Euler's theorem, of degree 0)."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT, Need(0), Need(1)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        y, x = step.operand(0), step.operand(1)
        larger = torch.maximum(y.abs(), x.abs())
        sine, cosine = divide(y, larger, 0.0), divide(x, larger, 0.0)
        square = sine.square() + cosine.square()
        results = [divide(divide(v, square, 0.0) * g, larger, 0.0) for v in (cosine, -sine)]
        offset = dot(g, step.output())
        for m, operand, wanted in zip(results, (y, x), step.wants, strict=True):
            if wanted:
                offset = offset - dot(m, operand.expand_as(m))
        step.book("offsets", offset)
        return results


register(
    Operation(
        "Atan2Backward0",
        "binary",
        rule=Angle(),
        operands="+",
        saved=SAVED,
        replay=lambda step, y, x: torch.atan2(_value(step, "self", y), _value(step, "other", x)),
    )
)


@dataclass(frozen=True)
class TensorPower(Rule):
    """x^y. As a function of x it passes the secant, m_x = m x^(y-1), and what has an exponent of 0 or less is held
    back; the exponent is a coefficient then. Where the exponent alone is a signal, m_y = m (x^y - 1) / y, and the 1 is
    booked (the y/x rule, Achtibat et al. 2024, eq. 9)."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0), Need(1)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        x, y = step.operand(0), step.operand(1)
        if step.signals[1] and not step.signals[0]:
            step.book("offsets", dot(g, torch.ones_like(g)))
            log = x.log()
            slope = torch.where(log.isfinite(), log, 0.0)
            secant = torch.where(y == 0, slope, power_rise(x, y) / torch.where(y == 0, 1.0, y))
            return [None, g * secant.conj()]
        degree = y.real if y.is_complex() else y
        step.book("held back", torch.where(degree > 0, 0.0, product(g, x**y)).sum())
        passes = (degree > 0) & ((x != 0) | (degree >= 1))
        m = g * torch.where(passes, x ** (y - 1), 0.0).conj()
        return [m, torch.zeros_like(m) if step.wants[1] else None]


def _negative_power(node: Any) -> bool:
    """Whether the exponent is one number of 0 or less that autograd did not record."""
    if node.next_functions[1][0] is not None:
        return False
    exponent = node._saved_exponent
    return exponent.ndim == 0 and bool(exponent.real <= 0)


register(
    Operation(
        "PowBackward1",
        "binary",
        rule=TensorPower(),
        operands="**",
        saved={0: "self", 1: "exponent"},
        result="result",
        facts=_negative_power,
        holds=lambda negative: negative,
    )
)


@dataclass(frozen=True)
class IncompleteGamma(Rule):
    """The regularised incomplete gamma functions P(a, x) and Q(a, x) = 1 - P(a, x), as functions of x: the secant, m_x
    = m P(a, x) / x, or its negative (the y/x rule, Achtibat et al. 2024, eq. 9). Autograd has no derivative by a, which
    is a coefficient."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0), Need(1)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        a, x = step.operand(0), step.operand(1)
        secant = torch.where(x == 0, (a == 1).to(x.dtype), torch.igamma(a, x) / torch.where(x == 0, 1.0, x))
        if step.operation.math:  # Q(a, 0) = 1
            step.book("offsets", g.sum())
            secant = -secant
        return [None, g * secant]


for _name, _function, _upper in (("IgammaBackward0", torch.igamma, False), ("IgammacBackward0", torch.igammac, True)):
    register(
        Operation(
            _name,
            "binary",
            rule=IncompleteGamma(),
            operands="-+",
            saved=SAVED,
            sign="nonnegative",
            replay=lambda step, a, x, function=_function: function(_value(step, "self", a), _value(step, "other", x)),
            math=_upper,
        )
    )


def _prelu(step: Any, x: Tensor | None, weight: Tensor | None) -> Tensor:
    x, weight = _value(step, "self", x), _value(step, "weight", weight)
    return torch.where(x > 0, x, weight * x)


@dataclass(frozen=True)
class Prelu(Rule):
    """m_x = m where x > 0 and m w elsewhere: piecewise linear for given slopes w (exact: it is the VJP). Slopes that
    depend on the inputs make a product where x is not positive, of which each factor takes half."""

    books = True

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(0), Need(1)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        x, weight = step.operand(0), step.operand(1)
        if step.signals[1]:
            return step.expand(_prelu, [x if step.present[0] else None, weight], grads)
        return [torch.where(x > 0, g, g * weight), torch.where(x > 0, 0.0, g * x) if step.wants[1] else None]


register(
    Operation(
        "PreluKernelBackward0",
        "piecewise linear",
        rule=Prelu(),
        operands="**",
        saved={0: "self", 1: "weight"},
        replay=_prelu,
    )
)

# Explained by the operations that they stand for.


def _glu(step: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, number(step))
    return a * torch.sigmoid(b)


def _addcmul(step: Any, x: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    a, b = _value(step, "tensor1", a), _value(step, "tensor2", b)
    return _plus(x, None if a is None or b is None else a * b * step.saved("value"))


def _addcdiv(step: Any, x: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    a, b = _value(step, "tensor1", a), _value(step, "tensor2", b)
    return _plus(x, None if a is None or b is None else a / b * step.saved("value"))


def _plus(x: Tensor | None, y: Tensor | None) -> Tensor:
    """The sum of what is known; the rest is a hidden constant."""
    parts = [part for part in (x, y) if part is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _lerp(step: Any, a: Tensor | None, b: Tensor | None, weight: Tensor | None) -> Tensor:
    a, b, weight = _value(step, "self", a), _value(step, "end", b), _value(step, "weight", weight)
    if a is None or b is None:
        return weight * b if a is None else a - weight * a
    return a + weight * (b - a)


def _sum_hides(facts: Any, present: tuple[bool, ...]) -> bool:
    """Factors are saved where one of them was recorded."""
    return not (present[0] and (present[1] or present[2]))


expand("GluBackward0", _glu, saved={0: "self"})
expand("AddcmulBackward0", _addcmul, saved={1: "tensor1", 2: "tensor2"}, hides=_sum_hides)
expand("AddcdivBackward0", _addcdiv, operands="++-", saved={1: "tensor1", 2: "tensor2"}, hides=_sum_hides)
expand(
    "LerpBackward1",
    _lerp,
    saved={0: "self", 1: "end", 2: "weight"},
    hides=lambda facts, present: not (present[2] or (present[0] and present[1])),
)


def _ldexp(step: Any, x: Tensor | None, exponent: Tensor | None) -> Tensor:
    power = torch.pow(2.0, _value(step, "other", exponent))
    return (step.saved("result") / power.detach() if x is None else x) * power


def _logaddexp(step: Any, a: Tensor | None, b: Tensor | None) -> Tensor:
    values = _both(step, a, b)
    y = torch.logsumexp(values, 0)
    # It goes on counting where the imaginary part of a logarithm starts again.
    return y + (torch.logaddexp(*values) - y).detach() if y.is_complex() else y


def _logaddexp2(step: Any, a: Tensor | None, b: Tensor | None) -> Tensor:
    return torch.logsumexp(_both(step, a, b) * math.log(2), 0) / math.log(2)


def _both(step: Any, a: Tensor | None, b: Tensor | None) -> Tensor:
    return torch.stack(torch.broadcast_tensors(_value(step, "self", a), _value(step, "other", b)))  # type: ignore[no-untyped-call]


def _xlog1py(step: Any, x: Tensor | None, y: Tensor | None) -> Tensor:
    x, y = _value(step, "self", x), _value(step, "other", y)
    return x * torch.log1p(torch.where((x == 0) & (y <= -1), 0.0, y))  # nothing times infinity


expand("LdexpBackward0", _ldexp, saved={1: "other"}, result="result")
expand("LogaddexpBackward0", _logaddexp, saved=SAVED)
expand("Logaddexp2Backward0", _logaddexp2, saved=SAVED)
expand("SpecialXlog1PyBackward0", _xlog1py, saved=SAVED)

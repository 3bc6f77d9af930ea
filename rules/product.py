"""Products of two signals (gates, attention written out) and quotients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.attention import Normalised
from dynlrp.rules.operation import Grads, Need, Operation, Replay, Rule, Step, StepShape, linear_operation, register


@dataclass(frozen=True)
class Shares(Rule):
    """A product of two signals passes each its VJP times its share, m_x = m y / 2 and m_y = m x / 2; with one signal
    the other is a coefficient and the signal takes all. Equal shares are AttnLRP's uniform rule (Achtibat et al. 2024,
    eq. 8 and proposition 3.3)."""

    families = frozenset({"product"})

    left: float = 0.5
    right: float = 0.5

    def needs(self, step: StepShape) -> Sequence[Need]:
        first, second = self._factors(step)
        return [Need(other) for one, other in ((first, second), (second, first)) if step.wants[one]]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        results: list[Tensor | None] = [None] * len(step.wants)
        if g is None:
            return results
        math = step.operation.math
        first, second = self._factors(step)
        both = step.signals[first] and step.signals[second]
        for position, share in ((first, self.left), (second, self.right)):
            if step.wants[position]:
                m = math.partial(step, g, position)
                split = both and share != 1 and step.signals[position]
                results[position] = m * share if split else m
        if math.bias is not None and step.wants[math.bias]:
            results[math.bias] = math.bias_backward(step, g)
        return results

    def _factors(self, step: StepShape) -> tuple[int, int]:
        first = step.operation.operands.index("*")
        return first, first + 1


@dataclass(frozen=True)
class Ungated(Shares):
    """The gate g of a product x g is a coefficient and the other factor takes all, m_x = m g (signal takes all, Arras
    et al. 2019).

    For a tensor that gates itself, ``x * g(x)``, this is the secant of the whole function, so that an activation
    written out is explained like its fused form. For gates of other signals it is CP-LRP's treatment.
    """

    def operands(self, operation: Operation, gate: int | None) -> str:
        letters = (operation.letter(i) for i in range(len(operation.operands)))
        return "".join("-" if i == gate else own for i, own in enumerate(letters))


class Elementwise:
    """``mul``: either factor is the other's derivative."""

    bias: int | None = None

    def partial(self, step: Step, g: Tensor, position: int) -> Tensor:
        return g * step.operand(1 - position).conj()


@dataclass(frozen=True)
class Numerator(Rule):
    """x / y is linear in x, m_x = m / y, and y (a norm, a standard deviation, a sum) is a coefficient (Ali et al.
    2022)."""

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(1)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        return (None, None) if g is None else (g / step.operand(1).conj(), None)


def _operands(step: Any, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        step.saved("self") if left is None else left,
        step.saved("other") if right is None else right,
    )


def _multiply(step: Any, left: Tensor | None, right: Tensor | None) -> Tensor:
    a, b = _operands(step, left, right)
    return a * b


def _divide(step: Any, left: Tensor | None, right: Tensor | None) -> Tensor:
    a, b = _operands(step, left, right)
    return a / b


def _divide_rounded(step: Any, left: Tensor | None, right: Tensor | None) -> Tensor:
    a, b = _operands(step, left, right)
    return torch.div(a, b, rounding_mode=step.saved("rounding_mode"))


def _quotient(name: str, replay: Replay, **traits: Any) -> None:
    register(Operation(name, "quotient", rule=Numerator(), operands="*-", saved=SAVED, replay=replay, **traits))


SAVED = {0: "self", 1: "other"}
ROUNDED: dict[str, Any] = {
    "facts": lambda node: node._saved_rounding_mode is not None,
    "holds": lambda rounded: rounded,
}
"""Traits of quotients that are steps where they are rounded."""

register(
    Operation(
        "MulBackward0",
        "product",
        rule=Shares(),
        operands="**",
        saved=SAVED,
        replay=_multiply,
        math=Elementwise(),
        softmax=Normalised(degree=2),
    )
)
_quotient("DivBackward0", _divide, softmax=Normalised())
_quotient("DivBackward2", _divide_rounded, **ROUNDED)


def _times(step: Any, x: Tensor) -> Tensor:
    result: Tensor = x * step.saved("other")
    return result


def _over(step: Any, x: Tensor) -> Tensor:
    result: Tensor = x / step.saved("other")
    return result


def _over_rounded(step: Any, x: Tensor) -> Tensor:
    return torch.div(x, step.saved("other"), rounding_mode=step.saved("rounding_mode"))


# By a number of the C++ side, as in attention written out there.
linear_operation("MulBackward1", family="scaling", replay=_times)
linear_operation("DivBackward1", family="scaling", replay=_over)
linear_operation("DivBackward3", family="scaling", replay=_over_rounded, **ROUNDED)

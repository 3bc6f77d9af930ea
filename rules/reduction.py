"""Sums, means and maxima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import Grads, Operation, Rule, Step, linear_operation, register
from dynlrp.rules.shape import dims, signed


def _dtype(step: Any) -> torch.dtype:
    """A sum may be taken in another dtype than its operand's."""
    dtype: torch.dtype = step.node._input_metadata[0].dtype
    return dtype


linear_operation("SumBackward0", family="reduction", sign="same", replay=lambda step, x: x.sum(dtype=_dtype(step)))
linear_operation("MeanBackward0", family="reduction", sign="same", replay=lambda step, x: x.mean(dtype=_dtype(step)))


def _along(function: Any) -> Any:
    def replay(step: Any, x: Tensor) -> Tensor:
        result: Tensor = function(x, dims(step) or None, keepdim=step.saved("keepdim"), dtype=_dtype(step))
        return result

    return replay


linear_operation("SumBackward1", family="reduction", sign="same", replay=_along(torch.sum))
linear_operation("MeanBackward1", family="reduction", sign="same", replay=_along(torch.mean))
linear_operation(
    "CumsumBackward0",
    family="reduction",
    sign="same",
    replay=lambda step, x: x.cumsum(signed(step.saved("dim")), dtype=_dtype(step)),
)
# Maxima choose: the VJP goes to the chosen element, and is shared among ties where autograd shares it (amax, max()).
for _name in ("MaxBackward0", "MinBackward0", "TopkBackward0", "SortBackward0", "KthvalueBackward0"):
    linear_operation(_name, family="choice", copies=True)
for _name in ("MaxBackward1", "MinBackward1"):
    register(Operation(_name, "choice", operands="+", saved={0: "self"}, result="result"))
for _name in ("AmaxBackward0", "AminBackward0"):
    register(Operation(_name, "choice", operands="+", saved={0: "self"}, result="result"))
for _name in ("MaximumBackward0", "MinimumBackward0"):
    register(Operation(_name, "choice", operands="++", saved={0: "self", 1: "other"}, hides=lambda f, p: not all(p)))


@dataclass(frozen=True)
class Homogeneous(Rule):
    """A function of degree n, f(t x) = t^n f(x): by Euler's theorem the VJP divided by n conserves."""

    degree: float

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return [None if m is None else m / self.degree for m in step.vjp(grads)]


# Statistics are coefficients where they divide; read as signals, norm and deviation have degree 1, variance 2.
linear_operation("LinalgVectorNormBackward0", "StdBackward0", family="statistic", saved={0: "self"})
register(Operation("VarBackward0", "statistic", rule=Homogeneous(2), operands="+", saved={0: "self"}))

"""Sums, products, choices, norms and distances, over dimensions and along them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import (
    Grads,
    Operation,
    Rule,
    Step,
    Taylor,
    blocked,
    linear_operation,
    missing,
    register,
)
from dynlrp.rules.shape import dims, number

# Sums: linear.


def _dtype(step: Any) -> torch.dtype:
    """A sum may be taken in another dtype than its operand's."""
    dtype: torch.dtype = step.node._input_metadata[0].dtype
    return dtype


def _along(function: Any) -> Any:
    def replay(step: Any, x: Tensor) -> Tensor:
        result: Tensor = function(x, dims(step) or None, keepdim=step.saved("keepdim"), dtype=_dtype(step))
        return result

    return replay


for _name, _replay in (
    ("SumBackward0", lambda step, x: x.sum(dtype=_dtype(step))),
    ("SumBackward1", _along(torch.sum)),
    ("MeanBackward0", lambda step, x: x.mean(dtype=_dtype(step))),
    ("MeanBackward1", _along(torch.mean)),
    ("NansumBackward0", _along(torch.nansum)),
    ("TraceBackward0", lambda step, x: x.trace()),
    ("SumBackwardAutogradNestedTensor0", None),
    ("MeanBackwardAutogradNestedTensor0", None),
):
    linear_operation(_name, family="reduction", sign="same", replay=_replay)
linear_operation(
    "CumsumBackward0",
    family="reduction",
    sign="same",
    replay=lambda step, x: x.cumsum(number(step), dtype=_dtype(step)),
    running=True,
)


@dataclass(frozen=True)
class NestedSum(Rule):
    """m_x = m for every summand: a sum over a dimension of a nested tensor (exact: linear), whose derivative PyTorch
    lacks for the jagged layout."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g, x = grads[0], step.saved("self")
        if g is None or x.layout is not torch.jagged:
            return step.vjp(grads)
        if not step.saved("keepdim"):
            for dim in sorted(d % x.ndim for d in dims(step)):
                g = g.unsqueeze(dim)
        return [torch.ones_like(x) * g]


register(Operation("SumBackwardAutogradNestedTensor1", "reduction", rule=NestedSum(), operands="+", sign="same"))

# Choices: the VJP goes to the chosen element, or in equal parts to those that equal it, so that relevance itself may
# pass by it too.


def _chosen(step: Any, x: Tensor) -> Tensor:
    """By the saved indices, which know what is not saved (how many of the largest, in which order)."""
    dim, indices = number(step), step.saved("indices")
    if indices.ndim < x.ndim:
        return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
    return x.gather(dim, indices)


def _chooses(*names: str, **traits: Any) -> None:
    linear_operation(*names, **{"family": "choice", "copies": True, "sign": "same", **traits})


_chooses(
    "MaxBackward0",
    "MinBackward0",
    "MedianBackward1",
    "NanmedianBackward1",
    "ModeBackward0",
    "KthvalueBackward0",
    "TopkBackward0",
    "SortBackward0",
    "SortBackward1",
    "CummaxBackward0",
    "CumminBackward0",
    replay=_chosen,
)
_chooses(
    "MaxBackward1",
    "MinBackward1",
    "AmaxBackward0",
    "AminBackward0",
    "MedianBackward0",
    "NanmedianBackward0",
    saved={0: "self"},
    result="result",
)


def _aminmax(step: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    dim = step.saved("dim")
    least, largest = torch.aminmax(x, dim=None if dim is None else number(step), keepdim=step.saved("keepdim"))
    return least, largest


_chooses("AminmaxBackward0", saved={0: "self"}, result="min", replay=_aminmax)
for _name, _function in (("MaximumBackward0", torch.maximum), ("MinimumBackward0", torch.minimum)):
    _chooses(
        _name,
        saved={0: "self", 1: "other"},
        hides=missing,
        replay=lambda step, a, b, function=_function: function(a, b),
    )
blocked(
    "autograd has no derivative of unique: index the tensor with x[positions] instead",
    "UniqueBackward0",
    "Unique2Backward0",
    "UniqueDimBackward0",
    "UniqueConsecutiveBackward0",
    "UniqueDimConsecutiveBackward0",
)


@dataclass(frozen=True)
class Homogeneous(Rule):
    """A function of degree n, f(t x) = t^n f(x), passes m_x = J^T m / n (exact: by Euler's theorem that conserves).

    ``degrees`` has an entry per output; one that is not the same for every element is a function of the step.
    """

    degrees: tuple[float | Callable[[Any], Tensor | float], ...]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return step.vjp([None if g is None else g / _degree(n, step) for n, g in zip(self.degrees, grads, strict=True)])


def _degree(degree: Any, step: Step) -> Any:
    return degree(step) if callable(degree) else degree


# A product of n elements has degree n: each takes an equal share, as the two factors of a product do.


def _factors(step: Any) -> int:
    count: int = step.saved("self").numel()
    return max(count, 1)


def _factors_along(step: Any) -> int:
    x: Tensor = step.saved("self")
    return max(x.shape[number(step)], 1) if x.ndim else 1


def _factors_until(step: Any) -> Tensor:
    """Entry k of a cumulative product has k factors."""
    x, dim = step.saved("self"), number(step)
    count = torch.arange(1, x.shape[dim] + 1 if x.ndim else 2, device=x.device)
    return count.reshape([-1 if d == dim % x.ndim else 1 for d in range(x.ndim)])


def _factors_of_segments(step: Any) -> Tensor | int:
    if step.saved("reduce") != "prod":
        return 1
    lengths, result = step.saved("lengths"), step.saved("result")
    count = step.saved("offsets").diff() if lengths is None else lengths
    return count.clamp(min=1).reshape(*count.shape, *[1] * (result.ndim - count.ndim))  # type: ignore[no-any-return]


def _has_none(node: Any) -> bool:
    child, number = node.next_functions[0]
    return child is not None and 0 in child._input_metadata[number].shape


OF_NOTHING: dict[str, Any] = {"facts": _has_none, "hides": lambda nothing, present: nothing}
"""Traits of products, which are 1 where there is nothing to multiply."""

for _name, _count in (
    ("ProdBackward0", _factors),
    ("ProdBackward1", _factors_along),
    ("CumprodBackward0", _factors_until),
):
    register(
        Operation(
            _name,
            "reduction",
            rule=Homogeneous((_count,)),
            operands="+",
            saved={0: "self"},
            result="result",
            sign="same",
            **OF_NOTHING,
        )
    )
# The product of an empty segment is 1, and a segment's initial value takes part without being recorded.
register(
    Operation(
        "SegmentReduceBackward0",
        "reduction",
        rule=Homogeneous((_factors_of_segments,)),
        operands="+",
        saved={0: "data"},
        result="result",
        facts=lambda node: node._saved_reduce == "prod" or node._saved_initial is not None,
        hides=lambda starts, present: starts,
    )
)
_smooth: dict[str, Any] = {
    "family": "reduction", "rule": Taylor(), "operands": "+", "saved": {0: "self"}, "result": "result"
}  # fmt: skip
linear_operation("LogsumexpBackward0", softmax=Taylor(), **_smooth)
linear_operation("LogcumsumexpBackward0", **_smooth)

# Statistics are coefficients where they divide. Read as signals, norms, distances and deviations have degree 1, in all
# their operands together, and the variance has 2. A norm of order 0 counts, and is a coefficient.


def _order(name: str) -> dict[str, Any]:
    return {"facts": lambda node: getattr(node, "_saved_" + name), "holds": lambda order: order == 0}


def _statistic(*names: str, **traits: Any) -> None:
    traits = {"family": "statistic", "operands": "+", "result": "result", "saved": {0: "self"}, **traits}
    linear_operation(*names, **traits)


@dataclass(frozen=True)
class Norm(Rule):
    """m_x = m sign(x) (|x| / norm)^(p-1), the VJP, without its powers of x alone that leave the range of float16
    (exact: Euler's theorem, of degree 1)."""

    def __call__(self, step: Any, grads: Grads) -> Sequence[Tensor | None]:
        g, order = grads[0], step.operation.facts(step.node)
        if g is None or order in (None, 1, 2, math.inf, -math.inf):
            return step.vjp(grads)  # type: ignore[no-any-return]
        x, norm = step.saved("self"), step.saved("result")
        if len(step.wants) == 2:
            x = x - step.saved("other")
        elif norm.ndim < x.ndim and norm.ndim:
            for dim in sorted(d % x.ndim for d in dims(step)):
                g, norm = g.unsqueeze(dim), norm.unsqueeze(dim)
        x = x if x.is_complex() else x.to(norm.dtype)
        m = g * x.sgn() * torch.where(x == 0, 0.0, (x.abs() / norm) ** (order - 1))
        return [m, -m][: len(step.wants)]


_statistic("LinalgVectorNormBackward0", rule=Norm(), sign="nonnegative", **_order("ord"))
_statistic(
    "NormBackward0",
    "NormBackward1",
    "NormBackward2",
    "NormBackward3",
    rule=Norm(),
    sign="nonnegative",
    **_order("p"),
)
_statistic(
    "DistBackward0", rule=Norm(), saved={0: "self", 1: "other"}, hides=missing, sign="nonnegative", **_order("p")
)
_statistic("CdistBackward0", saved={0: "x1", 1: "x2"}, hides=missing, sign="nonnegative", apart=True, **_order("p"))
_statistic("EuclideanDistBackward0", saved={0: "x1", 1: "x2"}, hides=missing, sign="nonnegative")
_statistic("PdistBackward0", sign="nonnegative", **_order("p"))


def _deviation(function: Any) -> Any:
    def replay(step: Any, x: Tensor) -> Any:
        return function(x, dims(step) or None, correction=step.saved("correction"), keepdim=step.saved("keepdim"))

    return replay


_statistic("StdBackward0", sign="nonnegative")
_statistic("StdMeanBackward0", result="result0", replay=_deviation(torch.std_mean))
_statistic("VarBackward0", rule=Homogeneous((2,)), result=None, sign="nonnegative", replay=_deviation(torch.var))
_statistic("VarMeanBackward0", rule=Homogeneous((2, 1)), result=None, replay=_deviation(torch.var_mean))


@dataclass(frozen=True)
class Shrink(Rule):
    """m_x = m min(1, maxnorm / norm): slices with too large a norm are scaled down, and the scale is a coefficient (as
    in norms, Ali et al. 2022)."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        return [None if g is None else g * _scale(step).to(g.dtype)]


def _scale(step: Any) -> Tensor:
    """As in PyTorch's kernel, which adds 1e-7 to the norm."""
    x, largest = step.saved("self"), step.saved("maxnorm")
    rest = [d for d in range(x.ndim) if d != number(step) % x.ndim]
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, step.saved("p"), rest, keepdim=True, dtype=wide)
    return torch.where(norm > largest, largest / (norm + 1e-7), 1.0)


register(Operation("RenormBackward0", "linear map", rule=Shrink(), operands="+", saved={0: "self"}, sign="same"))

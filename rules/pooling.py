"""Pooling: averages are linear, max pooling chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.operation import Grads, Rule, Step, linear_operation

aten: Any = torch.ops.aten


def _planes(step: Any) -> int:
    """How many of the last dimensions are pooled, by the node's name."""
    return 3 if "3D" in step.node.name() else 2


def _chosen(step: Any, x: Tensor) -> Tensor:
    """By the saved places of the maxima in their planes, which fixes ties and random windows too."""
    places = step.saved("result1")
    return x.flatten(-_planes(step)).gather(-1, places.flatten(-_planes(step))).reshape(places.shape)


def _max_pool(step: Any, x: Tensor) -> Tensor:
    pool: Any = F.max_pool3d if _planes(step) == 3 else F.max_pool2d
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    kernel, stride, *rest = (step.saved(name) for name in names)
    result: Tensor = pool(x, kernel, stride or None, *rest)
    return result


def _avg_pool(step: Any, x: Tensor) -> Tensor:
    pool = aten.avg_pool3d if _planes(step) == 3 else aten.avg_pool2d
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    result: Tensor = pool(x, *(step.saved(name) for name in names))
    return result


def _adaptive_avg_pool(step: Any, x: Tensor) -> Tensor:
    pool: Any = F.adaptive_avg_pool3d if _planes(step) == 3 else F.adaptive_avg_pool2d
    result: Tensor = pool(x, step.node._input_metadata[0].shape[-_planes(step) :])
    return result


_maximum: dict[str, Any] = {"family": "choice", "operands": "+", "copies": True, "saved": {0: "self"}, "sign": "same"}
linear_operation(
    "MaxPool2DWithIndicesBackward0",
    "MaxPool3DWithIndicesBackward0",
    "AdaptiveMaxPool2DBackward0",
    "AdaptiveMaxPool3DBackward0",
    "FractionalMaxPool2DBackward0",
    "FractionalMaxPool3DBackward0",
    replay=_chosen,
    **_maximum,
)
linear_operation("MaxPool2DBackward0", replay=_max_pool, **_maximum)
linear_operation("MkldnnMaxPool2DBackward0", "MkldnnMaxPool3DBackward0", result="result", replay=_max_pool, **_maximum)

_average: dict[str, Any] = {"family": "pooling", "operands": "+", "saved": {0: "self"}, "sign": "same"}
linear_operation("AvgPool2DBackward0", "AvgPool3DBackward0", replay=_avg_pool, **_average)
linear_operation(
    "AdaptiveAvgPool2DBackward0",
    "AdaptiveAvgPool3DBackward0",
    "MkldnnAdaptiveAvgPool2DBackward0",
    replay=_adaptive_avg_pool,
    **_average,
)


def _place(step: Any, x: Tensor) -> Tensor:
    """Zeros with every element of ``x`` in its saved place."""
    size, places = step.node._input_metadata[0].shape[-_planes(step) :], step.saved("indices")
    if _planes(step) == 3:  # its kernel only checks strides and padding
        volume: Tensor = aten.max_unpool3d(x, places, size, [1, 1, 1], [0, 0, 0])
        return volume
    plane: Tensor = aten.max_unpool2d(x, places, size)
    return plane


@dataclass(frozen=True)
class Unpool(Rule):
    """m_x = m at the element's saved place (exact: every output element is one input element). Where windows
    overlapped, several have the same place and one is written: it takes all, while in autograd's derivative each of
    them takes as much."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        (m,) = step.vjp(grads)
        if m is None:
            return [None]
        order = torch.arange(1, m.numel() + 1, dtype=torch.float64, device=m.device).reshape(m.shape)
        places, planes = step.saved("indices"), _planes(step)
        written = _place(step, order).flatten(-planes).gather(-1, places.flatten(-planes)).reshape(m.shape)
        return [torch.where(written == order, m, 0.0)]


linear_operation(
    "MaxUnpool2DBackward0",
    "MaxUnpool3DBackward0",
    family="pooling",
    rule=Unpool(),
    operands="+",
    sign="same",
    replay=_place,
)

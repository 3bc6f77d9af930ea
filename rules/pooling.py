"""Pooling and resampling: averages and interpolation are linear, max pooling chooses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.operation import Operation, linear_operation, register


def _max_pool2d(step: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(
        x,
        step.saved("kernel_size"),
        step.saved("stride") or None,
        step.saved("padding"),
        step.saved("dilation"),
        step.saved("ceil_mode"),
    )


def _avg_pool2d(step: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.avg_pool2d(
        x,
        step.saved("kernel_size"),
        step.saved("stride"),
        step.saved("padding"),
        step.saved("ceil_mode"),
        step.saved("count_include_pad"),
        step.saved("divisor_override"),
    )
    return result


register(
    Operation(
        "MaxPool2DWithIndicesBackward0",
        "choice",
        operands="+",
        copies=True,
        saved={0: "self"},
        sign="same",
        replay=_max_pool2d,
    )
)
register(
    Operation("MaxPool3DWithIndicesBackward0", "choice", operands="+", copies=True, saved={0: "self"}, sign="same")
)
linear_operation("AvgPool2DBackward0", family="pooling", saved={0: "self"}, sign="same", replay=_avg_pool2d)
linear_operation("AvgPool3DBackward0", family="pooling", saved={0: "self"}, sign="same")
for _name, _function in (
    ("AdaptiveAvgPool2DBackward0", F.adaptive_avg_pool2d),
    ("AdaptiveAvgPool3DBackward0", F.adaptive_avg_pool3d),
):
    linear_operation(
        _name,
        family="pooling",
        saved={0: "self"},
        sign="same",
        replay=lambda step, x, function=_function: function(
            x, step.node._input_metadata[0].shape[-2 if function is F.adaptive_avg_pool2d else -3 :]
        ),
    )
for _name in (
    "UpsampleNearest1DBackward0",
    "UpsampleNearest2DBackward0",
    "UpsampleNearest3DBackward0",
    "UpsampleLinear1DBackward0",
    "UpsampleBilinear2DBackward0",
    "UpsampleBilinear2DAaBackward0",
    "UpsampleTrilinear3DBackward0",
):
    linear_operation(_name, family="pooling", sign="same")
linear_operation("UpsampleBicubic2DBackward0", family="pooling")

"""Padding by a constant or by the tensor's own elements, and folding into and out of patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.operation import linear_operation
from dynlrp.rules.shape import always, signed

aten: Any = torch.ops.aten


def _widths(step: Any) -> list[int]:
    """Of both sides of every dimension, the last first."""
    return [signed(width) for width in step.saved("pad")]


def _border(step: Any, x: Tensor) -> list[Tensor]:
    """What is written at both sides of every dimension, each entry once."""
    parts, widths = [], _widths(step)
    for axis, left, right in zip(range(-1, -len(widths), -1), widths[::2], widths[1::2], strict=False):
        left, right, size = max(left, 0), max(right, 0), x.shape[axis]
        parts += [x.narrow(axis, start, width) for start, width in ((0, left), (size - right, right)) if width]
        x = x.narrow(axis, left, size - left - right)
    return parts


# The number that is written is not recorded: the replay is for places, not for values.
linear_operation(
    "ConstantPadNdBackward0",
    family="movement",
    operands="+",
    copies=True,
    exact=True,
    hides=always,
    writes=_border,
    replay=lambda step, x: aten.constant_pad_nd(x, _widths(step)),
)


def _pad(name: str, pad: Any) -> None:
    def replay(step: Any, x: Tensor) -> Tensor:
        result: Tensor = pad(x, [signed(width) for width in step.saved("padding")])
        return result

    linear_operation(name, family="movement", operands="+", copies=True, saved={0: "self"}, sign="same", replay=replay)


for _d in (1, 2, 3):
    _pad(f"ReflectionPad{_d}DBackward0", getattr(aten, f"reflection_pad{_d}d"))
    _pad(f"ReplicationPad{_d}DBackward0", getattr(aten, f"replication_pad{_d}d"))


def _settings(step: Any) -> list[Any]:
    return [step.saved(name) for name in ("kernel_size", "dilation", "padding", "stride")]


# Patches may reach over the edge, where they hold zeros: not every element is a copy.
linear_operation("Im2ColBackward0", operands="+", sign="same", replay=lambda step, x: F.unfold(x, *_settings(step)))
linear_operation(
    "Col2ImBackward0",
    operands="+",
    sign="same",
    replay=lambda step, x: F.fold(x, step.node._input_metadata[0].shape[-2:], *_settings(step)),
)


def _overlap(step: Any, x: Tensor) -> Tensor:
    shape = step.node._input_metadata[0].shape
    result: Tensor = aten.unfold_backward(x, shape, signed(step.saved("dim")), step.saved("size"), step.saved("step"))
    return result


linear_operation("UnfoldBackwardBackward0", operands="+", replay=_overlap)  # frames that istft adds up

"""Padding by the tensor's own elements, and folding into and out of patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.operation import linear_operation
from dynlrp.rules.shape import signed

aten: Any = torch.ops.aten


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

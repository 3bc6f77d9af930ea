"""Quantised numbers. Rounding has no derivative, so a quantisation whose result is only dequantised is one operation,
PyTorch's fake quantisation, which relevance passes."""

from __future__ import annotations

import torch
from torch import Tensor

from dynlrp.onnx.node import Node, axis_of, operator


def _range(zero_point: Tensor | None) -> tuple[int, int, torch.dtype]:
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    found = torch.iinfo(dtype)
    return found.min, found.max, dtype


def _shaped(v: Tensor, x: Tensor, node: Node) -> Tensor:
    """Scales or zero points as they go with the entries of ``x``."""
    axis, block = axis_of(node.get("axis", 1), x.ndim), node.get("block_size", 0)
    if v.numel() == 1 and v.ndim <= 1:
        return v.reshape(())
    if block:
        return v.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return v.reshape([-1 if d == axis else 1 for d in range(x.ndim)])


@operator("QuantizeLinear")
def _quantize(node: Node, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    least, most, dtype = _range(zero_point)
    y = torch.round(x / _shaped(scale, x, node))
    y = y if zero_point is None else y + _shaped(zero_point, x, node)
    return y.clamp(least, most).to(dtype)


@operator("DequantizeLinear")
def _dequantize(node: Node, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    y = x.to(scale.dtype)
    y = y if zero_point is None else y - _shaped(zero_point, x, node).to(scale.dtype)
    return y * _shaped(scale, x, node)


@operator("FakeQuantize")
def _fake_quantize(node: Node, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """No operator of ONNX: QuantizeLinear and DequantizeLinear with the same scale."""
    least, most, _ = _range(zero_point)
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point.to(torch.int32)
    if scale.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zeros.reshape(()), least, most)
    axis = axis_of(node.get("axis", 1), x.ndim)
    return torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, least, most)


@operator("DynamicQuantizeLinear")
def _dynamic(node: Node, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / torch.where(scale == 0, 1.0, scale)).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)

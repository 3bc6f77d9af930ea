"""Images of another size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.onnx.node import Node, axis_of, operator


@operator("Resize", "Upsample")
def _resize(node: Node, x: Tensor, *more: Any) -> Tensor:
    """Along one dimension after the other, by a matrix: what every output takes of every input."""
    given = (x, *more)
    old = node.kind == "Upsample" or node.opset < 11
    scales: Any = node.given(given, 1 if old else 2, "scales") or None
    sizes: Any = None if old else (node.given(given, 3, "sizes") or None)
    axes = [axis_of(axis, x.ndim) for axis in node.get("axes", range(x.ndim))]
    smooth = None if old or (sizes is None and scales is None) else _interpolated(node, x, axes, scales, sizes)
    if smooth is not None:
        return smooth
    crops = not old and node.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    region = node.given(given, 1, "roi") if crops else None
    if sizes is not None and node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        ratios = [size / x.shape[axis] for axis, size in zip(axes, sizes, strict=True)]
        ratio = (min if node.get("keep_aspect_ratio_policy") == "not_larger" else max)(ratios)
        scales, sizes = [ratio] * len(axes), [math.floor(ratio * x.shape[axis] + 0.5) for axis in axes]
    for number, axis in enumerate(axes):
        size = x.shape[axis]
        scale = sizes[number] / size if scales is None else scales[number]
        part = (region[number], region[number + len(axes)]) if region else (0.0, 1.0)
        target = sizes[number] if sizes is not None else math.floor(size * scale * (part[1] - part[0]))
        if target == size and scale == 1 and not region:
            continue
        matrix, outside = _weights(node, size, target, scale, part, old)
        if node.get("mode", "nearest") == "nearest":
            y = x.index_select(axis, matrix.argmax(1).to(x.device))
        else:
            y = (x.movedim(axis, -1) @ matrix.T.to(x.device, x.dtype)).movedim(-1, axis)
        if outside.any():
            kept = outside.to(x.device).reshape([-1 if d == axis else 1 for d in range(x.ndim)])
            y = torch.where(kept, node.get("extrapolation_value", 0.0), y)
        x = y
    return x


def _interpolated(
    node: Node, x: Tensor, axes: Sequence[int], scales: Sequence[float] | None, sizes: Sequence[int] | None
) -> Tensor | None:
    """The same by PyTorch's own operation, where it has this one."""
    how, count = node.get("coordinate_transformation_mode", "half_pixel"), x.ndim - 2
    if node.get("mode") != "linear" or node.get("antialias", 0) or count not in (1, 2, 3):
        return None
    if how not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    target = list(x.shape)
    for number, axis in enumerate(axes):
        size = x.shape[axis]
        target[axis] = math.floor(size * scales[number]) if scales is not None else (sizes or target)[number]
        if scales is not None and not math.isclose(target[axis] / size, scales[number]):
            return None
    if target[:2] != list(x.shape[:2]) or (how == "pytorch_half_pixel" and 1 in target[2:]):
        return None
    mode = ("linear", "bilinear", "trilinear")[count - 1]
    return F.interpolate(x, target[2:], mode=mode, align_corners=how == "align_corners")


def _weights(
    node: Node, size: int, target: int, scale: float, part: Sequence[float], old: bool
) -> tuple[Tensor, Tensor]:
    """What each of ``target`` outputs takes of ``size`` inputs, and which of them lie outside."""
    out = torch.arange(target, dtype=torch.float64)
    how = "asymmetric" if old else node.get("coordinate_transformation_mode", "half_pixel")
    outside = torch.zeros(target, dtype=torch.bool)
    if how == "align_corners":
        length = size * scale  # which need not be whole
        at = out * (size - 1) / (length - 1) if length != 1 else out * 0
    elif how == "asymmetric":
        at = out / scale
    elif how == "tf_crop_and_resize":
        start, end = part
        at = start * (size - 1) + (out * (end - start) * (size - 1) / (target - 1) if target > 1 else 0 * out)
        if target == 1:
            at = 0.5 * (start + end) * (size - 1) + 0 * out
        outside = (at < 0) | (at > size - 1)
    elif how == "half_pixel_symmetric":
        adjust = target / (scale * size)
        at = size / 2 * (1 - adjust) + (out + 0.5) / scale - 0.5
    elif how == "pytorch_half_pixel" and target == 1:
        at = out * 0
    else:
        at = (out + 0.5) / scale - 0.5
    mode = node.get("mode", "nearest")
    matrix = torch.zeros(target, size, dtype=torch.float64)
    if mode == "nearest":
        rounded = _nearest(at, "floor" if old else node.get("nearest_mode", "round_prefer_floor"))
        matrix[torch.arange(target), rounded.clamp(0, size - 1).long()] = 1
        return matrix, outside
    smooth = bool(node.get("antialias", 0)) and scale < 1
    stretch = scale if smooth else 1.0
    reach = (2 if mode == "cubic" else 1) / stretch
    low = math.floor(-reach) + 1
    first = at.floor()
    for offset in range(low, math.ceil(reach) + 1):
        place = first + offset
        weight = _kernel(mode, (at - place) * stretch, node.get("cubic_coeff_a", -0.75))
        if node.get("exclude_outside", 0):
            weight = torch.where((place < 0) | (place > size - 1), 0.0, weight)
        matrix.index_put_((torch.arange(target), place.clamp(0, size - 1).long()), weight, accumulate=True)
    return matrix / matrix.sum(1, keepdim=True), outside


def _nearest(at: Tensor, how: str) -> Tensor:
    if how == "floor":
        return at.floor()
    if how == "ceil":
        return at.ceil()
    half = at - at.floor() == 0.5
    return torch.where(half, at.floor() if how == "round_prefer_floor" else at.ceil(), (at + 0.5).floor())


def _kernel(mode: str, distance: Tensor, a: float) -> Tensor:
    d = distance.abs()
    if mode == "linear":
        return (1 - d).clamp(min=0)
    inner = ((a + 2) * d - (a + 3)) * d * d + 1
    outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, inner, torch.where(d < 2, outer, 0.0))

"""Operators that move, pick and write entries, and that make tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.onnx.node import Node, axis_of, last_first, operator, plain

# Shapes -------------------------------------------------------------------------------------------------------------

plain("Expand", function=lambda x, shape: x.expand(np.broadcast_shapes(x.shape, shape.tolist())))
plain("Tile", function=lambda x, times: x.repeat(times.tolist()))
operator("Concat")(lambda node, *inputs: torch.cat(inputs, node.get("axis")))


@operator("Reshape")
def _reshape(node: Node, x: Tensor, shape: Tensor | None = None) -> Tensor:
    sizes = list(node.get("shape") if shape is None else shape.tolist())
    if not node.get("allowzero", 0):
        sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze")
def _squeeze(node: Node, x: Tensor, *axes: Any) -> Tensor:
    found = node.given((x, *axes), 1, "axes")
    return x.squeeze() if found is None else x.squeeze(tuple(found))


@operator("Unsqueeze")
def _unsqueeze(node: Node, x: Tensor, *axes: Any) -> Tensor:
    found = node.given((x, *axes), 1, "axes")
    ndim = x.ndim + len(found)
    for axis in sorted(axis % ndim for axis in found):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm", list(range(x.ndim))[::-1]))


@operator("Shape")
def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end")], dtype=torch.int64)


@operator("Size")
def _size(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("Split")
def _split(node: Node, x: Tensor, *split: Any) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    sizes = node.given((x, *split), 1, "split")
    if sizes is None:
        count = node.get("num_outputs", len(node.names))
        size = -(-x.shape[axis] // count)
        sizes = [min(size, max(x.shape[axis] - size * place, 0)) for place in range(count)]
    return torch.split(x, sizes, axis)


@operator("DepthToSpace")
def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    size = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    y = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // size**2, h * size, w * size)


@operator("SpaceToDepth")
def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    size = node.get("blocksize")
    n, c, h, w = x.shape
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, size)
    y = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * size**2, h // size, w // size)


@operator("Pad")
def _pad(
    node: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    widths = list(node.get("pads") if pads is None else pads.tolist())
    fill = node.get("value", 0.0) if value is None else value.item()
    dims = list(range(x.ndim)) if axes is None else [axis_of(axis, x.ndim) for axis in axes.tolist()]
    both = {d: (widths[i], widths[i + len(dims)]) for i, d in enumerate(dims)}
    order = [both.get(d, (0, 0)) for d in range(x.ndim)]
    mode = node.get("mode", "constant")
    flat = last_first(order)
    if mode == "constant":
        return F.pad(x, flat, value=fill)
    for dim, (low, high) in enumerate(order):  # PyTorch pads the last dimensions alone in these modes
        if low < 0 or high < 0:
            x = x.narrow(dim, max(-low, 0), x.shape[dim] + min(low, 0) + min(high, 0))
        if low > 0 or high > 0:
            size, low, high = x.shape[dim], max(low, 0), max(high, 0)
            places = torch.arange(-low, size + high)
            if mode == "edge":
                places = places.clamp(0, size - 1)
            elif mode == "wrap":
                places = places % size
            else:
                period = max(2 * (size - 1), 1)
                places = (places % period) if size > 1 else places * 0
                places = torch.where(places >= size, period - places, places)
            x = x.index_select(dim, places.to(x.device))
    return x


# Picking ------------------------------------------------------------------------------------------------------------


@operator("Slice")
def _slice(node: Node, x: Tensor, *more: Any) -> Tensor:
    given = (x, *more)
    starts, ends = node.given(given, 1, "starts"), node.given(given, 2, "ends")
    axes = node.given(given, 3, "axes") or list(range(len(starts)))
    steps = node.given(given, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step > 0:
            first, last, _ = slice(start, end, step).indices(size)
            x = x.narrow(axis, first, max(last - first, 0))
            if step > 1:
                x = x[(slice(None),) * axis_of(axis, x.ndim) + (slice(None, None, step),)]
        else:
            places = list(range(*slice(start, end if end >= -size - 1 else None, step).indices(size)))
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


@operator("Gather")
def _gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = axis_of(node.get("axis", 0), x.ndim)
    if axis == 0 and x.ndim == 2 and x.is_floating_point():
        return F.embedding(_counted(indices, x.shape[0]).to(x.device, torch.int64), x)
    if indices.ndim == 0:
        return x.select(axis, int(indices))
    places = _counted(indices, x.shape[axis]).to(x.device, torch.int64)
    picked = x.index_select(axis, places.flatten())
    return picked.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _counted(indices: Tensor, size: int) -> Tensor:
    """Counted from the front."""
    return torch.where(indices < 0, indices + size, indices)


@operator("GatherElements")
def _gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    return x.gather(axis, _counted(indices, x.shape[axis]).long())


@operator("GatherND")
def _gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    shared = node.get("batch_dims", 0)
    grids = [
        torch.arange(size, device=x.device).reshape([-1 if d == place else 1 for place in range(indices.ndim - 1)])
        for d, size in enumerate(x.shape[:shared])
    ]
    picked: Tensor = x[(*grids, *indices.unbind(-1))]
    return picked


@operator("Compress")
def _compress(node: Node, x: Tensor, chosen: Tensor) -> Tensor:
    axis = node.get("axis")
    x, axis = (x.flatten(), 0) if axis is None else (x, axis)
    return x.index_select(axis, chosen.nonzero().squeeze(1).to(x.device))


@operator("Trilu")
def _trilu(node: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if node.get("upper", 1) else x.tril(diagonal)


@operator("ReverseSequence")
def _reverse_sequence(node: Node, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    rows = x.movedim((batch, time), (0, 1))
    places = torch.arange(rows.shape[1], device=x.device).expand(rows.shape[:2])
    ends = lengths.to(x.device).unsqueeze(1)
    places = torch.where(places < ends, ends - 1 - places, places)
    picked = rows[torch.arange(len(rows), device=x.device).unsqueeze(1), places]
    return picked.movedim((0, 1), (batch, time))


@operator("NonZero")
def _non_zero(node: Node, x: Tensor) -> Tensor:
    return x.nonzero().T


# Writing ------------------------------------------------------------------------------------------------------------


@operator("ScatterElements", "Scatter")
def _scatter(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = node.get("axis", 0), node.get("reduction", "none")
    places = _counted(indices, x.shape[axis]).long()
    if how == "none":
        return x.scatter(axis, places, updates)
    if how == "add":
        return x.scatter_add(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[how])


REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterND")
def _scatter_nd(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    how, places = node.get("reduction", "none"), indices.unbind(-1)
    if how in ("none", "add"):
        return x.index_put(places, updates, accumulate=how == "add")
    sizes = x.shape[: len(places)]
    flat = torch.zeros_like(places[0])
    for place, size in zip(places, sizes, strict=True):
        flat = flat * size + _counted(place, size)
    rows = x.reshape(math.prod(sizes), -1)
    parts = updates.reshape(flat.numel(), -1)
    return rows.index_reduce(0, flat.flatten(), parts, REDUCTIONS[how]).reshape(x.shape)


# Making ---------------------------------------------------------------------------------------------------------------


@operator("Constant")
def _constant(node: Node) -> Any:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            value = node.attributes[name]
            return value if isinstance(value, Tensor) else torch.tensor(value)
    raise InputError(f"a constant of {', '.join(node.attributes)} is no tensor")


@operator("ConstantOfShape")
def _constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    value = node.get("value")
    if value is None:
        return torch.zeros(shape.tolist(), dtype=node.floats)
    dtype = node.floats if value.dtype == torch.float32 else value.dtype
    return torch.full(shape.tolist(), value.item(), dtype=dtype)


@operator("Range")
def _range(node: Node, start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@operator("EyeLike")
def _eye(node: Node, x: Tensor) -> Tensor:
    number = node.get("dtype")
    eye = torch.ones(x.shape).tril(node.get("k", 0)).triu(node.get("k", 0))
    return eye.to(x.dtype if number is None else node.dtype(number))


@operator("OneHot")
def _one_hot(node: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth), node.get("axis", -1)
    places = indices.long()
    known = (places >= -count) & (places < count)
    hot = F.one_hot(torch.where(known, places % count, 0), count).bool() & known.unsqueeze(-1)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


@operator("GridSample")
def _grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode", "linear"), node.get("mode", "bilinear"))
    corners = bool(node.get("align_corners", 0))
    return F.grid_sample(x, grid, mode, node.get("padding_mode", "zeros"), corners)

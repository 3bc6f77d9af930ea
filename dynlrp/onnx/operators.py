"""What ONNX operators do, in PyTorch: from simple to tricky.

Where PyTorch has the operation itself, it is taken (``layer_norm``, ``conv2d``, ``scaled_dot_product_attention``), so
that its rule is the one that a PyTorch model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.onnx.node import MICROSOFT, Node, axis_of, last_first, operator, plain

aten: Any = torch.ops.aten

# Elementwise ------------------------------------------------------------------------------------------------------

for _name in (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "floor", "log"),
    *("neg", "reciprocal", "relu", "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh"),
):
    plain(_name.capitalize(), function=getattr(torch, _name))
plain("Round", function=torch.round)  # half to even, both
plain("Not", function=torch.logical_not)
plain("IsNaN", function=torch.isnan)
plain("BitwiseNot", function=torch.bitwise_not)
plain("Identity", function=lambda x: x)
plain("HardSwish", function=F.hardswish)
plain("Mish", function=F.mish)
plain("Softplus", function=F.softplus)
plain("Softsign", function=F.softsign)
plain("Add", function=torch.add)
plain("Sub", function=torch.sub)
plain("Mul", function=torch.mul)
plain("And", function=torch.logical_and)
plain("Or", function=torch.logical_or)
plain("Xor", function=torch.logical_xor)
plain("Equal", function=torch.eq)
plain("Greater", function=torch.gt)
plain("Less", function=torch.lt)
plain("GreaterOrEqual", function=torch.ge)
plain("LessOrEqual", function=torch.le)
plain("BitwiseAnd", function=torch.bitwise_and)
plain("BitwiseOr", function=torch.bitwise_or)
plain("BitwiseXor", function=torch.bitwise_xor)
plain("Where", function=torch.where)
plain("Sum", function=lambda *inputs: reduce(torch.add, inputs))
plain("Max", function=lambda *inputs: reduce(torch.maximum, inputs))
plain("Min", function=lambda *inputs: reduce(torch.minimum, inputs))
plain("Mean", function=lambda *inputs: reduce(torch.add, inputs) / len(inputs))
operator("LeakyRelu")(lambda node, x: F.leaky_relu(x, node.get("alpha", 0.01)))
operator("Elu")(lambda node, x: F.elu(x, node.get("alpha", 1.0)))
operator("Celu")(lambda node, x: F.celu(x, node.get("alpha", 1.0)))
operator("ThresholdedRelu")(lambda node, x: F.threshold(x, node.get("alpha", 1.0), 0.0))
operator("Gelu")(lambda node, x: F.gelu(x, approximate=node.get("approximate", "none")))
operator("Gelu", domain=MICROSOFT)(lambda node, x: F.gelu(x))
operator("BiasGelu", domain=MICROSOFT)(lambda node, x, bias: F.gelu(x + bias))
operator("QuickGelu", domain=MICROSOFT)(lambda node, x: x * torch.sigmoid(node.get("alpha", 1.702) * x))


@operator("FastGelu", domain=MICROSOFT)
def _fast_gelu(node: Node, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("PRelu")
def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    if node.opset < 7 and slope.ndim == 1 and x.ndim > 1:  # one number for each channel
        slope = slope.reshape(-1, *[1] * (x.ndim - 2))
    return torch.where(x < 0, x * slope, x)


@operator("Swish")
def _swish(node: Node, x: Tensor) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Selu")
def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.6732631921768188), node.get("gamma", 1.0507010221481323)
    return aten.elu(x, alpha, gamma)  # type: ignore[no-any-return]


@operator("HardSigmoid")
def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    y: Tensor = alpha * x + beta
    return y.clamp(0, 1)


@operator("Shrink")
def _shrink(node: Node, x: Tensor) -> Tensor:
    bias, lambd = node.get("bias", 0.0), node.get("lambd", 0.5)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@operator("IsInf")
def _is_inf(node: Node, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if node.get("detect_positive", 1):
        found |= torch.isposinf(x)
    if node.get("detect_negative", 1):
        found |= torch.isneginf(x)
    return found


@operator("Clip")
def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = node.get("min") if low is None else low.item()
    most = node.get("max") if high is None else high.item()
    return x if least is None and most is None else x.clamp(least, most)


@operator("Div")
def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Pow")
def _pow(node: Node, x: Tensor, exponent: Tensor) -> Tensor:
    if exponent.numel() == 1 and exponent.ndim <= x.ndim and not exponent.requires_grad:
        return (x ** exponent.item()).to(x.dtype)  # as a number, whose rule PyTorch models meet
    return (x**exponent).to(x.dtype)


@operator("Mod")
def _mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@operator("BitShift")
def _bit_shift(node: Node, x: Tensor, by: Tensor) -> Tensor:
    shift = torch.bitwise_left_shift if node.get("direction") == "LEFT" else torch.bitwise_right_shift
    return shift(x, by)


@operator("Cast")
def _cast(node: Node, x: Tensor) -> Tensor:
    return x.to(node.dtype(node.get("to")))


plain("CastLike", function=lambda x, like: x.to(like.dtype))


@operator("Dropout")
def _dropout(node: Node, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise InputError("this file has dropout in training mode: export the model after model.eval()")
    return (x, torch.ones_like(x, dtype=torch.bool))


# Softmax and reductions ---------------------------------------------------------------------------------------------


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return function(x, node.get("axis", -1))
        axis = axis_of(node.get("axis", 1), x.ndim)  # all dimensions from there on are one
        return function(x, axis) if axis == x.ndim - 1 else function(x.flatten(axis), axis).reshape(x.shape)

    return run


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


operator("Softmax")(_softmax(torch.softmax))
operator("LogSoftmax")(_softmax(torch.log_softmax))
operator("Hardmax")(_softmax(_hardmax))


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    @operator(name)
    def run(node: Node, x: Tensor, *more: Any) -> Tensor:
        axes, keep = node.given((x, *more), 1, "axes"), bool(node.get("keepdims", 1))
        if node.get("noop_with_empty_axes", 0) and not axes:
            return function(x.unsqueeze(0), [0], False)
        return function(x, list(axes or range(x.ndim)), keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis_of(axis, x.ndim) for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep) if axes else x


_reduction("ReduceSum", lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype) if axes else x)
_reduction("ReduceMean", lambda x, axes, keep: x.mean(axes, keep) if axes else x)
_reduction(
    "ReduceMax",
    lambda x, axes, keep: x.to(torch.uint8).amax(axes, keep).bool() if x.dtype == torch.bool else x.amax(axes, keep),
)
_reduction(
    "ReduceMin",
    lambda x, axes, keep: x.to(torch.uint8).amin(axes, keep).bool() if x.dtype == torch.bool else x.amin(axes, keep),
)
_reduction("ReduceProd", _prod)
_reduction("ReduceL1", lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype) if axes else x.abs())
_reduction("ReduceL2", lambda x, axes, keep: x.square().sum(axes, keep).sqrt() if axes else x.abs())
_reduction("ReduceSumSquare", lambda x, axes, keep: x.square().sum(axes, keep) if axes else x.square())
_reduction("ReduceLogSum", lambda x, axes, keep: x.sum(axes, keep).log() if axes else x.log())
_reduction("ReduceLogSumExp", _log_sum_exp)


def _arg(name: str, function: Callable[..., Tensor]) -> None:
    @operator(name)
    def run(node: Node, x: Tensor) -> Tensor:
        axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
        if node.get("select_last_index", 0):
            x, last = x.flip(axis), x.shape[axis] - 1
            return torch.rsub(function(x, axis, keepdim=keep), last)
        return function(x, axis, keepdim=keep)


_arg("ArgMax", torch.argmax)
_arg("ArgMin", torch.argmin)


@operator("CumSum")
def _cumsum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    dim = axis_of(int(axis), x.ndim)
    x = x.flip(dim) if node.get("reverse", 0) else x
    y = x.cumsum(dim, dtype=x.dtype)
    if node.get("exclusive", 0):
        y = torch.cat([torch.zeros_like(y.narrow(dim, 0, 1)), y.narrow(dim, 0, y.shape[dim] - 1)], dim)
    return y.flip(dim) if node.get("reverse", 0) else y


@operator("TopK")
def _topk(node: Node, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count, axis = int(node.get("k") if k is None else k), node.get("axis", -1)
    # Of equal ones the first, which topk does not promise.
    values, indices = x.sort(dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


# Products -----------------------------------------------------------------------------------------------------------

plain("MatMul", function=torch.matmul)
plain("Det", function=torch.linalg.det)
plain("Linear", function=lambda x, w, b: F.linear(x, w.T, b))
"""No operator of ONNX: a product with a weight and the sum with its bias, which exporters write apart."""
operator("Einsum")(lambda node, *inputs: torch.einsum(node.get("equation"), *inputs))


@operator("FusedMatMul", domain=MICROSOFT)
def _fused_matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    a, b = (
        _turned(x, node.get(f"transBatch{side}", 0), node.get(f"trans{side}", 0)) for x, side in ((a, "A"), (b, "B"))
    )
    alpha = node.get("alpha", 1.0)
    return a @ b if alpha == 1 else alpha * (a @ b)


def _turned(x: Tensor, batch: int, last: int) -> Tensor:
    """The first dimension goes behind those of the batch if ``batch``; then the last two are swapped if ``last``."""
    x = x.movedim(0, -2) if batch else x
    return x.mT if last else x


@operator("Gemm")
def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    if c is None or not beta:
        return a @ b if alpha == 1 else alpha * (a @ b)
    if not a.is_floating_point():
        alpha, beta = int(alpha), int(beta)
    return torch.addmm(c, a, b, alpha=alpha, beta=beta)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Clip": torch.clamp,
    "HardSigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "LeakyRelu": F.leaky_relu,
    "Relu": lambda x, *_: torch.relu(x),
    "Sigmoid": lambda x, *_: torch.sigmoid(x),
    "Tanh": lambda x, *_: torch.tanh(x),
}
"""What ONNX Runtime fuses into the operator before it: functions of its output and of the activation's numbers."""


def _activated(node: Node, x: Tensor, *numbers: float) -> Tensor:
    kind = node.get("activation")
    if kind not in ACTIVATIONS:
        raise InputError(f"{node.kind} with the activation {kind} is not read")
    return ACTIVATIONS[kind](x, *numbers)


@operator("FusedGemm", domain=MICROSOFT)
def _fused_gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    numbers = [node.get(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return _activated(node, _gemm(node, a, b, c), *(number for number in numbers if number is not None))


# Convolution and pooling ----------------------------------------------------------------------------------------------


def _halved(totals: Sequence[int], more_at_end: bool) -> list[tuple[int, int]]:
    """Padding in all, shared out to both ends."""
    return [(t // 2, t - t // 2) if more_at_end else (t - t // 2, t // 2) for t in totals]


def _written_pads(node: Node, count: int) -> list[tuple[int, int]]:
    pads = node.get("pads", [0] * (2 * count)) if node.get("auto_pad", "NOTSET") == "NOTSET" else [0] * (2 * count)
    return list(zip(pads[:count], pads[count:], strict=True))


def _pads(
    node: Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding at both ends of every spatial dimension."""
    auto = node.get("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return _written_pads(node, len(kernel))
    totals = [  # what is missing to ceil(size / stride) outputs
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    return _halved(totals, more_at_end=auto == "SAME_UPPER")


def _even(x: Tensor, pads: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """Padding that is the same at both ends, which convolutions take; what differs is padded before."""
    if all(low == high for low, high in pads):
        return x, [low for low, _ in pads]
    return F.pad(x, last_first(pads)), [0] * len(pads)


def _spatial(node: Node, count: int) -> tuple[list[int], list[int]]:
    """Strides and dilations."""
    return list(node.get("strides", [1] * count)), list(node.get("dilations", [1] * count))


@operator("Conv")
def _conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    stride, dilation = _spatial(node, w.ndim - 2)
    x, pads = _even(x, _pads(node, x, w.shape[2:], stride, dilation))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[w.ndim - 3]
    return convolve(x, w, b, stride, pads, dilation, node.get("group", 1))


@operator("FusedConv", domain=MICROSOFT)
def _fused_conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    y = _conv(node, x, w, b)
    return _activated(node, y if skip is None else y + skip, *node.get("activation_params", []))


@operator("ConvTranspose")
def _conv_transpose(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    count, kernel = w.ndim - 2, w.shape[2:]
    stride, dilation = _spatial(node, count)
    more = list(node.get("output_padding", [0] * count))
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[count - 1]
    shape, auto = node.get("output_shape"), node.get("auto_pad", "NOTSET")
    if shape is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
    if shape is None:
        pads = _written_pads(node, count)
    else:
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        full = [s * (n - 1) + o + r for s, n, o, r in zip(stride, x.shape[2:], more, reach, strict=True)]
        totals = [f - size for f, size in zip(full, shape[-count:], strict=True)]
        pads = _halved(totals, more_at_end=auto == "SAME_UPPER")
    if all(low == high and low >= 0 for low, high in pads) and all(
        o < max(s, d) for o, s, d in zip(more, stride, dilation, strict=True)
    ):
        return convolve(x, w, b, stride, [low for low, _ in pads], more, node.get("group", 1), dilation)
    y = convolve(x, w, b, stride, 0, 0, node.get("group", 1), dilation)
    # What is cut off, or, with output padding, added.
    ends = [(-low, o - high) for (low, high), o in zip(pads, more, strict=True)]
    return F.pad(y, last_first(ends))


def _pool_settings(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list[tuple[int, int]], bool]:
    kernel = list(node.get("kernel_shape"))
    stride, dilation = _spatial(node, len(kernel))
    return kernel, stride, dilation, _pads(node, x, kernel, stride, dilation), bool(node.get("ceil_mode", 0))


def _beyond(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], pads: Sequence[tuple[int, int]]
) -> list[int]:
    """How much further windows of a pooling that rounds up reach."""
    found = []
    for size, k, s, d, (low, high) in zip(x.shape[2:], kernel, stride, dilation, pads, strict=True):
        reach = (k - 1) * d + 1
        count = -(-(size + low + high - reach) // s) + 1
        if (count - 1) * s >= size + low:  # it would begin in the padding at the end
            count -= 1
        found.append(max((count - 1) * s + reach - size - low - high, 0))
    return found


@operator("MaxPool")
def _max_pool(node: Node, x: Tensor) -> Any:
    kernel, stride, dilation, pads, ceil = _pool_settings(node, x)
    more = _beyond(x, kernel, stride, dilation, pads) if ceil else [0] * len(kernel)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    wide = x if x.is_floating_point() or x.dtype in (torch.int64, torch.int32) else x.to(torch.int32)
    even = all(low == high and 2 * low <= k for (low, high), k in zip(pads, kernel, strict=True)) and not any(more)
    ends = [(low, high + extra) for (low, high), extra in zip(pads, more, strict=True)]
    padding: Any = [low for low, _ in pads] if even else 0
    if not even:
        wide = F.pad(wide, last_first(ends), value=lowest)
    if len(node.names) == 1:
        return pool(wide, kernel, stride, padding, dilation).to(x.dtype)
    y, indices = pool(wide, kernel, stride, padding, dilation, return_indices=True)
    return y.to(x.dtype), _whole(
        indices, x, wide.shape[2:], [0] * len(kernel) if even else [low for low, _ in pads], node
    )


def _whole(indices: Tensor, x: Tensor, sizes: Sequence[int], before: Sequence[int], node: Node) -> Tensor:
    """Places in the whole tensor, of places in each channel with ``before`` entries of padding."""
    places = []
    for size in reversed(sizes):
        places.append(indices % size)
        indices = indices // size
    places = [place - low for place, low in zip(reversed(places), before, strict=True)]
    sizes = list(x.shape[2:])
    if node.get("storage_order", 0):
        places, sizes = places[::-1], sizes[::-1]
    flat = torch.zeros_like(indices)
    for place, size in zip(places, sizes, strict=True):
        flat = flat * size + place
    channels = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return flat + channels * math.prod(sizes)


@operator("AveragePool")
def _average_pool(node: Node, x: Tensor) -> Tensor:
    kernel, stride, dilation, pads, ceil = _pool_settings(node, x)
    counts = bool(node.get("count_include_pad", 0))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    even = all(low == high and 2 * low <= k for (low, high), k in zip(pads, kernel, strict=True))
    if even and dilation == [1] * len(kernel) and not (ceil and counts):
        return pool(x, kernel, stride, [low for low, _ in pads], ceil, counts)
    total, entries = _windows(node, x, counts)
    return total / entries


def _windows(node: Node, x: Tensor, counts: bool) -> tuple[Tensor, Tensor]:
    """Sums under every window, and the number of entries, with those of the padding if that ``counts``."""
    kernel, stride, dilation, pads, ceil = _pool_settings(node, x)
    more = _beyond(x, kernel, stride, dilation, pads) if ceil else [0] * len(kernel)
    widths = last_first(pads)
    ends = [width for extra in reversed(more) for width in (0, extra)]
    inside = F.pad(F.pad(torch.ones_like(x[:1, :1]), widths, value=float(counts)), ends)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    window = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    padded = F.pad(F.pad(x, widths), ends).flatten(0, 1).unsqueeze(1)
    total = convolve(padded, window, None, stride, 0, dilation).squeeze(1)
    return total.reshape(*x.shape[:2], *total.shape[1:]), convolve(inside, window, None, stride, 0, dilation)


@operator("LpPool")
def _lp_pool(node: Node, x: Tensor) -> Tensor:
    p = node.get("p", 2)
    y: Tensor = _windows(node, x.abs() ** p, False)[0] ** (1 / p)
    return y


operator("GlobalAveragePool")(lambda node, x: x.mean(list(range(2, x.ndim)), keepdim=True))
operator("GlobalMaxPool")(lambda node, x: x.amax(list(range(2, x.ndim)), keepdim=True))


@operator("GlobalLpPool")
def _global_lp_pool(node: Node, x: Tensor) -> Tensor:
    p = node.get("p", 2)
    y: Tensor = (x.abs() ** p).sum(list(range(2, x.ndim)), keepdim=True) ** (1 / p)
    return y


# Normalisation and attention ---------------------------------------------------------------------------------------


@operator("BatchNormalization")
def _batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0):
        raise InputError("this file has batch norms in training mode: export the model after model.eval()")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups")
    if node.opset < 21:  # one number for each group
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis, eps = axis_of(node.get("axis", -1), x.ndim), node.get("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    y = F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), eps)
    if len(node.names) == 1:
        return y
    mean = x.mean(list(range(axis, x.ndim)), keepdim=True)
    return y, mean, ((x - mean).square().mean(list(range(axis, x.ndim)), keepdim=True) + eps).rsqrt()


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    axis, eps = axis_of(node.get("axis", -1), x.ndim), node.get("epsilon", 1e-5)
    axes = list(range(axis, x.ndim))
    y: Tensor = x * (x.square().mean(axes, keepdim=True) + eps).rsqrt() * scale
    return y


@operator("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_norm(
    node: Node, x: Tensor, skip: Tensor, scale: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    return F.layer_norm(total, scale.shape, scale, beta, node.get("epsilon", 1e-12)), None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(
    node: Node, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    return _rms_norm(node, total, scale), None, None, total


@operator("LpNormalization")
def _lp_norm(node: Node, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm))


@operator("LRN")
def _lrn(node: Node, x: Tensor) -> Tensor:
    size = node.get("size")
    squares = F.pad(x.square().movedim(1, -1), [(size - 1) // 2, size // 2])
    total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    scale = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total
    y: Tensor = x / scale ** node.get("beta", 0.75)
    return y


@operator("MeanVarianceNormalization")
def _mean_variance(node: Node, x: Tensor) -> Tensor:
    axes = node.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def _heads(x: Tensor, count: int) -> Tensor:
    """Of (batch, sequence, width) to (batch, heads, sequence, width of one)."""
    return x.reshape(*x.shape[:-1], count, -1).transpose(1, 2)


@operator("Attention")
def _attention(
    node: Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *more: Any,
) -> tuple[Tensor, ...]:
    if more or node.get("softcap", 0.0) or len(node.names) > 3:
        raise InputError("Attention with a soft cap, lengths of keys or its scores as an output is not read")
    flat = q.ndim == 3
    if flat:
        heads, kv_heads = node.get("q_num_heads"), node.get("kv_num_heads")
        q, k, v = (_heads(x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if past_key is not None:
        assert past_value is not None
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    times, present = q.shape[1] // k.shape[1], (k, v)
    if times > 1:
        k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    causal = bool(node.get("is_causal", 0))
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        before = 0 if past_key is None else past_key.shape[2]
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        if mask is None or mask.dtype == torch.bool:
            mask = allowed if mask is None else mask & allowed
        else:
            mask = mask.masked_fill(~allowed, -math.inf)
        causal = False
    if mask is not None and mask.shape[-1] < k.shape[2]:
        fill: Any = False if mask.dtype == torch.bool else -math.inf
        mask = F.pad(mask, [0, k.shape[2] - mask.shape[-1]], value=fill)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=node.get("scale"))
    return (y.transpose(1, 2).flatten(2) if flat else y, *present)


@operator("RotaryEmbedding")
def _rotary(node: Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    flat = x.ndim == 3
    if flat:
        x = _heads(x, node.get("num_heads"))
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    size = node.get("rotary_embedding_dim", 0) or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = (t[..., : size // 2].unsqueeze(1) for t in (cos, sin))
    if node.get("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        y = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    y = torch.cat([y, rest], -1) if rest.shape[-1] else y
    return y.transpose(1, 2).flatten(2) if flat else y

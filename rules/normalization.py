"""Normalisation: the statistic that divides is a constant, the rest stays linear.

Layer norm y = (x - mean(x)) * rstd * w + b passes m_x = rstd * (m w - mean(m w)): the mean is linear and takes part,
rstd does not (Ali et al. 2022; Achtibat et al. 2024, section 3.3.3). RMS norm y = x * rstd * w passes rstd * m w;
written out it needs no rule of its own, as rsqrt makes a coefficient. A weight that is normalised itself,
w = v * g / ||v||, is a product of v and g over a constant norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import Grads, Operation, Rule, Step, channel_sum, dot, follow, register
from dynlrp.rules.product import Shares


@dataclass(frozen=True)
class Statistic(Rule):
    """y = (x - mean(x)) / sigma w + b is linear in the input for a fixed sigma; the bias takes its share (Ali et al.
    2022; Achtibat et al. 2024, section 3.3.3).

    A weight that depends on the inputs, as a conditional norm has it, makes a product: it shares equally with the
    normalised input, or takes all where only the weight carries the signal.
    """

    families = frozenset({"normalization"})

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g, math = grads[0], step.operation.math
        results: list[Tensor | None] = [None] * len(step.wants)
        if step.present[0] and any(m is not None for m in grads[1:]):
            results[0] = math.moments_backward(step, *grads[1:])
        if g is None:
            return results
        # What the bias gets is a sum over all of g, which a batch norm's constants need too.
        total = math.bias_backward(step, g) if len(step.wants) > 2 and step.wants[2] else None
        if total is not None:
            results[2] = total
        share = (0.5 if step.signals[0] else 0.0) if step.signals[1] else 1.0
        if share:
            m = math.backward(step, g, total) if share == 1 else math.backward(step, g * share, None)
            results[0] = m if results[0] is None else m + results[0]
        if step.wants[1]:
            results[1] = math.weight_backward(step, g * (1 - share) if step.signals[1] else g)
        bias = step.operation.saved.get(2)
        if total is None and bias and not step.present[2] and step.saved(bias) is not None:
            step.book("constants", (g * step.saved(bias)).sum())
        return results


# Statistics as differentiable functions of the operand, for relevance that is differentiated. ``parts`` bring all that
# a statistic is taken of into the last dimension.

Parts = Callable[[Any, Tensor], Tensor]


def _last(step: Any, x: Tensor) -> Tensor:
    """The last dimensions of each sample."""
    return x.flatten(x.ndim - len(step.saved("normalized_shape")))


def _channels(step: Any, x: Tensor) -> Tensor:
    """Batch and space of each channel."""
    return x.transpose(0, 1).flatten(1)


def _groups(step: Any, x: Tensor) -> Tensor:
    """Groups of channels of each sample."""
    return x.reshape(step.saved("N"), step.saved("group"), -1)


def _mean_of(parts: Parts) -> Callable[[Any, Tensor], Tensor]:
    def mean(step: Any, value: Tensor) -> Tensor:
        x: Tensor = parts(step, step.saved("input").to(value.dtype))
        return x.mean(-1).reshape(value.shape)

    return mean


def _inverse_deviation_of(parts: Parts, centred: bool = True) -> Callable[[Any, Tensor], Tensor]:
    """Nodes do not tell their epsilon; the value does."""

    def rstd(step: Any, value: Tensor) -> Tensor:
        x = parts(step, step.saved("input").to(value.dtype))
        x = x - x.mean(-1, keepdim=True) if centred else x
        square = x.square().mean(-1).reshape(value.shape)
        return torch.rsqrt(square - square.detach() + value.detach() ** -2)

    return rstd


class LayerNorm:
    """The last dimensions of each sample."""

    def backward(self, step: Step, g: Tensor, total: Tensor | None) -> Tensor:
        rstd = step.saved("result2")
        # The kernel's own backward at x = mean, where its term for the deviation is zero. It wants x in the dtype of g.
        m: Tensor = torch.ops.aten.native_layer_norm_backward(
            g, step.zeros(g), step.saved("normalized_shape"), step.zeros(rstd), rstd,
            step.saved("weight"), None, [True, False, False],
        )[0]  # fmt: skip
        if torch.is_grad_enabled():  # of which autograd's derivative is that at x
            weight = step.saved("weight")
            h = g if weight is None else g * weight
            mean = _last(step, h).mean(-1).reshape(rstd.shape)
            m = follow(m, (h - mean) * rstd)
        return m

    def normalised(self, step: Any) -> Tensor:
        y: Tensor = (step.saved("input") - step.saved("result1")) * step.saved("result2")
        return y

    def weight_backward(self, step: Step, g: Tensor) -> Tensor:
        return (g * self.normalised(step)).sum_to_size(step.saved("weight").shape)

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        return g

    def replay(self, step: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        y = self.normalised(step)
        weight, bias = step.saved("weight"), step.saved("bias")
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


class RMSNorm:
    """The last dimensions of each sample, which are not centred."""

    def _normalised(self, step: Any, x: Tensor) -> Tensor:
        y: Tensor = x * step.saved("result1")
        return y

    def _weighted(self, step: Any, y: Tensor) -> Tensor:
        weight = step.saved("weight")
        return y if weight is None else y * weight

    def backward(self, step: Step, g: Tensor, total: Tensor | None) -> Tensor:
        return self._weighted(step, self._normalised(step, g))

    def weight_backward(self, step: Step, g: Tensor) -> Tensor:
        return (g * self._normalised(step, step.saved("input"))).sum_to_size(step.saved("weight").shape)

    def replay(self, step: Any, x: Tensor, w: Tensor | None) -> Tensor:
        return self._weighted(step, self._normalised(step, x)).to(x.dtype)


class PerChannel:
    """What norms with one weight and bias per channel share."""

    def normalised(self, step: Any) -> Tensor:
        """The output before weight and bias."""
        raise NotImplementedError

    def _column(self, v: Tensor, ndim: int) -> Tensor:
        return v.reshape(1, -1, *[1] * (ndim - 2))

    def weight_backward(self, step: Step, g: Tensor) -> Tensor:
        return channel_sum(g * self.normalised(step))

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        return channel_sum(g)


def _trains(node: Any) -> bool:
    """Whether a batch norm took the statistics of the batch; some names say so themselves."""
    return bool(getattr(node, "_saved_training", node.name() == "BatchNormWithUpdateBackward0"))


class BatchNorm(PerChannel):
    """Per channel over batch and space: running statistics, or those of the batch."""

    def _statistics(self, step: Any) -> tuple[Tensor, Tensor]:
        if _trains(step.node):
            return step.saved("result1"), step.saved("result2")
        return step.saved("running_mean"), torch.rsqrt(step.saved("running_var") + self._eps(step))

    def _eps(self, step: Any) -> float:
        eps: float = step.saved("epsilon" if hasattr(step.node, "_saved_epsilon") else "eps")
        return eps

    def _mean_and_scale(self, step: Any) -> tuple[Tensor, Tensor]:
        mean, rstd = self._statistics(step)
        weight = step.saved("weight")
        return mean, rstd if weight is None else rstd * weight

    def affine(self, step: Step) -> tuple[Tensor, Tensor]:
        """Scale and shift of the equivalent affine map per channel."""
        mean, scale = self._mean_and_scale(step)
        shift = -mean * scale
        biased = step.present[2] or step.saved("weight") is not None
        return scale, shift + step.operand(2) if biased else shift

    def backward(self, step: Any, g: Tensor, total: Tensor | None) -> Tensor:
        mean, scale = self._mean_and_scale(step)
        m = g * self._column(scale, g.ndim)
        if _trains(step.node):
            return m - m.mean((0, *range(2, g.ndim)), keepdim=True)
        total = self.bias_backward(step, g) if total is None else total
        step.book("constants", -dot(total, scale * mean))
        return m

    def normalised(self, step: Any) -> Tensor:
        mean, rstd = self._statistics(step)
        x: Tensor = step.saved("input")
        return (x - self._column(mean, x.ndim)) * self._column(rstd, x.ndim)

    def replay(self, step: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        w = step.saved("weight") if w is None else w
        if not _trains(step.node):
            return torch.batch_norm(
                x, w, b, step.saved("running_mean"), step.saved("running_var"), False, 0.0, self._eps(step), False
            )
        mean, scale = self._mean_and_scale(step)
        y = (x - self._column(mean, x.ndim)) * self._column(scale, x.ndim)
        return y if b is None else y + self._column(b, x.ndim)


class GroupNorm(PerChannel):
    """Groups of channels of each sample."""

    def backward(self, step: Step, g: Tensor, total: Tensor | None) -> Tensor:
        weight = step.saved("weight")
        if weight is not None:
            g = g * self._column(weight, g.ndim)
        m = _groups(step, g)
        rstd: Tensor = step.saved("result2")
        return ((m - m.mean(-1, keepdim=True)) * rstd.unsqueeze(-1)).reshape(g.shape)

    def moments_backward(self, step: Any, mean: Tensor | None, rstd: Tensor | None) -> Tensor | None:
        """The mean is an output of its own, and linear; so is the deviation's inverse, a coefficient."""
        if rstd is not None:
            step.book("held back", dot(rstd, step.saved("result2")))
        if mean is None:
            return None
        x: Tensor = step.saved("input")
        size = x.numel() // mean.numel()
        return (mean / size).unsqueeze(-1).expand(*mean.shape, size).reshape(x.shape)

    def normalised(self, step: Any) -> Tensor:
        x: Tensor = step.saved("input")
        y: Tensor = (_groups(step, x) - step.saved("result1").unsqueeze(-1)) * step.saved("result2").unsqueeze(-1)
        return y.reshape(x.shape)

    def replay(self, step: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, weight = self.normalised(step), step.saved("weight")
        y = y if weight is None else y * self._column(weight, y.ndim)
        y = y if b is None else y + self._column(b, y.ndim)
        return y, step.saved("result1"), step.saved("result2")


_layer, _rms, _batch, _group = LayerNorm(), RMSNorm(), BatchNorm(), GroupNorm()
register(
    Operation(
        "NativeLayerNormBackward0",
        "normalization",
        rule=Statistic(),
        operands="+*+",
        saved={0: "input", 2: "bias"},
        hides=lambda facts, present: not present[0],
        statistics={"result1": _mean_of(_last), "result2": _inverse_deviation_of(_last)},
        replay=_layer.replay,
        math=_layer,
    )
)
register(
    Operation(
        "FusedRmsNormBackward0",
        "normalization",
        rule=Statistic(),
        operands="+*",
        saved={0: "input"},
        statistics={"result1": _inverse_deviation_of(_last, centred=False)},
        replay=_rms.replay,
        math=_rms,
    )
)
for _name in (
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
    "NativeBatchNormLegitNoTrainingBackward0",
    "BatchNormNoUpdateBackward0",
    "BatchNormWithUpdateBackward0",
):
    register(
        Operation(
            _name,
            "normalization",
            rule=Statistic(),
            operands="+*+",
            saved={0: "input"},
            facts=lambda node: (_trains(node), node._saved_weight is not None),
            hides=lambda facts, present: not present[0] or (facts[1] and not present[2]),
            statistics={"result1": _mean_of(_channels), "result2": _inverse_deviation_of(_channels)},
            replay=_batch.replay,
            affine=lambda facts: not facts[0],
            math=_batch,
        )
    )
register(
    Operation(
        "NativeGroupNormBackward0",
        "normalization",
        rule=Statistic(),
        operands="+*+",
        saved={0: "input"},
        facts=lambda node: node._saved_weight is not None,
        hides=lambda weighted, present: not present[0] or (weighted and not present[2]),
        statistics={"result1": _mean_of(_groups), "result2": _inverse_deviation_of(_groups)},
        replay=_group.replay,
        math=_group,
    )
)


class WeightNorm:
    """``v * g / ||v||`` over all dimensions but one."""

    bias: int | None = None

    def partial(self, step: Step, g: Tensor, position: int) -> Tensor:
        return self.replay(step, g, step.operand(1)) if position == 0 else self.replay(step, step.operand(0), g)

    def replay(self, step: Any, v: Tensor | None, g: Tensor | None) -> Tensor:
        v = step.saved("v") if v is None else v
        g = step.saved("g") if g is None else g
        w: Tensor = v * (g / step.saved("result1"))
        return w


_weight = WeightNorm()
register(
    Operation(
        "WeightNormInterfaceBackward0",
        "product",
        rule=Shares(),
        operands="**",
        saved={0: "v", 1: "g"},
        statistics={"result1": lambda step, norm: torch.norm_except_dim(step.saved("v"), 2, step.saved("dim"))},
        replay=_weight.replay,
        math=_weight,
    )
)

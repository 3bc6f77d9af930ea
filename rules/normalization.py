"""Normalisation: the statistic that divides is a constant, the rest stays linear.

Layer norm y = (x - mean(x)) * rstd * w + b passes m_x = rstd * (m w - mean(m w)): the mean is linear and takes part,
rstd does not (Ali et al. 2022; Achtibat et al. 2024, section 3.3.3). RMS norm written out needs no rule of its own, as
rsqrt makes a coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import Grads, Operation, Rule, Step, register


@dataclass(frozen=True)
class Statistic(Rule):
    """Linear in the input for fixed statistics; the bias takes its share."""

    families = frozenset({"normalization"})

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        results: list[Tensor | None] = [None] * len(step.wants)
        if g is None:
            return results
        results[0] = step.operation.math.backward(step, g)
        if step.wants[1]:
            results[1] = step.operation.math.weight_backward(step, g)
        if step.wants[2]:
            results[2] = step.operation.math.bias_backward(step, g)
        return results


class LayerNorm:
    """The last dimensions of each sample."""

    def backward(self, step: Step, g: Tensor) -> Tensor:
        weight, bias = step.saved("weight"), step.saved("bias")
        if bias is not None and not step.present[2]:
            step.book("constants", (g * bias).sum())
        mean = step.saved("result1")
        # The kernel's own backward at x = mean, where its term for the deviation is zero.
        m: Tensor = torch.ops.aten.native_layer_norm_backward(
            g, mean.expand_as(g), step.saved("normalized_shape"), mean, step.saved("result2"), weight, bias,
            [True, False, False],
        )[0]  # fmt: skip
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


class PerChannel:
    """What norms with one weight and bias per channel share."""

    def normalised(self, step: Any) -> Tensor:
        """The output before weight and bias."""
        raise NotImplementedError

    def _column(self, v: Tensor, ndim: int) -> Tensor:
        return v.reshape(1, -1, *[1] * (ndim - 2))

    def weight_backward(self, step: Step, g: Tensor) -> Tensor:
        return (g * self.normalised(step)).sum((0, *range(2, g.ndim)))

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        return g.sum((0, *range(2, g.ndim)))


class BatchNorm(PerChannel):
    """Per channel over batch and space: running statistics, or those of the batch."""

    def _statistics(self, step: Any) -> tuple[Tensor, Tensor]:
        if step.saved("training"):
            return step.saved("result1"), step.saved("result2")
        return (
            step.saved("running_mean"),
            torch.rsqrt(step.saved("running_var") + step.saved("eps")),
        )

    def _scale(self, step: Any) -> Tensor:
        weight, rstd = step.saved("weight"), self._statistics(step)[1]
        return rstd if weight is None else rstd * weight

    def affine(self, step: Step) -> tuple[Tensor, Tensor]:
        """Scale and shift of the equivalent affine map per channel."""
        scale = self._scale(step)
        shift = -self._statistics(step)[0] * scale
        return scale, shift + step.operand(2) if step.present[2] else shift

    def backward(self, step: Step, g: Tensor) -> Tensor:
        scale = self._scale(step)
        m = g * self._column(scale, g.ndim)
        axes = (0, *range(2, g.ndim))
        if step.saved("training"):
            return m - m.mean(axes, keepdim=True)
        step.book("constants", -(g.sum(axes) * scale * self._statistics(step)[0]).sum())
        return m

    def normalised(self, step: Any) -> Tensor:
        mean, rstd = self._statistics(step)
        x: Tensor = step.saved("input")
        return (x - self._column(mean, x.ndim)) * self._column(rstd, x.ndim)

    def replay(self, step: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        w = step.saved("weight") if w is None else w
        if not step.saved("training"):
            return torch.batch_norm(
                x, w, b, step.saved("running_mean"), step.saved("running_var"), False, 0.0, step.saved("eps"), False
            )
        y = (x - self._column(self._statistics(step)[0], x.ndim)) * self._column(self._scale(step), x.ndim)
        return y if b is None else y + self._column(b, x.ndim)


class GroupNorm(PerChannel):
    """Groups of channels of each sample."""

    def _grouped(self, step: Any, v: Tensor) -> Tensor:
        return v.reshape(step.saved("N"), step.saved("group"), -1)

    def backward(self, step: Step, g: Tensor) -> Tensor:
        weight = step.saved("weight")
        if weight is not None:
            g = g * self._column(weight, g.ndim)
        m = self._grouped(step, g)
        rstd: Tensor = step.saved("result2")
        return ((m - m.mean(-1, keepdim=True)) * rstd.unsqueeze(-1)).reshape(g.shape)

    def normalised(self, step: Any) -> Tensor:
        x: Tensor = step.saved("input")
        y: Tensor = (self._grouped(step, x) - step.saved("result1").unsqueeze(-1)) * step.saved("result2").unsqueeze(-1)
        return y.reshape(x.shape)

    def replay(self, step: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        y, weight = self.normalised(step), step.saved("weight")
        y = y if weight is None else y * self._column(weight, y.ndim)
        return y if b is None else y + self._column(b, y.ndim)


_layer, _batch, _group = LayerNorm(), BatchNorm(), GroupNorm()
register(
    Operation(
        "NativeLayerNormBackward0",
        "normalization",
        rule=Statistic(),
        operands="+*+",
        saved={0: "input", 2: "bias"},
        replay=_layer.replay,
        math=_layer,
    )
)
for _name in ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"):
    register(
        Operation(
            _name,
            "normalization",
            rule=Statistic(),
            operands="+*+",
            saved={0: "input"},
            facts=lambda node: (node._saved_training, node._saved_weight is not None),
            hides=lambda facts, present: facts[1] and not present[2],
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
        hides=lambda weighted, present: weighted and not present[2],
        replay=_group.replay,
        math=_group,
    )
)

"""What it means for the output of a model to change: a divergence from the output before, and its curvature there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.errors import InputError

Kind = Literal["softmax", "sigmoid", "cosine", "squared"]


@dataclass(frozen=True)
class Divergence:
    """How far an output ``z`` is from the reference ``y``, for each sample.

    Args:
        kind: ``softmax``, the Kullback-Leibler divergence of the distributions over the last dimension; ``sigmoid``,
            the same of independent Bernoulli variables, summed; ``cosine``, ``1 - cos(z, y)`` along the last
            dimension; ``squared``, ``|z - y|^2 / 2``. Dimensions in between are positions, and the mean is taken over
            them.
        positions: a function from the inputs to the weight of each position, ``(batch, ...)``: a mask of those that
            count, such as ``lambda inputs: inputs["attention_mask"]``.
    """

    kind: Kind = "softmax"
    positions: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "sigmoid", "cosine", "squared"):
            raise InputError(f"a divergence is softmax, sigmoid, cosine or squared, not {self.kind!r}")

    @classmethod
    def of(cls, divergence: Divergence | Kind) -> Divergence:
        """A name is the kind of one."""
        return divergence if isinstance(divergence, Divergence) else cls(divergence)

    def between(self, output: Tensor, reference: Tensor, inputs: Any = None) -> Tensor:
        """The divergence for each sample, ``(batch,)``, in float32 at least."""
        z, y = _wide(output), _wide(reference)
        if self.kind == "softmax":
            each = (y.softmax(-1) * (y.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
        elif self.kind == "sigmoid":
            yes = y.sigmoid() * (F.logsigmoid(y) - F.logsigmoid(z))
            each = (yes + (-y).sigmoid() * (F.logsigmoid(-y) - F.logsigmoid(-z))).sum(-1)
        elif self.kind == "cosine":
            each = 1 - F.cosine_similarity(z, y, dim=-1)
        else:
            each = (z - y).square().sum(-1) / 2
        return (each * self._weights(each, inputs)).flatten(1).sum(1) if each.ndim > 1 else each

    def probe(self, reference: Tensor, generator: torch.Generator, inputs: Any = None) -> Tensor:
        """A random vector ``v`` of the output's shape with ``E[v v^T]`` the Hessian of the divergence at its zero:
        one backward pass from it samples a gradient ``g`` with ``E[(g dw)^2] / 2`` the divergence that a small change
        ``dw`` of weights makes (the Fisher information of the Gauss-Newton approximation, Martens 2020).

        Samples draw one after the other, so that it does not matter which batches they come in."""
        y = _wide(reference.detach())
        u = torch.stack([torch.randn(y.shape[1:], generator=generator, dtype=y.dtype) for _ in y]).to(y.device)
        if self.kind == "softmax":
            p = y.softmax(-1)
            v = p.sqrt() * u - p * (p.sqrt() * u).sum(-1, keepdim=True)
        elif self.kind == "sigmoid":
            v = (y.sigmoid() * (-y).sigmoid()).sqrt() * u
        elif self.kind == "cosine":
            along = F.normalize(y, dim=-1)
            v = (u - along * (u * along).sum(-1, keepdim=True)) / y.norm(dim=-1, keepdim=True)
        else:
            v = u
        if y.ndim > 2:
            v = v * self._weights(v[..., 0], inputs).sqrt()[..., None]
        return v.to(reference.dtype)

    def _weights(self, each: Tensor, inputs: Any) -> Tensor:
        """Of positions, with sum 1 for each sample."""
        if self.positions is None:
            return torch.full_like(each, 1 / math.prod(each.shape[1:]))
        weights = self.positions(inputs).to(each)
        if weights.shape != each.shape:
            raise InputError(
                f"positions= gives weights of shape {tuple(weights.shape)} for positions of {tuple(each.shape)}"
            )
        return weights / weights.flatten(1).sum(1).reshape(-1, *[1] * (each.ndim - 1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

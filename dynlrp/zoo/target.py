"""What of a random model's output is explained."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(y: Tensor) -> Tensor:
    """A sum with fixed random weights, one number per sample, so that every output counts."""
    flat = y.reshape(y.shape[0], -1)
    weights = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return (flat * weights).sum(1)

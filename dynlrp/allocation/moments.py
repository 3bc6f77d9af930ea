"""Averages over samples that come in batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and standard error over samples as they come (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in ``(samples, ...)``."""
        count, mean = len(rows), rows.mean(0)
        total = self.count + count
        away = mean - self.mean
        self.squares = self.squares + (rows - mean).square().sum(0) + away.square() * self.count * count / total
        self.mean = self.mean + away * count / total
        self.count = total

    def error(self) -> Tensor:
        """The standard error of the mean; 0 for one sample, which tells nothing of it."""
        return (self.squares / max(self.count - 1, 1) / self.count).sqrt()

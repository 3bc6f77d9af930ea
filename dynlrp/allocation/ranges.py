"""What a model multiplies, and between which values it lies on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.products import Product, multiplied
from dynlrp.allocation.scores import Task
from dynlrp.errors import InputError


@dataclass(frozen=True)
class Range:
    """What an activation lies between, with 0 in between."""

    low: float
    high: float

    def round(self, x: Tensor, bits: int) -> Tensor:
        """What ``bits`` bits with one scale and zero point hold of it.

        ``q = clamp(round(x / scale) + zero, 0, 2^b - 1)`` and ``(q - zero) scale`` with ``scale = (high - low) / (2^b -
        1)`` and ``zero = round(-low / scale)``.
        """
        most = 2**bits - 1
        scale = (self.high - self.low) / most
        if scale == 0:
            return x.clamp(self.low, self.high)
        zero = round(-self.low / scale)
        rounded: Tensor = (((x / scale).round() + zero).clamp(0, most) - zero) * scale
        return rounded


@dataclass(frozen=True)
class Survey:
    """What a model multiplies."""

    products: list[Product]
    """By the first activation, with the multiply-accumulates of one sample, on average."""
    ranges: dict[str, Range]
    """Of every activation, in the order that they are first multiplied in."""

    @property
    def multiplications(self) -> dict[str, float]:
        """Multiply-accumulates that each activation takes part in, for one sample."""
        found: dict[str, float] = {}
        for product in self.products:
            for name in product.activations:
                found[name] = found.get(name, 0.0) + product.multiplications
        return found


def survey(task: Task) -> Survey:
    """Look at everything that is multiplied while the calibration runs."""
    ranges: dict[str, Range] = {}
    totals: dict[Product, float] = {}
    count = 0

    def look(name: str, x: Tensor) -> Tensor:
        low, high = (float(end) for end in x.detach().aminmax())
        old = ranges.get(name, Range(0.0, 0.0))
        ranges[name] = Range(min(old.low, low), max(old.high, high))
        return x

    for batch in task.batches():
        count += batch_size(batch)
        with torch.no_grad(), multiplied(task.model, task.layers, look) as found:
            task.run(batch)
        for product in found:
            key = Product(product.name, product.activations, 0)
            totals[key] = totals.get(key, 0.0) + product.multiplications
    if not totals:
        raise InputError("the model multiplies no activations, or the calibration holds no batch")
    return Survey([Product(key.name, key.activations, total / count) for key, total in totals.items()], ranges)

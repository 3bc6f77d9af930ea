"""Multiply-accumulates of every layer, counted while the model runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.observe import watching
from dynlrp.allocation.scores import Task


def multiply_accumulates(task: Task) -> dict[str, float]:
    """For one sample, on average over the first batch; by layer."""
    counts = dict.fromkeys(task.layers, 0.0)
    batch = next(task.batches())
    size = batch_size(batch)

    def count(layer: Layer, module: nn.Module, given: Tensor, output: Tensor) -> None:
        counts[layer.name] += output.numel() * layer.fan_in / size

    with watching(task.layers, count), torch.no_grad():
        task.run(batch)
    return counts

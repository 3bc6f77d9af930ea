"""Multiply-accumulates of every layer, counted while the model runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.scores import Task


def multiply_accumulates(task: Task) -> dict[str, float]:
    """For one sample, on average over the first batch; by layer."""
    counts = dict.fromkeys(task.layers, 0.0)
    batch = next(task.batches())
    size = batch_size(batch)
    with ExitStack() as stack:
        for layer in task.layers.values():
            each = layer.weights / layer.weight.shape[layer.output_axis]

            def count(module: nn.Module, args: Any, output: Tensor, name: str = layer.name, each: float = each) -> None:
                counts[name] += output.numel() * each / size

            for module in layer.modules.values():
                stack.callback(module.register_forward_hook(count).remove)
        with torch.no_grad():
            task.run(batch)
    return counts

"""The score that tries it: one layer quantized at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dynlrp.allocation.quantizer import quantized
from dynlrp.allocation.scores import Task, score


@score("measured", noise="none", normalise=False)
def measured(task: Task) -> Iterator[Tensor]:
    """The divergence of the output where this layer alone has b bits: a run of the model for every layer and candidate
    and each batch, so slow; what the others approximate."""
    with torch.no_grad():
        for batch in task.batches():
            reference = task.run(batch)
            columns = []
            for name in task.layers:
                for bits in task.candidates:
                    with quantized(task.layers, {name: bits}, task.quantizer):
                        columns.append(task.divergence.between(task.run(batch), reference, batch))
            yield torch.stack(columns, 1).reshape(-1, len(task.layers), len(task.candidates))

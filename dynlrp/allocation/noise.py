"""How large the error of quantization is in a layer, and what it costs."""

from __future__ import annotations

import torch
from torch import Tensor

from dynlrp.allocation.scores import Noise, Scores, Task


def costs(scores: Scores, task: Task) -> Tensor:
    """What b bits cost in every layer, ``(layers, candidates)``: the score itself, or sensitivity times noise."""
    if scores.noise == "none":
        return scores.mean
    return scores.mean[:, None] * noise(scores.noise, task)


def noise(kind: Noise, task: Task) -> Tensor:
    """The noise of every layer and candidate, ``(layers, candidates)``, float64."""
    found = [[task.quantizer.noise(layer, bits) for bits in task.candidates] for layer in task.layers.values()]
    matrix = torch.tensor(found, dtype=torch.float64)
    if kind == "relative":
        size = [float(layer.weight.detach().double().square().sum()) for layer in task.layers.values()]
        matrix = matrix / torch.tensor(size, dtype=torch.float64)[:, None].clamp(min=1e-300)
    return matrix

"""How large the error of quantization is in a layer, and what it costs."""

from __future__ import annotations

import torch
from torch import Tensor

from dynlrp.allocation.observe import calls
from dynlrp.allocation.scores import Noise, Scores, Task


def costs(scores: Scores, task: Task) -> Tensor:
    """What b bits cost in every layer, ``(layers, candidates)``: the score itself, or sensitivity times noise."""
    return scores.mean if scores.noise == "none" else scores.mean[:, None] * noise(scores.noise, task)


def noise(kind: Noise, task: Task) -> Tensor:
    """The noise of every layer and candidate, ``(layers, candidates)``, float64; kinds are those of ``Noise``."""
    if kind == "output":
        return _output_noise(task)
    found = [[task.noise(layer, bits) for bits in task.candidates] for layer in task.layers.values()]
    matrix = torch.tensor(found, dtype=torch.float64)
    if kind == "relative":
        sizes = [float(layer.weight.detach().double().square().sum()) for layer in task.layers.values()]
        matrix = _over(matrix, torch.tensor(sizes, dtype=torch.float64))
    return matrix


@torch.no_grad()
def _output_noise(task: Task) -> Tensor:
    """``sum ||(Q_b(W) - W) x||^2 / sum ||W x||^2`` over the calibration."""
    places = {name: place for place, name in enumerate(task.layers)}
    noises = torch.zeros(len(places), len(task.candidates), dtype=torch.float64)
    sizes = torch.zeros(len(places), dtype=torch.float64)
    for batch in task.batches():
        with calls(task.layers) as found:
            task.run(batch)
        for call in found:
            layer, x = call.layer, call.given()
            place = places[layer.name]
            sizes[place] += _square(layer.linear(call.module, x, layer.weight))
            for column, bits in enumerate(task.candidates):
                noises[place, column] += _square(layer.linear(call.module, x, task.error(layer, bits)))
    return _over(noises, sizes)


def _square(tensor: Tensor) -> Tensor:
    return tensor.square().sum(dtype=torch.float64).cpu()


def _over(noises: Tensor, sizes: Tensor) -> Tensor:
    """Relative to the sizes; layers that are 0 have no noise either."""
    return noises / torch.where(sizes == 0, 1.0, sizes)[:, None]

"""Scores that look at weights alone, and the two that look at nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dynlrp.allocation.layers import Layer
from dynlrp.allocation.scores import Task, score


@score("weight_mse", noise="none", normalise=False)
def weight_mse(task: Task) -> Iterator[Tensor]:
    """``||Q_b(W) - W||^2 / n``, the mean squared error of a layer's weights."""
    yield _each(task, lambda layer, bits: task.noise(layer, bits) / layer.weights)


@score("zd", noise="relative")
def zd(task: Task) -> Iterator[Tensor]:
    """The share of weights more than one standard deviation above the mean: ZD of Dumitru et al. (2024)."""
    found = []
    for layer in task.layers.values():
        weight = layer.weight.detach().double()
        found.append((weight > weight.mean() + weight.std(correction=0)).double().mean())
    yield torch.stack(found)[None]


@score("random", noise="relative")
def random(task: Task) -> Iterator[Tensor]:
    """Sensitivities drawn from 0 to 1: what an allocation gains from noise alone."""
    generator = torch.Generator().manual_seed(task.seed)
    yield torch.rand(1, len(task.layers), generator=generator, dtype=torch.float64)


@score("uniform", noise="none", normalise=False)
def uniform(task: Task) -> Iterator[Tensor]:
    """``n 4^-b``, the noise of any weight as if all were alike: the same bits everywhere, as far as the budget goes."""
    yield _each(task, lambda layer, bits: layer.weights * 4.0**-bits)


def _each(task: Task, cost: Callable[[Layer, int], float]) -> Tensor:
    """The cost of every layer and candidate, as one row."""
    table = [[cost(layer, bits) for bits in task.candidates] for layer in task.layers.values()]
    return torch.tensor([table], dtype=torch.float64)

"""Scores by relevance: how much of the explained output passes through a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.scores import Task, score
from dynlrp.errors import InputError
from dynlrp.explain import explain
from dynlrp.explanation import Explanation


@score("relevance", noise="relative")
def relevance(task: Task) -> Iterator[Tensor]:
    """``|sum R|`` of a layer's output: what passes through it on the whole (Ranjan & Savakis 2024)."""
    for explanation, size in _explained(task):
        yield torch.stack(
            [abs(_per_sample(explanation, layer.modules, size, False)) for layer in task.layers.values()], 1
        )


@score("absolute_relevance", noise="relative")
def absolute_relevance(task: Task) -> Iterator[Tensor]:
    """``sum |R|`` of a layer's output, so that what speaks for and against the output does not cancel."""
    for explanation, size in _explained(task):
        yield torch.stack([_per_sample(explanation, layer.modules, size, True) for layer in task.layers.values()], 1)


def _explained(task: Task) -> Iterator[tuple[Explanation, int]]:
    names = [name for layer in task.layers.values() for name in layer.modules]
    for batch in task.batches():
        found = explain(task.model, batch, task.target, composite=task.composite, layers=names, output=task.output)
        yield found, batch_size(batch)


def _per_sample(explanation: Explanation, names: Any, size: int, absolute: bool) -> Tensor:
    """Relevance that passes modules, added up for each sample; 0 where a module took no part."""
    total = torch.zeros(size, dtype=torch.float64)
    for name in names:
        calls = explanation.layers[name]
        for call in calls if isinstance(calls, list) else [calls]:
            if call is not None:
                found = call.detach().to("cpu", torch.float64)
                total += by_sample(found.abs() if absolute else found, size, name).sum(1)
    return total


def by_sample(tensor: Tensor, size: int, name: str) -> Tensor:
    """A layer's tensor as ``(samples, numbers)``: samples lie along its first dimension, maybe each in several
    windows."""
    if tensor.ndim == 0 or len(tensor) % size:
        raise InputError(
            f"layer {name!r} gives a tensor of shape {tuple(tensor.shape)}, whose first dimension is not that of "
            f"{size} samples: use batches of one sample"
        )
    return tensor.reshape(size, -1)

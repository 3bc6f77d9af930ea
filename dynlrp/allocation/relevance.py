"""Scores by relevance: how much of the explained output passes through a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynlrp.allocation.calibration import batch_size, cut
from dynlrp.allocation.samples import by_sample
from dynlrp.allocation.scores import Task, score
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


@score("gradient_x_input", noise="relative")
def gradient_x_input(task: Task) -> Iterator[Tensor]:
    """``sum |g y|`` of a layer's output ``y``, with ``g`` the gradient of what is explained."""
    return absolute_relevance(replace(task, composite="gradient_x_input"))


@score("parameter_relevance", noise="relative")
def parameter_relevance(task: Task) -> Iterator[Tensor]:
    """``sum |R|`` of a layer's weights. What parameters have of a batch is a sum over it, so that samples go one by
    one."""
    names = [f"{name}.weight".lstrip(".") for name in task.layers]
    for batch in task.batches():
        size, rows = batch_size(batch), []
        for number in range(size):
            one = cut(batch, size, slice(number, number + 1))
            explanation = explain(
                task.model, one, task.target, composite=task.composite, parameters=names, output=task.output,
                on_unknown=task.on_unknown,
            )  # fmt: skip
            found = [explanation.parameters[name] for name in names]
            rows.append([0.0 if r is None else float(r.abs().sum()) for r in found])
        yield torch.tensor(rows, dtype=torch.float64)


def _explained(task: Task) -> Iterator[tuple[Explanation, int]]:
    names = [name for layer in task.layers.values() for name in layer.modules]
    for batch in task.batches():
        found = explain(
            task.model, batch, task.target, composite=task.composite, layers=names, output=task.output,
            on_unknown=task.on_unknown,
        )  # fmt: skip
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

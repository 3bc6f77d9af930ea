"""Scores by what layers do to activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.observe import calls
from dynlrp.allocation.samples import by_sample, samples_first
from dynlrp.allocation.scores import Task, score

OUTLIER = 5.0
"""How many times the mean makes an outlier: M of Yin et al. (2024)."""


@score("lim", noise="relative", normalise=False)
def lim(task: Task) -> Iterator[Tensor]:
    """One minus the cosine of the input and output of the block that a layer is in: LIM of Dumitru et al. (2024),
    shifted to be positive.

    The block is the innermost module around the layer that is an element of a ModuleList or Sequential and whose output
    has its input's shape; else the layer itself, if that has; a layer in no block counts as one whose output is
    orthogonal to its input.
    """
    blocks = {name: _blocks(task.model, name) for name in task.layers}
    with torch.no_grad():
        for batch in task.batches():
            size = batch_size(batch)
            with _across({path for paths in blocks.values() for path in paths}, task.model, size) as cosines:
                task.run(batch)
            none = torch.zeros(size, dtype=torch.float64)
            found = [next((cosines[path] for path in paths if path in cosines), none) for paths in blocks.values()]
            yield 1 - torch.stack(found, 1)


@contextmanager
def _across(paths: set[str], model: nn.Module, size: int) -> Iterator[dict[str, Tensor]]:
    """The cosine between the first input and output of modules that keep its shape, for each sample."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                x, y = args[0] if args else next(iter(kwargs.values()), None), output
                y = y[0] if isinstance(y, tuple | list) and y else y
                if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
                    x, y = (by_sample(t, size, path).double().cpu() for t in (x, y))
                    found.setdefault(path, F.cosine_similarity(x, y))

            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        yield found


def _blocks(model: nn.Module, name: str) -> list[str]:
    """Modules around a layer that may be its block, in order of preference."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    parents = {path: model.get_submodule(path.rpartition(".")[0]) for path in around}
    return [path for path in around if isinstance(parents[path], nn.ModuleList | nn.Sequential)] + [name]


@score("owl", noise="relative", normalise=False)
def owl(task: Task) -> Iterator[Tensor]:
    """The share of weights with ``|w_ij| ||x_j||`` more than five times its mean: the layerwise outlier distribution of
    Yin et al. (2024)."""
    with torch.no_grad():
        for batch in task.batches():
            size = batch_size(batch)
            squares = {name: torch.zeros(size, 1) for name in task.layers}
            with calls(task.layers) as found:
                task.run(batch)
            for call in found:
                x = samples_first(call.given(), size, call.layer.name)
                axis = call.layer.channel_axis(x.ndim)
                rest = [d for d in range(1, x.ndim) if d != axis]
                norms = x.square().sum(rest) if rest else x.square()
                squares[call.layer.name] = squares[call.layer.name].to(norms) + norms
            yield torch.stack([_outliers(layer, squares[name].sqrt()) for name, layer in task.layers.items()], 1)


def _outliers(layer: Layer, norms: Tensor) -> Tensor:
    """The share of outliers for each sample; ``norms`` are ``(samples, inputs)``."""
    weight = layer.weight.movedim(layer.output_axis, 0).abs()
    weight = weight.reshape(*weight.shape[:2], -1)  # (out, in / groups, taps)
    groups = max(1, norms.shape[1] // weight.shape[1])
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    found = []
    for sample in norms:
        sizes = weight * sample.reshape(groups, 1, -1, 1)
        found.append((sizes > OUTLIER * sizes.mean()).double().mean().cpu())
    return torch.stack(found)

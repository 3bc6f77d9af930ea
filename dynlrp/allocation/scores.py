"""How much the model suffers from fewer bits in a layer: what a score is, and the registry of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynlrp.allocation.calibration import Calibration
from dynlrp.allocation.divergence import Divergence
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.moments import Moments
from dynlrp.allocation.quantizer import Quantizer
from dynlrp.buffers import Buffer
from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.inputs import call
from dynlrp.options import OnUnknown
from dynlrp.state import same_state, survey
from dynlrp.target import Target, find_output

DEFAULT = "weight_error"
"""The score that is taken where none is named: the one that does best in ``benchmarks/allocation.py``."""

KEPT = 2**27
"""How many numbers the errors of all layers and candidates may hold to be kept."""

Noise = Literal["relative", "absolute", "output", "none"]
"""What a layer's sensitivity is multiplied with to give the cost of b bits: ``relative``, ``||Q_b(W) - W||^2 /
||W||^2``; ``absolute``, ``||Q_b(W) - W||^2``; ``output``, ``||(Q_b(W) - W) x||^2 / ||W x||^2`` over the calibration;
``none``, where the score is a cost of b bits itself."""


@dataclass(frozen=True)
class Task:
    """What a score is asked about: a model with the weights that it has now."""

    model: nn.Module
    layers: dict[str, Layer]
    calibration: Calibration
    candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    quantizer: Quantizer = field(default_factory=Quantizer)
    target: Target = None
    """What of the output is explained, for scores by relevance: as in :func:`dynlrp.explain`."""
    composite: str | Composite = "auto"
    """By which rules."""
    on_unknown: OnUnknown = "error"
    """What becomes of operations without a rule, as in :func:`dynlrp.explain`."""
    divergence: Divergence = field(default_factory=Divergence)
    """What it means for the output to change, for scores that ask that."""
    output: str | int | None = None
    """Which entry of a structured output, as in :func:`dynlrp.explain`."""
    seed: int = 0
    """Of random draws."""

    def batches(self) -> Iterator[Any]:
        """The inputs of the model."""
        return self.calibration.batches(self.model)

    @cached_property
    def _errors(self) -> dict[tuple[str, int], Tensor]:
        return {}

    def error(self, layer: Layer, bits: int) -> Tensor:
        """``Q_b(W) - W``, kept for the next batch where there is room for all."""
        found = self._errors.get((layer.name, bits))
        if found is None:
            found = self.quantizer.round(layer, bits) - layer.weight.detach()
            if len(self.candidates) * sum(layer.weights for layer in self.layers.values()) <= KEPT:
                self._errors[layer.name, bits] = found
        return found

    def noise(self, layer: Layer, bits: int) -> float:
        """``||Q_b(W) - W||^2``."""
        return float(torch.linalg.vector_norm(self.error(layer, bits), dtype=torch.float64)) ** 2

    @cached_property
    def buffers(self) -> list[Buffer]:
        """Those of the model, which no run changes."""
        return survey(self.model, allow_training=False)[1]

    def run(self, batch: Any) -> Tensor:
        """The output of the model."""

        def run() -> Tensor:
            given = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
            return find_output(call(self.model, given), self.output)  # which may change what it is given

        with same_state(self.buffers, allow_training=False, again=run):
            return run()


Function = Callable[[Task], Iterator[Tensor]]
"""Goes through the calibration and gives, for each batch, a sensitivity ``(samples, layers)`` or costs ``(samples,
layers, candidates)``; one row for all where samples play no part. Larger means more bits."""


@dataclass(frozen=True)
class Score:
    """An entry of the registry."""

    name: str
    function: Function
    noise: Noise
    normalise: bool
    """Whether the numbers of each sample are divided by their sum, so that samples count alike."""


SCORES: dict[str, Score] = {}
"""All scores by name."""


def score(name: str, *, noise: Noise, normalise: bool = True) -> Callable[[Function], Function]:
    """Enter a function into the registry."""

    def enter(function: Function) -> Function:
        SCORES[name] = Score(name, function, noise, normalise)
        return function

    return enter


@dataclass(frozen=True)
class Scores:
    """What a score says of every layer, averaged over samples."""

    name: str
    layers: tuple[str, ...]
    candidates: tuple[int, ...]
    mean: Tensor
    """A sensitivity ``(layers,)`` or costs ``(layers, candidates)``, float64."""
    error: Tensor
    """The standard error of the mean, of the same shape; 0 where samples play no part."""
    count: int
    """How many samples the mean is over; 1 where they play no part."""
    noise: Noise
    """What turns a sensitivity into costs."""
    quantizer: Quantizer | None = None
    """How weights were rounded for costs; None for activations."""

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds of the mean over all samples of this kind, by the normal approximation."""
        reach = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
        return self.mean - reach * self.error, self.mean + reach * self.error

    def among(self, layers: Iterable[str], candidates: Iterable[int], quantizer: Quantizer | None = None) -> Scores:
        """These scores for some of the layers and candidates.

        Raises:
            InputError: they are not of all of these, or of another quantizer.
        """
        layers, candidates = tuple(layers), tuple(candidates)
        if not {*layers} <= {*self.layers}:
            raise InputError(f"the scores are not of the layers or activations {sorted({*layers} - {*self.layers})}")
        rows = [self.layers.index(layer) for layer in layers]
        found = replace(self, layers=layers, candidates=candidates, mean=self.mean[rows], error=self.error[rows])
        if self.mean.ndim == 1:
            return found
        if not {*candidates} <= {*self.candidates}:
            raise InputError(f"the scores are of {self.candidates} bits, not of all of {candidates}")
        if quantizer != self.quantizer:
            raise InputError(f"the scores are of {self.quantizer}, not of {quantizer}")
        columns = [self.candidates.index(bits) for bits in candidates]
        return replace(found, mean=found.mean[:, columns], error=found.error[:, columns])


def scores_to_dict(scores: Scores) -> dict[str, Any]:
    """For JSON; without the names of layers."""
    return {
        "name": scores.name,
        "noise": scores.noise,
        "samples": scores.count,
        "candidates": scores.candidates,
        "mean": scores.mean.tolist(),
        "error": scores.error.tolist(),
        "quantizer": None if scores.quantizer is None else asdict(scores.quantizer),
    }


def scores_from_dict(data: Mapping[str, Any], layers: Iterable[str]) -> Scores:
    """What :func:`scores_to_dict` made."""
    mean, error = (torch.tensor(data[key], dtype=torch.float64) for key in ("mean", "error"))
    quantizer = None if data.get("quantizer") is None else Quantizer(**data["quantizer"])
    return Scores(
        data["name"], tuple(layers), tuple(data["candidates"]), mean, error, data["samples"], data["noise"], quantizer
    )


def find_score(name: str) -> Score:
    """The entry of this name."""
    if name not in SCORES:
        raise InputError(f"no score is called {name!r}; there are {', '.join(sorted(SCORES))}")
    return SCORES[name]


def find_noise(score: str, own: Noise, wanted: Noise | None) -> Noise:
    """What a score is multiplied with: its own noise, or another that is wanted."""
    if wanted is None:
        return own
    if wanted not in get_args(Noise):
        raise InputError(f"noise is one of {', '.join(get_args(Noise))}, not {wanted!r}")
    if "none" in (wanted, own) and wanted != own:
        raise InputError(f"score {score!r} is {'a cost of b bits already' if own == 'none' else 'no cost'}")
    return wanted


def measure(
    task: Task,
    name: str = DEFAULT,
    progress: Callable[[int], object] = lambda samples: None,
    noise: Noise | None = None,
) -> Scores:
    """Ask a score about the layers of a model, which stays as it is.

    Args:
        progress: called with the number of samples that each batch held.
        noise: another than the score is meant for.
    """
    entry = find_score(name)
    entry = replace(entry, noise=find_noise(name, entry.noise, noise))
    moments = Moments()
    with torch.inference_mode(False):
        for row in entry.function(task):
            found = row.detach().to("cpu", torch.float64)
            _check(entry.name, found, task)
            moments.add(_normalised(found) if entry.normalise else found)
            progress(len(row))
    if not moments.count:
        raise InputError("the calibration holds no batch")
    return Scores(
        entry.name, tuple(task.layers), task.candidates, moments.mean, moments.error(), moments.count, entry.noise,
        task.quantizer,
    )  # fmt: skip


def _normalised(rows: Tensor) -> Tensor:
    """Divided by the sum of each sample; a sample that says nothing of any layer says the same of all."""
    total = rows.abs().flatten(1).sum(1)
    silent = total == 0
    rows, total = rows + silent.reshape(-1, *[1] * (rows.ndim - 1)), total + silent * rows[0].numel()
    return rows / total.reshape(-1, *[1] * (rows.ndim - 1))


def _check(name: str, rows: Tensor, task: Task) -> None:
    finite = torch.isfinite(rows).flatten(2).all(2) if rows.ndim > 2 else torch.isfinite(rows)
    if not bool(finite.all()):
        layer = list(task.layers)[int((~finite).nonzero()[0, 1])]
        raise InputError(f"score {name!r} is NaN or infinite for layer {layer!r}: is the calibration finite?")

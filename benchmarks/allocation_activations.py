"""Which score gives the best bits for activations: ``python -m benchmarks.allocation --activations``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.allocation_models import Subject
from benchmarks.allocation_table import RANDOM, UNIFORM, Matrix, Part
from dynlrp.allocation import Budget, Calibration, Task, find_layers
from dynlrp.allocation.choices import Choices
from dynlrp.allocation.operand_scores import OPERAND_SCORES, alike
from dynlrp.allocation.products import multiplied
from dynlrp.allocation.ranges import Range, Survey, survey
from dynlrp.allocation.solver import solve

BITS = (2, 3, 4, 5, 6, 8)
BUDGETS = (3.0, 4.0, 5.0, 6.0)
OURS = "Fisher trace and gradient x input, geometric mean"


def by_name(name: str, composite: str = "auto", same: bool = False) -> Callable[[Task, Survey], Matrix]:
    """Costs by a score of the registry; ``same`` has samples count alike."""

    def find(task: Task, survey: Survey) -> Matrix:
        costs = alike(OPERAND_SCORES[name]) if same else OPERAND_SCORES[name]
        rows = torch.cat(list(costs(replace(task, composite=composite), survey)))
        return np.asarray(rows.mean(0).numpy())

    return find


SCORES: dict[str, Callable[[Task, Survey], Matrix]] = {
    "Fisher trace and gradient x input, geometric mean": by_name("fisher_input"),
    "activation error and AttnLRP's relevance, geometric mean": by_name("error_relevance", "attnlrp"),
    "activation error: sum (g da)²": by_name("error"),
    "activation error, samples alike": by_name("error", same=True),
    "Fisher trace x ‖da‖², HAWQ-like": by_name("fisher"),
    "Fisher trace x ‖da‖², samples alike": by_name("fisher", same=True),
    "Gauss-Newton: (sum g da)²": by_name("gauss_newton"),
    "absolute relevance x relative noise, AttnLRP": by_name("relevance", "attnlrp"),
    "absolute relevance x relative noise, AttnLRP and gamma": by_name("relevance", "auto"),
    "absolute relevance x relative noise, CP-LRP": by_name("relevance", "cplrp"),
    "gradient x input x relative noise": by_name("gradient_x_input"),
    "relative noise": by_name("noise"),
    RANDOM: by_name("random"),
    UNIFORM: by_name("uniform"),
}
MEASURED = "measured, one activation at a time"


class Trial:
    """A model with activations rounded, evaluated on held data."""

    def __init__(self, subject: Subject, samples: int) -> None:
        self.subject, self.samples = subject, samples
        self.layers = find_layers(subject.model)
        self.reference = self.run({}, {})

    def task(self, draw: int) -> Task:
        """The calibration of one draw."""
        generator = torch.Generator().manual_seed(1000 + draw)
        rows = torch.randperm(len(self.subject.pool[0]), generator=generator)[: self.samples]
        data = tuple(tensor[rows] for tensor in self.subject.pool)
        return Task(
            self.subject.model, self.layers, Calibration(data, batch_size=16), BITS,
            divergence=self.subject.divergence, seed=draw,
        )  # fmt: skip

    @torch.no_grad()
    def run(self, bits: dict[str, int], ranges: dict[str, Range]) -> Tensor:
        """The output for held data with activations of these bits."""
        held, model = self.subject.held, self.subject.model

        def change(name: str, x: Tensor) -> Tensor:
            return ranges[name].round(x, bits[name]) if name in bits else x

        with multiplied(model, self.layers, change):
            return torch.cat([model(*(t[i : i + 50] for t in held)) for i in range(0, len(held[0]), 50)])

    def evaluate(self, cost: Matrix, found: Survey, budget: float) -> tuple[float, float]:
        """Mean divergence and share of right outputs (NaN where nobody knows) of the bits for some costs."""
        choices = Choices([([name], BITS) for name in found.ranges], found, {}, Budget(budget))
        bits = choices.bits(solve(cost, choices.limits, time_limit=5, gap=1e-4).choice)
        output = self.run(bits, found.ranges)
        held = self.subject.held[0] if len(self.subject.held) == 1 else self.subject.held
        right = self.subject.right
        return (
            float(self.subject.divergence.between(output, self.reference, held).mean()),
            math.nan if right is None else float(right(output).float().mean()),
        )


def find(subject: Subject, draws: int, samples: int, measured: int, randoms: int) -> dict[str, Any]:
    """Divergence and accuracy of every score, ``(draws, budgets)``, and the seconds that scoring took. Ranges are those
    of the draw, so that uniform bits differ too; there is one random allocation for each draw."""
    trial = Trial(subject, samples)
    scores: dict[str, dict[str, list[Any]]] = {}
    for draw in range(draws):
        task = trial.task(draw)
        found = survey(task)
        every = {**SCORES, MEASURED: by_name("measured")} if draw < measured else SCORES
        for name, function in every.items():
            start = time.perf_counter()
            cost = function(task, found)
            seconds = time.perf_counter() - start
            rows = [trial.evaluate(cost, found, budget) for budget in BUDGETS]
            entry = scores.setdefault(name, {"divergence": [], "right": [], "seconds": []})
            entry["divergence"].append([d for d, _ in rows])
            entry["right"].append([r for _, r in rows])
            entry["seconds"].append(seconds)
        print(f"{subject.name}: draw {draw + 1} of {draws}, {len(found.ranges)} activations", flush=True)
    return {"scores": scores, "unpaired": []}


NOTE = """\
Bits for what layers are given and for both factors of attention's products, by each score, with weights as they are,
on models that no choice was made on. Columns are as for weights; *over models* is the interval where models are drawn
too.

{draws} draws of {samples} samples; budgets of 3, 4, 5 and 6 bits over multiply-accumulates; activations from 2 to 8
bits, rounded to nearest with a scale and zero point for each tensor, from the least and largest value of the draw;
one random allocation for each draw; one activation at a time was measured in {measured} of the draws. CPU, threads:
{threads}; torch {torch}, Python {python}. Command: `python -m benchmarks.allocation --activations --write`.
"""
READING = """\
* The geometric mean of the HAWQ-like trace and gradient x input, both as shares of a sample, did best on the
  development models (-1.12 there; the trace -1.04, Gauss-Newton -1.03, activation error -0.99: `--development`), so
  that it is the default. On the models here it beats the trace, for other models too; Gauss-Newton is level with it,
  at a third of the price; measuring one activation at a time is not surely better.
* AttnLRP's relevance in the mean, in place of gradient x input, helps activation error (-0.053 [-0.090, -0.014]; over
  models [-0.187, +0.054]), but less than gradient x input helps the trace. Alone, times relative noise, it is far
  better than uniform bits and behind all gradients. With gamma on convolutions it fails on EfficientNet-Lite0. With
  CP-LRP, by which nothing reaches queries and keys, it is worse than chance on transformers.
* The trace does better where samples count alike (-0.084 [-0.153, -0.025]; over models [-0.243, +0.046]).
* By right outputs the scores with gradients cannot be told apart: all these intervals hold 0."""

ACTIVATIONS = Part("Mixed precision of activations", "activations", OURS, find, NOTE, READING, draws=3, measured=1)

"""Which score gives the best bits: mixed-precision allocations by every score, evaluated on other data.

    python -m benchmarks.allocation --data FOLDER [--activations] [--models minilm lite0 ...] [--development] [--write]

``FOLDER`` holds the archive of vaderSentiment (see ``benchmarks.allocation_models``, also for the packages). Quantizer,
solver, budgets and calibration samples are the same for all scores. Development models served for all choices; the
held-out ones are reported. What was found of a model is kept in the cache and printed again; ``--fresh`` finds it anew.
``--write`` puts table and chart into ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.allocation_activations import ACTIVATIONS
from benchmarks.allocation_models import CACHE, DEVELOPMENT, HELD_OUT, Subject, load
from benchmarks.allocation_table import RANDOM, UNIFORM, Matrix, Part, as_table, compare, draw_chart
from benchmarks.results import write_section
from dynlrp import Composite, When, relevance
from dynlrp.allocation import Budget, Calibration, Quantizer, Task, find_layers, measure, score
from dynlrp.allocation.budget import make_limits
from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.gradients import squared_errors, squared_gradients
from dynlrp.allocation.noise import costs
from dynlrp.allocation.observe import Call, by_layer, watching
from dynlrp.allocation.solver import solve
from dynlrp.rules import Epsilon, Gradient, Secant

BITS = (2, 3, 4, 5, 6, 8)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
OURS = "weight_error"
"""The score that the development models chose."""
SECANTS = Composite.of(
    "secants",
    {
        "convolution": Epsilon(),
        "dense": Epsilon(),
        **{When(name=f"{name}Backward0"): Secant() for name in ("Gelu", "Silu", "Hardtanh", "Tanh")},
        When(): Gradient(),
    },
)
"""Gradients, but LRP's secant at activation functions."""


@score("error_relevance", noise="none", normalise=False)
def error_relevance(task: Task) -> Iterator[Tensor]:
    """``sum_ij (m_ij dw_ij)^2``: as ``weight_error``, with the multipliers of LRP in place of gradients. An output that
    is exactly 0 tells no multiplier and counts as one of 0."""
    generator = torch.Generator().manual_seed(task.seed)
    for batch in task.batches():
        found: list[tuple[Call, Tensor]] = []

        def watch(layer: Any, module: nn.Module, x: Tensor, y: Tensor, found: Any = found) -> Tensor:
            found.append((Call(layer, module, x.detach(), x._version, None), y))
            return y.clone()  # a model may change that in place

        with torch.enable_grad(), watching(task.layers, watch):
            output = task.run(batch)
        probe = task.divergence.probe(output, generator, batch)
        outputs = [y for _, y in found]
        explained = relevance((output * probe).sum(), outputs, composite=task.composite).relevance
        multipliers = [
            None if r is None else torch.where(y == 0, 0.0, r / y).detach()
            for r, y in zip(explained, outputs, strict=True)
        ]
        rows = []
        for layer, graded in by_layer(task.layers, [call for call, _ in found], multipliers):
            rows.append(squared_gradients(layer, graded, batch_size(batch), squared_errors(task, layer)))
        yield torch.stack(rows, 1)


def by_name(name: str, **options: Any) -> Callable[[Task], Matrix]:
    """Costs by a score of the registry, under other options of the task."""

    def find(task: Task) -> Matrix:
        task = replace(task, **options)
        return np.asarray(costs(measure(task, name), task))

    return find


def with_relevance(name: str) -> Callable[[Task], Matrix]:
    """The geometric mean of relevance, times relative noise, and a score of the registry."""

    def find(task: Task) -> Matrix:
        one, two = by_name("absolute_relevance", composite="attnlrp")(task), by_name(name)(task)
        return np.asarray(np.sqrt(np.maximum(one, 0) * np.maximum(two, 0)))

    return find


SCORES: dict[str, Callable[[Task], Matrix]] = {
    "weight error: sum (g dw)²": by_name(OURS),
    "Fisher trace x ‖dW‖², HAWQ-like": by_name("fisher"),
    "ModelOpt's formula: sum g² dy²": by_name("modelopt"),
    "Gauss-Newton: (sum g dy)²": by_name("gauss_newton"),
    "weight error, LRP's secants": by_name("error_relevance", composite=SECANTS),
    "weight error, AttnLRP": by_name("error_relevance", composite="attnlrp"),
    "weight error, AttnLRP and gamma": by_name("error_relevance", composite="auto"),
    "weight error, CP-LRP": by_name("error_relevance", composite="cplrp"),
    "geometric mean of relevance and Fisher trace": with_relevance("fisher"),
    "geometric mean of relevance and Gauss-Newton": with_relevance("gauss_newton"),
    "absolute relevance x relative noise": by_name("absolute_relevance", composite="attnlrp"),
    "relevance x relative noise": by_name("relevance", composite="attnlrp"),
    "gradient x input x relative noise": by_name("gradient_x_input"),
    "weight MSE": by_name("weight_mse"),
    "LIM": by_name("lim"),
    "OWL": by_name("owl"),
    "ZD": by_name("zd"),
}
MEASURED = "measured, one layer at a time"


class Trial:
    """A model whose allocations are evaluated on held data, each once."""

    def __init__(self, subject: Subject, samples: int) -> None:
        self.subject, self.samples = subject, samples
        self.layers = find_layers(subject.model)
        quantizer = Quantizer(scale_bits=0)  # what scales take is the same for all
        self.quantizer = quantizer
        self.own = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.rounded = {n: [quantizer.round(layer, bits) for bits in BITS] for n, layer in self.layers.items()}
        self.known: dict[tuple[int, ...], tuple[float, float]] = {}
        self.reference = self.run()
        self.limits = {
            budget: make_limits(Budget(budget), [[name] for name in self.layers], self.task(0)) for budget in BUDGETS
        }

    def task(self, draw: int) -> Task:
        """The calibration of one draw."""
        generator = torch.Generator().manual_seed(1000 + draw)
        rows = torch.randperm(len(self.subject.pool[0]), generator=generator)[: self.samples]
        data = tuple(tensor[rows] for tensor in self.subject.pool)
        return Task(
            self.subject.model, self.layers, Calibration(data, batch_size=16), BITS, self.quantizer,
            divergence=self.subject.divergence, seed=draw,
        )  # fmt: skip

    @torch.no_grad()
    def run(self) -> Tensor:
        """The output for held data."""
        held, model = self.subject.held, self.subject.model
        return torch.cat([model(*(t[i : i + 50] for t in held)) for i in range(0, len(held[0]), 50)])

    def evaluate(self, cost: Matrix, budget: float) -> tuple[float, float]:
        """Mean divergence and share of right outputs (NaN where nobody knows) of the allocation for some costs."""
        choice = tuple(int(c) for c in solve(cost, self.limits[budget], time_limit=5, gap=1e-4).choice)
        if choice not in self.known:
            for name, place in zip(self.layers, choice, strict=True):
                self.layers[name].weight.data = self.rounded[name][place]
            output = self.run()
            for name, weight in self.own.items():
                self.layers[name].weight.data = weight
            held = self.subject.held[0] if len(self.subject.held) == 1 else self.subject.held
            right = self.subject.right
            self.known[choice] = (
                float(self.subject.divergence.between(output, self.reference, held).mean()),
                math.nan if right is None else float(right(output).float().mean()),
            )
        return self.known[choice]


def find(subject: Subject, draws: int, samples: int, measured: int, randoms: int) -> dict[str, Any]:
    """Divergence and accuracy of every score, ``(draws, budgets)``, and the seconds that scoring took."""
    trial = Trial(subject, samples)
    found: dict[str, Any] = {"scores": {}, "unpaired": [RANDOM, UNIFORM], "layers": len(trial.layers)}

    def add(name: str, cost: Matrix, seconds: float) -> None:
        rows = [trial.evaluate(cost, budget) for budget in BUDGETS]
        entry = found["scores"].setdefault(name, {"divergence": [], "right": [], "seconds": []})
        entry["divergence"].append([d for d, _ in rows])
        entry["right"].append([r for _, r in rows])
        entry["seconds"].append(seconds)

    def timed(name: str, function: Callable[[Task], Matrix], task: Task) -> None:
        start = time.perf_counter()
        cost = function(task)
        add(name, cost, time.perf_counter() - start)

    timed(UNIFORM, by_name("uniform"), trial.task(0))
    for seed in range(randoms):
        timed(RANDOM, by_name("random"), replace(trial.task(0), seed=seed))
    for draw in range(draws):
        task = trial.task(draw)
        for name, function in SCORES.items():
            timed(name, function, task)
        if draw < measured:
            timed(MEASURED, by_name("measured"), task)
        print(f"{subject.name}: draw {draw + 1} of {draws}", flush=True)
    return found


NOTE = """\
Bits for every layer by each score, on models that no choice was made on. *log ratio*: the mean over models, draws of
calibration samples and budgets of log(divergence / divergence of uniform bits), lower is better, with a 95 %
bootstrap interval over draws, the models fixed. *default minus it* is paired, with what allocate takes where no score
is named: below 0, that is better. *over models* is its interval where models are drawn too. *win rate*: of the
default against it, over models, draws and budgets; a draw counts half. *right*: right outputs, or for
EfficientNet-Lite0 those that stay the same; *points right* is the paired difference in percentage points, with an
interval over models. *seconds*: for scoring, of {samples} samples. The last columns are the log ratio of every model.

{draws} draws of {samples} samples; budgets of 2.25, 2.5, 3, 3.5, 4 and 5 bits; weights from 2 to 8 bits, rounded to
nearest with a scale for each channel; {randoms} random allocations; one layer at a time was measured in {measured} of
the draws. CPU, threads: {threads}; torch {torch}, Python {python}. Command: `python -m benchmarks.allocation
--write`.
"""

READING = """\
* Squared weight by weight, gradient times error does better than squared as a sum (Gauss-Newton) or by element of the
  output (ModelOpt), at the same price, and as well as measuring layers one at a time. What errors of one layer cancel
  among themselves, they do not once all layers are rounded.
* Over the HAWQ-like trace the gain is small and comes from two of six models; on EfficientNet-Lite0 the trace is
  better. The gain holds for other samples of these models, not surely for other models. By right outputs weight
  error, the trace, ModelOpt and measuring cannot be told apart: all these intervals hold 0.
* Conserving rules of LRP do not help. They halve what passes the two sides of attention and hold statistics fixed:
  right for shares of an output, wrong for what a small error changes. With LRP's secants at activation functions and
  gradients elsewhere, weight error beats Gauss-Newton (-0.105 [-0.215, -0.004] over models) and ModelOpt (-0.095
  [-0.186, -0.014]) and equals the trace, but is not better than with gradients alone; with AttnLRP it is far worse on
  transformers, and so it is with gamma on convolutions. With CP-LRP nothing reaches queries and keys, so that their
  layers get too few bits. Relevance that passes through a layer, times relative noise, is behind everything with
  gradients, and not better than the rounding error of the weights alone. A geometric mean with the trace was better
  than the trace on the development models, but is worse here (+0.083 [+0.068, +0.098]; over models [+0.008, +0.166]).
* Seconds are of a busy processor: good for comparison among themselves, but for the mean with the trace, which had
  more of it to itself."""

WEIGHTS = Part("Mixed precision", "allocation", next(iter(SCORES)), find, NOTE, READING, draws=5, measured=5)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), help="folder with the archive of vaderSentiment")
    parser.add_argument("--development", action="store_true", help="development models, not the held-out ones")
    parser.add_argument("--activations", action="store_true", help="bits of activations, not of weights")
    parser.add_argument("--models", nargs="*", help="these alone")
    parser.add_argument("--draws", type=int, help="5; 3 for activations")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of a draw")
    parser.add_argument("--measured", type=int, help="draws in which they are also measured one at a time: 5; 1")
    parser.add_argument("--randoms", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="forget what was found")
    parser.add_argument("--quick", action="store_true", help="one small model, two draws of eight samples")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    part = ACTIVATIONS if options.activations else WEIGHTS
    names = options.models or list(DEVELOPMENT if options.development else HELD_OUT)
    options.draws = part.draws if options.draws is None else options.draws
    options.measured = part.measured if options.measured is None else options.measured
    if options.quick:
        names, options.draws, options.samples, options.randoms = options.models or ["vit-b"], 2, 8, 2
    results = {}
    for name in names:
        key = f"{part.chart}-{name}-{options.draws}-{options.samples}-{options.measured}-{options.randoms}"
        path = CACHE / f"{key}.json"
        if options.fresh or not path.exists():
            start = time.perf_counter()
            found = part.find(
                load(name, options.data), options.draws, options.samples, options.measured, options.randoms
            )  # fmt: skip
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        results[name] = json.loads(path.read_text())
    rows = compare(results, part.ours)
    text = as_table(rows, names, part.ours)
    print(text)
    if options.write:
        folder = Path(__file__).parent
        draw_chart(rows, names, folder / f"{part.chart}.svg")
        note = part.note.format(
            draws=options.draws, samples=options.samples, randoms=options.randoms, measured=options.measured,
            threads=options.threads, torch=torch.__version__, python=platform.python_version(),
        )  # fmt: skip
        chart = f"![Every score with its interval, and a mark for each model]({part.chart}.svg)"
        write_section(folder / "RESULTS.md", part.title, f"{note.strip()}\n\n{text}\n\n{part.reading}\n\n{chart}")


if __name__ == "__main__":
    main()

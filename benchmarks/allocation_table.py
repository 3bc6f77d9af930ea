"""How scores of bits compare: the table and the chart of the benchmarks of mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.allocation_models import Subject
from benchmarks.results import table

Matrix = NDArray[np.float64]
RANDOM, UNIFORM = "random", "uniform"


@dataclass(frozen=True)
class Part:
    """A benchmark: what is compared, and how it is written down."""

    title: str
    """Of its section."""
    chart: str
    """Name of the chart's file."""
    ours: str
    """The score that others are compared with, which is the default."""
    find: Callable[[Subject, int, int, int, int], dict[str, Any]]
    """From a model, draws, samples, measured draws and random allocations to what every score gives."""
    note: str
    reading: str
    draws: int
    measured: int
    """In so many draws one at a time is measured too."""


def logs(found: dict[str, Any], name: str) -> Matrix:
    """log(divergence / uniform's) of each draw and budget; where no samples take part in uniform bits, they are one."""
    scores = found["scores"]
    floor = 1e-12
    own, uniform = (np.array(scores[n]["divergence"]) + floor for n in (name, UNIFORM))
    return np.asarray(np.log(own / uniform[: len(own)]))


def interval(groups: list[Matrix], others: bool = False, rounds: int = 10_000) -> tuple[float, float, float]:
    """The mean over groups of their means, with a 95 % bootstrap interval over the members of every group; and, for
    ``others``, over the groups."""
    generator = np.random.default_rng(0)
    means = np.stack([group[generator.integers(len(group), size=(rounds, len(group)))].mean(1) for group in groups])
    if others:
        means = np.take_along_axis(means, generator.integers(len(groups), size=means.shape), axis=0)
    low, high = np.quantile(means.mean(0), [0.025, 0.975])
    return float(np.mean([group.mean() for group in groups])), float(low), float(high)


def rights(found: dict[str, Any], name: str) -> Matrix:
    """The share of right outputs of each draw and budget; empty where nobody knows."""
    right = np.array(found["scores"][name]["right"])
    return right if np.isfinite(right).all() else right[:0]


def paired(results: dict[str, Any], name: str, ours: str, of: Callable[[dict[str, Any], str], Matrix]) -> list[Matrix]:
    """What ``ours`` has less what the other score has, for each draw and budget, of every model."""
    pairs = []
    for found in results.values():
        best, other = of(found, ours), of(found, name)
        if len(other) and name in found["unpaired"]:
            pairs.append(best - other.mean(0))
        else:
            pairs.append(best[: len(other)] - other)
    return [pair for pair in pairs if len(pair)]


def compare(results: dict[str, Any], ours: str) -> list[dict[str, Any]]:
    """A row for each score, best first."""
    rows = []
    for name in next(iter(results.values()))["scores"]:
        every = [logs(found, name) for found in results.values()]
        pairs = paired(results, name, ours, logs)
        right = paired(results, name, ours, rights)
        rows.append(
            {
                "name": name,
                "mean": interval([e.mean(1) for e in every]),
                "models": [float(e.mean()) for e in every],
                "difference": interval([p.mean(1) for p in pairs]),
                "elsewhere": interval([p.mean(1) for p in pairs], others=True),
                "wins": float(np.mean([np.mean((p < 0) + 0.5 * (p == 0)) for p in pairs])),
                "right": float(np.mean([r.mean() for f in results.values() if len(r := rights(f, name))])),
                "righter": interval([100 * r.mean(1) for r in right], others=True),
                "seconds": float(np.mean([np.mean(f["scores"][name]["seconds"]) for f in results.values()])),
            }
        )
    return sorted(rows, key=lambda row: row["mean"][0])


def as_table(rows: list[dict[str, Any]], names: list[str], ours: str) -> str:
    """The table."""
    header = ["score", "log ratio", "default minus it", "over models", "win rate", "right", "points right", "seconds"]
    lines = []
    for row in rows:
        pair = [_show(row["difference"], "+"), _show(row["elsewhere"], "+"), f"{row['wins']:.0%}"]
        lines.append(
            [
                f"**{row['name']}**" if row["name"] == ours else row["name"],
                _show(row["mean"]),
                *(["", "", ""] if row["name"] == ours else pair),
                f"{row['right']:.1%}",
                "" if row["name"] == ours else _show(row["righter"], "+", 1),
                f"{row['seconds']:.2f}",
                *(f"{m:.2f}" for m in row["models"]),
            ]
        )
    return table([*header, *names], lines)


def _show(found: tuple[float, float, float], sign: str = "", places: int = 3) -> str:
    """A mean and its interval, if it has one."""
    mean, low, high = (f"{number:{sign}.{places}f}" for number in found)
    return mean if low == high else f"{mean} [{low}, {high}]"


def draw_chart(rows: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Every score with its interval, and a mark for each model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": path.stem, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    marks = "osD^vPX*"
    for place, row in enumerate(rows):
        mean, low, high = row["mean"]
        axes.plot([low, high], [place, place], color="black", linewidth=2)
        axes.plot(mean, place, "|", color="black", markersize=12)
        for mark, number, model in zip(marks, row["models"], names, strict=False):
            axes.plot(number, place, mark, color="C0", alpha=0.5, markersize=5, label=model if place == 0 else None)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("mean log(divergence / uniform's): left is better")
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, metadata={"Date": None})

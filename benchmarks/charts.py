"""Charts of the benchmarks as SVG files that are the same for the same numbers; each function gives the Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.results import CHARTS, FOLDER

if TYPE_CHECKING:
    from benchmarks.speed import Point, Row

COLOURS = {
    "dynlrp attnlrp": "#0b3c78", "dynlrp epsilon": "#1f5fa8", "dynlrp epsilon_plus": "#4f8fd0",
    "dynlrp auto": "#9cc3ea", "program attnlrp": "#125c4c", "program epsilon": "#1f8a70",
    "program epsilon_plus": "#5bb59d", "program auto": "#a3d9c9", "zennit Epsilon": "#c98a1b",
    "zennit EpsilonPlus": "#e8bf6a", "captum LRP": "#8e5aa8", "autoLRP attnlrp": "#b8452f", "LXT AttnLRP": "#6b6b6b",
    "forward + gradient": "#000000",
}  # fmt: skip
"""Blue for explain, green for programs, other colours for others."""


def save(figure: Figure, name: str, alt: str) -> str:
    """Write a chart and give the Markdown that shows it in the file of results."""
    CHARTS.mkdir(exist_ok=True)
    path = CHARTS / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return f"![{alt}]({path.relative_to(FOLDER).as_posix()})"


def bars(rows: Sequence[Row], value: str, label: str, name: str) -> str:
    """A group of bars for each model in its first setting, a bar for each method."""
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.model, row.setting)
    rows = [row for row in rows if not row.error and row.setting == first[row.model]]
    methods = [method for method in COLOURS if any(row.method == method for row in rows)]
    places, heights, hues, ticks = [], [], [], []
    position = 0.0
    for model in first:
        start = position
        for row in rows:
            if row.model == model:
                places.append(position)
                heights.append(getattr(row, value))
                hues.append(COLOURS[row.method])
                position += 1
        ticks.append((start + position - 1) / 2)
        position += 1
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.16 * position))
    axes.barh(places, heights, 0.9, color=hues)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(ticks, [*first], fontsize=8)
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=COLOURS[method]) for method in methods], methods, fontsize=7, frameon=False,
        bbox_to_anchor=(1.0, 1.0), loc="upper left",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, name, f"{label}, by model and method")


def lines(points: Sequence[Point], axis: str, value: str, name: str) -> str:
    """A line for each method over what grows, both logarithmic."""
    points = [point for point in points if point.axis == axis]
    methods = list(dict.fromkeys(point.method for point in points))
    figure, axes = plt.subplots(figsize=(5.5, 3.5))
    for method in methods:
        line = sorted((point for point in points if point.method == method), key=lambda point: point.size)
        scale = 2**-20 if value == "bytes" else 1.0
        heights = [getattr(point, value) * scale for point in line]
        axes.plot(
            [point.size for point in line], heights, marker="o", markersize=3, color=COLOURS[method], label=method
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({point.size for point in points})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(axis)
    axes.set_ylabel("peak memory, MiB" if value == "bytes" else "seconds")
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, name, f"{'memory' if value == 'bytes' else 'time'} over {axis}, by method")

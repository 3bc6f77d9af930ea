"""Time and memory of explanations beside forward + input gradient of the same model, and beside other libraries.

    python -m benchmarks.speed [--quick] [--threads N] [--only MODEL ...] [--methods METHOD ...]
                               [--parts grid small scaling] [--rows FILE] [--write]

Everything runs interleaved in one process; the tables give medians and ratios, since absolute times depend on the
machine. Memory is the peak of tensor memory above what the model holds, by the profiler's allocation events. Rows are
added to ``--rows`` (out/speed.jsonl) as they come; ``--write`` makes tables and charts of all that are there.
Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.architectures import LARGE, SMALL, TEXT, Case, llama
from benchmarks.goals import Goal, table_of_goals
from benchmarks.results import RESULTS, place, table, write_section
from benchmarks.rivals import METHODS
from benchmarks.rivals.plain import gradient
from benchmarks.timing import interleaved, peak_memory, slope

RIVALS = {
    "zennit Epsilon": "epsilon",
    "zennit EpsilonPlus": "epsilon_plus",
    "captum LRP": "epsilon",
    "autoLRP attnlrp": "auto",
    "LXT AttnLRP": "attnlrp",
}
"""Methods that are measured, and the composite of ours that does what they do."""
MULTIPLIERS = ("attnlrp", "epsilon")
"""Composites that need no more than a gradient does."""
GAMMA = ("auto", "epsilon_plus")
"""Those that raise weights or leave some out."""
CONVOLUTIONAL = ("VGG16", "ResNet-50")
LARGE_ENOUGH = 50e6
"""Weights of a model from which on the goals hold."""


@dataclass(frozen=True)
class Load:
    """What is explained of a model."""

    batch: int = 1
    length: int = 128
    frozen: bool = True

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}{'' if self.frozen else ', trainable'}"


FULL = (Load(), Load(frozen=False), Load(batch=8), Load(length=512), Load(length=2048))
QUICK = (Load(),)


@dataclass(frozen=True)
class Row:
    """A method on a model in a setting."""

    model: str
    weights: int
    setting: str
    method: str
    gradient: float
    """Seconds of forward + input gradient."""
    time: float
    """Relative to that; NaN where the library failed."""
    spread: float
    """Half the distance of the quartiles, relative to the median."""
    first: float
    """Time of the first call relative to the gradient's later ones."""
    gradient_bytes: int
    memory: float
    """Peak relative to the gradient's."""
    error: str = ""
    where: str = ""
    """When, on what and with what it was measured."""


@dataclass(frozen=True)
class Point:
    """A method at one size of a model that grows."""

    axis: str
    size: int
    method: str
    seconds: float
    bytes: int
    where: str = ""


def explanations(case: Case, composites: Iterable[str]) -> list[str]:
    """The methods that are measured on a model: our composites, by a pass and by a program, then the libraries that are
    there and fit."""
    there = [name for name in RIVALS if METHODS[name].installed and METHODS[name].fits(case)]
    return [f"{way} {composite}" for composite in composites for way in ("dynlrp", "program")] + there


def first_calls(case: Case, methods: Iterable[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the first call of each method that works, and what the others say."""
    seconds, errors = {}, {}
    for name in methods:
        start = time.perf_counter()
        try:
            METHODS[name](case)
        except (Exception, MemoryError) as error:  # whatever a library raises is its answer
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        else:
            seconds[name] = time.perf_counter() - start
        gc.collect()
    return seconds, errors


def measure(name: str, case: Case, load: Load, methods: list[str], rounds: int, budget: float) -> list[Row]:
    """A row for each method."""
    first, errors = first_calls(case, methods)
    working = [method for method in methods if method in first]
    functions = [partial(gradient, case), *(partial(METHODS[method], case) for method in working)]
    base, *timings = interleaved(functions, rounds, warm=1, budget=budget)
    base_bytes, *peaks = [peak_memory(function) for function in functions]
    weights = sum(parameter.numel() for parameter in case.model.parameters())
    rows = {
        method: Row(
            name, weights, str(load), method, base.median, timing.median / base.median, timing.spread,
            first[method] / base.median, base_bytes, peak / base_bytes,
        )
        for method, timing, peak in zip(working, timings, peaks, strict=True)
    }  # fmt: skip
    for method, text in errors.items():
        rows[method] = Row(
            name, weights, str(load), method, base.median, math.nan, 0.0, math.nan, base_bytes, math.nan, text
        )
    return [rows[method] for method in methods]


def grid(
    names: Iterable[str], loads: Sequence[Load], rounds: int, budget: float, only: Sequence[str] = ()
) -> Iterator[Row]:
    """Models at their true size, by all methods or some."""
    for name in names:
        images = name not in TEXT
        for load in loads:
            if images and load.length != loads[0].length:
                continue
            torch.manual_seed(0)
            case = LARGE[name](load.batch, load.length)
            case.model.eval().requires_grad_(not load.frozen)
            conv = any(isinstance(module, nn.Conv2d) for module in case.model.modules())
            composites = ("epsilon", "epsilon_plus", "auto") if conv else ("attnlrp",)
            methods = [method for method in explanations(case, composites) if method in only or not only]
            yield from measure(name, case, load, methods, rounds, budget)
            del case
            gc.collect()


def small(rounds: int) -> Iterator[Row]:
    """Ten architectures of two layers, 64 wide: what a pass costs per node is everything here."""
    for name, build in SMALL.items():
        torch.manual_seed(0)
        case = build(1)
        case.model.eval().requires_grad_(False)
        yield from measure(name, case, Load(length=16), ["dynlrp attnlrp", "program attnlrp"], rounds, math.inf)


def deep(layers: int) -> Case:
    """A net of many narrow layers."""
    blocks = [module for _ in range(layers) for module in (nn.Linear(16, 16), nn.ReLU())]
    return Case(nn.Sequential(*blocks).eval().requires_grad_(False), torch.randn(1, 16))


def long(length: int) -> Case:
    """A decoder of four layers that reads a long text."""
    case = llama(1, length, layers=4, width=256)
    case.model.eval().requires_grad_(False)
    return case


AXES = {
    "layers": (
        deep,
        (10, 30, 100, 300, 1000, 3000, 10000),
        ("dynlrp epsilon", "zennit Epsilon", "captum LRP", "autoLRP attnlrp"),
    ),
    "tokens": (long, (128, 256, 512, 1024, 2048, 4096), ("dynlrp attnlrp", "LXT AttnLRP", "autoLRP attnlrp")),
}
"""What grows, how the model is made, its sizes, and the methods."""


def scaling(rounds: int, budget: float, largest: float) -> Iterator[Point]:
    """Time and memory of models that grow. A method whose call takes longer than ``budget`` grows no further."""
    for axis, (build, sizes, names) in AXES.items():
        methods = {"forward + gradient": gradient, **{n: METHODS[n] for n in names if METHODS[n].installed}}
        for size in sizes:
            if size > largest:
                break
            torch.manual_seed(0)
            case = build(size)
            working = {}
            for name, method in methods.items():
                try:
                    method(case)
                except (Exception, MemoryError, RecursionError) as error:
                    print(f"{axis} {size} {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                else:
                    working[name] = method
            functions = [partial(method, case) for method in working.values()]
            timings = interleaved(functions, rounds, warm=1, budget=budget)
            for (name, method), timing in zip(working.items(), timings, strict=True):
                yield Point(axis, size, name, timing.median, peak_memory(partial(method, case)))
            methods = {n: m for (n, m), t in zip(working.items(), timings, strict=True) if t.median < budget}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def places(measured: Iterable[Row | Point]) -> dict[str, str]:
    """Where all that was measured, each with a mark; most of it has none."""
    counts = Counter(one.where for one in measured)
    return {where: "¹²³⁴⁵⁶⁷⁸⁹"[number - 1] * (number > 0) for number, (where, _) in enumerate(counts.most_common(10))}


def _spread(row: Row) -> str:
    """One round has none."""
    return f"{row.spread:.0%}" if row.spread else ""


def table_of_rows(rows: Iterable[Row], marks: Mapping[str, str]) -> str:
    """Time and memory."""
    header = ["model", "samples x tokens", "method", "forward + gradient", "time / that", "spread", "first call / that"]
    body = [
        [
            row.model, row.setting if row.model in TEXT else row.setting.replace(" x 128", ""),
            row.method + marks[row.where],
            _ms(row.gradient), *(
                [row.error, "", ""] if row.error else [f"{row.time:.2f}", _spread(row), f"{row.first:.2f}"]
            ),
            f"{row.gradient_bytes / 2**20:.0f} MiB", "" if row.error else f"{row.memory:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table([*header, "gradient's peak", "peak / that"], body)


def table_of_small(rows: Sequence[Row], marks: Mapping[str, str]) -> str:
    """Small models, and the medians over them."""
    found = {(row.model, row.method): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    body = [
        [
            model + marks[found[model, methods[0]].where],
            _ms(found[model, methods[0]].gradient),
            *(f"{found[model, method].time:.2f}" for method in methods),
        ]
        for model in dict.fromkeys(row.model for row in rows)
    ]
    medians = [statistics.median(row.time for row in rows if row.method == method) for method in methods]
    body.append(["median", "", *(f"{median:.2f}" for median in medians)])
    return table(["two layers, 64 wide", "forward + gradient", *(f"{method} / that" for method in methods)], body)


def slopes(points: Iterable[Point], axis: str, value: str) -> dict[str, tuple[float, int, int]]:
    """By method: the log-log slope of seconds or bytes over the upper half of an axis, from where to where."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.axis == axis:
            found.setdefault(point.method, []).append(point)
    result = {}
    for method, line in found.items():
        line = sorted(line, key=lambda point: point.size)
        line = line[len(line) // 2 - 1 :] if len(line) > 3 else line
        if len(line) > 1:
            values = [float(getattr(point, value)) for point in line]
            result[method] = slope([point.size for point in line], values), line[0].size, line[-1].size
    return result


def table_of_points(points: Sequence[Point], marks: Mapping[str, str]) -> str:
    """Slopes and the figures at the ends."""
    body = []
    for axis in dict.fromkeys(point.axis for point in points):
        times, memory = slopes(points, axis, "seconds"), slopes(points, axis, "bytes")
        last = {p.method: p for p in sorted((p for p in points if p.axis == axis), key=lambda p: p.size)}
        for method, (steep, low, high) in times.items():
            end = last[method]
            body.append(
                [
                    axis, method + marks[end.where], f"{low:,} to {high:,}", f"{steep:.2f}", f"{memory[method][0]:.2f}",
                    f"{end.size:,}", _ms(end.seconds), f"{end.bytes / 2**20:.1f} MiB",
                ]
            )  # fmt: skip
    header = ["what grows", "method", "slopes over", "slope of time", "slope of memory", "largest", "time", "peak"]
    return table(header, body)


def goals(rows: Iterable[Row], points: Sequence[Point]) -> list[Goal]:
    """The goals with what was measured, where there was time for more than one round."""
    measured = [row for row in rows if not row.error]
    rows = [row for row in measured if row.spread]
    mine = {(row.model, row.setting, row.method): row for row in rows}
    big = [row for row in rows if row.weights >= LARGE_ENOUGH]

    def figures(chosen: Iterable[Row], composites: Sequence[str], value: str) -> dict[str, float]:
        names = [f"dynlrp {composite}" for composite in composites]
        return {f"{r.model}, {r.setting}, {r.method[7:]}": getattr(r, value) for r in chosen if r.method in names}

    convolutional = [row for row in measured if row.model in CONVOLUTIONAL]

    beside: dict[str, dict[str, float]] = {"": {}, "LXT": {}}
    for row in rows:
        own = RIVALS.get(row.method)
        if own is not None:
            ours = mine.get(
                (row.model, row.setting, f"dynlrp {own}"), mine.get((row.model, row.setting, "dynlrp attnlrp"))
            )
            if ours is not None and ours.where == row.where:
                group = "LXT" if row.method.startswith("LXT") else ""
                beside[group][f"{row.model}, {row.setting}, {row.method}"] = ours.time / row.time
    depth, tokens = slopes(points, "layers", "seconds"), slopes(points, "tokens", "bytes")
    return [
        Goal("epsilon and AttnLRP take at most 1.05 of forward + gradient from 50 million weights on", 1.05,
             figures(big, MULTIPLIERS, "time")),
        Goal("gamma and z-plus on convolutions take at most 1.6 of it", 1.6,
             figures([row for row in convolutional if row.spread], GAMMA, "time")),
        Goal("at most half the time of zennit, captum and autoLRP", 0.5, beside[""]),
        Goal("no slower than LXT", 1.0, beside["LXT"]),
        Goal("time in proportion to the number of layers (slope)", 1.05,
             {m: s for m, (s, *_) in depth.items() if m.startswith("dynlrp")}),
        Goal("epsilon and AttnLRP have at most 1.05 of the gradient's peak of memory", 1.05,
             figures(measured, MULTIPLIERS, "memory")),
        Goal("gamma and z-plus have at most 1.5 of it", 1.5, figures(convolutional, GAMMA, "memory")),
        Goal("memory in proportion to the length of the text (slope)", 1.05,
             {m: s for m, (s, *_) in tokens.items() if m.startswith("dynlrp")}),
    ]  # fmt: skip


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, few rounds, small sizes: some minutes")
    parser.add_argument("--rounds", type=int, help="9, or 3 with --quick")
    parser.add_argument("--budget", type=float, help="seconds after which a cell begins no further round: 300, or 15")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory", type=float, default=16, help="GiB that may be allocated; beyond that a method fails"
    )
    parser.add_argument("--only", nargs="+", default=list(LARGE), choices=list(LARGE), metavar="MODEL")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="some rows of the grid")
    parser.add_argument("--parts", nargs="*", default=["grid", "small", "scaling"])
    parser.add_argument("--rows", type=Path, default=Path("out/speed.jsonl"))
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md and the charts")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # libraries' own
    torch.set_num_threads(options.threads)
    limit = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    rounds = options.rounds or (3 if options.quick else 9)
    budget = options.budget or (15.0 if options.quick else 300.0)
    found: dict[str, Iterator[Row] | Iterator[Point]] = {
        "grid": grid(options.only, QUICK if options.quick else FULL, rounds, budget, options.methods),
        "small": small(5 * rounds),
        "scaling": scaling(rounds, budget / 15, 1000 if options.quick else math.inf),
    }
    there = dict.fromkeys(METHODS[name].package for name in RIVALS if METHODS[name].installed)
    where = f"{place([str(name) for name in there])}; {rounds} rounds, {budget:.0f} s for each cell"
    options.rows.parent.mkdir(exist_ok=True)
    for part in options.parts:
        for row in found[part]:
            print(*(f"{v:.3g}" if isinstance(v, float) else v for v in asdict(row).values()), sep="  ", flush=True)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": part, **asdict(row), "where": where}) + "\n")
    if options.write:
        write(*read(options.rows))


def read(path: Path) -> tuple[list[Row], list[Row], list[Point]]:
    """The rows of the grid, of small models and of scaling; of what was measured twice, the last."""
    found: dict[str, dict[tuple[Any, ...], Any]] = {"grid": {}, "small": {}, "scaling": {}}
    for line in path.read_text("utf-8").splitlines():
        values = json.loads(line)
        part = values.pop("part")
        row = Point(**values) if part == "scaling" else Row(**values)
        key = (row.axis, row.size, row.method) if isinstance(row, Point) else (row.model, row.setting, row.method)
        found[part][key] = row
    grid, small, scaling = (list(rows.values()) for rows in found.values())
    return grid, small, scaling


def write(grid: list[Row], small: list[Row], points: list[Point]) -> None:
    """Tables and charts."""
    from benchmarks import charts

    marks = places([*grid, *small, *points])
    parts = [
        "Command: `python -m benchmarks.speed --write`. Measured:",
        "\n".join(f"* {mark} {where}.".replace("*  ", "* ") for where, mark in marks.items()),
        "float32. *dynlrp* is `explain`, *program* what `trace` gives, whose first call traces. Each beside forward "
        "+ input gradient of the same model, interleaved: medians, and half the distance of the quartiles as spread, "
        "which is left open where there was time for one round alone. "
        "*First call* is a model's first in a process that has explained other models. Peaks are those of later calls, "
        "which keep what a rule reads and no more. Weights are frozen unless said otherwise. Goals, and where they are "
        "met in rows of several rounds:",
        table_of_goals(goals(grid, points)),
        charts.bars(grid, "time", "time / forward + gradient", "speed"),
        charts.bars(grid, "memory", "peak memory / forward + gradient", "memory"),
        table_of_rows(grid, marks),
    ]
    if small:
        parts += [
            "Models so small that the cost per node is everything:",
            table_of_small(small, marks),
        ]
    if points:
        parts += [
            "A net of narrow layers that grows deeper, and a decoder of four layers that reads a longer text. A slope "
            "of 1 in logarithms is a cost in proportion to the size; slopes are taken over the upper half of sizes.",
            table_of_points(points, marks),
            charts.lines(points, "layers", "seconds", "depth"),
            charts.lines(points, "tokens", "seconds", "tokens"),
            charts.lines(points, "tokens", "bytes", "tokens_memory"),
        ]
    write_section(RESULTS, "Speed and memory", "\n\n".join(parts))


if __name__ == "__main__":
    main()

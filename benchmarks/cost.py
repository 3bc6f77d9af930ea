"""What an explanation costs beside forward + input gradient of the same model: time and peak memory.

    python benchmarks/cost.py [--rounds 7] [--batch 1] [--write]

Both run interleaved in one process; the table gives medians and their ratio, since absolute times depend on the
machine. Memory is the peak of tensor memory above what the model holds, by the profiler's allocation events.
``--write`` puts the tables into ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.architectures import LARGE, SMALL, Case
from benchmarks.results import write_section
from dynlrp import explain

COMPOSITES = {
    "VGG16": ("epsilon", "epsilon_plus", "auto"),
    "ResNet-50": ("epsilon", "epsilon_plus", "auto"),
}


def gradient(case: Case) -> Tensor:
    """Forward + input gradient of the largest output of each sample."""
    inputs = case.inputs
    if isinstance(inputs, dict):
        ((name, x),) = inputs.items()
        x = x.detach().requires_grad_()
        output = case._replace(inputs={name: x}).run()
    else:
        x = inputs.detach().requires_grad_()
        output = case._replace(inputs=x).run()
    (result,) = torch.autograd.grad(output.flatten(1).max(1)[0].sum(), x)
    return result


def relevance(case: Case, composite: str) -> None:
    """The whole explanation."""
    explain(case.model, case.inputs, composite=composite, output=case.output)


def interleaved(functions: list[Callable[[], object]], rounds: int, inner: int = 1) -> list[list[float]]:
    """Seconds per call of each function, taken in turns, after two rounds to warm up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 2):
        for place, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(inner):
                function()
            if number > 1:
                seconds[place].append((time.perf_counter() - start) / inner)
    return seconds


def peak_memory(function: Callable[[], object]) -> int:
    """Peak of allocated tensor memory during a call, in bytes above its start."""
    function()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def large(rounds: int, batch: int, frozen: bool) -> list[list[str]]:
    """Rows of the table over models at their true size."""
    rows = []
    for name, build in LARGE.items():
        case = build(batch)
        case.model.eval().requires_grad_(not frozen)
        composites = COMPOSITES.get(name, ("attnlrp", "auto"))
        functions: list[Callable[[], object]] = [partial(gradient, case)]
        functions += [partial(relevance, case, composite) for composite in composites]
        seconds = [statistics.median(s) for s in interleaved(functions, rounds)]
        memory = [peak_memory(f) for f in functions]
        for place, composite in enumerate(composites, 1):
            rows.append(
                [
                    name,
                    composite,
                    f"{seconds[0] * 1e3:.0f} ms",
                    f"{seconds[place] / seconds[0]:.2f}",
                    f"{memory[0] / 2**20:.0f} MiB",
                    f"{memory[place] / memory[0]:.2f}",
                ]
            )
            print(*rows[-1], sep="  ", flush=True)
    return rows


def small(rounds: int, batch: int) -> list[list[str]]:
    """Rows of the table over ten architectures of two layers, 64 wide."""
    rows, ratios = [], []
    for name, build in SMALL.items():
        case = build(batch)
        case.model.eval()
        functions: list[Callable[[], object]] = [partial(gradient, case), partial(relevance, case, "attnlrp")]
        first, second = (statistics.median(s) for s in interleaved(functions, 5 * rounds, inner=5))
        ratios.append(second / first)
        rows.append([name, f"{first * 1e3:.2f} ms", f"{ratios[-1]:.2f}"])
        print(*rows[-1], sep="  ", flush=True)
    rows.append(["median", "", f"{statistics.median(ratios):.2f}"])
    print(*rows[-1], sep="  ", flush=True)
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frozen", action="store_true", help="parameters do not require grad")
    parser.add_argument("--only", choices=("large", "small"), default=None)
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    parts = []
    if options.only != "small":
        rows = large(options.rounds, options.batch, options.frozen)
        header = ["model", "composite", "forward + gradient", "explain / that", "gradient's peak", "explain / that"]
        parts.append(f"Models at their true size, batch {options.batch}, sequence 128:\n\n" + table(header, rows))
    if options.only != "large":
        rows = small(options.rounds, options.batch)
        header = ["two layers, 64 wide", "forward + gradient", "explain / that"]
        parts.append("Models so small that the cost per node is everything (`attnlrp`):\n\n" + table(header, rows))
    if options.write:
        versions = (
            f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
        )
        note = f"CPU, {options.threads} threads, float32; {versions}. Command: `python -m benchmarks.cost --write`."
        write_section(Path(__file__).with_name("RESULTS.md"), "Cost", "\n\n".join([note, *parts]))


if __name__ == "__main__":
    main()

"""Time and memory of functions that are compared: one loop for all benchmarks."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Function = Callable[[], object]


def nothing() -> None:
    """What a CPU waits for."""


@dataclass
class Timing:
    """Seconds of the first call, and of each later one."""

    first: float = math.nan
    later: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the later calls."""
        return statistics.median(self.later) if self.later else math.nan

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the later calls, relative to the median; 0 of one call."""
        if len(self.later) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.later, n=4)
        return (high - low) / 2 / self.median


def interleaved(
    functions: Sequence[Function],
    rounds: int,
    *,
    inner: int = 1,
    warm: int = 2,
    budget: float = math.inf,
    wait: Function = nothing,
) -> list[Timing]:
    """Time of each function, taken in turns, so that all see the same load of the machine.

    ``inner`` calls make one entry. ``warm`` rounds, the first calls among them, count for nothing else. After
    ``budget`` seconds no round begins, but for the first that counts. ``wait`` returns when a device has finished.
    """
    timings = [Timing() for _ in functions]
    begin = time.perf_counter()
    for number in range(rounds + warm):
        if time.perf_counter() - begin > budget and timings[0].later:
            break
        for timing, function in zip(timings, functions, strict=True):
            calls = inner if number else 1
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            seconds = (time.perf_counter() - start) / calls
            if number == 0:
                timing.first = seconds
            if number >= warm:
                timing.later.append(seconds)
    return timings


def peak_memory(function: Function) -> int:
    """Peak of allocated tensor memory on the CPU during a call, in bytes above its start.

    The call is not the function's first: what it keeps from call to call does not count.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line through the logarithms by least squares: 1 for a cost in proportion to the size."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope

"""One candidate for each item at the least total cost within limits: a multiple-choice knapsack."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynlrp.allocation.quiet import without_line
from dynlrp.errors import BudgetError, InputError

Matrix = NDArray[np.float64]
"""A number for each item and candidate, ``(items, candidates)``."""
Mask = NDArray[np.bool_]
Choice = NDArray[np.int64]
"""The candidate of each item."""

SCALE = 1e4
"""What limits and the largest cost are scaled to: the absolute tolerances of the solver, 1e-6, are 1e-10 of that."""
ROUNDING = 1e-9
"""A limit may be passed by so much of it: sums of floating point numbers."""


@dataclass(frozen=True)
class Limit:
    """What every choice uses of something, and how much of it there is."""

    name: str
    use: Matrix
    most: float
    unit: float = 1.0
    """Messages show numbers over this."""


@dataclass(frozen=True)
class Solution:
    """Which candidate every item got."""

    choice: Choice
    cost: float
    method: str
    """``exact``: within the gap that was asked for. ``time limit``: the best that was found in the time given.
    ``greedy``: nothing better was found in that time than by taking the best ratio of cost and use first."""
    gap: float | None
    """At most so much could be saved, as a share of the cost; None where that is not known."""

    def used(self, limits: Sequence[Limit]) -> dict[str, float]:
        """How much of each limit, by name."""
        return {limit.name: _total(limit.use, self.choice) / limit.unit for limit in limits}


def solve(
    cost: Matrix, limits: Sequence[Limit], allowed: Mask | None = None, *, time_limit: float = 30.0, gap: float = 1e-6
) -> Solution:
    """The cheapest choice within all limits, by mixed-integer linear programming (HiGHS, through scipy).

    Args:
        cost: of every item and candidate, finite where allowed.
        allowed: which candidates an item may get; all by default.
        time_limit: seconds.
        gap: how far from the optimum is good enough, as a share of the cost above that of no limits.

    Raises:
        BudgetError: no choice is within the limits; it says which would be.
    """
    if not (time_limit > 0 and gap >= 0):
        raise InputError(f"time_limit is positive and gap not negative, not {time_limit} and {gap}")
    allowed = np.ones(cost.shape, dtype=bool) if allowed is None else allowed
    if not np.isfinite(cost[allowed]).all():
        raise InputError("costs are NaN or infinite: are the model's activations and the calibration finite?")
    check(limits, allowed)
    least = np.where(allowed, cost, np.inf).min(1, keepdims=True)
    above = np.where(allowed, cost - least, 0.0)
    quick = _greedy(above, limits, allowed)
    if quick is not None:
        bound = _total(above, quick)
        if bound == 0:
            return Solution(quick, _total(cost, quick), "exact", 0.0)
        allowed = allowed & (above <= bound)  # one such candidate alone costs more than a whole choice that is known
    found, status, left = _milp(above, limits, allowed, time_limit, gap)
    if status == "infeasible":
        raise BudgetError(_what_is_feasible(limits, allowed, time_limit))
    if found is None or (quick is not None and _total(above, quick) < _total(above, found)):
        if quick is None:
            raise BudgetError(f"no choice within the limits was found in {time_limit:g} s: give time_limit= more")
        return Solution(quick, _total(cost, quick), "exact" if status == "exact" else "greedy", left)
    return Solution(found, _total(cost, found), status, left)


def check(limits: Sequence[Limit], allowed: Mask) -> None:
    """Whether each limit can be kept on its own."""
    for limit in limits:
        least = np.where(allowed, limit.use, np.inf).min(1).sum()
        if least > limit.most * (1 + ROUNDING):
            most = np.where(allowed, limit.use, -np.inf).max(1).sum()
            raise BudgetError(
                f"{limit.name} = {limit.most / limit.unit:.6g} cannot be kept: these candidates and pins take from "
                f"{least / limit.unit:.6g} to {most / limit.unit:.6g}"
            )


def _what_is_feasible(limits: Sequence[Limit], allowed: Mask, time_limit: float) -> str:
    """How much of each limit is needed while the others are kept."""
    needed = []
    for place, limit in enumerate(limits):
        others = [other for number, other in enumerate(limits) if number != place]
        found, _, _ = _milp(limit.use, others, allowed, time_limit, 1e-6)
        if found is not None:
            needed.append(f"{limit.name} of at least {_total(limit.use, found) / limit.unit:.6g}")
    asked = ", ".join(f"{limit.name} = {limit.most / limit.unit:.6g}" for limit in limits)
    return f"{asked} cannot be kept together; with the others as they are, this would do: {', or '.join(needed)}"


def _total(of: Matrix, choice: Choice) -> float:
    return float(np.take_along_axis(of, choice[:, None], 1).sum())


def _within(choice: Choice, limits: Sequence[Limit]) -> bool:
    return all(_total(limit.use, choice) <= limit.most * (1 + ROUNDING) for limit in limits)


def _milp(
    cost: Matrix, limits: Sequence[Limit], allowed: Mask, time_limit: float, gap: float
) -> tuple[Choice | None, str, float | None]:
    """A choice if one was found, ``exact``, ``time limit`` or ``infeasible``, and the gap that is left."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ModuleNotFoundError as error:
        raise InputError(f"allocation needs {error.name}: pip install dynlrp[allocate]") from error
    items, candidates = np.nonzero(allowed)
    number = np.arange(len(items))
    one = csr_array((np.ones(len(items)), (items, number)), shape=(len(cost), len(items)))
    costs = cost[items, candidates]
    costs = costs / max(costs.max(), np.finfo(float).tiny) * SCALE
    tighter = 0.0
    while True:
        constraints: list[Any] = [LinearConstraint(one, 1, 1)]
        for limit in limits:
            row = csr_array(limit.use[items, candidates][None] / limit.most * SCALE)
            constraints.append(LinearConstraint(row, -np.inf, SCALE * (1 + ROUNDING / 2 - tighter)))
        options = {"time_limit": time_limit, "mip_rel_gap": gap}
        with without_line():
            result = milp(
                costs, integrality=np.ones(len(items)), bounds=Bounds(0, 1), constraints=constraints, options=options
            )
        if result.status == 2 and not tighter:
            return None, "infeasible", None
        if result.x is None:
            return None, "time limit", None
        values = np.full(cost.shape, -1.0)
        values[items, candidates] = result.x
        choice: Choice = values.argmax(1)
        if _within(choice, limits):
            return choice, "exact" if result.status == 0 else "time limit", float(result.mip_gap)
        tighter = max(2 * tighter, ROUNDING)


def _greedy(cost: Matrix, limits: Sequence[Limit], allowed: Mask) -> Choice | None:
    """Start with what uses least; then always the change that saves most for what it uses more, as long as it fits."""
    allowed = allowed.copy()
    share = sum((limit.use / limit.most for limit in limits), np.zeros(cost.shape))
    uses = [limit.use for limit in limits]
    choice: Choice = np.where(allowed, share, np.inf).argmin(1)
    if not _within(choice, limits):
        return None
    used = [_total(use, choice) for use in uses]
    heap: list[tuple[float, int, int, int]] = []

    def offer(item: int) -> None:
        """The best change of an item."""
        now = choice[item]
        saves, more = cost[item, now] - cost[item], share[item] - share[item, now]
        better = allowed[item] & (saves > 0)
        if better.any():
            ratio = np.where(better, saves / np.maximum(more, 1e-30), -np.inf)
            to = int(ratio.argmax())
            heapq.heappush(heap, (-float(ratio[to]), item, int(now), to))

    for item in range(len(cost)):
        offer(item)
    while heap:
        _, item, now, to = heapq.heappop(heap)
        after = [total + use[item, to] - use[item, now] for total, use in zip(used, uses, strict=True)]
        if all(total <= limit.most * (1 + ROUNDING) for total, limit in zip(after, limits, strict=True)):
            choice[item], used = to, after
        else:
            allowed[item, to] = False  # what is used grows, so it will not fit later
        offer(item)
    return choice

"""The solver against trying everything."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from dynlrp import BudgetError, InputError
from dynlrp.allocation import solver
from dynlrp.allocation.solver import Limit, Matrix, solve


def total(of: Matrix, choice: tuple[int, ...]) -> float:
    return float(sum(of[item, candidate] for item, candidate in enumerate(choice)))


def everything(cost: Matrix, limits: list[Limit], allowed: Matrix) -> float:
    """The least cost of all choices; infinite where none is within the limits."""
    found = np.inf
    for choice in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        if all(allowed[item, c] for item, c in enumerate(choice)) and all(
            total(limit.use, choice) <= limit.most * (1 + 1e-9) for limit in limits
        ):
            found = min(found, total(cost, choice))
    return found


@pytest.mark.parametrize("seed", range(24))
def test_optimum(seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = (5, 4)
    cost = draw.random(shape) * 10 ** draw.uniform(-6, 6, (5, 1))  # scores of layers differ by orders of magnitude
    limits = [Limit("bits", draw.integers(1, 30, shape).astype(float), float(draw.integers(30, 80)))]
    if seed % 2:
        limits.append(Limit("size", draw.random(shape), 2.0))
    allowed = draw.random(shape) < 0.8
    allowed[:, 0] = True
    best = everything(cost, limits, allowed)
    if not np.isfinite(best):
        with pytest.raises(BudgetError, match="cannot be kept"):
            solve(cost, limits, allowed)
        return
    found = solve(cost, limits, allowed)
    assert found.method == "exact"
    assert found.cost == pytest.approx(best, rel=1e-6)  # the gap that is asked for
    assert total(cost, tuple(found.choice)) == pytest.approx(found.cost, rel=1e-12)
    assert all(allowed[item, c] for item, c in enumerate(found.choice))


def test_the_limit_is_reached_exactly() -> None:
    """Four bits everywhere are within an average of four bits, not a rounding error beyond."""
    cost, use = np.tile(4.0 ** -np.arange(2, 9), (300, 1)), np.tile(np.arange(2.0, 9), (300, 1)) * 768 * 0.1
    found = solve(cost, [Limit("bits", use, 4 * 768 * 0.1 * 300)])
    assert set(found.choice) == {2}


def test_a_thousand_layers() -> None:
    draw = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8])
    weights = draw.integers(1, 1000, (1000, 1)) * 100
    cost = 10 ** draw.uniform(-5, 3, (1000, 1)) * 4.0**-bits * np.exp(0.2 * draw.normal(size=(1000, 6)))
    limit = Limit("average_bits", weights * (bits + 0.1), float(weights.sum() * 4))
    found = solve(cost, [limit])
    assert found.method == "exact"
    assert found.gap is not None
    assert found.gap <= 1e-6
    assert total(limit.use, tuple(found.choice)) <= limit.most * (1 + 1e-9)
    greedy = solver._greedy(cost, [limit], np.ones(cost.shape, dtype=bool))
    assert greedy is not None
    assert found.cost <= total(cost, tuple(greedy)) * (1 + 1e-12)


def test_greedy_is_near_the_optimum_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    bits = np.arange(2, 9)
    cost = 10 ** draw.uniform(-2, 2, (40, 1)) * 4.0**-bits
    limit = Limit("average_bits", np.tile(bits, (40, 1)) * draw.integers(1, 9, (40, 1)), 600.0)
    best = solve(cost, [limit])
    monkeypatch.setattr(solver, "_milp", lambda *args: (None, "time limit", None))
    found = solve(cost, [limit])
    assert (found.method, found.gap) == ("greedy", None)
    assert best.cost <= found.cost <= best.cost * 1.05
    assert total(limit.use, tuple(found.choice)) <= 600


def test_nothing_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_milp", lambda *args: (None, "time limit", None))
    monkeypatch.setattr(solver, "_greedy", lambda *args: None)
    with pytest.raises(BudgetError, match=r"time_limit="):
        solve(np.ones((2, 2)), [Limit("bits", np.ones((2, 2)), 4.0)])


def test_what_is_feasible() -> None:
    use = np.array([[2.0, 4, 8], [2, 4, 8]])
    with pytest.raises(BudgetError, match=r"average_bits = 1\.5 cannot be kept: .* from 2 to 8$"):
        solve(use, [Limit("average_bits", use, 3.0, 2.0)])
    other = use[:, ::-1].copy()
    with pytest.raises(BudgetError, match=r"bits = 7, size = 7 .* bits of at least 12, or size of at least 12"):
        solve(use, [Limit("bits", use, 7.0), Limit("size", other, 7.0)])


def test_costs_must_be_finite() -> None:
    cost = np.array([[1.0, np.nan]])
    with pytest.raises(InputError, match="NaN"):
        solve(cost, [Limit("bits", np.ones((1, 2)), 4.0)])
    assert solve(cost, [Limit("bits", np.ones((1, 2)), 4.0)], np.array([[True, False]])).choice.tolist() == [0]


def loud(milp: Callable[..., Any], more: bytes = b"") -> Callable[..., Any]:
    """A solver that prints what HiGHS may print, and what somebody else prints meanwhile."""

    def solve(*args: Any, **options: Any) -> Any:
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n" + more)
        return milp(*args, **options)

    return solve


def test_what_highs_prints_is_left_out(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing else is, not even where the solver fails."""
    draw = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8])
    use = draw.integers(1, 1000, (40, 1)) * bits.astype(float)
    cost = draw.random((40, 1)) * 4.0**-bits
    limit = Limit("bits", use, float(use[:, 2].sum()))
    monkeypatch.setattr(scipy.optimize, "milp", loud(scipy.optimize.milp, b"one\ntwo"))
    found = solve(cost, [limit])
    assert found.method == "exact"
    assert capfd.readouterr().out == "one\ntwo"

    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("no solver")

    monkeypatch.setattr(scipy.optimize, "milp", loud(fails, b"three"))
    with pytest.raises(ValueError, match="no solver"):
        solve(cost, [limit])
    assert capfd.readouterr().out == "three"
    os.write(1, b"four")
    assert capfd.readouterr().out == "four"


@pytest.mark.parametrize("seed", [0, 31, 52, 64])
def test_problems_with_which_highs_is_loud(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS 1.12 prints the line with these."""
    draw = np.random.default_rng(seed)
    count, bits = int(draw.integers(20, 120)), np.array([2, 3, 4, 5, 6, 8])
    weights = draw.integers(1, 1000, (count, 1)) * 64
    cost = 10 ** draw.uniform(-5, 3, (count, 1)) * 4.0**-bits * np.exp(0.2 * draw.normal(size=(count, 6)))
    solve(cost, [Limit("bits", weights * bits, float(weights.sum() * draw.choice([2.25, 2.5, 3, 3.5, 4, 5])))])
    assert capfd.readouterr().out == ""

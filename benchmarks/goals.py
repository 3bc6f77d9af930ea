"""Goals, and the figures that are held against them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.results import table


@dataclass(frozen=True)
class Goal:
    """A bound, and the figures that are held against it."""

    text: str
    bound: float
    figures: dict[str, float]

    @property
    def missed(self) -> dict[str, float]:
        """The figures beyond the bound, worst first."""
        over = {place: figure for place, figure in self.figures.items() if figure > self.bound}
        return dict(sorted(over.items(), key=lambda entry: -entry[1]))


def table_of_goals(found: Iterable[Goal]) -> str:
    """Where the goals are met, and where not."""
    body = []
    for goal in found:
        if goal.figures:
            worst = next(iter(goal.missed.items()), None)
            met = f"{len(goal.figures) - len(goal.missed)} of {len(goal.figures)}"
            body.append([goal.text, met, f"{worst[1]:.3f}: {worst[0]}" if worst else ""])
    return table(["goal", "met", "farthest from it"], body)

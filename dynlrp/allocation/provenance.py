"""What bits were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dynlrp._version import __version__
from dynlrp.allocation.budget import Budget
from dynlrp.allocation.scores import Task
from dynlrp.allocation.solver import Limit, Solution


def made_from(
    task: Task,
    budget: Budget,
    limits: Sequence[Limit],
    candidates: Sequence[int],
    groups: Sequence[Sequence[str]],
    pinned: Mapping[str, int | None],
    solution: Solution,
) -> dict[str, Any]:
    """Versions, model, options, and what the solver found; ``groups`` are all, of which those of several are told."""
    model, composite = type(task.model), task.composite
    return {
        "dynlrp": __version__,
        "torch": torch.__version__,
        "model": f"{model.__module__}.{model.__qualname__}",
        "budget": asdict(budget),
        "candidates": list(candidates),
        "groups": [list(names) for names in groups if len(names) > 1],
        "pinned": dict(pinned),
        "composite": composite if isinstance(composite, str) else composite.name,
        "divergence": task.divergence.kind,
        "seed": task.seed,
        "solver": {"method": solution.method, "gap": solution.gap, "used": solution.used(limits)},
    }

"""The methods that are compared, as functions from a problem and row numbers to maps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import rivals
from benchmarks.architectures import Case
from benchmarks.faithfulness.problem import Method, Problem
from benchmarks.rivals.ours import relevance
from dynlrp import Composite

LENGTHS = ("gradient", "SmoothGrad")
"""Methods whose map is the length over channels (Simonyan et al. 2014); of others the channels are added up."""
OTHERS = (
    "gradient", "gradient x input", "SmoothGrad", "Integrated Gradients", "Grad-CAM", "random", "zennit EpsilonPlus",
    "captum LRP", "captum LRP gamma", "autoLRP attnlrp", "autoLRP composite",
)  # fmt: skip
"""Of other libraries those whose numbers are not dynlrp's, on one of the problems at least."""


class Explained(nn.Module):
    """What is explained, ``(rows, 1)``, as a module, so that its frozen parameters are known."""

    def __init__(self, problem: Problem, rows: Tensor) -> None:
        super().__init__()
        self.model, self.explained, self.rows = problem.model, problem.explained, rows

    def forward(self, x: Tensor) -> Tensor:
        return self.explained(x, self.rows)[:, None]


def method(way: rivals.Method) -> Method:
    """One of the ways to explain, with its channels gone."""

    def mapped(problem: Problem, rows: Tensor) -> Tensor:
        found = way(Case(Explained(problem, rows), problem.inputs[rows]), torch.zeros(len(rows), dtype=torch.long))
        return found.norm(dim=problem.channels) if way.name in LENGTHS else found.sum(problem.channels)

    return mapped


def lrp(name: str, composite: Composite) -> Method:
    """Relevance by a composite."""
    return method(rivals.Method(name, partial(relevance, composite=composite)))


def others(problem: Problem) -> dict[str, Method]:
    """The other ways, where they fit and are installed."""
    case = Case(problem.model, problem.inputs)
    ways = [rivals.METHODS[name] for name in OTHERS]
    return {way.name: method(way) for way in ways if way.installed and way.fits(case)}


def edges(problem: Problem, rows: Tensor) -> Tensor:
    """How much neighbours differ: a map that knows nothing of the model."""
    x = problem.inputs[rows]
    if x.ndim == 3:
        return F.pad((x[:, 1:] - x[:, :-1]).norm(dim=2), (1, 0))
    down, right = x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
    return (F.pad(down, (0, 0, 0, 1)).square() + F.pad(right, (0, 1)).square()).sum(1).sqrt()

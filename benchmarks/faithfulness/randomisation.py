"""Does a map depend on what the model has learnt (Adebayo et al. 2018)?"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.faithfulness.problem import Method, Problem
from dynlrp import metrics


def similarity(problem: Problem, method: Method, rows: Tensor) -> Tensor:
    """(rows,) Spearman's correlation of maps before and after the model's weights are shuffled, each tensor in itself.

    Biases, scales and statistics of normalisation stay, so that activations keep their size. The model has its own
    weights again afterwards.
    """
    before = torch.cat([method(problem, part) for part in problem.rows(rows)])
    weights = [p for p in problem.model.parameters() if p.ndim > 1]
    own = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
        after = torch.cat([method(problem, part) for part in problem.rows(rows)])
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, own, strict=True):
                weight.copy_(value)
    valid = torch.ones_like(before, dtype=torch.bool) if problem.valid is None else problem.valid[rows]
    pairs = zip(before, after, valid, strict=True)
    return torch.cat([metrics.rank_correlation(x[here][None], y[here][None]) for x, y, here in pairs])

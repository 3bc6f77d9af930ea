"""How much the model suffers from fewer bits in an activation: what may decide, under one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.moments import Moments
from dynlrp.allocation.products import multiplied
from dynlrp.allocation.ranges import Survey
from dynlrp.allocation.samples import by_sample, samples_first
from dynlrp.allocation.scores import Scores, Task
from dynlrp.errors import InputError
from dynlrp.explain import relevance
from dynlrp.target import make_seed

Costs = Callable[[Task, Survey], Iterator[Tensor]]
"""Goes through the calibration and gives what every candidate costs in each activation, ``(samples, activations,
candidates)``, for each batch; one row for all where samples play no part."""
Sides = Callable[[Task, Tensor, Sequence[Tensor], torch.Generator, Any], Sequence[Tensor | None]]
"""From the output, the activations behind it, random draws and the batch to a tensor for each activation, of its shape;
None where an activation does not matter."""
Total = Callable[[Tensor], Tensor]
"""The sum over each sample, ``(samples,)``."""
Cost = Callable[[Total, Tensor, Tensor, Tensor], Tensor]
"""From such a tensor ``side``, the activation ``a`` and its error ``da`` to a number for each sample."""
DEFAULT = "fisher_input"
"""The score that is taken where none is named: the one that does best in ``benchmarks/allocation_activations.py``."""
LEAST = 1e-300
"""Nothing over nothing is 0."""


def measure_operands(
    task: Task, survey: Survey, score: str, progress: Callable[[int], object] = lambda samples: None
) -> Scores:
    """Ask a score about all activations of a model, which stays as it is."""
    if score not in OPERAND_SCORES:
        raise InputError(f"no score of activations is called {score!r}; there are {', '.join(sorted(OPERAND_SCORES))}")
    moments = Moments()
    with torch.inference_mode(False):
        for rows in OPERAND_SCORES[score](task, survey):
            finite = torch.isfinite(rows).all(2).all(0)
            if not bool(finite.all()):
                wrong = list(survey.ranges)[int((~finite).nonzero()[0])]
                raise InputError(f"score {score!r} is NaN or infinite for {wrong!r}: is the calibration finite?")
            moments.add(rows)
            progress(len(rows))
    names = tuple(survey.ranges)
    return Scores(score, names, task.candidates, moments.mean, moments.error(), moments.count, "none")


# What activations are weighed with ---------------------------------------------------------------------------


def _gradients(
    task: Task, output: Tensor, tensors: Sequence[Tensor], generator: torch.Generator, batch: Any
) -> Sequence[Tensor | None]:
    """Of a random probe of the divergence."""
    start = task.divergence.probe(output, generator, batch)
    return torch.autograd.grad(output, list(tensors), start, allow_unused=True)


def _shares(
    task: Task, output: Tensor, tensors: Sequence[Tensor], generator: torch.Generator, batch: Any
) -> Sequence[Tensor | None]:
    """Absolute relevance, as a share of that of all activations of the sample."""
    seed, size = make_seed(output, task.target), batch_size(batch)
    first = seed.start if seed.relevance else seed.start * seed.root.detach()
    explained = relevance(
        seed.root, tensors, initial=first, composite=task.composite, on_unknown=task.on_unknown
    ).relevance
    found = [None if r is None else r.abs() for r in explained]
    every = sum(by_sample(r, size, "").double().sum(1) for r in found if r is not None)
    assert isinstance(every, Tensor)

    def share(r: Tensor) -> Tensor:
        first = samples_first(r, size, "")
        return (first / every.clamp(min=LEAST).reshape(-1, *[1] * (first.ndim - 1))).reshape(r.shape)

    return [None if r is None else share(r) for r in found]


def _nothing(
    task: Task, output: Tensor, tensors: Sequence[Tensor], generator: torch.Generator, batch: Any
) -> Sequence[Tensor | None]:
    return tensors


# Scores ------------------------------------------------------------------------------------------------------


def _error(total: Total, side: Tensor, a: Tensor, da: Tensor) -> Tensor:
    return total((side * da).square())


def _gauss_newton(total: Total, side: Tensor, a: Tensor, da: Tensor) -> Tensor:
    return total(side * da).square()


def _fisher(total: Total, side: Tensor, a: Tensor, da: Tensor) -> Tensor:
    return total(side.square()) * total(da.square()) / total(torch.ones_like(a))


def _noise(total: Total, side: Tensor, a: Tensor, da: Tensor) -> Tensor:
    return total(da.square()) / total(a.square()).clamp(min=LEAST)


def _share_of_noise(total: Total, side: Tensor, a: Tensor, da: Tensor) -> Tensor:
    return total(side) * _noise(total, side, a, da)


def _by(sides: Sides, cost: Cost) -> Costs:
    """A score that looks at the activations of each batch once, with a pass back through the model."""

    def costs(task: Task, survey: Survey) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(task.seed)
        for batch in task.batches():
            size = batch_size(batch)
            taken: dict[str, Tensor] = {}

            def take(name: str, x: Tensor, taken: dict[str, Tensor] = taken) -> Tensor:
                taken[name] = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
                return taken[name]

            with torch.enable_grad(), multiplied(task.model, task.layers, take):
                output = task.run(batch)
            rows = torch.zeros(size, len(survey.ranges), len(task.candidates), dtype=torch.float64)
            found = dict(zip(taken, sides(task, output, list(taken.values()), generator, batch), strict=True))
            for place, (name, limits) in enumerate(survey.ranges.items()):
                side = found.get(name)
                if side is None:
                    continue

                def total(t: Tensor, name: str = name, size: int = size) -> Tensor:
                    return by_sample(t, size, name).sum(1, dtype=torch.float64).cpu()

                a, side = taken[name].detach(), side.detach()
                for column, bits in enumerate(task.candidates):
                    rows[:, place, column] = cost(total, side, a, limits.round(a, bits) - a)
            yield rows

    return costs


def alike(costs: Costs) -> Costs:
    """Every sample's numbers over their sum, so that samples count alike."""

    def shares(task: Task, survey: Survey) -> Iterator[Tensor]:
        for rows in costs(task, survey):
            yield rows / rows.sum((1, 2), keepdim=True).clamp(min=LEAST)

    return shares


def _geometric_mean(one: Costs, other: Costs) -> Costs:
    """Of what two scores say of a sample, each as a share."""

    def mean(task: Task, survey: Survey) -> Iterator[Tensor]:
        for a, b in zip(alike(one)(task, survey), alike(other)(task, survey), strict=True):
            yield (a * b).sqrt()

    return mean


def _gradient_x_input(task: Task, survey: Survey) -> Iterator[Tensor]:
    return _by(_shares, _share_of_noise)(replace(task, composite="gradient_x_input"), survey)


@torch.no_grad()
def _measured(task: Task, survey: Survey) -> Iterator[Tensor]:
    for batch in task.batches():
        reference, columns = task.run(batch), []
        for chosen, limits in survey.ranges.items():
            for bits in task.candidates:

                def change(
                    name: str, x: Tensor, chosen: str = chosen, limits: Any = limits, bits: int = bits
                ) -> Tensor:
                    return limits.round(x, bits) if name == chosen else x

                with multiplied(task.model, task.layers, change):
                    columns.append(task.divergence.between(task.run(batch), reference, batch).double().cpu())
        yield torch.stack(columns, 1).reshape(-1, len(survey.ranges), len(task.candidates))


def _uniform(task: Task, survey: Survey) -> Iterator[Tensor]:
    counts = [survey.multiplications[name] for name in survey.ranges]
    yield torch.tensor([[[count * 4.0**-bits for bits in task.candidates] for count in counts]], dtype=torch.float64)


def _random(task: Task, survey: Survey) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(task.seed)
    drawn = torch.rand(len(survey.ranges), 1, generator=generator, dtype=torch.float64)
    yield drawn[None] * 4.0 ** -torch.tensor(task.candidates, dtype=torch.float64)


OPERAND_SCORES: dict[str, Costs] = {
    "error": _by(_gradients, _error),
    "gauss_newton": _by(_gradients, _gauss_newton),
    "fisher": _by(_gradients, _fisher),
    "relevance": _by(_shares, _share_of_noise),
    "gradient_x_input": _gradient_x_input,
    "error_relevance": _geometric_mean(_by(_gradients, _error), _by(_shares, _share_of_noise)),
    "fisher_input": _geometric_mean(_by(_gradients, _fisher), _gradient_x_input),
    "noise": _by(_nothing, _noise),
    "measured": _measured,
    "uniform": _uniform,
    "random": _random,
}
"""All scores of activations by name. With ``da = Q_b(a) - a``, and ``g`` the gradient of a random probe of the
divergence: ``error``, ``sum (g da)^2``, as ``weight_error`` has it of weights; ``gauss_newton``, ``(sum g da)^2``;
``fisher``, the mean of ``g^2`` times ``sum da^2`` (HAWQ-V2, Dong et al. 2020). ``relevance``: the activation's share
of ``sum |R|`` times the relative noise ``sum da^2 / sum a^2`` (after Ranjan & Savakis 2024, who take relevance
alone); ``gradient_x_input``, the same with gradient times input. ``error_relevance`` and ``fisher_input``: the
geometric mean of ``error`` and ``relevance``, and of ``fisher`` and ``gradient_x_input``, of each sample's shares in
them. ``noise``: the relative noise alone. ``measured``: the divergence with this activation alone rounded, a run for
every activation, candidate and batch. ``uniform``: multiply-accumulates times ``4^-b``; ``random``: a random number
times that."""

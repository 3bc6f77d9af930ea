"""Bits for the activations that a model multiplies, and the model with activations rounded to them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dynlrp.allocation.allocation import Allocation
from dynlrp.allocation.budget import Budget
from dynlrp.allocation.calibration import Calibration, batch_size
from dynlrp.allocation.divergence import Divergence, Kind
from dynlrp.allocation.layers import find_layers
from dynlrp.allocation.moments import Moments
from dynlrp.allocation.products import Product, multiplied
from dynlrp.allocation.quantizer import widths_of
from dynlrp.allocation.samples import by_sample
from dynlrp.allocation.scores import Task
from dynlrp.allocation.solver import Limit, solve
from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.explain import relevance
from dynlrp.options import OnUnknown
from dynlrp.target import Target, make_seed

Sensitivity = Literal["error", "relevance"]
"""``error``: ``sum (g da)^2`` with ``da = Q_b(a) - a`` and ``g`` the gradient of a random probe of the divergence, as
the score ``weight_error`` has it of weights. ``relevance``: ``sum |R|`` of the activation, as a share of the sample's,
times ``sum da^2 / sum a^2`` (after Ranjan & Savakis 2024, who take relevance alone)."""


@dataclass(frozen=True)
class Range:
    """What an activation lies between, with 0 in between."""

    low: float
    high: float

    def round(self, x: Tensor, bits: int) -> Tensor:
        """What ``bits`` bits with one scale and zero point hold of it.

        ``q = clamp(round(x / scale) + zero, 0, 2^b - 1)`` and ``(q - zero) scale`` with ``scale = (high - low) / (2^b -
        1)`` and ``zero = round(-low / scale)``.
        """
        most = 2**bits - 1
        scale = (self.high - self.low) / most
        if scale == 0:
            return x.clamp(self.low, self.high)
        zero = round(-self.low / scale)
        rounded: Tensor = (((x / scale).round() + zero).clamp(0, most) - zero) * scale
        return rounded


@dataclass(frozen=True)
class Activations:
    """A number of bits for every activation that is multiplied."""

    bits: dict[str, int]
    """By name: ``block.0.query:input``, ``block.0:query``; see :func:`dynlrp.allocation.products.multiplied`."""
    ranges: dict[str, Range]
    """What they lie between on the calibration data; beyond, values are cut off."""
    costs: dict[str, dict[int, float]]
    """What every candidate costs, by name and bits."""
    cost: float
    """The sum of what was chosen."""
    average_bits: float
    """Over the multiply-accumulates."""
    bitops: float
    """Of one sample: multiply-accumulates times the bits of both factors."""
    layers: tuple[str, ...]
    """Those that took part."""

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON; returns the path."""
        path = Path(path)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read what :meth:`save` wrote."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            data["ranges"] = {name: Range(**ends) for name, ends in data["ranges"].items()}
            costs = data["costs"].items()
            data["costs"] = {name: {int(bits): cost for bits, cost in each.items()} for name, each in costs}
            return cls(**{**data, "layers": tuple(data["layers"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} does not hold what save() wrote of activations: {error}") from error

    @contextmanager
    def simulated(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with its activations rounded to these bits wherever it runs inside; afterwards it is as before."""

        def change(name: str, x: Tensor) -> Tensor:
            if name not in self.bits:
                raise InputError(f"the activation {name!r} did not occur in the calibration, so it has no bits")
            return self.ranges[name].round(x, self.bits[name])

        with multiplied(model, find_layers(model, self.layers), change):
            yield model


def allocate_activations(
    model: nn.Module,
    calibration: Any,
    budget: float | Budget = 6.0,
    candidates: Iterable[int] = (3, 4, 5, 6, 8),
    *,
    weights: Allocation | Mapping[str, int] | None = None,
    score: Sensitivity = "error",
    layers: str | Iterable[str] = "*",
    target: Target = None,
    composite: str | Composite = "auto",
    divergence: Divergence | Kind = "softmax",
    output: str | int | None = None,
    on_unknown: OnUnknown = "error",
    batch_size: int = 8,
    samples: int | None = None,
    seed: int = 0,
    time_limit: float = 30.0,
    gap: float = 1e-6,
) -> Activations:
    """Give every activation that is multiplied the bits with which the model suffers least within a budget.

    These are what layers are given, and both factors of each product of attention, fused or written out.

    Args:
        budget: average bits over multiply-accumulates, or a :class:`Budget` of ``average_bits`` or ``bitops``.
        candidates: bits that an activation may get, 2 to 8.
        weights: bits of the layers' weights, for ``bitops``, from :func:`allocate`; 16 for those without.
        score: what decides: ``error`` or ``relevance``.

    Others are as in :func:`allocate`.

    Raises:
        BudgetError: nothing is within the budget; it says what would be.
        InputError: activations are multiplied where no hand reaches, as in ``nn.MultiheadAttention``.
    """
    widths = widths_of(candidates)
    if score not in get_args(Sensitivity):
        raise InputError(f"score is one of {', '.join(get_args(Sensitivity))}, not {score!r}")
    limit = Budget.of(budget)
    if limit.size is not None:
        raise InputError("activations take no part of the model's size: limit average_bits or bitops")
    task = Task(
        model,
        find_layers(model, layers),
        Calibration(calibration, batch_size, samples),
        widths,
        target=target,
        composite=composite,
        on_unknown=on_unknown,
        divergence=Divergence.of(divergence),
        output=output,
        seed=seed,
    )
    products, ranges, count = _survey(task)
    costs = _costs(task, score, ranges)
    places = [list(itertools.product(widths, repeat=len(product.activations))) for product in products]
    columns = max(map(len, places))

    def table(of: Any) -> Any:
        """A number for each product and each choice of bits for its activations."""
        made = np.zeros((len(products), columns))
        for row, (product, choices) in enumerate(zip(products, places, strict=True)):
            made[row, : len(choices)] = [of(product, choice) for choice in choices]
        return made

    each = weights.bits if isinstance(weights, Allocation) else weights or {}

    def bits(product: Product, choice: tuple[int, ...]) -> float:
        other = choice[1] if len(choice) > 1 else each.get(product.name, 16)
        return product.multiplications / count * choice[0] * other

    total = sum(product.multiplications * len(product.activations) for product in products)
    average = table(lambda product, choice: product.multiplications * sum(choice))
    operations = table(bits)
    limits = []
    if limit.average_bits is not None:
        limits.append(Limit("average_bits", average, limit.average_bits * total, total))
    if limit.bitops is not None:
        limits.append(Limit("bitops", operations, limit.bitops))
    cost = table(
        lambda product, choice: sum(costs[name][b] for name, b in zip(product.activations, choice, strict=True))
    )
    allowed = np.arange(columns)[None] < np.array([[len(choices)] for choices in places])
    solution = solve(cost, limits, allowed, time_limit=time_limit, gap=gap)
    chosen = [places[row][column] for row, column in enumerate(solution.choice)]
    rows = range(len(products))
    return Activations(
        bits={
            name: b
            for product, choice in zip(products, chosen, strict=True)
            for name, b in zip(product.activations, choice, strict=True)
        },
        ranges=ranges,
        costs=costs,
        cost=solution.cost,
        average_bits=float(average[rows, solution.choice].sum() / total),
        bitops=float(operations[rows, solution.choice].sum()),
        layers=tuple(task.layers),
    )


def _survey(task: Task) -> tuple[list[Product], dict[str, Range], int]:
    """All products by name with their multiply-accumulates, the ranges of activations, and the number of samples."""
    ranges: dict[str, Range] = {}
    products: dict[str, Product] = {}
    count = 0

    def look(name: str, x: Tensor) -> Tensor:
        low, high = (float(end) for end in x.detach().aminmax())
        old = ranges.get(name, Range(0.0, 0.0))
        ranges[name] = Range(min(old.low, low), max(old.high, high))
        return x

    for batch in task.batches():
        count += batch_size(batch)
        with torch.no_grad(), multiplied(task.model, task.layers, look) as found:
            task.run(batch)
        for product in found:
            name = product.activations[0]
            before = products[name].multiplications if name in products else 0
            products[name] = Product(product.name, product.activations, before + product.multiplications)
    if not products:
        raise InputError("the model multiplies no activations, or the calibration holds no batch")
    return list(products.values()), ranges, count


def _costs(task: Task, score: Sensitivity, ranges: Mapping[str, Range]) -> dict[str, dict[int, float]]:
    """What every candidate costs in each activation, on average over samples."""
    generator = torch.Generator().manual_seed(task.seed)
    moments = Moments()
    for batch in task.batches():
        taken: dict[str, Tensor] = {}

        def take(name: str, x: Tensor, taken: dict[str, Tensor] = taken) -> Tensor:
            taken[name] = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            return taken[name]

        with torch.enable_grad(), multiplied(task.model, task.layers, take):
            output = task.run(batch)
        size, tensors = batch_size(batch), list(taken.values())
        if score == "error":
            start = task.divergence.probe(output, generator, batch)
            sides = torch.autograd.grad(output, tensors, start, allow_unused=True)
        else:
            begin = make_seed(output, task.target)
            first = begin.start if begin.relevance else begin.start * begin.root.detach()
            sides = relevance(
                begin.root, tensors, initial=first, composite=task.composite, on_unknown=task.on_unknown
            ).relevance
        rows = torch.zeros(size, len(ranges), len(task.candidates), dtype=torch.float64)
        found = dict(zip(taken, sides, strict=True))
        for place, name in enumerate(ranges):
            side = found.get(name)
            if side is not None:
                x = taken[name].detach()
                errors = [ranges[name].round(x, bits) - x for bits in task.candidates]
                rows[:, place] = _cost(score, side, errors, x, size, name)
        if score == "relevance":
            every = [by_sample(side.abs(), size, "").sum(1).double().cpu() for side in sides if side is not None]
            rows = rows / torch.stack(every).sum(0).clamp(min=1e-300)[:, None, None]
        moments.add(rows)
    return {
        name: dict(zip(task.candidates, map(float, moments.mean[place]), strict=True))
        for place, name in enumerate(ranges)
    }


def _cost(score: Sensitivity, side: Tensor, errors: list[Tensor], x: Tensor, size: int, name: str) -> Tensor:
    """Of each sample and error, ``(samples, errors)``."""

    def total(*tensors: Tensor) -> Tensor:
        return torch.stack([by_sample(t.detach(), size, name).sum(1, dtype=torch.float64).cpu() for t in tensors], 1)

    if score == "error":
        return total(*((side * error).square() for error in errors))
    return total(side.abs()) * total(*(error.square() for error in errors)) / total(x.square()).clamp(min=1e-300)

"""Bits for the activations that a model multiplies, and the model with activations rounded to them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import networkx as nx
import numpy as np
from torch import Tensor, nn

from dynlrp.allocation.allocation import Allocation
from dynlrp.allocation.budget import Budget
from dynlrp.allocation.calibration import Calibration
from dynlrp.allocation.divergence import Divergence, Kind
from dynlrp.allocation.groups import Groups, make_groups, make_pins, pin_groups
from dynlrp.allocation.layers import find_layers
from dynlrp.allocation.operand_scores import measure_operands
from dynlrp.allocation.products import Product, multiplied
from dynlrp.allocation.provenance import made_from
from dynlrp.allocation.quantizer import widths_of
from dynlrp.allocation.ranges import Range, Survey, survey
from dynlrp.allocation.scores import Scores, Task, scores_from_dict, scores_to_dict
from dynlrp.allocation.solver import Limit, Matrix, check, solve
from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.options import OnUnknown
from dynlrp.target import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT = 16
"""Bits of what is not rounded, in ``bitops``."""
MOST = 20_000
"""How many choices of bits activations may have that products and groups connect."""


class Operand(NamedTuple):
    """An activation in the table of its bits."""

    activation: str
    bits: int
    multiplications: float
    """Multiply-accumulates that it takes part in, for one sample."""
    cost: float
    """Mean over samples, at these bits."""
    low: float
    high: float
    """Its 95 % confidence interval."""


@dataclass(repr=False)
class Activations:
    """A number of bits for every activation that is multiplied, and why."""

    bits: dict[str, int]
    """By name: ``block.0.query:input``, ``block.0:query``; see :func:`dynlrp.allocation.products.multiplied`. What is
    not rounded has no entry."""
    ranges: dict[str, Range]
    """What they lie between on the calibration data; beyond, values are cut off."""
    scores: Scores
    """What every candidate costs in each activation."""
    table: list[Operand]
    cost: float
    """The sum of what was chosen."""
    average_bits: float
    """Of the activations in ``bits``, over the multiply-accumulates that they take part in."""
    bitops: float
    """Of one sample: multiply-accumulates times the bits of both factors."""
    layers: tuple[str, ...]
    """Those that took part."""
    provenance: dict[str, Any]
    """What it was made from: the model, versions, budget, groups, pins, bits of weights, what the solver found."""

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON; returns the path."""
        data = {
            "bits": self.bits,
            "average_bits": self.average_bits,
            "bitops": self.bitops,
            "cost": self.cost,
            "activations": [row._asdict() for row in self.table],
            "ranges": {name: asdict(ends) for name, ends in self.ranges.items()},
            "scores": scores_to_dict(self.scores),
            "layers": self.layers,
            "provenance": self.provenance,
        }
        path = Path(path)
        path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read what :meth:`save` wrote."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            table = [Operand(**row) for row in data["activations"]]
            return cls(
                bits=data["bits"],
                ranges={name: Range(**ends) for name, ends in data["ranges"].items()},
                scores=scores_from_dict(data["scores"], [row.activation for row in table]),
                table=table,
                cost=data["cost"],
                average_bits=data["average_bits"],
                bitops=data["bitops"],
                layers=tuple(data["layers"]),
                provenance=data["provenance"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} does not hold what save() wrote of activations: {error}") from error

    def plot(self, title: str | None = None) -> Figure:
        """Bits and cost of every activation, as a matplotlib figure (needs ``dynlrp[plot]``)."""
        from dynlrp import plot

        names, widths, _, *costs = zip(*self.table, strict=True)
        label = f"cost by {self.scores.name.replace('_', ' ')}"
        figure: Figure = plot.bits(names, widths, *costs, title=title, label=label)
        return figure

    @contextmanager
    def simulated(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with its activations rounded to these bits wherever it runs inside; afterwards it is as before."""

        def change(name: str, x: Tensor) -> Tensor:
            if name not in self.ranges:
                raise InputError(f"the activation {name!r} did not occur in the calibration, so it has no bits")
            return self.ranges[name].round(x, self.bits[name]) if name in self.bits else x

        with multiplied(model, find_layers(model, self.layers), change):
            yield model

    def __repr__(self) -> str:
        return (
            f"Activations({self.average_bits:.3f} bits on average for {len(self.table)} activations; "
            f"{self.bitops:.4g} operations on bits; score {self.scores.name})"
        )


def allocate_activations(
    model: nn.Module,
    calibration: Any,
    budget: float | Budget = 6.0,
    candidates: Iterable[int] = (3, 4, 5, 6, 8),
    *,
    weights: Allocation | Mapping[str, int] | None = None,
    score: str = "error",
    groups: Groups = (),
    pinned: Mapping[str, int | None] | None = None,
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
    progress: Callable[[int], object] = lambda samples: None,
) -> Activations:
    """Give every activation that is multiplied the bits with which the model suffers least within a budget.

    These are what layers are given, and both factors of each product of attention, fused or written out.

    Args:
        budget: average bits over multiply-accumulates, or a :class:`Budget` of ``average_bits`` or ``bitops``.
        candidates: bits that an activation may get, 2 to 8.
        weights: bits of the layers' weights, for ``bitops``, from :func:`allocate`; 16 for those without.
        score: what decides: a name in ``dynlrp.allocation.OPERAND_SCORES``.
        groups: names or globs of activations that must share bits, as in :func:`allocate`:
            ``[("*.query:input", "*.key:input", "*.value:input")]`` for what is one tensor and rounded once.
        pinned: bits by name or glob of activations; None for one that is not rounded, which counts as 16 bits in
            ``bitops`` and not in the average.
        layers: names or globs of the layers whose inputs take part.

    Others are as in :func:`allocate`.

    Raises:
        BudgetError: nothing is within the budget; it says what would be.
        InputError: activations are multiplied where no hand reaches.
    """
    widths, limit = widths_of(candidates), Budget.of(budget)
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
    found = survey(task)
    aliases = {name: (name,) for name in found.ranges}
    pins = make_pins(aliases, pinned or {}, "activation")
    grouped = pin_groups(make_groups(aliases, groups, "activation"), pins)
    if not grouped:
        raise InputError("every activation is pinned to None, so there is nothing to allocate")
    given = dict(weights.bits if isinstance(weights, Allocation) else weights or {})
    items = _Items([(names, widths if pin is None else (pin,)) for names, pin in grouped], found, given, limit)
    check(items.limits, items.allowed)  # before the time that scores take
    free = {name: ends for name, ends in found.ranges.items() if pins.get(name, 0) is not None}
    task = replace(task, candidates=tuple(sorted({*widths, *(pin for _, pin in grouped if pin is not None)})))
    scores = measure_operands(task, Survey(found.products, free), score, progress)
    rows = {name: row for row, name in enumerate(scores.layers)}
    columns = {bits: column for column, bits in enumerate(task.candidates)}
    mean, low, high = (of.tolist() for of in (scores.mean, *scores.interval()))
    cost = items.table(lambda _, bits: sum(mean[rows[name]][columns[b]] for name, b in bits.items()))
    solution = solve(cost, items.limits, items.allowed, time_limit=time_limit, gap=gap)
    chosen = items.bits(solution.choice)
    table = [
        Operand(
            name,
            chosen[name],
            found.multiplications[name],
            *(of[row][columns[chosen[name]]] for of in (mean, low, high)),
        )
        for name, row in rows.items()
    ]
    return Activations(
        bits={row.activation: row.bits for row in table},
        ranges=found.ranges,
        scores=scores,
        table=table,
        cost=solution.cost,
        average_bits=sum(row.multiplications * row.bits for row in table) / sum(row.multiplications for row in table),
        bitops=sum(_operations(product, chosen, given) for product in found.products),
        layers=tuple(task.layers),
        provenance={
            **made_from(task, limit, widths, [names for names, _ in grouped], pins, solution),
            "weights": given,
        },
    )


class _Items:
    """What the solver chooses for: groups of activations, those together whose bits are multiplied with each other."""

    def __init__(
        self,
        groups: Sequence[tuple[list[str], tuple[int, ...]]],
        found: Survey,
        weights: Mapping[str, int],
        budget: Budget,
    ) -> None:
        owner = {name: number for number, (names, _) in enumerate(groups) for name in names}
        together = nx.empty_graph(len(groups))
        free = [[name for name in product.activations if name in owner] for product in found.products]
        if budget.bitops is not None:
            together.add_edges_from((owner[names[0]], owner[name]) for names in free for name in names)
        self.groups = [[groups[number] for number in sorted(found)] for found in nx.connected_components(together)]
        for item in self.groups:
            if math.prod(len(widths) for _, widths in item) > MOST:
                raise InputError(
                    f"bits of {len(item)} activations, from {item[0][0][0]!r} to {item[-1][0][-1]!r}, are connected by "
                    f"products and groups, too many for bitops: make groups smaller, or limit average_bits"
                )
        self.choices = [list(itertools.product(*(widths for _, widths in item))) for item in self.groups]
        sizes = np.array([len(choices) for choices in self.choices])
        self.allowed = np.arange(sizes.max())[None] < sizes[:, None]
        self.limits = []
        if budget.average_bits is not None:
            counts = found.multiplications
            use = self.table(lambda _, bits: sum(counts[name] * b for name, b in bits.items()))
            total = sum(counts[name] for name in owner)
            self.limits.append(Limit("average_bits", use, budget.average_bits * total, total))
        if budget.bitops is not None:
            item_of = {name: number for number, item in enumerate(self.groups) for names, _ in item for name in names}
            products: list[list[Product]] = [[] for _ in self.groups]
            rest = 0.0
            for product, names in zip(found.products, free, strict=True):
                if names:
                    products[item_of[names[0]]].append(product)
                else:
                    rest += _operations(product, {}, weights)
            share = rest / len(self.groups)  # so that messages show whole models
            use = self.table(lambda item, bits: share + sum(_operations(p, bits, weights) for p in products[item]))
            self.limits.append(Limit("bitops", use, budget.bitops))

    def table(self, of: Callable[[int, dict[str, int]], float]) -> Matrix:
        """A number for each item and each choice of bits for its activations."""
        made = np.zeros(self.allowed.shape)
        for item, choices in enumerate(self.choices):
            made[item, : len(choices)] = [of(item, self._named(item, choice)) for choice in choices]
        return made

    def bits(self, chosen: Iterable[int]) -> dict[str, int]:
        """By activation, for a choice of every item."""
        return {
            name: bits
            for item, choice in enumerate(chosen)
            for name, bits in self._named(item, self.choices[item][choice]).items()
        }

    def _named(self, item: int, choice: Sequence[int]) -> dict[str, int]:
        return {name: bits for (names, _), bits in zip(self.groups[item], choice, strict=True) for name in names}


def _operations(product: Product, bits: Mapping[str, int], weights: Mapping[str, int]) -> float:
    """On bits, of one sample."""
    first, *others = (bits.get(name, FLOAT) for name in product.activations)
    return product.multiplications * first * (others[0] if others else weights.get(product.name, FLOAT))

"""Bits for the activations that a model multiplies, and the model with activations rounded to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from dynlrp.allocation.allocation import Allocation
from dynlrp.allocation.budget import Budget
from dynlrp.allocation.calibration import Calibration
from dynlrp.allocation.choices import Choices, operations
from dynlrp.allocation.divergence import Divergence, Kind
from dynlrp.allocation.groups import Groups, make_groups, make_pins, pin_groups
from dynlrp.allocation.layers import find_layers
from dynlrp.allocation.operand_scores import DEFAULT, measure_operands
from dynlrp.allocation.products import multiplied
from dynlrp.allocation.provenance import made_from
from dynlrp.allocation.quantizer import widths_of
from dynlrp.allocation.ranges import Range, Survey, survey
from dynlrp.allocation.scores import Scores, Task, scores_from_dict, scores_to_dict
from dynlrp.allocation.solver import check, solve
from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.options import OnUnknown
from dynlrp.target import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    score: str | Scores = DEFAULT,
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
        score: what decides: a name in ``dynlrp.allocation.OPERAND_SCORES``; or the ``scores`` of other bits of this
            model's activations, which are not measured again.
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
    choices = Choices([(names, widths if pin is None else (pin,)) for names, pin in grouped], found, given, limit)
    check(choices.limits, choices.allowed)  # before the time that scores take
    free = {name: ends for name, ends in found.ranges.items() if pins.get(name, 0) is not None}
    task = replace(task, candidates=tuple(sorted({*widths, *(pin for _, pin in grouped if pin is not None)})))
    if isinstance(score, Scores):
        scores = score.among(free, task.candidates)
    else:
        scores = measure_operands(task, Survey(found.products, free), score, progress)
    rows = {name: row for row, name in enumerate(scores.layers)}
    columns = {bits: column for column, bits in enumerate(task.candidates)}
    mean, low, high = (of.tolist() for of in (scores.mean, *scores.interval()))
    cost = choices.table(lambda _, bits: sum(mean[rows[name]][columns[b]] for name, b in bits.items()))
    solution = solve(cost, choices.limits, choices.allowed, time_limit=time_limit, gap=gap)
    chosen = choices.bits(solution.choice)
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
        bitops=sum(operations(product, chosen, given) for product in found.products),
        layers=tuple(task.layers),
        provenance={
            **made_from(task, limit, choices.limits, widths, [names for names, _ in grouped], pins, solution),
            "weights": given,
        },
    )

"""From a model and calibration data to a number of bits for every layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dynlrp.allocation.budget import Budget, make_limits, unquantized_size
from dynlrp.allocation.calibration import Calibration
from dynlrp.allocation.convert.torchao import torchao_config
from dynlrp.allocation.divergence import Divergence, Kind
from dynlrp.allocation.groups import Groups, make_groups, make_pins, pin_groups
from dynlrp.allocation.layers import Layer, find_layers
from dynlrp.allocation.noise import costs
from dynlrp.allocation.provenance import made_from
from dynlrp.allocation.quantizer import Quantizer, rounded, widths_of
from dynlrp.allocation.scores import DEFAULT, Noise, Scores, Task, find_noise, measure, scores_from_dict, scores_to_dict
from dynlrp.allocation.solver import check, solve
from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.options import OnUnknown
from dynlrp.target import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(NamedTuple):
    """A layer in the table of an allocation."""

    layer: str
    bits: int
    weights: int
    score: float
    """Mean over samples, at these bits where the score depends on them."""
    low: float
    high: float
    """Its 95 % confidence interval."""
    cost: float
    """What these bits cost, in units of the score."""


Tool = Literal["torchao", "float"]


@dataclass(repr=False)
class Allocation:
    """A number of bits for every layer, and why."""

    bits: dict[str, int]
    """By name of a module; layers that stay as they are have no entry. Modules that share a weight all have one."""
    scores: Scores
    costs: Tensor
    """What every candidate costs in every layer, ``(layers, candidates)``."""
    table: list[Row]
    cost: float
    """The sum over all layers, which was made as small as the budget allows."""
    average_bits: float
    """Bits for each weight of the layers in ``bits``, with their scales and zero points."""
    size: float
    """Bytes of all parameters of the model, with scales and zero points."""
    quantizer: Quantizer
    provenance: dict[str, Any]
    """What it was made from: the model, versions, budget, groups, pins, what the solver found."""
    model: nn.Module | None = field(default=None)
    """The model, where it was made in this process."""

    def apply(self, model: nn.Module | None = None, *, tool: Tool = "torchao") -> nn.Module:
        """A copy of the model with these bits. For other tools, see :mod:`dynlrp.allocation.convert`.

        Args:
            model: the one that was given to :func:`allocate` by default.
            tool: ``torchao`` stores integers of these bits (needs ``dynlrp[torchao]``); ``float`` rounds to the numbers
                that they stand for and holds those, which every layer can.

        Raises:
            ConversionError: torchao cannot take a layer.
        """
        if tool not in get_args(Tool):
            raise InputError(f"tool is one of {', '.join(get_args(Tool))}, not {tool!r}; for others see convert")
        original = self._model(model)
        result = copy.deepcopy(original)
        layers = self._layers(result)
        if tool == "torchao":
            config = torchao_config(result, self.bits, self.quantizer)
            from torchao.quantization import quantize_

            quantize_(result, config, filter_fn=None)
            return result
        for module, name, parameter in rounded(layers, {name: self.bits[name] for name in layers}, self.quantizer):
            setattr(module, name, parameter)
        return result

    def save(self, path: str | Path) -> Path:
        """Write everything but the model as JSON; returns the path."""
        data = {
            "bits": self.bits,
            "average_bits": self.average_bits,
            "size": self.size,
            "cost": self.cost,
            "quantizer": asdict(self.quantizer),
            "layers": [row._asdict() for row in self.table],
            "scores": {**scores_to_dict(self.scores), "costs": self.costs.tolist()},
            "provenance": self.provenance,
        }
        path = Path(path)
        path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Allocation:
        """Read what :meth:`save` wrote; ``model`` is what :meth:`apply` then takes by default."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            table = [Row(**row) for row in data["layers"]]
            return cls(
                bits=data["bits"],
                scores=scores_from_dict(data["scores"], [row.layer for row in table]),
                costs=torch.tensor(data["scores"]["costs"], dtype=torch.float64),
                table=table,
                cost=data["cost"],
                average_bits=data["average_bits"],
                size=data["size"],
                quantizer=Quantizer(**data["quantizer"]),
                provenance=data["provenance"],
                model=model,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no allocation that save() wrote: {error}") from error

    def plot(self, title: str | None = None) -> Figure:
        """Bits and score of every layer, as a matplotlib figure (needs ``dynlrp[plot]``)."""
        from dynlrp import plot

        names, widths, _, *scores, _ = zip(*self.table, strict=True)
        label = self.scores.name.replace("_", " ")
        figure: Figure = plot.bits(names, widths, *scores, title=title, label=label)
        return figure

    def _model(self, model: nn.Module | None) -> nn.Module:
        found = model if model is not None else self.model
        if found is None:
            raise InputError("this allocation was loaded from a file: give the model, apply(model)")
        return found

    def _layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layers of a model, which must be those that the allocation was made for."""
        layers = find_layers(model, [row.layer for row in self.table])
        for row in self.table:
            if layers[row.layer].weights != row.weights:
                raise InputError(
                    f"layer {row.layer!r} of this model has {layers[row.layer].weights} weights; the allocation was "
                    f"made for one with {row.weights}"
                )
        return layers

    def __repr__(self) -> str:
        return (
            f"Allocation({self.average_bits:.3f} bits for each of {sum(row.weights for row in self.table):,} "
            f"weights in {len(self.table)} layers; {self.size / 2**20:.3g} MiB; score "
            f"{self.scores.name})"
        )


def allocate(
    model: nn.Module,
    calibration: Any,
    budget: float | Budget = 4.0,
    candidates: Iterable[int] = (2, 3, 4, 5, 6, 8),
    *,
    score: str | Scores = DEFAULT,
    noise: Noise | None = None,
    groups: Groups = (),
    pinned: Mapping[str, int | None] | None = None,
    layers: str | Iterable[str] = "*",
    quantizer: Quantizer | None = None,
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
) -> Allocation:
    """Give every layer the bits with which the model suffers least within a budget.

    A score says, from a forward and a backward pass over the calibration data, what b bits in a layer cost: either
    that cost itself, or a sensitivity that is multiplied with the noise of b bits. The bits are those of least total
    cost within the budget, solved exactly. The model stays as it is.

    Args:
        model: in eval mode.
        calibration: a tensor, a mapping of keyword arguments (a tokenizer's output), a tuple of positional arguments;
            or an iterable of batches of these, such as a DataLoader. Some dozens of samples do.
        budget: average bits per weight, scales and zero points counted, or a :class:`Budget`.
        candidates: bits that a layer may get, 2 to 8.
        score: a name in ``dynlrp.allocation.SCORES``; or the ``scores`` of another allocation of this model by the same
            quantizer, for these layers or more, which are not measured again.
        noise: what a sensitivity is multiplied with, ``relative``, ``absolute`` or ``output``; by default what
            the score is meant for.
        groups: names or globs of layers that must share bits, as in ``[("*.query", "*.key", "*.value")]``: where the
            stars stand for the same text, layers share.
        pinned: bits by name or glob; None for a layer that stays as it is.
        layers: names or globs of the layers that take part; by default all that can be quantized.
        quantizer: how weights are rounded; by default :class:`Quantizer`'s defaults.
        target, composite, output, on_unknown: what is explained and by which rules, as in :func:`dynlrp.explain`, for
            scores by relevance.
        divergence: what it means for the output to change, for scores that ask that: a :class:`Divergence` or its kind.
        batch_size: samples of a batch, where the calibration is not in batches already.
        samples: use so many at most.
        seed: of random draws.
        time_limit: seconds for the solver.
        gap: how far from the optimum it may stop, as a share of the cost.
        progress: called with the number of samples of each batch that was scored.

    Raises:
        BudgetError: nothing is within the budget; it says what would be.
        InputError: names that find nothing, candidates out of range, calibration that the model does not take.
    """
    widths = widths_of(candidates)
    found = find_layers(model, layers)
    aliases = {name: layer.modules for name, layer in found.items()}
    pins = make_pins(aliases, pinned or {})
    grouped = pin_groups(make_groups(aliases, groups), pins)
    if not grouped:
        raise InputError("every layer is pinned to None, so there is nothing to allocate")
    task = Task(
        model,
        {name: found[name] for name in found if pins.get(name, 0) is not None},
        Calibration(calibration, batch_size, samples),
        tuple(sorted({*widths, *(pin for _, pin in grouped if pin is not None)})),
        quantizer or Quantizer(),
        target,
        composite,
        on_unknown,
        Divergence.of(divergence),
        output,
        seed,
    )
    budget = Budget.of(budget)
    limits = make_limits(budget, [names for names, _ in grouped], task)
    allowed = np.array(
        [[bits in (widths if pin is None else (pin,)) for bits in task.candidates] for _, pin in grouped]
    )
    check(limits, allowed)  # before the time that scores take
    if isinstance(score, Scores):
        known = score.among(task.layers, task.candidates, task.quantizer)
        scores = replace(known, noise=find_noise(known.name, known.noise, noise))
    else:
        scores = measure(task, score, progress, noise)
    cost = costs(scores, task)
    places = {name: place for place, name in enumerate(task.layers)}
    merged = np.stack([cost[[places[name] for name in names]].sum(0).numpy() for names, _ in grouped])
    solution = solve(merged, limits, allowed, time_limit=time_limit, gap=gap)
    chosen = {
        name: task.candidates[place]
        for (names, _), place in zip(grouped, solution.choice, strict=True)
        for name in names
    }
    return Allocation(
        bits={alias: chosen[name] for name, layer in task.layers.items() for alias in layer.modules},
        scores=scores,
        costs=cost,
        table=_table(task, scores, cost, chosen),
        cost=solution.cost,
        quantizer=task.quantizer,
        average_bits=_bits(task, chosen) / sum(layer.weights for layer in task.layers.values()),
        size=_bits(task, chosen) / 8 + unquantized_size(model, task.layers),
        provenance=made_from(task, budget, limits, widths, [names for names, _ in grouped], pins, solution),
        model=model,
    )


def _bits(task: Task, chosen: Mapping[str, int]) -> int:
    """All bits of the allocated weights."""
    return sum(task.quantizer.bits_of(task.layers[name], bits) for name, bits in chosen.items())


def _table(task: Task, scores: Scores, cost: Tensor, chosen: Mapping[str, int]) -> list[Row]:
    low, high = scores.interval()
    rows = []
    for place, (name, layer) in enumerate(task.layers.items()):
        bits = task.candidates.index(chosen[name])
        at = (place, bits) if scores.mean.ndim == 2 else (place,)
        numbers = (float(scores.mean[at]), float(low[at]), float(high[at]), float(cost[place, bits]))
        rows.append(Row(name, chosen[name], layer.weights, *numbers))
    return rows

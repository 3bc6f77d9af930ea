"""Structured pruning: relevance of filters, neurons and heads over calibration data, a ranking, and masks.

Units with little relevance play little part in what the model puts out, so they are the first to go (Voita et al. 2019
for heads, Yeom et al. 2021 for filters, Hatefi et al. 2024 for both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from dynlrp.allocation.calibration import Calibration
from dynlrp.allocation.calibration import batch_size as samples_of
from dynlrp.allocation.layers import is_linear, output_axis
from dynlrp.allocation.moments import Moments
from dynlrp.allocation.replaced import Replacement, replaced
from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.explain import explain
from dynlrp.explanation import Explanation
from dynlrp.names import matching
from dynlrp.places import parse
from dynlrp.target import Target

Masks = Mapping[str, Tensor]
"""Which units stay, ``(units,)`` booleans by the name of their tensor: ``block.0`` for the output channels of a module,
``attn.out:input`` for the heads that a linear map joins, ``attn:heads`` for those of an ``nn.MultiheadAttention``."""


class Unit(NamedTuple):
    """A filter, neuron or head."""

    tensor: str
    """As in ``Masks``."""
    unit: int
    relevance: float
    error: float
    """The standard error of ``relevance``."""


@dataclass(frozen=True)
class UnitRelevance:
    """How relevant the units of a model are."""

    relevance: dict[str, Tensor]
    """The mean share of each unit in the relevance of its tensor, ``(units,)`` by name as in ``Masks``."""
    error: dict[str, Tensor]
    """Standard errors of these means over samples."""
    samples: int

    def ranked(self) -> list[Unit]:
        """All units, the least relevant first."""
        units = [
            Unit(name, number, *numbers)
            for name, found in self.relevance.items()
            for number, numbers in enumerate(zip(found.tolist(), self.error[name].tolist(), strict=True))
        ]
        return sorted(units, key=lambda unit: unit.relevance)

    def masks(self, fraction: float, *, each_layer: bool = False, keep: int = 1) -> dict[str, Tensor]:
        """Masks without the least relevant units.

        Args:
            fraction: how many of all units go, from 0 to 1.
            each_layer: take this share from every layer rather than from the whole ranking.
            keep: units that stay in every layer at least.
        """
        if not 0 <= fraction <= 1:
            raise InputError(f"fraction is between 0 and 1, not {fraction}")
        queues: dict[str, list[Unit]] = {}
        for unit in self.ranked():
            queues.setdefault(unit.tensor if each_layer else "", []).append(unit)
        masks = {name: torch.ones(len(found), dtype=torch.bool) for name, found in self.relevance.items()}
        stay = {name: len(mask) for name, mask in masks.items()}
        for queue in queues.values():
            left = round(fraction * len(queue))
            for tensor, number, *_ in queue:
                if left and stay[tensor] > keep:
                    masks[tensor][number] = False
                    stay[tensor] -= 1
                    left -= 1
        return masks


@dataclass(frozen=True)
class _Place:
    """Where the units of a layer are."""

    tensor: str
    """Whose relevance is theirs, as :func:`dynlrp.explain` calls it."""
    channels: int | None
    """The axis of this tensor along which they lie; None where it is known of it."""
    features: int
    """How many entries this axis has."""
    units: int
    module: str
    """Whose weight is masked."""
    axis: int
    """The axis of that weight."""

    def shares(self, explanation: Explanation, size: int) -> Tensor:
        """Of each unit in the relevance of the tensor, ``(samples, units)``; zeros where there is none."""
        if explanation.layers[self.tensor] is None:
            return torch.zeros(size, self.units, dtype=torch.float64)
        rows = explanation.by_channel(self.tensor, self.channels).detach().to("cpu", torch.float64)
        if len(rows) % size or rows.shape[1] != self.features:
            raise InputError(
                f"the relevance of {self.tensor!r} has {len(rows)} samples and {rows.shape[1]} channels, where {size} "
                f"and {self.features} were expected: use batches of one sample"
            )
        rows = rows.reshape(size, -1, self.units, self.features // self.units).sum((1, 3))
        return rows / rows.abs().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _has_outputs(module: nn.Module) -> bool:
    return is_linear(module) or (isinstance(module, _BatchNorm) and bool(module.affine))


def _joins_heads(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or (is_linear(module) and len(_shape(module)) == 2)


def _shape(module: nn.Module) -> torch.Size:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape


def _find(model: nn.Module, names: str | Iterable[str], fits: Callable[[nn.Module], bool]) -> list[str]:
    """Names of modules by name or glob, each once."""
    every = [name for name, module in model.named_modules() if fits(module)]
    patterns = (names,) if isinstance(names, str) else names
    return list(dict.fromkeys(name for p in patterns for name in matching(p, every, "layer with such units")))


def _output(model: nn.Module, name: str) -> _Place:
    """The output channels of a module."""
    (name,) = _find(model, escape(name), _has_outputs)
    module = model.get_submodule(name)
    axis = output_axis(module)
    units = _shape(module)[axis]
    return _Place(name, None, units, units, name, axis)


def _heads(model: nn.Module, name: str, count: int) -> _Place:
    """The heads that a module joins."""
    (name,) = _find(model, escape(name), _joins_heads)
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        if count != module.num_heads:
            raise InputError(f"{name!r} has {module.num_heads} heads, not {count}")
        return _Place(f"{name}:heads", None, count, count, f"{name}.out_proj", 1)
    axis = 1 - output_axis(module)
    inputs = _shape(module)[axis]
    if count < 1 or inputs % count:
        raise InputError(f"the {inputs} inputs of {name!r} are not those of {count} heads")
    return _Place(f"{name}:input", -1, inputs, count, name, axis)


def _explained(
    model: nn.Module, calibration: Calibration, ask: Callable[[Any], Explanation]
) -> Iterator[tuple[Explanation, int]]:
    """An explanation for each batch, and how many samples it is of."""
    empty = True
    for batch in calibration.batches(model):
        with torch.inference_mode(False):
            found = ask(batch)
        yield found, samples_of(batch)
        empty = False
    if empty:
        raise InputError("the calibration holds no batch")


def unit_relevance(
    model: nn.Module,
    calibration: Any,
    layers: str | Iterable[str] = (),
    *,
    heads: Mapping[str, int] | None = None,
    signed: bool = False,
    target: Target = None,
    composite: str | Composite = "auto",
    output: str | int | None = None,
    batch_size: int = 8,
    samples: int | None = None,
) -> UnitRelevance:
    """Relevance of the units of layers over calibration data; the model stays as it is.

    A unit's relevance in a sample is the sum over its positions, divided by the sum of sizes over all units of the
    layer, so that samples and layers count alike.

    Args:
        model: in eval mode.
        calibration: as in :func:`dynlrp.allocate`: inputs, or an iterable of batches of them.
        layers: names or globs of linear maps, convolutions and batch norms, whose output channels are units. Behind a
            convolution with a batch norm, take the norm: without the filter alone, the norm's offset would remain.
        heads: number of heads by name or glob of the linear map that joins them (``*.attention.output.dense``,
            ``*.o_proj``), or of an ``nn.MultiheadAttention``.
        signed: average relevance itself, so that units that speak against the output come first (Yeom et al. 2021); by
            default its size.
        target, composite, output: what is explained and by which rules, as in :func:`dynlrp.explain`.
        batch_size, samples: as in :func:`dynlrp.allocate`.

    Raises:
        InputError: a name finds no such layer, or heads do not divide its inputs.
    """
    places = [_output(model, name) for name in _find(model, layers, _has_outputs)]
    for pattern, number in (heads or {}).items():
        places += [_heads(model, name, number) for name in _find(model, pattern, _joins_heads)]
    if not places:
        raise InputError("name layers or heads")
    found = {place.tensor: Moments() for place in places}
    if len(found) < len(places):
        raise InputError(f"heads={heads} names a layer twice")

    def ask(batch: Any) -> Explanation:
        return explain(model, batch, target, composite=composite, layers=list(found), output=output)

    count = 0
    for explanation, size in _explained(model, Calibration(calibration, batch_size, samples), ask):
        for place in places:
            shares = place.shares(explanation, size)
            found[place.tensor].add(shares if signed else shares.abs())
        count += size
    return UnitRelevance(
        {name: moments.mean for name, moments in found.items()},
        {name: moments.error() for name, moments in found.items()},
        count,
    )


def parameter_masks(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Ones and zeros for the parameters that make the units, by name and of their shape: rows of weights and biases, or
    columns of the linear map that joins heads. Without them a unit puts out zeros.

    Raises:
        InputError: a mask is not that of a layer's units.
    """
    found: dict[str, Tensor] = {}
    for tensor, mask in masks.items():
        name, kind = parse(tensor)
        place = _output(model, name) if kind == "output" else _heads(model, name, len(mask))
        if place.tensor != tensor:
            raise InputError(f"{tensor!r} has no units; {place.tensor!r} has")
        if mask.dtype != torch.bool or mask.shape != (place.units,):
            raise InputError(f"the mask of {tensor!r} is {tuple(mask.shape)} {mask.dtype}, not {place.units} booleans")
        module = model.get_submodule(place.module)
        for parameter in ("weight", "bias") if kind == "output" else ("weight",):
            value = getattr(module, parameter, None)
            if value is not None:
                axis = place.axis if parameter == "weight" else 0
                entries = mask.to(value.device).repeat_interleave(value.shape[axis] // place.units)
                shape = [-1 if along == axis else 1 for along in range(value.ndim)]
                found[f"{place.module}.{parameter}"] = entries.reshape(shape).expand_as(value).to(value.dtype)
    return found


@contextmanager
def pruned(model: nn.Module, masks: Masks) -> Iterator[None]:
    """The model without the masked units, and behind the block with its own parameters again, the very same."""
    with replaced(_masked(model, masks)):
        yield


def _masked(model: nn.Module, masks: Masks) -> Iterator[Replacement]:
    for module, parameter, mask in _parameters(model, masks):
        value = module._parameters[parameter]
        assert value is not None
        yield module, parameter, nn.Parameter(value.detach() * mask, value.requires_grad)


def _parameters(model: nn.Module, masks: Masks) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The modules that hold the masked parameters, with the names there, and the masks."""
    for name, mask in parameter_masks(model, masks).items():
        path, _, parameter = name.rpartition(".")
        yield model.get_submodule(path), parameter, mask


def prune_units(model: nn.Module, masks: Masks) -> None:
    """Put the masks into the model by ``torch.nn.utils.prune``: they hold while it is trained on, and ``prune.remove``
    makes them final."""
    for module, parameter, mask in _parameters(model, masks):
        prune.custom_from_mask(module, parameter, mask)  # type: ignore[no-untyped-call]


def weight_relevance(
    model: nn.Module,
    calibration: Any,
    parameters: str | Iterable[str] = "*.weight",
    *,
    target: Target = None,
    composite: str | Composite = "auto",
    output: str | int | None = None,
    batch_size: int = 8,
    samples: int | None = None,
) -> dict[str, Tensor]:
    """Mean relevance of every single weight over calibration data, by name and of the parameter's shape, float32; the
    model stays as it is. Parameters that take no part have none.

    Args:
        parameters: names or globs; the rest as in :func:`unit_relevance`.
    """

    def ask(batch: Any) -> Explanation:
        return explain(model, batch, target, composite=composite, parameters=parameters, output=output)

    total: dict[str, Tensor] = {}
    count = 0
    for explanation, size in _explained(model, Calibration(calibration, batch_size, samples), ask):
        for name, found in explanation.parameters.items():
            if found is not None:
                found = found.detach().to("cpu", torch.float64)
                total[name] = total[name] + found if name in total else found
        count += size
    return {name: (found / count).float().contiguous() for name, found in total.items()}


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors by name as ``.safetensors`` or ``.npz``; returns the path."""
    path = Path(path)
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ModuleNotFoundError as error:
            raise InputError(f"{path.suffix} needs safetensors: pip install safetensors, or write .npz") from error
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        raise InputError(f"{path} must end in .npz or .safetensors")
    return path

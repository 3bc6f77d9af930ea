"""The layers whose weights get a number of bits: linear maps and convolutions, each weight once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynlrp.allocation.replaced import replaced
from dynlrp.errors import InputError
from dynlrp.names import matching

LINEAR = 1e-2
"""How far an output may be from linear in the weight, relative to its size: above what half precision rounds, and far
below what a weight that is standardised, or not the only one, makes."""
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
REASONS: dict[type[nn.Module] | tuple[type[nn.Module], ...], str] = {
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): "transposed convolutions are not allocated",
    (nn.Embedding, nn.EmbeddingBag): "rows of a table are looked up, not multiplied",
    (nn.RNNBase, nn.RNNCellBase): "recurrent layers are one operation, whose weights are not allocated",
    nn.Bilinear: "a bilinear map is not allocated",
    nn.MultiheadAttention: "its projections are read by attention itself, so no module runs that could be quantized",
    NonDynamicallyQuantizableLinear: "attention reads its weight and never calls it",
}
"""Modules that hold many weights and are left out."""


@dataclass(frozen=True)
class Layer:
    """One weight and the modules that use it."""

    name: str
    """Name of the first module that holds the weight."""
    modules: dict[str, nn.Module]
    """All linear maps and convolutions that hold it, by name: more than one where a weight is tied."""
    elsewhere: tuple[str, ...] = ()
    """Other parameters it is tied to, such as an embedding, which stay as they are."""

    @property
    def module(self) -> nn.Module:
        """The first of the modules."""
        return self.modules[self.name]

    @property
    def weight(self) -> Tensor:
        """The weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weights(self) -> int:
        """How many numbers the weight holds."""
        return self.weight.numel()

    @property
    def fan_in(self) -> int:
        """Weights that feed an output: the multiply-accumulates for each of its numbers."""
        return self.weights // self.weight.shape[self.output_axis]

    def linear(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """What one of the modules makes of an input with another weight and no bias.

        A class with a forward of its own, such as a convolution that pads its input first, is asked for it.
        """
        if has_own_forward(module):
            bias = module._parameters.get("bias")
            without = [] if bias is None else [(module, "bias", torch.zeros_like(bias))]
            with replaced([(module, "weight", weight), *without]):
                made: Tensor = module.forward(x)
            return made
        if isinstance(module, _ConvNd):
            convolved: Tensor = module._conv_forward(x, weight, None)
            return convolved
        return x @ weight if self.output_axis else F.linear(x, weight)

    def check_linear(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Whether ``output`` is linear in the weight, as all scores take it to be, where a class has a forward of its
        own: one that standardises its weight, or adds what comes from elsewhere, is not.

        Raises:
            InputError: it is not.
        """
        if not has_own_forward(module):
            return
        with torch.no_grad():
            weight = self.weight.detach()
            once, twice = self.linear(module, x, weight), self.linear(module, x, 2 * weight)
            bias = module._parameters.get("bias")
            if bias is not None:
                output = output - bias.reshape(-1, *[1] * (output.ndim - 1 - self.channel_axis(output.ndim)))
            size = torch.linalg.vector_norm(output)
            if max(torch.dist(once, output), torch.dist(twice, 2 * output)) > size * LINEAR:
                raise InputError(
                    f"layer {self.name!r}: the forward of {type(module).__name__} is not linear in its weight, so "
                    f"what rounding does is not known; leave it out, with layers= or pinned={{{self.name!r}: None}}"
                )

    def channel_axis(self, ndim: int) -> int:
        """The axis that counts channels in an input or output of ``ndim`` dimensions."""
        return ndim - 1 - (self.weight.ndim - 2 if isinstance(self.module, _ConvNd) else 0)

    @property
    def output_axis(self) -> int:
        """The axis of the weight that counts output channels: 0, but 1 in ``Conv1D`` of transformers."""
        return output_axis(self.module)


def find_layers(model: nn.Module, names: str | Iterable[str] = "*") -> dict[str, Layer]:
    """The layers of a model by name, in the order of ``named_modules``.

    Linear, Conv1d, Conv2d, Conv3d and transformers' ``Conv1D`` count, by subclass. A module under several names
    counts once, by its first; so does a weight that several modules share.

    Args:
        names: names or globs of modules; an entry that finds none is an error.
    """
    patterns = (names,) if isinstance(names, str) else tuple(names)
    left = left_out(model)
    every = {name: module for name, module in model.named_modules() if _holds_weight(module) and name not in left}
    found = {
        name
        for pattern in patterns
        for name in matching(pattern, every, "linear map or convolution", left.get(pattern, ""))
    }
    holders: dict[int, dict[str, nn.Module]] = {}
    for name, module in every.items():
        holders.setdefault(id(module.weight), {})[name] = module
    parameters: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    layers: dict[str, Layer] = {}
    for weight, modules in holders.items():
        if found.intersection(modules):
            own = {id(module) for module in modules.values()}
            elsewhere = tuple(
                name for name in parameters[weight] if id(model.get_submodule(name.rpartition(".")[0])) not in own
            )
            first = next(iter(modules))
            layers[first] = Layer(first, modules, elsewhere)
    return layers


def left_out(model: nn.Module) -> dict[str, str]:
    """Modules with many weights that get no bits, with the reason, by name."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = next((reason for kind, reason in REASONS.items() if isinstance(module, kind)), "")
        if not reason and is_linear(module) and not _holds_weight(module):
            reason = "its weight is computed from other parameters, or is not made yet"
        if reason:
            found[name] = reason
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map or a convolution."""
    return isinstance(module, KINDS) or _is_transposed(module)


def output_axis(module: nn.Module) -> int:
    """The axis of a module's weight that counts output channels: 0, but 1 in ``Conv1D`` of transformers."""
    return int(_is_transposed(module))


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's class does something else than the linear map or convolution that it is a subclass of."""
    return not _is_transposed(module) and type(module).forward not in [kind.forward for kind in KINDS]


def _is_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear map whose weight is (inputs, outputs)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).mro()
    )


def _holds_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return is_linear(module) and weight is not None and weight.is_floating_point() and not _is_lazy(weight)


def _is_lazy(weight: nn.Parameter) -> bool:
    return isinstance(weight, nn.parameter.UninitializedParameter)

"""Round-to-nearest quantization of weights: the numbers a tool would store, as floating point, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynlrp.allocation.layers import Layer
from dynlrp.allocation.replaced import Replacement, replaced
from dynlrp.errors import InputError

WIDTHS = range(2, 9)
"""Bits that a weight can have. With one bit, round to nearest leaves nothing but zeros."""


@dataclass(frozen=True)
class Quantizer:
    """Round to nearest with a scale per block of weights, in the arithmetic of torchao's ``IntxWeightOnlyConfig``.

    ``q = clamp(round(w / scale) + zero, -2^(b-1), 2^(b-1) - 1)`` and ``Q(w) = (q - zero) * scale``. Symmetric: ``zero =
    0`` and ``scale = 2 max|w| / (2^b - 1)``. Asymmetric: ``scale = (max(w, 0) - min(w, 0)) / (2^b - 1)``.

    Args:
        symmetric: without zero points.
        group_size: inputs that share a scale; None for all that feed one output channel.
        per_tap: taps of a convolution's kernel have scales of their own, ``(out, in / group_size, *kernel)`` in all,
            which is what torchao does. By default a scale is for a whole filter, as in other tools.
        scale_bits: bits of a scale; None for those of the weight's own dtype.
    """

    symmetric: bool = True
    group_size: int | None = None
    per_tap: bool = False
    scale_bits: int | None = None

    def round(self, layer: Layer, bits: int) -> Tensor:
        """The weight of a layer as ``bits`` bits can hold it, in its own shape and dtype."""
        _check(bits)
        weight = layer.weight.detach()
        rows = weight.movedim(layer.output_axis, 0)
        if self.per_tap:
            rows = rows.movedim(1, -1)
        blocks = rows.reshape(-1, self._block(layer))
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        tiny = torch.finfo(weight.dtype).smallest_normal
        least, most = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            scale = (torch.maximum(-least, most) / ((high - low) / 2)).clamp(min=tiny)
            zero = torch.zeros_like(scale)
        else:
            scale = ((most - least) / (high - low)).clamp(min=tiny)
            zero = (low - (least / scale).round()).clamp(low, high)
        numbers = ((blocks * (1.0 / scale)).round() + zero).clamp(low, high)
        rounded = ((numbers - zero) * scale).reshape(rows.shape)
        if self.per_tap:
            rounded = rounded.movedim(-1, 1)
        result: Tensor = rounded.movedim(0, layer.output_axis).contiguous()
        return result

    def bits_of(self, layer: Layer, bits: int) -> int:
        """Bits that a layer's weight takes, with its scales and zero points (of ``bits`` bits each)."""
        _check(bits)
        scale = self.scale_bits if self.scale_bits is not None else 8 * layer.weight.element_size()
        return layer.weights * bits + self._scales(layer) * (scale + (0 if self.symmetric else bits))

    def _scales(self, layer: Layer) -> int:
        return layer.weights // self._block(layer)

    def _block(self, layer: Layer) -> int:
        """How many weights share a scale."""
        shape = layer.weight.shape
        inputs = shape[1 - layer.output_axis]
        along = inputs if self.per_tap else layer.fan_in
        size = self.group_size or along
        if along % size:
            raise InputError(
                f"group_size={size} does not divide the {along} weights of {layer.name!r} that feed an output: choose "
                f"a divisor, or pin this layer to None"
            )
        return size


@contextmanager
def quantized(layers: Mapping[str, Layer], bits: Mapping[str, int], quantizer: Quantizer) -> Iterator[None]:
    """A model whose ``layers`` have weights of these bits, in floating point; afterwards it has its own parameters
    again, the very same.

    A weight that is tied to another module, such as an embedding, is replaced in the layers alone.

    Args:
        bits: by name of a layer; the others stay as they are.
    """
    with replaced(rounded(layers, bits, quantizer)):
        yield


def rounded(layers: Mapping[str, Layer], bits: Mapping[str, int], quantizer: Quantizer) -> Iterator[Replacement]:
    """The weights of these bits, one parameter for all modules that share it."""
    for name, number in bits.items():
        layer = layers[name]
        weight = nn.Parameter(quantizer.round(layer, number), requires_grad=layer.weight.requires_grad)
        for module in layer.modules.values():
            yield module, "weight", weight


def widths_of(candidates: Iterable[int]) -> tuple[int, ...]:
    """The candidates in order, each once."""
    widths = tuple(sorted(set(candidates)))
    if not widths or not set(widths) <= set(WIDTHS):
        raise InputError(f"candidates are from {WIDTHS[0]} to {WIDTHS[-1]} bits, not {widths}")
    return widths


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise InputError(f"weights have {WIDTHS[0]} to {WIDTHS[-1]} bits, not {bits}")

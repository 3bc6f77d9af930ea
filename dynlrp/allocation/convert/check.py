"""What every converter asks first: are these layers of the model, and can the tool take them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from dynlrp.allocation.layers import Layer, find_layers, left_out
from dynlrp.errors import ConversionError, InputError

Refusal = Callable[[Layer, int], str | None]
"""Why a tool cannot give a layer so many bits; None where it can."""


class Width(NamedTuple):
    """A layer and its bits."""

    layer: Layer
    bits: int


def check(tool: str, model: nn.Module, bits: Mapping[str, int], refuse: Refusal) -> list[Width]:
    """The layers that ``bits`` names; modules that share a weight are one, whichever of them are named.

    Raises:
        ConversionError: with all layers that the tool cannot take.
    """
    if not bits:
        raise InputError("bits names no layer")
    owner = {name: layer for layer in find_layers(model).values() for name in layer.modules}
    out = left_out(model)
    found: dict[str, Width] = {}
    reasons: dict[str, str] = {}
    for name, number in bits.items():
        if name not in owner:
            reasons[name] = out.get(name, "the model has no such linear map or convolution")
            continue
        layer = owner[name]
        first = found.setdefault(layer.name, Width(layer, number))
        if name == "":
            reasons[name] = "the model itself is this layer: put it inside a module"
        elif first.bits != number:
            reasons[name] = f"{number} bits, where {layer.name!r}, whose weight it shares, has {first.bits}"
        elif reason := refuse(layer, number):
            reasons[name] = reason
    if reasons:
        raise ConversionError(tool, len(bits), reasons)
    return list(found.values())


def not_in(widths: Collection[int], bits: int) -> str | None:
    """The refusal of a width."""
    if bits in widths:
        return None
    return f"{bits} bits, where the tool has {', '.join(map(str, widths))}: allocate with these candidates"


def by_width(layers: Sequence[Width]) -> dict[int, list[Layer]]:
    """The layers of each width, the smallest width first."""
    return {width: [layer for layer, bits in layers if bits == width] for width in sorted({bits for _, bits in layers})}


def read_by_parent(model: nn.Module) -> dict[nn.Module, str]:
    """Linear maps whose weights a fused ``nn.TransformerEncoderLayer`` reads: without grad it calls none of them, so
    that whatever a tool does in their forward is passed over."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            found |= dict.fromkeys((module.linear1, module.linear2), name)
    return found

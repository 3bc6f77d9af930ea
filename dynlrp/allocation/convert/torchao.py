"""torchao: weight-only quantization of linear maps and 2-D convolutions to 2 to 8 bits, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dynlrp.allocation.convert.check import check, not_in
from dynlrp.allocation.extras import needs
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.quantizer import Quantizer

WIDTHS = range(2, 9)
"""torchao has one bit too, but rounds every weight to 0 with it."""


def torchao_config(model: nn.Module, bits: Mapping[str, int], quantizer: Quantizer | None = None) -> Any:
    """An ``FqnToConfig`` of one ``IntxWeightOnlyConfig`` per layer, for
    ``quantize_(model, config, filter_fn=None)``.

    The weights are then those of ``quantizer`` to the last bit. A convolution has a scale for each tap of a filter, so
    it asks for ``Quantizer(per_tap=True)``; depthwise ones are refused, as a scale for each weight saves nothing. A
    weight that several layers share gets its bits in all of them and is then a copy in each.

    Args:
        model: as it is before quantization.
        bits: by layer, 2 to 8.
        quantizer: what the bits were chosen with; by default ``Quantizer()``.

    Raises:
        ConversionError: torchao cannot take a layer.
    """
    quantizer = quantizer or Quantizer()

    def refuse(layer: Layer, number: int) -> str | None:
        if isinstance(layer.module, nn.Conv2d):
            if layer.weight.shape[1] == 1:
                return "a depthwise convolution, where torchao would have a scale for each weight"
            if not quantizer.per_tap:
                return "a convolution, where torchao has a scale for each tap: allocate with Quantizer(per_tap=True)"
        elif not isinstance(layer.module, nn.Linear):
            return f"a {type(layer.module).__name__}, where torchao has Linear and Conv2d"
        if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its weight is of {layer.weight.dtype}"
        return not_in(WIDTHS, number)

    layers = check("torchao", model, bits, refuse)
    with needs("torchao"):
        from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType
    granularity = PerAxis(0) if quantizer.group_size is None else PerGroup(quantizer.group_size)
    mapping = MappingType.SYMMETRIC if quantizer.symmetric else MappingType.ASYMMETRIC
    return FqnToConfig(
        {
            module: IntxWeightOnlyConfig(getattr(torch, f"int{number}"), granularity, mapping)
            for layer, number in layers
            for module in layer.modules
        }
    )

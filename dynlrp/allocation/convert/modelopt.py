"""NVIDIA ModelOpt: simulated quantization of weights, to be exported for TensorRT and others."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import Any

from torch import nn

from dynlrp.allocation.convert.check import check, not_in, read_by_parent
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.quantizer import Quantizer

WIDTHS = range(2, 9)
"""With one bit ModelOpt divides by zero."""


def modelopt_config(model: nn.Module, bits: Mapping[str, int], quantizer: Quantizer | None = None) -> dict[str, Any]:
    """A configuration whose ``quant_cfg`` has an entry for each layer, for ``mtq.quantize(model, config)``.

    ModelOpt has ``2^bits - 1`` levels around zero, one less than the others: 3 for 2 bits. Its modules round in
    ``forward``, so layers of an ``nn.TransformerEncoderLayer`` are refused: it calls none of them where nothing
    requires grad.

    Args:
        model: as it is before quantization.
        bits: by layer, 2 to 8.
        quantizer: what the bits were chosen with; by default ``Quantizer()``.

    Raises:
        ConversionError: ModelOpt cannot take a layer.
    """
    quantizer = quantizer or Quantizer()
    by_parent = read_by_parent(model)

    def refuse(layer: Layer, number: int) -> str | None:
        for module in layer.modules.values():
            if module in by_parent:
                return f"{by_parent[module]!r} reads its weight and does not call it"
        if not isinstance(layer.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return f"a {type(layer.module).__name__}, where ModelOpt has Linear and Conv1d to Conv3d"
        if not quantizer.symmetric:
            return "zero points, where ModelOpt has none: allocate with Quantizer(symmetric=True)"
        if not isinstance(layer.module, nn.Linear):
            if quantizer.group_size is not None:
                return "a convolution, where ModelOpt groups taps, not inputs: allocate with Quantizer(group_size=None)"
            if quantizer.per_tap:
                return "a convolution, with a scale for each filter: allocate with Quantizer(per_tap=False)"
        return not_in(WIDTHS, number)

    layers = check("ModelOpt", model, bits, refuse)
    scales = {"axis": 0} if quantizer.group_size is None else {"block_sizes": {-1: quantizer.group_size}}
    entries = [
        {"quantizer_name": f"{glob.escape(module)}.weight_quantizer", "cfg": {"num_bits": number, **scales}}
        for layer, number in layers
        for module in layer.modules
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries], "algorithm": "max"}

"""llm-compressor: models of transformers, saved in the compressed-tensors format that vLLM reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import nn

from dynlrp.allocation.convert.check import by_width, check, not_in
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.quantizer import Quantizer

WIDTHS = range(2, 9)
"""All of them are saved and loaded again; vLLM has kernels for 4 and 8."""


def llmcompressor_recipe(
    model: nn.Module,
    bits: Mapping[str, int],
    quantizer: Quantizer | None = None,
    *,
    modifier: str = "QuantizationModifier",
) -> str:
    """A recipe with a group for each number of bits, for ``oneshot(model=model, recipe=recipe)`` or a file.

    The model must be one of transformers, loaded from a folder. llm-compressor rounds in ``forward`` and keeps the
    float weights until the model is saved with ``save_compressed=True``.

    Args:
        model: as it is before quantization.
        bits: by layer, 2 to 8.
        quantizer: what the bits were chosen with; by default ``Quantizer()``.
        modifier: ``GPTQModifier`` or another that takes ``config_groups``.

    Returns:
        YAML, all of which is JSON.

    Raises:
        ConversionError: a layer is no ``nn.Linear``.
    """
    quantizer = quantizer or Quantizer()

    def refuse(layer: Layer, number: int) -> str | None:
        if not isinstance(layer.module, nn.Linear):
            return f"a {type(layer.module).__name__}, where llm-compressor has Linear"
        return not_in(WIDTHS, number)

    layers = check("llm-compressor", model, bits, refuse)
    size = quantizer.group_size
    blocks = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    groups = {
        f"bits_{width}": {
            "targets": [module for layer in found for module in layer.modules],
            "weights": {"num_bits": width, "type": "int", "symmetric": quantizer.symmetric, **blocks},
        }
        for width, found in by_width(layers).items()
    }
    stage = {"quant_modifiers": {modifier: {"config_groups": groups, "ignore": []}}}
    return json.dumps({"quant_stage": stage}, indent=2)

"""Bits by layer as the configuration of a tool that quantizes.

Every function takes a model, ``{layer: bits}`` and the :class:`~dynlrp.allocation.quantizer.Quantizer` that the bits
were chosen with, and returns what the tool itself takes. What the tool cannot do is an error that lists all such
layers; no width is rounded to the next and no layer passed over.
"""

from dynlrp.allocation.convert.llmcompressor import llmcompressor_recipe
from dynlrp.allocation.convert.modelopt import modelopt_config
from dynlrp.allocation.convert.nncf import nncf_passes
from dynlrp.allocation.convert.onnxruntime import matmul_nbits_passes, quantize_static_options
from dynlrp.allocation.convert.torchao import torchao_config

__all__ = [
    "llmcompressor_recipe",
    "matmul_nbits_passes",
    "modelopt_config",
    "nncf_passes",
    "quantize_static_options",
    "torchao_config",
]

"""Models quantized by NVIDIA ModelOpt itself."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from dynlrp.allocation.convert import modelopt_config
from dynlrp.allocation.quantizer import Quantizer
from tests.converting import (
    agree,
    convolutions,
    images,
    is_rounded,
    network,
    others_are_the_same,
    run_example,
    with_weights,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tool = pytest.importorskip("modelopt.torch.quantization")

BITS = {
    "patches": 8, "mix": 5, "depthwise": 4, "blocks.0.up": 2, "blocks.0.down": 3, "blocks.1.up": 4, "blocks.1.down": 6,
    "hidden": 7,
}  # fmt: skip


@pytest.mark.parametrize("group", [None, 16])
def test_every_layer_has_its_bits(group: int | None) -> None:
    model = network()
    bits = {name: b for name, b in BITS.items() if not group or isinstance(model.get_submodule(name), nn.Linear)}
    made = tool.quantize(copy.deepcopy(model), modelopt_config(model, bits, Quantizer(group_size=group)))
    weights = {}
    for name, module in made.named_modules():
        if hasattr(module, "weight_quantizer"):
            assert module.weight_quantizer.is_enabled == (name in bits)
            assert not module.input_quantizer.is_enabled
            assert not module.output_quantizer.is_enabled
    for name, b in bits.items():
        module = made.get_submodule(name)
        assert module.weight_quantizer.num_bits == b
        weights[name] = module.weight_quantizer(module.weight)
        is_rounded(weights[name], model.get_submodule(name).weight, b, group, steps=0.75)  # half of 2^b - 2 at b = 2
    others_are_the_same(made, model, bits)
    agree(made(images()), with_weights(model, weights)(images()))
    with torch.no_grad():
        agree(made(images()), with_weights(model, weights)(images()))


def test_other_convolutions() -> None:
    model, x = convolutions()
    bits = {"one": 3, "three": 5}
    made = tool.quantize(copy.deepcopy(model), modelopt_config(model, bits))
    weights = {name: m.weight_quantizer(m.weight) for name in bits for m in [made.get_submodule(name)]}
    for name, b in bits.items():
        is_rounded(weights[name], model.get_submodule(name).weight, b)
    agree(made(x), with_weights(model, weights)(x))


def test_names_are_no_patterns() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "a0": nn.Linear(8, 8), "0": nn.Sequential(nn.Linear(8, 8))})
    made = tool.quantize(net, modelopt_config(net, {"a[0]": 3, "0.0": 2}))
    enabled = {
        name: m.weight_quantizer.is_enabled for name, m in made.named_modules() if hasattr(m, "weight_quantizer")
    }
    assert enabled == {"a[0]": True, "a0": False, "0.0": True}


def test_why_layers_of_a_fused_encoder_are_refused() -> None:
    """If this fails, ModelOpt has learned it."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "0.linear1.weight_quantizer", "cfg": {"num_bits": 2, "axis": 0}},
        ],
        "algorithm": "max",
    }
    made = tool.quantize(copy.deepcopy(model), config)
    x = torch.rand(2, 3, 16)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    assert not torch.equal(made(x), model(x))


def test_the_example_of_the_page() -> None:
    run_example("NVIDIA ModelOpt")

"""Models quantized by torchao itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dynlrp import allocate
from dynlrp.allocation import allocate_activations
from dynlrp.allocation.convert import torchao_config
from dynlrp.allocation.layers import find_layers
from dynlrp.allocation.quantizer import Quantizer
from tests.converting import agree, images, is_rounded, network, others_are_the_same, with_weights

torchao = pytest.importorskip("torchao.quantization")

BITS = {
    "patches": 8, "mix": 5, "blocks.0.up": 2, "blocks.0.down": 3, "blocks.1.up": 4, "blocks.1.down": 6, "hidden": 7,
}  # fmt: skip


def quantize(model: nn.Module, bits: dict[str, int], quantizer: Quantizer) -> nn.Module:
    made = copy.deepcopy(model)
    torchao.quantize_(made, torchao_config(model, bits, quantizer), filter_fn=None)
    return made


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(per_tap=True),
        Quantizer(per_tap=True, symmetric=False),
        Quantizer(per_tap=True, group_size=16),
        Quantizer(per_tap=True, group_size=8, symmetric=False),
    ],
    ids=str,
)
def test_every_layer_has_its_bits(quantizer: Quantizer) -> None:
    model = network()
    bits = {name: b for name, b in BITS.items() if quantizer.group_size is None or name != "patches"}  # 3 inputs
    made = quantize(model, bits, quantizer)
    layers = find_layers(model)
    weights = {}
    for name, b in bits.items():
        weight = made.get_submodule(name).weight
        assert weight.target_dtype == getattr(torch, f"int{b}")
        weights[name] = weight.dequantize()
        assert torch.equal(weights[name], quantizer.round(layers[name], b))  # what the bits were chosen by
        rows = [w.movedim(1, -1) if w.ndim == 4 else w for w in (weights[name], model.get_submodule(name).weight)]
        is_rounded(*rows, b, quantizer.group_size or rows[0].shape[-1])
        assert len(weight.qdata.unique()) > 2 ** (b - 1)
    others_are_the_same(made, model, bits)
    agree(made(images()), with_weights(model, weights)(images()))
    assert not torch.equal(made(images()), model(images()))


def test_apply() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.rand(8, 16)
    allocation = allocate(model, x, 8.0, score="weight_mse", pinned={"2": 3})
    made = allocation.apply()
    agree(made(x), allocation.apply(tool="float")(x))
    for name, b in allocation.bits.items():
        assert made.get_submodule(name).weight.target_dtype == getattr(torch, f"int{b}")
    assert type(model[0].weight) is nn.Parameter
    assert allocation.bits["2"] == 3


def test_half_precision() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8)).bfloat16()
    made = quantize(model, {"0": 3}, Quantizer())
    weight = made[0].weight.dequantize()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, Quantizer().round(find_layers(model)["0"], 3))
    assert torch.equal(made[2].weight, model[2].weight)


def test_tied_weights_are_rounded_in_both_layers_and_not_in_an_embedding() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(9, 9), "a": nn.Linear(9, 9), "b": nn.Linear(9, 9), "c": nn.Linear(9, 9)})
    model["a"].weight = model["b"].weight = model["e"].weight
    made = quantize(model, {"a": 4}, Quantizer())
    assert torch.equal(made["a"].weight.dequantize(), made["b"].weight.dequantize())
    is_rounded(made["a"].weight.dequantize(), model["a"].weight, 4)
    for name in ("e", "c"):
        assert torch.equal(made[name].weight, model[name].weight)


def test_fused_encoder_layers_run_with_their_bits() -> None:
    """Without grad they call none of their layers; for torchao's tensors they do."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval().requires_grad_(False)
    made = quantize(model, {"0.linear1": 2, "0.linear2": 2}, Quantizer())
    weights = {name: made.get_submodule(name).weight.dequantize() for name in ("0.linear1", "0.linear2")}
    x = torch.rand(2, 3, 16)
    with torch.no_grad():
        agree(made(x), with_weights(model, weights)(x))


def test_why_the_projection_of_attention_is_refused() -> None:
    """If this fails, torchao has learned it."""
    model = nn.MultiheadAttention(8, 2)
    config = torchao.FqnToConfig({"out_proj": torchao.IntxWeightOnlyConfig(torch.int8)})
    torchao.quantize_(model, config, filter_fn=None)
    with pytest.raises(NotImplementedError):
        model(*[torch.rand(3, 8)] * 3)


def test_why_one_bit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    torchao.quantize_(model, torchao.FqnToConfig({"0": torchao.IntxWeightOnlyConfig(torch.int1)}), filter_fn=None)
    assert not model[0].weight.dequantize().any()


def test_rounded_activations_of_a_quantized_model() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.rand(8, 16)
    allocation = allocate(model, x, 8.0)
    activations = allocate_activations(model, x, 5.0, weights=allocation)
    made, rounded = allocation.apply(), allocation.apply(tool="float")
    plain = made(x)
    with activations.simulated(made), activations.simulated(rounded):
        agree(made(x), rounded(x))
        assert not torch.equal(made(x), plain)

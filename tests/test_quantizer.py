"""Round to nearest: torchao's numbers, an oracle of loops, costs in bits, and weights that come back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import InputError
from dynlrp.allocation import Quantizer, find_layers, quantized

STORED = json.loads((Path(__file__).parent / "torchao_numbers.json").read_text())["cases"]
"""What ``quantize_`` with ``IntxWeightOnlyConfig`` made of :func:`weight`, dequantized, and its number of scales."""


def weight(shape: torch.Size) -> Tensor:
    i = torch.arange(shape.numel(), dtype=torch.float64)
    return ((i * 37 % 101 - 50) / 64 + (i % 7) / 8).float().reshape(shape)


def box(module: nn.Module) -> Any:
    module.weight.data = weight(module.weight.shape)
    return find_layers(nn.Sequential(module))["0"]


@pytest.mark.parametrize("case", STORED, ids=lambda c: "-".join(str(c[k]) for k in list(c)[:4]))
def test_torchao_numbers(case: dict[str, Any]) -> None:
    layer = box(nn.Linear(8, 3) if case["layer"] == "linear" else nn.Conv2d(4, 2, (1, 2)))
    quantizer = Quantizer(case["symmetric"], case["group_size"], per_tap=True)
    found = quantizer.round(layer, case["bits"])
    assert torch.equal(found.flatten(), torch.tensor(case["weight"]))
    zero = 0 if case["symmetric"] else case["bits"]
    assert quantizer.bits_of(layer, case["bits"]) == layer.weights * case["bits"] + case["scales"] * (32 + zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchao_itself(symmetric: bool, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    mapping = pytest.importorskip("torchao.quantization.quant_primitives").MappingType
    for module, group in itertools.product([nn.Linear(32, 7), nn.Conv2d(16, 5, 3)], [None, 8]):
        for bits in range(2, 9):
            model = nn.Sequential(module).to(dtype)
            layer = find_layers(model)["0"]
            expected = Quantizer(symmetric, group, per_tap=True).round(layer, bits)
            config = quantization.IntxWeightOnlyConfig(
                getattr(torch, f"int{bits}"),
                granularity=granularity.PerAxis(0) if group is None else granularity.PerGroup(group),
                mapping_type=mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC,
            )
            made = nn.Sequential(type(module)(*((32, 7) if isinstance(module, nn.Linear) else (16, 5, 3)))).to(dtype)
            made.load_state_dict(model.state_dict())
            quantization.quantize_(made, config, filter_fn=lambda m, name: name == "0")
            assert torch.equal(made[0].weight.dequantize(), expected)


def by_hand(block: list[float], bits: int, symmetric: bool) -> list[float]:
    """The formula, number by number."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = min(*block, 0.0), max(*block, 0.0)
    if symmetric:
        scale, zero = max(-least, most) / ((2**bits - 1) / 2), 0
    else:
        scale = (most - least) / (2**bits - 1)
        zero = low - round(least / scale)
    # The largest weight is a tie when symmetric: which way it goes is up to the last bit of 1 / scale.
    return [(min(max(round(w * (1 / scale)) + zero, low), high) - zero) * scale for w in block]


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize(
    "module", [nn.Linear(6, 4), nn.Conv1d(4, 3, 2), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(2, 3, 2)]
)
def test_whole_filters(module: nn.Module, group: int | None, symmetric: bool, bits: int) -> None:
    model = nn.Sequential(module).double()
    found = Quantizer(symmetric, group).round(find_layers(model)["0"], bits)
    rows = module.weight.detach().flatten(1).tolist()
    size = group or len(rows[0])
    expected = [
        [w for start in range(0, len(row), size) for w in by_hand(row[start : start + size], bits, symmetric)]
        for row in rows
    ]
    assert torch.allclose(found.flatten(1), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_conv1d_of_transformers_is_rounded_by_output() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(5, 8)  # weight (8, 5): inputs, outputs
    linear = nn.Linear(8, 5)
    linear.weight.data = module.weight.detach().T.clone()
    layers = [find_layers(nn.Sequential(m))["0"] for m in (module, linear)]
    for quantizer in (Quantizer(), Quantizer(False, 4)):
        assert torch.equal(quantizer.round(layers[0], 3).T, quantizer.round(layers[1], 3))
        assert quantizer.bits_of(layers[0], 3) == quantizer.bits_of(layers[1], 3)


def test_bits_are_counted() -> None:
    linear, conv = box(nn.Linear(8, 3)), box(nn.Conv2d(4, 2, 3, groups=2))
    assert Quantizer().bits_of(linear, 4) == 24 * 4 + 3 * 32
    assert Quantizer(scale_bits=16).bits_of(linear, 4) == 24 * 4 + 3 * 16
    assert Quantizer(False, 4, scale_bits=16).bits_of(linear, 4) == 24 * 4 + 6 * (16 + 4)
    assert Quantizer().bits_of(conv, 2) == 36 * 2 + 2 * 32
    assert Quantizer(per_tap=True).bits_of(conv, 2) == 36 * 2 + 2 * 9 * 32
    half = find_layers(nn.Sequential(nn.Linear(8, 3)).half())["0"]
    assert Quantizer().bits_of(half, 4) == 24 * 4 + 3 * 16


def test_noise_falls_with_bits() -> None:
    layer = box(nn.Linear(8, 3))
    errors = [Quantizer().round(layer, bits) - layer.weight.detach() for bits in range(2, 9)]
    noises = [float(error.square().sum()) for error in errors]
    assert noises == sorted(noises, reverse=True)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(InputError, match="2 to 8"):
        Quantizer().round(box(nn.Linear(8, 3)), bits)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="group_size=3 does not divide the 8 weights of '0'"):
        Quantizer(group_size=3).round(box(nn.Linear(8, 3)), 4)


def test_zeros_and_a_constant_stay_finite() -> None:
    module = nn.Linear(4, 2)
    module.weight.data = torch.tensor([[0.0] * 4, [0.5] * 4])
    layer = find_layers(nn.Sequential(module))["0"]
    for symmetric in (True, False):
        found = Quantizer(symmetric).round(layer, 8)
        assert torch.equal(found[0], torch.zeros(4))
        assert torch.allclose(found[1], torch.full((4,), 0.5), rtol=1 / 127)


def test_quantized_weights_stand_in_and_the_own_come_back() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones(5, 6)
    layers, x = find_layers(model), torch.randn(3, 6)
    parameters, values = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    rounded = Quantizer().round(layers["0"], 3)
    expected = nn.functional.linear(nn.functional.linear(x, rounded, model[0].bias).relu(), *model[2].parameters())

    class StopError(Exception):
        pass

    def used() -> None:
        with quantized(layers, {"0": 3}, Quantizer()):
            assert torch.equal(model(x), expected)
            assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in parameters]
            raise StopError

    with pytest.raises(StopError):
        used()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(5, 6))
    with pytest.raises(InputError, match="2 to 8"), quantized(layers, {"0": 3, "2": 1}, Quantizer()):
        pass
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_tied_weights_are_replaced_everywhere_but_in_the_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.one, self.two = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.one.weight = self.two.weight = self.embedding.weight

    model = Tied()
    layers = find_layers(model)
    with quantized(layers, {"one": 2}, Quantizer()):
        assert model.one.weight is model.two.weight
        assert model.one.weight is not model.embedding.weight
    assert model.one.weight is model.two.weight is model.embedding.weight

"""What all converters refuse, and how they say it; needs none of the tools."""

from __future__ import annotations

import pytest
from torch import nn

from dynlrp.allocation.convert import llmcompressor_recipe, modelopt_config, torchao_config
from dynlrp.allocation.quantizer import Quantizer
from dynlrp.errors import ConversionError, InputError
from tests.converting import network


def reasons(call: object, *args: object) -> dict[str, str]:
    with pytest.raises(ConversionError) as caught:
        call(*args)  # type: ignore[operator]
    for name, reason in caught.value.reasons.items():
        assert f"\n  {name}: {reason}" in str(caught.value)
    return caught.value.reasons


def test_all_that_a_tool_cannot_take_is_listed_at_once() -> None:
    found = reasons(
        torchao_config,
        network(),
        {"mix": 4, "depthwise": 4, "blocks.0.attention.out_proj": 4, "head": 9, "hidden": 1, "nowhere": 4, "norm": 4}
        | {"blocks.0.up": 2},
    )
    assert found == {
        "mix": "a convolution, where torchao has a scale for each tap: allocate with Quantizer(per_tap=True)",
        "depthwise": "a depthwise convolution, where torchao would have a scale for each weight",
        "blocks.0.attention.out_proj": "attention reads its weight and never calls it",
        "head": "9 bits, where the tool has 2, 3, 4, 5, 6, 7, 8: allocate with these candidates",
        "hidden": "1 bits, where the tool has 2, 3, 4, 5, 6, 7, 8: allocate with these candidates",
        "nowhere": "the model has no such linear map or convolution",
        "norm": "the model has no such linear map or convolution",
    }


def test_bits_of_no_layer() -> None:
    with pytest.raises(InputError, match="names no layer"):
        torchao_config(network(), {})


def test_a_model_that_is_a_layer() -> None:
    assert reasons(modelopt_config, nn.Linear(4, 4), {"": 4}) == {
        "": "the model itself is this layer: put it inside a module"
    }


def test_torchao_kinds_and_dtypes() -> None:
    net = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(4, 4).double())
    found = reasons(torchao_config, net, {"0": 4, "1": 4}, Quantizer(per_tap=True))
    assert found == {
        "0": "a Conv1d, where torchao has Linear and Conv2d",
        "1": "its weight is of torch.float64",
    }


def test_modules_that_share_a_weight_are_one_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    found = reasons(modelopt_config, net, {"1": 4, "0": 5})
    assert found == {"0": "5 bits, where '0', whose weight it shares, has 4"}
    for bits in ({"0": 4}, {"1": 4}, {"0": 4, "1": 4}):
        entries = modelopt_config(net, bits)["quant_cfg"]
        assert [entry["quantizer_name"] for entry in entries] == ["*", "0.weight_quantizer", "1.weight_quantizer"]


def test_llmcompressor_takes_linear_alone() -> None:
    found = reasons(llmcompressor_recipe, network(), {"mix": 4, "head": 4})
    assert found == {"mix": "a Conv2d, where llm-compressor has Linear"}


def test_modelopt_schemes_and_fused_layers() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Conv2d(1, 1, 1))
    found = reasons(modelopt_config, net, {"0.linear1": 4, "0.linear2": 4, "1": 4}, Quantizer(group_size=1))
    assert found == {
        "0.linear1": "'0' reads its weight and does not call it",
        "0.linear2": "'0' reads its weight and does not call it",
        "1": "a convolution, where ModelOpt groups taps, not inputs: allocate with Quantizer(group_size=None)",
    }
    assert "zero points" in reasons(modelopt_config, net, {"1": 4}, Quantizer(symmetric=False))["1"]
    assert "each filter" in reasons(modelopt_config, net, {"1": 4}, Quantizer(per_tap=True))["1"]


def test_names_are_no_patterns() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})
    (_, entry) = modelopt_config(net, {"a[0]": 3})["quant_cfg"]
    assert entry["quantizer_name"] == "a[[]0].weight_quantizer"


def test_missing_tool_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install dynlrp\[torchao\]"):
        torchao_config(nn.Sequential(nn.Linear(2, 2)), {"0": 4})

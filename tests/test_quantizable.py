"""Which layers of a model can be quantized, and what their names find."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dynlrp import InputError
from dynlrp.allocation import find_layers, left_out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.shared.weight
        self.attention = nn.MultiheadAttention(6, 2)
        self.normed = weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_every_weight_once() -> None:
    net = Net()
    layers = find_layers(net)
    assert list(layers) == ["conv", "shared", "head"]
    assert list(layers["shared"].modules) == ["shared", "tied"]
    assert layers["shared"].elsewhere == ()
    assert layers["head"].elsewhere == ("embedding.weight",)
    assert [layer.weights for layer in layers.values()] == [54, 36, 42]
    assert all(layer.output_axis == 0 for layer in layers.values())
    assert layers["head"].weight is net.embedding.weight


def test_what_is_left_out_has_a_reason() -> None:
    reasons = left_out(Net())
    assert set(reasons) == {"attention", "attention.out_proj", "embedding", "normed"}
    assert "looked up" in reasons["embedding"]
    assert "computed" in reasons["normed"]
    with pytest.raises(InputError, match=r"'attention\.out_proj': attention reads its weight"):
        find_layers(Net(), "attention.out_proj")


def test_kinds() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(
        nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.Conv2d(2, 3, 1), nn.Conv3d(2, 3, 1), Conv1D(3, 2),
        nn.ConvTranspose2d(2, 3, 1), nn.Bilinear(2, 2, 3), nn.LazyLinear(3), nn.LSTM(2, 3),
    )  # fmt: skip
    layers = find_layers(model)
    assert list(layers) == ["0", "1", "2", "3", "4"]
    assert [layer.output_axis for layer in layers.values()] == [0, 0, 0, 0, 1]
    reasons = left_out(model)
    assert list(reasons) == ["5", "6", "7", "8"]
    for name, word in zip(reasons, ("transposed", "bilinear", "not made yet", "recurrent"), strict=True):
        assert word in reasons[name]


def test_names_and_globs() -> None:
    net = Net()
    assert list(find_layers(net, ["head", "c*"])) == ["conv", "head"]
    assert list(find_layers(net, "tied")) == ["shared"]
    with pytest.raises(InputError, match="'nothing'; there are"):
        find_layers(net, ["head", "nothing"])
    alone = nn.Linear(2, 2)
    assert find_layers(alone)[""].module is alone


def test_quantized_kernels_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert not left_out(nn.Sequential(nn.ReLU()))
    assert "0" in left_out(model)

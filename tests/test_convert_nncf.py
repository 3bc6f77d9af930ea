"""Models compressed by NNCF itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dynlrp.allocation.convert import nncf_passes
from dynlrp.allocation.quantizer import Quantizer
from dynlrp.errors import ConversionError, InputError
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

tool = pytest.importorskip("nncf")

BITS = {"patches": 8, "depthwise": 8, "blocks.0.up": 4, "blocks.0.down": 8, "blocks.1.up": 4, "hidden": 8, "head": 4}


@pytest.mark.parametrize(
    "quantizer",
    [Quantizer(), Quantizer(symmetric=False), Quantizer(group_size=16), Quantizer(group_size=16, symmetric=False)],
    ids=str,
)
def test_every_layer_has_its_bits(quantizer: Quantizer) -> None:
    model = network()
    before = copy.deepcopy(model)
    made = copy.deepcopy(model)
    passes = nncf_passes(model, BITS, images(), quantizer)
    assert len(passes) == 2
    for options in passes:
        made = tool.compress_weights(made, **options)
    others_are_the_same(model, before, {})  # the model itself was only looked at
    assert model(images()).equal(before(images()))
    compressed = {
        name.removeprefix("__nncf_hooks.post_hooks.").removesuffix(":weight__0.0").replace(":", "."): module
        for name, module in made.named_modules()
        if "WeightsDecompressor" in type(module).__name__
    }
    assert compressed.keys() == BITS.keys()
    weights = {}
    for name, b in BITS.items():
        assert f"INT{b}" in type(compressed[name]).__name__
        was = model.get_submodule(name).weight
        weights[name] = compressed[name](made.get_submodule(name).weight).reshape(was.shape)
        is_rounded(weights[name], was, b, quantizer.group_size if b == 4 else None)
    others_are_the_same(made, model, BITS)
    agree(made(images()), with_weights(model, weights)(images()))


def test_other_convolutions() -> None:
    model, x = convolutions()
    (options,) = nncf_passes(model, {"one": 8, "three": 8}, x)
    made = tool.compress_weights(copy.deepcopy(model), **options)
    weights = {}
    for name, module in made.named_modules():
        if "WeightsDecompressor" in type(module).__name__:
            layer = name.removeprefix("__nncf_hooks.post_hooks.").removesuffix(":weight__0.0")
            weights[layer] = module(made.get_submodule(layer).weight)
            is_rounded(weights[layer], model.get_submodule(layer).weight, 8)
    assert weights.keys() == {"one", "three"}
    agree(made(x), with_weights(model, weights)(x))


def test_keyword_arguments_and_shared_modules() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(self.inner(x)))

    model, x = Twice().eval(), torch.rand(2, 8)
    (options,) = nncf_passes(model, {"inner": 8}, {"x": x})
    made = tool.compress_weights(copy.deepcopy(model), **options)
    assert made.inner.weight.dtype == torch.int8
    assert torch.equal(made.outer.weight, model.outer.weight)


def test_refusals() -> None:
    with pytest.raises(ConversionError) as caught:
        nncf_passes(network(), {"mix": 4, "head": 3}, images())
    assert caught.value.reasons == {
        "mix": "4 bits, where the tool has 8: allocate with these candidates",
        "head": "3 bits, where the tool has 4, 8: allocate with these candidates",
    }
    tied = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConversionError, match=r"its weight is also 0\.weight, which NNCF would change with it"):
        nncf_passes(tied, {"1": 8}, torch.tensor([[1, 2]]))

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(InputError, match=r"does not run \['idle'\]"):
        nncf_passes(Idle(), {"used": 8, "idle": 8}, torch.rand(2, 4))


class Inside(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)  # type: ignore[no-any-return]


def test_a_sequence_is_no_root() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.rand(2, 8)
    with pytest.raises(InputError, match=r"nn\.Sequential would run"):
        nncf_passes(model, {"0": 8}, x)
    assert len(nncf_passes(Inside(model), {"inside.0": 8}, x)) == 1


def test_why_other_widths_are_refused() -> None:
    """If these fail, NNCF has learned them."""
    model, x = Inside(nn.Linear(8, 8)), torch.rand(2, 8)
    options = {"group_size": -1, "all_layers": True, "backup_mode": tool.BackupMode.NONE}
    with pytest.raises(UnboundLocalError):
        tool.compress_weights(model, mode=tool.CompressWeightsMode.INT3_SYM, dataset=tool.Dataset([x]), **options)
    conv, x = Inside(nn.Conv2d(4, 4, 3)), torch.rand(1, 4, 5, 5)
    made = tool.compress_weights(
        copy.deepcopy(conv), mode=tool.CompressWeightsMode.INT4_SYM, dataset=tool.Dataset([x]), **options
    )
    assert torch.equal(made.inside.weight, conv.inside.weight)  # without a word


def test_the_example_of_the_page() -> None:
    run_example("NNCF")

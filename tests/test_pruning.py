"""Relevance of filters, neurons and heads, rankings and masks, where the right answer is known."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel

from dynlrp import explain
from dynlrp.errors import InputError
from dynlrp.pruning import (
    parameter_masks,
    prune_units,
    pruned,
    save_tensors,
    unit_relevance,
    weight_relevance,
)
from tests.conftest import bias_free, close
from tests.converting import Block
from tests.oracle import draw
from tests.peers import models as peers


class Filters(nn.Module):
    """Six filters: 1 and 4 are dead (the ReLU stops one, nothing reads the other), 2 and 5 are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 3, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def filters() -> Filters:
    model = peers.randomise(Filters(), 4).double().eval()
    with torch.no_grad():
        model.norm.bias[1] = -1e3
        model.second.weight[:, 4] = 0
        for part in (model.first.weight, model.norm.weight, model.norm.bias, model.norm.running_mean):
            part[5] = part[2]
        model.norm.running_var[5] = model.norm.running_var[2]
        model.second.weight[:, 5] = model.second.weight[:, 2]
    return model  # type: ignore[return-value]


PICTURES = draw(1, 6, 2, 8, 8)


class Attention(nn.Module):
    """A block whose second head puts out nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean(1)


def attention() -> Attention:
    model = peers.randomise(Attention(), 5).double().eval()
    with torch.no_grad():
        model.block.attention.in_proj_weight[36:40] = 0  # values of head 1: 16 queries, 16 keys, then 4 to 8
        model.block.attention.in_proj_bias[36:40] = 0
    return model  # type: ignore[return-value]


def gpt() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    model = peers.randomise(GPT2LMHeadModel(config), 6).double().eval()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[8:12] = 0  # nothing reads head 2
    return model  # type: ignore[return-value]


IDS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])}


@pytest.mark.parametrize("signed", [True, False])
def test_relevance_is_activation_times_gradient_in_a_piecewise_linear_net(signed: bool) -> None:
    """There epsilon -> 0 is gradient times input at every layer, so plain autograd is the oracle."""
    model, x = bias_free(5, 7, 6, 3), draw(2, 10, 5)
    hidden = model[0](x)
    later = model[2](torch.relu(hidden))
    hidden.retain_grad()
    later.retain_grad()
    model[4](torch.relu(later)).max(1).values.sum().backward()
    found = unit_relevance(model, x, ["0", "2"], signed=signed, batch_size=4)
    assert found.samples == 10
    for name, a in (("0", hidden), ("2", later)):
        assert a.grad is not None
        share = (a * a.grad).detach()
        share = share / share.abs().sum(1, keepdim=True)
        share = share if signed else share.abs()
        close(found.relevance[name], share.mean(0), 1e-9)
        close(found.error[name], share.std(0) / 10**0.5, 1e-7)


def test_dead_filters_come_first_and_take_nothing_with_them() -> None:
    model = filters()
    found = unit_relevance(model, PICTURES, "norm")
    first = found.ranked()[:2]
    assert {unit.unit for unit in first} == {1, 4}
    assert all(unit == ("norm", unit.unit, 0.0, 0.0) for unit in first)
    masks = found.masks(2 / 6)
    assert masks["norm"].tolist() == [True, False, True, True, False, True]
    before = model(PICTURES)
    with pruned(model, masks):
        assert torch.equal(model(PICTURES), before)
    with pruned(model, found.masks(3 / 6)):
        assert not torch.allclose(model(PICTURES), before)


def test_filters_that_are_the_same_are_as_relevant() -> None:
    found = unit_relevance(filters(), PICTURES, ["norm", "first"])
    for relevance in found.relevance.values():
        close(relevance[2], relevance[5], 1e-12)
        close(relevance.sum(), torch.tensor(1.0, dtype=torch.float64), 1e-12)


def test_pruned_channels_are_zero() -> None:
    """Behind a batch norm, and not behind the convolution before it."""
    model = filters()
    mask = torch.tensor([True, True, False, True, True, False])
    seen = {}
    model.norm.register_forward_hook(lambda module, args, output: seen.update(norm=output))
    model.second.register_forward_hook(lambda module, args, output: seen.update(second=output))
    with pruned(model, {"norm": mask, "second": torch.tensor([False, True, True])}):
        model(PICTURES)
    assert not seen["norm"][:, ~mask].any()
    assert bool(seen["norm"][:, mask].any())
    assert not seen["second"][:, 0].any()
    with pruned(model, {"first": mask}):
        model(PICTURES)
    assert bool(seen["norm"][:, ~mask].any())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_itself_again(fails: bool) -> None:
    model = filters()
    model.head.requires_grad_(False)
    before = dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    masks = {"norm": torch.zeros(6, dtype=torch.bool), "head": torch.zeros(4, dtype=torch.bool)}
    try:
        with pruned(model, masks):
            assert not model.head.weight.requires_grad
            assert model.norm.weight.requires_grad
            assert not model(PICTURES).any()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(before[name] is value for name, value in model.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_all_units_kept() -> None:
    model = filters()
    before = model(PICTURES)
    masks = unit_relevance(model, PICTURES, "*").masks(0.0)
    assert [len(mask) for mask in masks.values()] == [6, 6, 3, 4]
    with pruned(model, masks):
        assert torch.equal(model(PICTURES), before)


@pytest.mark.parametrize("fused", [True, False])
def test_heads_of_multihead_attention(fused: bool) -> None:
    model, x = attention(), draw(3, 4, 5, 16)
    found = unit_relevance(model, x, heads={"*.attention": 4})
    assert list(found.relevance) == ["block.attention:heads"]
    first = found.ranked()[0]
    assert (first.unit, first.relevance) == (1, 0.0)
    before = model(x).detach()
    with pruned(model, found.masks(1 / 4)), torch.set_grad_enabled(not fused):
        close(model(x).detach(), before, 1e-14)
    masks = {"block.attention:heads": torch.tensor([True, True, False, True])}
    with torch.no_grad():
        by_hand = copy.deepcopy(model)
        by_hand.block.attention.out_proj.weight[:, 8:12] = 0
        with pruned(model, masks):
            assert torch.equal(model(x), by_hand(x))
        assert not torch.allclose(by_hand(x), before)
        prune_units(model, masks)
        assert torch.equal(model(x), by_hand(x))


def test_heads_by_the_layer_that_joins_them() -> None:
    """The same relevance as that of the heads themselves; the weight of GPT-2 is (inputs, outputs)."""
    model = gpt()
    found = unit_relevance(model, IDS, heads={"transformer.h.*.attn.c_proj": 4}, target=(-1, 7))
    names = [f"transformer.h.{n}.attn.c_proj:input" for n in range(2)]
    assert list(found.relevance) == names
    heads = [f"transformer.h.{n}.attn:heads" for n in range(2)]
    explanation = explain(model, IDS, (-1, 7), layers=heads)
    for name, other in zip(names, heads, strict=True):
        share = explanation.by_channel(other)
        close(found.relevance[name], (share / share.abs().sum(1, keepdim=True)).abs().mean(0), 1e-10)
    first = found.ranked()[0]
    assert (first.tensor, first.unit, first.relevance) == (names[1], 2, 0.0)
    before = model(**IDS).logits
    with pruned(model, found.masks(1 / 8)):
        assert torch.equal(model(**IDS).logits, before)
    ((name, mask),) = parameter_masks(model, {names[0]: torch.tensor([True, False, True, True])}).items()
    assert name == "transformer.h.0.attn.c_proj.weight"
    assert mask.sum(1).tolist() == [16] * 4 + [0] * 4 + [16] * 8


def test_neurons_of_transposed_layers() -> None:
    mask = torch.ones(64, dtype=torch.bool)
    mask[3] = False
    found = parameter_masks(gpt(), {"transformer.h.0.mlp.c_fc": mask})
    assert found["transformer.h.0.mlp.c_fc.weight"].sum(0).tolist() == [16] * 3 + [0] + [16] * 60
    assert found["transformer.h.0.mlp.c_fc.bias"].tolist() == mask.tolist()


def test_masks_take_the_least_relevant_of_the_model_or_of_each_layer() -> None:
    found = unit_relevance(filters(), PICTURES, ["norm", "second", "head"])
    ranked = found.ranked()
    assert [unit.relevance for unit in ranked] == sorted(unit.relevance for unit in ranked)
    gone = {(name, i) for name, mask in found.masks(0.4).items() for i in (~mask).nonzero().flatten().tolist()}
    assert gone == {(unit.tensor, unit.unit) for unit in ranked[:5]}  # of 13
    each = found.masks(1 / 3, each_layer=True)
    assert [int((~mask).sum()) for mask in each.values()] == [2, 1, 1]
    assert all(found.relevance[name][mask].min() >= found.relevance[name][~mask].max() for name, mask in each.items())
    for name, mask in found.masks(1.0, keep=2).items():
        assert mask.nonzero().flatten().tolist() == sorted(found.relevance[name].argsort()[-2:].tolist())
    assert not any(mask.any() for mask in found.masks(1.0, keep=0).values())


def test_masks_of_torch() -> None:
    model = filters()
    masks = unit_relevance(model, PICTURES, ["norm", "second"]).masks(0.5)
    with pruned(model, masks):
        wanted = model(PICTURES)
    prune_units(model, masks)
    assert torch.equal(model(PICTURES), wanted)
    assert torch.equal(model.second.weight_mask.any((1, 2, 3)), masks["second"].to(model.second.weight_mask.dtype) > 0)
    for module in (model.norm, model.second):
        prune.remove(module, "weight")
        prune.remove(module, "bias")
    assert torch.equal(model(PICTURES), wanted)
    assert not model.second.weight[~masks["second"]].any()


def test_batches_give_what_all_samples_give_at_once() -> None:
    model = filters()
    whole = unit_relevance(model, PICTURES, "norm", batch_size=6)
    parts = unit_relevance(model, [(batch, torch.zeros(len(batch))) for batch in PICTURES.split(4)], "norm")
    close(parts.relevance["norm"], whole.relevance["norm"], 1e-12)
    close(parts.error["norm"], whole.error["norm"], 1e-9)
    assert unit_relevance(model, PICTURES, "norm", samples=2).samples == 2


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = filters()
    values, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode():
        unit_relevance(model, PICTURES, "norm")
        weight_relevance(model, PICTURES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_takes_no_part() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.idle(x).detach()

    found = unit_relevance(Idle().double(), draw(1, 3, 4), "*")
    assert found.relevance["idle"].tolist() == [0] * 4
    assert float(found.relevance["used"].sum()) == pytest.approx(1)


def test_relevance_of_weights_is_weight_times_gradient_in_a_piecewise_linear_net() -> None:
    model, x = bias_free(5, 7, 3), draw(2, 10, 5)
    model(x).max(1).values.sum().backward()
    wanted = {name: (p * p.grad).detach() / 10 for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = weight_relevance(model, x, batch_size=3)
    assert found.keys() == wanted.keys() == {"0.weight", "2.weight"}
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        close(value, wanted[name].float(), 1e-6)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_tensors_in_files(tmp_path: Path, ending: str) -> None:
    if ending == "safetensors":
        loading = pytest.importorskip("safetensors.numpy")
    wanted = weight_relevance(filters(), PICTURES, ["second.*", "head.weight"])
    path = save_tensors(tmp_path / f"relevance.{ending}", wanted)
    found = dict(np.load(path)) if ending == "npz" else loading.load_file(path)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], value.numpy()) for name, value in wanted.items())


def test_errors(tmp_path: Path) -> None:
    model, x = attention(), draw(3, 4, 5, 16)
    for call, message in (
        (lambda: unit_relevance(model, x), "name layers or heads"),
        (lambda: unit_relevance(model, x, "nothing*"), "no layer with such units is called"),
        (lambda: unit_relevance(model, x, "block.norm"), "no layer with such units is called"),
        (lambda: unit_relevance(model, x, heads={"block.up": 5}), "16 inputs of 'block.up' are not those of 5 heads"),
        (lambda: unit_relevance(model, x, heads={"block.attention": 2}), "has 4 heads, not 2"),
        (lambda: unit_relevance(model, x, heads={"block.up": 2, "block.u*": 4}), "names a layer twice"),
        (lambda: unit_relevance(model, [], "block.up"), "holds no batch"),
        (lambda: unit_relevance(model, x, "block.up").masks(1.5), "between 0 and 1"),
        (lambda: parameter_masks(model, {"block.up": torch.ones(4)}), "not 32 booleans"),
        (lambda: parameter_masks(model, {"block.up": torch.ones(4, dtype=torch.bool)}), "not 32 booleans"),
        (lambda: parameter_masks(model, {"block.up:heads": torch.ones(4, dtype=torch.bool)}), "'block.up:input' has"),
        (lambda: save_tensors(tmp_path / "x.csv", {}), r"must end in \.npz or \.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            call()

"""Models compressed by llm-compressor itself, saved, and loaded again by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynlrp.allocation.convert import llmcompressor_recipe
from dynlrp.allocation.quantizer import Quantizer
from tests.converting import agree, is_rounded, others_are_the_same, run_example, with_weights
from tests.peers import models as peers

tool = pytest.importorskip("llmcompressor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama, since that is what llm-compressor starts with."""
    path: Path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    peers.randomise(LlamaForCausalLM(config), 3).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "quantizer",
    [Quantizer(), Quantizer(symmetric=False), Quantizer(group_size=16), Quantizer(group_size=16, symmetric=False)],
    ids=str,
)
def test_every_layer_has_its_bits(folder: Path, tmp_path: Path, quantizer: Quantizer) -> None:
    model, made = (LlamaForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    bits = {name: 2 + place % 7 for place, name in enumerate(layers[:-3])}
    tool.oneshot(model=made, recipe=llmcompressor_recipe(model, bits, quantizer))
    for name in layers:
        scheme = getattr(made.get_submodule(name), "quantization_scheme", None)
        assert (scheme.weights.num_bits if scheme else None) == bits.get(name)
        assert scheme is None or (scheme.input_activations, scheme.output_activations) == (None, None)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    output = made(ids).logits
    made.save_pretrained(tmp_path, save_compressed=True)
    back = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    agree(back(ids).logits, output, 1e-6)
    weights = {name: back.get_submodule(name).weight for name in bits}
    for name, b in bits.items():
        is_rounded(weights[name], model.get_submodule(name).weight, b, quantizer.group_size)
    others_are_the_same(back, model, bits)
    agree(output, with_weights(model, weights)(ids).logits)


def test_another_modifier(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    recipe = llmcompressor_recipe(model, {"lm_head": 4}, modifier="GPTQModifier")
    (modifier,) = tool.recipe.Recipe.create_instance(recipe).modifiers
    assert type(modifier).__name__ == "GPTQModifier"
    (group,) = modifier.config_groups.values()
    assert group.targets == ["lm_head"]
    assert group.weights.num_bits == 4


def test_the_example_of_the_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-llama").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    run_example("llm-compressor")

"""Whole architectures: batches, frozen parameters, plain gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import COMPOSITES, explain
from tests.conftest import SAMPLES, close, gradient_x_input, same, sample

FAST = [name for name in SAMPLES if name != "efficientnet"]


def one(inputs: Any, number: int) -> Any:
    """Sample ``number`` of a batch."""
    if isinstance(inputs, dict):
        return {name: value[number : number + 1] for name, value in inputs.items()}
    return inputs[number : number + 1]


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", FAST)
def test_a_batch_equals_its_samples(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    batch = explain(model, inputs, target, composite=composite)
    for number in range(2):
        single = explain(model, one(inputs, number), target, composite=composite)
        close(single.value, batch.value[number : number + 1])
        for ours, whole in zip(single.tensors(), batch.tensors(), strict=True):
            close(ours, whole[number : number + 1], 1e-10)


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus"])
def test_a_batch_equals_its_samples_in_a_large_net(composite: str) -> None:
    test_a_batch_equals_its_samples("efficientnet", composite)


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", FAST)
def test_frozen_parameters_change_nothing(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    trainable = explain(model, inputs, target, composite=composite)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    same(explain(model, inputs, target, composite=composite), trainable)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    same(explain(model, inputs, target, composite=composite), trainable)
    model.requires_grad_(False)
    same(explain(model, inputs, target, composite=composite), trainable)


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus"])
def test_frozen_parameters_change_nothing_in_a_large_net(composite: str) -> None:
    test_frozen_parameters_change_nothing("efficientnet", composite)


@pytest.mark.parametrize("name", FAST)
def test_every_output_can_be_explained_without_its_parameters_being_named(name: str) -> None:
    """Ids are explained at the embedding, pictures at the pixels, masks not at all."""
    model, inputs, target = sample(name)
    relevance = explain(model, inputs, target).relevance
    if isinstance(inputs, dict):
        assert relevance["input_ids"].shape == (2, 7)
        assert relevance["attention_mask"] is None
    else:
        assert relevance.shape == inputs.shape


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["vgg", "conv_bn", "resnet", "vit"])
def test_gradient_x_input_is_the_gradient_times_the_input(name: str, frozen: bool) -> None:
    model, inputs, _ = sample(name)

    def score(x: Tensor) -> Tensor:
        output = model(x)
        return (output if isinstance(output, Tensor) else output.logits)[:, 2]

    (expected,) = gradient_x_input(score, inputs)
    model.requires_grad_(not frozen)
    close(explain(model, inputs, 2, composite="gradient_x_input").relevance, expected, 1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_gradient_x_input_of_tokens_is_that_of_their_embeddings(name: str) -> None:
    model, inputs, _ = sample(name)
    embed = model.get_input_embeddings()
    mask = inputs["attention_mask"]

    def score(embedded: Tensor) -> Tensor:
        logits = model(inputs_embeds=embedded, attention_mask=mask).logits
        return logits[:, 2] if logits.ndim == 2 else logits[:, -1, 2]

    (expected,) = gradient_x_input(score, embed(inputs["input_ids"]))
    target = 2 if name == "bert" else (-1, 2)
    found = explain(model, inputs, target, composite="gradient_x_input").relevance["input_ids"]
    close(found, expected.sum(-1), 1e-10)


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "cplrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_ids_equal_embeddings_given_as_input(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embedded = model.get_input_embeddings()(ids)
    manual = explain(model, {"inputs_embeds": embedded, "attention_mask": mask}, target, composite=composite)
    close(
        explain(model, inputs, target, composite=composite).relevance["input_ids"],
        manual.relevance["inputs_embeds"].sum(-1),
        1e-10,
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
def test_fused_attention_equals_attention_written_out(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    fused = explain(model, inputs, target, composite=composite)
    model.set_attn_implementation("eager")
    try:
        written = explain(model, inputs, target, composite=composite)
    finally:
        model.set_attn_implementation("sdpa")
    # Llama and GPT-2 cast the written out softmax to float32.
    close(written.relevance["input_ids"], fused.relevance["input_ids"], 1e-10 if name == "bert" else 1e-6)
    assert fused.ledger.closes
    assert written.ledger.error < (1e-10 if name == "bert" else 1e-6), written.ledger


@pytest.mark.parametrize("build", ["encoder", "rms"], ids=str)
@pytest.mark.parametrize("composite", ["attnlrp", "auto", "cplrp", "epsilon_plus"])
def test_modules_of_torch_itself(build: str, composite: str) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if build == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(80, 3).double())
    else:
        model = nn.Sequential(nn.Linear(16, 8), nn.RMSNorm(8), nn.SiLU(), nn.Flatten(), nn.Linear(40, 3)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    trainable = explain(model.eval(), x, 1, composite=composite)
    assert trainable.ledger.closes, trainable.ledger
    same(explain(model.requires_grad_(False), x, 1, composite=composite), trainable)


class MadeOfWeights(nn.Module):
    """Weights that are functions of weights: a scale, gated queries that attend to each other, a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.mix = nn.Linear(4, 4)
        self.read = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
        self.period = nn.Parameter(torch.rand(4) + 0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q = nn.functional.glu(self.queries)
        q = q + nn.functional.scaled_dot_product_attention(self.mix(q), q, q)
        seen = self.read(x) * self.period.reciprocal()
        seen = seen * torch.pow(seen.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
        out = nn.functional.scaled_dot_product_attention(q.expand(len(x), -1, -1), seen, seen) + q
        return out.mean(1) * self.scale.exp()


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "dynamiclrp"])
def test_weights_made_of_weights(composite: str) -> None:
    """Asking for the relevance of what they are made of changes nothing else, and no account."""
    model, x = MadeOfWeights().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    plain = explain(model, x, 1, composite=composite)
    asked = explain(model, x, 1, composite=composite, parameters="*")
    same(asked, plain)
    assert asked.ledger.closes, asked.ledger
    assert asked.parameters["period"] is None  # it divides
    assert all(r is not None for name, r in asked.parameters.items() if name != "period")


def test_gradient_x_input_of_weights_made_of_weights() -> None:
    model, x = MadeOfWeights().eval(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    explanation = explain(model, x.detach(), 1, composite="gradient_x_input", parameters="*")
    model(x)[:, 1].sum().backward()
    close(explanation.relevance, x.detach() * x.grad, 1e-10)
    for name, parameter in model.named_parameters():
        close(explanation.parameters[name], parameter.detach() * parameter.grad, 1e-10)

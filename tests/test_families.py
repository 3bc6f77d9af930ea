"""Small models of very different architectures: all of their operations are explained, and every ledger closes."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dynlrp import Composite, When, explain
from dynlrp.zoo.families import build, copied
from dynlrp.zoo.target import weighted_sum
from tests.test_roles import Spy

FAMILIES = {
    "autoformer": "decomposition and autocorrelation by FFT",
    "bloom": "a custom gelu",
    "deberta-v2": "disentangled attention by gather",
    "deformable_detr": "attention by grid sampling",
    "fnet": "mixing by FFT",
    "longformer": "sliding windows by as_strided, ids that the model pads",
    "mamba": "a scan step by step",
    "mamba2": "a scan by matrix products, with exponentials of -inf",
    "mixtral": "a mixture of experts",
    "nemotron_asr_streaming_encoder": "scaling in place, scores masked in place",
    "nystromformer": "an iterated inverse",
    "qwen3_next": "the gated delta rule, row by row in place",
    "recurrent_gemma": "a gated recurrence with a custom square root",
    "reformer": "reversible layers in one custom function, hashing",
    "rwkv": "a recurrence written into an output in place",
    "sew-d": "a custom softmax, weight norm",
    "swin": "shifted windows",
    "t5": "relative position bias, cross attention",
    "vilt": "image and text, patches drawn at random",
    "xlnet": "two streams with a relative shift, ids that the model transposes",
    "xlstm": "matrix memory in chunks, written in place",
    "yoso": "attention by collisions of hashes in a custom function",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not have it")
    family, inputs, random, *_ = build(name)
    torch.manual_seed(0)
    value = weighted_sum(family(**copied(inputs))).detach()
    torch.manual_seed(0)
    explanation = explain(family, inputs, weighted_sum, composite="attnlrp", allow_training=random)
    assert torch.equal(explanation.value, value)
    assert explanation.finite()
    assert explanation.ledger.closes, explanation.ledger
    assert not explanation.ledger.unresolved
    assert not explanation.ledger.fallbacks
    assert all(parameter.grad is None for parameter in family.parameters())
    assert any(relevance.any() for relevance in explanation.tensors())


@pytest.mark.parametrize(
    ("name", "role", "path", "count"),
    [
        ("mamba", "transition", "*.layers.0.mixer", 11),  # every step but the first
        ("mamba2", "transition", "*.layers.0.mixer", 4),  # in and between chunks
        ("mixtral", "gate", "*.layers.0.mlp.experts", 2),  # the router, normalised, and the gate of the experts
        ("qwen3_moe", "gate", "*.layers.0.mlp.experts", 2),  # as it is
        ("deepseek_v3", "gate", "*.layers.1.mlp.experts", 2),  # by sigmoids, normalised
        ("gpt_oss", "gate", "*.layers.0.mlp.experts", 1),  # scattered; the experts gate themselves
    ],
)
def test_roles_as_transformers_writes_them(name: str, role: str, path: str, count: int) -> None:
    """Decays of state-space models and routers are known as such in every release that writes them like this."""
    if name not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not have it")
    family, inputs, *_ = build(name)
    spy = Spy()
    explain(family, inputs, weighted_sum, composite=Composite.of("spy", {When(role=role, path=path): spy}))
    runs, rest = divmod(len(spy.seen), count)
    assert runs in (1, 2)  # once more where an activation was not kept
    assert not rest

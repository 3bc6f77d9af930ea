"""Small models that the behaviour tests share, in float64 with drawn weights, and how numbers are compared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dynlrp import Explanation, rules
from tests.peers import models as peers

torch.set_num_threads(1)  # pytest-xdist runs one process per core


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


class Sample(NamedTuple):
    """A model with inputs for a batch and a target that fits."""

    model: nn.Module
    inputs: Any
    target: Any


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Opaque(torch.autograd.Function):
    """Doubles, keeps nothing, and nobody knows how to repeat it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class RMSNorm(nn.Module):
    """Llama's norm without its cast to float32, so that float64 stays float64."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class SentenceModel(nn.Module):
    """A sentence transformer: BERT, the mean over tokens, unit length, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32, attn_implementation="sdpa",
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return self.head(nn.functional.normalize(mean, p=2, dim=1))


def vit() -> nn.Module:
    """A vision transformer of 2 layers on 16 by 16 pictures."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=4, num_labels=5, attn_implementation="sdpa",
    )  # fmt: skip
    return peers.randomise(ViTForImageClassification(config), 7, std=0.25)


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its 1,000 classes."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    return peers.randomise(package.EfficientNet.from_name("efficientnet-lite0"), 8)


def llama() -> nn.Module:
    model = peers.llama()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, RMSNorm(child.weight, child.variance_epsilon))
    return model


def _picture(build: Callable[[], nn.Module], *shape: int) -> Callable[[], Sample]:
    return lambda: Sample(build().double(), peers.inputs((2, 3, *shape), 3), None)


def _text(build: Callable[[], nn.Module], target: Any = None, masked: bool = True) -> Callable[[], Sample]:
    def make() -> Sample:
        inputs = {"input_ids": peers.token_ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
        if masked:
            inputs["attention_mask"][1, 5:] = 0
        return Sample(build().double(), inputs, target)

    return make


SAMPLES: dict[str, Callable[[], Sample]] = {
    "vgg": _picture(lambda: peers.build("vgg", peers.NETWORKS), 16, 16),
    "conv_bn": _picture(lambda: peers.build("conv_bn", peers.NETWORKS), 12, 12),
    "resnet": _picture(lambda: peers.build("resnet", peers.NETWORKS), 10, 10),
    "efficientnet": _picture(efficientnet, 64, 64),
    "vit": _picture(vit, 16, 16),
    "bert": _text(peers.bert),
    "minilm": _text(SentenceModel),
    "gpt2": _text(peers.gpt2, (-1, 3), masked=False),
    "llama": _text(llama, (-1, 3), masked=False),
}
"""Every architecture the project promises to explain, small."""

_made: dict[str, Sample] = {}


def sample(name: str) -> Sample:
    """The sample of this name, made once; trainable and in eval mode."""
    if name not in _made:
        _made[name] = SAMPLES[name]()
        if name == "minilm":
            peers.randomise(_made[name].model, 9, std=0.25)
    model = _made[name].model
    model.eval().requires_grad_(True)
    return _made[name]


def close(ours: Tensor | None, expected: Tensor | None, tolerance: float = 1e-11) -> None:
    """Largest difference relative to the largest value."""
    assert ours is not None
    assert expected is not None
    assert ours.shape == expected.shape
    assert bool(torch.isfinite(ours).all())
    scale = max(float(expected.abs().max()), 1e-300)
    assert float((ours - expected).abs().max()) / scale <= tolerance


def same(a: Explanation, b: Explanation, tolerance: float = 1e-11) -> None:
    """Both explanations give the same relevance, value and accounts."""
    for one, other in zip(a.tensors(), b.tensors(), strict=True):
        close(one, other, tolerance)
    close(a.value, b.value, tolerance)
    scale = max(abs(amount) for amount in [b.ledger.output, *b.ledger.accounts.values()])
    for account, amount in b.ledger.accounts.items():
        assert abs(a.ledger.accounts[account] - amount) <= tolerance * scale, account


def bias_free(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers without bias and ReLU between them: here relevance is gradient times input."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return peers.randomise(model, seed).double()  # type: ignore[return-value]


def gradient_x_input(score: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Plain autograd: gradient of the summed score, times the input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(score(*leaves).sum(), leaves)
    return [g * x.detach() for g, x in zip(grads, leaves, strict=True)]


@pytest.fixture
def registry() -> Iterator[dict[str, rules.Operation]]:
    """The registry of operations, put back afterwards."""
    before = dict(rules.REGISTRY)
    yield rules.REGISTRY
    rules.REGISTRY.clear()
    rules.REGISTRY.update(before)


def calls(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls, in Python and in C: the same number each time, on any machine."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count

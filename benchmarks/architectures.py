"""The models of the benchmarks: random weights, true sizes, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from dynlrp.zoo.nets import resnet50, vgg16


class Case(NamedTuple):
    """A model with inputs. Of several inputs the first that has floating point numbers is explained."""

    model: nn.Module
    inputs: dict[str, Tensor] | Tensor
    output: str | None = None

    def run(self) -> Tensor:
        """The model's output tensor."""
        result = self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(self.inputs)
        if isinstance(result, Tensor):
            return result
        found: Tensor = result[self.output or "logits"]
        return found

    @property
    def name(self) -> str | None:
        """The name of the explained input, None where there is only one and it has none."""
        if isinstance(self.inputs, Tensor):
            return None
        return next(name for name, value in self.inputs.items() if value.is_floating_point())

    @property
    def x(self) -> Tensor:
        """The explained input."""
        return self.inputs if isinstance(self.inputs, Tensor) else self.inputs[str(self.name)]

    def at(self, x: Tensor) -> Case:
        """The same with another explained input."""
        return self._replace(inputs=x if isinstance(self.inputs, Tensor) else {**self.inputs, str(self.name): x})

    def scores(self, target: Tensor | None = None) -> Tensor:
        """One output of each sample: ``target`` is its place among all of the sample's, by default the largest's."""
        outputs = self.run().flatten(1)
        return outputs.max(1)[0] if target is None else outputs.gather(1, target[:, None])[:, 0]

    def to(self, dtype: torch.dtype) -> Case:
        """The same in another precision; the model is converted in place."""
        return self._replace(model=self.model.to(dtype)).at(self.x.to(dtype))


def _image(batch: int, size: int = 224) -> Tensor:
    return torch.randn(batch, 3, size, size)


def _embedded(batch: int, length: int, width: int) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(batch, length, width)}


def _vit(batch: int, length: int) -> Case:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    return Case(model, {"pixel_values": _image(batch)})


def _bert(batch: int, length: int) -> Case:
    config = transformers.BertConfig(max_position_embeddings=2048)
    return Case(transformers.BertForSequenceClassification(config), _embedded(batch, length, 768))


def _gpt2(batch: int, length: int) -> Case:
    config = transformers.GPT2Config(n_positions=2048, use_cache=False, num_labels=2, pad_token_id=0)
    return Case(transformers.GPT2ForSequenceClassification(config), _embedded(batch, length, 768))


def llama(batch: int, length: int, layers: int = 12, width: int = 768) -> Case:
    """Llama with 64 wide heads; 12 layers of 768 have 85 million weights."""
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers, vocab_size=100,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, max_position_embeddings=32768,
        use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return Case(transformers.LlamaForSequenceClassification(config), _embedded(batch, length, width))


LARGE: dict[str, Callable[[int, int], Case]] = {
    "VGG16": lambda batch, length: Case(vgg16(), _image(batch)),
    "ResNet-50": lambda batch, length: Case(resnet50(), _image(batch)),
    "ViT-B/16": _vit,
    "BERT-base": _bert,
    "GPT-2": _gpt2,
    "Llama 12x768": llama,
}
"""Models at their true size, by batch and number of tokens."""
TEXT = ("BERT-base", "GPT-2", "Llama 12x768")
"""Those that the number of tokens matters to."""


def _small(config: str, model: str, **options: Any) -> Callable[[int], Case]:
    sizes: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip

    def build(batch: int) -> Case:
        made = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **options}))
        return Case(made, _embedded(batch, 16, 64), output="last_hidden_state")

    return build


def _small_image(config: str, model: str) -> Callable[[int], Case]:
    def build(batch: int) -> Case:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        made = getattr(transformers, model)(getattr(transformers, config)(image_size=32, patch_size=8, **sizes))
        return Case(made, {"pixel_values": _image(batch, 32)})

    return build


# Two layers, 64 wide: what a pass costs per node is everything here.
SMALL: dict[str, Callable[[int], Case]] = {
    "BERT": _small("BertConfig", "BertModel"),
    "RoBERTa": _small("RobertaConfig", "RobertaModel"),
    "ELECTRA": _small("ElectraConfig", "ElectraModel", embedding_size=64),
    "GPT-2": _small("GPT2Config", "GPT2Model", n_embd=64, n_layer=2, n_head=4, use_cache=False),
    "GPT-NeoX": _small("GPTNeoXConfig", "GPTNeoXModel", use_cache=False),
    "Llama": _small("LlamaConfig", "LlamaModel", use_cache=False),
    "Mistral": _small("MistralConfig", "MistralModel", num_key_value_heads=2, use_cache=False),
    "Qwen3": _small("Qwen3Config", "Qwen3Model", num_key_value_heads=2, head_dim=16, use_cache=False),
    "ViT": _small_image("ViTConfig", "ViTForImageClassification"),
    "DeiT": _small_image("DeiTConfig", "DeiTForImageClassification"),
}

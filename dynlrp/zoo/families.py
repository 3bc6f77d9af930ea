"""Small random-weight models of every architecture in transformers, from their own configuration classes."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from dynlrp.zoo.entry import Example, ZooError
from dynlrp.zoo.exceptions import CLASSES, EXCEPTIONS, PARTS, RANDOM
from dynlrp.zoo.inputs import candidates
from dynlrp.zoo.shrink import shrunk

LARGEST = 30_000_000
"""Parameters of a model that can still be called small."""


class FirstOutput(nn.Module):
    """A model reduced to its first floating point output that has a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        """The last hidden state or the logits, where the model calls one so; else whatever comes first. One number
        per sample is a column."""
        result = self.model(**inputs)
        preferred = [result[k] for k in ("last_hidden_state", "logits") if isinstance(result, dict) and k in result]
        stack: list[Any] = [result, *preferred[:1]]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                if item.is_floating_point() and item.requires_grad and item.ndim:
                    return item if item.ndim > 1 else item.unsqueeze(1)
            elif isinstance(item, dict):
                stack.extend(reversed([v for k, v in item.items() if "loss" not in k]))
            elif isinstance(item, tuple | list):
                stack.extend(reversed(item))
        raise TypeError("no floating point output with a graph")


def model_types() -> list[str]:
    """The types that have a model of their own."""
    return [config.model_type for config in MODEL_MAPPING]


def class_name(model_type: str) -> str:
    """The name of the class without a head for a type; nothing is imported."""
    name = CLASSES.get(model_type, MODEL_MAPPING_NAMES[model_type])
    return name if isinstance(name, str) else name[0]


def model_class(config: PretrainedConfig) -> Any:
    """The class without a head for a configuration."""
    if type(config) not in MODEL_MAPPING:
        raise ZooError(f"transformers has no base model for the type {config.model_type!r}")
    kind = MODEL_MAPPING[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def small_config(name: str) -> PretrainedConfig:
    """The default configuration of a type with small numbers."""
    return shrunk(CONFIG_MAPPING[name](), EXCEPTIONS.get(name))


def small(
    config: PretrainedConfig, kind: Any = None, attention: str = "default", seed: int = 0, padded: bool = False
) -> Example:
    """A model of random weights from a small configuration, with inputs that it takes.

    ``padded``: with a mask that hides a token. Where nothing is hidden, models leave their masks out; but not where
    they cannot look, as with fake tensors.
    """
    given, kind = kind, kind or model_class(config)
    with torch.device("meta"):
        large = kind(config)
    size = sum(p.numel() for p in large.parameters())
    if size > LARGEST:
        largest = sorted(((p.numel(), n, tuple(p.shape)) for n, p in large.named_parameters()), reverse=True)[:3]
        raise ZooError(f"too large: {size / 1e6:.0f}M parameters, most of them in {largest}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        if attention != "default":
            model.set_attn_implementation(attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        part = "" if given else PARTS.get(config.model_type, "")
        model = model.get_submodule(part)
        wrapped = FirstOutput(model).eval()
        inputs = fitting(wrapped, candidates(model, config))
        if padded and "input_ids" in inputs and "attention_mask" in inspect.signature(model.forward).parameters:
            mask = torch.ones_like(inputs["input_ids"])
            mask[-1, -1] = 0
            inputs = fitting(wrapped, [{**inputs, "attention_mask": mask}, inputs])
        title = f"family/{config.model_type} ({part})" if part else ""
        return Example(wrapped, inputs, config.model_type in RANDOM, title)


def fitting(model: nn.Module, offers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The first inputs that a model takes."""
    errors: dict[str, Any] = {}
    for inputs in offers:
        try:
            model(**copied(inputs))
        except TimeoutError:
            raise
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{trace.filename.rsplit('/', 1)[-1]}:{trace.lineno}"
            shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            errors.setdefault(f"{type(error).__name__}: {str(error)[:200]} ({place})", shapes)
        else:
            return inputs
    raise ZooError(
        "no inputs fit:\n    " + "\n    ".join(f"{error}, given {shapes}" for error, shapes in errors.items())
    )


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs that a model may change."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def build(name: str, attention: str = "default", head: str = "", seed: int = 0) -> Example:
    """A small model of this type, or of the class with a head named ``head``, and inputs that it takes."""
    head = head or CLASSES.get(name, "")
    return small(small_config(name), getattr(transformers, head) if head else None, attention, seed)

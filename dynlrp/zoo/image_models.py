"""Models of timm, where it is installed."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from dynlrp.zoo.entry import Entry, Example

SIDE = 224
"""Of the images that are explained, in pixels, where a model's own are larger and it takes others."""


def modules() -> list[str]:
    """The families: timm's modules that have models."""
    return sorted(name for name in timm.list_modules() if timm.list_models(module=name))


def exists(name: str) -> bool:
    """Whether timm has a model of this name."""
    return bool(timm.is_model(name))


def entry(name: str, shape: tuple[int, ...] | None = None) -> Entry:
    """One model, by name: without weights, and with random ones to be explained."""
    return Entry(
        f"timm/{name}",
        partial(_example, name, "meta", shape),
        partial(_example, name, "cpu", shape),
        modality=lambda: "vision",
    )


def smallest(module: str) -> Example:
    """The model of a family that has the fewest parameters, with random weights."""
    name = min(timm.list_models(module=module), key=lambda name: _size(_build(name, "meta")))
    return _example(name, "cpu")._replace(title=f"{module}: {name}")


def smaller(module: str) -> Example:
    """The same model to be explained, which need not see a large image for that."""
    example = smallest(module)
    image = example.inputs[..., :SIDE, :SIDE]
    try:
        with torch.no_grad():
            example.model(image)
    except Exception:  # made for images of one size
        return example
    return example._replace(inputs=image)


def _example(name: str, device: str, shape: tuple[int, ...] | None = None) -> Example:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = _build(name, device).eval()
        return Example(model, torch.randn(shape or (1, *model.default_cfg.get("input_size", (3, 224, 224)))))


def _build(name: str, device: str) -> nn.Module:
    with torch.device(device):
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

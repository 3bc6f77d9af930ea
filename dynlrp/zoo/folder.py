"""A local transformers configuration as a model: its true size without weights, and a small one with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from dynlrp.fake import faked
from dynlrp.zoo.entry import Entry, Example, ZooError
from dynlrp.zoo.exceptions import EXCEPTIONS
from dynlrp.zoo.families import FirstOutput, fitting, model_class, small
from dynlrp.zoo.inputs import candidates
from dynlrp.zoo.shrink import shrunk

CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def entry(folder: Path, shape: tuple[int, ...] | None = None) -> Entry:
    """The model that a folder's ``config.json`` describes. ``shape`` is that of its main input; the small model has its
    own."""
    file = folder / "config.json"
    if not file.is_file():
        raise ZooError(f"{folder} has no config.json, so it is no transformers model")
    contents = file.read_bytes()
    return Entry(
        str(folder),
        lambda: _large(_config(file), shape),
        lambda: _small(_config(file)),
        title=_title(contents),
        digest=hashlib.sha256(contents).hexdigest()[:16],
    )


def _title(contents: bytes) -> str:
    """The class that a configuration names, or its type."""
    with suppress(ValueError, AttributeError):
        found = json.loads(contents)
        (name, *_) = found.get("architectures") or [MODEL_MAPPING_NAMES.get(found.get("model_type"), "")]
        return name if isinstance(name, str) else name[0]
    return ""


def _config(file: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(file.parent), local_files_only=True)
    except Exception as error:
        raise ZooError(f"transformers cannot read {file}: {error}") from error
    return config


def _class(config: PretrainedConfig) -> Any:
    """The class that the configuration names, or where it names none the one without a head."""
    if not config.architectures:
        return model_class(config)
    (name, *_) = config.architectures
    found = getattr(transformers, name, None)
    if found is None:
        raise ZooError(f'transformers has no class {name!r}, which the configuration names under "architectures"')
    return found


def _small(config: PretrainedConfig) -> Example:
    return small(shrunk(config, EXCEPTIONS.get(config.model_type)), _class(config), padded=True)


def _large(config: PretrainedConfig, shape: tuple[int, ...] | None) -> Example:
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with torch.device("meta"):
        model = _class(config)(config)
    if isinstance(config.dtype, torch.dtype):
        model.to(config.dtype)
    wrapped = _Unchecked(model).eval()
    return Example(wrapped, fitting(_Fake(wrapped), _typed(candidates(model, config, shape), config.dtype)))


def _typed(offers: Iterator[dict[str, Any]], dtype: Any) -> Iterator[dict[str, Any]]:
    """Floating point inputs in the type of the weights."""
    for inputs in offers:
        yield {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }


class _Unchecked(FirstOutput):
    """Without the checks of transformers that look at numbers, such as whether there are as many features of images as
    tokens that hold their place."""

    def forward(self, **inputs: Any) -> Tensor:
        before = os.environ.get(CHECKS)
        os.environ[CHECKS] = "1"
        try:
            return super().forward(**inputs)
        finally:
            if before is None:
                del os.environ[CHECKS]
            else:
                os.environ[CHECKS] = before


class _Fake(nn.Module):
    """Runs a model without numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with faked(self.model, inputs) as (model, given):
            return model(**given)

"""A local transformers configuration as a model: its true size without weights, and a small one with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from dynlrp.fake import faked
from dynlrp.zoo.entry import Entry, Example, ZooError
from dynlrp.zoo.exceptions import EXCEPTIONS
from dynlrp.zoo.families import FirstOutput, fitting, model_class, small
from dynlrp.zoo.inputs import candidates
from dynlrp.zoo.shrink import shrunk


def entry(folder: Path) -> Entry:
    """The model that a folder's ``config.json`` describes."""
    file = folder / "config.json"
    if not file.is_file():
        raise ZooError(f"{folder} has no config.json, so it is no transformers model")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ZooError(f"transformers cannot read {file}: {error}") from error
    kind = _class(config)
    exceptions = EXCEPTIONS.get(config.model_type)
    return Entry(
        str(folder),
        lambda: _large(config, kind),
        lambda: small(shrunk(config, exceptions), kind, padded=True),
        title=kind.__name__,
        digest=hashlib.sha256(file.read_bytes()).hexdigest()[:16],
    )


def _class(config: PretrainedConfig) -> Any:
    """The class that the configuration names, or the one without a head."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return model_class(config)


def _large(config: PretrainedConfig, kind: Any) -> Example:
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with torch.device("meta"):
        model = kind(config)
    if isinstance(config.dtype, torch.dtype):
        model.to(config.dtype)
    wrapped = FirstOutput(model).eval()
    return Example(wrapped, fitting(_Fake(wrapped), _typed(candidates(model, config), config.dtype)))


def _typed(offers: Iterator[dict[str, Any]], dtype: Any) -> Iterator[dict[str, Any]]:
    """Floating point inputs in the type of the weights."""
    for inputs in offers:
        yield {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }


class _Fake(nn.Module):
    """Runs a model without numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with faked(self.model, inputs) as (model, given):
            return model(**given)

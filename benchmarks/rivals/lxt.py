"""LXT (efficient): AttnLRP as gradient times input, with its classes in place of the model's.

LXT patches classes of torch and transformers for good; here the patches are taken back after each explanation.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method
from benchmarks.rivals.plain import gradient_x_input

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "bert", "gpt2")


def modeling(model: nn.Module) -> str:
    """The Python module that a model's class is from."""
    return type(model).__module__


@cache
def patches(name: str) -> dict[Any, Any]:
    """What LXT patches for models of a Python module: by class or module, how."""
    from lxt.efficient.models import get_default_map

    found: dict[Any, Any] = get_default_map(importlib.import_module(name))
    return found


@contextmanager
def patched(model: nn.Module) -> Iterator[None]:
    """LXT's patches within a block, for a model that was made before."""
    from lxt.efficient import monkey_patch

    name = modeling(model)
    targets = patches(name)
    before = {target: dict(vars(target)) for target in targets}
    parts = [(part, type(part)) for part in model.modules() if modeling(part) == name]
    monkey_patch(None, targets)
    try:
        # For BERT, LXT has a copy of the file with classes of its own.
        for part, kind in parts:
            part.__class__ = getattr(importlib.import_module(name), kind.__name__)
        yield
    finally:
        for part, kind in parts:
            part.__class__ = kind
        for target, attributes in before.items():
            for key in set(vars(target)) - set(attributes):
                delattr(target, key)
            for key, value in attributes.items():
                if vars(target)[key] is not value:
                    setattr(target, key, value)


def relevance(case: Case, target: Tensor | None = None) -> Tensor:
    """Gradient times input of the patched model."""
    with patched(case.model):
        return gradient_x_input(case, target)


def _is(case: Case, *names: str) -> bool:
    return modeling(case.model).rpartition(".")[2] in names


METHODS = [
    Method(
        "LXT AttnLRP",
        relevance,
        lambda case: _is(case, *(f"modeling_{family}" for family in FAMILIES)),
        "attnlrp",
        "lxt",
    ),
    Method("LXT CP-LRP", relevance, lambda case: _is(case, "vision_transformer"), "cplrp", "lxt"),
]

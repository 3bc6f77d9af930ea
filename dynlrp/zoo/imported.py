"""A model that the user's own code makes."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dynlrp.zoo.entry import Entry, Example, ZooError


def entry(path: str, shape: tuple[int, ...] | None = None) -> Entry:
    """The model at ``package.module:attribute``, found from the current folder too.

    The attribute is a module, or a class or function that gives one when called with nothing, alone or with inputs as
    ``(model, inputs)``.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ZooError(f"{path!r}: there is no module {error.name!r} here") from error
    except (TypeError, ValueError) as error:
        raise ZooError(f"{path!r} is not package.module:attribute") from error
    made: Any = module
    for name in attribute.split("."):
        if not hasattr(made, name):
            near = get_close_matches(name, dir(made), 3)
            raise ZooError(f"{path!r}: {module_name} has no {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
        made = getattr(made, name)
    return Entry(path, lambda: _example(path, made, shape), keeps=False)


def _example(path: str, made: Any, shape: tuple[int, ...] | None) -> Example:
    if not isinstance(made, nn.Module | tuple) and callable(made):
        made = made()
    inputs = None
    if isinstance(made, tuple) and len(made) >= 2:
        made, inputs = made[:2]
    if not isinstance(made, nn.Module):
        raise ZooError(f"{path!r} gives {type(made).__name__}, not an nn.Module or (module, inputs)")
    if shape is not None:
        inputs = torch.randn(shape)
    if inputs is None and hasattr(made, "config") and hasattr(made, "main_input_name"):
        return _transformer(made)
    if inputs is None:
        raise ZooError(f"what does {path!r} take? Return (module, inputs) there, or give --shape 1,3,224,224")
    return Example(made.eval(), inputs)


def _transformer(model: Any) -> Example:
    from dynlrp.zoo.families import FirstOutput, fitting
    from dynlrp.zoo.inputs import candidates

    wrapped = FirstOutput(model).eval()
    return Example(wrapped, fitting(wrapped, candidates(model, model.config)))

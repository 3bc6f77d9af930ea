"""A model that the user's own code makes."""

from __future__ import annotations

import importlib
import re
import sys
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dynlrp.zoo.entry import Entry, Example, ZooError

FORM = re.compile(r"{0}(\.{0})*:{0}(\.{0})*".format(r"[^\W\d]\w*"))


def entry(path: str, shape: tuple[int, ...] | None = None) -> Entry:
    """The model at ``package.module:attribute``, found from the current folder too.

    The attribute is a module, or a class or function that gives one when called with nothing, alone or with inputs as
    ``(model, inputs)``. Nothing is imported before the model is built.
    """
    _check(path)
    return Entry(path, lambda: _example(path, shape), keeps=False)


def build(path: str) -> tuple[nn.Module, Any]:
    """The model at such a path, and the inputs that come with it; None where none do."""
    _check(path)
    made, inputs = _attribute(path), None
    if not isinstance(made, nn.Module | tuple) and callable(made):
        made = made()
    if isinstance(made, tuple) and len(made) >= 2:
        made, inputs = made[:2]
    if not isinstance(made, nn.Module):
        raise ZooError(f"{path!r} gives {type(made).__name__}, not an nn.Module or (module, inputs)")
    return made, inputs


def _check(path: str) -> None:
    if not FORM.fullmatch(path):
        raise ZooError(f"{path!r} is not package.module:attribute")


def _attribute(path: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ZooError(f"{path!r}: there is no module {error.name!r} here") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = get_close_matches(name, dir(found), 3)
            raise ZooError(f"{path!r}: {module_name} has no {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
        found = getattr(found, name)
    return found


def _example(path: str, shape: tuple[int, ...] | None) -> Example:
    made, inputs = build(path)
    if inputs is None and hasattr(made, "config") and hasattr(made, "main_input_name"):
        return _transformer(made, shape)
    if shape is not None:
        inputs = torch.randn(shape)
    if inputs is None:
        raise ZooError(
            f"what does {path!r} take? Return (module, inputs) there, or say how large its one input is, as in "
            f"--shape 1,3,224,224 for an image"
        )
    return Example(made.eval(), inputs)


def _transformer(model: Any, shape: tuple[int, ...] | None) -> Example:
    from dynlrp.zoo.families import FirstOutput, fitting
    from dynlrp.zoo.inputs import candidates

    wrapped = FirstOutput(model).eval()
    return Example(wrapped, fitting(wrapped, candidates(model, model.config, shape)))

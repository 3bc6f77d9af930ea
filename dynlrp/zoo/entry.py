"""What a zoo consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from dynlrp.errors import DynLRPError


class ZooError(DynLRPError):
    """A model's name is not known, or a model cannot be built."""


class Example(NamedTuple):
    """A model in eval mode and inputs that it takes, as :func:`dynlrp.explain` does."""

    model: nn.Module
    inputs: Any
    random: bool = False
    """Its forward pass draws random numbers."""
    title: str = ""
    """Which model it is, where that is found out when it is built."""


@dataclass(frozen=True)
class Entry:
    """A model that can be built."""

    name: str
    build: Callable[[], Example]
    """The model whose graph is looked at; it may lie on the meta device."""
    small: Callable[[], Example] | None = None
    """A smaller one with weights to explain, where ``build`` has none."""
    kind: str = ""
    """Its class, where that is known before it is built."""
    modality: Callable[[], str] = str
    """What kind of data it takes, where that is known before it is built."""
    title: str = ""
    published: int = 0
    """Number of parameters, as its authors give it."""
    digest: str = ""
    """Tells one version of the model from another: the contents of its configuration file."""
    keeps: bool = True
    """The name says all about the model, so that results may be kept."""


@contextmanager
def needs(package: str) -> Iterator[None]:
    """An import that fails says which package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ZooError(f"this needs {package}: pip install dynlrp[zoo]") from error

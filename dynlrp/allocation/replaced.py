"""Other parameters in the place of a model's own, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Replacement = tuple[nn.Module, str, Tensor]
"""A module, the name of one of its parameters, and what takes its place: any tensor, for a while."""


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Put parameters in place one after the other; afterwards, and where one cannot be made, modules have their own
    again, the very same."""
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for module, name, parameter in replacements:
            kept.append((module, name, module._parameters[name]))
            module._parameters[name] = parameter  # type: ignore[assignment]
        yield
    finally:
        for module, name, own in kept:
            module._parameters[name] = own

"""Libraries that some of this asks for, and that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dynlrp.errors import InputError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around an import: says which package is missing, and the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"this needs {error.name}: pip install dynlrp[{extra}]") from error

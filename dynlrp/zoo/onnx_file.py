"""An ONNX file of the user's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from dynlrp.errors import DynLRPError
from dynlrp.onnx import load_onnx
from dynlrp.zoo.entry import Entry, Example, ZooError

OPEN = 8
"""Size of dimensions that a file leaves open, but for the first, of samples, which is 1."""


def entry(path: Path, shape: tuple[int, ...] | None = None) -> Entry:
    """The model of a file, with random inputs of the shapes that it names. ``shape`` is that of its first input."""
    if not path.is_file():
        raise ZooError(f"there is no file {path}")
    return Entry(
        str(path),
        lambda: _example(path, shape),
        title=path.stem,
        digest=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
    )


def _example(path: Path, shape: tuple[int, ...] | None) -> Example:
    try:
        model = load_onnx(path)
    except (DynLRPError, ImportError) as error:
        raise ZooError(f"{path}: {error}") from error
    inputs: dict[str, Tensor] = {}
    for name, (dtype, sizes) in model.kinds.items():
        found = [size if isinstance(size, int) else OPEN if place else 1 for place, size in enumerate(sizes)]
        inputs[name] = _drawn(list(shape) if shape is not None and not inputs else found, dtype)
    return Example(model, inputs)


def _drawn(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Numbers of an image, say, or ids and masks: of those, each table has the first."""
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)

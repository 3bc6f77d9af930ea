"""The samples of a batch in a tensor inside the model."""

from __future__ import annotations

from torch import Tensor

from dynlrp.errors import InputError


def samples_first(tensor: Tensor, size: int, name: str) -> Tensor:
    """A layer's tensor as ``(samples, share, ...)``: samples lie along its first dimension, maybe each in several
    windows or tokens."""
    if tensor.ndim == 0 or len(tensor) % size:
        raise InputError(
            f"layer {name!r} has a tensor of shape {tuple(tensor.shape)}, whose first dimension is not that of {size} "
            f"samples: use batches of one sample"
        )
    return tensor.reshape(size, len(tensor) // size, *tensor.shape[1:])


def by_sample(tensor: Tensor, size: int, name: str) -> Tensor:
    """A layer's tensor as ``(samples, numbers)``."""
    return samples_first(tensor, size, name).flatten(1)

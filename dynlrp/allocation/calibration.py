"""Calibration data in batches, whatever it is given as."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynlrp.errors import InputError
from dynlrp.inputs import as_dicts


@dataclass(frozen=True)
class Calibration:
    """Samples of the kind that the model will see; goes through them in batches as often as it is asked to.

    Args:
        data: a tensor or array, a mapping of keyword arguments (a tokenizer's output) or a tuple of positional
            arguments, cut along the first dimension of their tensors; or an iterable of batches of these kinds, such as
            a list or a DataLoader, taken as they come.
        batch_size: samples of a batch, where data is cut.
        samples: stop behind so many.
    """

    data: Any
    batch_size: int = 8
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.samples is not None and self.samples < 1):
            raise InputError("batch_size and samples must be positive")
        if isinstance(self.data, Iterator):  # there is no second time
            object.__setattr__(self, "data", list(self.data))

    def batches(self, model: nn.Module) -> Iterator[Any]:
        """Inputs of the model, on its device: a tensor, positional arguments or keyword arguments each time.

        Of a batch that is a list or tuple, what is beyond the positional arguments that the model takes, such as
        labels, is left out.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        takes = _positional(model)
        left = self.samples
        for given in self._raw():
            batch = _tensors(given)
            if isinstance(batch, list | tuple):
                batch = tuple(batch[:takes])
            size = batch_size(batch)
            if left is not None and size > left:
                batch, size = cut(batch, size, slice(left)), left
            yield pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
            left = None if left is None else left - size
            if left == 0:
                return

    def __len__(self) -> int:
        """How many samples there are; batches of unknown number count as none."""
        if _is_one(self.data):
            count = batch_size(_tensors(self.data))
        elif isinstance(self.data, list):
            count = sum(batch_size(_tensors(batch)) for batch in self.data)
        else:
            loader = getattr(self.data, "dataset", None)
            count = len(loader) if isinstance(loader, Sized) else 0
        return count if self.samples is None else min(count or self.samples, self.samples)

    def _raw(self) -> Iterator[Any]:
        if not _is_one(self.data):
            if not isinstance(self.data, Iterable):
                raise InputError(f"calibration is {type(self.data).__name__}, neither inputs nor batches of them")
            yield from self.data
            return
        whole = _tensors(self.data)
        size = batch_size(whole)
        for first in range(0, size, self.batch_size):
            yield cut(whole, size, slice(first, first + self.batch_size))


def _tensors(inputs: Any) -> Any:
    """Inputs with tensors for arrays."""
    return pytree.tree_map(lambda leaf: torch.from_numpy(leaf) if _is_array(leaf) else leaf, as_dicts(inputs))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"


def batch_size(inputs: Any) -> int:
    """How many samples a batch holds: the size of the first dimension of its first tensor."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InputError("a batch of the calibration holds no tensor with a dimension for samples")


def _is_one(data: Any) -> bool:
    """Whether this is one collection of inputs, to be cut, rather than an iterable of batches."""
    return isinstance(data, Tensor | np.ndarray | Mapping | tuple)


def cut(inputs: Any, size: int, part: slice) -> Any:
    """Some samples of all tensors that have ``size`` of them."""

    def some(leaf: Any) -> Any:
        return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

    return pytree.tree_map(some, inputs)


def _positional(model: nn.Module) -> int | None:
    """How many positional arguments a model takes; None for any number."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)

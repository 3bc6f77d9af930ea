"""What of the output is explained: the seed of the pass and the value per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from dynlrp.errors import InputError, NoPathError, TargetError, kind, told

Target = Union[int, Sequence[Any], Tensor, Callable[[Tensor], Tensor], "Contrast", None]


@dataclass(frozen=True)
class Contrast:
    """What speaks for one output rather than for another: ``y[target] - y[against]`` is explained.

    Both are targets that name one output per sample, as in :func:`dynlrp.explain`; ``target=None`` is the largest
    output. ``against=None`` is the mean of all other outputs, as in contrastive LRP (Gu et al. 2018).
    """

    target: Target = None
    against: Target = None


class Seed(NamedTuple):
    """``root`` is the tensor relevance starts from, ``start`` what it starts with."""

    root: Tensor
    start: Tensor
    value: Tensor
    """The explained output, one number per sample."""
    relevance: bool
    """``start`` is relevance, not a multiplier."""


def find_output(output: Any, name: str | int | None = None) -> Tensor:
    """The tensor to explain in whatever the model returned: ``name`` if given, else the field ``logits``, else the
    first floating point tensor."""
    if name is not None:
        if isinstance(output, Tensor):
            raise TargetError("the model returns one tensor; leave output= out")
        found = _field(output, name)
        if not isinstance(found, Tensor):
            raise TargetError(f"output {name!r} is not a tensor but {type(found).__name__}")
        return found
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    stack = [output]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
        if isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, tuple | list):
            stack.extend(reversed(item))
        elif hasattr(item, "__dataclass_fields__"):
            stack.extend(reversed([getattr(item, field) for field in item.__dataclass_fields__]))
    raise TargetError(f"the model returned {type(output).__name__} with no floating point tensor in it")


def _field(output: Any, name: str | int) -> Any:
    try:
        if isinstance(output, Mapping) or isinstance(name, int):
            return output[name]
        return getattr(output, name)
    except (KeyError, IndexError, AttributeError, TypeError):
        fields = list(output) if isinstance(output, Mapping) else [n for n in dir(output) if not n.startswith("_")]
        raise TargetError(f"the output has no {name!r}; it has {fields[:20]}") from None


def make_seed(output: Tensor, target: Target) -> Seed:
    """Where relevance starts for a target (see :func:`dynlrp.explain`)."""
    if output.grad_fn is None and not output.requires_grad:
        raise NoPathError(
            "the output does not require grad: it was computed without a graph (torch.no_grad, detach, or a model "
            "that leaves autograd)"
        )
    if isinstance(target, np.ndarray) and target.dtype.kind == "f":
        target = torch.from_numpy(target)
    if callable(target):
        with torch.enable_grad(), told(lambda: f"The target was called with the output, {kind(output)}."):
            score = target(output)
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise TargetError("a callable target must return a floating point tensor with one number per sample")
        if score.grad_fn is None:
            raise TargetError("what the callable target returned does not depend on the output")
        batch = output.shape[0] if output.ndim else 1
        if score.ndim and (score.shape[0] != batch or score.numel() != batch):
            raise TargetError(
                f"a callable target must return one number per sample, ({batch},), not shape {tuple(score.shape)}"
            )
        return Seed(score, torch.ones_like(score), score.detach().reshape(-1), False)
    shape = output.shape
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.shape != shape:
            raise TargetError(f"initial relevance of shape {tuple(target.shape)} for an output of {tuple(shape)}")
        value = target.detach().to(output)
        return Seed(output, value, value.reshape(shape[0] if shape else 1, shape[1:].numel()).sum(1), True)
    if isinstance(target, Contrast):
        start = _chosen(output, target.target)
        rest = (1 - start) / max(start.shape[1] - 1, 1) if target.against is None else _chosen(output, target.against)
        start = start - rest
    else:
        start = _chosen(output, target)
    flat = output.detach().reshape(start.shape)
    value = torch.where(start == 0, 0.0, start * flat).sum(1)  # outputs that are not explained may be infinite
    return Seed(output, start.reshape(shape), value, False)


def all_targets(output: Tensor) -> list[Target]:
    """Every output of a sample, as targets."""
    shape = output.shape[1:]
    return [tuple(map(int, np.unravel_index(n, shape))) for n in range(shape.numel())] if shape else [0]


def _chosen(output: Tensor, target: Target) -> Tensor:
    """1 at the target of every sample and 0 elsewhere, ``(batch, outputs)``."""
    if callable(target) or isinstance(target, Contrast) or (isinstance(target, Tensor) and target.is_floating_point()):
        raise TargetError("a contrast is between two outputs of each sample; give any other as a function")
    shape = output.shape
    batch = shape[0] if shape else 1
    flat = output.detach().reshape(batch, math.prod(shape[1:]))
    if batch == 0:
        raise InputError(
            f"the batch is empty, as the output has shape {tuple(shape)}: there is no sample to explain. Give one or "
            f"more, or leave this batch out"
        )
    if flat.shape[1] == 0:
        raise InputError(f"the output of shape {tuple(shape)} has no entry that could be explained")
    index = flat.argmax(1) if target is None else _flat_index(target, batch, shape[1:], output.device)
    # Ones as a tensor: of a number, torch.compile (2.11) makes float32 whatever the dtype.
    return torch.zeros_like(flat).scatter_(1, index.unsqueeze(1), flat.new_ones(batch, 1))


def _plain(target: Any) -> Any:
    """Numbers of torch and numpy as those of Python, in a list or tuple too."""
    if isinstance(target, Tensor | np.ndarray | np.generic):
        return target.tolist()
    return type(target)([_plain(t) for t in target]) if type(target) in (list, tuple) else target


def _flat_index(target: Any, batch: int, rest: torch.Size, device: torch.device) -> Tensor:
    """One flat index per sample from an int, an int per sample, an index tuple or an index tuple per sample."""
    target = _plain(target)
    if isinstance(target, list) and any(isinstance(t, bool | float) for t in target):
        raise TargetError(f"a list of targets holds integers or index tuples, not {target[:3]}")
    if isinstance(target, bool) or not isinstance(target, int | Sequence) or isinstance(target, str):
        raise TargetError(
            f"a target cannot be {type(target).__name__}: give the number of an output, one per sample, an index "
            f"tuple, a floating point tensor of the output's shape, or a function of the output"
        )
    if isinstance(target, tuple) and len(target) == len(rest) and all(isinstance(i, int) for i in target):
        rows = [target] * batch
    elif isinstance(target, int):
        rows = [(target,)] * batch
    else:
        rows = [(t,) if isinstance(t, int) else tuple(t) for t in target]
        if len(rows) != batch:
            raise TargetError(f"{len(rows)} targets for a batch of {batch}")
    sizes = tuple(rest) or (1,)
    flat: list[int] = []
    for row in rows:
        if len(row) != len(sizes):
            given = f"{len(row)} (relevance to start with is floating point)" if len(row) > 3 else row
            raise TargetError(
                f"the output has shape (batch, {', '.join(map(str, rest))}): a target needs {len(sizes)} number(s) "
                f"such as {(-1, 5) if len(sizes) == 2 else tuple(0 for _ in sizes)}, not "
                f"{row[0] if len(row) == 1 else given}"
            )
        position = 0
        for number, size in zip(row, sizes, strict=True):
            if not isinstance(number, int) or not -size <= number < size:
                raise TargetError(f"target {number!r} is out of range for an output dimension of size {size}")
            position = position * size + number % size
        flat.append(position)
    return torch.tensor(flat, device=device)

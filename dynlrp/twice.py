"""What stands in the way of differentiating a backward pass, as relevance is where it is part of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEAD_ENDS = frozenset(
    {
        "torch::autograd::NotImplemented",
        "torch::autograd::Error",
        "CdistBackwardBackward0",
        "CudnnRnnBackwardBackward0",
        "EmbeddingBagBackwardBackward0",
        "EmbeddingBagDenseBackwardBackward0",
        "PdistBackwardBackward0",
    }
)
"""Nodes that fail once a gradient arrives: derivatives that PyTorch lacks, and those marked ``once_differentiable``."""


def has_dead_end(value: Tensor, begun: int) -> bool:
    """Whether what was recorded for ``value`` since sequence number ``begun`` ends in a node that fails."""
    if value.grad_fn is None:
        return False
    seen = {value.grad_fn}
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node.name() in DEAD_ENDS:
            return True
        if node._sequence_nr() < begun:
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return False


def loses(node: Any) -> str:
    """Why the derivative of a custom function's backward pass would be wrong without anybody noticing, or nothing.

    Autograd connects what a function saved to the graph only where it is an argument or a result of it.
    """
    if not isinstance(node, torch._C._FunctionBase):
        return ""
    kept: list[Any] = [*node.saved_tensors, *vars(node).values()]
    if any(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and not x.requires_grad for x in kept):
        return (
            "it saved a tensor that autograd does not connect to the graph, as it does only with arguments and results "
            "that require grad: save those alone, and compute the rest in backward"
        )
    return ""


def cuts(grads: Sequence[Tensor | None], results: Sequence[Any]) -> bool:
    """Whether a custom function's backward pass took numbers out of the graph, by numpy, ``detach`` or ``no_grad``."""
    return any(g is not None and g.requires_grad for g in grads) and any(
        isinstance(m, Tensor) and not m.requires_grad and bool(m.any()) for m in results
    )

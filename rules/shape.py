"""Operations that only move elements: their VJP moves relevance back, in either gauge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import Operation, linear_operation, register


def signed(number: int) -> int:
    """Autograd saves dimensions as unsigned 64-bit numbers."""
    return number - 2**64 if number >= 2**63 else number


def dims(step: Any, name: str = "dim") -> list[int]:
    """A saved list of dimensions."""
    return [signed(d) for d in step.saved(name)]


def _moves(name: str, replay: Callable[..., Tensor] | None = None, operands: str = "+", **traits: Any) -> None:
    register(Operation(name, "movement", operands=operands, copies=True, sign="same", replay=replay, **traits))


def _like_output(step: Any, x: Tensor) -> Tensor:
    """Views: the node knows the shape of its output."""
    return x.reshape(step.node._input_metadata[0].shape)


for _name in (
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "SqueezeBackward3",
):
    _moves(_name, _like_output)
for _name in ("CloneBackward0", "AliasBackward0", "ContiguousBackward0", "LiftFreshBackward0"):
    _moves(_name, lambda step, x: x)
_moves("ToCopyBackward0", lambda step, x: x.to(step.node._input_metadata[0].dtype))
_moves("torch::autograd::CopyBackwards", lambda step, x: x.to(step.node._input_metadata[0].dtype))
_moves("TBackward0", lambda step, x: x.t())
_moves("TransposeBackward0", lambda step, x: x.transpose(signed(step.saved("dim0")), signed(step.saved("dim1"))))
_moves("PermuteBackward0", lambda step, x: x.permute(dims(step, "dims")))
_moves("ExpandBackward0", lambda step, x: x.expand(step.node._input_metadata[0].shape))
_moves("SelectBackward0", lambda step, x: x.select(signed(step.saved("dim")), signed(step.saved("index"))))
_moves("RepeatBackward0", lambda step, x: x.repeat(step.saved("repeats")))
_moves("FlipBackward0", lambda step, x: x.flip(dims(step, "dims")))
_moves("RollBackward0", lambda step, x: x.roll(dims(step, "shifts"), dims(step, "dims")))
_moves("PixelShuffleBackward0", lambda step, x: torch.pixel_shuffle(x, step.saved("upscale_factor")))
_moves("PixelUnshuffleBackward0", lambda step, x: torch.pixel_unshuffle(x, step.saved("downscale_factor")))
_moves("SplitBackward0")
_moves("SplitWithSizesBackward0")
_moves("UnbindBackward0")
_moves("UnfoldBackward0")
_moves("AsStridedBackward0")


def _slice(step: Any, x: Tensor) -> Tensor:
    bounds = [None if bound is None else signed(bound) for bound in (step.saved("start"), step.saved("end"))]
    result: Tensor = torch.ops.aten.slice(x, signed(step.saved("dim")), *bounds, step.saved("step"))
    return result


_moves("SliceBackward0", _slice)


def _cat_misses(node: Any) -> bool:
    """Whether something of the concatenation was not recorded (an empty cache does not count)."""
    dim = signed(node._saved_dim)
    known = sum(child._input_metadata[n].shape[dim] for child, n in node.next_functions if child is not None)
    return bool(known < node._input_metadata[0].shape[dim])


_moves(
    "CatBackward0",
    lambda step, *xs: torch.cat([x for x in xs if x is not None], signed(step.saved("dim"))),
    facts=_cat_misses,
    hides=lambda misses, present: misses,
)
_moves(
    "StackBackward0",
    lambda step, *xs: torch.stack(xs, signed(step.saved("dim"))),
    hides=lambda facts, present: not all(present),
)

# The value that a constant padding adds is not recorded.
register(Operation("ConstantPadNdBackward0", "movement", operands="+", copies=True, hides=lambda facts, present: True))
linear_operation("NegBackward0", family="movement", replay=lambda step, x: -x)

# What full backward hooks on a module put around it.
linear_operation("BackwardHookFunctionBackward", family="movement")

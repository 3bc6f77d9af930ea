"""Operations that only move elements: their VJP moves relevance back, in either gauge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import VJP, Grads, Step, blocked, linear_operation, missing


def signed(number: int) -> int:
    """Autograd saves dimensions as unsigned 64-bit numbers."""
    return number - 2**64 if number >= 2**63 else number


def dims(step: Any, name: str = "dim") -> list[int]:
    """A saved list of dimensions, empty where there is none."""
    return [signed(d) for d in step.saved(name) or ()]


def number(step: Any, name: str = "dim") -> int:
    """A saved number that may be negative."""
    return signed(step.saved(name))


def always(facts: Any, present: tuple[bool, ...]) -> bool:
    """For ``hides``: the operation writes a number that is not recorded."""
    return True


def with_copies(*names: str) -> list[str]:
    """These nodes and the same of operations that copy where those are views."""
    return [*names, *(name + "_copy" for name in names if hasattr(torch._C._functions, name + "_copy"))]


def _moves(*names: str, replay: Callable[..., Any] | None = None, **traits: Any) -> None:
    """Enter movements of one tensor into one; others say ``exact=False``."""
    usual = {"family": "movement", "operands": "+", "copies": True, "exact": True, "sign": "same", "replay": replay}
    traits = {**usual, **traits}
    linear_operation(*with_copies(*names), **traits)


def _like_output(step: Any, x: Tensor) -> Tensor:
    """Views: the node knows the shape of its output."""
    return x.reshape(step.node._input_metadata[0].shape)


def _cast(step: Any, x: Tensor) -> Tensor:
    return x.to(step.node._input_metadata[0].dtype)


_moves(
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "ReshapeCopyBackward0",
    "UnsqueezeBackward0",
    "UnsqueezeBackward1",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "SqueezeBackward3",
    "SqueezeBackward4",
    "SqueezeBackward5",
    replay=_like_output,
)
_moves(
    "CloneBackward0",
    "LazyCloneBackward0",
    "AliasBackward0",
    "ContiguousBackward0",
    "LiftBackward0",
    "LiftFreshBackward0",
    "PinMemoryBackward0",
    replay=lambda step, x: x,
)


@dataclass(frozen=True)
class Cast(VJP):
    """m_x = m: a copy in another dtype or on another device (exact: up to the rounding of the copy). Relevance may be
    wider than the tensors, and then stays so.

    ``operand`` is what is copied. What it is written over has no relevance.
    """

    operand: int = 0

    def __call__(self, step: Any, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        results: list[Tensor | None] = [None] * len(step.wants)
        if g is None:
            return results
        for position, ((child, output), wanted) in enumerate(zip(step.node.next_functions, step.wants, strict=True)):
            if wanted:
                made = child._input_metadata[output]
                copied = position == self.operand
                results[position] = g.to(made.device) if copied else g.new_zeros(made.shape, device=made.device)
        return results


_moves("ToCopyBackward0", rule=Cast(), replay=_cast)
_moves(
    "torch::autograd::CopyBackwards",  # the second operand is written over the first
    rule=Cast(1),
    replay=lambda step, old, new: _cast(step, new).expand(step.node._input_metadata[0].shape),
    hides=lambda facts, present: not present[1],
    exact=False,
)
_moves("TBackward0", "TBackward1", replay=lambda step, x: x.t())
_moves(
    "TransposeBackward0",
    "TransposeBackward1",
    replay=lambda step, x: x.transpose(number(step, "dim0"), number(step, "dim1")),
)
_moves("PermuteBackward0", replay=lambda step, x: x.permute(dims(step, "dims")))
_moves("ExpandBackward0", replay=lambda step, x: x.expand(step.node._input_metadata[0].shape))
_moves("SelectBackward0", replay=lambda step, x: x.select(number(step), number(step, "index")))
_moves("RepeatBackward0", replay=lambda step, x: x.repeat(step.saved("repeats")))
_moves("FlipBackward0", replay=lambda step, x: x.flip(dims(step, "dims")))
_moves("RollBackward0", replay=lambda step, x: x.roll(dims(step, "shifts"), dims(step, "dims")))
_moves("Rot90Backward0", replay=lambda step, x: x.rot90(number(step, "k"), dims(step, "dims")))
_moves("PixelShuffleBackward0", replay=lambda step, x: torch.pixel_shuffle(x, step.saved("upscale_factor")))
_moves("PixelUnshuffleBackward0", replay=lambda step, x: torch.pixel_unshuffle(x, step.saved("downscale_factor")))
_moves("ChannelShuffleBackward0", replay=lambda step, x: torch.channel_shuffle(x, step.saved("groups")))
_moves(
    "SplitBackward0",
    "UnsafeSplitBackward0",
    replay=lambda step, x: x.split(step.saved("split_size"), number(step)),
    exact=False,
)
_moves(
    "SplitWithSizesBackward0",
    "UnsafeSplitWithSizesBackward0",
    replay=lambda step, x: x.split_with_sizes(step.saved("split_sizes"), number(step)),
    exact=False,
)
_moves("UnbindBackward0", replay=lambda step, x: x.unbind(number(step)), exact=False)
_moves(
    "UnfoldBackward0",
    replay=lambda step, x: x.unfold(number(step, "dimension"), step.saved("size"), step.saved("step")),
)
_moves(
    "NarrowCopyBackward0",
    replay=lambda step, x: x.narrow(number(step), number(step, "start"), number(step, "length")),
)


def _diagonal(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replay(step: Any, *xs: Tensor) -> Tensor:
        return function(*xs, offset=number(step, "offset"), dim1=number(step, "dim1"), dim2=number(step, "dim2"))

    return replay


_moves("DiagonalBackward0", replay=_diagonal(torch.diagonal))
# Which elements these choose depends on how their operand lies in memory, which a recomputed one may not repeat.
_moves("AsStridedBackward0", "AsStridedBackward1")


def _bounds(step: Any) -> tuple[Any, ...]:
    ends = [None if bound is None else signed(bound) for bound in (step.saved("start"), step.saved("end"))]
    return (number(step), *ends, step.saved("step"))


_moves("SliceBackward0", replay=lambda step, x: torch.ops.aten.slice(x, *_bounds(step)))


def _cat_misses(node: Any) -> bool:
    """Whether something of the concatenation was not recorded (an empty cache does not count)."""
    dim = signed(node._saved_dim)
    shapes = [child._input_metadata[n].shape for child, n in node.next_functions if child is not None]
    known = sum(shape[dim] for shape in shapes if shape != [0])  # which goes with any shape
    return bool(known < node._input_metadata[0].shape[dim])


_moves(
    "CatBackward0",
    replay=lambda step, *xs: torch.cat([x for x in xs if x is not None], number(step)),
    facts=_cat_misses,
    hides=lambda misses, present: misses,
)
_moves("StackBackward0", replay=lambda step, *xs: torch.stack(xs, number(step)), hides=missing)

# Two tensors, one written into the other.
_moves(
    "SelectScatterBackward0",
    replay=lambda step, x, part: x.select_scatter(part, number(step), number(step, "index")),
    hides=missing,
)
_moves("SliceScatterBackward0", replay=lambda step, x, part: x.slice_scatter(part, *_bounds(step)), hides=missing)
_moves("SliceInverseBackward0", replay=lambda step, part, x: x.slice_scatter(part, *_bounds(step)), hides=missing)
_moves("DiagonalScatterBackward0", replay=_diagonal(torch.diagonal_scatter), hides=missing)


@dataclass(frozen=True)
class Scattered(VJP):
    """m_x = m outside of the part written to: what is written over has no relevance (exact: every output element is one
    input element). PyTorch's derivative gives it all, and the rest of the tensor none."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        place = step.saved("size"), step.saved("stride"), step.saved("storage_offset")
        return [g.contiguous().as_strided_scatter(g.new_zeros(place[0]), *place), step.vjp(grads)[1]]


_moves("AsStridedScatterBackward0", rule=Scattered(), hides=missing)

# Not every output is an input: zeros are written beside them, or the sign changes.
for _name, _replay in (
    ("TrilBackward0", lambda step, x: x.tril(number(step, "diagonal"))),
    ("TriuBackward0", lambda step, x: x.triu(number(step, "diagonal"))),
    ("DiagEmbedBackward0", _diagonal(torch.diag_embed)),
):
    linear_operation(_name, family="movement", sign="same", replay=_replay)
linear_operation(
    "BlockDiagBackward0",
    family="movement",
    sign="same",
    hides=missing,
    replay=lambda step, *xs: torch.block_diag(*xs),  # type: ignore[no-untyped-call]
)
linear_operation(
    *with_copies("NegBackward0", "NegViewBackward0"), family="movement", exact=True, replay=lambda step, x: -x
)

# Sequences of several lengths, one after the other.


def _pack(step: Any, x: Tensor) -> Tensor:
    batches = step.saved("result1")
    lengths = (batches[:, None] > torch.arange(int(batches[0]))).sum(0)
    packed: Tensor = torch._VF._pack_padded_sequence(x, lengths, step.saved("batch_first"))[0]
    return packed


_moves("PackPaddedSequenceBackward0", replay=_pack, exact=False)
_moves(
    "NestedTensorFromTensorListBackward0",
    "NestedTensorFromMaskBackward0",
    "NestedFromPaddedBackward0",
    "NestedFromPaddedTensorBackward0",
    "NestedViewFromBufferBackward0",
    "NestedViewFromJaggedBackward0",
    "NestedGetValuesBackward0",
    "ValuesBackwardAutogradNestedTensor0",
    "ViewBackwardAutogradNestedTensor0",
    "SqueezeBackwardAutogradNestedTensor0",
    "SqueezeBackwardAutogradNestedTensor1",
    "SelectBackwardAutogradNestedTensor0",
    "UnbindBackwardAutogradNestedTensor0",
    "ChunkBackwardAutogradNestedTensor0",
    exact=False,
)
_moves("ToPaddedTensorBackward0", hides=always, sign="", exact=False)


@dataclass(frozen=True)
class Joined(VJP):
    """m_x = the parts' m, put together again to a nested tensor (exact: linear). PyTorch's own derivative reads beyond
    the end of a list."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        dim = number(step)
        parts = step.saved("self").split_with_sizes(step.saved("split_sizes"), dim)
        return [torch.cat([torch.zeros_like(x) if g is None else g for x, g in zip(parts, grads, strict=True)], dim)]


_moves("SplitWithSizesBackwardAutogradNestedTensor0", rule=Joined(), exact=False)

_moves("ToMkldnnBackward0", replay=lambda step, x: x.to_mkldnn(), exact=False)
_moves("MkldnnReshapeBackward0", replay=_like_output, exact=False)

blocked("autograd records chunk as split and has no derivative of this node", "ChunkBackward0")

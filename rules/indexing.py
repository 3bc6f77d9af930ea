"""Gathering, masking, writing by index: every output element is one element of an operand, or a sum of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import (
    VJP,
    Grads,
    Operation,
    Rule,
    Step,
    blocked,
    divide,
    linear_operation,
    missing,
    register,
)
from dynlrp.rules.shape import always, number

# Reading.


def _reads(*names: str, **traits: Any) -> None:
    linear_operation(*names, **{"family": "indexing", "operands": "+", "copies": True, "sign": "same", **traits})


def _index(step: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.index(x, step.saved("indices"))
    return result


def _indices(step: Any) -> tuple[Tensor, tuple[int, ...]] | None:
    found = [(place, index) for place, index in enumerate(step.saved("indices")) if index is not None]
    if len(found) != 1 or found[0][1].dtype in (torch.bool, torch.uint8):  # of several none is the id; masks
        return None
    ((place, index),) = found
    whole = range(len(step.node._input_metadata[0].shape))
    return index, (*whole[:place], *whole[place + index.ndim :])


def _rows(step: Any) -> tuple[Tensor, tuple[int, ...]]:
    count, dim = len(step.node._input_metadata[0].shape), number(step)
    return step.saved("index"), tuple(d for d in range(count) if d != dim % count)


def _entries(step: Any) -> tuple[Tensor, tuple[int, ...]]:
    return step.saved("index"), ()


_reads("IndexBackward0", "UnsafeIndexBackward0", replay=_index, selects=_indices)
_reads("IndexSelectBackward0", replay=lambda step, x: x.index_select(number(step), step.saved("index")), selects=_rows)
_reads("GatherBackward0", replay=lambda step, x: x.gather(number(step), step.saved("index")), selects=_entries)
_reads("TakeBackward0", replay=lambda step, x: x.take(step.saved("index")), selects=_entries)
_reads("MaskedSelectBackward0", replay=lambda step, x: x.masked_select(step.saved("mask")))
_reads("WhereBackward0", replay=lambda step, a, b: torch.where(step.saved("condition"), a, b), hides=missing)

# Filling. The value is not recorded where it is a number; relevance of one other than 0 shows in the ledger.
_reads(
    "MaskedFillBackward0", "IndexFillBackward0", "ScatterBackward1", "UnsafeMaskedIndexBackward0", hides=always, sign=""
)
_reads("MaskedFillBackward1", replay=lambda step, x, v: x.masked_fill(step.saved("mask"), v), hides=missing)
_reads(
    "IndexFillBackward1",
    replay=lambda step, x, v: x.index_fill(number(step), step.saved("index"), v),
    hides=missing,
)

# Writing.


@dataclass(frozen=True)
class Written(VJP):
    """m_x = m outside of the places written to, m_v = m there: what is written over has no relevance (exact: every
    output element is one input element). Of several values written to one place the last one stays, and autograd gives
    the derivative to all of them; here the replay tells which it was."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        into, values = step.vjp(grads)
        if values is not None and step.wants[1] and not _adds(step):
            assert step.operation.replay is not None
            # Numbers the values, writes the numbers, and reads at each value's place what stands there.
            dtype = (
                torch.int32 if values.numel() < 2**31 else torch.int64
            )  # as the board is as large as what is written to
            order = torch.arange(values.numel(), device=g.device, dtype=dtype).reshape(values.shape)
            board = step.operation.replay(step, torch.empty_like(g, dtype=dtype), order)
            values = torch.where(step.operation.math(step, board).reshape(values.shape) == order, values, 0.0)
        return [into, values]


def _adds(step: Any) -> bool:
    return bool(getattr(step.node, "_saved_accumulate", False))


def _index_put(step: Any, x: Tensor, values: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.index_put(x, step.saved("indices"), values, _adds(step))
    return result


for _name, _write, _read in (
    (
        "ScatterBackward0",
        lambda step, x, v: x.scatter(number(step), step.saved("index"), v),
        lambda step, x: x.gather(number(step), step.saved("index")),
    ),
    (
        "IndexCopyBackward0",
        lambda step, x, v: x.index_copy(number(step), step.saved("index"), v),
        lambda step, x: x.index_select(number(step), step.saved("index")),
    ),
    (
        "PutBackward0",
        lambda step, x, v: x.put(step.saved("index"), v, _adds(step)),
        lambda step, x: x.take(step.saved("index")),
    ),
    *((name, _index_put, _index) for name in ("IndexPutBackward0", "IndexPutImplBackward0", "UnsafeIndexPutBackward0")),
):
    register(
        Operation(
            _name,
            "indexing",
            rule=Written(),
            operands="+",
            copies=lambda adds: not adds,
            facts=lambda node: bool(getattr(node, "_saved_accumulate", False)),
            sign="same",
            replay=_write,
            hides=missing,
            math=_read,
        )
    )


def _masked_scatter(step: Any, x: Tensor, values: Tensor) -> Tensor:
    return x.masked_scatter(step.saved("mask"), values)


_reads("MaskedScatterBackward0", replay=_masked_scatter, hides=missing)

# Adding.


def _index_add(step: Any, x: Tensor, source: Tensor) -> Tensor:
    return x.index_add(number(step), step.saved("index"), source, alpha=step.saved("alpha"))


def _masked_add(step: Any, x: Tensor, values: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._unsafe_masked_index_put_accumulate(
        x, step.saved("mask"), step.saved("indices"), values
    )
    return result


for _name, _replay in (
    ("IndexAddBackward0", _index_add),
    ("ScatterAddBackward0", lambda step, x, v: x.scatter_add(number(step), step.saved("index"), v)),
    ("UnsafeMaskedIndexPutAccumulateBackward0", _masked_add),
):
    linear_operation(_name, family="indexing", operands="+", replay=_replay, hides=missing)


@dataclass(frozen=True)
class Reduced(Rule):
    """Sums, means, maxima and products by index (scatter_reduce, index_reduce).

    Sums and means are linear, m_x = J^T m. A maximum goes in equal parts to all that equal it. Each of the n factors of
    a product takes its VJP divided by n (Achtibat et al. 2024); an operand that does not carry the signal is a
    coefficient, but for the places where it stands alone.
    """

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g, kind = grads[0], step.saved("reduce")
        if g is None or kind in ("sum", "mean"):
            return step.vjp(grads)
        into, source, result = step.saved("self"), step.saved(step.operation.saved[1]), step.saved("result")
        dim, index = number(step), step.saved("index")
        if step.operation.name == "IndexReduceBackward0":
            index = index.reshape([-1 if d == dim % source.ndim else 1 for d in range(source.ndim)]).expand_as(source)
        count = torch.zeros_like(result).scatter_add(dim, index, torch.ones_like(source))
        kept = (count == 0) | step.saved("include_self")
        if kind == "prod":
            if not step.signals[0]:
                kept = kept & (count == 0)
            if not step.signals[1]:
                count = count * ~kept
            first, second = step.vjp([g / (count + kept).clamp(min=1)])
            return [
                None if first is None else first * kept,
                None if second is None else second * (count > 0).gather(dim, index),
            ]
        # Autograd counts an old value among the largest even where it is left out.
        kept = kept & (into == result)
        largest = source == result.gather(dim, index)
        part = g / (kept + torch.zeros_like(result).scatter_add(dim, index, largest.to(result.dtype))).clamp(min=1)
        return [part * kept, part.gather(dim, index) * largest]


for _name, _source in (("ScatterReduceBackward0", "src"), ("IndexReduceBackward0", "source")):
    register(
        Operation(
            _name,
            "reduction",
            rule=Reduced(),
            operands="+",
            saved={0: "self", 1: _source},
            result="result",
            sign="same",
            hides=missing,
        )
    )

# Tables.


def _embedding(step: Any, weight: Tensor) -> Tensor:
    return weight[step.saved("indices")]


@dataclass(frozen=True)
class Lookup(VJP):
    """m_row = the sum of m over all uses of the row: relevance of an embedding table (exact: linear). The VJP would
    leave out the padding row, and weigh rows by their frequency where the layer asks for that in training."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None]
        rows: Any = step.saved("weight_sym_argsize_0")
        table = g.new_zeros(rows, g.shape[-1])
        return [table.index_add_(0, step.saved("indices").reshape(-1), g.reshape(-1, g.shape[-1]))]


register(
    Operation(
        "EmbeddingBackward0", "embedding", lookup="indices", rule=Lookup(), operands="+", copies=True, replay=_embedding
    )
)


@dataclass(frozen=True)
class Bag(Rule):
    """Sums, means and maxima over the rows of a table that an index looks up.

    Sum and mean are linear in the table, m_x = J^T m, and a maximum chooses. A weight per look-up is a factor: with a
    table that does not depend on the inputs it takes all where it carries the signal, else half (Achtibat et al. 2024).
    """

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        results: list[Tensor | None] = [None, None]
        if g is None:
            return results
        if step.signals[0] or not step.signals[1]:
            # Without the weighing of rows by their frequency that the layer may ask for in training.
            results[0] = torch.ops.aten._embedding_bag_backward(
                g,
                step.saved("indices"),
                step.saved("offsets"),
                *(step.saved(f"result{i}") for i in (1, 2, 3)),
                step.saved("weight_sym_argsize_0"),
                False,
                step.saved("mode"),
                False,
                step.saved("per_sample_weights"),
                number(step, "padding_idx"),
            )
        if step.signals[1]:
            results[1] = step.vjp(grads)[1]
        return [None if m is None else m / 2 for m in results] if all(step.signals) else results


def _bag(step: Any, table: Tensor | None, weights: Tensor | None) -> Tensor:
    table = step.saved("weight") if table is None else table
    weights = step.saved("per_sample_weights") if weights is None else weights
    bags, offsets = step.node._input_metadata[0].shape[0], step.saved("offsets")
    result: Tensor = torch.ops.aten._embedding_bag_forward_only(
        table,
        step.saved("indices"),
        offsets,
        False,
        step.saved("mode"),
        False,
        weights,
        offsets.numel() > bags,  # the last one is the end
        number(step, "padding_idx"),
    )[0]
    return result


def per_lookup(step: Any, relevance: Tensor, table: Tensor | None) -> Tensor:
    """Relevance of every index in bags, from that of the bags: by what its row adds to each."""
    indices, weights = step.saved("indices"), step.saved("per_sample_weights")
    table = step.saved("weight").detach() if table is None else table  # saved where the weights carry the signal
    ends = torch.cat([step.saved("offsets"), step.saved("offsets").new_tensor([indices.numel()])])
    bags = torch.arange(indices.numel(), device=indices.device)
    bags = torch.searchsorted(ends, bags, right=True) - 1
    parts = table[indices] * (1 if weights is None else weights.detach()[:, None])
    parts = parts * (indices != number(step, "padding_idx"))[:, None]
    if step.saved("mode") == 2:
        parts = parts * (step.saved("result3")[bags] == indices[:, None])
    whole = torch.zeros_like(relevance).index_add(0, bags, parts.to(relevance.dtype))
    found: Tensor = (parts * divide(relevance, whole, 0.0)[bags]).sum(1)
    return found


register(
    Operation(
        "EmbeddingBagBackward0",
        "embedding",
        rule=Bag(),
        lookup="indices",
        operands="+*",
        saved={0: "weight"},
        replay=_bag,
        rows=per_lookup,
    )
)
blocked(
    "autograd has no derivative of it: call the layer, which renormalises its table under no_grad",
    "EmbeddingRenormBackward0",
)

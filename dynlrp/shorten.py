"""Fewer steps in a recorded program: no views that change nothing, no views of views, none that is there already.

Of a transformer's program every third step is a view, and where operations are small each costs as much as another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten: Any = torch.ops.aten

RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default})
SWAPS = frozenset({aten.t.default, aten.transpose.int})
VIEWS = RESHAPES | SWAPS | {
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.alias.default,
}  # fmt: skip
"""Operations that make the same whenever they are given the same, as they make no numbers."""


def shorten(module: fx.GraphModule) -> None:
    """Leave out views that are not needed. What is written in place is seen as before, as views share their memory."""
    nodes = list(module.graph.nodes)
    if any(torch.Tag.inplace_view in getattr(node.target, "tags", ()) for node in nodes):
        return  # which turn a tensor that has been seen already
    known: dict[Any, fx.Node] = {}
    for node in nodes:
        if node.op != "get_attr" and node.target not in VIEWS:
            continue
        if node.target in RESHAPES:
            while node.args[0].target in RESHAPES and node.args[0].args[0].meta["val"].is_contiguous():
                node.update_arg(0, node.args[0].args[0])
        same = _unchanged(node) or known.setdefault((node.target, node.args, *node.kwargs.items()), node)
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _unchanged(node: fx.Node) -> Any:
    """The node before it that has the same entries in the same places, if it is known."""
    if node.target in RESHAPES:
        source: Any = node.args[0]
        return source if source.meta["val"].shape == node.meta["val"].shape else None
    if node.target in SWAPS:
        source = node.args[0]
        return source.args[0] if source.target in SWAPS and _swapped(source) == _swapped(node) else None
    return None


def _swapped(node: fx.Node) -> set[int]:
    """The dimensions that a transposition swaps; those of a vector none."""
    dimensions = node.meta["val"].ndim
    if node.target is aten.t.default:
        return set(range(dimensions)) if dimensions == 2 else set()
    first, second = node.args[1:]
    return {first % dimensions, second % dimensions} if dimensions else set()

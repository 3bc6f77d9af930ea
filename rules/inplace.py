"""Writes into views of a tensor (``x[:, 0] = y``), which autograd records as one node of unknown content."""

from __future__ import annotations

from typing import Any

import torch

from dynlrp.rules.operation import Operation, register

MANY = 8
"""Fewer elements may have the same derivative by chance."""


def _passes(node: Any) -> bool:
    """Whether every element of the tensor is passed on, dropped or scaled by one number.

    The node does not tell which operation wrote. If its derivative is 0 or 1 it was a copy, a sum or a fill, or acts
    like one: linear up to a constant. One other number, for many elements and with no second operand, is a scaling
    (a function of equal numbers would look the same). Anything else may be linear, or may not be.
    """
    metadata = node._input_metadata[0]
    ones = torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)
    result = node(ones)
    passed, *others = result if isinstance(result, tuple) else (result,)
    if passed is None:
        return True
    scaled = passed[(passed != 0) & (passed != 1)]
    if not len(scaled):
        return True
    return len(scaled) >= MANY and all(o is None for o in others) and bool((scaled == scaled[0]).all())


register(
    Operation(
        "torch::autograd::CopySlices",
        "movement",
        operands="+",
        facts=_passes,
        hides=lambda facts, present: True,
        blocked=lambda passes: (
            ""
            if passes
            else "an operation that is no copy, sum, fill or scaling by a number wrote into a view in place, and "
            "autograd does not tell which: write it out of place, x = torch.cat([f(x[:1]), x[1:]]) instead of f_(x[:1])"
        ),
    )
)

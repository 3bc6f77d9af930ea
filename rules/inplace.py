"""Writes into views of a tensor (``x[:, 0] = y``), which autograd records as one node of unknown content."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from dynlrp.rules.operation import Operation, register

KINKS = frozenset(
    {"HardtanhBackwardBackward0", "LeakyReluBackwardBackward0", "SgnBackward0", "ThresholdBackwardBackward0"}
)
"""What makes derivatives out of pieces that are constant."""


class _Calls(TorchFunctionMode):
    """Whether Python calls torch: the backward of a custom function does, autograd's own derivatives do not."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = True
        return func(*args, **(kwargs or {}))


def _passes(node: Any) -> bool:
    """Whether what was written is linear, up to a constant, in all recorded operands together.

    The node does not tell which operation wrote; its derivatives do. Recorded as they are computed, they depend on no
    operand: the old values and what is written to them are added, copied, dropped, or scaled by constants. The
    derivative of a piecewise linear function (relu) depends on the old values by their sign alone. No number is
    looked at, so that fake tensors will do.
    """
    metadata = node._input_metadata[0]
    ones = torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)
    with torch.enable_grad(), _Calls() as calls:
        result = node(ones)
    old, *written = result if isinstance(result, tuple) else (result,)
    called = calls.seen and not isinstance(ones, FakeTensor)  # which are made in Python themselves
    if called or any(x is not None and x.requires_grad for x in written):
        return False
    return old is None or old.grad_fn is None or _is_piecewise(old.grad_fn)


def _is_piecewise(derivative: Any) -> bool:
    waiting = [derivative]
    for node in waiting:  # which grows
        if node.name() in ("torch::autograd::CopySlices", "MulBackward0"):
            waiting += [child for child, _ in node.next_functions if child is not None]
        elif node.name() not in KINKS:
            return False
    return True


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
            else "an operation that is no copy, sum, fill, scaling by a constant or piecewise linear function wrote "
            "into a view in place, and autograd does not tell which: write it out of place, "
            "x = torch.cat([f(x[:1]), x[1:]]) instead of f_(x[:1])"
        ),
    )
)

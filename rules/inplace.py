"""Writes into views of a tensor (``x[:, 0] = y``), which autograd records as one node of unknown content."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from dynlrp.rules.operation import Grads, Operation, Rule, Step, inner, register

WRITE = "torch::autograd::CopySlices"
LINEAR = "linear"
KINKS = frozenset(
    {"HardtanhBackwardBackward0", "LeakyReluBackwardBackward0", "SgnBackward0", "ThresholdBackwardBackward0"}
)
"""What makes derivatives out of pieces that are constant."""


class _Customs(TorchFunctionMode):
    """Whether the backward of a custom function calls torch, into whose derivative autograd does not see."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = None if self.seen else sys._getframe(1)
        while frame is not None and frame.f_code is not _written.__code__:
            if isinstance(frame.f_locals.get("self"), BackwardCFunction):
                self.seen = True
            frame = frame.f_back
        return func(*args, **(kwargs or {}))


class Binary(NamedTuple):
    """``old = function(old, other)``. Its derivative by ``old`` is an operation of the same name, of what arrives and
    of ``other``."""

    function: Callable[[Tensor, Tensor], Tensor]
    operands: str
    old: Callable[[Any], Tensor]
    """The old values, from the node of the derivative by ``other``."""


BINARY = {
    "MulBackward0": Binary(operator.mul, "+*", lambda d: d._saved_other),
    # -g * (old / other / other)
    "DivBackward0": Binary(operator.truediv, "+-", lambda d: _child(_child(d, 1), 0)._saved_self),
}


def _child(node: Any, number: int) -> Any:
    """The node of an operand; None where there is none."""
    below = node.next_functions if node is not None else ()
    return below[number][0] if number < len(below) else None


def _ones(node: Any) -> Tensor:
    made = node._input_metadata[0]
    return torch.ones(made.shape, dtype=made.dtype, device=made.device)


def _written(node: Any) -> str:
    """What was written: :data:`LINEAR` where it is linear, up to a constant, in all recorded operands together; a name
    in :data:`BINARY`; or an empty string.

    The node does not tell which operation wrote; its derivatives do. Recorded as they are computed, those of linear
    ones depend on no operand: the old values and what is written to them are added, copied, dropped, or scaled by
    constants. The derivative of a piecewise linear function (relu) depends on the old values by their sign alone. No
    number is looked at, so that fake tensors will do.
    """
    with torch.enable_grad(), _Customs() as customs:
        result = node(_ones(node))
    old, *written = result if isinstance(result, tuple) else (result,)
    if customs.seen:
        return ""
    by_old: Any = None if old is None else old.grad_fn
    if not any(x is not None and x.requires_grad for x in written):
        return LINEAR if by_old is None or _is_piecewise(by_old) else ""
    part = _child(by_old, 1)
    if part is None or by_old.name() != WRITE or part.name() not in BINARY:
        return ""
    return str(part.name()) if part.next_functions[1] == node.next_functions[1] else ""


def _is_piecewise(derivative: Any) -> bool:
    waiting = [derivative]
    for node in waiting:  # which grows
        if node.name() in (WRITE, "MulBackward0"):
            waiting += [child for child, _ in node.next_functions if child is not None]
        elif node.name() not in KINKS:
            return False
    return True


@dataclass(frozen=True)
class Within(Rule):
    """Only a part of a tensor is multiplied or divided, ``y[a] *= x``: m_y = m outside of it. Inside, the operation is
    explained as it is out of place, by the rule that it has there (exact: the same function)."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None, None]
        node: Any = step.node  # type: ignore[attr-defined]
        with torch.enable_grad():
            by_old, by_other = node(_ones(node).to(g.dtype).requires_grad_())  # in the precision of relevance
        write = by_old.grad_fn
        part = _child(write, 1)
        kind = BINARY[part.name()]
        factors: tuple[Tensor, Tensor] = (kind.old(by_other.grad_fn), part._saved_other)
        values = [value.to(torch.promote_types(value.dtype, g.dtype.to_real())) for value in factors]
        outside, inside = write(g)
        old, other = step.expand(lambda _, x, y: kind.function(x, y), values, [inside])
        if old is None:
            return [outside, other]
        if not step.signals[0]:  # of an observed parameter, which as a factor has none of the output
            step.book("parameters", -inner(old, values[0].detach()))
        place = _child(part, 0)
        while place.name() != "torch::autograd::CopyBackwards":  # views, which put it back where it is from
            old, place = place(old), _child(place, 0)
        return [outside + old, other]


register(
    Operation(
        WRITE,
        "movement",
        operands="+",
        facts=_written,
        hides=lambda written, present: True,
        variants={
            name: Operation(WRITE, "movement", rule=Within(), operands=kind.operands) for name, kind in BINARY.items()
        },
        blocked=lambda written: (
            ""
            if written
            else "an operation that is no copy, sum, fill, product or quotient (of real numbers) or piecewise linear "
            "function wrote into a view in place, and autograd does not tell which: write it out of place, "
            "x = torch.cat([f(x[:1]), x[1:]]) instead of f_(x[:1])"
        ),
    )
)

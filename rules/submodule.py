"""A whole call of a module as one operation.

Its operands are the tensors that the module was called with, in order (positional arguments, then keyword arguments,
containers flattened), and behind them the other tensors of the graph that it used; its outputs are the tensors that it
returned. Parameters of the module get nothing. What goes in by the outputs and does not come out by the operands is
booked as held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dynlrp.rules.operation import Gauge, Grads, Need, Operation, Rule, Step, StepShape, register

SUBMODULE = "submodule"

Function = Callable[[nn.Module, Grads, Sequence[Tensor], Grads], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Whole(Rule):
    """A whole module by a function of yours, ``function(module, arrived, inputs, outputs)``.

    ``arrived`` has a multiplier for every tensor that the module returned, None where no relevance arrives. ``inputs``
    are the values of all tensors that it was called with, ``outputs`` those of the returned ones where something
    arrived. The function returns one multiplier ``m`` of the shape of each input, so that ``R = x * m``, or None where
    there is none; a rule that conserves has ``sum x m = sum y m'`` (exact: it is whatever the function says). With
    ``gauge="relevance"`` it is given relevance of the outputs and returns relevance of the inputs.
    """

    function: Function
    gauge: Gauge = "multiplier"

    families = frozenset({SUBMODULE})

    @property
    def consumes(self) -> Gauge:
        return self.gauge

    @property
    def emits(self) -> Gauge:
        return self.gauge

    def needs(self, step: StepShape) -> Sequence[Need]:
        inputs = [Need(i) for i, present in enumerate(step.present) if present]
        return [*inputs, *(Need(None, output=number) for number in step.outputs)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        inputs = [step.operand(i) if step.present[i] else x for i, x in enumerate(step.saved("inputs"))]
        outputs = [None if g is None else step.output(number) for number, g in enumerate(grads)]
        count = step.saved("returned")
        found = list(self.function(step.saved("module"), grads[:count], inputs, outputs[:count]))
        if len(found) != len(inputs):
            raise ValueError(f"the function returned {len(found)} values for {len(inputs)} tensors")
        return found + [None] * (len(step.present) - len(found))


register(Operation(SUBMODULE, SUBMODULE, leftover="held back"))

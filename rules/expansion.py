"""Operations that are re-run in plain operations, inside which relevance walks on by the same composite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.rules.operation import Grads, Need, Operation, Replay, Rule, Step, StepShape, register


@dataclass(frozen=True)
class Expand(Rule):
    """f = g_n(... g_1(x)): the operation's replay, recorded and explained in its place (exact: the same function). It
    books what its inner operations book."""

    books = True

    def needs(self, step: StepShape) -> Sequence[Need]:
        if not isinstance(step.operation.rule, Expand):
            raise InputError(
                f"{step.operation.name} has no re-run in plain operations, so Expand cannot explain it: give one with "
                f"dynlrp.rules.expand(), and for a whole module a Composite in place of the rule"
            )
        return [Need(i) for i, present in enumerate(step.present) if present]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        values = [step.operand(i) if present else None for i, present in enumerate(step.present)]
        assert step.operation.replay is not None
        return step.expand(step.operation.replay, values, grads)


def expand(name: str, function: Replay, family: str = "composite", **traits: Any) -> None:
    """Explain an operation by ``function(step, *operand values)``, the same in plain differentiable operations.

    It returns the output, or a tuple with an entry for every output of the node (None where no relevance arrives
    ever). Operands that autograd did not record are None; their values come from ``step.saved``.
    """
    register(Operation(name, family, **{"rule": Expand(), "operands": "+", "replay": function, **traits}))

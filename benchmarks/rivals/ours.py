"""dynlrp itself, with each of its composites."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method
from dynlrp import COMPOSITES, Composite, explain


def relevance(case: Case, target: Tensor | None, composite: str | Composite) -> Tensor:
    """One explanation."""
    wanted = None if target is None else target.tolist()
    explanation = explain(case.model, case.inputs, wanted, composite=composite, output=case.output)
    found: Tensor = explanation.relevance if case.name is None else explanation.relevance[case.name]
    return found


METHODS = [
    Method(f"dynlrp {name}", partial(relevance, composite=composite), composite=composite)
    for name, composite in COMPOSITES.items()
]

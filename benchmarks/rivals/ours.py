"""dynlrp itself, with each of its composites: a pass at every call, and a program that is traced at the first one."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method
from dynlrp import COMPOSITES, Composite, Explanation, Program, explain, trace


def relevance(case: Case, target: Tensor | None, composite: str | Composite) -> Tensor:
    """One explanation."""
    wanted = None if target is None else target.tolist()
    return _of_x(case, explain(case.model, case.inputs, wanted, composite=composite, output=case.output))


def by_program(case: Case, target: Tensor | None, composite: str | Composite, **compiled: str) -> Tensor:
    """The same by the program of this model, inputs and target; one of each composite is kept."""
    wanted = None if target is None else target.tolist()
    key, name = (case.model, case.x.shape, str(wanted)), f"{composite} {compiled}"
    if name not in _programs or _programs[name][0] != key:
        _programs.pop(name, None)
        program = trace(case.model, case.inputs, wanted, composite=composite, output=case.output)
        _programs[name] = key, program.compile(**compiled) if compiled else program
    return _of_x(case, _programs[name][1](case.inputs))


_programs: dict[str, tuple[object, Program]] = {}


def _of_x(case: Case, explanation: Explanation) -> Tensor:
    found: Tensor = explanation.relevance if case.name is None else explanation.relevance[case.name]
    return found


METHODS = [
    Method(f"{way} {name}", partial(function, composite=name), composite=composite)
    for name, composite in COMPOSITES.items()
    for way, function in {
        "dynlrp": relevance,
        "program": by_program,
        "CUDA graph": partial(by_program, backend="cudagraphs"),
        "compiled": partial(by_program, mode="reduce-overhead"),
    }.items()
]

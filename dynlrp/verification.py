"""Does an explanation of a model add up, and how long does it take: :func:`verification`, as plain data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynlrp.errors import described
from dynlrp.explain import explain
from dynlrp.explanation import Explanation
from dynlrp.inputs import as_dicts, call
from dynlrp.target import Seed, Target, find_output, make_seed

TIMED = 1.5
"""Seconds after which times that were taken three times are not taken again."""


class Balances(NamedTuple):
    """Nodes of one operation that relevance passed, and those whose own balance is known and closes."""

    nodes: int
    closed: int


@dataclass(frozen=True)
class Unbalanced:
    """Nodes of one operation in one module that did not let through what they got, or nobody knows."""

    operation: str
    path: str
    nodes: int
    error: float
    """What is missing at the worst of them, relative to the largest amount of the explanation."""
    unknown: str
    """Why a balance is not known; else empty."""

    def __str__(self) -> str:
        return f"balance unknown: {self.unknown}" if self.unknown else f"its own balance is open by {self.error:.1e}"


@dataclass(frozen=True)
class Verification:
    """What an explanation of a model with weights gave."""

    balances: Mapping[str, Balances] = field(default_factory=dict)
    """By operation, from the audit of every node."""
    unbalanced: tuple[Unbalanced, ...] = ()
    residual: float = 0.0
    """What the ledger misses, relative to its largest amount."""
    closes: bool = False
    finite: bool = False
    unchanged: bool = False
    """The explained output is, bit for bit, what the model gives without dynlrp."""
    gradient_seconds: float = 0.0
    """Forward pass and gradient of the inputs."""
    explain_seconds: float = 0.0
    float64: bool = False
    """Balances and residual are those of a copy in float64: in the model's own precision they are open by rounding."""
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the explanation can be relied on: no balance is open, that of the whole or that of a node."""
        balanced = self.closes and all(one.unknown for one in self.unbalanced)
        return balanced and self.finite and self.unchanged and not self.error

    @property
    def ratio(self) -> float:
        """The time of an explanation against forward and gradient."""
        return self.explain_seconds / self.gradient_seconds if self.gradient_seconds else 0.0


def verification(model: Callable[..., Any], inputs: Any, target: Target = None, **options: Any) -> Verification:
    """Explain a model with weights, and take the times; ``options`` are those of :func:`dynlrp.explain`."""
    state = torch.get_rng_state()
    try:
        forward = partial(_forward, model, inputs, target, options.get("output"))
        torch.set_rng_state(state)
        value = forward()[0].value
        explained = partial(explain, model, inputs, target, **options)

        def gradient() -> None:
            _gradient(*forward())

        explained()
        try:
            gradient_seconds, explain_seconds = _shortest([gradient, explained], state)
        except Exception:  # some models refuse: Reformer's own backward pass wants training mode
            gradient_seconds, (explain_seconds,) = 0.0, _shortest([explained], state)
        torch.set_rng_state(state)
        explanation = explain(model, inputs, target, audit=True, **options)
    except Exception as error:  # what is wrong belongs into the report
        return Verification(error=described(error))
    finally:
        torch.set_rng_state(state)
    found = Verification(
        **_judged(explanation),
        finite=explanation.finite(),
        unchanged=torch.equal(explanation.value, value),
        gradient_seconds=gradient_seconds,
        explain_seconds=explain_seconds,
    )
    if not found.passed and explanation.value.dtype is not torch.float64:
        found = _sharper(found, model, inputs, target, options)
    return found


def _sharper(
    found: Verification, model: Callable[..., Any], inputs: Any, target: Target, options: Mapping[str, Any]
) -> Verification:
    """The balances in float64, where all of them close there: then it is rounding that opened them."""
    state = torch.get_rng_state()
    try:
        wide = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
        given = pytree.tree_map(_double, as_dicts(inputs))
        explanation = explain(wide, given, target, audit=True, **options)
        if explanation.value.dtype is not torch.float64:
            return found
        sharper = replace(found, **_judged(explanation), float64=True)
    except Exception:  # a model that fixes its own precision
        return found
    finally:
        torch.set_rng_state(state)
    return sharper if sharper.passed else found


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _judged(explanation: Explanation) -> dict[str, Any]:
    """The balances of every operation, what is wrong with those that do not close, and the ledger's residual."""
    ledger, audit = explanation.ledger, explanation.audit
    assert audit is not None
    balances: dict[str, Balances] = {}
    wrong: dict[tuple[str, str, str], tuple[int, float]] = {}
    for row in audit.rows:
        if not row.rule:  # a source: relevance has left the model
            continue
        problem = audit.problem(row)
        for name in row.operation.split(" + "):  # two, where a linear operation absorbed a batch norm
            nodes, closed = balances.get(name, Balances(0, 0))
            balances[name] = Balances(nodes + 1, closed + (problem is None))
            if problem is not None:
                error, unknown = problem
                nodes, worst = wrong.get((name, row.module, unknown), (0, 0.0))
                wrong[name, row.module, unknown] = nodes + 1, max(worst, error)
    return {
        "balances": balances,
        "unbalanced": tuple(
            Unbalanced(name, path, nodes, error, unknown) for (name, path, unknown), (nodes, error) in wrong.items()
        ),
        "residual": ledger.error,
        "closes": ledger.closes and not ledger.unresolved and not ledger.fallbacks,
    }


def _shortest(runs: Sequence[Callable[[], object]], state: Tensor) -> list[float]:
    """The shortest times of runs that draw the same random numbers and take turns, so that what else the machine does
    meets them alike."""
    times: list[list[float]] = [[] for _ in runs]
    while len(times[0]) < 3 or (sum(map(sum, times)) < TIMED and len(times[0]) < 30):
        for own, run in zip(times, runs, strict=True):
            torch.set_rng_state(state)
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def _forward(
    model: Callable[..., Any], inputs: Any, target: Target, output: str | int | None
) -> tuple[Seed, list[Tensor]]:
    """A plain forward pass: the explained output, and the floating point inputs and embeddings that it depends on."""
    leaves, spec = pytree.tree_flatten(as_dicts(inputs))
    given = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    wanted = [leaf.requires_grad_() for leaf in given if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if isinstance(model, nn.Module):
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        wanted += [table for table in tables if table.requires_grad]
    passed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in given]  # it may be changed in place
    return make_seed(find_output(call(model, pytree.tree_unflatten(passed, spec)), output), target), wanted


def _gradient(seed: Seed, wanted: list[Tensor]) -> None:
    if wanted:  # the graph is retained as a model may keep a part of it for its next call
        torch.autograd.grad(seed.root, wanted, seed.start, allow_unused=True, retain_graph=True)

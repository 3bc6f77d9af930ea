"""Does an explanation of a model add up, and how long does it take: :func:`verification`, as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynlrp.explain import explain, settle
from dynlrp.graph import LEAF
from dynlrp.inputs import as_dicts, call
from dynlrp.target import Seed, Target, find_output, make_seed

Made = TypeVar("Made")

TIMED = 0.3
"""Seconds after which a time is not taken again."""


@dataclass(frozen=True)
class Verification:
    """What an explanation of a model with weights gave."""

    balanced: tuple[str, ...] = ()
    """Operations all of whose nodes let through as much relevance as they got, or booked the rest."""
    residual: float = 0.0
    """What the ledger misses, relative to its largest amount."""
    closes: bool = False
    finite: bool = False
    unchanged: bool = False
    """The explained output is, bit for bit, what the model gives without dynlrp."""
    gradient_seconds: float = 0.0
    """Forward pass and gradient of the inputs."""
    explain_seconds: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the explanation can be relied on."""
        return self.closes and self.finite and self.unchanged and not self.error

    @property
    def ratio(self) -> float:
        """The time of an explanation against forward and gradient."""
        return self.explain_seconds / self.gradient_seconds if self.gradient_seconds else 0.0


def verification(model: Callable[..., Any], inputs: Any, target: Target = None, **options: Any) -> Verification:
    """Explain a model with weights, and take the times; ``options`` are those of :func:`dynlrp.explain`."""
    state = torch.get_rng_state()
    try:
        settled, _ = settle(model, inputs, target, **options)
        forward = partial(_forward, model, inputs, target, options.get("output"))
        torch.set_rng_state(state)
        value = forward()[0].value
        try:
            gradient_seconds, _ = _timed(lambda: _gradient(*forward()), state)
        except Exception:
            gradient_seconds = 0.0  # some models refuse: Reformer's own backward pass wants training mode
        explain_seconds, explanation = _timed(lambda: explain(model, inputs, target, **options), state)
    except Exception as error:  # what is wrong belongs into the report
        return Verification(error=f"{type(error).__name__}: {error}")
    finally:
        torch.set_rng_state(state)
    ledger = explanation.ledger
    closes = ledger.closes and not ledger.unresolved and not ledger.fallbacks
    return Verification(
        balanced=tuple(sorted(set(settled.graph.names) - {LEAF})) if closes else (),
        residual=ledger.error,
        closes=closes,
        finite=explanation.finite(),
        unchanged=torch.equal(explanation.value, value),
        gradient_seconds=gradient_seconds,
        explain_seconds=explain_seconds,
    )


def _timed(run: Callable[[], Made], state: Tensor) -> tuple[float, Made]:
    """The shortest of a few runs that draw the same random numbers, and what the last one made."""
    times: list[float] = []
    while True:
        torch.set_rng_state(state)
        start = time.perf_counter()
        made = run()
        times.append(time.perf_counter() - start)
        if sum(times) > TIMED or len(times) == 3:
            return min(times), made


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
    if wanted:
        torch.autograd.grad(seed.root, wanted, seed.start, allow_unused=True)

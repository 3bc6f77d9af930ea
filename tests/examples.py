"""Examples of operations: functions whose last node is the one in question, and what can be said of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dynlrp import explain, relevance
from dynlrp.rules import REGISTRY
from tests.oracle import TOLERANCE, agrees, draw, matrix, same


class Example(NamedTuple):
    """A function whose last operation is of the node in question, and the shapes of its arguments."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((3, 4),)
    positive: bool = False


Table = dict[str, list[Example]]


def on(*shapes: tuple[int, ...]) -> Callable[..., list[Example]]:
    """Examples on arguments of these shapes."""
    return lambda *functions: [Example(function, shapes) for function in functions]


INDEX = torch.tensor([2, 0, 2])
MASK = torch.tensor([[True, False, True, False], [False, False, True, True], [True, True, True, False]])
VECTOR = draw(77, 4)


def cases(table: Mapping[str, list[Example]]) -> list[Any]:
    return [pytest.param(name, e, id=f"{name}-{i}") for name, many in table.items() for i, e in enumerate(many)]


def inputs(example: Example, seed: int = 0) -> list[Tensor]:
    found = [draw(seed + i, *shape) for i, shape in enumerate(example.shapes)]
    return [x.abs() + 0.1 for x in found] if example.positive else found


def apart(example: Example) -> list[Tensor]:
    """Arguments whose entries, of either sign, are at least 0.05 from zero and from each other."""
    sizes = [torch.Size(shape).numel() for shape in example.shapes]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(5)).double() / sum(sizes) * 4 - 1.97
    return [x.reshape(shape) for x, shape in zip(order.split(sizes), example.shapes, strict=True)]


def registered(module: ModuleType) -> set[str]:
    """Names of the operations that a file of rules enters."""
    assert module.__file__ is not None
    with open(module.__file__) as file:
        text = file.read()
    return {name for name in REGISTRY if f'"{name}"' in text or f'"{name.removesuffix("_copy")}"' in text}


def is_of(name: str, example: Example) -> None:
    """The example's last node is the one in question."""
    y = example.function(*(x.requires_grad_() for x in inputs(example)))
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name


def linear(example: Example, moves: bool = True) -> None:
    """The function is linear in all its arguments together."""
    x, y = inputs(example), inputs(example, 20)
    one, other = example.function(*x), example.function(*y)
    assert not bool(example.function(*(torch.zeros_like(a) for a in x)).any())
    both = example.function(*(a + b for a, b in zip(x, y, strict=True)))
    exact = one.dtype == torch.float64
    same(both.double(), (one + other).double(), 1e-14 if exact else 1e-2)
    same(example.function(*(-3 * a for a in x)).double(), -3 * one.double(), 1e-14 if exact else 1e-2)


def matrices(example: Example) -> list[Tensor]:
    """One matrix per argument, by sending unit vectors through the forward pass with the others at zero."""
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in example.shapes]

    def part(i: int) -> Callable[[Tensor], Tensor]:
        return lambda x: example.function(*zeros[:i], x.clone(), *zeros[i + 1 :]).double()  # not a view

    return [matrix(part(i), shape) for i, shape in enumerate(example.shapes)]


def slopes(example: Example, at: list[Tensor]) -> list[Tensor]:
    """The same for a piecewise linear function, by steps that cross no kink."""

    def part(i: int) -> Callable[[Tensor], Tensor]:
        return lambda e: (
            (
                example.function(*at[:i], at[i] + 0.01 * e, *at[i + 1 :])
                - example.function(*at[:i], at[i] - 0.01 * e, *at[i + 1 :])
            )
            / 0.02
        )

    return [matrix(part(i), shape) for i, shape in enumerate(example.shapes)]


def passes(example: Example, at: list[Tensor], maps: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Relevance of every argument is ``x * J^T m`` with the given matrices and the ledger closes; so it is where the
    other arguments are constants, or weights, and what they contribute is booked as theirs."""
    y = example.function(*at)
    m = draw(9, *y.shape).to(y.dtype)
    wanted = [x * (j @ m.double().flatten()).reshape(x.shape) for x, j in zip(at, maps, strict=True)]

    def score(y: Tensor) -> Tensor:
        return (y * m).sum()

    scale = max(1e-30, *(float(w.abs().max()) for w in wanted))
    for i in range(-1, len(at) if len(at) > 1 else -1):  # -1: all arguments are inputs
        chosen = [n for n in range(len(at)) if i in (-1, n)]
        rest = float(sum(w.sum() for n, w in enumerate(wanted) if n not in chosen))

        def frozen(*xs: Tensor, chosen: list[int] = chosen) -> Tensor:
            values = list(at)
            for n, x in zip(chosen, xs, strict=True):
                values[n] = x
            return example.function(*values)

        if not any(bool(maps[n].any()) for n in chosen):
            assert i >= 0
            continue
        of = [wanted[n] for n in chosen]
        if y.dtype == torch.float64:
            agrees(explain(frozen, tuple(at[n] for n in chosen), score), of, {"constants": rest}, tolerance, scale)
        else:
            (found,) = explain(frozen, tuple(at[n] for n in chosen), score).relevance
            same(found, of[0], 1e-2)
            continue
        if i < 0:
            continue
        leaves = [x.clone().requires_grad_() for x in at]
        explanation = relevance((example.function(*leaves) * m).sum(), [leaves[n] for n in chosen])
        agrees(explanation, of, {"parameters": rest, "constants": 0.0}, tolerance, scale)


def names(tables: Iterable[Table]) -> set[str]:
    return {name for table in tables for name in table}

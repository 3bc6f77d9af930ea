"""Shares by magnitude through every operation that waits for promises, against relevance sent backwards by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dynlrp import Composite, explain, relevance
from dynlrp.rules import REGISTRY, EpsilonSum, Magnitude, Operation
from tests.conftest import calls
from tests.oracle import agrees, draw, same, stabilised

BY_SIZE = Composite.of("magnitude", {"addition": Magnitude()})
LENGTH = 10_000


# A tape of relevance ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Made:
    """A tensor with the step that made it."""

    value: Tensor
    step: Step | None = None
    relevance: Tensor | None = None


@dataclass(eq=False)
class Step:
    """``back`` sends the relevance of all outputs to all operands."""

    operands: list[Made]
    back: Callable[..., Sequence[Tensor]]
    outputs: list[Made] = field(default_factory=list)


class Tape:
    """The operations by hand: values forwards, relevance backwards. ``share(a, b, r)`` splits a sum."""

    def __init__(self, share: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.share, self.steps = share, []  # type: ignore[var-annotated]

    def _step(self, values: Sequence[Tensor], operands: Sequence[Made], back: Callable[..., Any]) -> list[Made]:
        step = Step(list(operands), back)
        step.outputs = [Made(value, step) for value in values]
        self.steps.append(step)
        return step.outputs

    def add(self, a: Made, b: Made) -> Made:
        return self._step([a.value + b.value], [a, b], lambda r: self.share(a.value, b.value, r))[0]

    def sum(self, x: Made, dim: int) -> Made:
        """Every summand its part of the sum."""
        total = x.value.sum(dim, keepdim=True)
        return self._step([total.squeeze(dim)], [x], lambda r: [x.value * (r.unsqueeze(dim) / total)])[0]

    def cat(self, xs: Sequence[Made], dim: int) -> Made:
        sizes = [x.value.shape[dim] for x in xs]
        return self._step([torch.cat([x.value for x in xs], dim)], xs, lambda r: r.split(sizes, dim))[0]

    def stack(self, xs: Sequence[Made], dim: int) -> Made:
        return self._step([torch.stack([x.value for x in xs], dim)], xs, lambda r: r.unbind(dim))[0]

    def split(self, x: Made, size: int, dim: int) -> list[Made]:
        return self._step(x.value.split(size, dim), [x], lambda *r: [torch.cat(r, dim)])

    def unbind(self, x: Made, dim: int) -> list[Made]:
        return self._step(x.value.unbind(dim), [x], lambda *r: [torch.stack(r, dim)])

    def relu(self, x: Made) -> Made:
        return self._step([x.value.relu()], [x], lambda r: [r * (x.value > 0)])[0]

    def scale(self, x: Made, factor: float) -> Made:
        return self._step([x.value * factor], [x], lambda r: [r])[0]

    def explain(self, root: Made, r: Tensor, source: Made) -> Tensor:
        root.relevance = r
        for step in reversed(self.steps):
            if any(y.relevance is not None for y in step.outputs):
                arrived = [torch.zeros_like(y.value) if y.relevance is None else y.relevance for y in step.outputs]
                for x, passed in zip(step.operands, step.back(*arrived), strict=True):
                    x.relevance = passed if x.relevance is None else x.relevance + passed
        assert source.relevance is not None
        return source.relevance


class Torch:
    """The same operations of PyTorch."""

    add, sum, cat, stack = torch.add, torch.sum, torch.cat, torch.stack
    split, unbind, relu, scale = torch.split, torch.unbind, torch.relu, torch.mul


def by_size(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    whole = a.abs() + b.abs()
    unit = torch.where(whole > 0, r / whole, 0.0)
    return a.abs() * unit, b.abs() * unit


def by_epsilon(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = r / stabilised(a + b, 0.1)
    return a * s, b * s


def chain_of_sums(o: Any, x: Any) -> Any:
    for _ in range(20):
        x = o.add(x, o.scale(o.relu(x), 0.5))
    return x


def totals(o: Any, x: Any) -> Any:
    rows, columns = o.sum(x, 0), o.sum(x, 1)
    return o.add(o.add(rows, columns), o.scale(rows, 0.3))


def concatenated(o: Any, x: Any) -> Any:
    y = o.cat([x, o.scale(x, -0.5)], 1)
    y = o.add(y, o.cat([o.relu(x), x], 1))
    return o.cat([y, o.cat([y, y], 0)], 0)


def stacked(o: Any, x: Any) -> Any:
    y = o.stack([x, o.relu(x), o.scale(x, 2.0)], 0)
    y = o.add(y, o.stack([o.scale(x, 0.1), x, x], 0))
    return o.sum(y, 0)


def split(o: Any, x: Any) -> Any:
    a, b = o.split(x, 2, 1)
    c, d = o.split(o.add(a, o.scale(b, -3.0)), 1, 1)
    return o.add(o.add(c, d), o.scale(d, 2.0))


def unbound(o: Any, x: Any) -> Any:
    """A running sum, as a recurrent net makes it."""
    states = o.unbind(x, 0)
    h = states[0]
    for state in states[1:]:
        h = o.add(o.scale(o.relu(h), 0.9), state)
    return h


def one_output_alone(o: Any, x: Any) -> Any:
    return o.add(o.unbind(x, 1)[2], o.unbind(x, 0)[1])


def diamond(o: Any, x: Any) -> Any:
    """Two sums wait for each other's paths: each takes part in what the other adds."""
    a, b = o.scale(x, 0.5), o.relu(x)
    left, right = o.add(a, b), o.add(b, o.scale(a, -2.0))
    return o.add(o.add(left, o.scale(right, 0.7)), o.add(right, o.scale(left, -0.3)))


def nested(o: Any, x: Any) -> Any:
    return o.add(o.add(o.add(x, o.scale(x, 3.0)), o.relu(o.add(x, o.scale(x, -0.4)))), o.scale(o.add(x, x), 0.1))


def shared(o: Any, x: Any) -> Any:
    """Three sums wait for one."""
    h = o.add(x, o.scale(o.relu(x), 2.0))
    return o.cat([o.add(h, x), o.add(h, o.scale(x, -1.5)), o.add(h, h)], 0)


def everything(o: Any, x: Any) -> Any:
    a, b = o.split(o.cat([x, o.relu(x)], 1), 4, 1)
    rows = o.unbind(o.stack([a, b, o.add(a, b)], 0), 1)
    y = o.cat([o.add(rows[0], o.scale(rows[1], -0.5)), rows[2]], 0)
    return o.add(o.sum(y, 0), o.sum(x, 0))


GRAPHS = [
    chain_of_sums, totals, concatenated, stacked, split, unbound, one_output_alone, diamond, nested, shared, everything
]  # fmt: skip


@pytest.mark.parametrize("rule", ["magnitude", "epsilon"])
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_every_waiting_operation(graph: Callable[[Any, Any], Any], rule: str) -> None:
    x, share = draw(1, 4, 4), {"magnitude": by_size, "epsilon": by_epsilon}[rule]
    composite = {"magnitude": BY_SIZE, "epsilon": Composite.of("epsilon", {"addition": EpsilonSum(0.1)})}[rule]
    tape, source = Tape(share), Made(x)
    root = graph(tape, source)
    m = draw(2, *root.value.shape)
    expected = tape.explain(root, root.value * m, source)
    explanation = explain(lambda x: graph(Torch, x), x, lambda y: (y * m).sum(), composite=composite)
    same(explanation.value, (root.value * m).sum().reshape(1))
    # Relevance is divided by sums that cancel, down to a hundredth of their terms.
    agrees(explanation, expected, tolerance=1e-8)
    leaf = x.clone().requires_grad_()
    found = relevance(graph(Torch, leaf), leaf, initial=root.value * m, composite=composite)
    same(found.relevance, expected, 1e-8)


# Costs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def replays(registry: dict[str, Operation], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often every operation was replayed."""
    counts: dict[str, int] = {}

    def counted(operation: Operation) -> Operation:
        def replay(*operands: Any) -> Any:
            counts[operation.name] = counts.get(operation.name, 0) + 1
            assert operation.replay is not None
            return operation.replay(*operands)

        return replace(operation, replay=replay)

    for name in ("AddBackward0", "MulBackward0", "UnbindBackward0", "StackBackward0", "SplitBackward0", "CatBackward0"):
        registry[name] = counted(REGISTRY[name])
    return counts


def test_a_chain_of_ten_thousand_sums(replays: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum waits for the one below it. Each is settled, replayed and visited once."""
    from dynlrp.promise import Promises

    searched = 0
    kept = Promises._kept

    def counted(self: Any, *args: Any) -> Any:
        nonlocal searched
        searched += 1
        return kept(self, *args)

    monkeypatch.setattr(Promises, "_kept", counted)
    shift = torch.full((2,), 1e-4).double().requires_grad_()
    x = torch.tensor([0.5, -2.0]).double().requires_grad_()
    y = x
    for _ in range(LENGTH):
        y = y + shift
    explanation = relevance(y, x, composite=BY_SIZE)
    assert replays["AddBackward0"] == LENGTH - 1  # the last is the output, which is at hand
    assert explanation.promises.visited == LENGTH
    assert explanation.promises.count == LENGTH
    assert searched <= 2 * LENGTH + 2  # once on the way to its operands, and once when they are settled
    # A product of shares: |h| / (|h| + |shift|) for every h on the way.
    expected = y.detach().clone()
    for step in reversed(range(LENGTH)):
        size = (x.detach() + step * 1e-4).abs()
        expected *= size / (size + 1e-4)
    same(explanation.relevance, expected, 1e-6)  # h is a sum of thousands of steps, and may come near zero


def every_generator(x: Tensor, rounds: int) -> Tensor:
    """A chain of sums, diamonds, concatenations, stacks, splits and unbinds: 14 nodes a round."""
    for _ in range(rounds):
        left, right = (x + x.relu() * 0.5).split(1, 1)
        x = torch.cat([right, left * 0.25], 1)
        rows, more = torch.stack([x, x.relu()], 0).unbind(0)
        x = (rows + more) * 0.4 + (more + x) * 0.1
    return x


def work(rounds: int) -> int:
    """Calls of functions for an explanation of a chain."""
    x = torch.tensor([[0.5, -2.0]]).double().requires_grad_()
    y = every_generator(x, rounds)

    def explained() -> None:
        explanation = relevance(y, x, composite=BY_SIZE)
        assert explanation.promises.visited == 14 * rounds
        assert explanation.promises.count >= 4 * rounds
        assert explanation.ledger.error < 1e-10

    return calls(explained)


def test_work_grows_with_the_length_alone(replays: dict[str, int]) -> None:
    """Ten times as many nodes, in all of which promises wait for promises, take ten times the calls; each node is
    replayed once."""
    short = LENGTH // 140 + 1
    assert work(10 * short) <= 10 * work(short)
    rounds = 11 * short
    assert replays["CatBackward0"] == replays["StackBackward0"] == replays["UnbindBackward0"] == rounds
    assert replays["SplitBackward0"] == rounds
    assert replays["AddBackward0"] == 4 * rounds - 2  # the outputs are at hand
    assert replays["MulBackward0"] == 4 * rounds


@pytest.mark.parametrize("steps", [200, 400])
def test_all_parts_of_a_tensor_are_replayed_at_once(replays: dict[str, int], steps: int) -> None:
    """A recurrent net takes a sequence apart, and each of its sums waits for one of the parts."""

    def model(x: Tensor) -> Tensor:
        parts = (x * 2.0).unbind(0)
        h = parts[0]
        for part in parts[1:]:
            h = h + part
        return h

    explain(model, draw(0, steps, 3), torch.sum, composite=BY_SIZE)
    assert replays["UnbindBackward0"] == 1
    assert replays["MulBackward0"] <= 1
    assert replays["AddBackward0"] < steps


# What the graph did not record ------------------------------------------------------------------------------


def test_a_summand_that_is_not_recorded_takes_no_share_and_the_ledger_says_so() -> None:
    class Shift(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1.5

    model = torch.nn.Sequential(torch.nn.Tanh(), Shift(), torch.nn.ReLU())
    x = draw(0, 2, 3)
    explanation = explain(model, x, torch.sum, composite=BY_SIZE)
    # All of the sum's relevance goes on: nothing is split, nothing is a constant.
    same(explanation.relevance, (torch.tanh(x) + 1.5).relu())
    assert explanation.ledger.accounts["constants"] == 0
    assert explanation.ledger.without_share == [("AddBackward0", "1")]
    assert "takes no share: what AddBackward0 in 1 adds" in repr(explanation.ledger)
    # Other rules book it.
    plain = explain(model, x, torch.sum, composite="attnlrp").ledger
    assert plain.without_share == []
    assert abs(plain.accounts["constants"]) > 1
    recorded = explain(lambda x: x + x.tanh(), x, torch.sum, composite=BY_SIZE).ledger
    assert recorded.without_share == []

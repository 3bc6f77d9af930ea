"""Operations that are explained by others: as if the model had been written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import Composite, InputError, RuleError, UnknownOperationError, explain, relevance
from dynlrp.recorder import Recorder
from dynlrp.rules import REGISTRY, Expand, Operation, expand, linear_operation
from dynlrp.rules.operation import blocked
from tests.conftest import Opaque, close, same
from tests.oracle import draw


class Fused(torch.autograd.Function):
    """``gelu(x w + b) * sigmoid(x)`` and its mean over the last dimension, as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(w, b)
        return written_out(x, w, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("the derivative is not asked for")


def written_out(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = F.gelu(x @ w + b) * torch.sigmoid(x)
    return y, y.mean(-1)


def rerun(step: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    return written_out(x, step.saved(0) if w is None else w, step.saved(1) if b is None else b)


class Model(nn.Module):
    """Uses both outputs; the parameters come from this module."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.w = nn.Parameter(draw(1, 4, 4))
        self.b = nn.Parameter(draw(2, 4))
        self.first = nn.Linear(4, 4).double()
        self.first.weight.data, self.first.bias.data = draw(3, 4, 4), draw(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y, mean = Fused.apply(h, self.w, self.b) if self.fused else written_out(h, self.w, self.b)
        return y * 2 + mean.unsqueeze(-1)


@pytest.fixture
def _known(registry: dict[str, Any]) -> None:
    expand("FusedBackward", rerun)


COMPOSITES = ["attnlrp", "cplrp", "epsilon_plus", "epsilon_plus_flat", "dynamiclrp"]


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("composite", COMPOSITES)
def test_equals_the_model_written_out(composite: str) -> None:
    """Relevance, accounts, and relevance of parameters, with two outputs in use."""
    x, names = draw(0, 3, 4), ["w", "b", "first.weight"]
    fused, plain = (explain(Model(f), x, 1, composite=composite, parameters=names) for f in (True, False))
    same(fused, plain)
    assert fused.ledger.closes
    for name in names:
        close(fused.parameters[name], plain.parameters[name])


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("composite", COMPOSITES[:-1])  # magnitudes give what is not recorded no share
def test_frozen_parameters_of_a_function_are_constants(composite: str) -> None:
    x = draw(0, 3, 4)
    fused, plain = (explain(Model(f).requires_grad_(not f), x, 1, composite=composite) for f in (True, False))
    close(fused.relevance, plain.relevance)
    assert fused.ledger.closes
    assert plain.ledger.accounts["parameters"] == pytest.approx(
        fused.ledger.accounts["parameters"] + fused.ledger.accounts["constants"], rel=1e-10
    )


@pytest.mark.usefixtures("_known")
def test_only_one_output_in_use_and_constants() -> None:
    w, b, x = draw(1, 4, 4), draw(2, 4), draw(0, 3, 4)
    for pick in (0, 1):
        results = [
            explain(lambda x, f=f, p=pick: f(x, w, b)[p].sum(), x, torch.sum) for f in (Fused.apply, written_out)
        ]
        same(*results)


@pytest.mark.usefixtures("_known")
def test_relevance_of_a_graph_and_places_of_inner_bookings() -> None:
    model, x = Model(True), draw(0, 3, 4).requires_grad_()
    y = model(x)
    close(relevance(y, x).relevance, explain(Model(False), x.detach(), lambda y: y.sum(1)).relevance)
    ledger = explain(model, x.detach(), 0).ledger
    assert {path for _, path in ledger.by_module()} == {"", "first"}
    assert ("offsets", "SigmoidBackward0") in ledger.by_operation()


def test_expansions_nest(registry: dict[str, Any]) -> None:
    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return inner_plain(x) + x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise AssertionError

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return inner_plain(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise AssertionError

    def inner_plain(x: Tensor) -> Tensor:
        return torch.tanh(x) * torch.sigmoid(x + 1)

    expand("OuterBackward", lambda step, x: Inner.apply(x) + x)
    expand("InnerBackward", lambda step, x: inner_plain(x))
    x = draw(5, 2, 3)
    same(explain(lambda x: Outer.apply(x) * 2, x, 0), explain(lambda x: (inner_plain(x) + x) * 2, x, 0))


def test_relevance_that_ends_inside_is_held_back(registry: dict[str, Any]) -> None:
    expand("FusedBackward", lambda step, x, w, b: (x.detach() @ step.saved(0), None))
    found = explain(lambda x: Fused.apply(x, draw(1, 4, 4), draw(2, 4))[0] + x, draw(0, 3, 4), 0)
    assert found.ledger.accounts["held back"] != 0


def test_errors_name_the_place(registry: dict[str, Any]) -> None:
    blocked("a reason to give", "SigmoidBackward0")
    expand("FusedBackward", rerun)
    with pytest.raises(UnknownOperationError, match=r"SigmoidBackward0 in the model itself: a reason to give"):
        explain(Model(True), draw(0, 3, 4), 0)
    expand("FusedBackward", lambda step, x, w, b: x.nonsense())
    with pytest.raises(RuleError, match="FusedBackward"):
        explain(Model(True), draw(0, 3, 4), 0)


@pytest.mark.parametrize("family", ["elementwise", "dense", "product"])
def test_only_operations_with_a_re_run_can_be_expanded(family: str) -> None:
    composite = Composite.of("c", {family: Expand()})
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Squares()).double()
    with pytest.raises(InputError, match="no re-run in plain operations"):
        explain(model, draw(0, 2, 4), composite=composite)


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.mark.parametrize("wrong", [lambda step, x: x.sum(), lambda step, x: None])
def test_a_re_run_that_gives_something_else_is_an_error(wrong: Callable[..., Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        operation = Operation("SinBackward0", "composite", rule=Expand(), operands="+", replay=wrong, saved={0: "self"})
        patch.setitem(REGISTRY, "SinBackward0", operation)
        with pytest.raises(RuleError, match="the re-run of SinBackward0 gives"):
            explain(lambda x: x.sin().sum(1), draw(0, 2, 4))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every recorder of a re-run."""
    made: list[Recorder] = []

    class Spied(Recorder):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("dynlrp.expansion.Recorder", Spied)
    return made


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus"])
def test_a_re_run_that_keeps_enough_is_not_recorded(composite: str, recorders: list[Recorder]) -> None:
    cell, x = nn.LSTM(4, 5, batch_first=True), draw(0, 2, 6, 4).float()
    explanation = explain(lambda x: cell(x)[0].sum(1), x, 1, composite=composite)
    assert ("inputs", "MkldnnRnnLayerBackward0") not in explanation.ledger.by_operation()
    assert explanation.ledger.closes
    assert recorders == []


def test_a_re_run_that_keeps_too_little_is_recorded(registry: dict[str, Any], recorders: list[Recorder]) -> None:
    """All of its kind are then recorded at once, and what the first try noted does not count."""
    linear_operation("OpaqueBackward")  # which no promise passes
    runs: list[str] = []
    w = draw(1, 4, 4)

    def inner(x: Tensor) -> Tensor:
        h = Opaque.apply(x)
        return F.linear(h, w) + torch.ones(4).double()  # a constant that only the activations tell

    def counted(step: Any, x: Tensor) -> Tensor:
        if hasattr(step, "expand"):  # else the value is recomputed for a promise
            runs.append(step.name)
        return inner(x)

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return inner(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise AssertionError("the derivative is not asked for")

    expand("OuterBackward", counted)
    x = draw(0, 3, 4)
    for composite in ("epsilon_plus", "attnlrp"):
        recorders.clear()
        runs.clear()
        found = explain(lambda x: Outer.apply(Outer.apply(Outer.apply(x))), x, 1, composite=composite)
        assert len(recorders) == 3
        assert len(runs) == 4
        same(found, explain(lambda x: inner(inner(inner(x))), x, 1, composite=composite))
        assert found.ledger.unresolved == []
        assert found.ledger.accounts["constants"] != 0
        assert found.ledger.closes

"""Every error has its situation, and says what is wrong, where, and what helps."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynlrp
from dynlrp import (
    BrokenPromiseError,
    BudgetError,
    CompiledModuleError,
    Composite,
    ConversionError,
    DynLRPError,
    FreedGraphError,
    InputError,
    NonFiniteError,
    NoPathError,
    NotDifferentiableError,
    RuleError,
    TargetError,
    TraceError,
    TrainingModeError,
    UnknownOperationError,
    UnsupportedOperatorError,
    When,
    allocate,
    errors,
    explain,
    explain_many,
    load_onnx,
    relevance,
    rules,
    trace,
)
from dynlrp.allocation.convert import torchao_config
from dynlrp.rules import REGISTRY, Gamma, Operation
from dynlrp.rules.operation import FunctionRule
from tests.conftest import Apply, Opaque, bias_free, close, gradient_x_input

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def file_of(kind: str) -> Any:
    """An ONNX model with one operator of an own domain."""
    helper = pytest.importorskip("onnx").helper
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    node = helper.make_node(kind, ["x"], ["y"], "first", domain="my.domain")
    return helper.make_model(helper.make_graph([node], "graph", [x], [y]))


class Twice(torch.autograd.Function):
    """A linear operation that torch does not know, with an argument that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


class Square(torch.autograd.Function):
    """Not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def strange() -> nn.Sequential:
    """Two unknown operations in two places, one of them twice."""
    model = bias_free(4, 4, 4)
    return nn.Sequential(
        model[0],
        Apply(lambda x: Square.apply(x)),
        nn.Sequential(model[2], Apply(Opaque.apply), Apply(Opaque.apply)),
    )


def training(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), *modules).double().train()


def broken(value: float, where: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Sigmoid()).double()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[0] = value
    return model


def compiled_inside() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].compile()
    return model


def compiled_itself() -> nn.Module:
    model = nn.Linear(4, 4).double()
    model.compile()
    return model


def freed() -> None:
    x = X.clone().requires_grad_()
    output = bias_free(4, 4, 3)(x)
    output.sum().backward()
    relevance(output, x)


def unkept() -> None:
    x = X.clone().requires_grad_()
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    for module in (first, second):
        module.requires_grad_(False)  # the input of a frozen layer is not saved, its bias not in the graph
    relevance(second(first(x)), x, composite=Composite.of("gamma", {"dense": Gamma(0.25)}))


def no_path(function: Callable[[Tensor], Any]) -> Callable[[], Any]:
    return lambda: explain(Apply(function), X, 0)


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


SITUATIONS: dict[str, tuple[type[DynLRPError], Callable[[], Any], Sequence[str]]] = {
    "unknown operations": (
        UnknownOperationError,
        lambda: explain(strange(), X, 0),
        ["OpaqueBackward in 2.1", "OpaqueBackward in 2.2", "SquareBackward in 1", "linear_operation", "rules.rule",
         "on_unknown"],
    ),
    "unknown operation of a function": (
        UnknownOperationError, lambda: explain(Opaque.apply, X, 0), ["OpaqueBackward in the model itself"]
    ),
    "broken promise": (BrokenPromiseError, unkept, ["Gamma", "AddmmBackward0", "require grad"]),
    "freed graph": (FreedGraphError, freed, ["MmBackward0", "retain_graph=True"]),
    "no straight line": (
        TraceError,
        lambda: trace(lambda x: x * 2 if x.sum() > 0 else x, X, 0),
        ["numbers of a tensor", "test_errors.py", "explain()"],
    ),
    "argmax": (NoPathError, no_path(lambda x: x.argmax(1)), ["graph"]),
    "integers": (NoPathError, no_path(lambda x: x.long()), ["graph"]),
    "detached": (NoPathError, no_path(lambda x: x.detach() * 2), ["detach"]),
    "no_grad inside": (NoPathError, no_path(without_graph), ["no_grad"]),
    "through numpy": (NoPathError, no_path(lambda x: torch.from_numpy(x.detach().numpy()) * 2), ["graph"]),
    "parameters alone": (
        NoPathError, lambda: explain(nn.Sequential(Apply(torch.zeros_like), nn.Linear(4, 3).double()), X, 0), ["input"]
    ),
    "only through a coefficient": (NoPathError, no_path(lambda x: x.abs().reciprocal()), ["statistic"]),
    "dropout": (TrainingModeError, lambda: explain(training(nn.Dropout(0.5)), X), ["1", "eval()", "allow_training"]),
    "dropout2d": (
        TrainingModeError, lambda: explain(training(nn.Sequential(nn.Dropout1d(0.5))), X), ["1.0", "eval()"]
    ),
    "functional dropout": (
        TrainingModeError, lambda: explain(lambda x: F.dropout(x, 0.5), X), ["random", "eval()", "allow_training"]
    ),
    "batch norm": (TrainingModeError, lambda: explain(training(nn.BatchNorm1d(4)), X), ["1", "eval()"]),
    "attention dropout": (
        TrainingModeError,
        lambda: explain(training(nn.TransformerEncoderLayer(4, 2, 8, 0.1)), X[None]),
        ["1.", "eval()"],
    ),
    "noise": (TrainingModeError, lambda: explain(lambda x: x + torch.randn_like(x), X), ["random"]),
    "target": (TargetError, lambda: explain(bias_free(4, 3), X, 3), ["target 3", "size 3"]),
    "target tuple": (TargetError, lambda: explain(bias_free(4, 3), X, (0, 0, 0)), ["2"]),
    "output": (TargetError, lambda: explain(lambda x: {"logits": x * 2}, X, output="scores"), ["scores", "logits"]),
    "composite": (InputError, lambda: explain(bias_free(4, 3), X, composite="lrp"), ["'lrp'", "attnlrp"]),
    "composite type": (InputError, lambda: explain(bias_free(4, 3), X, composite=3), ["3", "attnlrp"]),
    "linear rule elsewhere": (
        InputError,
        lambda: explain(nn.Sequential(nn.Tanh()), X, composite=Composite.of("mine", {When(path="0"): Gamma(0.25)})),
        ["Gamma", "TanhBackward0"],
    ),
    "composite list": (InputError, lambda: explain(bias_free(4, 3), X, composite=["auto"]), ["auto"]),
    "on_unknown": (InputError, lambda: explain(bias_free(4, 3), X, on_unknown="ignore"), ["'ignore'", "gradient"]),
    "layer": (InputError, lambda: explain(bias_free(4, 3), X, layers=["0", "1"]), ["'1'"]),
    "parameter": (InputError, lambda: explain(bias_free(4, 3), X, parameters="0.bias"), ["'0.bias'", "0.weight"]),
    "no tensor": (InputError, lambda: explain(bias_free(4, 3), ["text"]), ["no tensor", "str", "return_tensors"]),
    "array": (InputError, lambda: explain(bias_free(4, 3), X.numpy()), ["ndarray", "as_tensor"]),
    "model": (InputError, lambda: explain("bert", X), ["the model is str", "nn.Module"]),
    "class": (InputError, lambda: explain(nn.Linear, X), ["the class Linear"]),
    "module as a layer": (InputError, lambda: explain(bias_free(4, 3), X, layers=[nn.ReLU()]), ["layers=", "ReLU"]),
    "all parameters": (InputError, lambda: explain(bias_free(4, 3), X, parameters=True), ["parameters=", "True"]),
    "rule as composite": (InputError, lambda: explain(bias_free(4, 3), X, composite=Gamma(0.1)), ["Composite.of"]),
    "one target": (InputError, lambda: explain_many(bias_free(4, 3), X, 1), ["sequence", "[3]"]),
    "targets by name": (InputError, lambda: explain_many(bias_free(4, 3), X, "cat"), ["'cat'", "'all'"]),
    "output that is no tensor": (InputError, lambda: relevance([X], X), ["list", ".logits"]),
    "tensor without grad": (InputError, lambda: relevance(X.clone().requires_grad_(), X), ["requires_grad_()"]),
    "compiled": (CompiledModuleError, lambda: explain(torch.compile(bias_free(4, 3)), X), ["_orig_mod"]),
    "compiled in place": (CompiledModuleError, lambda: explain(compiled_itself(), X), ["Linear", "compil"]),
    "compiled inside": (CompiledModuleError, lambda: explain(compiled_inside(), X), ["Linear", "compil"]),
    "compiled child": (
        CompiledModuleError, lambda: explain(nn.Sequential(torch.compile(nn.Linear(4, 4))), X), ["compil"]
    ),
    "compiled function": (CompiledModuleError, lambda: explain(torch.compile(torch.relu), X), ["compil"]),
    "NaN input": (NonFiniteError, lambda: explain(broken(0.0, "0.bias"), X / 0 * 0, 0), ["input"]),
    "inf input": (NonFiniteError, lambda: explain(broken(0.0, "0.bias"), X / 0, 0), ["input"]),
    "NaN weight": (NonFiniteError, lambda: explain(broken(torch.nan, "0.weight"), X, 0), ["AddmmBackward0 in 0"]),
    "NaN bias": (NonFiniteError, lambda: explain(broken(torch.nan, "0.bias"), X, 0), ["AddmmBackward0 in 0"]),
    "inf late": (NonFiniteError, lambda: explain(broken(torch.inf, "2.bias"), X, 0), ["AddmmBackward0 in 2"]),
    "overflow": (
        NonFiniteError,
        lambda: explain(nn.Sequential(nn.Linear(4, 4).double(), Apply(lambda x: (x.abs() * 1e5).exp())), X),
        ["ExpBackward0 in 1"],
    ),
    "no second derivative": (
        NotDifferentiableError,
        lambda: explain(
            nn.Sequential(nn.Linear(4, 4).double(), Apply(F.pdist)), X, lambda y: y.sum(), create_graph=True
        ),
        ["PdistBackward0 in 1", "create_graph"],
    ),
    "0 / 0": (
        NonFiniteError,
        lambda: explain(nn.Sequential(Apply(lambda x: x / (x - x)), nn.ReLU()), X),
        ["DivBackward0 in 0"],
    ),
    "budget": (BudgetError, lambda: allocate(bias_free(4, 3), X, 1.5), ["average_bits = 1.5", "take from"]),
    "operators of a file": (
        UnsupportedOperatorError,
        lambda: load_onnx(file_of("Mine")),
        ["1 operator(s)", "my.domain.Mine: first", "dynlrp.onnx.operator"],
    ),
    "conversion": (
        ConversionError,
        lambda: torchao_config(bias_free(4, 3), {"0": 4, "1": 4}),
        ["0: its weight is of torch.float64", "1: the model has no such", "pinned"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations(name: str) -> None:
    error, cause, parts = SITUATIONS[name]
    with pytest.raises(DynLRPError) as raised:
        cause()
    assert raised.type is error
    for part in parts:
        assert part in str(raised.value)


def test_every_error_is_exported_and_tested() -> None:
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, DynLRPError)}
    assert {error for error, _, _ in SITUATIONS.values()} | {DynLRPError, RuleError} == classes
    for error in classes:
        assert getattr(dynlrp, error.__name__) is error
        assert error.__name__ in dynlrp.__all__


def test_unknown_operations_are_listed_once_per_place() -> None:
    with pytest.raises(UnknownOperationError) as raised:
        explain(strange(), X, 0)
    expected = [("OpaqueBackward", "2.2"), ("OpaqueBackward", "2.1"), ("SquareBackward", "1")]
    assert sorted(raised.value.operations) == sorted(expected)


def test_every_advice_works(registry: Any) -> None:
    model = nn.Sequential(bias_free(4, 3), Apply(lambda x: Twice.apply(x, 3.0)))
    with pytest.raises(UnknownOperationError, match="TwiceBackward in 1"):
        explain(model, X, 1)
    (expected,) = gradient_x_input(lambda x: model(x)[:, 1], X)
    fallback = explain(model, X, 1, on_unknown="gradient")
    close(fallback.relevance, expected)
    assert fallback.ledger.fallbacks == [("TwiceBackward", "1")]
    rules.linear_operation("TwiceBackward")
    registered = explain(model, X, 1)
    close(registered.relevance, expected)
    assert registered.ledger.fallbacks == []
    assert registered.ledger.closes


def test_a_rule_for_an_operation_that_is_not_linear(registry: Any) -> None:
    first = bias_free(4, 3)
    model = nn.Sequential(first, Apply(Square.apply))

    @rules.rule("SquareBackward")
    def square(step: rules.Step, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (m,) = step.vjp(grads)
        assert m is not None
        return [m / 2]  # Euler: of degree 2

    explanation = explain(model, X, 1)
    close(explanation.relevance, gradient_x_input(lambda x: model(x)[:, 1], X)[0] / 2)
    close(explanation.relevance.sum(1), explanation.value)
    assert explanation.ledger.closes


def test_a_rule_registered_later_replaces_the_earlier_one(registry: Any) -> None:
    model = nn.Sequential(bias_free(4, 3), Apply(Square.apply))
    expected = gradient_x_input(lambda x: model(x)[:, 1], X)[0]
    assert explain(model, X, 1, on_unknown="gradient").ledger.fallbacks
    for factor in (1.0, 0.5, 0.25):
        rules.rule("SquareBackward")(lambda step, grads, factor=factor: [step.vjp(grads)[0] * factor])
        explanation = explain(model, X, 1, on_unknown="gradient")
        close(explanation.relevance, expected * factor)
        assert explanation.ledger.fallbacks == []


def test_a_rule_with_needs(registry: Any) -> None:
    model = nn.Sequential(bias_free(4, 3), Apply(Opaque.apply), Apply(lambda x: x * 2))
    seen: list[Tensor] = []

    @rules.rule("OpaqueBackward", needs=[rules.Need(0)])
    def through(step: rules.Step, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        seen.append(step.operand(0))
        return [grads[0]]

    explain(model, X, 1)
    close(seen[0], model[0](X).detach())


BAD_RULES: dict[str, tuple[Callable[..., Any], str]] = {
    "too many": (lambda step, grads: [grads[0], None], "2 values"),
    "too few": (lambda step, grads: [], "0 values"),
    "another shape": (lambda step, grads: [grads[0][:1, :1].expand(7, 7)], "shape"),
    "raises": (lambda step, grads: 1 / 0, "ZeroDivisionError"),
    "no tensor": (lambda step, grads: [3.0], "OpaqueBackward"),
    "nothing": (lambda step, grads: None, "OpaqueBackward"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_rules_that_are_wrong(name: str, registry: Any) -> None:
    function, part = BAD_RULES[name]
    rules.rule("OpaqueBackward")(function)
    with pytest.raises(RuleError, match=part) as raised:
        explain(nn.Sequential(bias_free(4, 3), Apply(Opaque.apply)), X, 1)
    assert "OpaqueBackward in 1" in str(raised.value)


def test_errors_of_the_model_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        explain(nn.Linear(5, 3).double(), X)
    assert not isinstance(raised.value, DynLRPError)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take no notes")
@pytest.mark.parametrize(
    ("inputs", "target", "parts"),
    [
        (X[0, :3], None, ["model was called with torch.float64 of shape (3,)"]),
        ([X[0], X[1]], None, ["2 positional argument(s): torch.float64 of shape (4,)", "torch.stack"]),
        ({"x": X}, None, ["keyword arguments: x, torch.float64 of shape (2, 4)"]),
        (X, lambda y: y.logits, ["target was called with the output, torch.float64 of shape (2, 3)"]),
    ],
)
def test_errors_of_what_was_given_tell_what_it_was_called_with(inputs: Any, target: Any, parts: list[str]) -> None:
    with pytest.raises(Exception, match=r".") as raised:
        explain(bias_free(4, 3), inputs, target)
    assert not isinstance(raised.value, DynLRPError)
    assert all(part in " ".join(raised.value.__notes__) for part in parts)


@pytest.mark.parametrize(
    "model",
    [
        training(nn.Dropout(0.0)),
        training(nn.LayerNorm(4)),
        training(nn.GroupNorm(2, 4)),
        training(nn.BatchNorm1d(4)).eval(),
    ],
    ids=["no dropout", "layer norm", "group norm", "eval"],
)
def test_training_mode_is_fine_where_nothing_is_random(model: nn.Module) -> None:
    assert explain(model, X, 1).ledger.closes


def test_allowed_training_explains_one_draw() -> None:
    model = training(nn.Dropout(0.5), nn.Linear(4, 3, bias=False))
    torch.manual_seed(4)
    found = explain(model, X, 1, allow_training=True, composite="attnlrp")
    torch.manual_seed(4)
    value = model(X)[:, 1].detach()
    close(found.value, value)
    assert found.ledger.closes


def test_allowed_training_with_batch_statistics() -> None:
    model = training(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    for composite in ("attnlrp", "epsilon_plus"):
        explanation = explain(model, X, 1, allow_training=True, composite=composite)
        assert explanation.ledger.closes, explanation.ledger


def test_zeros_are_not_an_error() -> None:
    for composite in dynlrp.COMPOSITES:
        explanation = explain(
            nn.Sequential(bias_free(4, 5, 3), nn.Tanh()), torch.zeros(2, 4).double(), 1, composite=composite
        )
        assert explanation.relevance.count_nonzero() == 0


@pytest.mark.parametrize("composite", dynlrp.COMPOSITES)
def test_a_mask_of_minus_infinity_is_not_an_error(composite: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64).eval()
    mask = torch.full((3, 3), -torch.inf, dtype=torch.float64).triu(1)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    model = nn.Sequential(Apply(lambda x: layer(x, src_mask=mask)), nn.Flatten())
    assert bool(torch.isfinite(explain(model, x, 7, composite=composite).relevance).all())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (lambda step, m: [m[0] * step.operand(0)], "took operand 0 without needs=[Need(0)]"),
        (lambda step, m: [m[0] * step.output()], "took the output without needs=[Need(None)]"),
        (lambda step, m: [step.book("nothing", m[0].sum())], "books into 'nothing'; there are inputs"),
    ],
)
def test_a_rule_is_told_what_it_did_wrong(body: Callable[..., Any], said: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "SinBackward0", Operation("SinBackward0", "custom", rule=FunctionRule(body)))
        with pytest.raises(RuleError, match=re.escape(said)):
            explain(lambda x: x.sin().sum(1), X)


def test_a_blocked_operation_is_not_offered_a_rule() -> None:
    with pytest.raises(UnknownOperationError) as caught:
        explain(lambda x: F.mse_loss(x, x.detach() + 1, reduction="none").sum(1), X)
    assert "explain what goes into it" in str(caught.value)
    assert "linear_operation" not in str(caught.value)

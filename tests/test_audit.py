"""The audit: every local balance, against numbers worked out by hand, and on every model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import COMPOSITES, Composite, Explanation, InputError, When, explain, explain_many, plot, relevance, rules
from dynlrp.audit import Audit, Balance, Row
from dynlrp.ledger import ACCOUNTS
from dynlrp.rules import Epsilon, Gamma
from tests.conftest import SAMPLES, Apply, Opaque, Sample, sample
from tests.peers import models as peers

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
FAST = [name for name in SAMPLES if name != "efficientnet"]
ASKED = ["attnlrp", "epsilon", "auto", "epsilon_plus", "dynamiclrp", "cplrp"]


def layer(inner: int = 4, outer: int = 3, seed: int = 1, bias: bool = True) -> nn.Linear:
    return peers.randomise(nn.Linear(inner, outer, bias=bias), seed).double()  # type: ignore[return-value]


def audited(model: Callable[..., Any], inputs: Any = X, target: Any = None, **options: Any) -> Audit:
    explanation = explain(model, inputs, target, **{"composite": "attnlrp", **options}, audit=True)
    consistent(explanation)
    return explanation.audit  # type: ignore[return-value]


def consistent(explanation: Explanation) -> None:
    """Every balance closes on its own, and all of them together make the ledger."""
    audit, ledger = explanation.audit, explanation.ledger
    assert audit is not None
    assert audit.closes, audit
    tolerance = audit.tolerance * audit.largest
    assert ledger.closes
    assert audit.output == ledger.output
    for row in audit.everything():
        assert abs(row.residual) <= tolerance, row  # type: ignore[arg-type]
        assert abs(row.gap) <= tolerance, row  # type: ignore[arg-type]
    for groups in ([*audit.rows], [*audit.by_operation().values()], [*audit.by_level(1).values()]):
        for account, amount in ledger.accounts.items():
            assert abs(sum(group.accounts.get(account, 0.0) for group in groups) - amount) <= tolerance
    whole = audit.by_module()[""]
    assert whole.count == len(audit.rows)
    assert whole.incoming == ledger.output
    assert whole.outgoing == 0
    for total in audit.by_module().values():
        assert abs(total.residual) <= tolerance * math.sqrt(total.count)  # type: ignore[arg-type]
    assert abs(sum(whole.accounts.values()) - ledger.output) <= tolerance


def only(audit: Audit, operation: str, module: str | None = None) -> Row:
    (row,) = [r for r in audit.rows if r.operation == operation and (module is None or r.module == module)]
    return row


def balance(row: Balance, incoming: Any, outgoing: Any, **accounts: Any) -> None:
    """Numbers worked out by hand."""
    near = {"rel": 1e-12, "abs": 1e-13}
    assert row.incoming == pytest.approx(float(incoming), **near)
    assert row.outgoing == pytest.approx(float(outgoing), **near)
    assert {name: amount for name, amount in row.accounts.items() if abs(amount) > 1e-13} == {
        name.replace("_", " "): pytest.approx(float(amount), **near) for name, amount in accounts.items()
    }


# By hand ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_layer_books_its_bias(frozen: bool) -> None:
    first, last = layer(4, 5, 1).requires_grad_(not frozen), layer(5, 3, 2).requires_grad_(not frozen)
    audit = audited(nn.Sequential(first, nn.ReLU(), last), X, 1)
    z = first(X)
    value, hidden = last(z.relu())[:, 1].sum(), (z.relu() @ last.weight[1]).sum()
    m = last.weight[1] * (z > 0)
    biases = (m * first.bias).sum()
    balance(only(audit, "AddmmBackward0", "2"), value, hidden, parameters=2 * last.bias[1])
    balance(only(audit, "ReluBackward0", "1"), hidden, hidden)
    balance(only(audit, "AddmmBackward0", "0"), hidden, hidden - biases, parameters=biases)
    balance(only(audit, "CloneBackward0", ""), hidden - biases, 0, inputs=hidden - biases)
    assert [row.module for row in audit.rows] == ["", "0", "1", "2"]


@torch.no_grad()
def test_what_arrives_at_a_residual_is_what_both_branches_sent() -> None:
    one, two = layer(4, 4, 1), layer(4, 4, 2)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            return h + self.two(h) + h

    audit = audited(Residual(), X, 2)
    h = one(X)
    branch, skip = two(h)[:, 2].sum(), h[:, 2].sum()
    adds = [row for row in audit.rows if row.operation == "AddBackward0"]
    assert [row.occurrence for row in adds] == [0, 1]
    balance(adds[1], branch + 2 * skip, branch + 2 * skip)
    assert [flow.amount for flow in adds[1].flows] == pytest.approx([float(branch + skip), float(skip)])
    balance(only(audit, "AddmmBackward0", "two"), branch, branch - 2 * two.bias[2], parameters=2 * two.bias[2])
    arrived = branch - 2 * two.bias[2] + 2 * skip
    own = only(audit, "AddmmBackward0", "one")
    assert own.incoming == pytest.approx(float(arrived), rel=1e-12)
    assert own.received == pytest.approx(float(arrived), rel=1e-12)


@torch.no_grad()
def test_offsets_of_elementwise_functions() -> None:
    audit = audited(lambda x: x.exp().sum(1))
    balance(only(audit, "ExpBackward0"), X.exp().sum(), (X.exp() - 1).sum(), offsets=X.numel())
    balance(only(audited(lambda x: F.gelu(x).sum(1)), "GeluBackward0"), F.gelu(X).sum(), F.gelu(X).sum())


@torch.no_grad()
def test_softmax_books_what_it_does_not_conserve() -> None:
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    audit = audited(lambda x: (x.softmax(1) * weights).sum(1))
    p = X.softmax(1)
    m = p * (weights - (p * weights).sum(1, keepdim=True))
    came, went = (p * weights).sum(), (m * X).sum()
    balance(only(audit, "SoftmaxBackward0"), came, went, offsets=came - went)


@torch.no_grad()
def test_layer_norm_has_a_bias_and_batch_norm_a_mean() -> None:
    norm = peers.randomise(nn.LayerNorm(4), 4).double()
    audit = audited(norm, X, 1)
    m = norm.weight[1] * torch.rsqrt(X.var(1, unbiased=False) + norm.eps)
    balance(only(audit, "NativeLayerNormBackward0"), norm(X)[:, 1].sum(), (m * (X[:, 1] - X.mean(1))).sum(),
            parameters=2 * norm.bias[1])  # fmt: skip

    batch = peers.randomise(nn.BatchNorm1d(4), 4).double().eval()
    audit = audited(batch, X, 1)
    scale = batch.weight[1] * torch.rsqrt(batch.running_var[1] + batch.eps)
    balance(only(audit, "NativeBatchNormBackward0"), batch(X)[:, 1].sum(), (scale * X[:, 1]).sum(),
            constants=-2 * scale * batch.running_mean[1], parameters=2 * batch.bias[1])  # fmt: skip


@torch.no_grad()
def test_stabilisers_absorb() -> None:
    linear = layer(bias=False)
    audit = audited(linear, X, 2, composite=Composite.of("one", {"dense": Epsilon(0.5)}))
    z = linear(X)[:, 2]
    kept = (z * z / torch.where(z < 0, z - 0.5, z + 0.5)).sum()
    balance(only(audit, "MmBackward0"), z.sum(), kept, absorbed=z.sum() - kept)


@torch.no_grad()
def test_constants_nobody_recorded() -> None:
    balance(only(audited(lambda x: (2 * x + 3.0).sum(1)), "AddBackward0"), (2 * X + 3).sum(), 2 * X.sum(),
            constants=3 * X.numel())  # fmt: skip


@torch.no_grad()
def test_a_gradient_in_place_of_a_rule_is_held_back() -> None:
    audit = audited(lambda x: x.exp().sum(1), composite="gradient_x_input")
    balance(only(audit, "ExpBackward0"), X.exp().sum(), (X * X.exp()).sum(), held_back=(X.exp() * (1 - X)).sum())


@torch.no_grad()
def test_a_merged_batch_norm_is_one_step_with_its_linear_layer() -> None:
    linear, norm = layer(4, 3, 1), peers.randomise(nn.BatchNorm1d(3), 4).double().eval()
    rule = Gamma(0.3, signed=False, epsilon=0.0)
    audit = audited(nn.Sequential(linear, norm), X, 1, composite=Composite.of("one", {"dense": rule}))
    row = only(audit, "AddmmBackward0 + NativeBatchNormBackward0", "0")
    scale = norm.weight[1] * torch.rsqrt(norm.running_var[1] + norm.eps)
    w, b = linear.weight[1] * scale, (linear.bias[1] - norm.running_mean[1]) * scale + norm.bias[1]
    w, b = w + 0.3 * w.clamp(min=0), b + 0.3 * b.clamp(min=0)
    r = norm(linear(X))[:, 1]
    bias = (r * b / (X @ w + b)).sum()
    balance(row, r.sum(), r.sum() - bias, parameters=bias)
    assert row.rule == repr(rule)
    assert not [other for other in audit.rows if other.module == "1"]


@torch.no_grad()
def test_shared_modules_have_a_row_per_run() -> None:
    shared = layer(4, 4, 1)
    audit = audited(nn.Sequential(shared, nn.Tanh(), shared), X, 2)
    one, two = (row for row in audit.rows if row.operation == "AddmmBackward0")
    assert (one.occurrence, two.occurrence) == (0, 1)
    assert one.module == two.module == "0"
    hidden = shared(X).tanh()
    balance(two, shared(hidden)[:, 2].sum(), (hidden @ shared.weight[2]).sum(), parameters=2 * shared.bias[2])
    module = audit.by_module()["0"]
    assert module.count == 2
    assert module.incoming == pytest.approx(one.incoming + two.incoming)
    assert module.outgoing == pytest.approx(one.outgoing + two.outgoing)


def test_what_a_module_hands_to_itself_stays_inside() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = layer(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(x))

    audit = audited(Twice(), X, 2)
    one, two = (row for row in audit.rows if row.operation == "AddmmBackward0")
    module = audit.by_module()["shared"]
    assert (module.incoming, module.outgoing) == (two.incoming, one.outgoing)
    total = audit.by_operation()["AddmmBackward0"]
    assert (total.count, total.incoming) == (2, one.incoming + two.incoming)


@torch.no_grad()
def test_operations_that_are_re_run_hold_what_they_were_re_run_as() -> None:
    audit = audited(lambda x: torch.logaddexp(x, 2 * x).sum(1))
    (row,) = [row for row in audit.rows if row.inside]
    whole, parts = torch.logaddexp(X, 2 * X).sum(), (X.exp() + (2 * X).exp())
    went = ((X * X.exp() + 2 * X * (2 * X).exp()) / parts).sum()
    balance(row, whole, went, offsets=whole - went)
    assert row.operation == "LogaddexpBackward0"
    offsets = sum(inner.accounts.get("offsets", 0.0) for inner in row.inside)
    assert offsets == pytest.approx(float(whole - went), rel=1e-12)
    assert audit.everything() == [*audit.rows[:2], *row.inside, *audit.rows[2:]]
    records = audit.records()
    assert len(records) == len(audit.rows) + len(row.inside)
    assert [record["operation"] for record in records if record["within"]] == [inner.operation for inner in row.inside]
    assert {record["within"] for record in records} == {"", "LogaddexpBackward0"}


@torch.no_grad()
def test_a_constant_beside_what_was_re_run_belongs_to_the_whole() -> None:
    """The sum that addcmul adds to is not recorded, so the re-run knows nothing of it."""
    added = torch.full((4,), 2.0, dtype=torch.float64)
    audit = audited(lambda x: torch.addcmul(added, x, torch.full_like(added, 3.0)).sum(1))
    row = only(audit, "AddcmulBackward0")
    balance(row, (2 + 3 * X).sum(), (3 * X).sum(), constants=2 * X.numel())
    assert all(not inner.accounts for inner in row.inside)


def test_what_a_condition_holds_back_is_a_balance_too() -> None:
    model = nn.Sequential(layer(4, 4, 1), nn.ReLU(), layer(4, 3, 2))
    audit = audited(model, X, 1, condition={"0": [0, 2]})
    row = only(audit, "AddmmBackward0", "0")
    whole = audited(model, X, 1)
    assert row.incoming == pytest.approx(only(whole, "AddmmBackward0", "0").incoming)
    assert abs(row.accounts["held back"]) > 1e-3


def test_several_targets_are_audited_one_by_one() -> None:
    model = nn.Sequential(layer(4, 4, 1), nn.ReLU(), layer(4, 3, 2))
    for target, explanation in enumerate(explain_many(model, X, [0, 1, 2], audit=True)):
        consistent(explanation)
        assert explanation.audit is not None
        assert explanation.audit.to_dict() == audited(model, X, target, composite="auto").to_dict()


def test_a_module_that_is_one_step_is_one_row() -> None:
    model = nn.Sequential(layer(4, 4, 1), nn.Sequential(layer(4, 4, 2), nn.Tanh(), layer(4, 4, 3)), layer(4, 3, 4))
    audit = audited(model, X, 1, composite=Composite.of("step", {When(module="1"): rules.VJP()}))
    row = only(audit, "submodule")
    assert row.accounts["held back"] == pytest.approx(row.incoming - row.outgoing)  # type: ignore[operator]
    assert abs(row.accounts["held back"]) > 1e-3
    assert not [other for other in audit.rows if other.module.startswith("1.")]


def test_observed_weights_are_no_account_and_no_row() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(layer(4, 3)), nn.Tanh())
    plain, asked = (audited(model, X, 1, parameters=names) for names in ((), "*"))
    assert plain.to_dict() == asked.to_dict()


def test_layers_on_the_way_change_nothing() -> None:
    model = nn.Sequential(layer(4, 4), nn.ReLU(), nn.ReLU(), layer(4, 3))
    assert audited(model, X, 1).to_dict() == audited(model, X, 1, layers=["1", "2"]).to_dict()


# Every model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", ASKED)
@pytest.mark.parametrize("name", FAST)
def test_every_balance_of_every_model_closes(name: str, composite: str, frozen: bool) -> None:
    model, inputs, target = sample(name)
    model.requires_grad_(not frozen)
    plain = explain(model, inputs, target, composite=composite)
    watched = explain(model, inputs, target, composite=composite, audit=True)
    consistent(watched)
    assert plain.audit is None
    assert watched.audit is not None
    assert watched.audit.error < 1e-13  # far below the tolerance, which nets of thousands of operations need
    for one, other in zip(plain.tensors(), watched.tensors(), strict=True):
        assert torch.equal(one, other)
    assert plain.ledger.accounts == watched.ledger.accounts
    assert plain.promises == watched.promises


@pytest.mark.parametrize("composite", ["attnlrp", "auto"])
def test_every_balance_of_a_large_net_closes(composite: str) -> None:
    model, inputs, target = sample("efficientnet")
    consistent(explain(model, inputs, target, composite=composite, audit=True))


@pytest.mark.parametrize("composite", sorted(set(COMPOSITES) - set(ASKED)))
@pytest.mark.parametrize("name", ["conv_bn", "resnet"])
def test_every_balance_closes_under_the_other_composites(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    consistent(explain(model, inputs, target, composite=composite, audit=True))


_single: dict[str, Sample] = {}


@pytest.mark.parametrize("composite", ASKED)
@pytest.mark.parametrize("name", FAST)
def test_every_balance_closes_in_float32(name: str, composite: str) -> None:
    if name not in _single:
        made = SAMPLES[name]()
        model = peers.randomise(made.model, 9, 0.25 if isinstance(made.inputs, dict) else None).float()
        inputs = made.inputs if isinstance(made.inputs, dict) else made.inputs.float()
        _single[name] = Sample(model.eval(), inputs, made.target)
    model, inputs, target = _single[name]
    explanation = explain(model, inputs, target, composite=composite, audit=True)
    consistent(explanation)
    assert explanation.audit is not None
    assert explanation.audit.tolerance == 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_close_to_some_roundings(dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(4, 8, 1), nn.GELU(), layer(8, 3, 2)).to(dtype)
    audit = explain(model, X.to(dtype), 1, composite="attnlrp", audit=True).audit
    assert audit is not None
    assert audit.tolerance == 4 * torch.finfo(dtype).eps
    assert 0 < audit.error <= audit.tolerance


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_closes_to_some_roundings_of_its_own_dtype(dtype: torch.dtype, composite: str) -> None:
    """Whatever that of the output: the coarsest dtype on the way counts."""
    model = nn.Sequential(layer(4, 8, 1), nn.GELU(), layer(8, 3, 2)).float()
    with torch.autocast("cpu", dtype=dtype):
        explanation = explain(lambda x: model(x).float(), X.float(), 1, composite=composite, audit=True)
    audit = explanation.audit
    assert audit is not None
    assert explanation.value.dtype == torch.float32
    assert audit.tolerance == 4 * torch.finfo(dtype).eps
    assert audit.error > 1e-4
    assert audit.closes


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr, lambda x: x.float().to_mkldnn()])
def test_tensors_of_any_layout_are_measured(layout: Callable[[Tensor], Tensor]) -> None:
    audit = explain(lambda x: (layout(x).to_dense() * 2).sum(1), X, audit=True).audit
    assert audit is not None
    assert not audit.unresolved
    assert audit.closes
    assert audit.output == pytest.approx(2 * float(X.sum()), rel=1e-6)


def test_nested_tensors_are_measured() -> None:
    def model(x: Tensor) -> Tensor:
        nested = torch.nested.as_nested_tensor([x[0, :2], x[1]], layout=torch.jagged)
        return (nested * 2).values().sum()[None]

    audited(model, X, lambda y: y)


def test_state_stays_as_it_was() -> None:
    model = nn.Sequential(layer(4, 8, 1), nn.BatchNorm1d(8).double(), nn.ReLU(), layer(8, 3, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    explain(model, X, 1, audit=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert not torch.nn.modules.module._has_any_global_hook()


# What is wrong, and what is unknown -------------------------------------------------------------------------


class Double(rules.Rule):
    """A rule that makes relevance out of nothing."""

    def __call__(self, step: rules.Step, grads: rules.Grads) -> list[Tensor | None]:
        return [None if g is None else 2 * g for g in grads]

    def __repr__(self) -> str:
        return "Double()"


class Doubled(rules.VJP):
    """Another: twice the derivative."""

    def __call__(self, step: rules.Step, grads: rules.Grads) -> list[Tensor | None]:
        return [None if m is None else 2 * m for m in step.vjp(grads)]


def test_a_wrong_rule_is_found_by_name(registry: dict[str, rules.Operation]) -> None:
    operation = registry["TanhBackward0"]
    registry["TanhBackward0"] = rules.Operation("TanhBackward0", "elementwise", rule=Double(), operands="+")
    model = nn.Sequential(layer(4, 8, 1), nn.Tanh(), layer(8, 8, 2), nn.ReLU(), layer(8, 3, 3))
    explanation = explain(model, X, 1, audit=True)
    audit = explanation.audit
    assert audit is not None
    assert not audit.closes
    worst, second = audit.worst(2)
    assert (worst.operation, worst.module, worst.rule) == ("TanhBackward0", "1", "Double()")
    assert worst.residual == pytest.approx(explanation.ledger.residual, rel=1e-9)
    assert second.error < 1e-12
    assert "do NOT close" in str(audit)
    assert "TanhBackward0 in 1 (Double())" in str(audit)
    registry["TanhBackward0"] = operation
    consistent(explain(model, X, 1, audit=True))


def test_errors_that_cancel_are_found_too(registry: dict[str, rules.Operation]) -> None:
    """The ledger closes, as one rule takes what another made."""

    class Half(Double):
        def __call__(self, step: rules.Step, grads: rules.Grads) -> list[Tensor | None]:
            return [None if g is None else g / 2 for g in grads]

    for name, rule in (("NegBackward0", Double()), ("AbsBackward0", Half())):
        registry[name] = rules.Operation(name, "custom", rule=rule, operands="+")
    explanation = explain(lambda x: -((-x.abs()).abs()), X, lambda y: y.sum(1), audit=True)
    audit = explanation.audit
    assert audit is not None
    assert not audit.closes
    assert {row.operation for row in audit.worst(4)} == {"NegBackward0", "AbsBackward0"}


def test_a_wrong_rule_inside_a_re_run_is_found(registry: dict[str, rules.Operation]) -> None:
    registry["LogsumexpBackward0"] = replace(registry["LogsumexpBackward0"], rule=Doubled())
    audit = explain(lambda x: torch.logaddexp(x, 2 * x), X, 1, composite="attnlrp", audit=True).audit
    assert audit is not None
    assert not audit.closes
    assert {row.operation for row in audit.worst(2)} == {"LogsumexpBackward0", "LogaddexpBackward0"}
    assert audit.worst(3)[2].error < 1e-12


def test_writes_that_no_python_sees_are_balanced() -> None:
    """Circular padding copies the inside, then either border: all relevance passes each of the three writes."""
    audit = explain(
        lambda x: nn.functional.pad(2 * x[None], (1, 1), mode="circular")[0], X, lambda y: y.sum(1), audit=True
    ).audit
    assert audit is not None
    assert audit.closes
    writes = [row for row in audit.rows if row.operation == "torch::autograd::CopySlices"]
    assert len(writes) == 3
    whole = 2 * (X.sum() + X[:, 0].sum() + X[:, -1].sum())
    for row in writes:
        balance(row, whole, whole)


def test_what_no_graph_tells_is_unresolved_and_not_guessed() -> None:
    x = X.clone().requires_grad_()
    hidden = x * 2 + 1.0
    explanation = relevance((hidden * 3.0 + 1.0).sum(1), x, composite="attnlrp", audit=True)
    audit = explanation.audit
    assert audit is not None
    assert not audit.closes
    adds = [row for row in audit.rows if row.operation == "AddBackward0"]
    assert len(adds) == 2
    assert adds[0].incoming is None
    assert adds[0].residual is None
    assert "adds a constant that the graph did not record" in adds[0].unresolved
    assert audit.unresolved
    assert "unknown" in audit.table("row")
    assert "unresolved: AddBackward0" in str(audit)
    assert any("is known closes" in line for line in audit.verdict())
    known = only(audit, "torch::autograd::AccumulateGrad")
    balance(known, 6 * X.sum(), 0, inputs=6 * X.sum())


def test_a_graph_that_exists_is_audited_where_it_can_be() -> None:
    model = nn.Sequential(layer(4, 8, 1), nn.Tanh(), layer(8, 3, 2))
    x = X.clone().requires_grad_()
    hidden = model[:2](x)
    explanation = relevance(model[2](hidden)[:, 1], [x, hidden], audit=True)
    consistent(explanation)
    inside = explain(model, X, 1, audit=True).audit
    assert inside is not None
    assert explanation.audit is not None
    ours = {row.operation: row.incoming for row in explanation.audit.rows}
    theirs = {row.operation: row.incoming for row in inside.rows}
    for name in set(ours) & set(theirs):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12)


def test_custom_functions_are_seen_where_they_are_used(registry: dict[str, rules.Operation]) -> None:
    rules.linear_operation("OpaqueBackward")
    audited(nn.Sequential(layer(4, 4), Apply(Opaque.apply), nn.ReLU()), X, 1)


# Showing ----------------------------------------------------------------------------------------------------


def deep(layers: int = 12) -> nn.Module:
    """A stack of blocks with names as long as BERT's."""

    def block(seed: int) -> nn.Module:
        return nn.Sequential(nn.Sequential(layer(4, 4, seed), nn.GELU()), nn.Sequential(layer(4, 4, seed + 50)))

    return nn.Sequential(nn.Sequential(*map(block, range(layers))), layer(4, 3))


def test_the_table_is_as_deep_as_fits() -> None:
    audit = audited(deep(), X, 1)
    lines = str(audit).splitlines()
    assert len(lines) <= 33
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["module", "operations", "incoming", "outgoing", "inputs", "parameters", "residual"]
    assert [line.split()[0] for line in lines[1:4]] == ["(model)", "0", "0"]
    assert len([line for line in lines if line.startswith("    ")]) == 12
    assert lines[-1].startswith("every local balance closes to")
    detail = audit.table(module="0.3").splitlines()
    assert [line.split()[0] for line in detail[1:-1]] == ["0.3", "0", "0", "1", "1"]
    assert len(audit.table("row").splitlines()) == len(audit.rows) + 2
    assert len(audit.table("row", "0.3").splitlines()) == 3 + 2
    assert len(audit.table("operation").splitlines()) == len(audit.by_operation()) + 2
    assert len(audit.table(depth=1).splitlines()) == 5
    assert repr(audit) == str(audit)


def test_modules_that_are_not_there_are_named() -> None:
    audit = audited(deep(1), X, 1)
    for show in (audit.table, audit.records):
        with pytest.raises(InputError, match=r"no operation ran in a module '7'; there are \['0', '0.0'"):
            show("row", "7")
        with pytest.raises(InputError, match="not by 'layer'"):
            show("layer")  # type: ignore[arg-type]


def test_what_is_no_number_does_not_close() -> None:
    row = audited(layer(), X, 1).rows[0]
    for amount in (math.nan, math.inf):
        broken = Audit([replace(row, incoming=amount)], 0, 1.0, 1e-4)
        assert not broken.closes
        assert broken.worst(1)[0].error == math.inf


def test_levels_do_not_overlap() -> None:
    audit = audited(deep(3), X, 1)
    for depth in range(1, 5):
        totals = audit.by_level(depth)
        assert sum(total.count for total in totals.values()) == len(audit.rows)
    assert list(audit.by_level(1)) == ["", "0", "1"]
    for name, total in audit.by_level(1).items():
        if name:
            assert total == audit.by_module()[name]


def test_numbers_leave_as_json() -> None:
    explanation = explain(deep(2), X, 1, audit=True)
    audit = explanation.audit
    assert audit is not None
    numbers = json.loads(json.dumps(explanation.to_dict()))["audit"]
    assert numbers == json.loads(json.dumps(audit.to_dict()))
    assert numbers["closes"] is True
    assert len(numbers["rows"]) == len(audit.rows)
    assert numbers["modules"][0]["module"] == ""
    assert numbers["modules"][0]["incoming"] == explanation.ledger.output
    assert {"operation", "module", "occurrence", "incoming", "outgoing", *ACCOUNTS} <= set(numbers["rows"][0])
    assert "audit" not in explain(deep(2), X, 1).to_dict()


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    audit = audited(deep(2), X, 1)
    frame = audit.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(audit.rows)
    parts = frame[["outgoing", *ACCOUNTS, "residual"]].sum(axis=1)
    assert (frame["incoming"] - parts).abs().max() < 1e-12
    assert list(audit.to_frame("module")["module"]) == list(audit.by_module())
    assert set(audit.to_frame("operation", "0.1")["operation"]) == set(audit.by_operation("0.1"))


def test_without_pandas_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install dynlrp\[frame\]"):
        audited(deep(1), X, 1).to_frame()


def test_the_chart_shows_every_module_and_account() -> None:
    audit = audited(deep(3), X, 1)
    figure = audit.plot(2, title="Where it went")
    came, ended = figure.axes
    names = [label.get_text() for label in came.get_yticklabels()]
    assert names == [name or "(model)" for name in audit.by_level(2)]
    widths = [patch.get_width() for patch in came.patches]
    assert widths == pytest.approx([total.incoming for total in audit.by_level(2).values()])
    kinds = [text.get_text() for text in ended.get_legend().get_texts()]
    assert kinds == ["inputs", "parameters"]
    total = sum(patch.get_width() for patch in ended.patches)
    assert total == pytest.approx(audit.output)
    audit.plot()


def test_bars_stack_on_either_side_of_zero() -> None:
    figure = plot.balances(["a", "b"], [1.0, None], {"one": [2.0, -1.0], "two": [-3.0, -0.5], "three": [1.0, 0.0]})
    spans = [(bar.get_x(), bar.get_width()) for bar in figure.axes[1].patches]
    assert spans == [(0.0, 2.0), (0.0, -1.0), (0.0, -3.0), (-1.0, -0.5), (2.0, 1.0), (0.0, 0.0)]
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["unknown"]
    with pytest.raises(ValueError, match="2 names need"):
        plot.balances(["a", "b"], [1.0], {})


def test_the_page_shows_the_audit_and_escapes_it(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>&", layer(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["<b>&"](x)  # type: ignore[misc]

    explanation = explain(Named(), X, 1, audit=True)
    page = explanation.save(tmp_path / "a.html", sample=0).read_text("utf-8")
    assert "Audit by module" in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert page.count("<details>") == 2
    assert "every local balance closes" in page
    assert "Audit" not in explain(Named(), X, 1).save(tmp_path / "b.html", sample=0).read_text("utf-8")

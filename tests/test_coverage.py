"""The coverage of one model: what is counted, without numbers as with them, and what an explanation confirms."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dynlrp import Coverage, InputError, coverage
from dynlrp.coverage import MOVES, Idle, capture
from dynlrp.explain import settle
from dynlrp.rules import linear_operation
from dynlrp.verification import Balances, Unbalanced, Verification, verification
from tests.conftest import Apply, Opaque, calls, sample


class Cube(torch.autograd.Function):
    """The cube."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


class Doubled(torch.autograd.Function):
    """Twice x, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: float) -> Tensor:
        ctx.gradient = gradient
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * g, None


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def counts(report: Coverage) -> dict[str, tuple[int, int, int]]:
    return {o.name: (o.nodes, o.reached, o.covered) for o in report.operations}


def test_counts_of_a_small_net() -> None:
    """Two linear layers transpose their weights, where no relevance passes; the four parameters are leaves."""
    report = coverage(mlp(), torch.randn(2, 4))
    assert counts(report) == {"AddmmBackward0": (2, 2, 2), "TBackward0": (2, 0, 2), "ReluBackward0": (1, 1, 1)}
    assert (report.nodes, report.covered, report.reached, report.leaves) == (5, 5, 3, 4)
    assert (report.parameters, report.operations_covered, report.status) == (4 * 8 + 8 + 8 * 3 + 3, 3, "covered")
    assert report.uncovered == ()
    assert report.fake
    assert report.modality == ""


def test_a_hand_made_gate_has_its_role_and_its_promises() -> None:
    model = Apply(lambda x: torch.sigmoid(x) * x.sin())
    report = coverage(model, torch.randn(2, 4))
    assert report.roles == {"gate": 1}
    assert report.nodes == 3
    settled, runs = settle(model, torch.randn(2, 4))
    promises = settled.promises.report(settled.plan.visited)
    assert (report.promises, report.delta, report.rho, report.runs) == (
        promises.count,
        promises.delta,
        promises.density,
        runs,
    )


class Tower(nn.Module):
    """Two encoders, of which the second runs where it gets something, and a table that is read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.table, self.pooler, self.quiet = nn.Embedding(2, 3), nn.Linear(3, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        made = self.text(x) + self.table.weight[0]
        made = made if y is None else made + self.image(y)
        with torch.no_grad():
            told = self.quiet(x)
        made = made + told
        return made, self.pooler(made)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_takes_no_part_is_told(read: bool, frozen: bool) -> None:
    model = Tower().eval()
    model.text.requires_grad_(not frozen)
    if read:
        model.register_forward_pre_hook(lambda module, given: given[0].sum().item() and None)  # needs numbers
    x = torch.rand(1, 4)
    report = coverage(model, (x,), output=0)
    assert report.fake != read
    image, pooler, quiet = Idle("image", 15, False), Idle("pooler", 12, True), Idle("quiet", 15, True)
    assert report.idle == (image, pooler, quiet)
    assert str(image) == "did not run"
    assert str(quiet) == "ran, but the output's graph does not go through it"
    assert coverage(model, (x, x), output=0).idle == (pooler, quiet)
    assert coverage(model, (x, x), output=1).idle == (quiet,)
    assert coverage(Apply(lambda x: x * 2), x).idle == ()


def test_an_operation_without_a_rule_is_a_gap() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Apply(Opaque.apply), nn.Linear(4, 3)).eval()
    report = coverage(model, torch.randn(2, 4))
    (gap,) = report.uncovered
    assert (gap.operation, gap.path, gap.nodes, gap.reached, gap.reason) == ("OpaqueBackward", "1", 1, True, "")
    assert (report.nodes, report.covered) == (5, 4)
    assert (len(report.operations), report.operations_covered, report.status) == (3, 2, "gaps")


@pytest.mark.usefixtures("registry")
def test_the_nearest_rule_is_named() -> None:
    linear_operation("OpakeBackward")
    report = coverage(Apply(Opaque.apply), torch.randn(2, 4))
    assert report.uncovered[0].nearest == "OpakeBackward"


def test_a_blocked_operation_is_a_gap_with_its_reason() -> None:
    report = coverage(Apply(lambda x: nn.functional.mse_loss(x, x.detach() * 2, reduction="none")), torch.randn(2, 4))
    (gap,) = report.uncovered
    assert gap.operation == "MseLossBackward0"
    assert "logits" in gap.reason or gap.reason
    assert report.covered == report.nodes - 1 == 0


def test_a_fallback_is_not_counted() -> None:
    """The composite of plain gradients has a rule for softmax, but it is not softmax's own."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)).eval()
    own, plain = (coverage(model, torch.randn(2, 4), composite=c) for c in ("attnlrp", "gradient_x_input"))
    assert (own.nodes, own.covered) == (3, 3)
    assert (plain.nodes, plain.covered, [gap.operation for gap in plain.uncovered]) == (3, 2, ["SoftmaxBackward0"])


@pytest.mark.parametrize("name", ["conv_bn", "resnet", "vit", "bert", "minilm", "gpt2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_numbers_are_needed(name: str, frozen: bool) -> None:
    """The graph, its plan and its promises are those of a run.

    Not so Llama: not told to hide anything, it makes itself a mask where it cannot look whether it needs one.
    """
    model, inputs, target = sample(name)
    model.requires_grad_(not frozen)
    one, runs, fake, *_ = capture(model, inputs, target)
    other, real_runs = settle(model, inputs, target)
    assert fake
    assert runs == real_runs
    assert [MOVES.get(n, n) for n in one.graph.names] == [MOVES.get(n, n) for n in other.graph.names]
    assert one.graph.operands == other.graph.operands
    assert [(i, s.rule, s.signals, s.needs) for i, s in one.steps().items()] == [
        (i, s.rule, s.signals, s.needs) for i, s in other.steps().items()
    ]
    assert one.promises.report(1) == other.promises.report(1)
    paths = [[s.path(node._sequence_nr()) for node in s.graph.nodes] for s in (one, other)]
    assert paths[0] == paths[1]


WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "copy": (lambda y, x: y[:, :2].copy_(x[:, 1:3]), "linear"),
    "set": (lambda y, x: y.__setitem__((slice(None), 0), x[:, 1]), "linear"),
    "fill": (lambda y, x: y[:, 0].fill_(3.0), "linear"),
    "add": (lambda y, x: y[:, 0].add_(x[:, 1]), "linear"),
    "sub": (lambda y, x: y[:, 0].sub_(x[:, 1], alpha=2), "linear"),
    "scale": (lambda y, x: y[:, :16].mul_(3.0), "linear"),
    "divide": (lambda y, x: y[:, :16].div_(2), "linear"),
    "scale each": (lambda y, x: y[:, :16].mul_(torch.arange(16.0)), "linear"),
    "relu": (lambda y, x: y[:, 0].relu_(), "linear"),
    "addcmul": (lambda y, x: y[:, 0].addcmul_(x[:, 1], x[:, 2], value=3), ""),
    "mask": (lambda y, x: y[:, :1].masked_fill_(x[:, :1] > 0, 0.0), "linear"),
    "multiply": (lambda y, x: y[:, 0].mul_(x[:, 1]), "MulBackward0"),
    "divide by a signal": (lambda y, x: y[:, 0].div_(x[:, 1]), "DivBackward0"),
    "exp": (lambda y, x: y[:, 0].exp_(), ""),
    "sigmoid": (lambda y, x: y[:, 0].sigmoid_(), ""),
    "square": (lambda y, x: y[:, 0].square_(), ""),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_into_views_are_judged_without_numbers(name: str) -> None:
    write, written = WRITES[name]

    def model(x: Tensor) -> Tensor:
        y = x * 2 + 1
        write(y, x)
        return y

    x = torch.randn(4, 32)
    settled, _, fake, *_ = capture(Apply(model), x)
    assert [f for index, f in settled.facts().items() if "CopySlices" in settled.graph.names[index]] == [written]
    assert fake


class Careless(nn.Module):
    """Keeps a tensor, counts its runs, draws numbers in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("seen", torch.zeros(4))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x @ self.weight
        self.seen += x.sum(0)
        return self.kept


def test_the_model_is_not_touched() -> None:
    model = Careless().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: value._version for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    coverage(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert model.kept is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value._version == versions[name]
        assert type(value) is Tensor
    assert model.weight.grad is None


def test_a_model_that_reads_numbers_runs() -> None:
    report = coverage(Apply(lambda x: x * 2 if x.sum() > 0 else x.exp()), torch.ones(2, 3))
    assert not report.fake
    assert counts(report) == {"MulBackward0": (1, 1, 1)}


def test_a_model_without_weights_that_reads_numbers_cannot_be_captured() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Apply(lambda x: x * 2 if x.sum() > 0 else x.exp())).eval()
    with pytest.raises(InputError, match=r"needs numbers.*Build it with weights"):
        coverage(model, torch.ones(2, 3))


def llama(layers: int) -> nn.Module:
    """Llama 3 with the sizes of its 70 billion parameters."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


def test_seventy_billion_parameters() -> None:
    """Every layer after the second is like it; the weights would be 282 GB."""
    inputs = {"input_ids": torch.arange(5, 21).reshape(1, 16)}
    one, two = (coverage(llama(layers), inputs).nodes for layers in (1, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = coverage(llama(80), inputs)
    assert report.parameters == 70_553_706_496
    assert report.nodes == report.covered == one + 79 * (two - one)
    assert report.roles["gate"] == 80
    assert report.fake
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_the_work_for_a_layer_does_not_grow() -> None:
    inputs = {"input_ids": torch.arange(5, 21).reshape(1, 16)}
    coverage(llama(1), inputs)  # what is made once
    short, long = (calls(lambda layers=layers: coverage(llama(layers), inputs)) for layers in (2, 16))
    assert long <= 8 * short


def test_an_explanation_verifies() -> None:
    report = coverage(mlp(), torch.randn(2, 4), verify=True)
    check = report.verification
    assert check is not None
    assert check.passed
    assert check.balances == {"AddmmBackward0": (2, 2), "ReluBackward0": (1, 1)}
    assert (report.reached, report.verified, report.status) == (3, 3, "verified")
    assert report.verified_by_operation() == {"AddmmBackward0": 2, "TBackward0": 0, "ReluBackward0": 1}
    assert "3 of the 3 that relevance reaches verified" in str(report)
    assert check.residual < 1e-6
    assert check.ratio == check.explain_seconds / check.gradient_seconds > 0


@pytest.mark.usefixtures("registry")
def test_a_rule_that_does_not_conserve_is_not_verified() -> None:
    """As a linear operation x^3 passes three times its value: the ledger is open by 2 of 3."""
    linear_operation("CubeBackward")
    report = coverage(Apply(Cube.apply), torch.rand(1, 4) + 1, verify=True)
    check = report.verification
    assert check is not None
    assert (report.nodes, report.covered, report.verified, report.status) == (1, 1, 0, "not verified")
    assert check.residual == pytest.approx(2 / 3, rel=1e-5)
    assert not check.error


@pytest.mark.usefixtures("registry")
def test_every_node_is_verified_by_its_own_balance() -> None:
    """The first wrong gradient passes 3/2 of what came in and the second 2/3: the whole adds up, two nodes do not."""
    linear_operation("DoubledBackward")
    wrong = [nn.Sequential(Apply(lambda x, g=g: Doubled.apply(x, g))) for g in (4 / 3, 3.0)]
    model = nn.Sequential(nn.Linear(4, 4), *wrong, nn.ReLU(), nn.Linear(4, 2, bias=False)).eval()
    model[0].bias.data.zero_()
    report = coverage(model, torch.rand(2, 4), verify=True)
    check = report.verification
    assert check is not None
    assert check.closes
    assert not check.passed
    assert report.status == "not verified"
    assert check.balances == {
        "AddmmBackward0": (1, 1),
        "DoubledBackward": (2, 0),
        "ReluBackward0": (1, 1),
        "MmBackward0": (1, 1),
    }
    assert [(u.operation, u.path, u.nodes, u.unknown) for u in check.unbalanced] == [
        ("DoubledBackward", "1.0", 1, ""),
        ("DoubledBackward", "2.0", 1, ""),
    ]
    assert (report.covered, report.reached, report.verified) == (7, 5, 3)


def test_a_reshape_is_the_same_with_numbers_and_without() -> None:
    """Autograd has another name for it in a plain run than in one that is recorded."""

    def model(x: Tensor) -> Tensor:
        x.sum().item()  # needs numbers
        return (x * 2).reshape(8)[None]

    report = coverage(Apply(model), torch.rand(2, 4), verify=True)
    assert not report.fake
    assert report.verified == report.reached == report.nodes == 3


@pytest.mark.usefixtures("registry")
def test_rounding_is_told_from_a_wrong_rule() -> None:
    """Terms of 1e5 that cancel to 1 leave the roundings of float32, which float64 has not. A wrong rule is wrong in
    both."""
    x = torch.rand(2, 16) + 1
    x = torch.cat([x, x + 1e-5 * torch.randn(2, 16)], 1)
    weight = torch.tensor([1e5, -1e5]).repeat_interleave(16)[:, None]
    check = coverage(Apply(lambda x: x @ weight.to(x.dtype)), x, verify=True).verification
    assert check is not None
    assert (check.float64, check.passed) == (True, True)
    assert check.residual < 1e-10
    exact = coverage(Apply(lambda x: x @ weight.to(x.dtype)), x.double(), verify=True).verification
    assert exact is not None
    assert (exact.float64, exact.passed) == (False, True)
    linear_operation("CubeBackward")
    wrong = coverage(Apply(Cube.apply), x, verify=True).verification
    assert wrong is not None
    assert (wrong.float64, wrong.passed) == (False, False)


def test_one_wrong_operation_leaves_the_others_verified() -> None:
    """Only a part of the nodes of an operation balances: so many count, and no more."""
    check = Verification({"AddmmBackward0": Balances(2, 1), "ReluBackward0": Balances(1, 1)}, (), 0.1)
    report = replace(coverage(mlp(), torch.randn(2, 4)), verification=check)
    assert report.verified_by_operation() == {"AddmmBackward0": 1, "TBackward0": 0, "ReluBackward0": 1}
    larger = replace(report, operations=tuple(replace(o, nodes=9, reached=9) for o in report.operations))
    assert larger.verified_by_operation() == {"AddmmBackward0": 1, "TBackward0": 0, "ReluBackward0": 9}


@pytest.mark.parametrize("dimensions", [1, 2])
def test_circular_padding_is_verified(dimensions: int) -> None:
    """It writes into its output, part by part, in a function that no Python sees."""
    padding, x = (1, 2) * dimensions, torch.rand(2, 3, *[4] * dimensions) + 1
    report = coverage(Apply(lambda x: nn.functional.pad(x * 2, padding, mode="circular") * 3.0), x, verify=True)
    check = report.verification
    assert check is not None
    assert check.passed
    assert check.balances["torch::autograd::CopySlices"] == (2 * dimensions + 1, 2 * dimensions + 1)
    assert report.verified == report.reached


def test_a_balance_that_nobody_knows_is_not_verified() -> None:
    unknown = Unbalanced("ReluBackward0", "1", 1, 0.0, "the value made by AddmmBackward0: nobody kept it")
    balances = {"AddmmBackward0": Balances(2, 2), "ReluBackward0": Balances(1, 0)}
    check = Verification(balances, (unknown,), closes=True, finite=True, unchanged=True)
    report = replace(coverage(mlp(), torch.randn(2, 4)), verification=check)
    assert check.passed
    assert (report.verified, report.reached) == (2, 3)
    assert "balance unknown" in str(unknown)


def test_times_are_the_shortest_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynlrp import verification as module

    clock = iter([0.0, 9.0, 10.0, 14.0, 20.0, 25.0, 30.0, 33.0, 40.0, 46.0, 50.0, 52.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    turns: list[str] = []
    runs = [lambda: turns.append("gradient"), lambda: turns.append("explain")]
    assert module._shortest(runs, torch.get_rng_state()) == [5.0, 2.0]
    assert turns == ["gradient", "explain"] * 3


def test_what_fails_in_the_explanation_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Apply(Opaque.apply)).eval()
    check = verification(model, torch.randn(2, 4))
    assert not check.passed
    assert check.error.startswith("UnknownOperationError: 1 operation(s) have no rule")
    assert coverage(model, torch.randn(2, 4), verify=True).verified == 0


def test_a_changed_output_is_seen() -> None:
    """A model that gives another output each time is not what was explained."""
    calls = iter(range(1, 100))
    check = verification(Apply(lambda x: x * next(calls)), torch.ones(1, 3))
    assert check.closes
    assert not check.unchanged
    assert not check.passed


def test_what_a_tokenizer_returns_goes_straight_in() -> None:
    model, inputs, target = sample("bert")
    given = transformers.BatchEncoding(dict(inputs))
    report = coverage(model, given, target, verify=True)
    assert report.fake
    assert report.modality == "text"
    assert (report.nodes, report.status) == (coverage(model, inputs, target).nodes, "verified")


def test_a_report_survives_json() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Apply(Opaque.apply), nn.Sigmoid()).eval()
    for verify in (False, True):
        report = coverage(model, torch.randn(2, 4), verify=verify, name="<b>")
        assert Coverage.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.to_dict()["status"] == "gaps"


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({"input_ids": 0, "attention_mask": 0}, "text"),
        ({"pixel_values": 0, "input_ids": 0}, "multimodal"),
        ({"input_features": 0, "decoder_input_ids": 0}, "audio"),
        ({"past_values": 0}, "time series"),
        (torch.zeros(1, 3, 8, 8), "vision"),
        (torch.zeros(1, 3), ""),
    ],
)
def test_modality(inputs: Any, kind: str) -> None:
    from dynlrp.coverage import modality

    assert modality(inputs) == kind


def test_nothing_heavy_is_imported_with_the_package() -> None:
    import subprocess
    import sys

    heavy = {"typer", "rich", "jinja2", "networkx", "transformers", "matplotlib"}
    code = f"import dynlrp, sys; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

"""Relevance as a part of a loss: its gradient is that of the numbers which explain() returns, taken by central
differences of explanations without a graph, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynlrp import (
    Composite,
    DynLRPError,
    Explanation,
    InputError,
    NonFiniteError,
    NotDifferentiableError,
    When,
    explain,
)
from dynlrp.rules import (
    AlphaBeta,
    Attention,
    Epsilon,
    EpsilonSum,
    Flat,
    Gamma,
    Magnitude,
    Rule,
    Shares,
    Whole,
    WSquare,
    ZBox,
    ZPlus,
    expand,
    linear_operation,
)
from tests.conftest import SAMPLES, Apply, sample
from tests.examples import draw
from tests.operators import OPERATORS, Case, cases
from tests.peers import models as peers
from tests.test_operators import REASONS

STEPS = (1e-5, 1e-6, 1e-7)
"""Of central differences, whose error is of the order of the step's square and of rounding over the step, 1e-11 to
1e-9. Relevance jumps where a relu or a maximum switches, which the smaller of them are unlikely to meet, so that one
of them has to agree."""
TOLERANCE = 1e-6


def score(explanation: Explanation) -> Tensor:
    """A number that every entry of every relevance takes part in, and none as another."""
    found = pytree.tree_leaves((explanation.relevance, explanation.layers, explanation.parameters))
    tensors = [r for r in found if isinstance(r, Tensor)]
    total = sum((r * draw(seed, *r.shape)).sum() + r.square().sum() / 3 for seed, r in enumerate(tensors))
    assert isinstance(total, Tensor)
    return total


def slope(function: Callable[[], Tensor], tensors: Sequence[Tensor], seed: int, step: float) -> float:
    """Central difference of a function of ``tensors`` along a drawn direction."""
    values = []
    for side in (step, -step):
        with torch.no_grad():
            for number, x in enumerate(tensors):
                x.add_(draw(seed + number, *x.shape), alpha=side)
        values.append(float(function()))
        with torch.no_grad():
            for number, x in enumerate(tensors):
                x.sub_(draw(seed + number, *x.shape), alpha=side)
    return (values[0] - values[1]) / (2 * step)


def check(
    model: Callable[..., Any],
    inputs: Any,
    target: Any = 1,
    *,
    together: bool = False,
    tolerance: float = TOLERANCE,
    rounding: float = 0.0,
    **options: Any,
) -> None:
    """The gradient of a score of relevance, by every parameter and input, against central differences along a direction
    for each (``together``: one for all), and relevance against that without a graph."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    tensors = [x for x in (*parameters, *leaves) if x.requires_grad_().numel()]

    def plain() -> Explanation:
        return explain(model, inputs, target, **options)

    before, found = plain(), explain(model, inputs, target, create_graph=True, **options)
    for ours, theirs in zip(
        pytree.tree_leaves((found.relevance, found.layers, found.parameters)),
        pytree.tree_leaves((before.relevance, before.layers, before.parameters)),
        strict=True,
    ):
        assert ours is None if theirs is None else torch.allclose(ours, theirs, rounding, rounding)
    assert found.ledger.closes == before.ledger.closes
    for account, amount in before.ledger.accounts.items():
        assert abs(found.ledger.accounts[account] - amount) <= rounding, account
    grads = torch.autograd.grad(score(found), tensors, allow_unused=True, materialize_grads=True)
    assert any(bool(g.any()) for g in grads)
    scale = max(float((g * draw(50, *g.shape)).sum().abs()) for g in grads)
    for group in [range(len(tensors))] if together else [[i] for i in range(len(tensors))]:
        ours = sum(float((grads[i] * draw(70 + n, *grads[i].shape)).sum()) for n, i in enumerate(group))
        theirs = [slope(lambda: score(plain()), [tensors[i] for i in group], 70, step) for step in STEPS]
        error = min(abs(ours - estimate) for estimate in theirs)
        assert error <= tolerance * max(abs(ours), 1e-3 * scale), (list(group), ours, theirs)


def randomised(model: nn.Module, seed: int = 3) -> nn.Module:
    return peers.randomise(model, seed).double()


# Linear layers ----------------------------------------------------------------------------------------------

RULES: list[Rule] = [
    Epsilon(),
    Epsilon(0.1),
    Epsilon(0.1, bias=False),
    Gamma(0.25),
    Gamma(0.5, bias=False),
    Gamma(0.25, signed=False),
    AlphaBeta(2.0, 1.0),
    AlphaBeta(1.5, 0.5, bias=False),
    ZPlus(),
    Flat(),
    WSquare(),
    ZBox(-4.0, 4.0),
    ZBox(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_dense(rule: Rule) -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)))
    mine = Composite.of("mine", {"dense": rule})
    check(model, draw(1, 2, 5), composite=mine, layers=["1", "3"], parameters="0.*")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_convolution_and_batch_norm(rule: Rule) -> None:
    """Most of the rules merge the norm into the weights."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, padding=1)]
    layers += [nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    mine = Composite.of("mine", {"convolution": rule})
    check(randomised(nn.Sequential(*layers)), draw(1, 2, 2, 9, 9), composite=mine, together=True)


@pytest.mark.parametrize("name", ["auto", "epsilon_plus", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box"])
def test_first_layers_of_composites(name: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.ConvTranspose1d(3, 2, 2), nn.Flatten(), nn.Linear(14, 3))
    check(randomised(model), draw(1, 2, 2, 8), composite=name)


# Functions, products and norms ------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "log sigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "steep softplus": lambda x: F.softplus(x, beta=20.0),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "power": lambda x: 3.0**x,
    "cos": torch.cos,
    "square": torch.square,
    "atan": torch.atan,
    "sinc": torch.sinc,
    "log1p": torch.log1p,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "exp2": torch.exp2,
    "erfc": torch.erfc,
    "tan": torch.tan,
    "asinh": torch.asinh,
    "i0": torch.special.i0,
    "i1": torch.special.i1,
    "erfcx": torch.special.erfcx,
    "log ndtr": torch.special.log_ndtr,
}
KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "celu": F.celu,
    "i0e": torch.special.i0e,
    "i1e": torch.special.i1e,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "softshrink": lambda x: F.softshrink(x, 0.001),
    "relu6": F.relu6,
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "root": lambda x: x.abs() ** 0.5,
}
"""At 0, or elsewhere."""


@pytest.mark.parametrize("name", [*FUNCTIONS, *KINKED])
def test_secant(name: str) -> None:
    """Also at and near 0, where a quotient has no digits to differentiate."""
    smooth = name in FUNCTIONS
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    x = draw(1, 1, 4)
    small = (0.0, 1e-9, -1e-4) if smooth else (0.005, -0.003, -1.7)
    wanted = torch.tensor([[*small, 0.012, -0.6, 1.3]], dtype=torch.float64)
    with torch.no_grad():
        first.bias += (wanted - first(x))[0]
        first.bias += (wanted - first(x))[0]  # what rounding left
    assert not smooth or first(x)[0, 0] == 0
    check(nn.Sequential(first, Apply({**FUNCTIONS, **KINKED}[name]), last), x, tolerance=1e-5)


def test_root_of_nothing_is_no_nan() -> None:
    """Whose secant is infinite at 0, where nothing passes."""
    x = torch.tensor([[0.0, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    for function in (torch.sqrt, lambda x: x**0.5):
        found = explain(Apply(function), x, lambda y: y.sum(1), create_graph=True).relevance
        (g,) = torch.autograd.grad(found.sum(), x)
        assert torch.allclose(g[0, 1:], torch.tensor([0.5, 0.25], dtype=torch.float64))
        assert g.isfinite().all()


class Gates(nn.Module):
    """Two branches, joined by ``join``."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.join(self.a(x), self.b(x)))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate": lambda a, b: torch.sigmoid(a) * b,
    "silu gate": lambda a, b: F.silu(a) * torch.tanh(b),
    "self gate": lambda a, b: a * torch.sigmoid(a) + b,
    "product": lambda a, b: a * b,
    "glu": lambda a, b: F.glu(torch.cat([a, b], -1)),
    "quotient": lambda a, b: a / (1 + b.square()),
    "unit length": lambda a, b: F.normalize(a, dim=-1) + b,
    "matrices": lambda a, b: (a.unsqueeze(-1) @ b.unsqueeze(-2)).sum(-1) / 5,
    "maximum": torch.maximum,
    "hypotenuse": torch.hypot,
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "constant": lambda a, b: (a + 1) * (b - 2),
    "in place": lambda a, b: a.clone().add_(1).mul_(b),
    "view": lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1).flip(1),
}


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp", "dynamiclrp", "gradient_x_input"])
@pytest.mark.parametrize("name", JOINS)
def test_product(name: str, composite: str) -> None:
    check(randomised(Gates(JOINS[name])), draw(1, 2, 4), composite=composite, together=True)


def test_unequal_shares() -> None:
    mine = Composite.of("mine", {"product": Shares(0.2, 0.8)})
    check(randomised(Gates(JOINS["product"])), draw(1, 2, 4), composite=mine)


class Written(nn.Module):
    """A norm of the kind that transformers write out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6, eps=1e-2),
    "layer without weights": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer over two": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3)), nn.Flatten()),
    "rms": lambda: nn.RMSNorm(6, eps=1e-2),
    "rms written": Written,
    "group": lambda: nn.GroupNorm(2, 6, eps=1e-2),
    "group without weights": lambda: nn.GroupNorm(2, 6, affine=False),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    "batch, fixed": lambda: nn.BatchNorm1d(6),
    "weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("composite", ["attnlrp", "gradient_x_input", "magnitude"])
@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, composite: str) -> None:
    """What divides is a constant of the rule, and a function of the inputs all the same."""
    gradient = composite == "gradient_x_input"
    if gradient and name in ("layer without weights", "instance"):
        pytest.skip("PyTorch's second derivative of it fails")
    model = randomised(nn.Sequential(nn.Linear(5, 6), NORMS[name](), nn.Tanh(), nn.Linear(6, 3)))
    # Shares by magnitude behind the norm need its output as a promise.
    mine = Composite.of("magnitude", {"addition": Magnitude(), "dense": Gamma(0.3)})
    check(model, draw(1, 3, 5), composite=mine if composite == "magnitude" else composite, rounding=1e-13 * gradient)


def test_norm_of_the_batch() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, eps=1e-2), nn.Tanh(), nn.Linear(6, 3))).train()
    check(model, draw(1, 4, 5), allow_training=True)
    check(model, draw(1, 4, 5), allow_training=True, composite=Composite.of("mine", {"dense": Gamma(0.3)}))


def test_constants_inside_one_function() -> None:
    """What the steps inside made is known by its numbers, and joined to what it was made of."""
    model = nn.Sequential(nn.Linear(3, 4), Apply(torch.special.ndtr), nn.RMSNorm(4, eps=0.1), nn.Linear(4, 2))
    for composite in ("attnlrp", "dynamiclrp", Composite.of("mine", {"dense": Epsilon(0.1), "addition": EpsilonSum()})):
        check(randomised(model), draw(1, 2, 3), composite=composite)


# Attention, sums, embeddings, recurrence --------------------------------------------------------------------


class Heads(nn.Module):
    """Attention by ``attend``, which gets queries, keys and values of two heads."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], keys: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 3 * keys), nn.Linear(6, 3 * keys)
        self.last, self.attend = nn.Linear(6, 3), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.last(self.attend(q, k, v).transpose(1, 2).flatten(2).mean(1))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2, -1) @ v


PADDING = torch.tensor([[True, True, True, True], [True, True, True, False]])[:, None, None]
BIAS = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "eager": lambda: Heads(eager),
    "fused": lambda: Heads(F.scaled_dot_product_attention),
    "causal": lambda: Heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)),
    "mask": lambda: Heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, PADDING)),
    "bias": lambda: Heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS)),
    "shared heads": lambda: Heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), keys=1),
    "log softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 5), nn.LogSoftmax(-1), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp", Composite.of("mine", {"attention": Attention(0.3, 0.8)})])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, composite: str | Composite) -> None:
    check(randomised(ATTENTION[name]()), draw(1, 2, 4, 6), composite=composite, together=True)


def test_kernel_of_attention_is_the_fused_one() -> None:
    x = draw(1, 1, 2, 4, 3).requires_grad_()
    y = F.scaled_dot_product_attention(x, x, x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "ScaledDotProductFlashAttentionForCpuBackward0"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.a(x))
        return self.last(x - 0.5 * torch.relu(self.b(x)))


@pytest.mark.parametrize("rule", [EpsilonSum(0.1), EpsilonSum(0.0), Magnitude()], ids=str)
def test_sum(rule: Rule) -> None:
    check(randomised(Residual()), draw(1, 2, 5), composite=Composite.of("mine", {"addition": rule}))


def test_embedding() -> None:
    """One number per id, as a function of the table."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
    check(randomised(model), torch.tensor([[1, 4, 4, 0, 8], [2, 2, 7, 5, 1]]), parameters="0.weight")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layer(kind: type[nn.RNNBase]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    check(randomised(Last()), draw(1, 2, 3, 3), together=True)


def test_condition_and_places() -> None:
    """Relevance through some channels alone, and that of what attention makes."""
    model = randomised(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    check(model, draw(1, 2, 5), condition={"1": [0, 2, 5]}, layers="0:input")
    heads = randomised(nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), nn.Flatten()))
    check(heads, draw(1, 2, 4, 6), layers=["0.*:heads", "0.*:key"], together=True)


def test_whole_module() -> None:
    """A module as one step, by a function of the values that went in and came out."""

    def secant(module: nn.Module, arrived: Any, inputs: Any, outputs: Any) -> list[Tensor]:
        return [arrived[0] * outputs[0] / inputs[0]]

    model = randomised(nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Tanh(), nn.Tanh()), nn.Linear(7, 3)))
    check(model, draw(1, 2, 5), composite=Composite.of("mine", {When(module="1"): Whole(secant)}))


def test_not_in_another_precision() -> None:
    with pytest.raises(InputError, match="create_graph"):
        explain(nn.Linear(2, 2), torch.rand(1, 2), precision=torch.float64, create_graph=True)


class Cell(torch.autograd.Function):
    """A fused operation that is explained by plain ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.sigmoid(x) * (x @ w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        s = torch.sigmoid(x)
        product = g * s
        return g * (x @ w) * s * (1 - s) + product @ w.T, x.T @ product


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("composite", ["attnlrp", Composite.of("mine", {"dense": Gamma(0.3)})])
def test_expansion(composite: str | Composite) -> None:
    """The re-run is part of the graph, for operands that relevance follows and for those that it does not."""
    expand("CellBackward", lambda step, x, w: torch.sigmoid(x) * (x @ w), saved={0: 0, 1: 1})
    first, last, weight = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), draw(2, 5, 5).requires_grad_()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.weight = first, last, nn.Parameter(weight.detach())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Cell.apply(self.first(x), self.weight))

    check(Model(), draw(1, 2, 4), composite=composite)


# Whole models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_model(name: str) -> None:
    """Every architecture under its usual composite, all weights and inputs at once."""
    if name == "efficientnet":
        pytest.skip("takes long, and has the operations of the others")
    made = sample(name)
    model, inputs = copy.deepcopy(made.model), pytree.tree_map(lambda x: x.clone(), made.inputs)
    target = (-1, 3) if name in ("gpt2", "llama") else 1
    check(model, inputs, target, together=True, tolerance=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
@pytest.mark.parametrize("composite", ["cplrp", "dynamiclrp"])
def test_model_under_other_composites(name: str, composite: str) -> None:
    made = sample(name)
    target = (-1, 3) if name == "llama" else 1
    inputs = pytree.tree_map(lambda x: x.clone(), made.inputs)
    model = copy.deepcopy(made.model)
    check(model, inputs, target, together=True, composite=composite, tolerance=1e-5)


# Every operator of PyTorch's database -----------------------------------------------------------------------

KINKS = {
    "nn.functional.hinge_embedding_loss",
    "nn.functional.cosine_embedding_loss",
    "linalg.norm.subgradients_at_zero",
    "cov",
}
"""Operators with samples at places where relevance jumps, or is a quotient of rounding errors."""
REFUSED = {"_segment_reduce.lengths", "_segment_reduce.offsets", "nn.functional.embedding_bag", "nn.functional.pdist"}
"""Operators whose backward pass has no derivative, for some of their arguments."""
UP_TO_ROUNDING = {"linalg.solve", "linalg.solve_ex", "linalg.tensorsolve"}
"""PyTorch solves by another factor of the matrix where derivatives are recorded."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in REASONS and name not in KINKS])
def test_operator(name: str) -> None:
    """The gradient of its relevance is right, or refused by name."""
    for case in cases(OPERATORS[name], torch.float64, 1):
        try:
            plain = _relevance(case, case.given)
            xs = [x.clone().requires_grad_() for x in case.given]
            found = _relevance(case, xs, create_graph=True)
        except NotDifferentiableError:
            assert name in REFUSED
            continue
        except DynLRPError:
            continue
        for ours, theirs in zip(found, plain, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                rounding = 1e-12 if name in UP_TO_ROUNDING else 0.0
                assert torch.allclose(ours, theirs, rounding, rounding, equal_nan=True)
        directions = [draw(50 + i, *x.shape).to(x.dtype) for i, x in enumerate(xs)]
        ours = _sum(found)
        slopes = [torch.zeros_like(x) for x in xs]
        if ours.requires_grad:
            slopes = list(torch.autograd.grad(ours, xs, allow_unused=True, materialize_grads=True))
        along = sum(float((g * d).sum()) for g, d in zip(slopes, directions, strict=True))
        try:
            estimates = [_difference(case, directions, step) for step in (1e-3, 1e-4, 1e-5, 1e-6)]
        except NonFiniteError:
            continue
        scale = max(1e-3, abs(along), abs(float(ours)))
        assert min(abs(along - estimate) for estimate in estimates) <= 1e-5 * scale, (case.label, along, estimates)


def _relevance(case: Case, given: Sequence[Tensor], **options: Any) -> Any:
    torch.default_generator.manual_seed(0)
    return explain(case, tuple(given), composite="attnlrp", allow_training=True, **options).relevance


def _sum(found: Sequence[Tensor | None]) -> Tensor:
    parts = [(r * draw(7 + i, *r.shape)).sum() for i, r in enumerate(found) if r is not None]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _difference(case: Case, directions: Sequence[Tensor], step: float) -> float:
    values = []
    for side in (step, -step):
        values.append(_sum(_relevance(case, [x + side * d for x, d in zip(case.given, directions, strict=True)])))
    return float(values[0] - values[1]) / (2 * step)


# What cannot be differentiated ------------------------------------------------------------------------------


class Numbers(torch.autograd.Function):
    """x^2 by way of numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.detach().numpy() * ctx.saved_tensors[0].detach().numpy())


class Once(Numbers):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Intermediate(torch.autograd.Function):
    """tanh(x) / 2, which remembers what is neither argument nor result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0] ** 2) / 2


class Attribute(Intermediate):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = torch.tanh(x)
        return ctx.y / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.y**2) / 2


class Connected(torch.autograd.Function):
    """x^2, which can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("function", [Numbers, Once, Intermediate, Attribute])
def test_custom_function_without_a_second_derivative(function: type[torch.autograd.Function]) -> None:
    name = f"{function.__name__}Backward"
    linear_operation(name)
    model = randomised(nn.Sequential(nn.Linear(4, 4), Apply(function.apply), nn.Linear(4, 3)))
    x = draw(1, 2, 4)
    assert explain(model, x, 1).relevance.any()
    with pytest.raises(NotDifferentiableError, match=name):
        explain(model, x, 1, create_graph=True)


@pytest.mark.usefixtures("registry")
def test_custom_function_with_a_second_derivative() -> None:
    linear_operation("ConnectedBackward")
    check(randomised(nn.Sequential(nn.Linear(4, 4), Apply(Connected.apply), nn.Linear(4, 3))), draw(1, 2, 4))


def test_operation_without_a_second_derivative_is_named_with_its_module() -> None:
    class Distances(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pdist(x).reshape(1, -1)

    model = nn.Sequential(nn.Linear(3, 4), Distances(), nn.Linear(6, 2)).double()
    with pytest.raises(NotDifferentiableError, match="PdistBackward0 in 1"):
        explain(model, draw(1, 4, 3), lambda y: y.sum(), create_graph=True)

"""Rules of linear layers against dense matrices, in every arrangement and position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import BrokenPromiseError, Composite, When, explain, explain_many, trace
from dynlrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZBox, ZPlus
from tests import oracle
from tests.conftest import close
from tests.oracle import Affine, agrees, draw, number, same

SEEDS = st.integers(0, 2**32 - 1)
aten_nn: Any = torch._C._nn


class Layer(nn.Module):
    """A linear operation with weight and bias as parameters."""

    def __init__(self, function: Affine, weight: Tensor, bias: Tensor | None, frozen: bool = False) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight, requires_grad=not frozen)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)

    def dense(self, shape: tuple[int, ...]) -> oracle.Dense:
        bias = None if self.bias is None else self.bias.detach()
        return oracle.dense(self.function, shape, self.weight.detach(), bias)


class Expected(NamedTuple):
    relevance: Tensor
    bias: Tensor
    absorbed: Tensor


class Case(NamedTuple):
    """A rule of the library with its slow version; ``bounds`` are those of the z-box."""

    rule: Rule
    slow: Callable[..., Tensor]
    bounds: tuple[float | None, float | None] | None = None

    @property
    def tolerance(self) -> float:
        """Sums of the z-box are zero where inputs lie on their bounds, but for rounding, which epsilon then divides."""
        return oracle.TOLERANCE if self.bounds is None else 1e-8


def _case(rule: Rule, slow: Callable[..., Tensor], **options: Any) -> Case:
    return Case(rule, partial(slow, **options))


CASES: dict[str, Case] = {
    "epsilon=0": _case(Epsilon(), oracle.epsilon, epsilon=0.0),
    "epsilon=1e-6": _case(Epsilon(1e-6), oracle.epsilon, epsilon=1e-6),
    "epsilon=0.1": _case(Epsilon(0.1), oracle.epsilon, epsilon=0.1),
    "epsilon=0.1,bias=False": _case(Epsilon(0.1, bias=False), oracle.epsilon, epsilon=0.1, bias=False),
    "gamma=0.25": _case(Gamma(), oracle.gamma, gamma=0.25),
    "gamma=100": _case(Gamma(100.0), oracle.gamma, gamma=100.0),
    "gamma=0.5,epsilon=0.1,bias=False": _case(
        Gamma(0.5, epsilon=0.1, bias=False), oracle.gamma, gamma=0.5, epsilon=0.1, bias=False
    ),
    "gamma=0.25,unsigned": _case(Gamma(signed=False), oracle.gamma_unsigned, gamma=0.25),
    "gamma=0.25,unsigned,bias=False": _case(
        Gamma(signed=False, epsilon=0.1, bias=False), oracle.gamma_unsigned, gamma=0.25, epsilon=0.1, bias=False
    ),
    "alpha_beta=2,1": _case(AlphaBeta(), oracle.alpha_beta, alpha=2.0, beta=1.0),
    "alpha_beta=1.5,0.5,bias=False": _case(
        AlphaBeta(1.5, 0.5, epsilon=0.1, bias=False), oracle.alpha_beta, alpha=1.5, beta=0.5, epsilon=0.1, bias=False
    ),
    "alpha_beta=1,0": _case(AlphaBeta(1.0, 0.0), oracle.alpha_beta, alpha=1.0, beta=0.0),
    "zplus": _case(ZPlus(), oracle.z_plus),
    "zplus,bias=False": _case(ZPlus(epsilon=0.1, bias=False), oracle.z_plus, epsilon=0.1, bias=False),
    "zbox=-3,2": Case(ZBox(-3.0, 2.0), oracle.z_box, (-3.0, 2.0)),
    "zbox": Case(ZBox(), oracle.z_box, (None, None)),
    "zbox=0,": Case(ZBox(0.0, epsilon=0.1), partial(oracle.z_box, epsilon=0.1), (0.0, None)),
    "wsquare": _case(WSquare(), oracle.w_square),
    "wsquare,bias=False": _case(WSquare(epsilon=0.1, bias=False), oracle.w_square, epsilon=0.1, bias=False),
    "flat": _case(Flat(), oracle.flat),
    "flat,bias=True": _case(Flat(epsilon=0.1, bias=True), oracle.flat, epsilon=0.1, bias=True),
}
RELEVANCE = ("zbox", "wsquare", "flat")
"""Rules that hand on relevance, not multipliers."""
BLIND = (ZBox, WSquare, Flat)
"""Rules that give padding nothing, whatever number it writes."""
PER_SAMPLE = ("zbox", "zbox=0,")
"""Rules with bounds that are a sample's own. A matrix product cannot tell samples from tokens: there a row's."""


def only(rule: Rule, **others: Rule) -> Composite:
    return Composite.of("test", {"dense": rule, "convolution": rule, **others})


def shares(case: Case, layer: oracle.Dense, x: Tensor, r: Tensor, biased: bool = True) -> Tensor:
    """How relevance ``r`` of the output goes to each input and (last row) the bias."""
    options: dict[str, Any] = {}
    if case.bounds is not None:
        for name, number, extreme in zip(("low", "high"), case.bounds, (torch.amin, torch.amax), strict=True):
            sample = extreme(x, tuple(range(1, x.ndim)), keepdim=True)
            options[name] = (sample if number is None else torch.tensor(number).double()).expand_as(x).flatten()
    elif isinstance(case.rule, Flat):
        options["biased"] = biased
    return case.slow(layer, x.flatten(), r.flatten(), **options)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3)], ids=str)
def test_bounds_per_channel(shape: tuple[int, ...]) -> None:
    """Images that are normalised per channel have bounds of each."""
    low, high = (-3.0, -2.5, -2.0), torch.tensor([1.0, 2.0, 3.0])
    layer = (nn.Linear, nn.Conv1d, nn.Conv2d)[len(shape) - 2](3, 4, *[2] * (len(shape) > 2)).double()
    x = torch.rand(shape, dtype=torch.float64) * 3 - 2
    column = (1, 3, *[1] * (len(shape) - 2))
    lower, upper = (torch.as_tensor(b, dtype=torch.float64).reshape(column).expand_as(x) for b in (low, high))
    values = [v.clone().requires_grad_() for v in (x, lower, upper)]
    terms = [
        torch.func.functional_call(layer, {"weight": w, "bias": torch.zeros(4).double()}, v)
        for w, v in zip((layer.weight, layer.weight.clamp(min=0), layer.weight.clamp(max=0)), values, strict=True)
    ]
    whole = terms[0] - terms[1] - terms[2]
    picked = (layer(x) * (torch.arange(whole.numel()).reshape(whole.shape) % 5 == 2)).detach()
    shares = torch.autograd.grad((whole * (picked / whole).detach()).sum(), values)
    rule = ZBox(low, high, epsilon=0.0)
    found = explain(nn.Sequential(layer), x, picked, composite=only(rule)).relevance
    close(found, sum(v * s for v, s in zip(values, shares, strict=True)), 1e-12)
    assert rule == ZBox(list(low), (1.0, 2.0, 3.0), epsilon=0.0)
    assert hash(rule) == hash(ZBox(torch.tensor(low), high, epsilon=0.0))


def through(case: Case, layer: Layer, x: Tensor, r: Tensor) -> Expected:
    """What the inputs, the bias and the stabiliser get."""
    found = shares(case, layer.dense(tuple(x.shape)), x, r, layer.bias is not None)
    return Expected(found[:-1].sum(1).reshape(x.shape), found[-1].sum(), r.sum() - found.sum())


# Single layers ----------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """A layer with an input, the multiplier of its output, and whether a relu stands before and behind it."""

    layer: Layer
    x: Tensor
    multiplier: Tensor
    before: bool
    after: bool


def convolution(
    x: Tensor, w: Tensor, b: Tensor | None, *, transposed: bool, output_padding: int = 0, **options: int
) -> Tensor:
    dimensions = x.ndim - 2
    if transposed:
        options["output_padding"] = output_padding
    name = f"conv{'_transpose' if transposed else ''}{dimensions}d"
    result: Tensor = getattr(F, name)(x, w, b, **options)
    return result


@st.composite
def dense_layers(pick: st.DrawFn) -> tuple[Affine, tuple[int, ...], tuple[int, ...], int]:
    inner, outer = pick(st.integers(1, 5)), pick(st.integers(1, 5))
    lead = pick(st.sampled_from([(1,), (3,), (2, 2), (2, 1, 2)]))
    return F.linear, (*lead, inner), (outer, inner), outer


@st.composite
def convolutions(pick: st.DrawFn) -> tuple[Affine, tuple[int, ...], tuple[int, ...], int]:
    dimensions = pick(st.sampled_from([1, 2, 2, 3]))
    groups = pick(st.integers(1, 2))
    inner, outer = groups * pick(st.integers(1, 2)), groups * pick(st.integers(1, 2))
    kernel = pick(st.lists(st.integers(1, 3 if dimensions < 3 else 2), min_size=dimensions, max_size=dimensions))
    dilation, stride, padding = pick(st.integers(1, 2)), pick(st.integers(1, 2)), pick(st.integers(0, 1))
    transposed = pick(st.booleans())
    extra = pick(st.integers(0, 2 if dimensions < 3 else 1))
    size = [max(1, (k - 1) * dilation + 1 - 2 * padding + extra) for k in kernel]
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        size = [1 + padding + extra] * dimensions
        options["output_padding"] = pick(st.integers(0, max(stride, dilation) - 1))
    weight = (inner, outer // groups, *kernel) if transposed else (outer, inner // groups, *kernel)
    function = partial(convolution, transposed=transposed, **options)
    return function, (pick(st.integers(1, 2)), inner, *size), weight, outer


def _sparse(x: Tensor, seed: int) -> Tensor:
    """Half of the entries exactly zero."""
    return x * (draw(seed, *x.shape) > 0)


@st.composite
def setups(pick: st.DrawFn, layers: st.SearchStrategy[Any]) -> Setup:
    function, shape, weight_shape, outer = pick(layers)
    seed = pick(SEEDS)
    weight, x = draw(seed, *weight_shape), draw(seed + 1, *shape)
    bias = draw(seed + 2, outer) if pick(st.booleans()) else None
    sign = pick(st.sampled_from(["mixed", "zeros", "relu", "weights"]))
    if sign == "zeros":
        x = _sparse(x, seed + 3)
    elif sign == "weights":
        weight = _sparse(weight, seed + 3)
    layer = Layer(function, weight, bias, frozen=pick(st.booleans()))
    try:
        with torch.no_grad():
            output = layer(x)
    except RuntimeError:  # the padding leaves nothing of the output
        assume(False)
        raise
    assume(output.numel() > 0)
    return Setup(layer, x, draw(seed + 4, *output.shape), sign == "relu", pick(st.booleans()))


def _network(setup: Setup) -> nn.Module:
    front, back = [nn.ReLU()] if setup.before else [], [nn.ReLU()] if setup.after else []
    return nn.Sequential(*front, setup.layer, *back)


def _check(case: Case, setup: Setup) -> None:
    a = setup.x.relu() if setup.before else setup.x
    with torch.no_grad():
        z = setup.layer(a)
    r = (z.relu() if setup.after else z) * setup.multiplier
    expected = through(case, setup.layer, a, r)
    alive = torch.where(a > 0, expected.relevance, 0.0) if setup.before else expected.relevance
    lost = expected.absorbed + (expected.relevance - alive).sum()
    explanation = explain(_network(setup), setup.x, lambda y: (y * setup.multiplier).sum(), composite=only(case.rule))
    accounts = {"parameters": expected.bias, "absorbed": lost}
    agrees(explanation, alive, accounts, case.tolerance, float(r.abs().max()))


@pytest.mark.parametrize("name", CASES)
@given(setup=setups(dense_layers()))
def test_dense_layers(name: str, setup: Setup) -> None:
    assume(name not in PER_SAMPLE or setup.x.ndim == 2)
    _check(CASES[name], setup)


@pytest.mark.parametrize("name", CASES)
@given(setup=setups(convolutions()))
def test_convolutions(name: str, setup: Setup) -> None:
    _check(CASES[name], setup)


RELATIVE: dict[str, tuple[Rule, Callable[..., Tensor], dict[str, Any]]] = {
    "epsilon": (Epsilon(0.25, relative=True), oracle.epsilon, {}),
    "epsilon,bias=False": (Epsilon(0.25, relative=True, bias=False), oracle.epsilon, {"bias": False}),
    "gamma": (Gamma(epsilon=0.25, relative=True), oracle.gamma, {"gamma": 0.25}),
    "gamma,unsigned": (
        Gamma(signed=False, epsilon=0.25, relative=True), oracle.gamma_unsigned, {"gamma": 0.25}
    ),
    "alpha_beta": (AlphaBeta(epsilon=0.25, relative=True), oracle.alpha_beta, {"alpha": 2.0, "beta": 1.0}),
    "zplus": (ZPlus(epsilon=0.25, relative=True), oracle.z_plus, {}),
    "zbox": (ZBox(-3.0, 2.0, epsilon=0.25, relative=True), oracle.z_box, {}),
    "wsquare": (WSquare(epsilon=0.25, relative=True), oracle.w_square, {}),
    "flat": (Flat(epsilon=0.25, relative=True), oracle.flat, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "convolution"])
@pytest.mark.parametrize("name", RELATIVE)
@given(data=st.data())
@settings(max_examples=12)
def test_a_relative_stabiliser(name: str, kind: str, data: st.DataObject) -> None:
    """Epsilon in units of each sample's root mean square; a matrix product has a row per token."""
    setup = data.draw(setups(dense_layers() if kind == "dense" else convolutions()))
    with torch.no_grad():
        z = setup.layer(setup.x)
    rows = z.numel() // z.shape[-1] if kind == "dense" else len(z)
    rule, slow, options = RELATIVE[name]
    case = Case(
        rule,
        partial(slow, epsilon=oracle.Relative(0.25, rows), **options),
        (-3.0, 2.0) if name == "zbox" else None,
    )
    _check(case, setup)


def test_a_relative_stabiliser_knows_no_scale() -> None:
    """Weights a million times as large give the same relevance; an absolute epsilon is then nothing."""
    x, r = draw(0, 3, 6), torch.tensor([[1.0, 0.0, -1.0, 2.0]]).double().expand(3, 4)
    found = {}
    for relative in (True, False):
        for scale in (1.0, 1e6):
            layer = Layer(F.linear, draw(1, 4, 6) * scale, None)
            rule = Epsilon(0.25, relative=relative)
            found[relative, scale] = explain(layer, x, r, composite=only(rule)).relevance
    oracle.same(found[True, 1e6], found[True, 1.0])
    assert float((found[False, 1e6] - found[False, 1.0]).abs().max()) > 0.1


@pytest.mark.parametrize("kind", [torch.matmul, torch.mv, torch.dot])
def test_a_relative_stabiliser_of_vectors_and_zeros(kind: Callable[..., Tensor]) -> None:
    """A vector is one row; where all of it is zero nothing is divided, and the relevance is absorbed."""
    x, w = draw(0, 2, 3), draw(1, 3)
    if kind is torch.dot:
        x = x[0]
    z = kind(x, w)
    m = draw(2, *z.shape)
    composite = only(Epsilon(0.25, relative=True))
    s = z * m / oracle.stabilised(z, oracle.Relative(0.25, 1))
    agrees(
        explain(lambda x: kind(x, w), x, lambda y: (y * m).sum(), composite=composite),
        x * w * s.unsqueeze(-1) if z.ndim else x * w * s,
    )
    silent = explain(lambda x: kind(x * 0.0, w), x, torch.ones_like(z), composite=composite)
    assert silent.relevance.count_nonzero() == 0
    assert silent.finite()
    assert silent.ledger.accounts["absorbed"] == pytest.approx(z.numel())


def test_a_wrong_formula_would_be_seen() -> None:
    """The rules differ from each other far beyond the tolerance on the cases above."""
    layer = Layer(F.linear, draw(0, 4, 6), draw(1, 4))
    x, r = draw(2, 3, 6), draw(3, 3, 4)
    found = {name: through(case, layer, x, r).relevance for name, case in CASES.items()}
    for name, one in found.items():
        for other, two in found.items():
            if name != other and "alpha_beta=1,0" not in (name, other):
                assert float((one - two).abs().max()) > 1e-8, (name, other)


# Relevance of weights ---------------------------------------------------------------------------------------


def weight_relevance(layer: Layer, x: Tensor, found: Tensor) -> Tensor:
    """Each share belongs to the weight that links input and output; an operation with numbered weights tells which."""
    numbers = torch.arange(1, layer.weight.numel() + 1, dtype=torch.float64).reshape(layer.weight.shape)
    index = oracle.matrix(lambda u: layer.function(u, numbers, None), x.shape).long()
    sums = torch.zeros(layer.weight.numel() + 1, dtype=torch.float64)
    sums.index_add_(0, index.flatten(), found[:-1].flatten())
    return sums[1:].reshape(layer.weight.shape)


def bias_relevance(layer: Layer, output: Tensor, found: Tensor) -> Tensor:
    channels = output.ndim - 1 if layer.function is F.linear else 1
    axes = [d for d in range(output.ndim) if d != channels]
    return found[-1].reshape(output.shape).sum(axes)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=8)
def test_relevance_of_weights_and_biases(name: str, kind: str, data: st.DataObject) -> None:
    setup = data.draw(setups(dense_layers() if kind == "dense" else convolutions()))
    layer, case = setup.layer, CASES[name]
    assume(kind == "convolution" or name not in PER_SAMPLE or setup.x.ndim == 2)
    z = layer(setup.x).detach()
    found = shares(case, layer.dense(tuple(setup.x.shape)), setup.x, z * setup.multiplier, layer.bias is not None)
    explanation = explain(
        layer, setup.x, lambda y: (y * setup.multiplier).sum(), composite=only(case.rule), parameters="*"
    )
    tolerance, scale = case.tolerance, float((z * setup.multiplier).abs().max())
    same(explanation.parameters["weight"], weight_relevance(layer, setup.x, found), tolerance, scale)
    if layer.bias is not None:
        bias = explanation.parameters["bias"]
        expected = bias_relevance(layer, z, found)
        assert bias is not None or not expected.any()
        same(torch.zeros_like(expected) if bias is None else bias, expected, tolerance, scale)
    agrees(explanation, found[:-1].sum(1).reshape(setup.x.shape), None, tolerance, scale)


@pytest.mark.parametrize("name", CASES)
def test_relevance_of_scaled_weights_and_biases(name: str) -> None:
    """``beta * c + alpha * x @ w``: the factors belong to the weight and the bias."""
    layer = Layer(partial(_addmm, alpha=0.5, beta=-3.0), draw(0, 4, 5), draw(1, 5))
    x, case = draw(2, 3, 4), CASES[name]
    found = shares(case, layer.dense((3, 4)), x, layer(x).detach())
    explanation = explain(layer, x, torch.sum, composite=only(case.rule), parameters="*")
    weights = torch.stack([found[i:12:4].reshape(3, 3, 5).diagonal().sum(1) for i in range(4)])
    same(explanation.parameters["weight"], weights, case.tolerance)
    bias = explanation.parameters["bias"]
    same(torch.zeros(5).double() if bias is None else bias, found[-1].reshape(3, 5).sum(0), scale=1e-12)


# Arrangements of matrix products ----------------------------------------------------------------------------


class Arrangement(NamedTuple):
    function: Affine
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: tuple[int, ...] | None = None


def _addmm(x: Tensor, w: Tensor, b: Tensor | None, beta: float = 1, alpha: float = 1) -> Tensor:
    return x @ w * alpha if b is None else torch.addmm(b, x, w, beta=beta, alpha=alpha)


def _addmm_left(x: Tensor, w: Tensor, b: Tensor | None, beta: float = 1, alpha: float = 1) -> Tensor:
    return w @ x * alpha if b is None else torch.addmm(b, w, x, beta=beta, alpha=alpha)


def _baddbmm(x: Tensor, w: Tensor, b: Tensor | None, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.bmm(x, w) * alpha if b is None else torch.baddbmm(b, x, w, beta=beta, alpha=alpha)


def _baddbmm_left(x: Tensor, w: Tensor, b: Tensor | None, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.bmm(w, x) * alpha if b is None else torch.baddbmm(b, w, x, beta=beta, alpha=alpha)


def _added(function: Callable[..., Tensor], left: bool = False, beta: float = 1.0, alpha: float = 1.0) -> Affine:
    """``beta * b + alpha * x @ w`` by one of PyTorch's functions for it, with ``x`` and ``w`` swapped on the left."""

    def layer(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        first, second = (w, x) if left else (x, w)
        if b is not None:
            return function(b, first, second, beta=beta, alpha=alpha)
        zero = torch.zeros((), dtype=x.dtype)
        return function(zero, first, second, beta=0, alpha=alpha)

    return layer


ARRANGEMENTS: dict[str, Arrangement] = {
    "linear 2d": Arrangement(F.linear, (3, 4), (5, 4), (5,)),
    "linear 2d, no bias": Arrangement(F.linear, (3, 4), (5, 4)),
    "linear 3d": Arrangement(F.linear, (2, 3, 4), (5, 4), (5,)),
    "linear 3d, no bias": Arrangement(F.linear, (2, 3, 4), (5, 4)),
    "linear 3d of a transposed view": Arrangement(lambda x, w, b: F.linear(x.transpose(0, 1), w), (3, 2, 4), (5, 4)),
    "x @ w": Arrangement(lambda x, w, b: x @ w, (3, 4), (4, 5)),
    "x @ w, 3d by 2d": Arrangement(lambda x, w, b: x @ w, (2, 3, 4), (4, 5)),
    "x @ w, 3d by 3d": Arrangement(lambda x, w, b: x @ w, (2, 3, 4), (2, 4, 5)),
    "x @ w, 4d by 3d": Arrangement(lambda x, w, b: x @ w, (2, 2, 3, 4), (2, 4, 3)),
    "w @ x": Arrangement(lambda x, w, b: w @ x, (4, 3), (5, 4)),
    "w @ x, 2d by 3d": Arrangement(lambda x, w, b: w @ x, (2, 4, 3), (5, 4)),
    "w @ x, 3d by 3d": Arrangement(lambda x, w, b: w @ x, (2, 4, 3), (2, 5, 4)),
    "bmm": Arrangement(lambda x, w, b: torch.bmm(x, w), (2, 3, 4), (2, 4, 2)),
    "bmm left": Arrangement(lambda x, w, b: torch.bmm(w, x), (2, 4, 3), (2, 2, 4)),
    "einsum": Arrangement(lambda x, w, b: torch.einsum("bij,kj->bki", x, w), (2, 3, 4), (5, 4)),
    "addmm": Arrangement(_addmm, (3, 4), (4, 5), (5,)),
    "addmm, whole bias": Arrangement(_addmm, (3, 4), (4, 5), (3, 5)),
    "addmm, alpha": Arrangement(partial(_addmm, alpha=-0.5), (3, 4), (4, 5), (5,)),
    "addmm, beta": Arrangement(partial(_addmm, beta=-2.0), (3, 4), (4, 5), (5,)),
    "addmm, alpha, beta": Arrangement(partial(_addmm, alpha=0.5, beta=3.0), (3, 4), (4, 5), (5,)),
    "addmm left, alpha, beta": Arrangement(partial(_addmm_left, alpha=0.5, beta=3.0), (4, 3), (5, 4), (5, 1)),
    "baddbmm": Arrangement(_baddbmm, (2, 3, 4), (2, 4, 5), (2, 3, 5)),
    "baddbmm, broadcast bias": Arrangement(_baddbmm, (2, 3, 4), (2, 4, 5), (5,)),
    "baddbmm, alpha, beta": Arrangement(partial(_baddbmm, alpha=0.5, beta=3.0), (2, 3, 4), (2, 4, 5), (2, 1, 5)),
    "baddbmm left, alpha, beta": Arrangement(
        partial(_baddbmm_left, alpha=-0.5, beta=-3.0), (2, 4, 3), (2, 5, 4), (2, 5, 1)
    ),
    "addbmm": Arrangement(_added(torch.addbmm), (2, 3, 4), (2, 4, 5), (3, 5)),
    "addbmm left, alpha, beta": Arrangement(
        _added(torch.addbmm, True, beta=3.0, alpha=-0.5), (2, 4, 3), (2, 5, 4), (3,)
    ),
    "matrix @ w": Arrangement(lambda x, w, b: x @ w, (3, 4), (4,)),
    "w @ vector": Arrangement(lambda x, w, b: w @ x, (4,), (3, 4)),
    "vector @ w": Arrangement(lambda x, w, b: x @ w, (4,), (4, 3)),
    "addmv": Arrangement(_added(torch.addmv), (3, 4), (4,), (3,)),
    "addmv left, alpha, beta": Arrangement(_added(torch.addmv, True, beta=3.0, alpha=-0.5), (4,), (3, 4), (3,)),
    "dot": Arrangement(lambda x, w, b: x @ w, (4,), (4,)),
    "vdot": Arrangement(lambda x, w, b: torch.vdot(x, w), (4,), (4,)),
    "vdot left": Arrangement(lambda x, w, b: torch.vdot(w, x), (4,), (4,)),
    "addr": Arrangement(_added(torch.addr), (3,), (4,), (3, 4)),
    "addr left, alpha, beta": Arrangement(_added(torch.addr, True, beta=3.0, alpha=-0.5), (4,), (3,), (3, 4)),
}
"""Products of vectors among them, whose shares are as they would be with matrices of one row or column."""
CASES_ANYWHERE = {name: case for name, case in CASES.items() if name not in PER_SAMPLE}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@given(seed=SEEDS, nonnegative=st.booleans(), frozen=st.booleans(), name=st.sampled_from(sorted(CASES_ANYWHERE)))
def test_matrix_products_in_every_arrangement(
    arrangement: str, seed: int, nonnegative: bool, frozen: bool, name: str
) -> None:
    function, shape, weight, bias = ARRANGEMENTS[arrangement]
    layer = Layer(function, draw(seed, *weight), None if bias is None else draw(seed + 1, *bias), frozen)
    x = draw(seed + 2, *shape)
    setup = Setup(layer, x, draw(seed + 3, *layer(x).shape), nonnegative, frozen)
    _check(CASES[name], setup)


KERNELS: dict[str, tuple[Affine, tuple[int, ...], tuple[int, ...]]] = {
    "SlowConv2DBackward0": (
        lambda x, w, b: aten_nn.thnn_conv2d(x, w, [2, 2], b, [2, 1], [1, 0]),
        (2, 3, 4, 4),
        (4, 3, 2, 2),
    ),
    "SlowConv3DBackward0": (
        lambda x, w, b: aten_nn.slow_conv3d(x, w, [2, 1, 2], b, [1, 2, 1], [1, 0, 1]),
        (1, 2, 2, 3, 2),
        (3, 2, 2, 1, 2),
    ),
    "SlowConvDilated2DBackward0": (
        lambda x, w, b: aten_nn.slow_conv_dilated2d(x, w, [2, 2], b, [1, 2], [1, 1], [2, 1]),
        (2, 3, 3, 3),
        (4, 3, 2, 2),
    ),
    "SlowConvDilated3DBackward0": (
        lambda x, w, b: aten_nn.slow_conv_dilated3d(x, w, [2, 1, 2], b, [1, 1, 1], [1, 0, 1], [2, 1, 1]),
        (1, 2, 2, 2, 2),
        (3, 2, 2, 1, 2),
    ),
    "SlowConvTranspose2DBackward0": (
        lambda x, w, b: aten_nn.slow_conv_transpose2d(x, w, [2, 2], b, [2, 2], [1, 0], [1, 0], [1, 2]),
        (2, 3, 3, 2),
        (3, 4, 2, 2),
    ),
    "SlowConvTranspose3DBackward0": (
        lambda x, w, b: aten_nn.slow_conv_transpose3d(x, w, [2, 1, 2], b, [2, 1, 1], [1, 0, 0], [1, 0, 0], [1] * 3),
        (1, 2, 2, 2, 2),
        (2, 3, 2, 1, 2),
    ),
    "ConvolutionBackward1": (
        lambda x, w, b: torch._convolution(x, w, b, [1, 2], [1, 0], [1, 1], False, [0, 0], 2, False, False, True, True),
        (2, 4, 3, 4),
        (2, 2, 2, 2),
    ),
    "ConvTbcBackward0": (
        lambda x, w, b: torch.conv_tbc(x, w, torch.zeros(w.shape[-1]).double() if b is None else b, 1),
        (3, 2, 2),
        (2, 2, 4),
    ),
}
"""Convolutions by the names of their kernels."""
OUTPUTS = {"SlowConvTranspose2DBackward0": 1, "SlowConvTranspose3DBackward0": 1, "ConvTbcBackward0": -1}
"""Where a kernel has its output channels, if not first."""


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(kernel, name) for kernel in KERNELS for name in (CASES_ANYWHERE if kernel == "ConvTbcBackward0" else CASES)],
)
@given(seed=SEEDS, before=st.booleans(), frozen=st.booleans(), biased=st.booleans())
@settings(max_examples=3)
def test_convolutions_by_other_names(
    kernel: str, name: str, seed: int, before: bool, frozen: bool, biased: bool
) -> None:
    function, shape, weight = KERNELS[kernel]
    outer = weight[OUTPUTS.get(kernel, 0)]
    biased = biased or kernel == "ConvTbcBackward0"
    layer = Layer(function, draw(seed, *weight), draw(seed + 1, outer) if biased else None, frozen)
    x = draw(seed + 2, *shape).requires_grad_()
    z = layer(x)
    assert z.grad_fn is not None
    assert z.grad_fn.name() == kernel
    _check(CASES[name], Setup(layer, x.detach(), draw(seed + 3, *z.shape), before, False))


@pytest.mark.parametrize("name", ["epsilon=0", "epsilon=0.1", "gamma=0.25", "wsquare"])
@pytest.mark.parametrize(
    "kind", [*KERNELS, "addbmm", "matrix @ w", "w @ vector", "vector @ w", "addmv", "dot", "vdot", "vdot left", "addr"]
)
def test_relevance_of_weights_by_other_names(kind: str, name: str) -> None:
    arrangement = ARRANGEMENTS.get(kind) or Arrangement(*KERNELS[kind], (4,) if kind == "ConvTbcBackward0" else None)
    bias = None if arrangement.bias is None else draw(2, *arrangement.bias)
    layer, x = Layer(arrangement.function, draw(0, *arrangement.weight), bias), draw(1, *arrangement.x)
    found = shares(CASES[name], layer.dense(arrangement.x), x, layer(x).detach())
    explanation = explain(layer, x, torch.sum, composite=only(CASES[name].rule), parameters="*")
    same(explanation.parameters["weight"], weight_relevance(layer, x, found))


@given(seed=SEEDS, name=st.sampled_from(sorted(CASES_ANYWHERE)))
def test_the_input_may_be_the_kernel(seed: int, name: str) -> None:
    """A convolution whose weight carries the signal and whose input is a parameter."""
    layer = Layer(lambda x, w, b: F.conv1d(w, x, b, padding=1), draw(seed, 2, 3, 5), draw(seed + 1, 4))
    x = draw(seed + 2, 4, 3, 3)
    _check(CASES[name], Setup(layer, x, draw(seed + 3, 2, 4, 5), False, False))


# F.linear of a 3-D input that is not contiguous records the bias as an addition of its own, outside z.
_SPLIT = pytest.mark.xfail(strict=True, reason="the bias of a matrix product that is added apart is not part of z")


@pytest.mark.parametrize(
    "name",
    [
        "epsilon=0",
        *(pytest.param(n, marks=_SPLIT) for n in ("epsilon=0.1", "gamma=0.25", "zplus", "alpha_beta=2,1", "wsquare")),
    ],
)
def test_the_memory_layout_changes_nothing(name: str) -> None:
    """PyTorch adds the bias of a linear layer in an operation of its own where the input is not contiguous."""
    layer, x = Layer(F.linear, draw(0, 5, 4), draw(1, 5)), draw(2, 3, 2, 4)
    top = through(CASES[name], layer, x, layer(x).detach())
    explanation = explain(lambda x: layer(x.transpose(0, 1)), x, torch.sum, composite=only(CASES[name].rule))
    agrees(explanation, top.relevance, {"parameters": top.bias, "absorbed": top.absorbed})


# Batch norm merged into the layer before it -----------------------------------------------------------------


def _norm(channels: int, dimensions: int, affine: bool, seed: int) -> nn.Module:
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions](channels, affine=affine)
    norm = norm.double().eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(draw(seed, channels))
    norm.running_var.copy_(draw(seed + 1, channels).abs() + 0.1)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(draw(seed + 2, channels))
            norm.bias.copy_(draw(seed + 3, channels))
    return norm


LAYERS: dict[str, tuple[Affine, tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (F.linear, (3, 4), (5, 4), 5),
    "conv1d": (partial(convolution, transposed=False, padding=1), (2, 2, 5), (3, 2, 3), 3),
    "conv2d, groups": (partial(convolution, transposed=False, stride=2, groups=2), (2, 4, 4, 4), (6, 2, 2, 2), 6),
    "conv transposed": (partial(convolution, transposed=True, stride=2), (2, 3, 3, 3), (3, 2, 2, 2), 2),
    "conv transposed, groups": (partial(convolution, transposed=True, groups=2), (2, 4, 3), (4, 3, 2), 6),
}


def merged(layer: Layer, norm: nn.Module, shape: tuple[int, ...]) -> oracle.Dense:
    """Layer and norm as one affine layer."""
    with torch.no_grad():
        bias = norm(layer(torch.zeros(*shape, dtype=torch.float64)))
        weight = oracle.matrix(lambda x: norm(layer(x)) - bias, shape)
    linked = layer.dense(shape).linked
    return oracle.Dense(torch.where(linked, weight, 0.0), bias.flatten(), linked)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "epsilon=0"])
@given(seed=SEEDS, biased=st.booleans(), affine=st.booleans(), after=st.booleans(), frozen=st.booleans())
@settings(max_examples=5)
def test_batch_norm_is_merged(
    kind: str, name: str, seed: int, biased: bool, affine: bool, after: bool, frozen: bool
) -> None:
    function, shape, weight_shape, outer = LAYERS[kind]
    layer = Layer(function, draw(seed, *weight_shape), draw(seed + 1, outer) if biased else None)
    norm = _norm(outer, len(shape) - 2, affine, seed + 2)
    model = nn.Sequential(layer, norm, *([nn.ReLU()] if after else [])).requires_grad_(not frozen)
    x = draw(seed + 9, *shape)
    with torch.no_grad():
        y = model(x)
    multiplier = draw(seed + 10, *y.shape)
    found = shares(CASES[name], merged(layer, norm, shape), x, y * multiplier)
    explanation = explain(model, x, lambda out: (out * multiplier).sum(), composite=only(CASES[name].rule))
    agrees(explanation, found[:-1].sum(1).reshape(shape), {"parameters": found[-1].sum()}, CASES[name].tolerance)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["epsilon=0.1", "gamma=0.25", "zplus", "zbox=-3,2", "wsquare", "flat"])
def test_relevance_of_a_weight_before_a_batch_norm(name: str, kind: str, frozen: bool) -> None:
    """All relevance of the inputs passed the weight."""
    function, shape, weight_shape, outer = LAYERS[kind]
    layer, norm, x = (
        Layer(function, draw(0, *weight_shape), draw(1, outer)),
        _norm(outer, len(shape) - 2, True, 2),
        draw(9, *shape),
    )
    model = nn.Sequential(layer, norm).requires_grad_(not frozen)
    found = shares(CASES[name], merged(layer, norm, shape), x, model(x).detach())
    explanation = explain(model, x, torch.sum, composite=only(CASES[name].rule), parameters="0.weight")
    same(explanation.parameters["0.weight"], weight_relevance(layer, x, found))


@pytest.mark.parametrize("kind", LAYERS)
@given(seed=SEEDS, biased=st.booleans())
@settings(max_examples=5)
def test_without_stabiliser_nothing_needs_merging(kind: str, seed: int, biased: bool) -> None:
    function, shape, weight_shape, outer = LAYERS[kind]
    layer = Layer(function, draw(seed, *weight_shape), draw(seed + 1, outer) if biased else None)
    norm = _norm(outer, len(shape) - 2, True, seed + 2)
    x = draw(seed + 9, *shape)
    found = shares(CASES["epsilon=0"], merged(layer, norm, shape), x, norm(layer(x)).detach())
    explanation = explain(nn.Sequential(layer, norm), x, torch.sum, composite=only(Epsilon()))
    agrees(explanation, found[:-1].sum(1).reshape(shape))
    accounts = explanation.ledger.accounts
    number(accounts["parameters"] + accounts["constants"], found[-1].sum())


@pytest.mark.parametrize("name", ["gamma=0.25", "epsilon=0.1", "zplus", "flat"])
@pytest.mark.parametrize(
    "arrangement",
    [
        Arrangement(lambda x, w, b: torch.bmm(x, w), (2, 4, 3), (2, 3, 4)),
        Arrangement(lambda x, w, b: torch.bmm(x, w), (2, 4, 3), (2, 3, 5)),
        Arrangement(lambda x, w, b: torch.bmm(w, x), (2, 3, 4), (2, 4, 3)),
        Arrangement(lambda x, w, b: w @ x, (3, 4), (4, 3)),
        Arrangement(lambda x, w, b: w @ x, (3, 4), (5, 3)),
        Arrangement(lambda x, w, b: F.conv1d(w, x), (4, 3, 2), (4, 3, 5)),
    ],
    ids=["bmm", "bmm wide", "bmm left", "mm left", "mm left wide", "kernel"],
)
def test_batch_norm_over_another_dimension_than_the_weight_scales(arrangement: Arrangement, name: str) -> None:
    """The channels of the norm are not the rows of the weight here. The layer is then explained as it stands, or as
    one with the norm: which of them is open, but one of them it must be."""
    layer = Layer(arrangement.function, draw(0, *arrangement.weight), None)
    x = draw(1, *arrangement.x)
    z = layer(x).detach()
    norm = _norm(z.shape[1], z.ndim - 2, True, 2)
    y = norm(z).detach()
    explanation = explain(nn.Sequential(layer, norm), x, torch.sum, composite=only(CASES[name].rule))
    assert explanation.ledger.closes
    as_one = shares(CASES[name], merged(layer, norm, arrangement.x), x, y)[:-1].sum(1).reshape(x.shape)
    multiplier = torch.autograd.grad(norm(z.requires_grad_()).sum(), z)[0]
    as_two = through(CASES[name], layer, x, z.detach() * multiplier).relevance
    close = [float((explanation.relevance - e).abs().max()) < 1e-10 * float(e.abs().max()) for e in (as_one, as_two)]
    assert any(close)


# Other structures -------------------------------------------------------------------------------------------


def test_pass_hands_relevance_on() -> None:
    x, multiplier = draw(0, 3, 4), draw(1, 3, 4)
    layer = Layer(F.linear, draw(2, 4, 4), draw(3, 4))
    r = layer(x).detach() * multiplier
    agrees(explain(layer, x, lambda y: (y * multiplier).sum(), composite=only(Pass())), r, {"parameters": 0.0})


@pytest.mark.parametrize("name", CASES)
@given(seed=SEEDS)
@settings(max_examples=5)
def test_a_residual_behind_the_layer(name: str, seed: int) -> None:
    """The layer's output, the relu of it and a detour all take part: relevance of one is not that of another."""
    layer, x, m = Layer(F.linear, draw(seed, 4, 4), draw(seed + 1, 4)), draw(seed + 2, 3, 4), draw(seed + 3, 3, 4)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return z.relu() + 2 * z + x

    z = layer(x).detach()
    expected = through(CASES[name], layer, x, m * (z.relu() + 2 * z))
    explanation = explain(Residual(), x, lambda y: (y * m).sum(), composite=only(CASES[name].rule))
    agrees(explanation, expected.relevance + m * x, {"parameters": expected.bias, "absorbed": expected.absorbed})


@pytest.mark.parametrize("frozen", [False, True])
@given(seed=SEEDS, one=st.sampled_from(sorted(CASES)), two=st.sampled_from(sorted(CASES)))
@settings(max_examples=60)
def test_two_layers_share_an_input(frozen: bool, seed: int, one: str, two: str) -> None:
    """Both gauges meet at the shared input, behind a product that needs multipliers."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = Layer(F.linear, draw(seed, 4, 5), draw(seed + 1, 4), frozen)
            self.right = Layer(F.linear, draw(seed + 2, 4, 5), draw(seed + 3, 4), frozen)

        def forward(self, x: Tensor) -> Tensor:
            h = (x * factor).relu()
            return self.left(h) + self.right(h).relu() + h.sum(1, keepdim=True)

    factor, x = draw(seed + 4, 3, 5), draw(seed + 5, 3, 5)
    fork = Fork()
    h = (x * factor).relu()
    left = through(CASES[one], fork.left, h, fork.left(h).detach())
    right = through(CASES[two], fork.right, h, fork.right(h).relu().detach())
    rules = {When("dense", path="left"): CASES[one].rule, When("dense", path="right"): CASES[two].rule}
    explanation = explain(fork, x, torch.sum, composite=Composite.of("two", rules))
    total = left.relevance + right.relevance + 4 * h
    alive = torch.where(h > 0, total, 0.0)
    agrees(
        explanation,
        alive,
        {
            "parameters": left.bias + right.bias,
            "absorbed": left.absorbed + right.absorbed + (total - alive).sum(),
        },
        max(CASES[one].tolerance, CASES[two].tolerance),
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("upper", [*RELEVANCE, "gamma=0.25"])
@given(seed=SEEDS, lower=st.sampled_from(sorted(CASES)))
@settings(max_examples=25)
def test_relevance_passes_views_slices_and_concatenation(upper: str, frozen: bool, seed: int, lower: str) -> None:
    """A rule that hands on relevance stands in the middle; what lies before it needs multipliers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = Layer(F.linear, draw(seed, 6, 4), draw(seed + 1, 6), frozen)
            self.up = Layer(F.conv1d, draw(seed + 2, 3, 2, 2), draw(seed + 3, 3), frozen)

        def forward(self, x: Tensor) -> Tensor:
            h = self.low(x).relu()
            parts = torch.cat([h[:, 4:].reshape(-1, 2, 1), h.view(-1, 2, 3).flip(2), h[:, :2].unsqueeze(-1)], 2)
            return self.up(parts)

    net, x, m = Net(), draw(seed + 4, 3, 4), draw(seed + 5, 3, 3, 4)
    h = net.low(x).relu().detach()
    parts = torch.cat([h[:, 4:].reshape(-1, 2, 1), h.view(-1, 2, 3).flip(2), h[:, :2].unsqueeze(-1)], 2)
    top = through(CASES[upper], net.up, parts, net.up(parts).detach() * m)
    back = top.relevance[:, :, 1:4].flip(2).reshape(-1, 6)
    back = back + F.pad(top.relevance[:, :, 0], (4, 0)) + F.pad(top.relevance[:, :, 4], (0, 4))
    alive = torch.where(h > 0, back, 0.0)
    bottom = through(CASES[lower], net.low, x, alive)
    rules = {When("dense"): CASES[lower].rule, When("convolution"): CASES[upper].rule}
    explanation = explain(net, x, lambda y: (y * m).sum(), composite=Composite.of("two", rules))
    lost = top.absorbed + (back - alive).sum() + bottom.absorbed
    accounts = {"parameters": top.bias + bottom.bias, "absorbed": lost}
    agrees(explanation, bottom.relevance, accounts, max(CASES[upper].tolerance, CASES[lower].tolerance))


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.3, 0.25]).double()


@pytest.mark.parametrize("name", CASES)
@given(seed=SEEDS)
@settings(max_examples=5)
def test_normalised_pictures(name: str, seed: int) -> None:
    """The first layer reads ``(x - mean) / std``. Relevance of a picture is that of the standardised one times
    ``x / (x - mean)``, and the mean, a constant, has the rest."""
    layer = Layer(F.conv2d, draw(seed, 2, 3, 2, 2), draw(seed + 1, 2))
    x, m = draw(seed + 2, 2, 3, 3, 3).sigmoid(), draw(seed + 3, 2, 2, 2, 2)
    column = (3, 1, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x - MEAN.view(column)) / STD.view(column))

    y = (x - MEAN.view(column)) / STD.view(column)
    top = through(CASES[name], layer, y, layer(y).detach() * m)
    expected = top.relevance * x / (x - MEAN.view(column))
    explanation = explain(Net(), x, lambda y: (y * m).sum(), composite=only(CASES[name].rule))
    rest = (top.relevance - expected).sum()
    accounts = {"parameters": top.bias, "absorbed": top.absorbed, "constants": rest}
    # x close to the mean: the quotient is large and of few digits.
    agrees(explanation, expected, accounts, 1e-8)


@pytest.mark.parametrize("upper", RELEVANCE)
@pytest.mark.parametrize("lower", ["gamma=0.25", "epsilon=0.1", "zplus"])
def test_dead_units_may_carry_relevance_where_relu_is_the_identity(lower: str, upper: str) -> None:
    """With ``Pass`` on the relu, as zennit has it, flat and its kin send relevance to units that are off."""
    low, up = Layer(F.linear, draw(0, 6, 4), draw(1, 6)), Layer(F.linear, draw(2, 3, 6), draw(3, 3))
    x = draw(4, 5, 4)
    h = low(x).relu().detach()
    top = through(CASES[upper], up, h, up(h).detach())
    bottom = through(CASES[lower], low, x, top.relevance)
    rules = {
        When("dense", path="0"): CASES[lower].rule,
        When("dense", path="2"): CASES[upper].rule,
        When("piecewise linear"): Pass(),
    }
    explanation = explain(nn.Sequential(low, nn.ReLU(), up), x, torch.sum, composite=Composite.of("pass", rules))
    agrees(explanation, bottom.relevance, {"parameters": top.bias + bottom.bias})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("constant", ["cat", "where", "masked_fill", "pad"])
def test_relevance_meets_constants_that_nobody_recorded(name: str, constant: str) -> None:
    """Relevance in either gauge on its way through an operation that puts constants beside the signal."""
    layer = Layer(F.linear, draw(0, 3, 6), draw(1, 3))
    fixed, mask = draw(2, 4, 6), draw(3, 4, 6) > 0
    x = draw(4, 4, 6) if constant in ("where", "masked_fill") else draw(4, 4, 2)

    def join(x: Tensor) -> Tensor:
        if constant == "cat":
            return torch.cat([x, fixed[:, 2:]], 1)
        if constant == "where":
            return torch.where(mask, x, fixed)
        if constant == "masked_fill":
            return x.masked_fill(mask, 0.7)
        return F.pad(x, (1, 3), value=0.7)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(join(x))

    h = join(x)
    top = through(CASES[name], layer, h, layer(h).detach())
    blind = constant == "pad" and isinstance(CASES[name].rule, BLIND)
    if blind:
        whole = Layer(lambda x, w, b: F.linear(F.pad(x, (1, 3)), w, b), layer.weight.detach(), layer.bias)
        top = through(CASES[name], whole, x, layer(h).detach())
    kept = {
        "cat": lambda r: r[:, :2],
        "where": lambda r: torch.where(mask, r, 0.0),
        "masked_fill": lambda r: torch.where(mask, 0.0, r),
        "pad": lambda r: r if blind else r[:, 1:3],
    }[constant](top.relevance)
    explanation = explain(Net(), x, torch.sum, composite=only(CASES[name].rule))
    same(explanation.relevance, kept, CASES[name].tolerance)
    ledger = explanation.ledger
    number(ledger.accounts["parameters"], top.bias)
    # The constant's share is booked where its value can be had, and named where not.
    if ledger.unresolved:
        assert abs(ledger.residual - float(top.relevance.sum() - kept.sum())) < 1e-10 * abs(ledger.output)
    else:
        agrees(explanation, kept, {"constants": top.relevance.sum() - kept.sum()}, CASES[name].tolerance)


def _moved(x: Tensor, value: float) -> Tensor:
    """Padded with the channels behind, and moved on."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 2, 0), value=value)
    return padded[None].clone().unbind()[0].permute(0, 3, 1, 2).flip(2).contiguous()


PADDED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "at all sides": lambda x, value: F.pad(x, (1, 1, 1, 1), value=value),
    "at one side": lambda x, value: F.pad(x, (0, 1, 2, 0), value=value),
    "and cropped": lambda x, value: F.pad(x, (-1, 2, 1, -1), value=value),
    "twice": lambda x, value: F.pad(F.pad(x, (1, 0), value=value), (0, 1, 1, 1), value=value),
    "and moved": _moved,
}


INNER = torch.tensor([[0.1, 1.0, 1.0, 1.0], [0.1, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
"""What is cropped holds no extreme of a sample."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", PADDED)
def test_padding_as_an_operation_is_padding(way: str, name: str) -> None:
    """What a convolution pads by itself and what is padded before it get the same: nothing, and no share in sums."""
    weight, x = draw(0, 3, 2, 2, 3), draw(2, 2, 2, 3, 4) * INNER
    pad = PADDED[way]
    layer = Layer(lambda x, w, b: F.conv2d(pad(x, 0.0), w, b), weight, draw(1, 3))
    expected = through(CASES[name], layer, x, layer(x).detach())
    explanation = explain(layer, x, torch.sum, composite=only(CASES[name].rule))
    same(explanation.relevance, expected.relevance, CASES[name].tolerance)
    number(explanation.ledger.accounts["parameters"], expected.bias, CASES[name].tolerance)
    assert explanation.ledger.error < CASES[name].tolerance


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_padding_in_front_is_the_padding_of_the_layer(frozen: bool, name: str) -> None:
    weight, x = draw(0, 3, 2, 3, 3), draw(2, 2, 2, 4, 4)
    inside = Layer(lambda x, w, b: F.conv2d(x, w, b, padding=1), weight, draw(1, 3), frozen)
    before = Layer(lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1)), w, b), weight, draw(1, 3), frozen)
    explanations = [explain(layer, x, torch.sum, composite=only(CASES[name].rule)) for layer in (inside, before)]
    accounts = [explanation.ledger.accounts for explanation in explanations]
    agrees(explanations[1], explanations[0].relevance, accounts[0], CASES[name].tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", PADDED)
def test_padding_with_a_number(way: str, name: str) -> None:
    """It has the relevance of a constant under rules that look at values, which is booked; none under the others."""
    weight, x = draw(0, 3, 2, 2, 3), draw(2, 2, 2, 3, 4) * INNER
    pad, rule = PADDED[way], CASES[name].rule
    layer = Layer(lambda x, w, b: F.conv2d(x, w, b), weight, draw(1, 3))
    net = Layer(lambda x, w, b: F.conv2d(pad(x, 0.75), w, b), weight, draw(1, 3))
    h, z = pad(x, 0.75), net(x).detach()
    if isinstance(rule, BLIND):
        empty = Layer(lambda x, w, b: F.conv2d(pad(x, 0.0), w, b), weight, draw(1, 3))
        expected = through(CASES[name], empty, x, z)
        kept, constants = expected.relevance, torch.zeros(())
    else:
        top = through(CASES[name], layer, h, z)
        there = pad(torch.ones_like(x), 0.0)
        (kept,) = torch.autograd.functional.vjp(lambda x: pad(x, 0.0), x, top.relevance)[1:]
        constants = (top.relevance * (1 - there)).sum()
    explanation = explain(net, x, torch.sum, composite=only(rule))
    agrees(explanation, kept, {"constants": constants}, CASES[name].tolerance)


@pytest.mark.parametrize("value", [0.0, 0.75])
def test_padding_in_programs_and_of_many_targets(value: float) -> None:
    """Whether what is written is zero is looked up where that can be, and all entries of the ledger are there."""
    layer = Layer(
        lambda x, w, b: F.conv1d(F.pad(x, (2, 1), value=value), w, b).flatten(1), draw(0, 3, 2, 2), draw(1, 3)
    )
    x = draw(2, 4, 2, 5)
    expected = explain(layer, x, 1)
    found = [trace(layer, x, 1)(x), *explain_many(layer, x, [1, 1])]
    scale = float(expected.ledger.output)
    assert value == 0 or expected.ledger.accounts["constants"] != 0
    for other in found:
        same(other.relevance, expected.relevance)
        assert len(other.ledger) == len(expected.ledger)
        for account, amount in expected.ledger.accounts.items():
            assert abs(other.ledger.accounts[account] - amount) < 1e-12 * abs(scale)


def test_padding_has_no_part_in_a_samples_own_bounds() -> None:
    x = draw(0, 2, 2, 4).abs() + 1
    layer = Layer(lambda x, w, b: F.conv1d(F.pad(x, (1, 1)), w, b), draw(1, 3, 2, 3), draw(2, 3))
    low, high = (extreme(x, (1, 2)).tolist() for extreme in (torch.amin, torch.amax))
    found = explain(layer, x, torch.sum, composite=only(ZBox())).relevance
    for sample in range(2):
        rule = ZBox(low[sample], high[sample])
        own = explain(layer, x[sample : sample + 1], torch.sum, composite=only(rule)).relevance
        same(found[sample : sample + 1], own, 1e-8)


@pytest.mark.parametrize("rule", [Gamma(bias=False), ZPlus(bias=False), Epsilon(0.1, bias=False), Flat(), ZBox(-3, 3)])
def test_rules_without_bias_need_none(rule: Rule) -> None:
    """A bias that autograd did not record takes no part, so nobody needs to know it."""
    weight, bias, x = draw(0, 3, 4), draw(1, 3), draw(2, 5, 4)
    for function, w, v in (
        (F.linear, weight, x),
        (F.conv1d, weight.unsqueeze(-1), x.unsqueeze(-1)),
    ):
        plain = explain(partial(function, weight=w, bias=bias), v, torch.sum, composite=only(rule))
        known = explain(Layer(function, w, bias), v, torch.sum, composite=only(rule))
        accounts = known.ledger.accounts
        agrees(plain, known.relevance, {"absorbed": accounts["absorbed"], "constants": 0.0})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_bias_may_be_a_plain_tensor(name: str, kind: str) -> None:
    """Autograd does not record it then. A rule that needs it has it all the same or says so, and never does without."""
    weight, bias, x = draw(0, 3, 4), draw(1, 3), draw(2, 5, 4)
    if kind == "convolution":
        weight, x = weight.unsqueeze(-1), x.unsqueeze(-1)
    function = F.linear if kind == "dense" else F.conv1d
    known = explain(Layer(function, weight, bias), x, torch.sum, composite=only(CASES[name].rule))
    try:
        plain = explain(partial(function, weight=weight, bias=bias), x, torch.sum, composite=only(CASES[name].rule))
    except BrokenPromiseError as error:
        if "did not record" in str(error):
            return
        raise
    same(plain.relevance, known.relevance)
    found, expected = plain.ledger.accounts, known.ledger.accounts
    # What adds up to 0 is as exact as its summands, of which the output is one.
    number(found["parameters"] + found["constants"] + known.ledger.output, expected["parameters"] + known.ledger.output)
    assert plain.ledger.closes


@pytest.mark.parametrize("source", ["alpha", "pad", "sub"])
@pytest.mark.parametrize("name", ["gamma=0.25", "zplus", "alpha_beta=2,1"])
def test_what_is_taken_for_nonnegative_is(source: str, name: str) -> None:
    """Rules skip the terms of negative inputs behind relu; here relu comes first and negative values follow."""
    layer, x = Layer(F.linear, draw(0, 3, 6), draw(1, 3)), draw(2, 4, 6)
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "alpha": lambda x: torch.add(x.relu(), x.sigmoid(), alpha=-1),
        "pad": lambda x: F.pad(x[:, :4].relu(), (1, 1), value=-1.0),
        "sub": lambda x: x.relu() - x.abs(),
    }

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(change[source](x))

    top = through(CASES[name], layer, change[source](x), layer(change[source](x)).detach())
    explanation = explain(Net(), x, torch.sum, composite=only(CASES[name].rule))
    accounts = explanation.ledger.accounts
    number(accounts["parameters"], top.bias)
    number(accounts["absorbed"], top.absorbed, 1e-8)


@pytest.mark.parametrize(
    "rule", [Epsilon(0.0, bias=False), Gamma(epsilon=0.0), Gamma(epsilon=0.0, bias=False), ZPlus(epsilon=0.0)]
)
def test_without_a_stabiliser_empty_sums_absorb(rule: Rule) -> None:
    """A black corner of a picture and a rule without stabiliser: 0 / 0 has no share to give, and stays finite."""
    layer, x = Layer(F.linear, draw(0, 3, 4), draw(1, 3)), draw(2, 2, 4)
    x[0] = 0
    explanation = explain(layer, x, torch.sum, composite=only(rule))
    assert explanation.finite()
    assert not explanation.relevance[0].any()
    assert explanation.ledger.closes


def test_alpha_and_beta_differ_by_one() -> None:
    with pytest.raises(ValueError, match="alpha - beta"):
        AlphaBeta(2.0, 0.5)
    with pytest.raises(ValueError, match="alpha - beta"):
        AlphaBeta(0.5, -0.5)


# Kernels of single processors -------------------------------------------------------------------------------

_kernels: Any = torch.ops.aten
SINGLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "MkldnnConvolutionBackward0": lambda x, w, b: _kernels.mkldnn_convolution(x, w, b, [1, 1], [1, 1], [1, 1], 1),
    "NnpackSpatialConvolutionBackward0": lambda x, w, b: _kernels._nnpack_spatial_convolution(x, w, b, [1, 1], [1, 1]),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kernel", SINGLE)
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_single_precision(name: str, kernel: str, frozen: bool) -> None:
    x, m = draw(2, 2, 3, 4, 4), draw(3, 2, 4, 4, 4)
    plain = Layer(partial(F.conv2d, padding=1), draw(0, 4, 3, 3, 3), draw(1, 4), frozen)
    fused = Layer(SINGLE[kernel], plain.weight.detach().float(), draw(1, 4).float(), frozen)  # type: ignore[arg-type]
    try:
        y = fused(x.float().requires_grad_())
    except RuntimeError:
        pytest.skip("not in this build of PyTorch")
    assert y.grad_fn is not None
    assert y.grad_fn.name() == kernel
    ours = explain(fused, x.float(), lambda y: (y * m.to(y)).sum(), composite=only(CASES[name].rule))
    expected = explain(plain, x, lambda y: (y * m).sum(), composite=only(CASES[name].rule))
    assert ours.ledger.closes
    # Sums that nearly cancel lose the digits of the format.
    same(ours.relevance.double(), expected.relevance, 1e-2)

"""Normalisation layers against dense matrices with the statistic held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import explain, relevance
from tests.oracle import agrees, draw, matrix, number, same

SEEDS = st.integers(0, 2**32 - 1)
EPS = 1e-5


class Norm(nn.Module):
    """``function(x, weight, bias)`` with drawn parameters, or none."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        seed: int,
        *,
        affine: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(draw(seed, *shape), not frozen) if affine else None
        self.bias = nn.Parameter(draw(seed + 1, *shape), not frozen) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


class Expected(NamedTuple):
    relevance: Tensor
    bias: Tensor
    mean: Tensor
    """What a constant mean, times weight and statistic, subtracts."""


def per_row(x: Tensor, m: Tensor, weight: Tensor | None, bias: Tensor | None, *, centred: bool = True) -> Expected:
    """Rows of ``x`` (rows, width) are each divided by their own constant deviation; weight and bias of the same shape.

    Row by row and unit by unit: output j is ``sum_i x_i (delta_ij - 1 / n) w_j / s + b_j``.
    """
    rows, width = x.shape
    relevance = torch.zeros_like(x)
    for row in range(rows):
        mean = x[row].mean() if centred else 0.0
        deviation = ((x[row] - mean) ** 2).mean().add(EPS).sqrt()
        for i in range(width):
            for j in range(width):
                w = 1.0 if weight is None else weight[row, j]
                share = ((1.0 if i == j else 0.0) - (1.0 / width if centred else 0.0)) * w / deviation
                relevance[row, i] += x[row, i] * share * m[row, j]
    zero = torch.zeros((), dtype=torch.float64)
    return Expected(relevance, zero if bias is None else (bias * m).sum(), zero)


def check(norm: Norm, x: Tensor, m: Tensor, expected: Expected, constants: Tensor | float = 0.0) -> None:
    """Relevance and the bias' account, and output = inputs + parameters + constants."""
    explanation = explain(norm, x, lambda y: (y * m).sum())
    accounts = {"parameters": expected.bias, "constants": constants, "absorbed": 0.0, "held back": 0.0, "offsets": 0.0}
    agrees(explanation, expected.relevance, accounts)
    number(explanation.ledger.output, (norm(x) * m).sum())


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def _affine(y: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    y = y if w is None else y * w
    return y if b is None else y + b


def _var_sqrt(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()


def _var_rsqrt(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


def _square_mean(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + EPS)


def _negative_power(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS) ** -0.5


def _inverse(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (1 / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS))


def _var_mean(x: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    second = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (second - mean * mean + EPS).sqrt()


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "var, sqrt, div": _var_sqrt,
    "var, rsqrt, mul": _var_rsqrt,
    "square, mean, sqrt": _square_mean,
    "power -1/2": _negative_power,
    "reciprocal": _inverse,
    "moments": _var_mean,
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("how", ["fused", *WRITTEN])
@given(seed=SEEDS, frozen=st.booleans())
def test_layer_norm(how: str, affine: bool, seed: int, frozen: bool) -> None:
    """Fused or written out by hand: the mean is linear, the deviation a constant."""
    written = layer_norm if how == "fused" else lambda x, w, b: _affine(WRITTEN[how](x), w, b)
    norm = Norm(written, (5,), seed, affine=affine, frozen=frozen)
    x, m = draw(seed + 2, 2, 3, 5), draw(seed + 3, 2, 3, 5)
    weight = None if norm.weight is None else norm.weight.detach().expand(6, 5)
    bias = None if norm.bias is None else norm.bias.detach().expand(6, 5)
    expected = per_row(x.view(6, 5), m.view(6, 5), weight, bias)
    check(norm, x, m, expected._replace(relevance=expected.relevance.view(x.shape)))


def test_layer_norm_over_two_dimensions() -> None:
    norm = Norm(lambda x, w, b: F.layer_norm(x, (3, 4), w, b, EPS), (3, 4), 0)
    x, m = draw(2, 2, 3, 4), draw(3, 2, 3, 4)
    expected = per_row(
        x.view(2, 12),
        m.view(2, 12),
        norm.weight.detach().view(1, 12).expand(2, 12),
        norm.bias.detach().view(1, 12).expand(2, 12),
    )
    check(norm, x, m, expected._replace(relevance=expected.relevance.view(x.shape)))


def test_layer_norm_without_bias() -> None:
    norm = Norm(lambda x, w, b: F.layer_norm(x, (4,), w, None, EPS), (4,), 0)
    x, m = draw(2, 3, 4), draw(3, 3, 4)
    check(norm, x, m, per_row(x, m, norm.weight.detach().expand(3, 4), None))


RMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "square": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS),
    "x * x": lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS),
    "sqrt, div": lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "power -1/2": lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5),
    "reciprocal": lambda x: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "product first": lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * x,
    "torch": lambda x: F.rms_norm(x, x.shape[-1:], eps=EPS),
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("how", RMS)
@given(seed=SEEDS)
def test_rms_norm(how: str, affine: bool, seed: int) -> None:
    """The root of the mean square is a coefficient, so all relevance stays with x."""
    norm = Norm(lambda x, w, b: RMS[how](x) if w is None else w * RMS[how](x), (5,), seed, affine=affine)
    x, m = draw(seed + 2, 3, 5), draw(seed + 3, 3, 5)
    weight = None if norm.weight is None else norm.weight.detach().expand(3, 5)
    expected = per_row(x, m, weight, None, centred=False)
    same(expected.relevance, norm(x).detach() * m)
    check(norm, x, m, expected)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt(),
        lambda x: x / x.std(-1, keepdim=True),
        lambda x: x / x.abs().sum(-1, keepdim=True),
        lambda x: x / x.abs().amax(-1, keepdim=True),
    ],
    ids=["normalize", "norm", "vector_norm", "written", "std", "L1", "maximum"],
)
def test_a_norm_that_divides_is_a_coefficient(norm: Callable[[Tensor], Tensor]) -> None:
    x, m = draw(0, 3, 5), draw(1, 3, 5)
    agrees(explain(norm, x, lambda y: (y * m).sum()), norm(x) * m, {"held back": 0.0})


@given(seed=SEEDS, dimensions=st.integers(0, 3), affine=st.booleans(), frozen=st.booleans())
def test_batch_norm(seed: int, dimensions: int, affine: bool, frozen: bool) -> None:
    """With running statistics every channel is an affine map of its own, ``(x - mean) * scale + bias``."""
    mean, var = draw(seed, 3), draw(seed + 1, 3).abs() + 0.1
    norm = Norm(
        lambda x, w, b: F.batch_norm(x, mean, var, w, b, False, 0.1, EPS), (3,), seed + 2, affine=affine, frozen=frozen
    )
    shape = (2, 3, *[2] * dimensions)
    x, m = draw(seed + 4, *shape), draw(seed + 5, *shape)
    with torch.no_grad():
        shift = norm(torch.zeros(shape).double())
        weight = matrix(lambda u: norm(u) - shift, shape)
    assert torch.count_nonzero(weight) == weight.shape[0]
    scale = weight.diagonal().reshape(shape)
    bias = torch.zeros(3).double() if norm.bias is None else norm.bias.detach()
    bias = (m * bias.view(3, *[1] * dimensions)).sum()
    constants = (shift * m).sum() - bias
    check(norm, x, m, Expected(x * scale * m, bias, constants), constants)


@given(seed=SEEDS, groups=st.sampled_from([1, 2, 4]), affine=st.booleans(), frozen=st.booleans())
def test_group_norm(seed: int, groups: int, affine: bool, frozen: bool) -> None:
    """Groups of channels of each sample; with as many groups as channels it is instance norm."""
    norm = Norm(lambda x, w, b: F.group_norm(x, groups, w, b, EPS), (4,), seed, affine=affine, frozen=frozen)
    x, m = draw(seed + 2, 2, 4, 3), draw(seed + 3, 2, 4, 3)
    rows = (2 * groups, 12 // groups)
    channel = [
        None if p is None else p.detach().view(1, 4, 1).expand(2, 4, 3).reshape(rows) for p in (norm.weight, norm.bias)
    ]
    expected = per_row(x.view(rows), m.view(rows), *channel)
    check(norm, x, m, expected._replace(relevance=expected.relevance.view(x.shape)))


@given(seed=SEEDS, affine=st.booleans(), frozen=st.booleans())
def test_instance_norm(seed: int, affine: bool, frozen: bool) -> None:
    norm = Norm(lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=EPS), (4,), seed, affine=affine, frozen=frozen)
    x, m = draw(seed + 2, 2, 4, 5), draw(seed + 3, 2, 4, 5)
    channel = [None if p is None else p.detach().repeat(2).view(8, 1).expand(8, 5) for p in (norm.weight, norm.bias)]
    expected = per_row(x.view(8, 5), m.view(8, 5), *channel)
    check(norm, x, m, expected._replace(relevance=expected.relevance.view(x.shape)))


def test_instance_norm_with_running_statistics() -> None:
    module = nn.InstanceNorm1d(3, affine=True, track_running_stats=True).double().eval()
    module.running_mean.copy_(draw(0, 3))
    module.running_var.copy_(draw(1, 3).abs())
    with torch.no_grad():
        module.weight.copy_(draw(2, 3))
        module.bias.copy_(draw(3, 3))
    x = draw(4, 2, 3, 5)
    scale = module.weight.detach() / (module.running_var + module.eps).sqrt()
    accounts = {"parameters": module.bias.sum() * 10, "constants": -(scale * module.running_mean).sum() * 10}
    agrees(explain(module, x, torch.sum), x * scale.view(3, 1), accounts)


def test_batch_norm_with_statistics_of_the_batch() -> None:
    """In training mode, on the caller's word, the mean of the batch takes part and its deviation is a constant."""
    module = nn.BatchNorm1d(3).double()
    with torch.no_grad():
        module.weight.copy_(draw(0, 3))
        module.bias.copy_(draw(1, 3))
    x, m = draw(2, 6, 3), draw(3, 6, 3)
    expected = per_row(
        x.t(), m.t(), module.weight.detach().view(3, 1).expand(3, 6), module.bias.detach().view(3, 1).expand(3, 6)
    )
    explanation = explain(module, x, lambda y: (y * m).sum(), allow_training=True)
    agrees(explanation, expected.relevance.t(), {"parameters": expected.bias})


def test_a_wrong_statistic_would_be_seen() -> None:
    """Neither the whole gradient nor the identity gives these numbers."""
    x, m = draw(0, 2, 5), draw(1, 2, 5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.layer_norm(leaf, (5,), eps=EPS), leaf, m)
    expected = per_row(x, m, None, None).relevance
    for wrong in (x * gradient, m * F.layer_norm(x, (5,), eps=EPS)):
        assert float((wrong - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 3, 2)])
@pytest.mark.parametrize("kind", ["layer", "group", "batch"])
def test_relevance_of_the_weight(kind: str, shape: tuple[int, ...]) -> None:
    """Asked for, the weight gets what it multiplies: m times the normalised input, times itself."""
    norms: dict[str, nn.Module] = {
        "layer": nn.LayerNorm(shape[-1]), "group": nn.GroupNorm(2, 4),
        "batch": (nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d)(4),
    }  # fmt: skip
    norm = norms[kind].double().eval()
    with torch.no_grad():
        norm.weight.copy_(draw(0, *norm.weight.shape))
        norm.bias.copy_(draw(1, *norm.bias.shape))
    x, m = draw(2, *shape), draw(3, *shape)
    channel = len(shape) - 1 if kind == "layer" else 1
    axes = [axis for axis in range(len(shape)) if axis != channel]
    bias = norm.bias.detach().view([-1 if axis == channel else 1 for axis in range(len(shape))])
    explanation = explain(norm, x, lambda y: (y * m).sum(), parameters="*")
    same(explanation.parameters["weight"], (m * (norm(x).detach() - bias)).sum(axes))
    same(explanation.parameters["bias"], (m * bias).sum(axes))


@pytest.mark.parametrize("kind", ["layer", "group", "batch"])
def test_frozen_parameters_of_a_graph_that_exists(kind: str) -> None:
    """``relevance`` cannot see a frozen bias; what it adds is booked as a constant."""
    norms: dict[str, nn.Module] = {
        "layer": nn.LayerNorm(4), "group": nn.GroupNorm(2, 4), "batch": nn.BatchNorm1d(4),
    }  # fmt: skip
    norm = norms[kind].double().eval()
    with torch.no_grad():
        norm.bias.copy_(draw(1, 4))
    x = draw(2, 3, 4).requires_grad_()
    before = relevance(norm(x).square(), x)
    norm.requires_grad_(False)
    after = relevance(norm(x).square(), x)
    same(after.relevance, before.relevance)
    constants = after.ledger.accounts["constants"]
    number(constants, before.ledger.accounts["parameters"] + before.ledger.accounts["constants"])
    assert after.ledger.closes

"""Normalisation layers against dense matrices with the statistic held constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import Composite, explain, relevance
from dynlrp.rules import REGISTRY, Epsilon, Gamma, Operation
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
    accounts = {"parameters": module.bias.detach().sum() * 10, "constants": -(scale * module.running_mean).sum() * 10}
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


# Other names of the same operations -------------------------------------------------------------------------


class Saving(torch.autograd.Function):
    """Stands in for a kernel that is not to be had here: ``function(x, weight, bias)`` with what its node saves."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], saved: dict[str, Any], *operands: Tensor | None) -> Tensor:
        for name, value in saved.items():
            setattr(ctx, name, value)
            setattr(ctx, "_saved_" + name, value)
        return function(*operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("the rule asks for no derivative")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_fused_rms_norm(registry: dict[str, Operation], weighted: bool, frozen: bool) -> None:
    """CUDA has a kernel for it, whose node is filled here with what it saves."""
    registry["SavingBackward"] = replace(registry["FusedRmsNormBackward0"], name="SavingBackward")

    def fused(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        rstd = torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + EPS)
        saved = {"input": x.detach(), "weight": w, "result1": rstd, "normalized_shape": x.shape[-1:]}
        return Saving.apply(
            lambda x, _: F.rms_norm(x, x.shape[-1:], w, EPS), saved, x, torch.ones(()) if w is None else w
        )

    written = Norm(lambda x, w, b: F.rms_norm(x, (5,), w, EPS), (5,), 0, affine=weighted, frozen=frozen)
    norm = Norm(fused, (5,), 0, affine=weighted, frozen=frozen)
    norm.bias = written.bias = None
    x, m = draw(2, 3, 5), draw(3, 3, 5)
    check(norm, x, m, per_row(x, m, norm.weight.detach().expand(3, 5) if weighted else None, None, centred=False))
    head = nn.Linear(5, 2, bias=False).double()
    ours, theirs = (
        explain(nn.Sequential(n, head), x, 0, composite=EPSILON, parameters="*") for n in (norm, written)
    )  # epsilon has the norm replayed
    agrees(ours, theirs.relevance, theirs.ledger.accounts)
    if weighted and not frozen:
        same(ours.parameters["0.weight"], theirs.parameters["0.weight"])


EPSILON = Composite.of("epsilon", {"dense": Epsilon(1e-3), "convolution": Epsilon(1e-3)})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["CudnnBatchNormBackward0", "MiopenBatchNormBackward0"])
def test_batch_norm_of_other_devices(registry: dict[str, Operation], name: str, training: bool) -> None:
    """Their nodes call epsilon by its whole name, and save statistics of the batch where those were taken."""
    registry["SavingBackward"] = replace(registry[name], name="SavingBackward")
    x, m, weight, bias, mean, var = draw(0, 4, 3), draw(1, 4, 3), *(draw(2 + i, 3) for i in range(3)), draw(5, 3).abs()
    plain = lambda x, w, b: F.batch_norm(x, mean.clone(), var.clone(), w, b, training, 0.1, EPS)  # noqa: E731
    saved = {
        "input": x, "weight": weight, "running_mean": mean, "running_var": var, "training": training, "epsilon": EPS,
        "result1": x.mean(0), "result2": torch.rsqrt(x.var(0, unbiased=False) + EPS),
    }  # fmt: skip
    fields = {field[7:] for field in dir(getattr(torch._C._functions, name)) if field.startswith("_saved_")}
    assert set(saved) <= fields
    norms = [Norm(function, (3,), 2) for function in (lambda x, w, b: Saving.apply(plain, saved, x, w, b), plain)]
    for norm in norms:
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
    ours, theirs = (explain(norm, x, lambda y: (y * m).sum(), parameters="*") for norm in norms)
    agrees(ours, theirs.relevance, theirs.ledger.accounts)
    for parameter in ("weight", "bias"):
        same(ours.parameters[parameter], theirs.parameters[parameter])


aten: Any = torch.ops.aten
BATCH_NORMS: dict[str, tuple[bool, Callable[..., Any]]] = {
    "NativeBatchNormLegitBackward0": (True, lambda x, w, b, mean, var: aten._native_batch_norm_legit(
        x, w, b, mean, var, True, 0.1, EPS
    )),
    "NativeBatchNormLegitBackward0 ": (False, lambda x, w, b, mean, var: aten._native_batch_norm_legit(
        x, w, b, mean, var, False, 0.1, EPS
    )),
    "NativeBatchNormLegitBackward1": (True, lambda x, w, b, mean, var: aten._native_batch_norm_legit.no_stats(
        x, w, b, True, 0.1, EPS
    )),
    "NativeBatchNormLegitNoTrainingBackward0": (
        False, lambda x, w, b, mean, var: aten._native_batch_norm_legit_no_training(x, w, b, mean, var, 0.1, EPS)
    ),
    "BatchNormNoUpdateBackward0": (
        False, lambda x, w, b, mean, var: aten._batch_norm_no_update(x, w, b, mean, var, 0.1, EPS)
    ),
    "BatchNormWithUpdateBackward0": (
        True, lambda x, w, b, mean, var: aten._batch_norm_with_update(x, w, b, mean, var, 0.1, EPS)
    ),
}  # fmt: skip
"""Whether the statistics are the batch's, and the function."""


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_by_its_other_names(name: str, frozen: bool) -> None:
    """As programs that were exported have them; behind a convolution with gamma too, which takes eval mode in."""
    training, function = BATCH_NORMS[name]
    mean, var = draw(0, 3), draw(1, 3).abs()
    other = lambda x, w, b: function(x, w, b, mean.clone(), var.clone())[0]  # noqa: E731
    usual = lambda x, w, b: F.batch_norm(x, mean.clone(), var.clone(), w, b, training, 0.1, EPS)  # noqa: E731
    models = [
        nn.Sequential(nn.Conv1d(2, 3, 2), Norm(norm, (3,), 4, frozen=frozen), nn.ReLU()).double()
        for norm in (other, usual)
    ]
    models[1].load_state_dict(models[0].state_dict())
    x = draw(5, 4, 2, 6)
    y = models[0](x.clone().requires_grad_())
    assert y.grad_fn.next_functions[0][0].name() == name.strip()
    for composite in ("attnlrp", EPSILON, Composite.of("gamma", {"convolution": Gamma(0.25)})):
        ours, theirs = (explain(model, x, torch.sum, composite=composite) for model in models)
        agrees(ours, theirs.relevance, theirs.ledger.accounts)
    if not training:
        leaf = x.clone().requires_grad_()
        found = relevance(models[0](leaf).sum(), leaf, composite="attnlrp")
        same(found.relevance, explain(models[1], x, torch.sum, composite="attnlrp").relevance)


def test_batch_norm_of_a_batch_written_out() -> None:
    x, m = draw(0, 4, 3, 5), draw(1, 4, 3, 5)

    def written(x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2), keepdim=True)
        return centred / (centred.square().mean((0, 2), keepdim=True) + EPS).sqrt()

    ours = explain(lambda x: F.batch_norm(x, None, None, training=True, eps=EPS), x, lambda y: (y * m).sum())
    agrees(ours, explain(written, x, lambda y: (y * m).sum()).relevance, {"inputs": ours.ledger.output})


@pytest.mark.parametrize("of", ["mean", "deviation", "all"])
def test_moments_that_group_norm_returns(of: str) -> None:
    """The mean is linear, and the inverse of the deviation a coefficient."""
    x, m = draw(0, 2, 4, 5), [draw(1, 2, 4, 5), draw(2, 2, 2), draw(3, 2, 2)]
    m = [t * (of in ("all", name)) for t, name in zip(m, ("output", "mean", "deviation"), strict=True)]

    def score(x: Tensor) -> Tensor:
        outputs = aten.native_group_norm(x, None, None, 2, 4, 5, 2, EPS)
        kept = [(y * t).sum() for y, t in zip(outputs, m, strict=True) if t.any()]
        return torch.stack(kept).sum()[None] + x.sum()

    rows = x.view(4, 10)
    rstd = torch.rsqrt(rows.var(1, unbiased=False) + EPS)
    expected = per_row(rows, m[0].view(4, 10), None, None).relevance + rows * m[1].view(4, 1) / 10 + rows
    agrees(explain(score, x, torch.sum), expected.view(x.shape), {"held back": (rstd * m[2].flatten()).sum()})


# Norms whose weight the inputs decide -----------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["both", "weight"])
@pytest.mark.parametrize("kind", ["layer", "batch", "batch of its own", "group"])
def test_a_conditional_norm(kind: str, signal: str) -> None:
    """The weight is a signal: it shares with the normalised input, as the same written as a product does."""
    x, condition, table = draw(0, 4, 6), draw(1, 6), nn.Parameter(draw(2, 4, 6))
    mean, var = draw(3, 6), draw(4, 6).abs()
    norms: dict[str, Callable[..., Tensor]] = {
        "layer": lambda x, w: F.layer_norm(x, (6,), w, eps=EPS),
        "batch": lambda x, w: F.batch_norm(x, mean, var, w, eps=EPS),
        "batch of its own": lambda x, w: F.batch_norm(x, None, None, w, training=True, eps=EPS),
        "group": lambda x, w: F.group_norm(x, 2, w, eps=EPS),
    }
    m, norm = draw(5, 4, 6), norms[kind]
    fused, written = (lambda x, w: norm(x, w)), (lambda x, w: norm(x, None) * w)
    if signal == "weight":
        ours, theirs = (
            explain(lambda w, f=f: f(table, w), condition, lambda y: (y * m).sum()) for f in (fused, written)
        )
    else:
        ours, theirs = (explain(f, (x, condition), lambda y: (y * m).sum()) for f in (fused, written))
    agrees(ours, theirs.tensors(), theirs.ledger.accounts)


# Weights that are normalised --------------------------------------------------------------------------------


def _layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "linear": (nn.Linear(4, 3), (2, 4)),
        "convolution": (nn.Conv2d(4, 3, 2, bias=False), (2, 4, 3, 3)),
        "transposed": (nn.ConvTranspose1d(4, 3, 2, stride=2), (2, 4, 3)),
    }


PARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm over all": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", EPSILON], ids=str)
@pytest.mark.parametrize("layer", ["linear", "convolution", "transposed"])
@pytest.mark.parametrize("how", PARAMETRISED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_that_is_normalised(how: str, layer: str, composite: Any, frozen: bool) -> None:
    """The layer is explained by the weight as it acts."""
    module, shape = _layers()[layer]
    module = PARAMETRISED[how](module.double()).eval()
    plain, x = _layers()[layer][0], draw(0, *shape)
    module(x)  # hooks make the weight then
    plain.double().load_state_dict({"weight": module.weight.detach()}, strict=False)
    if plain.bias is not None:
        plain.bias.data.copy_(module.bias.detach())
    models = [nn.Sequential(m, nn.ReLU(), nn.Flatten(), Apply()) for m in (module, plain)]
    if frozen:
        models[0].requires_grad_(False)
    ours, theirs = (explain(model, x, torch.sum, composite=composite) for model in models)
    assert float(theirs.relevance.abs().sum()) > 0
    agrees(ours, theirs.relevance, theirs.ledger.accounts)


class Apply(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(-1, 2, x.shape[-1]).double()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_relevance_of_direction_and_length(dim: int, fused: bool) -> None:
    """Each of v and g is what the weight is a multiple of: v gets the weight's relevance, and g its sum over v."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(draw(0, 3, 4))
            self.g = nn.Parameter(draw(1, *(3, 1) if dim == 0 else (1, 4)))

        def forward(self, x: Tensor) -> Tensor:
            if fused:
                return x @ torch._weight_norm(self.v, self.g, dim).t()
            return x @ (self.v * (self.g / self.v.norm(dim=1 if dim == 0 else 0, keepdim=True))).t()

    net, x, m = Net(), draw(2, 5, 4), draw(3, 5, 3)
    weight = torch._weight_norm(net.v, net.g, dim).detach()
    explanation = explain(net, x, lambda y: (y * m).sum(), parameters="*")
    agrees(explanation, x * (m @ weight), {"inputs": explanation.ledger.output})
    same(explanation.parameters["v"], weight * (m.t() @ x))
    same(explanation.parameters["g"], (weight * (m.t() @ x)).sum_to_size(net.g.shape))


@pytest.mark.parametrize("signals", ["v", "g", "vg"])
def test_a_weight_that_the_inputs_make(signals: str) -> None:
    """A layer that another network writes: length and direction share like factors."""
    x, m, values = draw(2, 5, 4), draw(3, 5, 3), {"v": draw(0, 3, 4), "g": draw(1, 3, 1)}

    def model(**inputs: Tensor) -> Tensor:
        made = {**values, **inputs}
        return x @ torch._weight_norm(made["v"], made["g"], 0).t()

    inputs = {name: values[name] for name in signals}
    weight = torch._weight_norm(values["v"], values["g"], 0)
    share = 0.5 if signals == "vg" else 1.0
    whole = share * weight * (m.t() @ x)
    explanation = explain(model, inputs, lambda y: (y * m).sum())
    agrees(explanation, [whole if name == "v" else whole.sum(1, keepdim=True) for name in signals])


# Among channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.75, 1.0, 0.5])
@given(seed=SEEDS, k=st.sampled_from([1.0, 2.0]))
@settings(max_examples=5)
def test_local_response_norm(seed: int, k: float, beta: float) -> None:
    """Krizhevsky et al. 2012, section 3.3: x_c / (k + alpha / n sum x^2)^beta over n channels; the sum is constant."""
    n, alpha = 3, 0.7
    x, m = draw(seed, 2, 5, 2, 2), draw(seed + 1, 2, 5, 2, 2)
    expected = torch.zeros_like(x)
    for channel in range(5):
        window = x[:, max(0, channel - n // 2) : channel + n // 2 + 1]
        expected[:, channel] = (m * x)[:, channel] / (k + alpha / n * window.square().sum(1)) ** beta
    explanation = explain(lambda x: F.local_response_norm(x, n, alpha, beta, k), x, lambda y: (y * m).sum())
    agrees(explanation, expected, {"inputs": expected.sum(), "held back": 0.0})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "group", "batch", "rms", "local"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    x, m = (draw(0, 2, 4, 6) * 60).to(dtype), draw(1, 2, 4, 6).to(dtype)
    mean, var = torch.zeros(4), torch.full((4,), 3e4)
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": lambda x: F.layer_norm(x, (6,)), "group": lambda x: F.group_norm(x, 2),
        "batch": lambda x: F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype)),
        "rms": lambda x: F.rms_norm(x, (6,)), "local": lambda x: F.local_response_norm(x, 2),
    }  # fmt: skip
    exact = explain(norms[kind], x.double(), lambda y: (y * m).sum())
    same(explain(norms[kind], x, lambda y: (y * m).sum()).relevance.double(), exact.relevance, 0.03)


def test_no_norm_is_forgotten() -> None:
    """PyTorch's nodes of norms that layers have, but for their second derivatives."""
    known = {
        name
        for name in dir(torch._C._functions)
        if any(word in name for word in ("BatchNorm", "LayerNorm", "GroupNorm", "RmsNorm"))
        and not name.endswith("BackwardBackward0")
    }
    assert known == {name for name, operation in REGISTRY.items() if operation.family == "normalization"}

"""Sums, products, choices, norms and distances."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp import Composite, explain, relevance
from dynlrp.errors import NoPathError, UnknownOperationError
from dynlrp.rules import REGISTRY, Flat, reduction
from tests.examples import (
    VECTOR,
    Table,
    apart,
    cases,
    inputs,
    is_of,
    linear,
    matrices,
    names,
    on,
    passes,
    registered,
    slopes,
)  # fmt: skip
from tests.oracle import agrees, draw, number, same

ATEN = torch.ops.aten
LENGTHS = torch.tensor([2, 1, 0, 3])
ODD = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 0.0, -1.0, 0.0, 5.0]]).double()


def _segments(reduce: str, **traits: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.segment_reduce(x, reduce, **{"lengths": LENGTHS, **traits})


REDUCTION: Table = {
    "SumBackward0": on((3, 4))(torch.sum),
    "MeanBackward0": on((3, 4))(torch.mean),
    "SumBackward1": on((3, 4, 2))(
        lambda x: x.sum(1), lambda x: x.sum(-1, keepdim=True), lambda x: x.sum((0, -1)), lambda x: x.sum((0, 1, 2))
    ),
    "MeanBackward1": on((3, 4, 2))(
        lambda x: x.mean(1), lambda x: x.mean(-1, keepdim=True), lambda x: x.mean((0, -1), True)
    ),
    "NansumBackward0": on((3, 4, 2))(torch.nansum, lambda x: x.nansum(1), lambda x: x.nansum((0, -1), True)),
    "CumsumBackward0": on((3, 4))(lambda x: x.cumsum(0), lambda x: x.cumsum(-1)),
    "TraceBackward0": on((3, 4))(torch.trace),
}
"""Linear. Nested tensors are tested with those."""
CHOICE: Table = {
    "MaxBackward0": on((3, 5))(lambda x: x.max(1).values, lambda x: x.max(-2, keepdim=True).values),
    "MinBackward0": on((3, 5))(lambda x: x.min(1).values),
    "MedianBackward0": on((3, 5))(torch.median),
    "MedianBackward1": on((3, 4))(lambda x: x.median(1).values, lambda x: x.median(-2, keepdim=True).values),
    "NanmedianBackward0": on((3, 4))(torch.nanmedian),
    "NanmedianBackward1": on((3, 5))(lambda x: x.nanmedian(-1).values, lambda x: x.nanmedian(0, True).values),
    "ModeBackward0": on((3, 5))(lambda x: x.mode(1).values, lambda x: x.mode(0, True).values),
    "KthvalueBackward0": on((3, 5))(lambda x: x.kthvalue(2).values, lambda x: x.kthvalue(3, 0, True).values),
    "TopkBackward0": on((3, 5))(
        lambda x: x.topk(2).values, lambda x: x.topk(2, 0, largest=False).values, lambda x: x.topk(3, sorted=False)[0]
    ),
    "SortBackward0": on((3, 5))(lambda x: x.sort(1).values, lambda x: x.sort(0, descending=True).values, torch.msort),
    "SortBackward1": on((3, 5))(
        lambda x: torch.sort(x, stable=True, dim=0).values,
        lambda x: torch.sort(x, stable=True, dim=-1, descending=True).values,
    ),
    "CummaxBackward0": on((3, 5))(lambda x: x.cummax(1).values, lambda x: x.cummax(-2).values),
    "CumminBackward0": on((3, 5))(lambda x: x.cummin(0).values),
    "MaxBackward1": on((3, 5))(torch.max),
    "MinBackward1": on((3, 5))(torch.min),
    "AmaxBackward0": on((3, 5))(lambda x: x.amax(1), lambda x: x.amax((0, 1), True)),
    "AminBackward0": on((3, 5))(lambda x: x.amin(-1)),
    "AminmaxBackward0": on((3, 5))(
        lambda x: x.aminmax(dim=1).min, lambda x: x.aminmax().max, lambda x: x.aminmax(dim=-2, keepdim=True).max
    ),
    "MaximumBackward0": [*on((3, 5), (3, 5))(torch.maximum), *on((3, 5), (5,))(torch.maximum)],
    "MinimumBackward0": on((3, 5), (5,))(torch.minimum),
}  # fmt: skip
PRODUCTS: Table = {
    "ProdBackward0": on((2, 3))(torch.prod),
    "ProdBackward1": on((3, 4))(lambda x: x.prod(1), lambda x: x.prod(-2, keepdim=True)),
    "CumprodBackward0": on((3, 4))(lambda x: x.cumprod(1), lambda x: x.cumprod(-2)),
    "SegmentReduceBackward0": on((6, 2))(_segments("sum"), _segments("prod")),
}
SMOOTH: Table = {
    "LogsumexpBackward0": on((3, 4))(lambda x: x.logsumexp(1), lambda x: x.logsumexp((0, -1), True)),
    "LogcumsumexpBackward0": on((3, 4))(lambda x: x.logcumsumexp(1), lambda x: x.logcumsumexp(-2)),
}
ORDERS = (1, 2, 3, 1.5, 0.5, -1)
STATISTIC: Table = {
    "LinalgVectorNormBackward0": on((3, 4))(
        lambda x: x.norm(dim=-1), lambda x: torch.linalg.vector_norm(x, 1, -1), lambda x: torch.linalg.vector_norm(x, 3)
    ),
    "NormBackward0": on((3, 4))(lambda x: ATEN.norm(x, 3)),
    "NormBackward1": on((3, 4))(lambda x: ATEN.norm(x, None, [1])),
    "NormBackward2": on((3, 4))(lambda x: ATEN.norm(x, 3, dtype=torch.float64)),
    "NormBackward3": on((3, 4))(lambda x: ATEN.norm(x, 3, [1], True, dtype=torch.float64)),
    "DistBackward0": on((3, 4), (3, 4))(torch.dist),
    "CdistBackward0": on((3, 4), (2, 4))(torch.cdist),
    "EuclideanDistBackward0": on((3, 4), (2, 4))(ATEN._euclidean_dist),
    "PdistBackward0": on((3, 4))(torch.pdist),
    "StdBackward0": on((3, 4))(lambda x: x.std(-1), lambda x: x.std(unbiased=False)),
    "StdMeanBackward0": on((3, 4))(lambda x: torch.std_mean(x, -1)[0], lambda x: torch.std_mean(x)[1]),
    "VarBackward0": on((3, 4))(lambda x: x.var(-1), lambda x: x.var(0, unbiased=False, keepdim=True)),
    "VarMeanBackward0": on((3, 4))(
        lambda x: torch.var_mean(x, -1, correction=0.5)[0], lambda x: torch.var_mean(x, 0, keepdim=True)[1]
    ),
}  # fmt: skip
SCALING: Table = {"RenormBackward0": on((3, 4))(lambda x: x.renorm(2, 0, 1.0))}
TABLES = (REDUCTION, CHOICE, PRODUCTS, SMOOTH, STATISTIC, SCALING)
EVERYTHING: Table = {name: many for table in TABLES for name, many in table.items()}
NESTED = {
    "SumBackwardAutogradNestedTensor0",
    "SumBackwardAutogradNestedTensor1",
    "MeanBackwardAutogradNestedTensor0",
}
"""Tested with nested tensors in test_shape."""


def test_no_operation_is_forgotten() -> None:
    blocked = {name for name, operation in REGISTRY.items() if operation.blocked}
    assert registered(reduction) - blocked == names(TABLES) | NESTED


@pytest.mark.parametrize(("name", "example"), cases(EVERYTHING))
def test_the_example_is_of_this_operation(name: str, example: Any) -> None:
    is_of(name, example)


@pytest.mark.parametrize(("name", "example"), cases(REDUCTION))
def test_linear_operations(name: str, example: Any) -> None:
    linear(example)
    passes(example, inputs(example), matrices(example))


@pytest.mark.parametrize(("name", "example"), cases(CHOICE))
def test_choices(name: str, example: Any) -> None:
    """Linear as long as the choice stays the same."""
    passes(example, apart(example), slopes(example, apart(example)))


# Ties -------------------------------------------------------------------------------------------------------

ALONE = {name: [e for e in many if len(e.shapes) == 1] for name, many in CHOICE.items()}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "max_pool1d overlapping": lambda x: F.max_pool1d(x, 3, 1),
    "max_pool2d": lambda x: F.max_pool2d(x[None, None], 2, 1),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 2),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
}
TIES = [*cases(ALONE), *(pytest.param("", on((3, 5))(f)[0], id=name) for name, f in POOLS.items())]


@pytest.mark.parametrize(("name", "example"), TIES)
def test_ties_conserve(name: str, example: Any) -> None:
    """To one of those that are equal, or to all in equal parts: never to others, and no relevance is lost."""
    m = draw(3, *example.function(ODD).shape)
    explanation = explain(example.function, ODD, lambda y: (y * m).sum())
    leaf = ODD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(example.function(leaf), leaf, m)
    agrees(explanation, ODD * gradient, {"inputs": (example.function(ODD) * m).sum()})


@pytest.mark.parametrize(("name", "example"), TIES)
def test_ties_conserve_in_the_other_gauge(name: str, example: Any) -> None:
    """Behind a rule that hands on relevance, which zeros have too."""
    y = example.function(ODD).reshape(1, -1)
    weight = draw(4, 2, y.numel())
    explanation = explain(
        lambda x: F.linear(example.function(x).reshape(1, -1), weight),
        ODD,
        torch.sum,
        composite=Composite.of("flat", {"dense": Flat()}),
    )
    r = float((y @ weight.t()).sum()) / (y.numel() + 1e-6)
    number(float(explanation.relevance.sum()), r * y.numel())
    leaf = ODD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(example.function(leaf).sum(), leaf)
    same(explanation.relevance, r * gradient)


# Products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_each_factor_of_a_product_takes_an_equal_share(zeros: int) -> None:
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    x[0, :zeros] = 0
    whole = explain(lambda x: x.prod(), x, lambda y: y * 2)
    agrees(whole, (2 * x.prod() / 12).expand(3, 4), scale=1.0)
    rows = explain(lambda x: x.prod(1), x, lambda y: (y * m[:, 0]).sum())
    agrees(rows, (m[:, :1] * x.prod(1, keepdim=True) / 4).expand(3, 4))
    expected = torch.zeros_like(x)
    for row, k in itertools.product(range(3), range(4)):
        for i in range(k + 1):
            expected[row, i] += m[row, k] * x[row, : k + 1].prod() / (k + 1)
    agrees(explain(lambda x: x.cumprod(-1), x, lambda y: (y * m).sum()), expected)
    agrees(explain(lambda x: x.cumprod(0), x.t().contiguous(), lambda y: (y * m.t()).sum()), expected.t())


def test_a_single_zero_in_a_product_has_a_multiplier() -> None:
    """As the other factors alone decide; two zeros have none. The factor is a + b = 0."""
    a, b = torch.tensor([2.0, 1.0, 3.0]).double(), torch.tensor([0.0, -1.0, 0.0]).double()
    for function in (torch.prod, lambda x: x.prod(0), lambda x: x.cumprod(0)[2], lambda x: x.cumprod(-1)[-1:]):
        one, other = explain(lambda a, b, f=function: f(a + b).reshape(1), (a, b), torch.sum).relevance
        same(one, torch.tensor([0.0, 2.0, 0.0]).double())
        same(other, torch.tensor([0.0, -2.0, 0.0]).double())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.prod(1, dtype=torch.float64),
        lambda x: x.cumprod(1, dtype=torch.float64)[:, -1],
        lambda x: x.nansum(1, dtype=torch.float64),
        lambda x: torch.linalg.vector_norm(x, 3, 1, dtype=torch.float64),
        lambda x: ATEN.norm(x, 1.5, [1], False, dtype=torch.float64),
    ],
)
def test_results_of_another_dtype(function: Callable[[Tensor], Tensor]) -> None:
    x, m = draw(0, 3, 4).float(), draw(1, 3)
    explanation = explain(function, x, lambda y: (y * m).sum())
    assert explanation.relevance.dtype == torch.float32
    number(float(explanation.relevance.double().sum()), (function(x) * m).sum(), 1e-5)


def test_a_product_of_one_number() -> None:
    x = torch.tensor([[3.0]]).double()
    for function in (lambda x: x.prod(1), lambda x: x[0, 0].cumprod(0)[None], lambda x: x[0, 0].prod(0)[None]):
        agrees(explain(function, x, torch.sum), x)


@pytest.mark.parametrize("initial", [None, 1.7])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
def test_segments(reduce: str, offsets: bool, initial: float | None) -> None:
    """An initial value takes part as a constant, and so does the product of nothing."""
    x, m = draw(0, 6, 2), draw(1, 4, 2)
    if initial is None and reduce in ("mean", "max", "min"):
        m[2] = 0  # nothing comes of an empty segment
    traits: dict[str, Any] = {"initial": initial}
    if offsets:
        traits |= {"lengths": None, "offsets": F.pad(LENGTHS.cumsum(0), (1, 0))}
    expected, constants, start = torch.zeros_like(x), 0.0, 0
    for segment, length in enumerate(LENGTHS.tolist()):
        for column in range(2):
            values, r = x[start : start + length, column], float(m[segment, column])
            first = {"sum": 0.0, "prod": 1.0}.get(reduce) if initial is None else initial
            if reduce in ("sum", "mean"):
                count = max(length, 1) if reduce == "mean" else 1
                expected[start : start + length, column] = values * r / count
                constants += (first or 0.0) * r / count
            elif reduce == "prod":
                whole = float(values.prod()) * (first or 0.0) * r
                expected[start : start + length, column] = whole / max(length, 1)
                constants += 0.0 if length else whole
            else:
                best = getattr(values, reduce)() if length else None
                wins = first is not None and (best is None or (first > best if reduce == "max" else first < best))
                constants += first * r if wins and first is not None else 0.0
                if best is not None and not wins:
                    expected[start : start + length, column] = (values == best) * best * r
        start += length
    function = _segments(reduce, **traits)
    explanation = explain(function, x, lambda y: torch.where(m == 0, 0.0, y * m).sum())
    agrees(explanation, expected, {"constants": constants})


# Smooth functions -------------------------------------------------------------------------------------------


def test_log_of_a_sum_of_exponentials() -> None:
    """By its slope, the softmax; what that leaves of the value is an offset."""
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    expected = x * x.softmax(1) * m[:, :1]
    explanation = explain(lambda x: x.logsumexp(1), x, lambda y: (y * m[:, 0]).sum())
    agrees(explanation, expected, {"offsets": (x.logsumexp(1) * m[:, 0]).sum() - expected.sum()})
    expected = torch.zeros_like(x)
    for k in range(4):
        expected[:, : k + 1] += x[:, : k + 1] * x[:, : k + 1].softmax(1) * m[:, k : k + 1]
    explanation = explain(lambda x: x.logcumsumexp(1), x, lambda y: (y * m).sum())
    agrees(explanation, expected, {"offsets": (x.logcumsumexp(1) * m).sum() - expected.sum()})


def test_masked_scores_in_a_log_of_a_sum() -> None:
    """An entry of minus infinity has no part in the sum, and no relevance."""
    x, mask = draw(0, 2, 3), torch.tensor([[True, False, False], [False, False, True]])
    explanation = explain(lambda x: x.masked_fill(mask, -torch.inf).logsumexp(1), x, torch.sum)
    masked = x.masked_fill(mask, -torch.inf)
    expected = x * masked.softmax(1)
    agrees(explanation, expected, {"offsets": masked.logsumexp(1).sum() - expected.sum()})


# Norms and distances ----------------------------------------------------------------------------------------

NORMS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "linalg": lambda x, p: torch.linalg.vector_norm(x, p, 1),
    "linalg keepdim": lambda x, p: torch.linalg.vector_norm(x, p, -1, keepdim=True)[:, 0],
    "0": lambda x, p: torch.stack([ATEN.norm(row, p) for row in x.unbind(0)]),
    "1": lambda x, p: ATEN.norm(x, p, [1]),
    "2": lambda x, p: torch.stack([ATEN.norm(row, p, dtype=torch.float64) for row in x.unbind(0)]),
    "3": lambda x, p: ATEN.norm(x, p, [-1], True, dtype=torch.float64)[:, 0],
}


@pytest.mark.parametrize("order", [*ORDERS, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, order: float) -> None:
    """R_i = m |x_i|^p norm^(1 - p), which adds up to m times the norm."""
    x, m = draw(0, 3, 4), draw(1, 3)
    if order > 0:
        x[0, 1] = 0
    if order in (float("inf"), -float("inf")):
        best = x.abs().amax(1, keepdim=True) if order > 0 else x.abs().amin(1, keepdim=True)
        expected = (x.abs() == best) * best * m[:, None]
    else:
        size = (x.abs() ** order).sum(1, keepdim=True)
        expected = m[:, None] * x.abs() ** order * size ** (1 / order - 1)
    agrees(explain(lambda x: NORMS[name](x, order), x, lambda y: (y * m).sum()), expected)
    number(float(expected.sum()), (NORMS[name](x, order) * m).sum())


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_zeros(name: str) -> None:
    for order in (1, 2, 3, 0.5, float("inf")):
        x = torch.tensor([[0.0, 0.0], [0.0, 2.0]]).double()
        agrees(explain(lambda x, p=order: NORMS[name](x, p), x, torch.sum), x)


def _gap(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Of every pair of rows."""
    d = (x[:, None] - y[None]).abs()
    return d.amax(-1) if p == float("inf") else (d**p).sum(-1) ** (1 / p)


DISTANCES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dist": (torch.dist, lambda x, y, p: _gap(x.reshape(1, -1), y.expand(x.shape).reshape(1, -1), p)[0, 0]),
    "cdist": (torch.cdist, _gap),
    "pdist": (lambda x, y, p: torch.pdist(x, p), lambda x, y, p: _gap(x, x, p)[tuple(torch.triu_indices(3, 3, 1))]),
}
"""The operation, and the same written out."""


@pytest.mark.parametrize("role", ["inputs", "constant", "parameter"])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, 1.5, 0.5, float("inf")])
@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_explained_like_what_they_stand_for(name: str, order: float, role: str) -> None:
    """Of degree 1 in both operands together; one row is the same on both sides."""
    x, y = draw(0, 3, 4), draw(1, 3 if name == "dist" else 2, 4)
    y[1] = x[0] if name == "cdist" else x[1]
    fused, plain = DISTANCES[name]
    m = draw(2, *fused(x, y, order).shape)
    if role == "parameter":
        leaves = [x.requires_grad_(), y.requires_grad_()]
        explanations = [relevance((f(*leaves, order) * m).sum(), leaves[0]) for f in (fused, plain)]
    elif role == "constant":
        explanations = [explain(lambda x, f=f: f(x, y, order), x, lambda d: (d * m).sum()) for f in (fused, plain)]
    else:
        given = (x,) if name == "pdist" else (x, y)
        explanations = [
            explain(lambda *xs, f=f: f(*xs, *(y,) * (2 - len(xs)), order), given, lambda d: (d * m).sum())
            for f in (fused, plain)
        ]
    agrees(explanations[0], explanations[1].tensors(), explanations[1].ledger.accounts)


def test_distances_by_matrix_product() -> None:
    """PyTorch takes squares of many rows apart, and loses digits that way."""
    x, y, m = draw(0, 30, 4), draw(1, 28, 4), draw(2, 30, 28)
    explanation = explain(torch.cdist, (x, y), lambda d: (d * m).sum())
    plain = explain(lambda x, y: _gap(x, y, 2.0), (x, y), lambda d: (d * m).sum())
    agrees(explanation, plain.relevance, tolerance=1e-7)
    alone = explain(lambda x: torch.cdist(x, y), x, lambda d: (d * m).sum())
    agrees(alone, plain.relevance[0], {"constants": plain.relevance[1].sum()}, tolerance=1e-7)


COUNTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.linalg.vector_norm(x, 0, 1),
    lambda x: ATEN.norm(x, 0),
    lambda x: ATEN.norm(x, 0, [1]),
    lambda x: torch.dist(x, x.detach() + VECTOR, 0),
    lambda x: torch.cdist(x, x.detach() + VECTOR, 0.0),
    lambda x: torch.pdist(x, 0.0),
]


@pytest.mark.parametrize("function", COUNTS)
def test_a_norm_of_order_zero_counts(function: Callable[[Tensor], Tensor]) -> None:
    """That is a coefficient."""
    x = draw(0, 3, 4)
    agrees(explain(lambda x: x.sum() * function(x).sum(), x, torch.sum), x * function(x).sum(), {"held back": 0.0})
    agrees(explain(lambda x: x.sum() + function(x).sum(), x, torch.sum), x, {"held back": function(x).sum()})
    with pytest.raises(NoPathError):
        explain(function, x, torch.sum)


def _variance(x: Tensor, dims: tuple[int, ...], correction: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    count = x[:, :, 0].numel() if len(dims) > 1 else x.shape[dims[0]]
    return ((x - mean) ** 2).sum(dims) / (count - correction), mean.mean(dims)


@pytest.mark.parametrize("used", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.2)])
@pytest.mark.parametrize(("dims", "correction"), [((1,), 1), ((0,), 0), ((0, 1), 0.5)])
@pytest.mark.parametrize("root", [False, True])
def test_deviations_are_explained_like_what_they_stand_for(
    root: bool, dims: tuple[int, ...], correction: float, used: tuple[float, float]
) -> None:
    """With the mean beside them, either of the two, and alone."""
    x, m, k = draw(0, 3, 4, 2), draw(1, 3, 4, 2).sum(dims), draw(2, 3, 4, 2).sum(dims)

    def plain(x: Tensor) -> Tensor:
        variance, mean = _variance(x, dims, correction)
        return used[0] * m * (variance.sqrt() if root else variance) + used[1] * k * mean

    def together(x: Tensor) -> Tensor:
        one, mean = (torch.std_mean if root else torch.var_mean)(x, dims, correction=correction)
        if used[0] and used[1]:
            return used[0] * m * one + used[1] * k * mean
        return used[0] * m * one if used[0] else used[1] * k * mean

    expected = explain(plain, x, torch.sum)
    agrees(explain(together, x, torch.sum), expected.relevance)
    if not used[1]:
        alone = torch.std if root else torch.var
        agrees(explain(lambda x: used[0] * m * alone(x, dims, correction=correction), x, torch.sum), expected.relevance)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_scale_of_renorm_is_a_coefficient(dim: int, order: float) -> None:
    x, m = draw(0, 3, 4, 2), draw(1, 3, 4, 2)
    x.select(dim, 0).mul_(0.1)  # a slice that stays as it is
    explanation = explain(lambda x: x.renorm(order, dim, 1.5), x, lambda y: (y * m).sum())
    agrees(explanation, x.renorm(order, dim, 1.5) * m)


HALF: dict[str, Callable[[Tensor], Tensor]] = {
    "norm 3": lambda x: torch.linalg.vector_norm(x, 3, 0),
    "norm 5": lambda x: ATEN.norm(x, 5),
    "norm 1.5": lambda x: ATEN.norm(x, 1.5, [0]),
    "norm 0.5": lambda x: torch.linalg.vector_norm(x / 64, 0.5),
    "dist 4": lambda x: torch.dist(x, torch.zeros_like(x), 4),
    "std": lambda x: x.std(),
    "var": lambda x: (x / 4).var(),
    "prod": lambda x: (x / 100).prod(),
    "max": lambda x: x.max(),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_does_not_overflow(name: str) -> None:
    x = torch.tensor([300.0, 200.0, -100.0, 0.5]).half()
    explanation = explain(lambda x: HALF[name](x).reshape(1), x, torch.sum)
    number(float(explanation.relevance.double().sum()), HALF[name](x).double(), 5e-3)


@pytest.mark.parametrize("function", [torch.unique, torch.unique_consecutive, lambda x: torch.unique(x, dim=0)])
def test_what_autograd_cannot_derive_is_blocked(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnknownOperationError, match="no derivative of unique"):
        explain(function, draw(0, 3, 4), torch.sum)

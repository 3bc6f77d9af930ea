"""Bilinear layers, linear systems, functions of matrices, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import Composite, Explanation, explain
from dynlrp.rules import REGISTRY, AlphaBeta, Epsilon, Flat, Gamma, Rule, WSquare, ZPlus
from tests import oracle
from tests.oracle import agrees, draw, number, same
from tests.test_elementwise import names

SEEDS = st.integers(0, 2**32 - 1)
Function = Callable[..., Tensor]


def weighed(m: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: (y * m).sum()


# Products that need no rule of their own --------------------------------------------------------------------

A, B, C = draw(90, 3, 4), draw(91, 4, 2), draw(92, 2, 5)
PRODUCTS: dict[str, Function] = {
    "outer": lambda x: torch.outer(x[:, 0], A[0]),
    "kron": lambda x: torch.kron(x, B),
    "inner": lambda x: torch.inner(x, A),
    "tensordot": lambda x: torch.tensordot(x.reshape(3, 2, 2), B.reshape(2, 2, 2), 2),
    "einsum": lambda x: torch.einsum("ij,jk,kl->il", x, B, C),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, B, C]),
    "multi_dot, in the middle": lambda x: torch.linalg.multi_dot([A.T, x, B, C]),
    "vecdot": lambda x: torch.linalg.vecdot(x, A),
    "baddbmm without an addend": lambda x: torch.baddbmm(torch.empty(1, 3, 2).double(), x[None], B[None], beta=0),
    "tensorsolve": lambda x: torch.linalg.tensorsolve(draw(93, 3, 4, 12), x),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_constants_are_linear(name: str) -> None:
    function, x = PRODUCTS[name], draw(0, 3, 4)
    matrix = oracle.matrix(function, x.shape)
    m = draw(1, *function(x).shape)
    agrees(explain(function, x, weighed(m)), x * (matrix @ m.flatten()).reshape(x.shape))


def test_matrix_powers_are_products_of_equal_signals() -> None:
    x, m = draw(0, 3, 3), draw(1, 3, 3)
    explanation = explain(lambda x: torch.linalg.matrix_power(x, 3), x, weighed(m))
    agrees(explanation, explain(lambda x: x @ x @ x, x, weighed(m)).relevance)


@pytest.mark.parametrize("add", [torch.addmm, torch.sparse.addmm], ids=["dense", "sparse"])
def test_the_addend_may_be_the_signal(add: Function) -> None:
    """A product of constants is a constant, and nothing where it is not added."""
    x, m = draw(0, 3, 2), draw(1, 3, 2)
    left = A if add is torch.addmm else A.to_sparse()
    agrees(
        explain(lambda x: add(x, left, B, beta=2.0, alpha=-0.5), x, weighed(m)),
        2 * m * x,
        {"constants": -0.5 * (m * (A @ B)).sum()},
    )


# Products of several signals --------------------------------------------------------------------------------

LEVI_CIVITA = torch.zeros(3, 3, 3).double()
for _i, _j, _k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
    LEVI_CIVITA[_i, _j, _k], LEVI_CIVITA[_i, _k, _j] = 1.0, -1.0
PICTURE = (draw(94, 3, 4) > 0).double().to_sparse_csr()
SAMPLE = PICTURE.to_dense()

MULTILINEAR: dict[str, list[tuple[Function, Function, list[tuple[int, ...]]]]] = {
    "LinalgCrossBackward0": [
        (torch.linalg.cross, lambda a, b: torch.einsum("ijk,nj,nk->ni", LEVI_CIVITA, a, b), [(2, 3), (2, 3)]),
        (
            lambda a, b: torch.cross(a, b, dim=0),
            lambda a, b: torch.einsum("ijk,jn,kn->in", LEVI_CIVITA, a, b),
            [(3, 2), (3, 1)],
        ),
    ],
    "TrilinearBackward0": [
        (F.bilinear, lambda a, b, w: torch.einsum("ni,nj,kij->nk", a, b, w), [(2, 3), (2, 4), (5, 3, 4)]),
    ],
    "SparseSampledAddmmBackward0": [
        (
            lambda a, b: torch.sparse.sampled_addmm(PICTURE, a, b, beta=0.0, alpha=-2.0).to_dense(),
            lambda a, b: -2 * SAMPLE * (a @ b),
            [(3, 2), (2, 4)],
        ),
    ],
}
"""Fused, written out, shapes of the factors."""
FACTORS = [
    pytest.param(name, *case, mask, id=f"{name}-{i}-{mask:b}")
    for name, cases in MULTILINEAR.items()
    for i, case in enumerate(cases)
    for mask in range(1, 2 ** len(case[2]))
]


@pytest.mark.parametrize(("name", "fused", "written", "shapes", "mask"), FACTORS)
def test_factors_that_are_signals_share_equally(
    name: str, fused: Function, written: Function, shapes: list[tuple[int, ...]], mask: int
) -> None:
    """``mask`` tells which are; the others are constants, and take nothing."""
    factors = [draw(number, *shape) for number, shape in enumerate(shapes)]
    signals = [factor for i, factor in enumerate(factors) if mask >> i & 1]

    def model(*values: Tensor) -> Tensor:
        rest = iter(values)
        return fused(*[next(rest) if mask >> i & 1 else factor for i, factor in enumerate(factors)])

    y = written(*factors)
    same(model(*signals), y)
    assert name in names(model(*[s.clone().requires_grad_() for s in signals]))
    m = draw(9, *y.shape)
    leaves = [s.clone().requires_grad_() for s in factors]
    gradients = torch.autograd.grad(written(*leaves), leaves, m)
    shares = [g * f / len(signals) for i, (f, g) in enumerate(zip(factors, gradients, strict=True)) if mask >> i & 1]
    agrees(explain(model, tuple(signals), weighed(m)), shares, {"constants": 0.0, "held back": 0.0})


@pytest.mark.parametrize("frozen", [False, True])
def test_a_bilinear_layer(frozen: bool) -> None:
    layer = nn.Bilinear(3, 4, 5).double().requires_grad_(not frozen)
    a, b, m = draw(0, 2, 3), draw(1, 2, 4), draw(2, 2, 5)
    parts = torch.einsum("ni,nj,kij,nk->nij", a, b, layer.weight, m).detach() / 2
    assert layer.bias is not None
    accounts = {"parameters": (m * layer.bias.detach()).sum()}
    agrees(explain(layer, (a, b), weighed(m)), [parts.sum(2), parts.sum(1)], accounts)


def test_a_linear_layer_in_the_kernels_own_layout() -> None:
    """It is known by its derivative alone."""
    x, weight, bias, m = draw(0, 6, 3), draw(1, 4, 3), draw(2, 4), draw(3, 6, 4)
    w, b = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    try:
        torch.ops.aten.mkldnn_linear(x.float().to_mkldnn(), w, b)
    except RuntimeError:
        pytest.skip("not in this build of PyTorch")
    explanation = explain(
        lambda x: torch.ops.aten.mkldnn_linear(x.to_mkldnn(), w, b).to_dense(), x.float(), weighed(m.float())
    )
    same(explanation.relevance.double(), x * (m @ weight), 1e-5)
    number(explanation.ledger.accounts["parameters"], (m * bias).sum(), 1e-5)
    assert explanation.ledger.closes


# Linear systems ---------------------------------------------------------------------------------------------

M = draw(80, 3, 3) + 2 * torch.eye(3).double()
LOWER, UPPER = M.tril(), M.triu()
SYSTEMS: dict[str, list[tuple[Function, Tensor]]] = {
    "LinalgSolveExBackward0": [
        (torch.linalg.solve, M.inverse()),
        (lambda a, b: torch.linalg.solve(a, b.T, left=False).T, M.inverse().T),
    ],
    "LinalgSolveTriangularBackward0": [
        (lambda a, b: torch.linalg.solve_triangular(a, b, upper=True), UPPER.inverse()),
        (lambda a, b: torch.linalg.solve_triangular(a.T, b.T, upper=False, left=False).T, UPPER.inverse()),
    ],
    "TriangularSolveBackward0": [(lambda a, b: torch.triangular_solve(b, a)[0], UPPER.inverse())],
    "LinalgLuSolveBackward0": [
        (lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b), M.inverse()),
        (lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b, adjoint=True), M.T.inverse()),
    ],
    "CholeskySolveBackward0": [(lambda a, b: torch.cholesky_solve(b, a.tril()), (LOWER @ LOWER.T).inverse())],
}
"""How a matrix and a right-hand side are solved, and the matrix that stands for it at ``M``."""


@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
@pytest.mark.parametrize("matrix", ["constant", "parameter", "signal"])
@pytest.mark.parametrize(
    ("name", "solve", "inverse"),
    [pytest.param(name, *case, id=f"{name}-{i}") for name, cases in SYSTEMS.items() for i, case in enumerate(cases)],
)
def test_solutions_are_linear_in_the_right_hand_side(name: str, solve: Function, inverse: Tensor, matrix: str) -> None:
    b, m = draw(0, 3, 2), draw(1, 3, 2)
    weight = nn.Parameter(M.clone())
    same(solve(M, b), inverse @ b)
    assert name in names(solve(M, b.clone().requires_grad_()))
    expected = b * (inverse.T @ m)
    if matrix == "signal":
        one, two = explain(solve, (M, b), weighed(m)).relevance
        same(two, expected)
        assert one is None or not one.any()
    else:
        explanation = explain(lambda b: solve(weight if matrix == "parameter" else M, b), b, weighed(m))
        agrees(explanation, expected, {"parameters": 0.0, "held back": 0.0})


@pytest.mark.parametrize(
    "function",
    [
        torch.linalg.inv,
        lambda x: torch.cholesky_inverse(x.tril() + 3 * torch.eye(3).double()),
        lambda x: torch.linalg.slogdet(x)[1],
        lambda x: torch.logdet(x.square()) if torch.det(x.square()) > 0 else torch.logdet(-x.square()),
    ],
    ids=["inv", "cholesky_inverse", "slogdet", "logdet"],
)
def test_inverses_and_logarithms_are_coefficients(function: Function) -> None:
    x, m = draw(0, 3, 3), draw(1, 3, 3)
    value = function(x)
    agrees(explain(lambda x: x + function(x), x, weighed(m)), m * x, {"held back": (m * value).sum()})
    agrees(explain(lambda x: x * function(x), x, weighed(m)), m * x * value, {"held back": 0.0})


@given(seed=SEEDS, size=st.integers(1, 4))
def test_a_determinant_of_n_rows_is_shared_by_n(seed: int, size: int) -> None:
    """Every row takes a whole share, 1 / n of the determinant, and in it every element its cofactor's."""
    x, m = draw(seed, 2, size, size), draw(seed + 1, 2)
    cofactors = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            minor = x[:, [r for r in range(size) if r != i]][:, :, [c for c in range(size) if c != j]]
            cofactors[:, i, j] = (-1) ** (i + j) * torch.linalg.det(minor)
    expected = m[:, None, None] * x * cofactors / size
    explanation = explain(torch.linalg.det, x, weighed(m))
    agrees(explanation, expected, {"offsets": 0.0}, 1e-9)
    same(explanation.relevance.sum(2), (m * torch.linalg.det(x) / size)[:, None].expand(2, size), 1e-9)


def test_the_matrix_exponential_is_expanded_at_its_input() -> None:
    x, m = draw(0, 3, 3), draw(1, 3, 3)
    step, jacobian = 1e-6, torch.zeros(3, 3).double()
    for i in range(3):
        for j in range(3):
            unit = torch.zeros(3, 3).double()
            unit[i, j] = step
            jacobian[i, j] = (m * (torch.matrix_exp(x + unit) - torch.matrix_exp(x - unit))).sum() / (2 * step)
    offset = (m * torch.matrix_exp(x)).sum() - (x * jacobian).sum()
    explanation = explain(torch.matrix_exp, x, weighed(m))
    same(explanation.relevance, x * jacobian, 1e-7)
    number(explanation.ledger.accounts["offsets"], offset, 1e-6)
    assert explanation.ledger.closes


# Mixtures of experts ----------------------------------------------------------------------------------------

ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)
GROUPED: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "rows by experts": ((7, 8), (3, 8, 4), True),
    "columns by experts": ((3, 4, 8), (8, 7), True),
    "side by side": ((4, 7), (7, 8), True),
    "batches": ((3, 5, 8), (3, 8, 4), False),
}


def grouped(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """The kernel, whatever the layout of its operands, in float32."""
    padded = [F.pad(x, (0, -x.shape[-1] % 4))[..., : x.shape[-1]] for x in (a.float(), b.float())]
    return F.grouped_mm(*padded, offs=ends)


def loop(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """One matrix product after the other."""
    if ends is None:
        return torch.stack([a[n] @ b[n] for n in range(len(a))])
    starts = [0, *ends.tolist()]
    groups = [slice(start, end) for start, end in zip(starts, ends.tolist(), strict=False)]
    if a.ndim == 2 and b.ndim == 3:
        return torch.cat([a[rows] @ b[n] for n, rows in enumerate(groups)])
    if a.ndim == 3:
        return torch.cat([a[n] @ b[:, columns] for n, columns in enumerate(groups)], 1)
    return torch.stack([a[:, inner] @ b[inner] for inner in groups])


RULES: dict[str, Rule] = {
    "epsilon=0": Epsilon(),
    "epsilon=0.1": Epsilon(0.1),
    "gamma": Gamma(0.25),
    "alpha_beta": AlphaBeta(),
    "zplus": ZPlus(),
    "wsquare": WSquare(),
    "flat": Flat(),
}


class Experts(nn.Module):
    def __init__(self, product: Function, weight: Tensor, ends: Tensor | None, left: bool, frozen: bool) -> None:
        super().__init__()
        self.product, self.ends, self.left = product, ends, left
        self.weight = nn.Parameter(weight, not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.weight, x, self.ends) if self.left else self.product(x, self.weight, self.ends)


def _explain(module: nn.Module, x: Tensor, m: Tensor, rule: Rule, **options: Any) -> Explanation:
    composite = Composite.of("test", {"dense": rule})
    return explain(module, x, lambda y: (y * m.to(y)).sum(), composite=composite, **options)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("left", [False, True], ids=["x @ w", "w @ x"])
@pytest.mark.parametrize("shape", GROUPED)
@pytest.mark.parametrize("rule", RULES)
def test_grouped_products_equal_one_product_after_the_other(rule: str, shape: str, left: bool, frozen: bool) -> None:
    first, second, ended = GROUPED[shape]
    ends = ENDS if ended else None
    a, b = draw(0, *first).float().double(), draw(1, *second).float().double()
    x, w = (b, a) if left else (a, b)
    m = draw(2, *loop(a, b, ends).shape)
    fused = Experts(partial(grouped), w.float(), ends, left, frozen)
    plain = Experts(loop, w, ends, left, frozen)
    assert "GroupedMmBackward0" in names(fused(x.float().requires_grad_()))
    ours = _explain(fused, x.float(), m, RULES[rule], parameters="weight")
    expected = _explain(plain, x, m, RULES[rule], parameters="weight")
    assert ours.relevance.dtype == torch.float32
    same(ours.relevance.double(), expected.relevance, 1e-4)
    same(ours.parameters["weight"].double(), expected.parameters["weight"], 1e-4)
    assert ours.ledger.closes
    if rule == "epsilon=0.1":
        number(ours.ledger.accounts["absorbed"], expected.ledger.accounts["absorbed"], 1e-3)


@pytest.mark.parametrize("shape", GROUPED)
def test_grouped_products_of_two_signals(shape: str) -> None:
    first, second, ended = GROUPED[shape]
    ends = ENDS if ended else None
    a, b = draw(0, *first), draw(1, *second)
    m = draw(2, *loop(a, b, ends).shape)
    ours = explain(lambda a, b: grouped(a, b, ends), (a, b), lambda y: (y * m.float()).sum())
    expected = explain(lambda a, b: loop(a, b, ends), (a, b), weighed(m))
    for one, two in zip(ours.tensors(), expected.tensors(), strict=True):
        same(one, two, 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_rows_behind_the_last_group_carry_nothing(rule: str) -> None:
    """The kernel leaves their output undefined."""
    x, w, m = draw(0, 9, 8), draw(1, 3, 8, 4), draw(2, 7, 4)
    fused = Experts(lambda a, b, ends: grouped(a, b, ends)[:7], w.float(), ENDS, False, False)
    ours = _explain(fused, x.float(), m, RULES[rule])
    expected = _explain(Experts(loop, w, ENDS, False, False), x[:7].clone(), m, RULES[rule])
    same(ours.relevance[:7].double(), expected.relevance, 1e-4)
    assert not ours.relevance[7:].any()


@pytest.mark.parametrize("rule", ["epsilon=0", "epsilon=0.1", "gamma"])
def test_grouped_products_in_half_precision(rule: str) -> None:
    x, w, m = draw(0, 7, 8), draw(1, 3, 8, 8), draw(2, 7, 8)
    fused = Experts(lambda a, b, ends: F.grouped_mm(a, b, offs=ends), w.bfloat16(), ENDS, False, True)
    ours = _explain(fused, x.bfloat16(), m.bfloat16(), RULES[rule])
    expected = _explain(Experts(loop, w, ENDS, False, True), x, m, RULES[rule])
    assert ours.finite()
    same(ours.relevance.double(), expected.relevance, 0.1)


def test_grouped_products_need_no_aligned_rows() -> None:
    """Five outputs do not fill 16 bytes; the multiplier of a plain sum has no memory of its own."""
    x, w = draw(0, 7, 8), draw(1, 3, 5, 8)
    ours = explain(lambda x: F.grouped_mm(x, w.float().mT, offs=ENDS), x.float(), torch.sum)
    same(ours.relevance.double(), explain(lambda x: loop(x, w.mT, ENDS), x, torch.sum).relevance, 1e-5)


class Routed(nn.Module):
    """Two of four experts for every token, as transformers writes it: their outputs are added by index."""

    def __init__(self, normalised: bool, sigmoid: bool) -> None:
        super().__init__()
        self.router = nn.Linear(5, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 6, 5))
        self.down = nn.Parameter(torch.randn(4, 5, 6))
        self.normalised, self.sigmoid = normalised, sigmoid
        self.double()

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and numbers of the chosen experts, and what the weights are divided by."""
        scores = self.router(x)
        p, index = (scores.sigmoid() if self.sigmoid else scores.softmax(-1)).topk(2, -1)
        return p, index, p.sum(-1, keepdim=True) if self.normalised else torch.ones_like(p[:, :1])

    def forward(self, x: Tensor) -> Tensor:
        p, index, total = self.weights(x)
        p = p / total
        result = torch.zeros_like(x)
        for expert in index.unique():
            token, place = torch.where(index == expert)
            y = F.linear(torch.relu(F.linear(x[token], self.up[expert])), self.down[expert])
            result.index_add_(0, token, y * p[token, place, None])
        return result


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
def test_a_mixture_of_experts(composite: str, normalised: bool, sigmoid: bool, frozen: bool) -> None:
    """Router and expert take half each, or the expert all; the sum that the router's weights are divided by is a
    coefficient. The rest is piecewise linear, so it is gradient times input of what follows."""
    model = Routed(normalised, sigmoid).requires_grad_(not frozen)
    x, m = draw(0, 7, 5), draw(1, 7, 5)

    def experts(x: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            index = model.weights(x)[1]
        each = torch.einsum("tkeh,tkh->tke", model.down[index], torch.einsum("tkhe,te->tkh", model.up[index], x).relu())
        return (each * weights[..., None]).sum(1)

    def surrogate(x: Tensor) -> Tensor:
        p, _, total = model.weights(x)
        whole = experts(x, (p / total).detach())
        if composite == "cplrp":
            return (whole * m).sum()
        if sigmoid:  # its secant, m (f(x) - f(0)) / x, in place of its derivative
            scores = model.router(x)
            secant = ((scores.sigmoid() - 0.5) / scores).detach()
            p = (scores * secant).gather(-1, model.weights(x)[1])
        return ((whole + experts(x.detach(), p / total.detach())) * m).sum() / 2

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(leaf), leaf)
    found = explain(model, x, lambda y: (y * m).sum(-1), composite=composite)
    same(found.relevance, x * gradient)
    assert found.ledger.closes
    assert not found.ledger.unresolved


# Nested tensors ---------------------------------------------------------------------------------------------

NESTED: dict[str, Function] = {
    "LinearBackward0": lambda x, w, b: F.linear(x, w, b),
    "MatmulBackward0": lambda x, w, b: x @ w.t() + b,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NESTED)
def test_layers_of_nested_tensors(name: str, rule: str, frozen: bool) -> None:
    """Samples of several lengths are explained as their rows are."""
    w, b, x, m = draw(0, 5, 4), draw(1, 5), draw(2, 6, 4), draw(3, 6, 5)

    class Layer(nn.Module):
        def __init__(self, nested: bool) -> None:
            super().__init__()
            self.nested, self.w, self.b = nested, nn.Parameter(w, not frozen), nn.Parameter(b, not frozen)

        def forward(self, x: Tensor) -> Tensor:
            if not self.nested:
                return NESTED[name](x, self.w, self.b).relu()
            samples = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, 6]))
            y: Tensor = NESTED[name](samples, self.w, self.b).relu().values()
            return y

    assert name in names(Layer(True)(x.clone().requires_grad_()))
    ours = _explain(Layer(True), x, m, RULES[rule], parameters="w")
    expected = _explain(Layer(False), x, m, RULES[rule], parameters="w")
    agrees(ours, expected.relevance, expected.ledger.accounts)
    same(ours.parameters["w"], expected.parameters["w"])


def test_registered() -> None:
    tested = {*MULTILINEAR, *SYSTEMS, "SparseMmReduceImplBackward0", "MkldnnLinearBackward0"}
    found = {n for n, o in REGISTRY.items() if o.family == "multilinear" or n.startswith("LinalgSolve")}
    assert found <= tested

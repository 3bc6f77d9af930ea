"""Every operator of PyTorch's own database: explained to the last digit, or refused for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.operators import OPERATORS, attempt, by_gradient, cases, in_half, in_place, oracle, other_gauge, outcome

pytestmark = pytest.mark.filterwarnings("ignore")  # of operators that are old, or given too little

KNOWN: dict[str, str] = {}
"""Operators that are explained wrongly, and why."""

REFUSED = {
    "a loss measures": """
        nn.functional.binary_cross_entropy nn.functional.binary_cross_entropy_with_logits nn.functional.cross_entropy
        nn.functional.ctc_loss nn.functional.huber_loss nn.functional.linear_cross_entropy
        nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
        nn.functional.mse_loss nn.functional.multi_margin_loss nn.functional.multilabel_margin_loss
        nn.functional.nll_loss nn.functional.smooth_l1_loss nn.functional.soft_margin_loss
    """,
    "the factors of a matrix": """
        cholesky linalg.cholesky linalg.cholesky_ex linalg.cond linalg.eig linalg.eigh linalg.eigvals linalg.eigvalsh
        linalg.householder_product linalg.lstsq linalg.lstsq.grad_oriented linalg.lu linalg.lu_factor
        linalg.lu_factor_ex linalg.matrix_norm linalg.norm linalg.norm.subgradients_at_zero linalg.pinv
        linalg.pinv.hermitian linalg.pinv.singular linalg.qr linalg.svd linalg.svdvals lu lu_unpack norm.nuc ormqr
        pca_lowrank pinverse qr svd svd_lowrank
    """,
    "a random draw": "bernoulli normal normal.number_mean",
    "a step of a backward pass": "_softmax_backward_data max_pool2d_with_indices_backward native_dropout_backward",
}
"""Operators that are refused, some of them for some of their arguments only, by what the error says first."""
REASONS = {name: reason for reason, names in REFUSED.items() for name in names.split()}

COEFFICIENTS = """
    acosh angle ceil cholesky_inverse digamma div.floor_rounding div.trunc_rounding fill floor lgamma linalg.inv
    linalg.inv_ex linalg.slogdet linalg.tensorinv log log10 log2 logdet mvlgamma.mvlgamma_p_1 mvlgamma.mvlgamma_p_3
    mvlgamma.mvlgamma_p_5 polygamma.polygamma_n_0 polygamma.polygamma_n_1 polygamma.polygamma_n_2
    polygamma.polygamma_n_3 polygamma.polygamma_n_4 reciprocal round round.decimals_0 round.decimals_3
    round.decimals_neg_3 rsqrt sgn sign special.ndtri special.polygamma.special_polygamma_n_0 trunc zero_
"""
"""Operators that never pass relevance on: steps, and functions that are not finite at zero."""


class Summary:
    """What became of the samples."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.oracles: Counter[str] = Counter()
        self.nodes: set[str] = set()

    def __str__(self) -> str:
        return "\n".join(
            [
                f"samples of {len(OPERATORS)} operators: {dict(self.kinds)}; node types: {len(self.nodes)}",
                f"held against: {dict(self.oracles)}",
                *(f"{len(names.split())} operators refused: {reason} ..." for reason, names in REFUSED.items()),
            ]
        )


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> Iterator[Summary]:
    """Printed at the end, where one process runs all."""
    found = Summary()
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{found}")


def operators(*needed: torch.dtype) -> list[object]:
    """Names of those that know a number format."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=KNOWN[name], strict=True) if name in KNOWN else ())
        for name, op in OPERATORS.items()
        if all(dtype in op.dtypes for dtype in needed)
    ]


def check(name: str, dtype: torch.dtype, limit: int, ways: int, summary: Summary) -> set[str]:
    """The kinds of outcome where everything is explained. The first real sample of every kind is explained in both
    gauges, and by its gradient."""
    kinds, failures, met = set(), [], set()
    for case in cases(OPERATORS[name], dtype, limit, ways):
        try:
            found = outcome(case)
            held = oracle(name, case, found.explanation) if found.explanation is not None else None
            if dtype is torch.float64 and frozenset(case.names) not in met:
                met.add(frozenset(case.names))
                other_gauge(case)
                by_gradient(case)
        except AssertionError as error:
            failures.append(f"{case.label} {case.names}: {error}")
            continue
        summary.kinds[found.kind] += 1
        summary.nodes.update(case.names)
        if held is not None:
            summary.oracles[held or "the ledger alone"] += 1
        if found.kind == "blocked":
            assert found.detail.startswith(REASONS.get(name, "nothing")), found.detail
        if len(case.way.explained) == len(case.tensors):
            kinds.add(found.kind)
    assert not failures, "\n".join(failures)
    return kinds


@pytest.mark.parametrize("name", operators())
def test_operator(name: str, summary: Summary) -> None:
    kinds = check(name, torch.float64, 2, 1, summary)
    assert ("blocked" in kinds) == (name in REASONS)
    assert ("no path" in kinds and "closes" not in kinds) == (name in COEFFICIENTS.split())


@pytest.mark.parametrize("name", operators(torch.complex128))
def test_operator_on_complex_numbers(name: str, summary: Summary) -> None:
    check(name, torch.complex128, 1, 1, summary)


@pytest.mark.parametrize("name", [name for name, op in OPERATORS.items() if op.inplace_variant is not None])
def test_operator_in_place(name: str) -> None:
    """A write over the input is explained like the operator."""
    for case, written in in_place(OPERATORS[name], torch.float64, 2):
        expected, found = outcome(case), outcome(written)
        assert found.kind == expected.kind
        if expected.explanation is not None and found.explanation is not None:
            for ours, theirs in zip(found.explanation.relevance, expected.explanation.relevance, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.allclose(ours, theirs, 1e-10, 1e-12)


@pytest.mark.parametrize("name", operators())
def test_operator_in_half_precision(name: str) -> None:
    """Finite wherever it is in float32, and the gradient too."""
    for dtype in (torch.float16, torch.bfloat16):
        if dtype not in OPERATORS[name].supported_backward_dtypes("cpu"):
            continue
        for case, widen in in_half(OPERATORS[name], dtype, 3):
            found, error = attempt(case)
            if found is not None and found.finite():
                continue
            single, gradient = widen(), case.gradient
            expected = None if single is None else attempt(single)[0]
            if gradient is None or expected is None:
                continue
            largest = torch.finfo(dtype).max / 8
            finite = case.finite(*case.given) and all(bool(g.isfinite().all()) for g in gradient)
            if finite and all(r is None or bool((r.abs() < largest).all()) for r in expected.relevance):
                raise AssertionError(f"{dtype} {case.label}: {error or 'not finite'}")

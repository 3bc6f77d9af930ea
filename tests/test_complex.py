"""Complex numbers against the same in real and imaginary parts.

A function of complex numbers is one of pairs of real numbers, ``(..., 2)``, and so is its multiplier. The relevance of
a complex number is the sum of its parts'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynlrp import Composite, RuleError, explain, relevance
from dynlrp.rules import REGISTRY, AlphaBeta, Epsilon, Flat, Gamma, Rule, WSquare, ZBox, ZPlus
from tests import oracle
from tests.oracle import agrees, draw, same
from tests.test_elementwise import names

SEEDS = st.integers(0, 2**32 - 1)


def pairs(y: Tensor) -> Tensor:
    """Real and imaginary part in a last dimension of 2, or of 1 for real numbers."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y.unsqueeze(-1)


def joined(x: Tensor) -> Tensor:
    """From parts to numbers."""
    return torch.view_as_complex(x) if x.shape[-1] == 2 else x.squeeze(-1)


def weighed(m: Tensor) -> Callable[[Tensor], Tensor]:
    """A target that gives every part of the output a multiplier."""
    return lambda y: (pairs(y) * m).sum()


def numbers(seed: int, *shape: int) -> Tensor:
    return joined(draw(seed, *shape, 2))


W, V = numbers(50, 4, 3), numbers(51, 3, 4)


class Case(NamedTuple):
    function: Callable[[Tensor], Tensor]
    real: bool = False
    """Whether it takes real numbers."""


LINEAR: dict[str, list[Case]] = {
    "ViewAsRealBackward0": [
        Case(torch.view_as_real),
        Case(lambda z: z.real * 2),
        Case(lambda z: z.imag * 2),
        Case(lambda z: z.conj().real),
    ],
    "ViewAsRealBackward0_copy": [Case(torch.view_as_real_copy)],
    "ViewAsComplexBackward0": [Case(lambda x: torch.view_as_complex(x.reshape(3, 2, 2)), real=True)],
    "ConjBackward0": [Case(lambda z: z.conj()), Case(lambda z: V @ z.mH), Case(lambda z: (z.conj() @ W).conj())],
    "ConjPhysicalBackward0": [Case(torch.conj_physical)],
    "ConjPhysicalBackward1": [Case(lambda z: torch.conj_physical_(z.clone()))],
    "ComplexBackward0": [
        Case(lambda x: torch.complex(x, x.flip(1)), real=True),
        Case(lambda x: torch.complex(x, torch.zeros(4).double()), real=True),
    ],
    "PolarBackward0": [Case(lambda x: torch.polar(x, V.angle()), real=True)],
    "FftC2CBackward0": [
        Case(torch.fft.fft),
        Case(lambda z: torch.fft.ifft2(z, norm="ortho")),
        Case(lambda z: torch.fft.fftn(z, (2, 5), norm="forward")),
    ],
    "FftR2CBackward0": [
        Case(torch.fft.rfft, real=True),
        Case(lambda x: torch.fft.rfft(x[:, :3], norm="ortho"), real=True),
        Case(lambda x: torch.fft.rfft2(x), real=True),
        Case(lambda x: torch.fft.fft(x, dim=0), real=True),
        Case(lambda x: torch.stft(x.flatten(), 4, window=torch.ones(4).double(), return_complex=True), real=True),
    ],
    "FftC2RBackward0": [
        Case(torch.fft.irfft),
        Case(lambda z: torch.fft.irfft(z, n=5, dim=0)),
        Case(lambda z: torch.fft.irfft2(z, s=(3, 7), norm="ortho")),
        Case(torch.fft.hfft),
    ],
    "MulBackward0": [
        Case(lambda z: z * V),
        Case(lambda z: V.conj() * z),
        Case(lambda x: x * V, real=True),
        Case(lambda z: z * 1j),
    ],
    "DivBackward0": [Case(lambda z: z / V), Case(lambda x: x / V, real=True), Case(lambda z: z / V.abs())],
    "MmBackward0": [Case(lambda z: z @ W), Case(lambda z: W @ z), Case(lambda z: W @ z.conj())],
    "BmmBackward0": [Case(lambda z: torch.bmm(z[None], W[None]))],
    "AddmmBackward0": [Case(lambda z: torch.addmm(torch.zeros(3, 3).to(z), z, W, alpha=0.5))],
    "MvBackward0": [Case(lambda z: z @ W[:, 0]), Case(lambda z: W @ z[:, 0])],
    "DotBackward0": [Case(lambda z: torch.dot(z[0], W[:, 0]))],
    "VdotBackward0": [Case(lambda z: torch.vdot(z[0], W[:, 0])), Case(lambda z: torch.vdot(W[:, 0], z[0]))],
    "LinalgCrossBackward0": [Case(lambda z: torch.linalg.cross(z, V, dim=0))],
    "LinalgSolveExBackward0": [Case(lambda z: torch.linalg.solve(W[:3], z))],
    "SumBackward1": [Case(lambda z: z.sum(0))],
    "ConvolutionBackward0": [Case(lambda z: torch.nn.functional.conv1d(z, W[:, :3, None].expand(4, 3, 2)))],
}
"""Functions that are linear in the parts of complex numbers. Whoever multiplies must conjugate."""


def test_no_complex_operation_is_forgotten() -> None:
    words = ("Complex", "ViewAsComplex", "ViewAsReal", "Conj", "Fft", "Polar")
    undifferentiable = {"ViewAsComplexBackward0_copy", "ConjBackward0_copy"}  # PyTorch refuses to record them
    assert {name for name in REGISTRY if name.startswith(words)} - undifferentiable <= set(LINEAR)


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}-{i}") for n, many in LINEAR.items() for i, c in enumerate(many)]
)
@given(seed=SEEDS)
@settings(max_examples=5)
def test_linear_functions_of_the_parts(name: str, case: Case, seed: int) -> None:
    x = draw(seed, 3, 4, 1 if case.real else 2)
    z = joined(x)
    y = case.function(z.clone().requires_grad_())
    assert name in names(y)
    matrix = oracle.matrix(lambda u: pairs(case.function(joined(u))), x.shape)
    same(x.flatten() @ matrix, pairs(y.detach()).flatten())  # linear, and 0 at 0
    m = draw(seed + 1, *pairs(y).shape)
    expected = (x.flatten() * (matrix @ m.flatten())).reshape(x.shape).sum(-1)
    agrees(explain(case.function, z, weighed(m), composite="attnlrp"), expected, scale=float(m.abs().max()))


def part(m: Tensor, y: Tensor) -> Tensor:
    """Relevance of numbers under a multiplier."""
    return (m * pairs(y)).sum(-1)


@given(seed=SEEDS)
def test_products_of_two_signals(seed: int) -> None:
    """Each takes half of the products it is in; a real factor of a complex one too."""
    a, b, m = numbers(seed, 3, 4), numbers(seed + 1, 3, 4), draw(seed + 2, 3, 4, 2)
    half = part(m, a * b) / 2
    agrees(explain(torch.mul, (a, b), weighed(m)), [half, half])
    half = part(m, a.real * b) / 2
    agrees(explain(torch.mul, (a.real.clone(), b), weighed(m)), [half, half])
    m = draw(seed + 2, 3, 3, 2)
    halves = part(m.unsqueeze(1), a.unsqueeze(1).transpose(1, 2) * b.T.unsqueeze(0)) / 2
    agrees(explain(lambda a, b: a @ b.T, (a, b), weighed(m)), [halves.sum(2), halves.sum(0).T])
    m = draw(seed + 3, 2)
    half = part(m, a[0].conj() * b[0]) / 2
    agrees(explain(torch.vdot, (a[0].clone(), b[0].clone()), weighed(m)), [half, half])


@given(seed=SEEDS)
def test_a_constant_part(seed: int) -> None:
    """What autograd did not record of a complex number is a constant."""
    x, c, m = draw(seed, 3, 4), draw(seed + 1, 4), draw(seed + 2, 3, 4, 2)
    agrees(
        explain(lambda x: torch.complex(x, c.expand(3, 4)), x, weighed(m)),
        x * m[..., 0],
        {"constants": (c * m[..., 1]).sum()},
    )
    agrees(
        explain(lambda x: torch.complex(c.expand(3, 4), x), x, weighed(m)),
        x * m[..., 1],
        {"constants": (c * m[..., 0]).sum()},
    )


@pytest.mark.parametrize("epsilon", [0.1, 1e-6])
def test_shares_of_a_complex_layer(epsilon: float) -> None:
    """The stabiliser lengthens a complex output in its own direction."""
    z, m = numbers(0, 3, 4), draw(1, 3, 3, 2)
    y = z @ W
    s = part(m, y) * y.sgn() / (y.abs() + epsilon)
    terms = (s.conj().unsqueeze(1) * z.unsqueeze(2) * W).real
    composite = Composite.of("epsilon", {"dense": Epsilon(epsilon)})
    explanation = explain(lambda z: z @ W, z, weighed(m), composite=composite)
    agrees(explanation, terms.sum(2), {"absorbed": part(m, y).sum() - terms.sum()})


# Polar form, magnitude, phase -------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", ["auto", "cplrp"])
@pytest.mark.parametrize("signals", ["both", "size", "angle"])
def test_polar_is_explained_by_sine_and_cosine(signals: str, composite: str) -> None:
    size, angle, m = draw(0, 3, 4).abs(), draw(1, 3, 4), draw(2, 3, 4, 2)

    def written(size: Tensor, angle: Tensor) -> Tensor:
        return torch.complex(size * angle.cos(), size * angle.sin())

    models: dict[str, Callable[[Any], tuple[Callable[..., Tensor], Any]]] = {
        "both": lambda f: (f, (size, angle)),
        "size": lambda f: (lambda s: f(s, angle), size),
        "angle": lambda f: (lambda a: f(size, a), angle),
    }
    fused = explain(*models[signals](torch.polar), weighed(m), composite=composite)
    plain = explain(*models[signals](written), weighed(m), composite=composite)
    agrees(fused, plain.tensors(), plain.ledger.accounts)
    if signals == "size":
        same(fused.relevance, part(m, torch.polar(size, angle)))


@given(seed=SEEDS)
def test_magnitude_takes_all(seed: int) -> None:
    z, m = numbers(seed, 3, 4), draw(seed + 1, 3, 4)
    agrees(explain(torch.abs, z, lambda y: (y * m).sum()), m * z.abs(), {"offsets": 0.0})


@given(seed=SEEDS)
def test_phase_is_a_quotient_by_the_magnitude(seed: int) -> None:
    z, m = numbers(seed, 3, 4), draw(seed + 1, 3, 4, 2)
    fused = explain(torch.sgn, z, weighed(m))
    agrees(fused, part(m, z / z.abs()))
    agrees(explain(lambda z: z / z.abs(), z, weighed(m)), fused.relevance)


def test_angle_is_explained_as_by_atan2() -> None:
    z, m = numbers(0, 3, 4), draw(1, 3, 4)

    def of(function: Callable[[Tensor], Tensor]) -> Any:
        return explain(lambda x: function(torch.view_as_complex(x)), pairs(z), lambda y: (y * m).sum())

    fused, plain = of(torch.angle), of(lambda z: torch.atan2(z.imag, z.real))
    agrees(fused, plain.relevance, plain.ledger.accounts)
    assert float(fused.relevance.abs().max()) > 0.1  # what one part wins the other loses
    same(fused.relevance.sum(-1), torch.zeros(3, 4).double(), scale=1.0)


@pytest.mark.parametrize("function", [torch.sgn, torch.angle])
def test_sign_and_angle_of_real_numbers_are_steps(function: Callable[[Tensor], Tensor]) -> None:
    x = draw(0, 6)
    agrees(explain(lambda x: 3 * x + function(x), x, torch.sum), 3 * x, {"held back": function(x).sum()})
    agrees(explain(lambda x: x * function(x), x, torch.sum), x * function(x), {"held back": 0.0})


# Elementwise functions --------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp": (torch.exp, 1.0),
    "expm1": (torch.expm1, 0.0),
    "exp2": (torch.exp2, 1.0),
    "sigmoid": (torch.sigmoid, 0.5),
    "tanh": (torch.tanh, 0.0),
    "sin": (torch.sin, 0.0),
    "cos": (torch.cos, 1.0),
    "asinh": (torch.asinh, 0.0),
    "atan": (torch.atan, 0.0),
    "log1p": (torch.log1p, 0.0),
    "sqrt": (torch.sqrt, 0.0),
    "square": (torch.square, 0.0),
    "cube": (lambda z: z**3, 0.0),
    "swish": (lambda z: z * torch.sigmoid(z), 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_secants_through_the_origin(name: str, seed: int) -> None:
    """``f(z) - f(0)`` is what a number carries, whatever its direction in the plane."""
    function, zero = FUNCTIONS[name]
    z, m = numbers(seed, 3, 4), draw(seed + 1, 3, 4, 2)
    agrees(
        explain(function, z, weighed(m)),
        part(m, function(z) - zero),
        {"offsets": (m[..., 0] * zero).sum()},
        1e-9,  # PyTorch's own sigmoid and log1p of complex numbers lose digits
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_secants_at_zero(name: str) -> None:
    """Their multiplier is the derivative there, which two numbers that cancel tell apart from 0."""
    if name == "sqrt":
        pytest.skip("infinite at zero")
    function = FUNCTIONS[name][0]
    a = numbers(0, 5)
    b, m = -a.clone(), draw(1, 5, 2)
    point = torch.zeros_like(a).requires_grad_()
    (slope,) = torch.autograd.grad(weighed(m)(function(point)), point)
    one, two = explain(lambda a, b: function(a + b), (a, b), weighed(m)).relevance
    same(one, (slope.conj() * a).real)
    same(two, -one)


@pytest.mark.parametrize("exponent", [2 + 1j, 0.5 - 1j, 3 + 0j])
def test_a_power_with_a_complex_exponent(exponent: complex) -> None:
    """It is 0 at 0 where the real part is positive, and all of it goes to the base."""
    z, m = numbers(0, 5), draw(1, 5, 2)
    y = z**exponent
    explanation = explain(lambda z: z**exponent, z, weighed(m))
    agrees(explanation, y.real * m[:, 0] + y.imag * m[:, 1], {"offsets": 0.0})


@pytest.mark.parametrize("exponent", [1j, -1 + 2j])
def test_a_power_that_is_not_0_at_0_is_a_coefficient(exponent: complex) -> None:
    z, m = numbers(0, 5), draw(1, 5, 2)
    y = z * z**exponent
    agrees(explain(lambda z: z * z**exponent, z, weighed(m)), y.real * m[:, 0] + y.imag * m[:, 1])


@pytest.mark.parametrize("base", [2 + 1j, 1j, -2 + 0j])
@pytest.mark.parametrize("draws", [draw, numbers])
def test_a_power_of_a_complex_base(base: complex, draws: Callable[..., Tensor]) -> None:
    """The secant from b^0 = 1, which is an offset; also of real exponents and of 0."""
    x, m = draws(0, 5), draw(1, 5, 2)
    x[0] = 0
    y = base**x - 1
    agrees(explain(lambda x: base**x, x, weighed(m)), y.real * m[:, 0] + y.imag * m[:, 1], {"offsets": m[:, 0].sum()})


@pytest.mark.parametrize("function", [torch.log, torch.reciprocal, torch.rsqrt])
def test_functions_infinite_at_zero_are_coefficients(function: Callable[[Tensor], Tensor]) -> None:
    z, m = numbers(0, 6), draw(1, 6, 2)
    agrees(explain(lambda z: z + function(z), z, weighed(m)), part(m, z), {"held back": part(m, function(z)).sum()})
    agrees(explain(lambda z: z * function(z), z, weighed(m)), part(m, z * function(z)))


# Whole models -----------------------------------------------------------------------------------------------


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding by complex numbers."""
    turns = torch.polar(torch.ones(2).double(), torch.arange(2).double())
    return torch.view_as_real(torch.view_as_complex(x.reshape(3, 2, 2)) * turns).flatten(1)


def filtered(x: Tensor) -> Tensor:
    """A Fourier layer: a filter of every channel in frequency."""
    return torch.fft.irfft(torch.fft.rfft(x) * V[:, :3], n=x.shape[-1])


@pytest.mark.parametrize("function", [rotated, filtered])
def test_layers_that_pass_complex_numbers_are_linear(function: Callable[[Tensor], Tensor]) -> None:
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    matrix = oracle.matrix(function, x.shape)
    expected = x * (matrix @ m.flatten()).reshape(x.shape)
    agrees(explain(function, x, lambda y: (y * m).sum()), expected)


def test_a_network_of_complex_layers() -> None:
    """Products, a residual, a magnitude that gates: the ledger closes, and half precision stays close."""

    def network(z: Tensor, w: Tensor = W, v: Tensor = V) -> Tensor:
        h = z @ w
        size = h.abs()
        h = torch.relu(size - 0.1) * h / (size + 1e-3)
        return (torch.tanh(h @ v) + z).abs().square().sum(1)

    z = numbers(0, 3, 4)
    exact = explain(network, z, torch.sum)
    assert exact.ledger.error < 1e-12
    fast = explain(lambda z: network(z, W.to(z), V.to(z)), z.to(torch.complex64), torch.sum)
    assert fast.ledger.closes
    same(fast.relevance.double(), exact.relevance, 1e-4)


def test_a_graph_that_exists() -> None:
    """``relevance`` of a complex tensor on the way."""
    z = numbers(0, 3, 4).requires_grad_()
    h = z @ W
    same(relevance(h.abs(), [z, h]).relevance[1], h.abs().detach())


def test_inputs_of_both_kinds() -> None:
    parts: Sequence[Tensor] = (draw(0, 3, 4), numbers(1, 3, 4))
    explanation = explain(lambda x, z: torch.complex(x, x) + z * 2, tuple(parts), weighed(torch.ones(3, 4, 2).double()))
    agrees(explanation, [2 * parts[0], 2 * (parts[1].real + parts[1].imag)])


@pytest.mark.parametrize("rule", [Gamma(0.25), ZPlus(), AlphaBeta(2, 1), Flat(), WSquare(), ZBox(-1, 1)], ids=str)
def test_rules_that_ask_for_a_sign_are_refused(rule: Rule) -> None:
    with pytest.raises(RuleError, match=r"MmBackward0 in the model.*neither positive nor negative"):
        explain(lambda z: (z @ W).abs(), numbers(0, 3, 4), 0, composite=Composite.of("signs", {"dense": rule}))

"""Sums of two signals under each of their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynlrp import Composite, explain
from dynlrp.rules import REGISTRY, EpsilonSum, Flat, Magnitude
from tests.oracle import Relative, agrees, draw, same, stabilised

SEEDS = st.integers(0, 2**32 - 1)


class Sum(NamedTuple):
    """A sum of two tensors with the factors it gives them."""

    function: Callable[[Tensor, Tensor], Tensor]
    left: float = 1.0
    right: float = 1.0


SUMS: dict[str, list[Sum]] = {
    "AddBackward0": [
        Sum(torch.add),
        Sum(lambda a, b: torch.add(a, b, alpha=0.3), 1, 0.3),
        Sum(lambda a, b: torch.add(a, b, alpha=-2), 1, -2),
    ],
    "SubBackward0": [Sum(torch.sub, 1, -1), Sum(lambda a, b: torch.sub(a, b, alpha=3), 1, -3)],
    "RsubBackward0": [
        Sum(lambda a, b: torch.rsub(a, b), -1, 1),
        Sum(lambda a, b: torch.rsub(a, b, alpha=0.5), -0.5, 1),
    ],
}
ALL = [pytest.param(name, s, id=f"{name}-{i}") for name, many in SUMS.items() for i, s in enumerate(many)]
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "AddBackward1": lambda x: torch.ops.aten.add.Scalar(x, 1.5),
    "SubBackward1": lambda x: torch.ops.aten.sub.Scalar(x, 1.5),
    "RsubBackward1": lambda x: torch.rsub(x, 1.5),
}
SHAPES = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1), (2, 3)), ((2, 1, 3), (4, 1))]


def spread(found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum over the dimensions that were broadcast."""
    while found.ndim > len(shape):
        found = found.sum(0)
    for axis, size in enumerate(shape):
        if size == 1:
            found = found.sum(axis, keepdim=True)
    return found


def test_no_sum_is_forgotten() -> None:
    assert {n for n, o in REGISTRY.items() if o.family == "addition"} == {*SUMS, *NUMBERS}


@pytest.mark.parametrize(("name", "how"), ALL)
def test_the_example_is_of_this_operation(name: str, how: Sum) -> None:
    a, b = draw(0, 3).requires_grad_(), draw(1, 3).requires_grad_()
    y = how.function(a, b)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    same(y.detach(), how.left * a.detach() + how.right * b.detach(), 1e-15)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("name", "how"), ALL)
@given(seed=SEEDS)
def test_by_the_vjp(name: str, how: Sum, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    """Each summand keeps the multiplier: a residual connection is the identity."""
    a, b = (draw(seed + i, *shape) for i, shape in enumerate(shapes))
    m = draw(seed + 2, *(a + b).shape)
    wanted = [spread(how.left * a * m, shapes[0]), spread(how.right * b * m, shapes[1])]
    agrees(explain(how.function, (a, b), lambda y: (y * m).sum()), wanted, {"absorbed": 0.0})


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("name", "how"), ALL)
def test_epsilon(name: str, how: Sum, shapes: tuple[tuple[int, ...], ...], epsilon: float) -> None:
    """R_a = a / (z + epsilon sign(z)) R."""
    a, b = (draw(i, *shape) for i, shape in enumerate(shapes))
    left, right = torch.broadcast_tensors(how.left * a, how.right * b)
    m = draw(2, *left.shape)
    z = left + right
    unit = z * m / stabilised(z, epsilon)
    wanted = [spread(left * unit, shapes[0]), spread(right * unit, shapes[1])]
    composite = Composite.of("epsilon", {"addition": EpsilonSum(epsilon)})
    explanation = explain(how.function, (a, b), lambda y: (y * m).sum(), composite=composite)
    agrees(explanation, wanted, {"absorbed": (z * m).sum() - sum(w.sum() for w in wanted)})


@pytest.mark.parametrize(("name", "how"), ALL)
def test_relative_epsilon(name: str, how: Sum) -> None:
    """In units of the root mean square of each sample's sum."""
    a, b, m = draw(0, 3, 2, 2), draw(1, 3, 2, 2), draw(2, 3, 2, 2)
    left, right = how.left * a, how.right * b
    z = left + right
    unit = z * m / stabilised(z, Relative(0.2, 3))
    composite = Composite.of("epsilon", {"addition": EpsilonSum(0.2, relative=True)})
    explanation = explain(how.function, (a, b), lambda y: (y * m).sum((1, 2)), composite=composite)
    agrees(explanation, [left * unit, right * unit], {"absorbed": (z * m - z * unit).sum()})
    # A relu behind it hides nothing of the scale.
    gated = explain(lambda a, b: how.function(a, b).relu(), (a, b), lambda y: (y * m).sum((1, 2)), composite=composite)
    agrees(gated, [left * unit * (z > 0), right * unit * (z > 0)])


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_epsilon_where_the_sum_is_zero(epsilon: float) -> None:
    """Two summands that cancel: the sum has no relevance, and nothing is divided by zero."""
    a, b = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 1.0]).double()
    composite = Composite.of("epsilon", {"addition": EpsilonSum(epsilon)})
    explanation = explain(torch.add, (a, b), torch.sum, composite=composite)
    assert explanation.finite()
    assert explanation.ledger.closes
    same(explanation.relevance[0][1], torch.tensor(2.0).double(), 1e-5)


def magnitude(left: Tensor, right: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """|a| / (|a| + |b|) R, nothing where both are zero."""
    whole = left.abs() + right.abs()
    unit = torch.where(whole > 0, r / whole, 0.0)
    return left.abs() * unit, right.abs() * unit


BY_SIZE = Composite.of("magnitude", {"addition": Magnitude()})


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("name", "how"), ALL)
@given(seed=SEEDS)
def test_by_magnitude(name: str, how: Sum, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    a, b = (draw(seed + i, *shape) for i, shape in enumerate(shapes))
    a[0] = 0
    b[-1] = 0
    left, right = torch.broadcast_tensors(how.left * a, how.right * b)
    m = draw(seed + 2, *left.shape)
    shares = magnitude(left, right, (left + right) * m)
    wanted = [spread(share, shape) for share, shape in zip(shares, shapes, strict=True)]
    explanation = explain(how.function, (a, b), lambda y: (y * m).sum(), composite=BY_SIZE)
    agrees(explanation, wanted, {"absorbed": 0.0})


def test_by_magnitude_where_both_are_zero() -> None:
    """Relevance that a rule sends to a sum of nothing is absorbed."""
    a, b, weight = draw(0, 2, 3), draw(1, 2, 3), draw(2, 4, 3)
    a[0, 1] = b[0, 1] = 0
    r = (((a + b) @ weight.t()) / (3 + 1e-6)).sum(1, keepdim=True).expand(2, 3)
    composite = Composite.of("both", {"addition": Magnitude(), "dense": Flat()})
    explanation = explain(lambda a, b: (a + b) @ weight.t(), (a, b), torch.sum, composite=composite)
    lost = (a + b) @ weight.t() - 3 * ((a + b) @ weight.t()) / (3 + 1e-6)
    agrees(explanation, list(magnitude(a, b, r)), {"absorbed": r[0, 1] + lost.sum()})


@given(seed=SEEDS)
def test_chains_by_magnitude(seed: int) -> None:
    """Relevance meets sums again and again without a stop between, and multipliers at the end."""
    a, b, c, d, m = (draw(seed + i, 4) for i in range(5))
    r = (a + b - c + 2 * d) * m
    rest, share_d = magnitude(a + b - c, d * 2, r)
    ab, share_c = magnitude(a + b, c, rest)
    share_a, share_b = magnitude(a, b, ab)
    explanation = explain(
        lambda a, b, c, d: torch.add((a + b) - c, d, alpha=2), (a, b, c, d), lambda y: (y * m).sum(), composite=BY_SIZE
    )
    agrees(explanation, [share_a, share_b, share_c, share_d])


@given(seed=SEEDS)
def test_a_residual_stream_by_magnitude(seed: int) -> None:
    """Each block adds to the stream; a linear layer in the branch needs multipliers, the stream carries relevance."""
    x, m = draw(seed, 3, 4), draw(seed + 1, 3, 4)
    weights = [draw(seed + 2 + i, 4, 4) for i in range(3)]

    def model(x: Tensor) -> Tensor:
        for w in weights:
            x = x + torch.relu(x @ w)
        return x

    stream = [x]
    for w in weights:
        stream.append(stream[-1] + torch.relu(stream[-1] @ w))
    r = stream[-1] * m
    for h, w in zip(stream[-2::-1], reversed(weights), strict=True):
        branch = torch.relu(h @ w)
        r, side = magnitude(h, branch, r)
        r = r + h * (torch.where(branch > 0, side / torch.where(branch > 0, branch, 1.0), 0.0) @ w.t())
    explanation = explain(model, x, lambda y: (y * m).sum(), composite=BY_SIZE)
    agrees(explanation, r, tolerance=1e-8)  # relevance is divided by activations that may be small


class Shifted(nn.Module):
    """Adds a parameter."""

    def __init__(self, shift: Tensor, frozen: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift, not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rule", ["vjp", "epsilon", "magnitude"])
def test_a_parameter_takes_its_share(rule: str, frozen: bool) -> None:
    """A bias or position embedding is booked, and has relevance of its own for who asks."""
    x, shift, m = draw(0, 2, 3), draw(1, 3), draw(2, 2, 3)
    z = x + shift
    shares = {
        "vjp": (x * m, shift * m),
        "epsilon": (x * z * m / stabilised(z, 0.1), shift * z * m / stabilised(z, 0.1)),
        "magnitude": magnitude(x, shift.expand(2, 3), z * m),
    }[rule]
    rules = {"vjp": {}, "epsilon": {"addition": EpsilonSum(0.1)}, "magnitude": {"addition": Magnitude()}}[rule]
    composite = Composite.of(rule, rules)
    model = Shifted(shift, frozen)
    explanation = explain(model, x, lambda y: (y * m).sum(), composite=composite)
    agrees(explanation, shares[0], {"parameters": shares[1].sum()})
    explanation = explain(model, x, lambda y: (y * m).sum(), composite=composite, parameters="shift")
    agrees(explanation, shares[0], {"parameters": shares[1].sum()})
    same(explanation.parameters["shift"], shares[1].sum(0))


@pytest.mark.parametrize("rule", ["vjp", "epsilon", "magnitude"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_added(name: str, rule: str) -> None:
    """Autograd records no number: its share is a constant in the ledger, or under Magnitude stays with the signal."""
    x, m = draw(0, 2, 3), draw(1, 2, 3)
    y = NUMBERS[name](x.clone().requires_grad_())
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    sign = -1.0 if name.startswith("Rsub") else 1.0
    z = y.detach()
    rules = {"vjp": {}, "epsilon": {"addition": EpsilonSum(0.1)}, "magnitude": {"addition": Magnitude()}}[rule]
    # The result must be kept by somebody: a product saves it.
    explanation = explain(
        lambda x: NUMBERS[name](x).square(), x, lambda y: (y * m).sum(), composite=Composite.of(rule, rules)
    )
    unit = {"vjp": z * m, "epsilon": z * z * m / stabilised(z, 0.1)}.get(rule)
    if unit is None:
        agrees(explanation, z * z * m, {"constants": 0.0})
    else:
        absorbed = (z * z * m - unit * z).sum()
        accounts = {"constants": (unit * (z - sign * x)).sum(), "absorbed": absorbed}
        agrees(explanation, sign * x * unit, accounts)


@pytest.mark.parametrize("rule", ["vjp", "epsilon"])
def test_a_tensor_that_is_added_and_not_recorded(rule: str) -> None:
    x, c, m = draw(0, 2, 3), draw(1, 3), draw(2, 2, 3)
    rules = {"vjp": {}, "epsilon": {"addition": EpsilonSum(0.1)}}[rule]
    explanation = explain(lambda x: (x - c).square(), x, lambda y: (y * m).sum(), composite=Composite.of(rule, rules))
    z = x - c
    unit = {"vjp": z * m, "epsilon": z * z * m / stabilised(z, 0.1)}[rule]
    agrees(explanation, x * unit, {"constants": -(c * unit).sum()})


def test_the_same_tensor_twice() -> None:
    x, m = draw(0, 5), draw(1, 5)
    agrees(explain(lambda x: x + x, x, lambda y: (y * m).sum()), 2 * x * m)
    agrees(explain(lambda x: x + x, x, lambda y: (y * m).sum(), composite=BY_SIZE), 2 * x * m)
    explanation = explain(lambda x: x - x + x, x, lambda y: (y * m).sum())
    agrees(explanation, x * m)

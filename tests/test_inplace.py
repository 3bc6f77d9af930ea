"""Writes into views of a tensor: as if they had been written out of place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynlrp import (
    COMPOSITES,
    BrokenPromiseError,
    UnknownOperationError,
    explain,
    explain_many,
    relevance,
    trace,
)
from tests.conftest import close
from tests.oracle import draw, same

W = draw(9, 8, 3)


def in_place(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, :4] = x[:, 4:]
    y[:, 2:5] += x[:, :3]
    y[:, 6] = 2.5
    y[:, 7:].masked_fill_(x[:, :1] > 0, -1.0)
    y[:, 2:6].mul_(3.0)
    y[:, :3].relu_()
    return y @ W


def out_of_place(x: Tensor) -> Tensor:
    fill = x.new_tensor(-1.0).expand(len(x), 1)
    y = torch.cat([x[:, 4:6], x[:, 6:8] + x[:, :2], x[:, 2:3], x.new_zeros(len(x), 1), fill * 0 + 2.5], 1)
    last = torch.where(x[:, :1] > 0, fill, 0.0)
    y = torch.cat([y[:, :2], y[:, 2:6] * 3, y[:, 6:]], 1)
    return torch.cat([y[:, :3].relu(), y[:, 3:], last], 1) @ W


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "dynamiclrp"])
def test_writes_into_views(composite: str) -> None:
    layer = nn.Linear(8, 8).double()
    x = draw(6, 3, 8)
    torch.testing.assert_close(in_place(x), out_of_place(x))
    ours, plain = (explain(lambda x, f=f: f(layer(x)), x, 0, composite=composite) for f in (in_place, out_of_place))
    assert ours.ledger.closes
    if composite == "dynamiclrp":  # where a sum is written into a view, its summands keep their own shares
        return
    close(ours.relevance, plain.relevance)


SCALE = torch.tensor([0.5, 0.0, 1.0, -2.0], dtype=torch.float64)
SCALINGS: dict[str, tuple[Any, Any]] = {
    "one column": (lambda y: y[:, :1].mul_(0.5), lambda y: y[:, :1] * 0.5),
    "by constants": (lambda y: y[:, :4].mul_(SCALE), lambda y: y[:, :4] * SCALE),
    "weighed sum": (lambda y: y[:, :4].lerp_(y[:, 4:].clone(), 0.3), lambda y: y[:, :4] * 0.7 + y[:, 4:] * 0.3),
    "leaky": (lambda y: F.leaky_relu_(y[:, :4], 0.2), lambda y: F.leaky_relu(y[:, :4], 0.2)),
    "size": (lambda y: y[:, :4].abs_(), lambda y: y[:, :4].abs()),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("name", SCALINGS)
def test_linear_writes_into_views(name: str, batch: int) -> None:
    """Whatever the numbers are, and however many of them."""
    write, written = SCALINGS[name]

    def in_place(x: Tensor) -> Tensor:
        y = x * 2
        write(y)
        return y @ W

    def out_of_place(x: Tensor) -> Tensor:
        y = x * 2
        front = written(y)
        return torch.cat([front, y[:, front.shape[1] :]], 1) @ W

    x = draw(7, batch, 8)
    ours, plain = explain(in_place, x, 0), explain(out_of_place, x, 0)
    close(ours.relevance, plain.relevance)
    assert ours.ledger.closes
    assert ours.ledger.accounts["constants"] == pytest.approx(plain.ledger.accounts["constants"], abs=1e-12)


@pytest.mark.parametrize(
    "write",
    [
        lambda y, x: y[:, :2].sigmoid_(),
        lambda y, x: y[:1, :2].fill_(0.0).add_(y[:1, :1] * 0).sigmoid_(),
        lambda y, x: y[:, :2].addcmul_(x[:, 2:4], x[:, :2]),
        lambda y, x: y[:, :2].addcdiv_(x[:, 2:4], x[:, :2]),
        lambda y, x: y[:, :3].addmm_(x, x.T),
        lambda y, x: y[None, :, :3].baddbmm_(x[None], x.T[None]),
        lambda y, x: Exponential.apply(y[:, :2]),
    ],
    ids=[
        "sigmoid", "sigmoid of few equal numbers", "addcmul", "addcdiv", "addmm", "baddbmm", "custom",
    ],
)  # fmt: skip
@pytest.mark.parametrize("old", ["zeros", "input"])
def test_other_writes_are_an_error(write: Any, old: str) -> None:
    """Also where the derivative by the old values is 0 or 1, as if it were a copy or a sum."""

    def model(x: Tensor) -> Tensor:
        y = x * 2 if old == "input" else x.new_zeros(x.shape).add_(x * 0)
        write(y, x)
        return y @ W

    x = draw(7, 3, 8)
    with pytest.raises(UnknownOperationError, match="out of place"):
        explain(model, x, 0)
    found = explain(model, x, 0, on_unknown="gradient")
    assert found.ledger.fallbacks
    assert found.ledger.closes


def test_products_written_into_new_tensors() -> None:
    """A tensor of constants is not recorded, so that the derivative by the factors alone can tell."""

    def model(x: Tensor) -> Tensor:
        y = x.new_zeros(3, 8)
        y[:, :3].addmm_(x, x.T)
        return y @ W

    with pytest.raises(UnknownOperationError, match="out of place"):
        explain(model, draw(7, 3, 8), 0)


class Exponential(torch.autograd.Function):
    """In place, with a derivative that autograd cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.result = x.exp_().clone()
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.result


@pytest.mark.parametrize("precision", [None, torch.float64])
def test_a_custom_write_is_known_behind_hooks(precision: torch.dtype | None) -> None:
    """Saved tensors may be handed out by Python, which is no custom function."""

    def model(x: Tensor, write: Any) -> Tensor:
        y = x * 2
        write(y[:, :2])
        return y @ W.float()

    x = draw(7, 3, 8).float()
    found = explain(lambda x: model(x, lambda y: y.mul_(x[:, 2:4])), x, 0, precision=precision)
    assert found.ledger.closes
    with pytest.raises(UnknownOperationError, match="out of place"):
        explain(lambda x: model(x, Exponential.apply), x, 0, precision=precision)


def test_a_saved_tensor_that_was_written_over() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2].mul_(y[:, 2:4])
        return y @ W

    with pytest.raises(BrokenPromiseError, match="in place"):
        explain(model, draw(7, 3, 8), 0)


# Products and quotients of a part ---------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda y: y[..., 1:],
    "every other": lambda y: y[:, ::2],
    "one row": lambda y: y[:, 1],
    "a block, transposed": lambda y: y[:, 1:, :2].transpose(1, 2),
    "diagonal": lambda y: y.diagonal(dim1=1, dim2=2),
    "all": lambda y: y[:],
    "nothing": lambda y: y[:, :0],
}
"""Views of a tensor of three dimensions that are written to."""


class Case(NamedTuple):
    """Two linear functions of the inputs, of which the second multiplies or divides a part of the first in place."""

    part: Callable[[Tensor], Tensor]
    x: Tensor
    weight: Tensor
    other: Tensor
    """Makes the second factor, of the shape ``factor`` for each sample."""
    factor: torch.Size
    divides: bool

    def second(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.other).reshape(len(x), *self.factor)

    def __call__(self, x: Tensor) -> Tensor:
        y, s = x @ self.weight, self.second(x)
        part = self.part(y)
        part.div_(s) if self.divides else part.mul_(s)
        return y.flatten(1)


@st.composite
def cases(draws: st.DrawFn) -> Case:
    n, rows, columns, hidden = (draws(st.integers(1, 3)), *(draws(st.integers(2, 4)) for _ in range(3)))
    part = PARTS[draws(st.sampled_from(sorted(PARTS)))]
    shape = part(torch.zeros(n, rows, hidden)).shape[1:]
    factor = torch.Size([size if draws(st.booleans()) else 1 for size in shape])
    x, weight = draw(1, n, rows, columns), draw(2, columns, hidden)
    return Case(part, x, weight, draw(3, rows * columns, factor.numel()), factor, draws(st.booleans()))


def by_hand(case: Case, m: Tensor) -> Tensor:
    """Relevance of the inputs for multipliers ``m`` of the result, entry by entry: inside of the part each factor of a
    product gets half, and of a quotient the dividend gets all."""
    y, s = case.x @ case.weight, case.second(case.x)
    places = case.part(torch.arange(y.numel()).reshape(y.shape))
    m = m.flatten().clone()
    m_s = torch.zeros_like(s)
    for index in range(places.numel()):
        at = torch.unravel_index(torch.tensor(index), places.shape)
        of = tuple(i if size > 1 or not n else 0 for n, (i, size) in enumerate(zip(at, s.shape, strict=True)))
        place = places[at]
        if case.divides:
            m[place] /= s[of]
        else:
            m_s[of] += m[place] * y.flatten()[place] / 2
            m[place] *= s[of] / 2
    return case.x * (m.reshape(y.shape) @ case.weight.T + (m_s.flatten(1) @ case.other.T).reshape(case.x.shape))


@given(cases(), st.integers(0, 100))
def test_a_part_is_multiplied_or_divided_by_a_signal(case: Case, seed: int) -> None:
    w = draw(seed, case(case.x).shape[1], 2)
    found = explain(lambda x: case(x) @ w, case.x, 1)
    same(found.relevance, by_hand(case, w[:, 1].expand(len(case.x), -1)))
    assert found.ledger.closes
    assert found.ledger.unresolved == []


class Gate(nn.Module):
    """A factor for the first columns of a tensor, which are written in place or not."""

    def __init__(self, name: str, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, n).double() for n in (4, 2, 3))
        self.scale = nn.Parameter(draw(3, 2))
        self.start = nn.Parameter(draw(4, 4))
        self.name, self.in_place = name, in_place

    def forward(self, x: Tensor) -> Tensor:
        y, s = self.first(x), self.second(x)
        match self.name:
            case "parameter":
                s = self.scale
            case "gate":
                s = s.sigmoid()
            case "gated":
                y = y.sigmoid() * 1.0
            case "into a parameter":
                y = self.start.expand(len(x), -1) * 1.0
            case "statistic":
                s = s.square().mean(1, keepdim=True).add(1e-5).rsqrt()
        if self.in_place:
            y[:, :2] *= s
        else:
            y = torch.cat([y[:, :2] * s, y[:, 2:]], 1)
        y = y.relu() if self.name == "relu" else y
        return self.last(y)


GATES = ("signal", "parameter", "gate", "gated", "into a parameter", "statistic", "relu")


def pair(name: str) -> tuple[Gate, Gate]:
    torch.manual_seed(0)
    one, other = Gate(name, True), Gate(name, False)
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", GATES)
def test_a_product_in_place_is_one_out_of_place(name: str, composite: str) -> None:
    """By the rule that the composite has for it, parameters and layers with it."""
    x = draw(0, 3, 4)
    ours, plain = (
        explain(m, x, 1, composite=composite, parameters=["start", "scale", "first.*"], layers=["first", "second"])
        for m in pair(name)
    )
    close(ours.relevance, plain.relevance)
    for kind in ("layers", "parameters"):
        for key, expected in getattr(plain, kind).items():
            found = getattr(ours, kind)[key]
            assert (found is None) == (expected is None)
            if expected is not None:
                close(found, expected)
    assert ours.ledger.closes
    for account, amount in plain.ledger.accounts.items():
        if composite == "gradient_x_input" and name == "into a parameter":
            continue  # which loses the same, but in other places
        assert ours.ledger.accounts[account] == pytest.approx(amount, abs=1e-10)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("frozen", [False, True])
def test_products_in_place_in_every_way(name: str, frozen: bool) -> None:
    """Many targets, a program, relevance that is differentiated, wide precision, a graph that exists."""
    ours, plain = pair(name)
    ours.requires_grad_(not frozen)
    x = draw(0, 3, 4)
    one = explain(ours, x, 1)
    for found in explain_many(ours, x, [0, 1])[1:]:
        close(found.relevance, one.relevance)
    torch.testing.assert_close(trace(ours, x, 1)(x * 2).relevance, explain(ours, x * 2, 1).relevance, rtol=0, atol=0)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    gradients = []
    for model, leaf in zip((ours, plain), leaves, strict=True):
        r = explain(model, leaf, 1, create_graph=True).relevance
        gradients += torch.autograd.grad(r.square().sum(), leaf)
    close(*gradients)
    half = [m.to(torch.bfloat16) for m in (ours, plain)]
    found, expected = (explain(m, x.bfloat16(), 1, precision=torch.float32).relevance for m in half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # both compute in float32


@pytest.mark.parametrize("name", ["signal", "gate", "statistic"])
def test_a_product_in_place_inside_a_checkpoint(name: str) -> None:
    """Whose saved tensors come in the model's own precision."""
    ours, plain = (model.float() for model in pair(name))
    x = draw(0, 3, 4).float()
    found = explain(lambda x: checkpoint(ours, x, use_reentrant=False), x, 1, precision=torch.float64)
    expected = explain(plain, x, 1, precision=torch.float64)
    assert found.relevance.dtype == torch.float64
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-5, atol=1e-7)  # the model's own digits
    assert found.ledger.closes


def test_a_write_in_place_beside_a_convolution_inside_a_checkpoint() -> None:
    """Which takes its input in its own precision alone, when the checkpoint runs it again."""
    layer, head = nn.Conv1d(2, 2, 2), nn.Linear(6, 3)

    def block(x: Tensor) -> Tensor:
        y = layer(x) * 1.5
        F.relu_(y[..., :2])
        return y

    x = draw(0, 2, 2, 4).float()
    ours = explain(lambda x: head(checkpoint(block, x, use_reentrant=False).flatten(1)), x, 1, precision=torch.float64)
    plain = explain(lambda x: head(block(x).flatten(1)), x, 1, precision=torch.float64)
    torch.testing.assert_close(ours.relevance, plain.relevance, rtol=1e-5, atol=1e-7)  # the model's own digits
    assert ours.ledger.closes


def test_a_graph_with_a_product_in_place() -> None:
    ours, plain = pair("signal")
    x = draw(0, 3, 4).requires_grad_()
    found, expected = (relevance(m(x)[:, 1], x, audit=True) for m in (ours, plain))
    close(found.relevance, expected.relevance)
    assert found.ledger.closes

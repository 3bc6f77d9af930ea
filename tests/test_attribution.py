"""LRP behind captum's interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import LRP, explain
from tests.oracle import draw


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval()


def test_it_gives_what_explain_gives_and_the_difference_of_sums() -> None:
    model, x = network(), draw(1, 3, 6)
    expected = explain(model, x, [2, 0, 1], composite="epsilon_plus")
    found, delta = LRP(model, "epsilon_plus").attribute(x, torch.tensor([2, 0, 1]), return_convergence_delta=True)
    assert torch.equal(found, expected.relevance)
    assert torch.equal(LRP(model, "epsilon_plus").attribute(x, [2, 0, 1]), expected.relevance)
    outputs = model(x)[torch.arange(3), torch.tensor([2, 0, 1])]
    torch.testing.assert_close(delta, expected.relevance.sum(1) - outputs)
    assert LRP(model).has_convergence_delta()


def test_further_arguments_may_be_anything_and_unused_inputs_get_nothing() -> None:
    model, x, y, ids = network(), draw(1, 3, 6), draw(2, 3, 6), torch.tensor([0, 1, 2])

    def forward(x: Tensor, unused: Tensor, weights: Tensor, options: Any, power: int) -> Tensor:
        assert options is None
        return (model(x) * weights) ** power

    weights = draw(3, 3, 1)
    found = LRP(forward, "gradient_x_input").attribute((x, y), ids, (weights, None, 2))
    leaf = x.clone().requires_grad_()
    score = forward(leaf, y, weights, None, 2)[torch.arange(3), ids].sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(found[0], x * gradient, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[1], torch.zeros_like(y))


def test_options_are_those_of_explain() -> None:
    model, x = network().float(), draw(1, 3, 6).float()
    found = LRP(model, precision=torch.float64).attribute(x, 1)
    assert torch.equal(found, explain(model, x, 1, precision=torch.float64).relevance)
    with pytest.raises(TypeError, match="composit"):
        LRP(model, composit="auto").attribute(x)

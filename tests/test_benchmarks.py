"""The benchmarks' own functions, on tiny cases and without the libraries that they compare with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import Case
from benchmarks.rivals import METHODS
from benchmarks.rivals.plain import integrated_gradients
from dynlrp import explain


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 16, 5),
    )  # fmt: skip
    return Case(model.eval(), torch.randn(2, 3, 8, 8)).to(torch.float64)


class Masked(nn.Module):
    """Takes ids of masks beside what is explained, as transformers do."""

    def forward(self, mask: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"scores": (mask[..., None] * x).cumsum(1)}


def test_every_method_that_is_there_gives_relevance_and_leaves_the_model_alone(case: Case) -> None:
    target = torch.tensor([3, 1])
    before, state = case.run(), {key: value.clone() for key, value in case.model.state_dict().items()}
    names = [name for name, method in METHODS.items() if method.installed and method.fits(case)]
    assert {"dynlrp auto", "gradient", "Grad-CAM", "random"} <= set(names)
    for name in names:
        found = METHODS[name](case, target)
        assert found.shape == case.x.shape, name
        assert found.isfinite().all(), name
        assert not found.requires_grad, name
        assert torch.equal(found, METHODS[name](case, target)), f"{name} is not repeatable"
        assert torch.equal(case.run(), before), f"{name} altered the model"
        after = case.model.state_dict()
        assert list(after) == list(state), name
        assert all(torch.equal(after[key], state[key]) for key in state), name


def test_composites_that_equal_methods_can_be_used(case: Case) -> None:
    for method in METHODS.values():
        if method.composite is not None:
            assert explain(case.model, case.inputs, 1, composite=method.composite).ledger.closes, method.name


def test_gradient_x_input_equals_the_composite(case: Case) -> None:
    method = METHODS["gradient x input"]
    ours = explain(case.model, case.inputs, [3, 1], composite=method.composite).relevance
    # The same products in another order, float64.
    torch.testing.assert_close(method(case, torch.tensor([3, 1])), ours, rtol=1e-12, atol=1e-14)


def test_integrated_gradients_are_complete() -> None:
    torch.manual_seed(0)
    case = Case(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 6)).to(torch.float64)
    target = torch.tensor([2, 1])
    expected = case.scores(target) - case.at(torch.zeros_like(case.x)).scores(target)
    # The midpoint rule's error is 1/24 of the second derivative times the step of 1/32 squared: some 1e-4.
    torch.testing.assert_close(integrated_gradients(case, target).sum(1), expected, rtol=0, atol=5e-4)


def test_the_explained_input_is_the_first_with_floating_point_numbers() -> None:
    x = torch.rand(2, 3, 4, dtype=torch.float64)
    case = Case(Masked(), {"mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "x": x}, "scores")
    assert case.name == "x"
    assert case.x is x
    # The last position's output sums over positions; its gradient is the mask.
    target = torch.tensor([8, 9])
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    expected[0, :2, 0] = expected[1, :, 1] = 1
    assert torch.equal(METHODS["gradient"](case, target), expected)
    assert torch.equal(case.scores(target), case.run().flatten(1)[[0, 1], [8, 9]])
    assert torch.equal(case.scores(), case.run().flatten(1).amax(1))

"""Relevance beside ordinary backprop in one training step: one forward pass, and nothing else that changes."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynlrp import InputError, TrainingModeError, UnknownOperationError, explain, relevance
from tests.conftest import close, same
from tests.examples import draw

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def network() -> nn.Module:
    """In training mode, with batch statistics and dropout."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(48, 4)]
    return nn.Sequential(*layers).double()


def ordinary(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def beside(weight: float) -> Step:
    """With a penalty on relevance of the graph that the loss has."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        logits = model(x)
        found = relevance(logits.gather(1, y[:, None]), x, create_graph=True).relevance
        return F.cross_entropy(logits, y) + weight * found[:, :, 0].abs().sum()

    return loss


def through(weight: float) -> Step:
    """The same by explain, whose forward pass is the step's own."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = explain(model, x, y.tolist(), create_graph=True, allow_training=True)
        return F.cross_entropy(found.output, y) + weight * found.relevance[:, :, 0].abs().sum()

    return loss


def train(loss: Step, steps: int = 3) -> tuple[nn.Module, torch.optim.Adam, list[float]]:
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for number in range(steps):
        optimiser.zero_grad()
        value = loss(model, draw(number, 5, 1, 6, 6), torch.arange(5) % 4)
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    return model, optimiser, losses


@pytest.mark.parametrize("step", [beside(0.0), through(0.0)], ids=["relevance", "explain"])
def test_a_penalty_without_weight_changes_nothing(step: Step) -> None:
    """Losses, gradients, parameters, Adam's state, batch statistics and random draws are those of ordinary training."""
    expected, optimiser, losses = train(ordinary)
    state = torch.get_rng_state()
    found, other, same_losses = train(step)
    assert same_losses == losses
    assert torch.equal(torch.get_rng_state(), state)
    for (name, ours), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert int(found.state_dict()["1.num_batches_tracked"]) == 3
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(other.state.values(), optimiser.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_both_ways_train_alike() -> None:
    (one, _, losses), (other, _, more) = train(beside(0.1)), train(through(0.1))
    assert torch.allclose(torch.tensor(losses), torch.tensor(more), 1e-12, 0.0)
    for ours, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, 1e-9, 1e-12)
    assert not torch.allclose(torch.tensor(losses), torch.tensor(train(ordinary)[2]))


def test_the_penalty_falls() -> None:
    """By gradient steps on relevance alone."""
    model, x = network().eval(), draw(1, 5, 1, 6, 6)
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    sizes = []
    for _ in range(20):
        size = explain(model, x, 1, create_graph=True).relevance.square().sum()
        optimiser.zero_grad()
        size.backward()
        optimiser.step()
        sizes.append(float(size.detach()))
    assert sizes[-1] < 0.2 * sizes[0]


def test_state_is_that_of_one_call_of_the_model() -> None:
    x = draw(1, 5, 1, 6, 6)
    model, other = network(), network()
    torch.manual_seed(3)
    expected = model(x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found = explain(other, x, 1, create_graph=True, allow_training=True)
    assert torch.equal(found.output, expected)
    assert torch.equal(found.value, expected[:, 1].detach())
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(other.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


class Hidden(nn.Module):
    """A constant that is recorded in a second run alone; it draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) + 1.0 + random.random() + float(np.random.rand())
        return self.last(F.dropout(x, 0.4))


def test_state_where_the_model_runs_twice() -> None:
    x = draw(1, 4, 3)
    states = []
    for run in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Hidden().double()
        if run:
            found = explain(model, x, 1, create_graph=True, allow_training=True)
            assert not found.ledger.unresolved
            output = found.output
        else:
            output = model(x)
        numbers = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])
        states.append([output.detach(), numbers, *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_state_is_put_back_on_errors_and_in_eval_mode() -> None:
    x = draw(1, 5, 1, 6, 6)
    model = network()
    for options, error in (
        ({"allow_training": False}, TrainingModeError),
        ({"allow_training": True, "target": lambda y: F.cross_entropy(y, torch.arange(5) % 4)}, UnknownOperationError),
        ({"allow_training": True, "layers": "nowhere"}, InputError),
    ):
        before, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
        with pytest.raises(error):
            explain(model, x, create_graph=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        assert torch.equal(torch.get_rng_state(), state)
    state = torch.get_rng_state()
    before = [b.clone() for b in model.eval().buffers()]
    versions = [b._version for b in model.buffers()]
    explain(model, x, create_graph=True).relevance.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert versions == [b._version for b in model.buffers()]
    assert torch.equal(torch.get_rng_state(), state)


def test_without_it_relevance_has_no_graph() -> None:
    model, x = network().eval(), draw(1, 5, 1, 6, 6)
    found = explain(model, x, layers="*", parameters="*")
    assert found.output is None
    assert not any(r.requires_grad for r in found.tensors())
    assert all(r is None or not r.requires_grad for r in found.parameters.values())
    x.requires_grad_()
    assert not relevance(model(x)[:, 1], x).relevance.requires_grad


def test_frozen_parameters_are_constants() -> None:
    """They are explained as others are, and get no gradient."""
    model, x = network().eval(), draw(1, 5, 1, 6, 6)
    expected = explain(model, x, 1)
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    found = explain(model, x, 1, create_graph=True)
    assert torch.allclose(found.relevance, expected.relevance, 1e-12, 1e-14)
    assert found.ledger.closes
    found.relevance.square().sum().backward()
    frozen = [p.grad is None for p in model.parameters()]
    assert frozen == [True] * 3 + [False, False, True]  # the last bias, on which no multiplier depends
    assert not any(p.requires_grad for p in list(model.parameters())[:3])


def test_inputs_may_be_made_by_a_graph() -> None:
    """Relevance is differentiated on into what made them, a perturbation say."""
    model, x = network().eval(), draw(1, 5, 1, 6, 6)
    shift = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)

    def size(shift: Tensor) -> Tensor:
        return explain(model, x * shift, 1, create_graph=True).relevance.square().sum()

    (g,) = torch.autograd.grad(size(shift), shift)
    step = 1e-7
    with torch.no_grad():
        difference = (size(shift + step) - size(shift - step)) / (2 * step)
    assert abs(float(g) - float(difference)) < 1e-5 * abs(float(g))


def test_graph_may_be_differentiated_again() -> None:
    """A gradient of relevance is a graph too, if that is asked for."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = draw(1, 2, 3).requires_grad_()
    found = explain(model, x, 1, create_graph=True).relevance
    (g,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all()


def test_relevance_under_no_grad() -> None:
    model = nn.Linear(3, 2)
    x = torch.rand(2, 3, requires_grad=True)
    y = model(x)[:, 0]
    with torch.no_grad():
        found = relevance(y, x, create_graph=True).relevance
    assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], model.weight[0].expand(2, 3))


def test_an_explanation_with_a_graph_can_be_shown(tmp_path: Path) -> None:
    model, x = network().eval(), draw(1, 5, 1, 6, 6)
    found = explain(model, x, 1, create_graph=True)
    assert found.finite()
    found.to_dict()
    found.save(tmp_path / "a.html", sample=0)
    assert (tmp_path / "a.html").stat().st_size


def test_nothing_is_left_over() -> None:
    """Graphs go with the explanation, by reference counts alone."""
    model, x = network(), draw(1, 5, 1, 6, 6)

    def count() -> int:
        return sum(type(thing) is Tensor and thing.requires_grad for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        numbers = []
        for _ in range(4):
            explanation = explain(model, x, 1, create_graph=True, allow_training=True)
            (explanation.relevance.square().sum() + explanation.output.sum()).backward()
            del explanation
            numbers.append(count())
    finally:
        gc.enable()
    assert len(set(numbers)) == 1


def test_an_audit_is_asked_for_apart() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(InputError, match="ask twice"):
        explain(model, x, audit=True, create_graph=True)
    x.requires_grad_()
    with pytest.raises(InputError, match="ask twice"):
        relevance(model(x)[:, 0], x, audit=True, create_graph=True)


def test_what_relevance_starts_with_and_passes_through_is_constant() -> None:
    """A gradient by it would be missing, so it is refused."""
    model, x, weight = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), torch.rand(2, 3, requires_grad=True)
    with pytest.raises(InputError, match="are constants"):
        explain(model, x, weight, create_graph=True)
    with pytest.raises(InputError, match="are constants"):
        explain(model, x, 0, condition={"0": weight}, create_graph=True)
    y = model(x.requires_grad_())
    with pytest.raises(InputError, match="are constants"):
        relevance(y, x, initial=y * y, create_graph=True)
    assert relevance(y, x, initial=(y * y).detach(), create_graph=True).relevance.requires_grad


class Scaled(nn.Module):
    """What a frozen block may hold: weights, biases, scales, norms, and a parameter that is seen through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 4)])
        self.scale, self.shift = nn.Parameter(torch.rand(2, 2) + 0.5), nn.Parameter(torch.randn(4))
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[1](self.layers[0](x)) + self.shift
        h = F.gelu(self.layers[2](h) * self.scale.view(4)) @ self.mix
        return torch.addmm(self.shift, h, self.layers[3].weight)


@pytest.mark.parametrize("composite", ["auto", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("parameters", [(), "head.*", "*.bias"])
def test_a_frozen_block_in_a_checkpoint(parameters: Any, composite: str) -> None:
    """The caller's backward runs it again, and gives the gradients that it gives without a checkpoint."""

    class Net(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.block, self.head = nn.Linear(3, 4), Scaled(), nn.Linear(4, 2)
            self.checkpointed = checkpointed
            self.block.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
            return self.head(h.tanh())

    models = [Net(False).double(), Net(True).double()]
    found = []
    for model in models:
        explanation = explain(model, draw(0, 2, 3), 1, create_graph=True, composite=composite, parameters=parameters)
        relevances = [explanation.relevance, *(r for r in explanation.parameters.values() if r is not None)]
        (explanation.output.sum() + sum(r.square().sum() for r in relevances)).backward()
        found.append(explanation)
    same(*found, 1e-12)
    assert [p.grad is None for p in models[1].parameters()] == [not p.requires_grad for p in models[1].parameters()]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        if one.requires_grad:
            close(other.grad, one.grad, 1e-11)
    for parameter in ("*", "block.mix", "block.layers.3.weight"):
        with pytest.raises(InputError, match=r"'block\.\S+' is frozen and used inside a checkpoint"):
            explain(models[1], draw(0, 2, 3), 1, create_graph=True, parameters=parameter)
        explain(models[1], draw(0, 2, 3), 1, parameters=parameter)
        explain(models[0], draw(0, 2, 3), 1, create_graph=True, parameters=parameter)

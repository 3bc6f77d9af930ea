"""Outputs and inputs of modules: views that are changed in place afterwards, modules inside ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from dynlrp import InputError, Part, explain, explain_many
from tests.conftest import close, gradient_x_input, same
from tests.oracle import draw
from tests.peers.models import randomise

X = draw(3, 2, 5, 4)


class Net(nn.Module):
    """A linear layer on a 3-D input returns a view, which the activation behind it changes in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.first, self.relu, self.second = nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 6)
        self.short, self.head = nn.Identity(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.first(x))
        other = self.second(hidden)
        if self.inplace:
            other += hidden
            other.mul_(0.5).relu_()
        else:
            other = ((other + hidden) * 0.5).relu()
        return self.head(self.short(other)).mean(1)


def net(inplace: bool) -> Net:
    return randomise(Net(inplace), 2).double()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", "dynamiclrp"])
def test_views_that_are_changed_in_place(composite: str, frozen: bool) -> None:
    found, expected = (
        explain(net(inplace).requires_grad_(not frozen), X, 1, composite=composite, layers="*")
        for inplace in (True, False)
    )
    same(found, expected, 1e-12)
    assert all(close(found.layers[name], layer, 1e-12) is None for name, layer in expected.layers.items() if name)
    if composite == "attnlrp":  # the net is piecewise linear, so a gradient is the oracle
        model = net(False)
        hidden = model.first(X).detach()

        def rest(hidden: Tensor) -> Tensor:
            hidden = hidden.relu()
            return model.head(((model.second(hidden) + hidden) * 0.5).relu()).mean(1)[:, 1]

        close(found.layers["first"], gradient_x_input(rest, hidden)[0], 1e-12)
        assert float(found.layers["first"].abs().sum()) > 0


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus"])
def test_conditions_on_them(composite: str) -> None:
    conditions: list[Any] = [{"first": [0, 3]}, {"second": 1, "first": [2, 4, 5]}, {"first": Part(2, axis=1)}]
    found, expected = (
        explain_many(net(inplace), X, [1], conditions=conditions, composite=composite, layers=["first", "second"])
        for inplace in (True, False)
    )
    for one, other in zip(found, expected, strict=True):
        same(one, other, 1e-12)
        close(one.layers["second"], other.layers["second"], 1e-12)


def test_an_input_that_its_module_changes_in_place() -> None:
    """The layer that made it has to be asked for too, which gives its output a node of its own."""
    with pytest.raises(InputError, match=r"'relu:input' is a view .* ask for the output of the module that made it"):
        explain(net(True), X, 1, layers="relu:input")
    layers = explain(net(True), X, 1, layers=["first", "relu:input"]).layers
    assert torch.equal(layers["relu:input"], layers["first"])


class FirstThree(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :3]


class Aliased(nn.Module):
    """A module returns a view of what the rest of the model sees."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.part, self.head, self.use = nn.Linear(4, 6), FirstThree(), nn.Linear(3, 2), use

    def forward(self, x: Tensor) -> Tensor:
        whole = self.first(x) * 2
        again = whole.mT
        return self.head(self.use(whole, again, self.part(whole)))


class Gated(nn.Module):
    """``h * sigmoid(h)``, through modules that return what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.gate, self.carrier = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.gate(h).sigmoid() * self.carrier(h))


@pytest.mark.parametrize("layer", ["gate", "carrier", "first", "*"])
def test_a_gate_is_its_own_whatever_is_asked(layer: str) -> None:
    model, x = Gated().double(), X[:, 0]
    plain = explain(model, x, 1)
    close(explain(model, x, 1, layers=layer).relevance, plain.relevance)
    model.carrier.register_full_backward_hook(lambda *_: None)
    close(explain(model, x, 1).relevance, plain.relevance)


ONE_MEMORY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "view written, base read": lambda whole, again, half: half.relu_() + whole[..., 3:] + whole[..., :3],
    "view written, other view read": lambda whole, again, half: half.relu_() + again.mT[..., :3],
    "base written, view read": lambda whole, again, half: whole.relu_()[..., 3:] + half,
    "other view written, view read": lambda whole, again, half: again.mul_(2).mT[..., 3:] + half,
}
FINE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "read before it is written": lambda whole, again, half: whole[..., 3:] * 2 + again.mT[..., :3] * 3 + half.relu_(),
    "written and read by one name": lambda whole, again, half: (whole * 1.5)[..., 3:] + half.relu_() * 2,
}


@pytest.mark.parametrize("name", ONE_MEMORY)
def test_one_memory_under_two_names(name: str) -> None:
    model, x = randomise(Aliased(ONE_MEMORY[name]), 1).double(), X[:, 0]
    assert explain(model, x, 1).ledger.closes
    with pytest.raises(InputError, match="'part' returns a tensor whose memory has another name") as raised:
        explain(model, x, 1, layers="part")
    write = "torch::autograd::CopySlices" if name.startswith("other view") else "ReluBackward0"
    assert f"({write} in the model) and used later under the other (" in str(raised.value)


@pytest.mark.parametrize("name", FINE)
def test_one_memory_that_nobody_mixes_up(name: str) -> None:
    model, x = randomise(Aliased(FINE[name]), 1).double(), X[:, 0]
    found = explain(model, x, 1, layers=["part", "head:input"])
    same(found, explain(model, x, 1), 1e-12)
    assert torch.equal(found.value, model(x)[:, 1])


def wrapped(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> nn.Module:
    outer = nn.Module()
    outer.inner, outer.forward = model, forward  # type: ignore[method-assign]
    return outer


@pytest.mark.parametrize("levels", [1, 2])
def test_layers_inside_vmap(levels: int) -> None:
    """Dimensions that vmap goes over come first, the outermost before the others."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.short, self.head = nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.head(self.short(hidden).relu_() if levels == 1 else self.short(hidden).relu())

    inner = randomise(Inner(), 4).double()
    names = ["inner.first", "inner.short", "inner.head", "inner.first:input"]
    plain = wrapped(inner, lambda x: inner(x).sum(1))
    if levels == 1:
        batched = wrapped(inner, lambda x: vmap(inner, in_dims=1, out_dims=1)(x.transpose(0, 1)).transpose(0, 1).sum(1))
    else:  # positions lie along the last axis of what the inner one sees, and come first in what it returns
        batched = wrapped(inner, lambda x: vmap(vmap(inner, in_dims=1))(x.mT).sum(1))
    for condition in ({}, {"inner.first": [1, 4]}, {"inner.short": Part(0, axis=1), "inner.head": 2}):
        options: dict[str, Any] = {"composite": "attnlrp", "layers": names, "condition": condition}
        found, expected = explain(batched, X, 1, **options), explain(plain, X, 1, **options)
        close(found.relevance, expected.relevance, 1e-12)
        for name in names:
            close(found.layers[name], expected.layers[name], 1e-12)


def test_layers_of_an_ensemble() -> None:
    """The models come first."""
    models = [randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), n).double() for n in range(3)]
    parameters, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    outer = wrapped(models[0], lambda x: torch.zeros(()))

    def forward(x: Tensor) -> Tensor:
        def one(weights: Any, x: Tensor) -> Any:
            return torch.func.functional_call(models[0], weights, (x,))

        return vmap(one, (0, None))(parameters, x).sum(0)

    outer.forward = forward  # type: ignore[method-assign]
    x = X[:, 0]
    found = explain(outer, x, 1, composite="attnlrp", layers="inner.1").layers["inner.1"]
    expected = [explain(model, x, 1, composite="attnlrp", layers="1").layers["1"] for model in models]
    close(found, torch.stack(expected), 1e-12)


@pytest.mark.parametrize("kind", ["grad", "vmap of grad"])
def test_layers_inside_a_derivative_are_refused(kind: str) -> None:
    inner = randomise(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), 4).double()
    derivative = grad(lambda x: inner(x).sum())
    model = wrapped(
        inner, lambda x: (vmap(derivative) if kind != "grad" else derivative)(x).sum(1) + inner(x).sum((1, 2))[:, None]
    )
    with pytest.raises(InputError, match=r"'inner\.0' is a tensor inside a derivative"):
        explain(model, X, 1, layers="inner.0")


def test_a_layer_beside_a_derivative() -> None:
    inner = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), 4).double()
    model = wrapped(inner, lambda x: inner[1](inner[0](x)).mean(1) + jvp(torch.tanh, (x,), (x,))[1].detach().sum())
    layer = explain(model, X, 1, composite="attnlrp", layers="inner.0").layers["inner.0"]
    expected = torch.zeros_like(layer)
    expected[..., 1] = inner(X).detach()[..., 1] / 5
    close(layer, expected, 1e-12)

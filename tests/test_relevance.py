"""Relevance of a graph that already exists, beside ordinary backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import (
    COMPOSITES,
    BrokenPromiseError,
    Composite,
    DynLRPError,
    FreedGraphError,
    InputError,
    NoPathError,
    TargetError,
    explain,
    relevance,
    rules,
)
from dynlrp.rules import Gamma
from tests.conftest import Opaque, bias_free, close, gradient_x_input, same, sample
from tests.peers import models as peers


def fresh(name: str = "vgg") -> tuple[nn.Module, Tensor]:
    model = peers.build(name, peers.NETWORKS)
    return model, peers.inputs(peers.NETWORKS[name][1], 3).requires_grad_()


def seed(output: Tensor, target: int = 2) -> Tensor:
    """Initial relevance: one logit of every sample."""
    return output.detach() * torch.zeros_like(output).index_fill_(1, torch.tensor([target]), 1.0)


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", ["vgg", "conv_bn", "resnet"])
def test_equals_explain(name: str, composite: str) -> None:
    model, x = fresh(name)
    found = relevance(model(x), x, initial=seed(model(x)), composite=composite)
    expected = explain(model, x.detach(), 2, composite=composite)
    close(found.relevance, expected.relevance, 1e-10)
    close(found.value, expected.value)
    assert found.ledger.closes == expected.ledger.closes


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_from_their_embeddings(name: str) -> None:
    model, inputs, _ = sample(name)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    logits = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    score = logits[:, 2] if logits.ndim == 2 else logits[:, -1, 2]
    found = relevance(score, embedded, composite="attnlrp")
    target = 2 if name == "bert" else (-1, 2)
    close(
        found.relevance.sum(-1),
        explain(model, inputs, target, composite="attnlrp").relevance["input_ids"],
        1e-10,
    )
    close(found.value, score.detach())


def test_the_default_is_the_output_itself() -> None:
    model = bias_free(4, 7, 5)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    output = model(x)
    found = relevance(output, x)
    close(found.relevance, gradient_x_input(model, x)[0])
    close(found.value, output.detach().sum(1))


def test_mirrors_wrt() -> None:
    model = bias_free(4, 7, 5)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    hidden = model[1](model[0](x))
    output = model[2](hidden)
    single = relevance(output, x).relevance
    middle = relevance(output, hidden).relevance
    close(single, gradient_x_input(model, x)[0])
    close(middle, gradient_x_input(model[2], hidden)[0])
    for wrt in ([x], (x,)):
        found = relevance(output, wrt).relevance
        assert type(found) is type(wrt)
        close(found[0], single)
    # A tensor upstream of another one, in both orders, and one given twice.
    for wrt, expected in (
        ([x, hidden], [single, middle]),
        ((hidden, x), [middle, single]),
        ([x, x], [single, single]),
        ([output, hidden], [output.detach(), middle]),
    ):
        found = relevance(output, wrt).relevance
        assert type(found) is type(wrt)
        for ours, other in zip(found, expected, strict=True):
            close(ours, other)


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", "epsilon_plus_flat", "dynamiclrp"])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_tensor_downstream_does_not_change_one_upstream(cut: int, composite: str) -> None:
    """Behind a convolution, before its batch norm, and behind a block."""
    model, x = fresh("resnet")
    middle = model[:cut](x)
    output = model[cut:](middle)
    both = relevance(output, [x, middle], initial=seed(output), composite=composite)
    close(both.relevance[0], relevance(output, x, initial=seed(output), composite=composite).relevance)
    assert both.ledger.closes
    alone = relevance(output, middle, initial=seed(output), composite=composite)
    assert alone.ledger.closes
    # A rule that merges a batch norm into the convolution before it, or that is for the first layer, looks upstream.
    if composite != "epsilon_plus_flat" and (cut == 4 or composite == "attnlrp"):
        close(both.relevance[1], alone.relevance)


def test_weights_can_be_asked_for() -> None:
    model = bias_free(4, 7, 5)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weights = [model[0].weight, model[2].weight]
    output = model(x)
    expected = [w.detach() * g for w, g in zip(weights, torch.autograd.grad(output.sum(), weights), strict=True)]
    output = model(x)
    alone = relevance(output, x).relevance
    found = relevance(output, [x, *weights]).relevance
    close(found[0], alone)
    for ours, other in zip(found[1:], expected, strict=True):
        close(ours, other)
    with pytest.raises(InputError, match="alone"):
        relevance(output, weights)


def test_a_tensor_without_part_is_none() -> None:
    x, y = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    found = relevance((x * 2).sum(1), [x, y]).relevance
    close(found[0], 2 * x.detach())
    assert found[1] is None
    with pytest.raises(NoPathError):
        relevance((x * 2).sum(1), y)


@pytest.mark.parametrize(
    ("output", "wrt", "error"),
    [
        (lambda x: x * 2, lambda x: x.detach(), InputError),
        (lambda x: x * 2, lambda x: [], InputError),
        (lambda x: x * 2, lambda x: "x", InputError),
        (lambda x: x.detach() * 2, lambda x: x, NoPathError),
        (lambda x: x.argmax(1), lambda x: x, NoPathError),
        (lambda x: torch.tensor(x.tolist(), requires_grad=True) * 2, lambda x: x, NoPathError),
    ],
)
def test_what_cannot_be_explained(
    output: Callable[[Tensor], Tensor], wrt: Callable[[Tensor], Any], error: type[DynLRPError]
) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(error):
        relevance(output(x), wrt(x))


def test_options_are_checked() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(TargetError):
        relevance(x * 2, x, initial=torch.ones(2, 2))
    with pytest.raises(InputError, match="no_such"):
        relevance(x * 2, x, composite="no_such")
    with pytest.raises(InputError, match="on_unknown"):
        relevance(x * 2, x, on_unknown="ignore")  # type: ignore[arg-type]


# Beside backprop --------------------------------------------------------------------------------------------


def gradients(name: str, explained: bool, composite: str) -> list[Tensor]:
    model, x = fresh(name)
    middle = model[:2](x)
    middle.retain_grad()
    output = model[2:](middle)
    if explained:
        relevance(output, [x, middle], composite=composite)
        relevance(output[:, 1], [x], composite=composite)
    nn.functional.cross_entropy(output, torch.tensor([1, 3])).backward()
    grads = [x.grad, middle.grad, *(p.grad for p in model.parameters())]
    assert all(g is not None for g in grads)
    return grads  # type: ignore[return-value]


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", "epsilon_alpha2_beta1", "dynamiclrp"])
@pytest.mark.parametrize("name", ["vgg", "conv_bn", "resnet"])
def test_a_later_backward_gives_the_same_gradients(name: str, composite: str) -> None:
    for ours, plain in zip(gradients(name, True, composite), gradients(name, False, composite), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "cplrp", "dynamiclrp"])
def test_a_later_backward_of_a_transformer_gives_the_same_gradients(composite: str) -> None:
    model, inputs, _ = sample("gpt2")
    grads = []
    for explained in (True, False):
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        loss = model(inputs_embeds=embedded, labels=inputs["input_ids"]).loss
        if explained:
            found = relevance(loss, embedded, composite=composite, on_unknown="gradient")
            assert found.relevance.shape == embedded.shape
        grads.append(torch.autograd.grad(loss, [embedded, *model.parameters()], allow_unused=True))
    for ours, plain in zip(*grads, strict=True):
        assert (ours is None) == (plain is None)
        assert ours is None or torch.equal(ours, plain)


def test_explaining_leaves_no_gradients_and_may_be_repeated() -> None:
    model, x = fresh("conv_bn")
    output = model(x)
    first, second = (relevance(output, x, composite="auto") for _ in range(2))
    assert torch.equal(first.relevance, second.relevance)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not first.relevance.requires_grad


def test_hooks_of_the_user_are_not_fired() -> None:
    model, x = fresh("vgg")
    fired: list[str] = []
    model[0].register_full_backward_hook(lambda *_: fired.append("module"))
    model[3].register_full_backward_pre_hook(lambda *_: fired.append("module before"))
    x.register_hook(lambda _: fired.append("leaf"))
    model[2].weight.register_hook(lambda _: fired.append("parameter"))
    model[2].weight.register_post_accumulate_grad_hook(lambda _: fired.append("accumulated"))
    middle = model[:7](x)
    middle.register_hook(lambda _: fired.append("tensor"))
    middle.retain_grad()
    output = model[7:](middle)
    output.grad_fn.register_hook(lambda *_: fired.append("node"))
    output.grad_fn.register_prehook(lambda *_: fired.append("node before"))
    found = relevance(output, [x, middle], initial=seed(output), composite="epsilon_plus")
    assert fired == []
    assert middle.grad is None
    plain, other = fresh("vgg")
    close(found.relevance[0], explain(plain, other.detach(), 2, composite="epsilon_plus").relevance)
    output.sum().backward()
    assert sorted(set(fired)) == sorted(
        ["module", "module before", "leaf", "parameter", "accumulated", "tensor", "node", "node before"]
    )


def test_explain_does_not_fire_backward_hooks_either() -> None:
    model, x = fresh("vgg")
    expected = explain(model, x.detach(), 2)
    fired: list[str] = []
    model[0].register_full_backward_hook(lambda *_: fired.append("module"))
    model[2].register_full_backward_pre_hook(lambda *_: fired.append("module before"))
    model[2].weight.register_hook(lambda _: fired.append("parameter"))
    same(explain(model, x.detach(), 2), expected)
    assert fired == []


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", ["vgg", "conv_bn", "resnet"])
def test_a_freed_graph_is_one_clear_error(name: str, composite: str) -> None:
    model, x = fresh(name)
    output = model(x)
    output.sum().backward()
    with pytest.raises(FreedGraphError, match="retain_graph"):
        relevance(output, x, composite=composite)


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "cplrp", "dynamiclrp"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_freed_transformer_is_one_clear_error(name: str, composite: str) -> None:
    model, inputs, _ = sample(name)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    output = model(inputs_embeds=embedded).logits.flatten(1)
    torch.autograd.grad(output.sum(), embedded)
    with pytest.raises(FreedGraphError, match="retain_graph"):
        relevance(output, embedded, composite=composite)


def test_a_kept_graph_can_be_explained_after_backward() -> None:
    model, x = fresh("resnet")
    output = model(x)
    output.sum().backward(retain_graph=True)
    expected = explain(model, x.detach(), 2).relevance
    close(relevance(output, x, initial=seed(output)).relevance, expected)


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon", "auto", "epsilon_plus", "epsilon_gamma_box", "dynamiclrp"])
@pytest.mark.parametrize("name", ["dense", "vgg", "conv1d", "mixed_conv"])
def test_frozen_weights(name: str, composite: str) -> None:
    """Inputs of the linear layers are then not saved; they are promises. Frozen biases cannot be seen here, so
    those that matter must be zero for equal relevance."""
    model, x = fresh(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.zeros_(parameter)
    trainable = relevance(model(x), x, initial=seed(model(x)), composite=composite)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    frozen = relevance(model(x), x, initial=seed(model(x)), composite=composite)
    close(frozen.relevance, trainable.relevance, 1e-10)
    assert frozen.ledger.closes


@pytest.mark.parametrize("name", ["dense", "vgg"])
def test_frozen_biases_do_not_matter_to_multipliers(name: str) -> None:
    model, x = fresh(name)
    expected = explain(model, x.detach(), 2, composite="attnlrp")
    model.requires_grad_(False)
    found = relevance(model(x), x, initial=seed(model(x)), composite="attnlrp")
    close(found.relevance, expected.relevance)
    # What a frozen bias took is booked, or said to be unresolved.
    assert found.ledger.closes or found.ledger.unresolved


def test_a_promise_that_nobody_keeps_is_one_error_before_anything_moves(registry: Any) -> None:
    rules.linear_operation("OpaqueBackward")
    first, second = (peers.randomise(nn.Linear(4, 4, bias=False), n).double() for n in (1, 2))
    model = nn.Sequential(first, second).requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return second(Opaque.apply(first(Opaque.apply(x))))

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    gamma = Composite.of("gamma", {"dense": Gamma(0.25)})
    with pytest.raises(BrokenPromiseError) as raised:
        relevance(run(x), x, composite=gamma)
    text = str(raised.value)
    # The rule, the operand, the reason and the cure.
    for part in ("Gamma on MmBackward0", "operand 0", "OpaqueBackward cannot be recomputed", "require grad", "attnlrp"):
        assert part in text
    # explain() sees the forward pass and keeps the promise.
    frozen = explain(run, x.detach(), 2, composite=gamma)
    model.requires_grad_(True)
    same(frozen, explain(run, x.detach(), 2, composite=gamma))


def test_a_saved_tensor_changed_in_place_is_one_clear_error() -> None:
    model, x = fresh("dense")
    hidden = model[1](model[0](x))
    output = model[2](hidden)
    hidden.detach().mul_(2.0)
    with pytest.raises(DynLRPError, match="in place"):
        relevance(output, x, composite="epsilon_plus")


def test_checkpointed_parts_are_explained() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = fresh("vgg")
    middle = checkpoint(model[:5], x, use_reentrant=False)
    output = model[5:](middle)
    plain = relevance(model(x), x, initial=seed(output), composite="epsilon_plus").relevance
    close(relevance(output, x, initial=seed(output), composite="epsilon_plus").relevance, plain)
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("changed", ["input", "first weight", "last weight", "scale"])
def test_leaves_that_were_changed_since(changed: str, composite: str) -> None:
    """By an optimiser step, say: the values that were explained are gone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(4, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu() * self.scale)

    model = Net().double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    leaves = {"input": x, "first weight": model.first.weight, "last weight": model.last.weight, "scale": model.scale}
    with torch.no_grad():
        leaves[changed].mul_(1.5)  # before: nothing is wrong with that
    y = model(x)[:, 1]
    wrt = [x, model.scale, model.last.weight]
    assert relevance(y, wrt, composite=composite).ledger.closes
    with torch.no_grad():
        leaves[changed].mul_(1.5)
    with pytest.raises(BrokenPromiseError, match="changed in place"):
        relevance(y, wrt, composite=composite)
    with pytest.raises(BrokenPromiseError, match="changed in place"):
        relevance(y, x, composite=composite)

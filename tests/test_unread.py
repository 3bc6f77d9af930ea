"""Saved tensors that no rule reads are let go from the second explanation on; relevance stays the same, bit by bit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dynlrp import Composite, Explanation, FreedGraphError, TargetError, explain, explain_many, unread
from dynlrp.plan import make_plan
from dynlrp.rules import Epsilon, rule
from dynlrp.rules.operation import REGISTRY, Grads, Step
from tests.conftest import SAMPLES, sample


@pytest.fixture(autouse=True)
def _all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "WORTH", 0)


def equal(ours: Explanation, theirs: Explanation) -> None:
    for a, b in zip(ours.everything(), theirs.everything(), strict=True):
        assert torch.equal(a, b)
    assert ours.ledger.accounts == theirs.ledger.accounts
    assert ours.promises == theirs.promises


class Counted(nn.Module):
    """Counts its forward passes, without a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.run(x)

    def passes(self, *given: Any, **options: Any) -> tuple[int, Explanation]:
        """An explanation, and the forward passes that it took."""
        before = self.count
        found = explain(self, *given, **options)
        return self.count - before, found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", ["auto", "attnlrp", "cplrp", "epsilon", "epsilon_plus", "gradient_x_input"])
@pytest.mark.parametrize("name", SAMPLES)
def test_relevance_is_the_same(name: str, composite: str, frozen: bool) -> None:
    model, inputs, target = sample(name)
    model.requires_grad_(not frozen)
    unread._lessons.pop(model, None)
    first = explain(model, inputs, target, composite=composite)
    for _ in range(2):
        equal(explain(model, inputs, target, composite=composite), first)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["resnet", "bert", "gpt2", "llama"])
def test_relevance_in_another_precision_is_the_same(name: str, precision: torch.dtype) -> None:
    model, inputs, target = sample(name)
    half = copy.deepcopy(model).bfloat16()
    given = pytree.tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)
    first = explain(half, given, target, precision=precision)
    equal(explain(half, given, target, precision=precision), first)
    assert not any(lesson.misses for lesson in unread._lessons[half].values())
    assert first.tensors()[0].dtype == precision


@pytest.mark.parametrize("name", ["vgg", "bert", "llama"])
def test_targets_layers_and_conditions_have_lessons_of_their_own(name: str) -> None:
    model, inputs, _ = sample(name)
    layer = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    targets: Any = [(-1, 0), (-1, 3)] if name == "llama" else [0, 2]
    asked: list[dict[str, Any]] = [{}, {"layers": layer}, {"condition": {layer: [0, 1]}}, {"parameters": f"{layer}.*"}]
    first = [explain(model, inputs, targets[0], **options) for options in asked]
    many = explain_many(model, inputs, targets)
    for options, expected in zip(asked, first, strict=True):
        equal(explain(model, inputs, targets[0], **options), expected)
    for ours, theirs in zip(explain_many(model, inputs, targets), many, strict=True):
        equal(ours, theirs)
    # A condition on a module whose output nobody saved has it recorded in a second run: such kinds are not watched.
    taught = [lesson.misses for lesson in unread._lessons[model].values()]
    assert sorted(set(taught)) == ([0, unread.MISSES + 1] if name == "llama" else [0])


class Watched(nn.Module):
    """A linear layer that saves what GELU made, for the gradient of its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.kept: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.first(x))
        memory = StorageWeakRef(x.untyped_storage())
        x = self.second(x)
        self.kept.append(not memory.expired())
        return self.third(x.relu())


def test_what_nobody_reads_is_let_go_while_the_model_runs() -> None:
    model, x = Watched(), torch.randn(2, 4)
    first = explain(model, x, 1)
    equal(explain(model, x, 1), first)
    assert model.kept == [True, False]
    explain(model, torch.randn(7, 4), 1)  # of other sizes too
    assert not model.kept[-1]
    explain(model, x, 1, composite="epsilon_plus")  # which reads it
    explain(model, x, 1, composite="epsilon_plus")
    assert model.kept[-2:] == [True, True]
    for _ in range(2):
        wide = explain(model, x, 1, precision=torch.float64)
    assert model.kept[-2:] == [True, False]
    torch.testing.assert_close(wide.relevance.float(), first.relevance)
    explain(model, x, 1, create_graph=True)
    explain(model, x, 1, audit=True)
    assert all(model.kept[-2:])
    (score,) = model(x.requires_grad_())[:1, 1]
    score.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_small_explanations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "WORTH", 1 << 14)
    model = Watched()
    for _ in range(2):
        explain(model, torch.randn(2, 4), 1)
    assert model.kept == [True, True]
    explain(model, torch.randn(100_000, 4), 1)
    assert not model.kept[-1]


class Switch(Counted):
    """Another graph at will, that reads other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4).double(), False

    def run(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return (x * x.sigmoid()).exp() if self.other else (x.tanh() * x.detach()).relu()


def test_where_another_graph_reads_more_it_is_made_again_with_everything_saved() -> None:
    model, x = Switch(), torch.randn(3, 4, dtype=torch.float64)
    expected = []
    for model.other in (False, True):
        expected.append(explain(model, x, 1, composite="attnlrp"))
        unread._lessons.pop(model)
    taken = []
    for model.other in (False, False, True, False, True):
        passes, found = model.passes(x, 1, composite="attnlrp")
        equal(found, expected[model.other])
        taken.append(passes)
    assert taken == [1, 1, 2, 1, 1]  # and both are known


def test_a_model_that_surprises_too_often_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "MISSES", 0)
    model, x = Switch(), torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        explain(model, x, 1, composite="attnlrp")
    model.other = True
    assert model.passes(x, 1, composite="attnlrp")[0] == 2
    (lesson,) = unread._lessons[model].values()
    assert lesson.misses == 1
    model.other = False
    assert model.passes(x, 1, composite="attnlrp")[0] == 1


def test_a_mask_more_repeats_nothing() -> None:
    """As transformers have it, which pass no mask where there is no padding."""
    model, inputs, target = sample("bert")
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded["attention_mask"][:, -2:] = 0
    expected = explain(model, padded, target)
    unread._lessons.pop(model, None)
    for given in (inputs, inputs, padded, inputs):
        found = explain(model, given, target)
        if given is padded:
            equal(found, expected)
    assert [lesson.misses for lesson in unread._lessons[model].values()] == [0]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def test_a_rule_that_reads_more_after_all_gets_it() -> None:
    reads = False

    @rule("DoubledBackward")
    def doubled(step: Step, grads: Grads) -> list[Tensor | None]:
        g = grads[0]
        assert g is not None
        return [g * 2 + (0 * step.saved(0) if reads else 0)]

    class Custom(Counted):
        def run(self, x: Tensor) -> Tensor:
            return Doubled.apply(x.exp())

    try:
        model, x = Custom(), torch.randn(2, 3, dtype=torch.float64)
        first = explain(model, x, 1)
        equal(explain(model, x, 1), first)
        taken = []
        for more in (False, True, True, False):
            reads = more
            passes, found = model.passes(x, 1)
            equal(found, first)
            taken.append(passes)
        assert taken == [1, 2, 1, 1]
    finally:
        del REGISTRY["DoubledBackward"]


def test_a_model_that_passes_over_what_is_missing_is_run_again() -> None:
    class Tries(Counted):
        slope = False

        def run(self, x: Tensor) -> Tensor:
            y = x.exp() * x.tanh().detach()
            try:
                factor = torch.autograd.grad(y.sum(), x, retain_graph=True)[0].detach() if self.slope else 1.0
            except Exception:
                factor = -1000.0
            return y * factor

    model, x = Tries(), torch.rand(2, 3, dtype=torch.float64) + 1
    for _ in range(2):
        explain(model, x, 1)
    model.slope = True
    assert float(explain(model, x, 1).value[0]) > 0


def test_a_backward_that_passes_over_what_is_missing_is_done_again() -> None:
    reads = False

    class Custom(Doubled):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            try:
                return g * 2 + (0 * ctx.saved_tensors[0] if reads else 0)
            except Exception:
                return g * -1000

    class Model(Counted):
        def run(self, x: Tensor) -> Tensor:
            return Custom.apply(x.exp())

    model, x = Model(), torch.rand(2, 3, dtype=torch.float64)
    first = explain(model, x, 1, on_unknown="gradient")
    explain(model, x, 1, on_unknown="gradient")
    reads = True
    passes, found = model.passes(x, 1, on_unknown="gradient")
    assert passes == 2
    equal(found, first)


def test_of_the_first_graph_nothing_is_left_when_another_is_made() -> None:
    class Tells(Switch):
        kept: Any = ()

        def run(self, x: Tensor) -> Tensor:
            self.alive = sum(not memory.expired() for memory in self.kept)
            y = self.layer(x)
            z = y.sigmoid() if self.other else y.tanh()
            self.kept = [StorageWeakRef(y.untyped_storage()), StorageWeakRef(z.untyped_storage())]
            return (y * z).exp() if self.other else (z * y.detach()).relu()

    model, x = Tells(), torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        explain(model, x, 1, composite="attnlrp")
    model.other = True
    gc.collect()
    gc.disable()
    try:
        assert model.passes(x, 1, composite="attnlrp")[0] == 2
    finally:
        gc.enable()
    assert model.alive == 0


def test_tensors_of_other_kinds() -> None:
    layers = [nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)]
    for layer in layers[::2]:
        weight = layer.weight.detach()
        layer.weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    model, x = nn.Sequential(*layers), torch.randn(3, 4)
    first = explain(model, x, 1).relevance
    for _ in range(2):
        assert torch.equal(_plain(explain(model, x, 1).relevance), _plain(first))


def _plain(x: Any) -> Tensor:
    return x.a if isinstance(x, TwoTensor) else x


def test_what_was_too_little_is_measured_again_where_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "WORTH", 1 << 14)

    class Square(nn.Module):
        kept = True

        def forward(self, x: Tensor) -> Tensor:
            p = x.unsqueeze(1) * x.unsqueeze(2)
            for _ in range(3):
                p = p * p.sigmoid()
            memory = StorageWeakRef(p.untyped_storage())
            p = p * p.detach().sigmoid()
            self.kept = not memory.expired()
            return p.sum(2)

    model = Square()
    explain(model, torch.rand(1, 2), 1)
    for _ in range(2):
        explain(model, torch.rand(1, 600), 1)
    (lesson,) = unread._lessons[model].values()
    assert lesson.size == 4 * 600
    assert lesson.watches(4 * 600) == "go"


def test_who_still_uses_the_graph_is_told() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.second(self.first(x).tanh())
            return self.hidden.relu()

    model, x = Remembers(), torch.randn(2, 3)
    for _ in range(2):
        explain(model, x, 1)
    with pytest.raises(FreedGraphError, match="let go of what its rules do not read"):
        model.hidden.sum().backward()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        explain(model, x, 1)
    model.hidden.sum().backward()
    explain(model, x, 1)
    model.hidden.sum().backward()  # once told, it is left alone


def test_hooks_of_the_model_may_keep_the_graph() -> None:
    model, x, outputs = Watched(), torch.randn(2, 4), []
    model.second.register_forward_hook(lambda module, args, output: outputs.append(output))
    for _ in range(3):
        explain(model, x, 1)
        outputs[-1].sum().backward()
    assert all(model.kept)


def test_what_is_made_of_weights_and_cached_stays_whole() -> None:
    class Shape(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.exp() * w.tanh()

    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(2, 3)
    parametrize.register_parametrization(model[0], "weight", Shape())
    for _ in range(2):
        explain(model, x, 1)
    with parametrize.cached():
        explain(model, x, 1)
        model(x).sum().backward()


def test_hooks_of_the_caller_keep_their_part() -> None:
    model, x, packed = Watched(), torch.randn(2, 4), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        packed += 1
        return tensor

    expected = explain(model, x, 1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        equal(explain(model, x, 1), expected)
    assert packed


def _wrapped(x: Tensor) -> Tensor:
    try:
        return torch.func.grad(lambda y: y.square().sum())(x.detach())
    except RuntimeError as error:
        raise ValueError("no derivative") from error


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: x * torch.func.grad(lambda y: y.square().sum())(x.detach()),
        lambda layer, x: x * _wrapped(x),
        lambda layer, x: checkpoint(lambda y: layer(y).tanh(), x, use_reentrant=False),
        lambda layer, x: torch.vmap(layer)(x).tanh(),
        lambda layer, x: x * torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)[0].detach(),
    ],
    ids=["torch.func", "errors in other words", "checkpoint", "vmap", "gradient inside"],
)
def test_models_that_use_autograd_themselves(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return function(self.layer, x)

    model, x = Model(), torch.randn(3, 4, dtype=torch.float64)
    first = explain(model, x, 1)
    for _ in range(2):
        equal(explain(model, x, 1), first)
    assert first.ledger.closes


def test_errors_of_the_model_are_its_own() -> None:
    model, x = Switch(), torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        explain(model, x, 1)
    before = model.count
    with pytest.raises(TargetError):
        explain(model, x, 1, output="logits")
    assert model.count == before + 1
    with pytest.raises(TargetError):
        explain(model, x, 1, output=["a"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Knows(Epsilon):
    """A rule that holds a model."""

    model: Any = None


def test_nothing_keeps_a_model_alive() -> None:
    model, x = Watched(), torch.randn(2, 4)
    composite = Composite.of("mine", {"dense": Knows(model=model)})
    for _ in range(2):
        explain(model, x, 1)
        explain(model, x, 1, composite=composite)
    gone = weakref.ref(model)
    del model, composite
    make_plan.cache_clear()
    gc.collect()
    assert gone() is None

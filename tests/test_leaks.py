"""A thousand explanations in a row: nothing stays, and nothing waits for the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from dynlrp import DynLRPError, bilrp, coverage, explain, explain_many, relevance
from dynlrp.plan import make_plan
from dynlrp.rules import linear_operation
from tests.conftest import Apply, Opaque, sample
from tests.peers import models as peers

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(*middle: nn.Module) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *middle, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    return peers.randomise(model, 1).double()


class Failure(Exception):
    """Raised by a model half-way."""


def fail(x: Tensor) -> Tensor:
    raise Failure


def nan(x: Tensor) -> Tensor:
    return x / (x - x)


@pytest.fixture(autouse=True)
def _doubling(registry: Any) -> None:
    linear_operation("OpaqueBackward")  # which no promise passes


def in_place(x: Tensor) -> Tensor:
    """What a kernel saved is changed."""
    y = x.exp()
    y.detach().mul_(2.0)
    return y


def unrecorded(x: Tensor) -> Tensor:
    """Its bias is a constant that no graph knows."""
    return torch.nn.functional.linear(x.flatten(1), torch.ones(2, 192).double(), torch.ones(2).double())


Job = tuple[Callable[[], nn.Module], dict[str, Any]]
JOBS: dict[str, Job] = {
    "plain": (net, {"composite": "attnlrp"}),
    "everything": (net, {"composite": "epsilon_plus", "layers": "*", "parameters": "*"}),
    "shares": (net, {"composite": "dynamiclrp"}),
    "frozen": (lambda: net().requires_grad_(False), {"composite": "epsilon_plus", "parameters": "*"}),
    "second run": (lambda: net(Apply(Opaque.apply)).requires_grad_(False), {"composite": "epsilon_plus"}),
    "wide": (lambda: net().float(), {"precision": torch.float64}),
    "function": (lambda: net().forward, {"composite": "epsilon_plus"}),  # type: ignore[dict-item, return-value]
}
FAILURES: dict[str, Job] = {
    "forward": (lambda: net(Apply(fail)), {}),
    "NaN": (lambda: net(Apply(nan)), {}),
    "target": (net, {"target": 9}),
    "unknown operation": (lambda: net(Apply(lambda x: x * torch.linalg.svdvals(x).sum())), {}),
    "random": (lambda: net(Apply(lambda x: x + torch.rand(1))), {}),
    "no path": (lambda: net(Apply(Tensor.detach)), {}),
    "in place": (lambda: net(Apply(in_place)), {"composite": "epsilon_plus"}),
    "broken promise": (lambda: unrecorded, {"composite": "epsilon_plus"}),  # type: ignore[dict-item, return-value]
}  # fmt: skip


def run(model: Any, options: dict[str, Any]) -> None:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    x = X.to(parameters[0].dtype) if parameters else X
    with contextlib.suppress(DynLRPError, Failure):
        explain(model, x, **{"target": 1, **options})


@contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors() -> int:
    """Tensors that are alive, in Python."""
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


def hooks(model: Any) -> list[int]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tables = [t for m in modules for n, t in vars(m).items() if "hook" in n and isinstance(t, dict)]
    tables += [t for n, t in vars(global_hooks).items() if "hooks" in n and isinstance(t, dict)]
    modes = torch.overrides._get_current_function_mode_stack()
    dispatch = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    saving = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return [*map(len, tables), len(modes), len(dispatch), int(saving is not None)]


def nothing_stays(job: Callable[[], object]) -> None:
    """Reference counting alone frees everything: the garbage collector finds nothing of ours."""
    for _ in range(2):
        job()  # whatever is made once
    with collector_off():
        alive = tensors()
        for _ in range(3):
            job()
        assert tensors() == alive
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            ours = [o for o in gc.garbage if isinstance(o, Tensor) or type(o).__module__.startswith("dynlrp")]
            assert ours == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()


@pytest.mark.parametrize("name", [*JOBS, *FAILURES])
def test_nothing_stays(name: str) -> None:
    """After errors neither."""
    build, options = {**JOBS, **FAILURES}[name]
    model = build()
    before = hooks(model)
    nothing_stays(lambda: run(model, options))
    assert hooks(model) == before


def train(model: nn.Module) -> None:
    """A step with relevance in its loss."""
    explanation = explain(model, X, 1, create_graph=True)
    (explanation.relevance.square().sum() + explanation.output.sum()).backward()
    leaf = X.clone().requires_grad_()
    relevance(model(leaf)[:, 1], leaf, create_graph=True).relevance.square().sum().backward()
    model.zero_grad()


class Short(nn.Module):
    """Returns what it was given, beside what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + x.relu()


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "audit": lambda m: str(explain(m, X, 1, audit=True).audit),
    "audit of a re-run": lambda m: explain(lambda x: m(nn.functional.gelu(x).softmax(1)), X, 1, audit=True),
    "condition": lambda m: explain(m, X, 1, condition={"1": [0], "3.short": [1]}),
    "many": lambda m: explain_many(m, X, "all", chunk=2),
    "conditions": lambda m: explain_many(m, X, [1], conditions=[{"1": [0]}, {"3": [1, 2]}], audit=True),
    "functions": lambda m: explain_many(m, X, [lambda y: y[:, 0], lambda y: y.sum(1)]),
    "pairs": lambda m: bilrp(m, X, X.flip(0), similarity="cosine"),
    "training": train,
    "coverage": lambda m: coverage(m, X, verify=True),
    "coverage of promises": lambda m: coverage(m.requires_grad_(False), X, composite="epsilon_plus"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_stays_of(name: str) -> None:
    model = net(Short())
    before = hooks(model)
    nothing_stays(lambda: OTHERS[name](model))
    assert hooks(model) == before


@pytest.mark.parametrize("name", ["plain", "everything", "frozen", "second run", "wide"])
def test_the_graph_goes_with_the_explanation(name: str) -> None:
    """Nodes are freed while relevance passes them, and the model's activations with them; the answer holds no graph."""
    build, options = JOBS[name]
    model = build()
    made: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: made.append(weakref.ref(output)))
    with collector_off():
        x = X.to(next(model.parameters()).dtype)
        explanation = explain(model, x, 1, **options)
        assert made
        assert [ref for ref in made if ref() is not None] == []
    assert explanation.relevance.grad_fn is None


def test_a_thousand_explanations() -> None:
    """Memory is flat."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    frozen = peers.randomise(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), 1).double()
    frozen.requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64)

    def some(number: int) -> None:
        for _ in range(number // 4):
            explain(model, x, 1, composite="attnlrp")
            explain(frozen, x, 1, composite="epsilon_plus", layers="1")
            explain(model, x, 1, composite="dynamiclrp", parameters="*")
            leaf = x.clone().requires_grad_()
            relevance(model(leaf)[:, 1], leaf)

    with collector_off():
        tracemalloc.start()
        try:
            some(300)  # memory that Python keeps for objects of one kind
            gc.collect()
            alive, before = tensors(), tracemalloc.get_traced_memory()[0]
            some(1000)
            assert tensors() == alive
            gc.collect()  # functions of PyTorch's that know themselves
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 20_000  # bytes: 20 for each explanation would be a leak already


def test_the_cache_of_plans_is_bounded_and_holds_no_tensors() -> None:
    """A thousand graphs of different shapes: the oldest plans go."""
    with collector_off():
        make_plan.cache_clear()
        x = torch.randn(1, 2, dtype=torch.float64)
        alive = tensors()
        for depth in range(1, 201):

            def model(x: Tensor, depth: int = depth) -> Tensor:
                for _ in range(depth):
                    x = x * 1.5
                return x

            explain(model, x, 1)
        info = make_plan.cache_info()
        assert info.currsize == info.maxsize
        assert tensors() == alive
    make_plan.cache_clear()


class Watched(torch.autograd.Function):
    """Keeps a tensor of its own, and tells how many of them are there still when relevance passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: Watch) -> Tensor:
        own = torch.ones_like(x)
        ctx.save_for_backward(own)
        watch.kept.append(weakref.ref(own.untyped_storage()))
        ctx.watch = watch
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.watch.found.append(sum(own() is not None for own in ctx.watch.kept))
        return g, None


class Watch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[weakref.ref[torch.UntypedStorage]] = []
        self.found: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return Watched.apply(x, self)


def test_the_graph_goes_while_relevance_passes() -> None:
    """Behind a view too, which is called as it is."""
    linear_operation("WatchedBackward")
    watch = Watch()
    explain(nn.Sequential(watch, watch, watch, nn.Flatten(), nn.Linear(192, 2).double()), X, 1)
    assert watch.found == [3, 2, 1]


def test_a_graph_that_exists_is_left_alone() -> None:
    """Explaining it many times keeps nothing of it alive, and frees nothing of it."""
    model, inputs, _ = sample("resnet")
    with collector_off():
        x = inputs.clone().requires_grad_()
        output = model(x)[:, 1]
        for _ in range(5):
            relevance(output, x, composite="epsilon_plus")
        alive = tensors()
        for _ in range(5):
            relevance(output, x, composite="epsilon_plus")
        assert tensors() == alive
        node = weakref.ref(output)
        output.sum().backward()  # the graph is still whole
        del output
        assert node() is None
    model.zero_grad()

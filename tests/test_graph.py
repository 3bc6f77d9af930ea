"""Graphs: depth, diamonds, plans that are kept and never mistaken, threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dynlrp import COMPOSITES, Composite, NonFiniteError, When, explain, relevance
from dynlrp.graph import KEEPS_NODE, Edge, Graph, sum_to
from dynlrp.plan import Kind, make_plan
from dynlrp.roles import roles
from dynlrp.rules import Pass
from tests.conftest import Opaque, bias_free, calls, close, gradient_x_input, same, sample
from tests.oracle import draw

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DEPTH = 20_000


def chain(step: Callable[[Tensor], Tensor], depth: int = DEPTH) -> Callable[[Tensor], Tensor]:
    def model(x: Tensor) -> Tensor:
        for _ in range(depth):
            x = step(x)
        return x

    return model


WEIGHT = (torch.eye(4, dtype=torch.float64) * 1.00001).requires_grad_()
BIAS = torch.full((4,), 1e-5, dtype=torch.float64, requires_grad=True)
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu and scale": lambda x: x.relu() * 1.00001,
    "plus one": lambda x: x + 1.0,
    "residual": lambda x: x + x * 1e-5,
    "linear": lambda x: torch.addmm(BIAS, x, WEIGHT),
    "tanh": lambda x: x.tanh(),
}


@pytest.mark.parametrize(
    ("name", "composite"),
    [*((name, "attnlrp") for name in STEPS), ("linear", "epsilon_plus"), ("residual", "dynamiclrp")],
)
def test_a_chain_of_thousands_of_operations(name: str, composite: str) -> None:
    limit = sys.getrecursionlimit()
    model = chain(STEPS[name], DEPTH if name == "relu and scale" else DEPTH // 5)
    explanation = explain(model, X.abs() + 0.1, 1, composite=composite)
    assert sys.getrecursionlimit() == limit
    if composite == "attnlrp" and name not in ("tanh", "plus one"):
        close(explanation.relevance, gradient_x_input(lambda x: model(x)[:, 1], X.abs() + 0.1)[0], 1e-8)
    if name != "plus one":
        assert explanation.ledger.error < 1e-8
    repr(explanation)


def on_a_small_stack(function: Callable[[], None]) -> None:
    """PyTorch frees what Python has seen of a graph by recursion, which overruns a stack of 8 MiB after some 50,000
    operations, and this one after a few thousand."""
    before = threading.stack_size(2**20)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(function).result()
    finally:
        threading.stack_size(before)


def test_a_deep_graph_in_other_hands_can_be_let_go() -> None:
    def let_go() -> None:
        x = X.clone().requires_grad_()
        output = chain(torch.neg)(x)
        close(relevance(output, x).relevance, output.detach())
        output.sum().backward()
        close(x.grad, torch.ones_like(x))
        del output

    on_a_small_stack(let_go)


def test_a_deep_graph_with_numbers_that_are_not_finite_can_be_let_go() -> None:
    """The operation at fault is not the last, but most of the others lie behind it."""

    def let_go() -> None:
        with pytest.raises(NonFiniteError, match="behind MulBackward0"):
            explain(lambda x: (chain(torch.neg)(x) * torch.inf).relu(), X, 1)

    on_a_small_stack(let_go)


def test_deep_relevance_in_a_graph_can_be_let_go() -> None:
    def let_go() -> None:
        x = X.clone().requires_grad_()
        found = explain(lambda x: chain(lambda x: x * 1.0)(x) @ WEIGHT, x, 1, create_graph=True).relevance
        close(found.detach()[:, 1], X[:, 1] * 1.00001)
        del found

    on_a_small_stack(let_go)


def test_a_stack_of_twenty_thousand_modules() -> None:
    model = nn.Sequential(*[nn.ReLU() for _ in range(DEPTH)])
    explanation = explain(model, X, 1, composite=Composite.of("paths", {When(path="7"): Pass()}), layers=["5", "19999"])
    ledger = explanation.ledger
    assert {k: v for k, v in ledger.by_module().items() if v} == {("inputs", ""): pytest.approx(ledger.output)}
    close(explanation.relevance, explanation.layers["5"])


def modules(depth: int) -> nn.Module:
    return nn.Sequential(*[nn.ReLU() for _ in range(depth)])


@pytest.mark.parametrize("build", [lambda depth: chain(STEPS["linear"], depth), modules], ids=["operations", "modules"])
def test_the_work_per_operation_does_not_grow(build: Callable[[int], Callable[..., Tensor]]) -> None:
    """Eight times as many operations take no more than eight times the calls."""
    short, long = (calls(lambda depth=depth: explain(build(depth), X, 1)) for depth in (250, 2000))
    assert long <= 8 * short


def test_diamonds() -> None:
    """Two to the power of 60 paths, in 60 steps."""

    def model(x: Tensor) -> Tensor:
        for _ in range(60):
            x = x.relu() * 0.5 + x * 0.5
        return x

    explanation = explain(model, X.abs(), 1)
    expected = torch.zeros_like(X)
    expected[:, 1] = X[:, 1].abs()
    close(explanation.relevance, expected)
    # Every node is visited once.
    assert explanation.ledger.closes
    assert explanation.promises.visited < 60 * 5


def test_a_graph_lists_operands_before_consumers() -> None:
    x = X.clone().requires_grad_()
    a = x * 2
    b = (a.relu() + a).sum(1)
    graph = Graph(b.grad_fn)
    for index, operands in enumerate(graph.operands):
        for edge in operands:
            assert edge is None or edge.node < index
    assert graph.names[-1] == "SumBackward1"
    assert len(graph.nodes) == len(set(graph.nodes)) == 5
    assert graph.edge(a.grad_fn, 0) == Edge(graph.names.index("MulBackward0"), 0)
    assert graph.edge((x * 3).grad_fn, 0) is None
    structure = graph.structure(Edge(4, 0), [Edge(0, 0)])
    plan = make_plan(structure, COMPOSITES["attnlrp"])
    assert [step.name for step in plan.steps] == [
        "SumBackward1",
        "AddBackward0",
        "ReluBackward0",
        "MulBackward0",
    ]
    assert plan.steps[-1].kinds == (Kind.SIGNAL, Kind.CONSTANT)
    assert plan.ends == {Edge(0, 0)}


def test_only_paths_to_a_source_are_walked() -> None:
    unused = nn.Linear(4, 4).double()
    x = X.clone().requires_grad_()
    aside = unused(torch.ones(2, 4, dtype=torch.float64))
    for _ in range(50):
        aside = Opaque.apply(aside)  # no rule, and none is needed
    output = (x * 2 + aside).relu()
    explanation = relevance(output, x)
    assert explanation.promises.visited <= 3
    close(explanation.relevance, gradient_x_input(lambda x: (x * 2 + aside.detach()).relu(), X)[0])


# Plans ------------------------------------------------------------------------------------------------------


def test_a_plan_is_kept_and_serves_other_inputs() -> None:
    model = bias_free(4, 7, 5)
    explain(model, X, 1)
    before = make_plan.cache_info()
    first = explain(model, X, 1)
    second = explain(model, X * 2, 3)
    after = make_plan.cache_info()
    assert after.hits == before.hits + 2
    assert after.misses == before.misses
    assert not torch.equal(first.relevance, second.relevance)
    same(explain(model, X, 1), first)
    make_plan.cache_clear()
    same(explain(model, X, 1), first)


ALIKE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "order of operands": (lambda a, b: a - b, lambda a, b: b - a),
    "who is multiplied": (lambda a, b: a.relu() * 2 + b, lambda a, b: a + b.relu() * 2),
    "which output": (
        lambda a, b: (a * 3).split(2, 1)[0] + b[:, :2],
        lambda a, b: (a * 3).split(2, 1)[1] + b[:, :2],
    ),
    "skip or not": (lambda a, b: (a.relu() + b).relu() + b, lambda a, b: (a.relu() + b).relu() + a),
    "bounds of a clamp": (
        lambda a, b: torch.clamp(a, 0.0, 9.0) + b * 1,
        lambda a, b: torch.clamp(a, -9.0, 9.0) + b * 1,
    ),
    "exponents": (lambda a, b: (a.abs() + 1) ** 2 + b, lambda a, b: (a.abs() + 1) ** 3 + b),
    "constant or signal": (lambda a, b: a * b.detach() + b, lambda a, b: a.detach() * b + b),
    "one or two signals": (lambda a, b: a * b + b, lambda a, b: a * b.detach() + b),
}


@pytest.mark.parametrize("composite", ["attnlrp", "dynamiclrp"])
@pytest.mark.parametrize("name", ALIKE)
def test_a_plan_is_never_used_for_another_graph(name: str, composite: str) -> None:
    alone = []
    for model in ALIKE[name]:
        make_plan.cache_clear()
        alone.append(explain(model, (X, X.flip(0) * 0.7), 1, composite=composite))
    for _ in range(2):  # now with both plans in the cache
        for model, expected in zip(ALIKE[name], alone, strict=True):
            found = explain(model, (X, X.flip(0) * 0.7), 1, composite=composite)
            same(found, expected)


def test_a_plan_knows_what_is_asked() -> None:
    model = bias_free(4, 7, 5)
    make_plan.cache_clear()
    plain = explain(model, X, 1)
    asked = explain(model, X, 1, parameters="*")
    frozen = explain(model.requires_grad_(False), X, 1, parameters="0.weight")
    seeded = explain(model, X, model(X) * 0 + 1.0)
    same(asked, plain)
    same(frozen, plain)
    assert seeded.ledger.output == pytest.approx(10.0)
    same(explain(model, X, 1), plain)


# Roles ------------------------------------------------------------------------------------------------------


def roles_of(model: Callable[[Tensor], Tensor]) -> dict[str, set[str]]:
    x = X.clone().requires_grad_()
    graph = Graph(model(x).grad_fn)
    source = graph.edge(*get_gradient_edge(x)[:2])
    assert source is not None
    found: dict[str, set[str]] = {}
    for index, role in roles(graph, [source]).items():
        found.setdefault(graph.names[index], set()).update(role.names)
    return found


ROLES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, set[str]]]] = {
    "attention": (
        lambda x: (x @ x.t()).softmax(-1) @ (x * 2),
        {"SoftmaxBackward0": {"attention"}, "MmBackward0": {"attention"}},
    ),
    "attention with dropout and views": (
        lambda x: (x @ x.t()).softmax(-1).unsqueeze(0).expand(3, 2, 2) @ (x * 2).unsqueeze(0).expand(3, 2, 4),
        {"SoftmaxBackward0": {"attention"}, "BmmBackward0": {"attention"}},
    ),
    "softmax at the end": (lambda x: x.softmax(-1), {}),
    "gate": (lambda x: (x * 2).sigmoid() * x.exp(), {"MulBackward0": {"gate"}}),
    "gate on the right": (lambda x: x.exp() * (x * 2).tanh().view(2, 4), {"MulBackward0": {"gate"}}),
    "self gate": (lambda x: (y := x.exp()) * torch.sigmoid(y * 1.7), {"MulBackward0": {"self gate"}}),
    "no gate": (lambda x: x.sin() * x.cos(), {}),
    "squared": (lambda x: x * x, {}),
    "constant": (lambda x: x.sigmoid() * torch.ones(4, dtype=x.dtype), {}),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_come_from_structure(name: str) -> None:
    model, expected = ROLES[name]
    assert roles_of(model) == expected


def test_roles_of_real_models() -> None:
    for name, wanted in (("llama", {"gate"}), ("gpt2", {"self gate"})):
        model, inputs, _ = sample(name)
        graph = Graph(model(**inputs).logits.grad_fn)
        found = roles(graph, [Edge(index, 0) for index in graph.skeleton.lookups])
        assert set().union(*(role.names for role in found.values())) == wanted
        assert len([role for role in found.values() if wanted <= role.names]) == 2  # one for every layer


# Threads ----------------------------------------------------------------------------------------------------


def test_threads_that_explain_at_once_get_their_own_answers() -> None:
    jobs = []
    for name in ("vgg", "bert", "llama", "resnet", "bert"):
        model, inputs, target = sample(name)
        for composite in ("auto", "epsilon_plus"):
            jobs.append((model, inputs, target, composite, explain(model, inputs, target, composite=composite)))
    sample("bert").model.requires_grad_(False)
    make_plan.cache_clear()
    barrier = threading.Barrier(len(jobs))
    failures: list[BaseException] = []

    def work(job: tuple) -> None:
        model, inputs, target, composite, expected = job
        try:
            barrier.wait(30)
            for _ in range(3):
                found = explain(model, inputs, target, composite=composite, layers="*")
                same(found, expected)
                assert found.ledger.by_module().keys() == expected.ledger.by_module().keys()
                assert not any(isinstance(r, list) for n, r in found.layers.items() if "act" not in n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    kept=st.integers(0, 4),
    transposed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_sums_to_a_shape(dtype: torch.dtype, shape: list[int], kept: int, transposed: bool, seed: int) -> None:
    value = draw(seed, *shape).to(dtype)
    value = value.mT.contiguous().mT if transposed and value.ndim > 1 else value
    wanted = shape[len(shape) - min(kept, len(shape)) :]
    exact = value.double().sum_to_size(wanted)
    # Rounded once to the dtype, and added up in float32 at least: with pairs, some roundings of the whole at the most.
    within = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(dtype).eps * exact.abs() + 4 * within * value.double().abs().sum_to_size(wanted)
    found = sum_to(value, wanted)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= bound).all())


def test_sums_of_many_rows_keep_their_digits() -> None:
    value = draw(1, 100_000, 3).float() + 3
    exact = value.double().sum(0)
    assert float(((sum_to(value, [3]).double() - exact) / exact).abs().max()) < 1e-6
    found = sum_to(value.bfloat16(), [3]).double()
    rounded = value.bfloat16().double().sum(0)
    assert float(((found - rounded) / exact).abs().max()) < 0.005  # half a unit in the last place


@pytest.mark.parametrize("keeps", [False, True])
def test_custom_functions_last_as_long_as_they_are_used(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may have of them what does not keep them: they are the output and in the middle."""
    monkeypatch.setattr("dynlrp.run.KEEPS_NODE", KEEPS_NODE and keeps)
    layers = [nn.Linear(4, 4).double() for _ in range(3)]

    def score(x: Tensor) -> Tensor:
        for layer in layers:
            x = Opaque.apply(layer(x).relu())
        return x

    found = explain(score, X, 1, on_unknown="gradient", composite="epsilon")
    close(found.relevance, explain(lambda x: _plain(layers, x), X, 1, composite="epsilon").relevance)


def _plain(layers: list[nn.Linear], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x).relu() * 2
    return x

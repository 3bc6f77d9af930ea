"""Capture: which module an operation ran in, and stand-ins for frozen parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from dynlrp import COMPOSITES, Composite, When, explain
from dynlrp.capture import Recording
from dynlrp.recorder import Recorder
from dynlrp.rules import Flat
from tests.conftest import close, same
from tests.peers import models as peers

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Nested(nn.Module):
    """Operations before, between and after its children."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.exp()).cos().neg()).sigmoid()


def test_operations_know_their_module() -> None:
    ledger = explain(Nested().double(), X, 1).ledger
    modules = {path for _, path in ledger.by_module()}
    assert modules == {"", "inner.0", "inner.1.1", "last"}
    operations = ledger.by_operation()
    for account, name in (
        ("offsets", "ExpBackward0"),
        ("offsets", "CosBackward0"),
        ("offsets", "SigmoidBackward0"),
    ):
        assert (account, name) in operations
    assert ("parameters", "AddmmBackward0") in operations
    total = sum(operations["offsets", n] for n in ("ExpBackward0", "CosBackward0", "SigmoidBackward0"))
    assert ledger.by_module()["offsets", ""] == pytest.approx(total)


def test_paths_of_a_recording() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh())).double()
    recording = Recording(model, (), COMPOSITES["auto"])
    before = torch._C._autograd._get_sequence_nr()
    x = X.clone().requires_grad_()
    with recording.watching():
        y = model(x)
    after = y.exp()
    assert recording.path(y.grad_fn._sequence_nr()) == "1.0"
    assert recording.path(y.grad_fn.next_functions[0][0]._sequence_nr()) == "0"
    assert recording.path(after.grad_fn._sequence_nr()) == ""
    assert recording.path(before - 1) == ""


def test_a_recorder_knows_which_nodes_it_did_not_see_made() -> None:
    """A constant that is made the same way, right after such a node, is not its value."""
    nothing, x = torch.zeros_like(X), X.clone().requires_grad_().clone()
    with Recorder() as recorder:
        y = nothing.clone() + x
    found = {(node.name(), number): value for node, number, value in recorder.values([x.grad_fn, y.grad_fn])}
    assert torch.equal(found["CloneBackward0", 0], X)
    assert torch.equal(found["AddBackward0", 0], X)
    assert torch.equal(found["AddBackward0", ~0], nothing)  # the constant operand


def test_hooks_live_as_long_as_the_forward_pass() -> None:
    tables = (global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks)
    sizes = [len(table) for table in tables]
    seen: list[list[int]] = []
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.ReLU())
    model[1].register_forward_hook(lambda *_: seen.append([len(table) for table in tables]))
    explain(model, X, 1)
    assert [len(table) for table in tables] == sizes
    assert seen != [sizes]


def test_modules_run_by_other_threads_do_not_count() -> None:
    """Another thread runs the same module meanwhile, back and forth."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        go.wait(10)
        for _ in range(20):
            model(X)
        done.set()

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            go.set()
            assert done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    handle = model[1].register_forward_hook(meanwhile)
    try:
        explanation = explain(model, X, 1, layers="*", composite=Composite.of("p", {When(path="2"): Flat()}))
    finally:
        handle.remove()
        thread.join()
    assert not isinstance(explanation.layers["2"], list)
    same(explanation, explain(model, X, 1, composite=Composite.of("p", {When("dense", last=True): Flat()})))


class Exotic(nn.Module):
    """Parameters used in every way there is."""

    def __init__(self, use: Callable[[Exotic, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))

        self.weight, self.bias, self.scale, self.token = draw(4, 4), draw(4), draw(4), draw(1, 4)
        self.parts = nn.ParameterList([draw(4), draw(4)])
        self.embedding = nn.Embedding(3, 4, dtype=torch.float64)
        self.norm = peers.randomise(nn.LayerNorm(4), 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


USES: dict[str, Callable[[Exotic, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.weight, m.bias),
    "linear by keyword": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias),
    "matmul": lambda m, x: x @ m.weight + m.bias,
    "matmul from the left": lambda m, x: (m.weight @ x.t() + m.bias[:, None]).t(),
    "transposed": lambda m, x: torch.addmm(m.bias, x, m.weight.t()),
    "transposed by attribute": lambda m, x: F.linear(x, m.weight.T, m.bias) + x @ m.weight.mT,
    "baddbmm": lambda m, x: torch.baddbmm(m.bias, x[None], m.weight[None])[0],
    "in place": lambda m, x: (x * 1.0).add_(m.bias).mul_(m.scale),
    "from the left": lambda m, x: m.bias + m.scale * x,
    "minus": lambda m, x: m.bias - x,
    "cat": lambda m, x: torch.cat([m.token.expand(2, -1), x, m.token + x], 1),
    "stack": lambda m, x: torch.stack([m.token.expand(2, -1), x]).sum(0),
    "list": lambda m, x: x * m.parts[0] + m.parts[1],
    "list in cat": lambda m, x: torch.cat([x, *[p.expand(2, -1) for p in m.parts]], 1) * 2,
    "einsum": lambda m, x: torch.einsum("bi,ij->bj", x, m.weight) + m.bias,
    "product of parameters": lambda m, x: F.linear(x, m.weight * m.scale[:, None], m.bias * m.scale),
    "embedding": lambda m, x: x + m.embedding(torch.tensor([0, 2])),
    "layer norm": lambda m, x: m.norm(x),
    "functional norm": lambda m, x: F.layer_norm(x, (4,), m.scale, m.bias),
    "broadcast": lambda m, x: torch.where(x > 0, x, m.bias) + m.token,
    "multihead": lambda m, x: F.scaled_dot_product_attention(
        (x @ m.weight)[:, None, None], (x * m.scale)[:, None, None], (x + m.bias)[:, None, None]
    ).flatten(1),
}


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", "dynamiclrp", "gradient_x_input"])
@pytest.mark.parametrize("name", USES)
def test_frozen_parameters_take_part_whatever_their_use(name: str, composite: str) -> None:
    model = Exotic(USES[name])
    expected = explain(model, X, 1, composite=composite)
    same(explain(model.requires_grad_(False), X, 1, composite=composite), expected)
    assert expected.ledger.closes or composite == "gradient_x_input", expected.ledger
    whole = explain(model.requires_grad_(True), X, 1, composite=composite, parameters="*")
    frozen = explain(model.requires_grad_(False), X, 1, composite=composite, parameters="*")
    same(whole, expected)
    same(frozen, expected)
    for parameter, relevance in whole.parameters.items():
        assert (relevance is None) == (frozen.parameters[parameter] is None), parameter
        if relevance is not None:
            close(frozen.parameters[parameter], relevance)


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear by keyword",
        "matmul",
        "matmul from the left",
        "baddbmm",
        "in place",
        "from the left",
        "einsum",
        "transposed",
        "transposed by attribute",
    ],
)
def test_nothing_is_saved_for_the_sake_of_frozen_parameters(name: str) -> None:
    model = Exotic(USES[name]).requires_grad_(False)

    def saved(work: Callable[[], object]) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (shapes.append(x.shape), x)[1], lambda x: x):
            work()
        return shapes

    gradient = saved(lambda: model(X.clone().requires_grad_()))
    assert saved(lambda: explain(model, X, 1)) == gradient
    assert saved(lambda: explain(model, X, 1, parameters="*")) != gradient


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_reparametrised_weights(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    plain = nn.Linear(4, 3).double()
    wrapped = getattr(nn.utils.parametrizations, kind)(layer).eval()
    with torch.no_grad():
        plain.weight.copy_(wrapped.weight)
        plain.bias.copy_(wrapped.bias)
    for composite in ("attnlrp", "epsilon_plus"):
        expected = explain(plain, X, 1, composite=composite)
        for frozen in (False, True):
            same(explain(wrapped.requires_grad_(not frozen), X, 1, composite=composite), expected, 1e-9)


def test_attention_modules_take_their_own_path_and_not_the_fast_one() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for composite in ("attnlrp", "cplrp"):
        for weights in (False, True):

            def model(x: Tensor, weights: bool = weights) -> Tensor:
                return module(x, x, x, need_weights=weights)[0].flatten(1)

            wrapper = nn.Module()
            wrapper.inner, wrapper.forward = module, model  # type: ignore[method-assign]
            module.requires_grad_(True)
            expected = explain(wrapper, x, 5, composite=composite)
            assert expected.ledger.closes
            module.requires_grad_(False)
            same(explain(wrapper, x, 5, composite=composite), expected)

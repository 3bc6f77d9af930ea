"""Explaining leaves everything as it was, whether it succeeds or not, and runs the model as it is."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from dynlrp import COMPOSITES, DynLRPError, TrainingModeError, explain, relevance, rules
from tests.conftest import Apply, Opaque, sample
from tests.peers import models as peers

X = peers.inputs((2, 3, 12, 12), 3)


class Failure(Exception):
    """Raised by a model half-way."""


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise Failure


def net(*middle: nn.Module, inplace: bool = False) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace), *middle, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    return peers.randomise(model, 1).double()  # type: ignore[return-value]


def hook_tables(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) for name, value in vars(module).items() if "hook" in name and isinstance(value, dict)}


def snapshot(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Everything that must not change, as plain comparable values."""

    def bits(tensor: Tensor | None) -> Any:
        return None if tensor is None else (tensor.dtype, tensor.shape, tensor.detach().cpu().numpy().tobytes())

    tensors = {"inputs": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "state": {name: (bits(t), id(t)) for name, t in model.state_dict(keep_vars=True).items()},
        "buffers": {name: bits(b) for name, b in model.named_buffers()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "grads": {name: bits(p.grad) for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: hook_tables(m) for name, m in model.named_modules()},
        "tensor hooks": {name: dict(p._backward_hooks or {}) for name, p in model.named_parameters()},
        "global hooks": {n: dict(v) for n, v in vars(global_hooks).items() if "hooks" in n and isinstance(v, dict)},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "random": (bits(torch.get_rng_state()), random.getstate(), numpy_state[1].tobytes(), numpy_state[2:]),
        "modes": (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(), len(torch.overrides._get_current_function_mode_stack()),
        ),
        "inputs": {
            name: (bits(t), t._version, t.requires_grad, bits(t.grad), t.is_leaf) for name, t in tensors.items()
        },
        "registry": dict(rules.REGISTRY),
    }  # fmt: skip


@contextmanager
def unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    before = snapshot(model, inputs)
    yield
    after = snapshot(model, inputs)
    for name, value in before.items():
        assert after[name] == value, name


def prepared(model: nn.Module, frozen: bool | None) -> nn.Module:
    """With gradients, flags, modes and hooks of its own."""
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0 if frozen is None else not frozen)
        if parameter.requires_grad and number % 3 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    next(model.children()).register_forward_hook(lambda *_: None)
    next(model.children()).register_forward_pre_hook(lambda *_: None)
    return model


SUCCESSES: dict[str, Callable[[], nn.Module]] = {
    "plain": net,
    "in place": lambda: net(Apply(lambda x: (x * 1.0).add_(1.0).mul_(2.0)), inplace=True),
    "input changed in place": lambda: nn.Sequential(Apply(lambda x: x.mul_(2.0)), net()),
    "input changed by +=": lambda: nn.Sequential(Apply(lambda x: x.__iadd__(1.0)), net()),
}


@pytest.mark.parametrize("frozen", [False, True, None])
@pytest.mark.parametrize("composite", ["auto", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("name", SUCCESSES)
def test_success(name: str, composite: str, frozen: bool | None) -> None:
    model = prepared(SUCCESSES[name](), frozen)
    x = X.clone().requires_grad_()
    x.grad = torch.ones_like(x)
    for inputs in (X.clone(), x):
        with unchanged(model, inputs):
            explain(model, inputs, 1, composite=composite, layers="*", parameters="*")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_success_with_transformers(name: str, frozen: bool) -> None:
    model, inputs, target = sample(name)
    model.requires_grad_(not frozen)
    for composite in ("auto", "dynamiclrp"):
        with unchanged(model, inputs):
            explain(model, inputs, target, composite=composite)


class Counts(nn.Module):
    """A buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def nan_weights(*middle: nn.Module) -> nn.Module:
    model = net(*middle)
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    return model


FAILURES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception]]] = {
    "forward": (lambda: net(Fails()), {}, Failure),
    "forward after a draw": (lambda: net(Apply(torch.rand_like), Fails()), {}, Failure),
    "forward in training": (lambda: net(Fails()).train(), {"allow_training": True}, Failure),
    "forward with hooks": (lambda: net(Fails()), {"layers": "*", "parameters": "*"}, Failure),
    "target": (net, {"target": 7}, DynLRPError),
    "callable target": (net, {"target": lambda y: 1 / 0}, ZeroDivisionError),
    "unknown operation": (lambda: net(Apply(Opaque.apply)), {}, DynLRPError),
    "composite": (net, {"composite": "no"}, DynLRPError),
    "layer": (net, {"layers": "no"}, DynLRPError),
    "parameter": (net, {"parameters": "no"}, DynLRPError),
    "training": (lambda: net(nn.Dropout(0.5)).train(), {}, DynLRPError),
    "functional dropout": (lambda: net(Apply(nn.functional.dropout)), {}, DynLRPError),
    "no path": (lambda: net(Apply(Tensor.detach)), {}, DynLRPError),
    "NaN": (lambda: nan_weights(Counts()), {}, DynLRPError),
    "NaN in training": (lambda: nan_weights(nn.Dropout(0.5)).train(), {"allow_training": True}, DynLRPError),
    "compiled": (lambda: net(torch.compile(nn.ReLU())), {}, DynLRPError),
    "output": (net, {"output": "logits"}, DynLRPError),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_failure(name: str, frozen: bool) -> None:
    build, options, error = FAILURES[name]
    model = prepared(build(), frozen)
    x = X.clone().requires_grad_()
    with unchanged(model, x), pytest.raises(error):
        explain(model, x, **options)
    explain(prepared(net(), frozen), X)  # and the next one works


def test_allowed_training_restores_statistics_and_random_state() -> None:
    model = net(nn.Dropout(0.5)).train()
    with unchanged(model, X):
        explain(model, X, 1, allow_training=True)
    momentless = net(nn.BatchNorm2d(6, momentum=None)).double().train()
    with unchanged(momentless, X):
        explain(momentless, X, 1, allow_training=True)


@pytest.mark.usefixtures("_impatient")
def test_random_numbers_of_numpy_and_python() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))

    model = net(Apply(noisy))
    with unchanged(model, X):
        explain(model, X, 1, allow_training=True)


def test_a_buffer_that_forward_changes_is_put_back() -> None:
    model = net(Counts())
    before = model[3].calls.clone()
    explain(model, X, 1)
    assert torch.equal(model[3].calls, before)


@pytest.mark.parametrize("error", [False, True])
def test_modes_stay(error: bool) -> None:
    model = net(Fails()) if error else net()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            try:
                explain(model, X, 1)
            except Failure:
                assert error
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus"])
def test_autocast_is_explained_and_stays(composite: str, frozen: bool) -> None:
    model = net().float().requires_grad_(not frozen)
    x = X.float()
    expected = explain(model, x, 1, composite=composite)
    with torch.autocast("cpu", torch.bfloat16), unchanged(model, x):
        explanation = explain(model, x, 1, composite=composite)
    assert explanation.relevance.dtype == torch.float32
    # bfloat16 has 8 bits.
    assert torch.allclose(explanation.value.float(), expected.value, rtol=0.05, atol=0.05)
    difference = (explanation.relevance - expected.relevance).norm() / expected.relevance.norm()
    assert float(difference) < 0.1


def test_relevance_leaves_everything_too() -> None:
    model = prepared(net(inplace=True), False)
    x = X.clone().requires_grad_()
    output = model(x)
    for composite in COMPOSITES:
        with unchanged(model, x):
            relevance(output, x, composite=composite)
    assert output.grad_fn is not None
    assert output._version == 0


# The forward pass is the model's own ------------------------------------------------------------------------


class Residual(nn.Module):
    """In-place operations of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        y.add_(1).mul_(3)
        y[:, :2] *= 3.0
        y[:, 2:4].zero_()
        return y.relu_()


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    **SUCCESSES,
    "residual in place": lambda: net(Residual(), inplace=True),
    "vgg": lambda: peers.build("vgg", peers.NETWORKS),
    "resnet": lambda: peers.build("resnet", peers.NETWORKS),
}


def seen_output(model: nn.Module, inputs: Any, **options: Any) -> Tensor:
    """The output that the model gives while it is explained."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(getattr(output, "logits", output)))
    try:
        explain(model, inputs, **options)
    finally:
        handle.remove()
    output: Tensor = seen[0].detach()
    return output


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FORWARDS)
def test_the_output_is_bit_identical(name: str, frozen: bool) -> None:
    model = FORWARDS[name]().requires_grad_(not frozen)
    x = peers.inputs((2, 3, 16, 16), 3)
    with torch.no_grad():
        expected = model(x.clone())
    for composite in ("auto", "epsilon_plus"):
        found = seen_output(model, x, target=1, composite=composite, layers="*", on_unknown="gradient")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_the_output_of_transformers_is_bit_identical(name: str, dtype: torch.dtype, frozen: bool) -> None:
    model, inputs, target = sample(name)
    model.to(dtype).requires_grad_(not frozen)
    inputs = inputs if isinstance(inputs, dict) else inputs.to(dtype)
    try:
        plain = model(**inputs).logits if isinstance(inputs, dict) else model(inputs).logits
        assert torch.equal(seen_output(model, inputs, target=target), plain.detach())
    finally:
        model.to(torch.float64)


def test_in_place_operations_are_explained_like_their_other_form() -> None:
    """As in autoLRP's altered forward: y.add_(1); y.mul_(3)."""

    def changing(x: Tensor) -> Tensor:
        y = x * 2.0
        y.add_(x)
        y.mul_(3)
        y -= x.flip(1)
        return y.relu_()

    def plain(x: Tensor) -> Tensor:
        return ((x * 2.0 + x) * 3 - x.flip(1)).relu()

    x = torch.randn(3, 4, dtype=torch.float64)
    for target in (0, 1, 2):
        found, expected = (explain(f, x, target) for f in (changing, plain))
        assert torch.allclose(found.relevance, expected.relevance, rtol=1e-13, atol=0)
        assert torch.equal(found.value, expected.value)
        assert found.ledger.closes


def test_parts_masked_in_place() -> None:
    def changing(x: Tensor) -> Tensor:
        y = x * 2.0
        y[y < 0] = 0.0
        return y * 1.0

    x = torch.randn(3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    for target in (0, 1, 2):
        explanation = explain(changing, x, target)
        (gradient,) = torch.autograd.grad(changing(leaf)[:, target].sum(), leaf)
        assert torch.allclose(explanation.relevance, gradient * x, rtol=1e-13, atol=0)
        assert explanation.ledger.closes


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1),
    "python": random.random,
    "numpy": np.random.rand,
}


@contextmanager
def drawing(draw: Callable[[], Any]) -> Iterator[list[int]]:
    """Another thread that draws all the while; how often it did, in the end."""
    stop, begun, count = threading.Event(), threading.Event(), [0]

    def work() -> None:
        while not stop.is_set():
            draw()
            count[0] += 1
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def reference(kind: str, count: int) -> Any:
    """What ``count`` draws after a seed leave behind."""
    seed_all()
    for _ in range(count):
        DRAWS[kind]()
    return random_states()


def seed_all() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def random_states() -> list[Any]:
    numpy_state: Any = np.random.get_state(legacy=True)
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", DRAWS)
def test_draws_of_another_thread_are_no_error_and_stay_drawn(kind: str, create_graph: bool) -> None:
    model = net()
    expected = explain(model, X, 1).relevance
    seed_all()
    with drawing(DRAWS[kind]) as count:
        for _ in range(5):
            assert torch.equal(explain(model, X, 1, create_graph=create_graph).relevance, expected)
            explain(model, X, 1, allow_training=True)
    assert random_states() == reference(kind, count[0])


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws from numpy's generator is soon known by that."""
    monkeypatch.setattr("dynlrp.randomness.PATIENCE", 0.2)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("kind", DRAWS)
def test_own_draws_are_an_error_while_another_thread_draws(kind: str) -> None:
    """And what the other thread drew is not taken back."""
    model = net(Apply(lambda x: x + float(DRAWS[kind]())))
    seed_all()
    with drawing(DRAWS[kind]), pytest.raises(TrainingModeError, match="random numbers"):
        explain(model, X, 1)
    before = random_states()
    other = next(k for k in DRAWS if k != kind)
    with drawing(DRAWS[other]), pytest.raises(TrainingModeError, match="random numbers"):
        explain(model, X, 1)
    after = random_states()
    place = {"torch": [0], "python": [1], "numpy": [2, 3]}[kind]
    assert [after[p] for p in place] == [before[p] for p in place]


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.rand(1, generator=torch.default_generator),
        lambda x: torch.nn.functional.dropout(x, 0.5),
        lambda x: torch.nn.functional.rrelu(x, training=True),
        lambda x: x * float(torch.empty(1).normal_()),
        lambda x: (torch.manual_seed(9), x * 2)[1],
        lambda x: x + random.gauss(0, 1) * 0 + random.randint(0, 3),
        lambda x: x[:, random.sample(range(6), 6)],
        lambda x: x[:, np.random.permutation(6)],
    ],
)
def test_draws_that_an_idle_thread_might_have_made(draw: Callable[[Tensor], Tensor]) -> None:
    """It is told from the model's, which are put back."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    model = net(Apply(draw))
    try:
        with unchanged(model, X), pytest.raises(TrainingModeError):
            explain(model, X, 1)
        with unchanged(model, X):
            explain(model, X, 1, allow_training=True)
    finally:
        stop.set()
        thread.join()


def test_a_generator_of_the_models_own_is_no_draw() -> None:
    own = torch.Generator().manual_seed(1)
    model = net(Apply(lambda x: x + torch.rand(1, generator=own)))
    with drawing(DRAWS["torch"]):
        explain(model, X, 1)


def test_fused_attention_draws_nothing_in_eval_mode() -> None:
    model, inputs, target = sample("bert")
    with drawing(DRAWS["torch"]):
        for _ in range(3):
            explain(model, inputs, target)


def test_buffers_that_a_forward_pass_changes_while_another_thread_draws() -> None:
    """The second look leaves no trace: with create_graph the pass counts once, else not at all."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    model = net(Counting())
    with drawing(DRAWS["torch"]):
        explain(model, X, 1)
        assert float(model[3].calls) == 0
        explain(model, X, 1, create_graph=True)
        assert float(model[3].calls) == 1

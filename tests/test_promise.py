"""Promises: activations that rules need and that nobody kept."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dynlrp import BrokenPromiseError, Composite, FreedGraphError, When, explain, relevance
from dynlrp.recorder import Recorder
from dynlrp.rules import AlphaBeta, Epsilon, Gamma, Magnitude, Need, Operation, Rule, WSquare, ZBox, ZPlus, register
from dynlrp.rules.operation import OUTPUT, Grads, Step, StepShape
from tests.conftest import Apply, Opaque
from tests.oracle import agrees, draw, same

GAMMA = Composite.of("gamma", {"dense": Gamma(), "convolution": Gamma()})
MAGNITUDE = Composite.of("magnitude", {"addition": Magnitude()})
W = draw(100, 3, 6)
RULES: dict[str, Rule] = {
    "gamma": Gamma(), "epsilon": Epsilon(0.1), "alpha_beta": AlphaBeta(), "zplus": ZPlus(), "wsquare": WSquare(),
    "zbox": ZBox(-3.0, 3.0),
}  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(draw(seed + i, *p.shape) * max(1, p[0].numel()) ** -0.5)
    return model.double().eval()


class Net(nn.Module):
    """Two linear layers with ``between`` in the middle."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 6), between, nn.Linear(width, 3)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "nothing": lambda x: x,
    "views": lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6),
    "slices": lambda x: torch.cat([x[:, :-2], x[:, -2:]], 1),
    "residual": lambda x: x + torch.tanh(x) * 0.5,
    "normalised": lambda x: F.layer_norm(x, (6,)),
    "pooled": lambda x: F.avg_pool1d(x.repeat(1, 2), 2),
    "gated": lambda x: x * torch.sigmoid(x.roll(1, 1)),
    "split": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "chunks": lambda x: torch.cat([a * 2 for a in x.chunk(3, 1)], 1),
    "sorted": lambda x: x.sort(1).values,
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "number added": lambda x: x + 1.5,
    "tensor added": lambda x: x - draw(7, 6),
    "masked": lambda x: x.masked_fill(draw(8, 6) > 0, 0.0),
    "padded": lambda x: F.pad(x[:, 1:5], (1, 1)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("between", BETWEEN)
def test_frozen_weights_give_the_same(between: str, rule: str) -> None:
    """Autograd saves no inputs of frozen layers. Whoever calls ``explain`` need not know."""
    x, composite = draw(9, 4, 6), Composite.of("rule", {"dense": RULES[rule]})
    net = Net(BETWEEN[between])
    trainable = explain(net, x, composite=composite)
    assert trainable.ledger.closes
    for parameters in ([net.first.weight], [net.last.weight], [net.last.bias], list(net.parameters())):
        net.requires_grad_(True)
        for p in parameters:
            p.requires_grad_(False)
        agrees(explain(net, x, composite=composite), trainable.relevance, trainable.ledger.accounts)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", [torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.expm1, torch.exp2])
def test_a_constant_before_an_activation_that_saves_its_result(
    activation: Callable[[Tensor], Tensor], frozen: bool
) -> None:
    """A forget gate with a bias of one, say: the argument is not saved, and the graph does not know the number."""
    x = draw(0, 5).abs()
    for shifted in (lambda x: x + 1.0, lambda x: x + torch.arange(5.0).double()):
        y = activation(shifted(x))
        zero = activation(torch.zeros(5).double())
        explanation = explain(lambda x, f=shifted: activation(f(x)), x, torch.sum)
        same(explanation.relevance, (y - zero) / shifted(x) * x)


def test_convolutions_and_batch_norm() -> None:
    model = randomise(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
        )
    )  # fmt: skip
    x = draw(0, 2, 2, 4, 4)
    for rule in RULES.values():
        composite = Composite.of("rule", {"dense": rule, "convolution": rule})
        trainable = explain(model.requires_grad_(True), x, composite=composite)
        frozen = explain(model.requires_grad_(False), x, composite=composite)
        agrees(frozen, trainable.relevance, trainable.ledger.accounts)


FIGURES: dict[str, tuple[Callable[[Tensor], Tensor], Composite, tuple[int, ...], int, int]] = {
    # The secant of tanh waits for its argument, a leaf: a path of length 0.
    "none": (lambda x: F.linear(torch.tanh(x).flip(1) * 2.0, W), Composite("attnlrp"), (0,), 0, 4),
    # The operand of the product, whose input is not saved, is made by two operations from what tanh saved.
    "one": (lambda x: F.linear(torch.tanh(x).flip(1) * 2.0, W), GAMMA, (2, 0), 2, 4),
    # Both layers share the chain to their input. Each waits for its output too, which nobody saved: one step more.
    "shared": (
        lambda x: F.linear(h := torch.tanh(x).flip(1).roll(1, 1), W) + F.linear(h, W), GAMMA, (3, 3, 0), 4, 6
    ),
    # The longest of its branches is a sum's length; where both ends meet, multipliers are made of relevance.
    "branches": (lambda x: torch.tanh(x).flip(1).roll(1, 1) + torch.exp(x), MAGNITUDE, (2, 0, 0), 2, 5),
    # A sum waits for the sum below it, which waits for what tanh and exp saved.
    "nested": (lambda x: (torch.tanh(x) + torch.exp(x)) + x, MAGNITUDE, (1, 0, 0, 0), 1, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_counted_by_hand(name: str) -> None:
    """Promises, replayed operations, the sum of path lengths and the density, as in the paper's definitions."""
    model, composite, lengths, internal, visited = FIGURES[name]
    x = draw(0, 2, 6).requires_grad_()
    report = relevance(model(x), x, composite=composite).promises
    assert sorted(report.lengths) == sorted(lengths)
    assert (report.count, report.internal, report.visited) == (len(lengths), internal, visited)
    assert report.delta == sum(lengths)
    assert report.density == len(lengths) / visited
    assert repr(report).startswith(f"{len(lengths)} promises, {internal} nodes replayed, delta {sum(lengths)}")


# Operations made for a test ---------------------------------------------------------------------------------


class Counter:
    """Replays of an operation, and which of the tensors they made are still alive."""

    def __init__(self) -> None:
        self.calls = 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __call__(self, step: Any, x: Tensor) -> Tensor:
        self.calls += 1
        y = x * 1.0
        self.alive.append(weakref.ref(y))
        return y

    @property
    def left(self) -> int:
        return sum(ref() is not None for ref in self.alive)


class Step1(torch.autograd.Function):
    """The identity, saved by nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@pytest.fixture
def counter(registry: dict[str, Operation]) -> Counter:
    """``Step1`` with a replay that counts."""
    found = Counter()
    register(Operation("Step1Backward", "linear map", operands="+", replay=found))
    return found


class AskOutput(Rule):
    """Passes the VJP and asks for the output's value; ``seen`` are live replays at each step."""

    def __init__(self, counter: Counter) -> None:
        self.counter, self.seen = counter, []  # type: ignore[var-annotated]

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        step.output()
        self.seen.append(self.counter.left)
        return step.vjp(grads)


def _chain(x: Tensor, length: int) -> Tensor:
    for _ in range(length):
        x = Step1.apply(x)
    return x


def test_a_chain_of_five_thousand(counter: Counter) -> None:
    """One promise at its end: every step is replayed once, and nothing recurses."""
    weight, x = draw(0, 2, 3), draw(1, 1, 3)
    explanation = explain(lambda x: F.linear(_chain(x, 5000), weight), x, torch.sum, composite=GAMMA)
    assert counter.calls == 5000
    assert max(explanation.promises.lengths) >= 5000
    same(explanation.relevance, explain(lambda x: F.linear(x, weight), x, torch.sum, composite=GAMMA).relevance)


@pytest.mark.parametrize("length", [500, 1000])
def test_a_promise_at_every_step_is_still_linear(counter: Counter, length: int) -> None:
    """The first to ask has the chain replayed; all others find their value there."""
    rule = AskOutput(counter)
    rule.counter = Counter()  # how many live is another test
    composite = Composite.of("ask", {When(name="Step1Backward"): rule})
    explain(lambda x: _chain(x, length), draw(0, 1, 3), torch.sum, composite=composite)
    assert counter.calls <= 2 * length


@pytest.mark.parametrize("length", [100, 200])
def test_branches_off_a_chain_share_its_replay(counter: Counter, length: int) -> None:
    """Layers along a chain, none of which saved its input: the chain is replayed once for all of them."""
    weight = draw(0, 1, 3)

    def model(x: Tensor) -> Tensor:
        total = x.sum(1, keepdim=True)
        for _ in range(length):
            x = Step1.apply(x)
            total = total + F.linear(x.flip(1), weight)
        return total

    explain(model, draw(1, 1, 3), torch.sum, composite=GAMMA)
    assert counter.calls <= 2 * length


def test_values_are_freed_after_their_last_use(counter: Counter) -> None:
    """On the way down a chain every replayed value goes with the step that took it."""
    rule = AskOutput(counter)
    composite = Composite.of("ask", {When(name="Step1Backward"): rule})
    explanation = explain(lambda x: _chain(x, 20), draw(0, 1, 3), torch.sum, composite=composite)
    assert counter.left == 0
    assert rule.seen == list(range(20, 0, -1))
    assert explanation.promises.count >= 20


def test_values_on_the_way_are_not_kept(counter: Counter) -> None:
    """What nobody waits for lives only while it is replayed, and at work is the one operand that was asked for."""
    weight = draw(0, 2, 3)
    seen: list[int] = []

    class Look(Gamma):
        def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
            result = super().__call__(step, grads)
            seen.append(counter.left)
            return result

    composite = Composite.of("look", {"dense": Look()})
    explain(lambda x: F.linear(_chain(x, 50), weight), draw(1, 1, 3), torch.sum, composite=composite)
    assert seen == [1]


def test_activations_go_as_relevance_passes_them() -> None:
    """Ways to recompute a value that somebody keeps anyway hold nothing: at each layer, all behind it is freed."""
    net = randomise(nn.Sequential(*(m for _ in range(5) for m in (nn.Conv2d(2, 2, 1), nn.ReLU())), nn.Flatten()))
    made: list[StorageWeakRef] = []
    alive: list[int] = []
    for module in net[1::2]:
        module.register_forward_hook(lambda m, x, y: made.append(StorageWeakRef(y.untyped_storage())))

    class Look(Gamma):
        def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
            alive.append(sum(not storage.expired() for storage in made))
            return super().__call__(step, grads)

    explain(net, draw(1, 1, 2, 3, 3), torch.sum, composite=Composite.of("look", {"convolution": Look()}))
    # Its own output, and those of the layers before it.
    assert alive == [5, 4, 3, 2, 1]


def test_two_that_wait_for_one_value(counter: Counter) -> None:
    one, two = draw(0, 2, 3), draw(1, 2, 3)

    def model(x: Tensor) -> Tensor:
        h = _chain(x, 7)
        return F.linear(h, one) + F.linear(h, two)

    explain(model, draw(2, 1, 3), torch.sum, composite=GAMMA)
    assert counter.calls == 7
    assert counter.left == 0


# Broken promises --------------------------------------------------------------------------------------------


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2).requires_grad_(False)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Opaque.apply(x))


@pytest.fixture
def opaque(registry: dict[str, Operation]) -> None:
    """``Opaque`` has a rule and no replay."""
    register(Operation("OpaqueBackward", "linear map", operands="+"))


@pytest.mark.usefixtures("opaque")
def test_a_broken_promise_is_one_clear_error() -> None:
    """Named are the rule, the operation it stands at and the operation that cannot be replayed."""
    x, model = draw(0, 2, 3).requires_grad_(), Layered()
    y = model(x)
    with pytest.raises(BrokenPromiseError) as caught:
        relevance(y, x, composite=GAMMA)
    for part in ("Gamma", "AddmmBackward0", "OpaqueBackward"):
        assert part in str(caught.value)
    # It came before any relevance moved, and the graph is as it was.
    (gradient,) = torch.autograd.grad(y.sum(), x)
    same(gradient, 2 * model.head.weight.sum(0).expand(2, 3))


@pytest.mark.usefixtures("opaque")
def test_all_broken_promises_are_listed_at_once() -> None:
    first, second, x = draw(0, 4, 3), draw(1, 1, 3, 2), draw(2, 5, 4).requires_grad_()
    y = torch.bmm(Opaque.apply(Opaque.apply(x) @ first).unsqueeze(0), second)
    with pytest.raises(BrokenPromiseError) as caught:
        relevance(y, x, composite=GAMMA)
    assert "MmBackward0" in str(caught.value)
    assert "BmmBackward0" in str(caught.value)


@pytest.mark.usefixtures("opaque")
def test_explain_records_what_cannot_be_replayed() -> None:
    """It has the model, so that it can run it once more and look."""
    x, model = draw(0, 2, 3), Layered()
    frozen = explain(model, x, torch.sum, composite=GAMMA)
    trainable = explain(model.requires_grad_(True), x, torch.sum, composite=GAMMA)
    agrees(frozen, trainable.relevance, trainable.ledger.accounts)


@pytest.mark.usefixtures("opaque")
def test_rules_that_need_nothing_ask_for_nothing() -> None:
    x, model = draw(0, 2, 3), Layered()
    explanation = explain(model, x, torch.sum, composite="attnlrp")
    agrees(explanation, x * 2 * model.head.weight.sum(0), {"parameters": 2 * model.head.bias.sum()})


def test_relevance_of_a_frozen_bias_that_the_graph_does_not_know() -> None:
    """``relevance`` finds a graph as it is. Gamma needs the bias: without it the result would be another one."""
    layer, x = randomise(nn.Linear(3, 2)), draw(0, 2, 3).requires_grad_()
    expected = relevance(layer(x), x, composite=GAMMA).relevance
    y = layer.requires_grad_(False)(x)
    found = None
    with contextlib.suppress(BrokenPromiseError):
        found = relevance(y, x, composite=GAMMA).relevance
    if found is not None:
        same(found, expected)
    assert relevance(y, x, composite="attnlrp").ledger.closes


@pytest.mark.parametrize("frozen", [False, True])
def test_relevance_replays_what_the_graph_has(frozen: bool) -> None:
    x = draw(0, 2, 6).requires_grad_()
    net = Net(lambda h: torch.relu(h.flip(1)).roll(2, 1) + h)
    net.last.bias = net.first.bias = None
    expected = explain(net, x.detach(), torch.sum, composite=GAMMA)
    net.requires_grad_(not frozen)
    same(relevance(net(x), x, composite=GAMMA).relevance, expected.relevance)


def test_a_saved_tensor_that_was_changed_in_place() -> None:
    net, x = Net(torch.relu), draw(0, 2, 6).requires_grad_()
    y = net(x)
    with torch.no_grad():
        net.last.weight.mul_(2.0)
    with pytest.raises(BrokenPromiseError, match="in place"):
        relevance(y, x, composite=GAMMA)


def test_a_graph_that_a_backward_pass_freed() -> None:
    net, x = Net(torch.relu), draw(0, 2, 6).requires_grad_()
    y = net(x)
    before = relevance(y, x, composite=GAMMA).relevance
    y.sum().backward(retain_graph=True)
    same(relevance(y, x, composite=GAMMA).relevance, before)
    y.sum().backward()
    with pytest.raises(FreedGraphError, match="retain_graph"):
        relevance(y, x, composite=GAMMA)


def test_a_layer_that_is_changed_in_place_afterwards() -> None:
    """A requested layer's output is the promise of its value only as long as nobody writes to it."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.relu = nn.Linear(3, 4), nn.ReLU(inplace=True)
            randomise(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.layer(x)) * 2.0

    model, x = InPlace(), draw(0, 2, 3)
    explanation = explain(model, x, torch.sum, layers=["layer", "relu"], composite=GAMMA)
    z = model.layer(x).detach()
    same(explanation.layers["layer"], 2 * z.relu())
    same(explanation.layers["relu"], 2 * z.relu())


# What changed since, or would not be the same again ----------------------------------------------------------


def test_dropout_is_replayed_with_the_mask_that_was_drawn() -> None:
    """The mask is saved, so the same numbers come again. No random number is drawn for it."""
    x = draw(0, 40, 6).requires_grad_()
    torch.manual_seed(3)
    hidden = F.dropout(torch.tanh(x), 0.5)
    before = torch.get_rng_state()
    found = relevance(F.linear(hidden, W), x, composite=GAMMA).relevance
    assert torch.equal(torch.get_rng_state(), before)
    leaf = hidden.detach().clone().requires_grad_()
    r = relevance(F.linear(leaf, W), leaf, composite=GAMMA).relevance
    same(found, r)  # dropout passes relevance on, and tanh keeps it
    assert 0.3 < float((found == 0).double().mean()) < 0.7


DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "noise": (lambda x: x + torch.randn_like(x), "AddBackward0 adds a constant that the graph did not record"),
    "alpha dropout": (lambda x: F.alpha_dropout(x, 0.5, True), "AddBackward0 adds a constant"),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_that_is_not_saved_breaks_the_promise(name: str) -> None:
    function, reason = DRAWS[name]
    x = draw(0, 4, 6).requires_grad_()
    with pytest.raises(BrokenPromiseError) as caught:
        relevance(F.linear(function(torch.tanh(x)), W), x, composite=GAMMA)
    for part in ("Gamma on MmBackward0 in the model needs operand 0", reason, "require grad", "attnlrp"):
        assert part in str(caught.value)


def test_explain_draws_the_same_in_its_second_run() -> None:
    """The state of the generator is put back before it, so that values and graph belong together."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3, bias=False)
            randomise(self).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x) + torch.randn(6))

    model, x = Noisy(), draw(0, 2, 6)
    torch.manual_seed(5)
    explanation = explain(model, x, 1, composite=GAMMA, allow_training=True)
    torch.manual_seed(5)
    hidden = (torch.tanh(x) + torch.randn(6)).requires_grad_()
    r = relevance(model.head(hidden)[:, 1], hidden, composite=GAMMA).relevance
    same(explanation.relevance, r / hidden.detach() * torch.tanh(x), 1e-9)  # the rest belongs to the noise
    assert explanation.ledger.closes


def changed_result(x: Tensor) -> Tensor:
    y = x.exp()
    with torch.no_grad():
        y.mul_(2.0)  # which exp saved
    return F.linear(y.flip(1), W)


def changed_factor(x: Tensor) -> Tensor:
    factor = draw(7, 6)
    y = torch.tanh(x) * factor
    factor.mul_(2.0)  # which the product saved
    return F.linear(y, W)


def changed_weight(x: Tensor) -> Tensor:
    weight = W.clone()
    y = F.linear(x, weight)
    weight.mul_(2.0)  # which the product saved
    return y


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], Sequence[str]]] = {
    "result": (changed_result, ["Secant on ExpBackward0"]),
    "factor": (changed_factor, ["Gamma on MmBackward0", "operand 0", "what MulBackward0 saved", "Shares on Mul"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_in_place_keeps_no_promise(name: str) -> None:
    """An error with operation, operand and cure; by ``explain`` with the module."""
    model, parts = CHANGES[name]
    x = draw(0, 2, 6).requires_grad_()
    with pytest.raises(BrokenPromiseError) as caught:
        relevance(model(x), x, composite=GAMMA)
    for part in (*parts, "in the model", "saved was changed in place", "out of place"):
        assert part in str(caught.value), str(caught.value)
    with pytest.raises(BrokenPromiseError) as caught:
        explain(nn.Sequential(nn.Tanh(), Apply(model)), x.detach(), 1, composite=GAMMA)
    assert "in 1" in str(caught.value)
    assert "saved was changed in place" in str(caught.value)


def test_another_keeper_stands_in_for_what_was_changed() -> None:
    """The argument that the sine saved was changed, and can be recomputed all the same."""
    x = draw(0, 2, 6).requires_grad_()

    def model(x: Tensor, change: bool) -> Tensor:
        y = x.flip(1)
        z = F.linear(y.sin(), W)
        if change:
            y.detach().square_()
        return z

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(model(x, True).sum(), x)
    found, expected = (relevance(model(x, change), x, composite=GAMMA) for change in (True, False))
    same(found.relevance, expected.relevance)


# The second run ---------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Frozen layers with activations between that save nothing which could be recomputed; one in ten is opaque."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(depth)])
        randomise(self).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).flip(1).roll(1, 1) * 1.5
            if number % 10 == 5:
                x = Opaque.apply(x)
        return x


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every recorder of a second run."""
    made: list[Recorder] = []

    class Spied(Recorder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("dynlrp.request.Recorder", Spied)
    return made


def recorded(recorder: Recorder) -> list[Tensor]:
    inner = [t for _, made in recorder._inner._made.values() for t in made if t is not None]
    return [*recorder._kept.values(), *inner]


@pytest.mark.usefixtures("opaque")
def test_the_second_run_keeps_only_what_is_missing(recorders: list[Recorder]) -> None:
    """Four outputs that nobody can recompute, and not the hundreds of tensors between them."""
    model, x = Deep(40), draw(0, 2, 8)
    frozen = explain(model, x, 1, composite=GAMMA)
    assert len(recorders) == 1
    assert len(recorded(recorders[0])) == 4
    trainable = explain(model.requires_grad_(True), x, 1, composite=GAMMA)
    assert len(recorders) == 1
    same(frozen.relevance, trainable.relevance)


@pytest.mark.usefixtures("opaque")
def test_a_model_that_takes_another_way_in_its_second_run(recorders: list[Recorder]) -> None:
    """What the first run lacked means nothing then: everything is kept."""
    base = Deep(10)

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.calls = base, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.base(x if self.calls < 2 else Opaque.apply(x * 0.5))

    model, x = Fickle(), draw(0, 2, 8)
    found = explain(model, x, 1, composite=GAMMA)
    assert model.calls == 3
    assert len(recorders) == 2
    assert len(recorded(recorders[1])) > 30
    same(found.relevance, explain(base, x, 1, composite=GAMMA).relevance)


def test_nothing_is_run_again_where_recording_would_not_help(recorders: list[Recorder]) -> None:
    with pytest.raises(BrokenPromiseError, match="was changed in place"):
        explain(changed_weight, draw(1, 2, 6), 1, composite=GAMMA)
    assert recorders == []


# Constants ---------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """Weights and biases of layers, parameters or buffers."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        wrap = (lambda t: nn.Buffer(t)) if buffers else (lambda t: nn.Parameter(t))
        self.kernel, self.first = wrap(draw(1, 5, 2, 3)), wrap(draw(2, 5))
        self.scale, self.shift = wrap(draw(3, 5)), wrap(draw(4, 5))
        self.mean, self.var = nn.Buffer(draw(5, 5)), nn.Buffer(draw(6, 5).square() + 0.5)
        self.weight, self.second, self.third = wrap(draw(7, 3, 5)), wrap(draw(8, 3)), wrap(draw(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x, self.kernel, self.first, padding=1)
        h = F.batch_norm(h, self.mean, self.var, self.scale, self.shift).relu()
        h = F.conv1d(h, self.kernel[:, :1].expand(5, 5, 3), self.second.new_ones(5) * self.first, padding=1).relu()
        return F.linear(F.linear(h.mean(2), self.weight, self.second).relu(), self.weight[:, :3], self.third)


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", "epsilon_alpha2_beta1", "dynamiclrp"])
def test_biases_that_are_constants(composite: str) -> None:
    """Autograd records no buffer: explain() does, where a rule needs one. It is no parameter in the ledger."""
    x = draw(0, 2, 2, 4)
    for options in ({}, {"create_graph": True}, {"audit": True}, {"precision": torch.float64}):
        found, expected = (explain(Buffers(flag), x, 1, composite=composite, **options) for flag in (True, False))
        same(found.relevance.detach(), expected.relevance.detach())
        assert found.ledger.closes
        assert expected.ledger.closes
        accounts, others = found.ledger.accounts, expected.ledger.accounts
        ours, theirs = (sum(a[name] for name in ("parameters", "constants")) for a in (accounts, others))
        assert ours == pytest.approx(theirs)

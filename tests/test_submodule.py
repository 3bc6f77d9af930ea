"""A whole module as one step, or under a composite of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import (
    COMPOSITES,
    BrokenPromiseError,
    Composite,
    Explanation,
    InputError,
    NoPathError,
    RuleError,
    UnknownOperationError,
    When,
    explain,
    relevance,
)
from dynlrp.rules import VJP, AlphaBeta, Epsilon, Gamma, Gradient, Hold, Rule, Taylor, Whole, ZPlus
from tests.conftest import Opaque, close, gradient_x_input, same, sample
from tests.oracle import draw

X = draw(0, 3, 4)


def step(rule: Rule | Composite, *modules: str) -> Composite:
    return Composite.of("steps", {When(module=module): rule for module in modules})


def linear(inner: int, outer: int) -> nn.Linear:
    return nn.Linear(inner, outer, bias=False)


class Wired(nn.Module):
    """Maps without bias around and between modules, so that all that is not linear lies in steps."""

    def __init__(self, forward: Callable[[Wired, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = linear(4, 5), linear(4, 5), linear(5, 2)
        for name, part in parts.items():
            setattr(self, name, part)
        self.wires = forward
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.wires(self, x)


def holds_as_gradient(model: nn.Module, *modules: str, x: Tensor = X) -> Explanation:
    """With its own gradient for every step, relevance is gradient times input."""
    found = explain(model, x, lambda y: y[:, 1], composite=step(VJP(), *modules))
    (expected,) = gradient_x_input(lambda x: model(x)[:, 1], x)
    close(found.relevance, expected, 1e-12)
    assert found.ledger.closes
    assert not found.ledger.unresolved
    return found


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5))


class Two(nn.Module):
    """Two tensors in, two out, neither linear."""

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        return (a * b).tanh() * scale, {"other": (a - b.exp()).sin()}


# The module's own gradient ---------------------------------------------------------------------------------


def test_a_step_by_its_gradient_is_the_transposed_jacobian() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    found = explain(model, X, 1, composite=step(VJP(), "step"), layers=["first", "step"])
    h = model.first(X)
    for row in range(len(X)):
        jacobian = torch.autograd.functional.jacobian(model.step, h[row])
        m = jacobian.T @ model.last.weight[1]
        close(found.relevance[row], X[row] * (model.first.weight.T @ m))
        close(found.layers["first"][row], h[row] * m)
    close(found.layers["step"], model.step(h) * model.last.weight[1])
    ledger = found.ledger
    assert ledger.closes
    lost = ledger.output - float(found.relevance.sum())
    assert ledger.by_operation()["held back", "submodule"] == pytest.approx(lost)
    assert ledger.by_module()["held back", "step"] == pytest.approx(lost)
    assert abs(lost) > 1e-3


def test_gradient_and_vjp_are_the_same_and_taylor_books_offsets() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    vjp, gradient, taylor = (explain(model, X, 1, composite=step(r, "step")) for r in (VJP(), Gradient(), Taylor()))
    same(vjp, gradient)
    close(vjp.relevance, taylor.relevance)
    assert taylor.ledger.accounts["offsets"] == pytest.approx(vjp.ledger.accounts["held back"])
    assert taylor.ledger.accounts["held back"] == pytest.approx(0, abs=1e-12)
    assert taylor.ledger.closes


def test_a_held_step_is_a_coefficient() -> None:
    model = Wired(lambda m, x: m.last(m.first(x) * m.step(m.second(x))), step=mlp())
    found = explain(model, X, 1, composite=step(Hold(), "step"))
    gate = model.step(model.second(X)).detach()
    (expected,) = gradient_x_input(lambda x: model.last(model.first(x) * gate)[:, 1], X)
    close(found.relevance, expected)
    assert found.ledger.closes


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_change_nothing(frozen: bool) -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp()).requires_grad_(not frozen)
    found = holds_as_gradient(model, "step")
    assert found.ledger.accounts["parameters"] == 0


def test_a_module_that_runs_twice_is_two_steps() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.step(m.first(x)) - m.second(x))), step=mlp())
    found = holds_as_gradient(model, "step")
    assert sum(name == "submodule" for _, name, _ in _places(found, "held back")) == 2


def _places(found: Explanation, account: str) -> list[tuple[int, str, str]]:
    return [(seq, name, a) for a, seq, name in found.ledger._places if a == account]


def test_a_glob_makes_steps_of_the_outermost_modules() -> None:
    blocks = nn.ModuleList([nn.Sequential(mlp(), nn.Tanh()), nn.Sequential(mlp(), nn.Tanh())])

    def forward(m: Wired, x: Tensor) -> Tensor:
        h = m.first(x)
        for block in m.blocks:
            h = h + block(h)
        return m.last(h)

    found = holds_as_gradient(Wired(forward, blocks=blocks), "blocks.*")
    assert {path for _, path in found.ledger.by_module()} == {"", "blocks.0", "blocks.1"}


def test_several_inputs_and_outputs() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        y, others = m.two(m.first(x), b=m.second(x), scale=2.0)
        return m.last(y + 3 * others["other"])

    holds_as_gradient(Wired(forward, two=Two()), "two")


def test_outputs_that_nobody_uses() -> None:
    holds_as_gradient(Wired(lambda m, x: m.last(m.two(m.first(x), m.second(x))[1]["other"]), two=Two()), "two")


def test_one_tensor_given_twice() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(m.two(h, h)[0])

    holds_as_gradient(Wired(forward, two=Two()), "two")


class Through(nn.Module):
    """Returns its first input as it is, the second unused, and one output twice."""

    def forward(self, a: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = a.sin()
        return a, y, y


def test_inputs_that_pass_straight_through_or_end() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        a, y, z = m.through(m.first(x), m.second(x))
        return m.last(a - y + 2 * z)

    holds_as_gradient(Wired(forward, through=Through()), "through")


class Stash(nn.Module):
    """Takes a tensor from outside and leaves one there."""

    taken: Tensor
    left: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.left = x.cos()
        return (x * self.taken).tanh() + self.left.exp()


def test_tensors_that_go_in_and_out_at_the_side() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        m.stash.taken = m.second(x)
        y = m.stash(m.first(x))
        return m.last(y + m.stash.left)

    holds_as_gradient(Wired(forward, stash=Stash()), "stash")


def test_input_that_another_input_depends_on() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(m.two(h, m.middle(h))[0])

    holds_as_gradient(Wired(forward, two=Two(), middle=linear(5, 5)), "two")


def test_steps_next_to_each_other() -> None:
    model = Wired(lambda m, x: m.last(m.b(m.a(m.first(x)))), a=mlp(), b=nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
    holds_as_gradient(model, "a", "b")


class Writes(nn.Module):
    """Writes over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).sin_().add_(1)


@pytest.mark.parametrize("before", ["", "view"])
def test_a_step_that_writes_over_its_input(before: str) -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        h = m.first(x)
        h = h[:, :] if before else h * 1
        y = m.writes(h)
        return m.last(y + m.second(x))

    holds_as_gradient(Wired(forward, writes=Writes()), "writes")


def test_a_view_that_is_recorded_anew_when_it_goes_in() -> None:
    """After a write into its base, a view gets its node when it is next looked at."""

    def forward(m: Wired, x: Tensor) -> Tensor:
        h = m.first(x) * 1
        view = h[:, 1:4]
        h.mul_(2)
        return m.last(m.pad(m.step(view)) + h)

    holds_as_gradient(Wired(forward, step=nn.Sequential(nn.Tanh()), pad=nn.ConstantPad1d((1, 1), 0.0)), "step")


@pytest.mark.parametrize("rule", [VJP(), Whole(lambda module, m, x, y: [m[0] * y[0] / x[0]])])
def test_the_result_of_a_step_is_written_over(rule: Rule) -> None:
    inside = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    kept = Wired(lambda m, x: m.last(m.step(m.first(x)).relu()), step=inside)
    written = Wired(lambda m, x: m.last(m.step(m.first(x)).relu_()), step=inside)
    written.load_state_dict(kept.state_dict())
    expected = explain(kept, X, 1, composite=step(rule, "step"))
    same(explain(written, X, 1, composite=step(rule, "step")), expected)
    assert expected.ledger.closes


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_parameters_alone(frozen: bool) -> None:
    """A learned prompt depends on no input: what meets it goes to the parameters."""

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 5)

        def forward(self) -> Tensor:
            return self.table.weight[1].sin()

    model = Wired(lambda m, x: m.last(m.first(x) + m.prompt()), prompt=Prompt()).requires_grad_(not frozen)
    found = holds_as_gradient(model, "prompt")
    same(found, explain(model, X, lambda y: y[:, 1]))
    assert found.ledger.accounts["parameters"] != 0


def test_operations_without_a_rule_are_covered_by_the_step() -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Opaque.apply(x).sin()

    model = Wired(lambda m, x: m.last(m.inside(m.first(x))), inside=Inside())
    with pytest.raises(UnknownOperationError, match="OpaqueBackward in inside"):
        explain(model, X, 1)
    holds_as_gradient(model, "inside")


def test_the_whole_model_is_a_step() -> None:
    model = mlp().double()
    x = torch.randn(2, 5, dtype=torch.float64)
    found = explain(model, x, 1, composite=step(VJP(), ""))
    close(found.relevance, gradient_x_input(lambda x: model(x)[:, 1], x)[0])
    assert found.ledger.closes


def test_a_recurrent_layer_by_its_gradient() -> None:
    model = nn.Sequential(linear(4, 5), nn.LSTM(5, 3, batch_first=True)).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    found = explain(model, x, lambda y: y[:, -1].sum(1), composite=step(VJP(), "1"))
    close(found.relevance, gradient_x_input(lambda x: model(x)[0][:, -1].sum(1), x)[0])
    assert found.ledger.closes


# A rule of one's own ----------------------------------------------------------------------------------------


def proportional(module: nn.Module, m: Sequence[Tensor | None], x: Sequence[Tensor], y: Any) -> list[Tensor]:
    """Every output's relevance spread over the inputs by their size."""
    weights = x[0].abs() / x[0].abs().sum(-1, keepdim=True)
    return [weights * m[0].sum(-1, keepdim=True)]


def test_a_function_of_relevance() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    found = explain(
        model, X, 1, composite=step(Whole(proportional, gauge="relevance"), "step"), layers=["first", "step"]
    )
    h, y = model.first(X), model.step(model.first(X))
    arrived = y * model.last.weight[1]
    close(found.layers["step"], arrived)
    close(found.layers["first"], h.abs() / h.abs().sum(1, keepdim=True) * arrived.sum(1, keepdim=True))
    assert found.ledger.closes
    assert found.ledger.accounts["held back"] == pytest.approx(0, abs=1e-12)


def test_a_function_of_multipliers_sees_all_that_went_in_and_came_out() -> None:
    met: list[Any] = []

    def rule(module: nn.Module, m: Any, x: Any, y: Any) -> list[Tensor | None]:
        met[:] = [module, *m, *x, *y]
        return [0.5 * m[0], 2 * m[0], None, None]  # in the order of the call

    class Module(nn.Module):
        def forward(self, a: Tensor, mask: Tensor, ids: Tensor, *, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (a * b).tanh() * mask + ids, a.exp(), ids

    mask, ids = torch.rand(3, 5, dtype=torch.float64), torch.arange(5)

    def forward(m: Wired, x: Tensor) -> Tensor:
        return m.last(m.step(m.first(x), b=m.second(x), mask=mask, ids=ids)[0])

    model = Wired(forward, step=Module())
    found = explain(model, X, 1, composite=step(Whole(rule), "step"))
    a, b = model.first(X), model.second(X)
    m = model.last.weight[1].expand(3, 5)
    module, *arrived, first, second, third, fourth, y, none, nothing = met
    assert module is model.step
    close(arrived[0], m)
    assert arrived[1:] == [None, None] == [none, nothing]
    for value, expected in zip((first, second, third), (a, b, mask), strict=True):
        close(value, expected)
    assert fourth is not None
    assert torch.equal(fourth, ids)
    close(y, (a * b).tanh() * mask + ids)
    close(found.relevance, X * ((0.5 * m) @ model.first.weight + (2 * m) @ model.second.weight))
    assert found.ledger.closes
    lost = float((m * y - 0.5 * m * a - 2 * m * b).sum())
    assert found.ledger.accounts["held back"] == pytest.approx(lost)


def test_a_function_for_a_module_that_uses_tensors_at_the_side() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        m.stash.taken = m.second(x)
        return m.last(m.stash(m.first(x)) + m.stash.left)

    model = Wired(forward, stash=Stash())
    found = explain(model, X, 1, composite=step(Whole(lambda module, m, x, y: [m[0]]), "stash"))
    close(found.relevance, X * (model.last.weight[1] @ model.first.weight))
    assert found.ledger.closes


def test_a_function_that_returns_too_few() -> None:
    model = Wired(lambda m, x: m.last(m.two(m.first(x), m.second(x))[0]), two=Two())
    with pytest.raises(RuleError, match=r"Whole failed on submodule in two.*1 values for 2 tensors"):
        explain(model, X, 1, composite=step(Whole(lambda module, m, x, y: [m[0]]), "two"))


def test_a_constant_that_is_changed_later() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        b = torch.ones(3, 5, dtype=torch.float64)
        y = m.two(m.first(x), b)[0]
        b.zero_()
        return m.last(y)

    model = Wired(forward, two=Two())
    with pytest.raises(BrokenPromiseError, match=r"an input of 'two'.*changed in place"):
        explain(model, X, 1, composite=step(Whole(lambda module, m, x, y: [m[0], None]), "two"))


# A composite for a part ------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    body = nn.Sequential(
        nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU()), nn.Flatten(), nn.Linear(64, 16)
    )
    return nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), body, nn.ReLU(), nn.Linear(16, 3)).double()


PICTURE = draw(1, 2, 1, 14)


def test_a_composite_for_a_part_is_the_same_as_its_rules_by_path() -> None:
    inner = Composite.of("inner", {"convolution": ZPlus(), "dense": Epsilon(0.1)})
    nested = Composite.of("nested", {"convolution": Gamma(0.5), "dense": Epsilon(1e-3), When(module="2"): inner})
    flat = Composite.of(
        "flat",
        {
            When("convolution", path="2.*"): ZPlus(),
            When("dense", path="2.*"): Epsilon(0.1),
            "convolution": Gamma(0.5),
            "dense": Epsilon(1e-3),
        },
    )
    model = net()
    same(explain(model, PICTURE, 1, composite=nested), explain(model, PICTURE, 1, composite=flat))
    outer = Composite("outer", nested.entries[:2])
    assert not torch.allclose(
        explain(model, PICTURE, 1, composite=nested).relevance, explain(model, PICTURE, 1, composite=outer).relevance
    )


def test_composites_nest_and_hold_steps() -> None:
    inmost = Composite.of("inmost", {"convolution": AlphaBeta(2.0, 1.0)})
    inner = Composite.of("inner", {When(module="2.2"): inmost, When(module="2.4"): VJP(), "convolution": ZPlus()})
    model = net()
    found = explain(model, PICTURE, 1, composite=step(inner, "2"))
    flat = {
        When("convolution", path="2.2.*"): AlphaBeta(2.0, 1.0),
        When("convolution", path="2.*"): ZPlus(),
        When(module="2.4"): VJP(),
    }
    same(found, explain(model, PICTURE, 1, composite=Composite.of("flat", flat)))
    assert ("held back", "2.4") in found.ledger.by_module()


def test_a_composite_for_a_part_gives_its_layers_and_parameters() -> None:
    model = net()
    found = explain(
        model, PICTURE, 1, composite=step(COMPOSITES["epsilon_plus"], "2"), layers="2.0", parameters="2.4.*"
    )
    expected = explain(model, PICTURE, 1, composite="epsilon_plus", layers="2.0", parameters="2.4.*")
    close(found.layers["2.0"], expected.layers["2.0"], 1e-5)  # behind the last layer with its epsilon of 1e-6
    close(found.parameters["2.4.weight"], expected.parameters["2.4.weight"], 1e-5)


def test_paths_reach_into_operations_that_are_run_again() -> None:
    """A recurrent layer is walked in its decomposed form, whose operations run where it does."""
    model = nn.Sequential(nn.LSTM(4, 3, batch_first=True)).double()
    x, score = torch.randn(2, 5, 4, dtype=torch.float64), lambda y: y[:, -1].sum(1)
    plain, by_path, by_module = (
        explain(model, x, score, composite=composite)
        for composite in (
            Composite.of("plain", {"dense": Epsilon(0.5)}),
            Composite.of("path", {When("dense", path="0"): Epsilon(0.5)}),
            step(Composite.of("inner", {"dense": Epsilon(0.5)}), "0"),
        )
    )
    same(by_path, plain)
    same(by_module, plain)
    assert not torch.allclose(plain.relevance, explain(model, x, score).relevance)


# What cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_and_parameters_inside_a_step(frozen: bool) -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp()).requires_grad_(not frozen)
    with pytest.raises(InputError, match=r"layer 'step\.0' runs inside 'step'"):
        explain(model, X, 1, composite=step(VJP(), "step"), layers="step.0")
    with pytest.raises(InputError, match=r"parameter 'step\.0\.weight' is used inside of 'step'"):
        explain(model, X, 1, composite=step(VJP(), "step"), parameters="step.0.weight")
    found = explain(model, X, 1, composite=step(VJP(), "step"), parameters="first.weight")
    close(found.parameters["first.weight"].sum(), found.relevance.sum())


def test_ids_that_are_read_inside_a_step() -> None:
    model = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(15, 2)).double()
    ids = torch.tensor([[1, 4, 2]])
    with pytest.raises(InputError, match="embedding of integer inputs lies inside of '0'"):
        explain(model, ids, 1, composite=step(VJP(), "0"))
    found = explain(model, ids, 1, composite=step(VJP(), "2"))
    close(found.relevance, explain(model, ids, 1).relevance)


def test_selections_that_meet_no_module() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    with pytest.raises(InputError, match="selects the module 'stepp': no module that has this"):
        explain(model, X, 1, composite=step(VJP(), "stepp"))
    with pytest.raises(InputError, match=r"selects the module 'step\.0': .*only inside"):
        explain(model, X, 1, composite=step(VJP(), "step", "step.0"))
    with pytest.raises(InputError, match=r"needs an nn\.Module"):
        explain(lambda x: model(x), X, 1, composite=step(VJP(), "step"))


def test_a_graph_alone_has_no_modules() -> None:
    model, x = mlp().double(), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InputError, match=r"a graph alone does not tell.*use explain"):
        relevance(model(x)[:, 1], x, composite=step(VJP(), "0"))


def test_conditions_and_rules_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="takes no other condition"):
        When("dense", module="step")
    with pytest.raises(InputError, match="needs the modules it is for"):
        Composite.of("outer", {"dense": COMPOSITES["auto"]})
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    with pytest.raises(InputError, match="gives Epsilon to submodule"):
        explain(model, X, 1, composite=step(Epsilon(), "step"))
    with pytest.raises(InputError, match=r"gives Whole to .*; that rule is for submodule"):
        explain(model, X, 1, composite=Composite.of("whole", {"dense": Whole(proportional)}))
    with pytest.raises(NoPathError):
        explain(model, X, 1, composite=step(Hold(), "step"))


def test_other_entries_leave_steps_alone() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    everything = Composite.of("all", {When(): Gradient(), When(module="step"): Hold()})
    with pytest.raises(NoPathError):
        explain(model, X, 1, composite=everything)


def test_a_step_that_fails_and_is_caught() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.made = self.linear(x)
            raise ValueError

    def forward(m: Wired, x: Tensor) -> Tensor:
        try:
            return m.fails(x)
        except ValueError:
            return m.last(m.step(m.first(x)) + m.fails.made)

    fails = Fails()
    fails.linear = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    found = holds_as_gradient(Wired(forward, fails=fails, step=mlp()), "fails", "step")
    assert {path for account, path in found.ledger.by_module() if account == "held back"} == {"fails", "step"}


def test_an_operation_between_two_inside() -> None:
    """Another thread numbers its operations anew, so that they seem to lie outside."""

    class Aside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: list[Tensor] = []
            y = x.sin()
            thread = threading.Thread(target=lambda: made.append(y.cos()))
            thread.start()
            thread.join()
            return made[0].exp()

    model = Wired(lambda m, x: m.last(m.aside(m.first(x))), aside=Aside())
    with pytest.raises(InputError, match="'aside' cannot be one step"):
        explain(model, X, 1, composite=step(VJP(), "aside"))


def test_no_hook_stays() -> None:
    model = Wired(lambda m, x: m.last(m.step(m.first(x))), step=mlp())
    for rule in (VJP(), Whole(lambda module, m, x, y: 1 / 0)):
        with contextlib.suppress(RuleError):
            explain(model, X, 1, composite=step(rule, "step"))
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_pre_hooks_with_kwargs


# Real models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"), [("bert", "bert.encoder.layer.*"), ("vit", "*.layers.1"), ("llama", "*.mlp")]
)
def test_blocks_of_transformers_by_their_gradient(name: str, module: str) -> None:
    model, inputs, target = sample(name)
    composite = COMPOSITES["gradient_x_input"]
    blocks = Composite("blocks", ((When(module=module), VJP()), *composite.entries))
    found, expected = (explain(model, inputs, target, composite=c) for c in (blocks, composite))
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        close(ours, theirs, 1e-11)
    assert found.ledger.closes
    assert any(account == "held back" and path for account, path in found.ledger.by_module())

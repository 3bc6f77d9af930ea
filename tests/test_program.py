"""Programs: an explanation traced once, for many inputs of one shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynlrp import Explanation, InputError, NonFiniteError, TraceError, explain, trace
from dynlrp.shorten import RESHAPES, SWAPS
from tests.conftest import SAMPLES, Apply, close, sample
from tests.oracle import draw
from tests.test_promise import randomise


def others(inputs: Any) -> Any:
    """Other numbers of the same kind, not those that a trace is checked with."""
    if isinstance(inputs, dict):
        return {**inputs, "input_ids": inputs["input_ids"].roll(1, 1).flip(0)}
    return draw(99, *inputs.shape).to(inputs.dtype)


def equal(a: Explanation, b: Explanation) -> None:
    """All relevance, values and amounts are the same numbers."""
    for one, other in zip(a.everything(), b.everything(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(a.value, b.value)
    assert repr(a.ledger) == repr(b.ledger)
    assert a.ledger.by_module() == b.ledger.by_module()


def convolutions() -> nn.Module:
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(36, 5),
        )
    )  # fmt: skip


@pytest.mark.parametrize("composite", ["auto", "epsilon"])
@pytest.mark.parametrize("name", SAMPLES)
def test_other_inputs_get_what_explain_gives_them(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    program = trace(model, inputs, target, composite=composite)
    fresh = others(inputs)
    equal(program(fresh), explain(model, fresh, target, composite=composite))


@pytest.mark.parametrize(
    "options",
    [
        {"composite": "epsilon_alpha2_beta1", "layers": "*", "parameters": "*.weight"},
        {"composite": "dynamiclrp"},
        {"composite": "epsilon_plus", "condition": {"0": [1, 2]}},
        {"target": lambda y: (y * y).sum(1)},
        {"target": draw(3, 2, 5)},
        {"composite": "epsilon", "precision": torch.float64, "layers": ["2", "6:input"]},
    ],
)
def test_whatever_is_asked(options: dict[str, Any]) -> None:
    model = convolutions()
    if "precision" in options:
        model.float()
    inputs = draw(1, 2, 3, 12, 12).to(next(model.parameters()).dtype)
    program = trace(model, inputs, **options)
    found, expected = program(others(inputs)), explain(model, others(inputs), **options)
    equal(found, expected)
    assert found.layers.keys() == expected.layers.keys()
    assert found.promises.count == expected.promises.count


def test_frozen_weights_and_values_that_a_second_run_records() -> None:
    """Nothing saves what the second layer is given, and it cannot be recomputed."""

    def forget(x: Tensor) -> Tensor:
        return x.mul_(1.5).add_(x.detach().new_ones(()))

    model = randomise(nn.Sequential(nn.Linear(4, 4), Apply(forget), nn.Linear(4, 3))).requires_grad_(False)
    inputs = draw(1, 2, 4)
    program = trace(model, inputs, composite="epsilon_plus")
    equal(program(others(inputs)), explain(model, others(inputs), composite="epsilon_plus"))


def test_other_kinds_of_inputs() -> None:
    """Keyword arguments that are no tensors stand as they were; memory may lie in another order."""

    class Two(nn.Module):
        def forward(self, x: Tensor, factor: float, y: Tensor) -> Tensor:
            return (x.view(-1, 2).relu() * factor).view(2, -1) @ y

    inputs = {"x": draw(0, 2, 4), "factor": 2.0, "y": draw(1, 4, 3)}
    program = trace(Two(), inputs)
    other = {"x": draw(2, 4, 2).t(), "factor": 2.0, "y": draw(3, 4, 3)}
    expected = explain(Two(), {**other, "x": other["x"].contiguous()})
    equal(program(other), expected)
    assert program(other).relevance["factor"] is None
    with pytest.raises(InputError, match=r"traced for 2.0 as input 1 and was given 3.0"):
        program({**other, "factor": 3.0})


def test_training_goes_on() -> None:
    """A program reads parameters where they are, and the model is not called."""
    model = convolutions()
    inputs = draw(1, 2, 3, 12, 12)
    program = trace(model, inputs)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(inputs).square().sum().backward()
    optimiser.step()
    calls: list[int] = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        found = program(inputs)
    assert not calls
    equal(found, explain(model, inputs))


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_what_was_replaced_is_an_error(name: str) -> None:
    """The program would go on with the tensor of old."""
    model = convolutions()
    inputs = draw(1, 2, 3, 12, 12)
    program = trace(model, inputs)
    tensor = getattr(model[1], name).detach() + 1
    setattr(model[1], name, nn.Parameter(tensor) if name == "weight" else tensor)
    with pytest.raises(TraceError, match=f"{name} of the model was replaced"):
        program(inputs)
    equal(trace(model, inputs)(inputs), explain(model, inputs))


def test_a_moved_model_is_an_error() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    ids = torch.tensor([[1, 2, 3]])
    program = trace(model, ids)
    model.float()
    with pytest.raises(TraceError, match="replaced or moved"):
        program(ids)


class Counting(nn.Module):
    """Writes to a buffer that its output depends on."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.register_buffer("calls", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        linear: Tensor = self.linear(x)
        return linear + self.calls.clone()


def test_buffers_that_the_model_writes_to_stay_as_they_are() -> None:
    model = Counting()
    program = trace(model, draw(1, 3, 4))
    assert not model.calls.any()
    for seed in (2, 3):
        inputs = draw(seed, 3, 4)
        equal(program(inputs), explain(model, inputs))
        assert not model.calls.any()


def test_everything_stays_as_it_is() -> None:
    model = convolutions()
    inputs = draw(1, 2, 3, 12, 12).requires_grad_()
    before = [t.clone() for t in model.state_dict().values()]
    state, compiling = torch.get_rng_state(), torch.compiler.is_compiling()
    trace(model, inputs)(inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.compiler.is_compiling() == compiling
    assert all(p.grad is None and p.requires_grad for p in (*model.parameters(), inputs))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_programs_of_compiled_kernels_agree(dtype: torch.dtype, tolerance: float) -> None:
    """Up to the rounding of a few operations, which compiled kernels leave out in half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4))
    model, x = model.to(dtype).eval(), torch.randn(3, 6).to(dtype)
    expected = explain(model, x).relevance
    found = trace(model, x).compile(backend="inductor")(x).relevance
    assert found.dtype == dtype
    close(found, expected, tolerance)


def test_compiled_programs_agree() -> None:
    model = convolutions()
    inputs = draw(1, 2, 3, 12, 12)
    program = trace(model, inputs, layers="2").compile(backend="aot_eager")
    first = program(inputs)
    kept = first.relevance.clone()
    program(others(inputs))
    assert torch.equal(first.relevance, kept)
    equal(first, explain(model, inputs, layers="2"))


class Branch(nn.Module):
    """Does something that depends on numbers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def by_numpy(y: Tensor) -> Tensor:
    return y * torch.from_numpy(np.abs(y.detach().numpy()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: y * 2 if y.sum() > 0 else y * 3, r"asks for the numbers of a tensor \(test_program.py:\d+: .*sum"),
        (lambda y: y * y.detach().max().item(), r"asks for the numbers of a tensor"),
        (lambda y: y + y[y > 0].sum(), r"the shape of what aten.index.Tensor returns"),
        (lambda y: y + y[torch.nonzero(y[0] > 0)].sum(), r"the shape of what aten.nonzero"),
        (by_numpy, r"for other inputs of the same shapes the model computes something else"),
    ],
)
def test_what_no_straight_line_has(function: Callable[[Tensor], Tensor], message: str) -> None:
    model = Branch(function)
    explain(model, draw(0, 2, 4))
    with pytest.raises(TraceError, match=message):
        trace(model, draw(0, 2, 4))


@pytest.mark.parametrize("half", [False, True])
def test_a_way_without_numbers_may_round_in_another_way_in_half_precision(half: bool) -> None:
    """What the two ways give differs by 1 of 256, the rounding of bfloat16 and much in float64."""

    def function(y: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool(y.isnan().any()):
            raise ValueError
        return y if torch.compiler.is_compiling() else (y + 64) - 64

    dtype = torch.bfloat16 if half else torch.float64
    model, x = Branch(function).to(dtype), draw(0, 2, 4).to(dtype)
    program = trace(model, x)
    assert torch.equal(program(x).relevance, explain(model.layer, x).relevance)
    assert torch.allclose(program(x).relevance, explain(model, x).relevance, rtol=0.05) != half
    with pytest.raises(TraceError, match="computes something else") if not half else nullcontext():
        trace(Branch(lambda y: y if torch.compiler.is_compiling() or y.isnan().any() else y * 1.01).to(dtype), x)


def test_other_inputs_to_compare_with() -> None:
    """Offsets do not count when they are flipped."""

    def bag(ids: Tensor, offsets: Tensor) -> Tensor:
        return nn.functional.embedding_bag(ids, table, offsets, mode="sum")

    table = draw(0, 10, 3).requires_grad_()
    inputs = (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2]))
    with pytest.raises(InputError, match="pass others="):
        trace(bag, inputs)
    program = trace(bag, inputs, others=(torch.tensor([4, 0, 1, 1]), torch.tensor([0, 1])))
    fresh = (torch.tensor([9, 2, 2, 7]), torch.tensor([0, 3]))
    equal(program(fresh), explain(bag, fresh))


def test_constants_that_add_up_to_nothing_for_some_inputs() -> None:
    """Nobody keeps what a remainder leaves out, and below the divisor it is nothing; for other inputs it is booked."""
    model = nn.Sequential(Apply(lambda x: x.remainder(1.5)), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    model.requires_grad_(False)  # which saves nothing
    small, large = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = large * 5
    program = trace(model, small, 1, others=large)
    for x in (small, large, large * 3):
        found, expected = program(x), explain(model, x, 1)
        assert torch.equal(found.relevance, expected.relevance)
        assert found.ledger.closes
        assert found.ledger.unresolved == []
        assert found.ledger.accounts == pytest.approx(expected.ledger.accounts)
    assert program(large).ledger.accounts["constants"] != 0.0


def test_inputs_that_do_not_fit() -> None:
    model = convolutions()
    program = trace(model, draw(1, 2, 3, 12, 12))
    with pytest.raises(
        InputError, match=r"\(2, 3, 12, 12\) torch.float64 on cpu as input 0 and was given .*\(1, 3, 12, 12\)"
    ):
        program(draw(1, 1, 3, 12, 12))
    with pytest.raises(InputError, match=r"float64 on cpu as input 0 and was given .*float32"):
        program(draw(1, 2, 3, 12, 12).float())
    with pytest.raises(
        InputError, match=r"for other inputs, torch.float64 of shape .* given 1 positional argument\(s\): torch.float64"
    ):
        program([draw(1, 2, 3, 12, 12)])
    with pytest.raises(NonFiniteError, match="input 0 holds NaN"):
        program(torch.full((2, 3, 12, 12), torch.nan, dtype=torch.float64))


def test_checkpoints_are_part_of_the_line() -> None:
    model = Branch(lambda y: checkpoint(lambda v: v.relu().square(), y, use_reentrant=False))  # type: ignore[no-any-return]
    program = trace(model, draw(0, 2, 4))
    equal(program(draw(1, 2, 4)), explain(model, draw(1, 2, 4)))


def test_autocast_is_that_of_the_trace() -> None:
    model = convolutions().float()
    inputs = draw(1, 2, 3, 12, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        half, expected = trace(model, inputs), explain(model, others(inputs))
    equal(half(others(inputs)), expected)
    whole, expected = trace(model, inputs), explain(model, others(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        equal(whole(others(inputs)), expected)


def test_programs_have_no_views_that_are_not_needed() -> None:
    model, inputs, target = sample("bert")
    program = trace(model, inputs, target)
    found: dict[Any, Any] = {}
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            assert node.target not in found
            found[node.target] = node
        elif node.target in RESHAPES:
            assert node.args[0].meta["val"].shape != node.meta["val"].shape
            assert node.args[0].target not in RESHAPES or not node.args[0].args[0].meta["val"].is_contiguous()
        elif node.target in SWAPS:
            assert node.args[0].target not in SWAPS
        if node.target in RESHAPES | SWAPS:
            key = (node.target, *node.args)
            assert key not in found
            found[key] = node


def test_views_that_are_written_into_stay_views() -> None:
    def score(x: Tensor) -> Tensor:
        y = x * 2
        flat = y.view(2, 3, 4).view(6, 4)
        flat.t().t().view(24)[::2].mul_(0.5)
        return y.view(2, 12).view(2, 3, 4).exp().flatten(1)

    x = draw(1, 2, 3, 4)
    program = trace(score, x, 5)
    equal(program(x), explain(score, x, 5))
    equal(program(x * 0.5), explain(score, x * 0.5, 5))

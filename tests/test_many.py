"""Many targets from one forward: each equals its own run, in one traversal or in chunks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import (
    COMPOSITES,
    Composite,
    Contrast,
    DynLRPError,
    InputError,
    NonFiniteError,
    TargetError,
    When,
    explain,
    explain_many,
    rules,
)
from dynlrp.run import Run
from tests import oracle
from tests.conftest import SAMPLES, close, same, sample
from tests.operators import OPERATORS, Case, cases
from tests.peers import models as peers

FAST = [name for name in SAMPLES if name != "efficientnet"]


@contextmanager
def passes() -> Iterator[list[int]]:
    """How many seeds each pass was for."""
    sizes: list[int] = []
    batched, alone = Run._batched, Run._pass
    inside = []

    def count_batched(self: Any, numbers: Any) -> Any:
        inside.append(True)
        try:
            found = batched(self, numbers)
        finally:
            inside.pop()
        sizes.append(len(numbers))
        return found

    def count_alone(*args: Any) -> Any:
        if not inside:
            sizes.append(1)
        return alone(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_batched", count_batched)
        patch.setattr(Run, "_pass", count_alone)
        yield sizes


def some(target: Any) -> list[Any]:
    return [(-1, 0), (-1, 3), (2, 1)] if isinstance(target, tuple) else [0, 2, None]


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", FAST)
def test_each_equals_its_own_run(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    layer = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    wanted: dict[str, Any] = {"composite": composite, "layers": layer, "parameters": f"{layer}.*"}
    with passes() as sizes:
        many = explain_many(model, inputs, some(target), **wanted)
    assert set(sizes) == {3}  # twice, where a value has to be recorded
    for one, found in zip(some(target), many, strict=True):
        alone = explain(model, inputs, one, **wanted)
        same(found, alone, 1e-12)
        for ours, expected in ((found.layers, alone.layers), (found.parameters, alone.parameters)):
            assert ours.keys() == expected.keys()
            for name, r in expected.items():
                assert (ours[name] is None) == (r is None)
                if r is not None:
                    close(ours[name], r, 1e-12)
        assert found.ledger.by_module().keys() == alone.ledger.by_module().keys()
        assert found.ledger.closes
        assert found.promises == alone.promises


@pytest.mark.parametrize("name", ["vgg", "bert"])
def test_float32(name: str) -> None:
    model, inputs, _ = sample(name)
    model.float()
    inputs = inputs.float() if isinstance(inputs, Tensor) else inputs
    try:
        for target, found in enumerate(explain_many(model, inputs, range(3))):
            same(found, explain(model, inputs, target), 2e-6)
    finally:
        model.double()


@pytest.mark.parametrize(("chunk", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (9, [5]), (None, [5])])
def test_chunks(chunk: int | None, expected: list[int]) -> None:
    model, inputs, _ = sample("vgg")
    with passes() as sizes:
        many = explain_many(model, inputs, "all", chunk=chunk)
    assert sizes == expected
    for target, found in enumerate(many):
        same(found, explain(model, inputs, target), 1e-12)


def test_a_chunk_is_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = sample("vgg")
    largest = max(h.numel() * 8 for h in (model[:n](inputs) for n in range(len(model) + 1)))
    monkeypatch.setattr("dynlrp.run.MEMORY", 8 * largest * 3)
    with passes() as sizes:
        explain_many(model, inputs, "all")
    assert max(sizes) <= 3
    assert sum(sizes) == 5


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = sample("vgg")
    batched, tried = Run._batched, []

    def limited(self: Any, numbers: Any) -> Any:
        tried.append(len(numbers))
        if len(numbers) > 2:
            raise torch.OutOfMemoryError
        return batched(self, numbers)

    monkeypatch.setattr(Run, "_batched", limited)
    many = explain_many(model, inputs, "all")
    assert tried == [5, 2, 3, 2]
    for target, found in enumerate(many):
        same(found, explain(model, inputs, target), 1e-12)


def test_an_operation_that_takes_one_multiplier_at_a_time(registry: dict[str, Any]) -> None:
    """A rule that looks at numbers cannot be vmapped; the result is the same."""

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 3

    @rules.rule("LooksBackward")
    def looks(step: Any, multipliers: Any) -> list[Tensor]:
        (m,) = multipliers
        return [m * 3 if float(m.abs().sum()) > 0 else m]

    first, last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def model(x: Tensor) -> Tensor:
        return last(Looks.apply(first(x)))  # type: ignore[no-any-return, no-untyped-call]

    x = oracle.draw(0, 2, 4)
    with passes() as sizes:
        many = explain_many(model, x, range(3))
    assert sizes == [1, 1, 1]
    for target, found in enumerate(many):
        same(found, explain(model, x, target), 1e-12)


@pytest.mark.filterwarnings("ignore")  # nested tensors are a prototype
def test_nested_tensors_take_one_multiplier_at_a_time() -> None:
    last = nn.Linear(4, 3).double()

    def model(x: Tensor) -> Tensor:
        parts = torch.nested.as_nested_tensor([x[0, :3], x[1, :4]]) * 2.0
        return last(torch.nested.to_padded_tensor(parts, 0.0))

    x = oracle.draw(0, 2, 4)
    for target, found in enumerate(explain_many(model, x, range(3))):
        same(found, explain(model, x, target), 1e-12)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_distances_take_one_multiplier_at_a_time(order: float) -> None:
    """PyTorch's own batching of their derivative is wrong."""
    first, last = nn.Linear(4, 4).double(), nn.Linear(6, 3).double()

    def model(x: Tensor) -> Tensor:
        h = first(x)
        return last(torch.cdist(h, h[:, :2] * 0.5, order).flatten(1))

    x = oracle.draw(0, 2, 3, 4)
    with passes() as sizes:
        many = explain_many(model, x, range(3))
    assert sizes == [1, 1, 1]
    for target, found in enumerate(many):
        same(found, explain(model, x, target), 1e-12)


class Every(nn.Module):
    """One of every family: embedding, recurrent layer, attention, norms, gates, pooling, an expanded operation."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.group, self.glu = nn.GroupNorm(2, 8), nn.GLU()
        self.conv, self.head = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.layer(self.lstm(self.words(ids))[0])
        h = self.conv(self.group(h.mT).sigmoid() * h.mT).mT
        h = nn.functional.max_pool1d(self.glu(h).mT, 2).cumsum(-1).logsumexp(-1)
        return self.head(nn.functional.normalize(h.reshape(len(h), 2, 4).prod(1), dim=-1))


@pytest.mark.parametrize("composite", ["auto", "cplrp", "epsilon_plus", "dynamiclrp", "gradient_x_input"])
def test_families_of_operations(composite: str) -> None:
    model = peers.randomise(Every(), 2, std=0.5).double().eval()
    ids = torch.tensor([[1, 4, 4, 0, 10, 3], [2, 2, 5, 7, 8, 9]])
    with passes() as sizes:
        many = explain_many(model, ids, "all", composite=composite)
    assert sizes[-1] == 6
    for target, found in enumerate(many):
        same(found, explain(model, ids, target, composite=composite), 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_operators(part: int) -> None:
    """Two targets of every operator of PyTorch's own database: equal to their own runs, and a traversal for each of
    them for three operators alone, which vmap does not know, or not well enough."""
    apart = set()
    for name in list(OPERATORS)[part::4]:
        case = next(cases(OPERATORS[name], torch.float64, 1), None)
        if case is None:
            continue

        def model(*given: Tensor, case: Case = case) -> Tensor:
            outputs = [y for y in case.outputs(*case.arguments(given)) if y.requires_grad]
            y = torch.cat([part.flatten() for y in outputs for part in ((y.real, y.imag) if y.is_complex() else (y,))])
            return torch.where(y.isfinite(), y, 0.0).double() @ oracle.draw(1, len(y), 2).unsqueeze(0)

        torch.default_generator.manual_seed(0)
        try:
            alone = [explain(model, tuple(case.given), target, allow_training=True) for target in (0, 1)]
        except DynLRPError:
            continue
        with passes() as sizes:
            many = explain_many(model, tuple(case.given), [0, 1], allow_training=True)
        for one, found in zip(alone, many, strict=True):
            for expected, ours in zip(one.tensors(), found.tensors(), strict=True):
                assert ours.dtype == expected.dtype
                assert ours.shape == expected.shape
                if expected.numel():
                    oracle.same(ours, expected, 1e-10, scale=1e-3)
        if 1 in sizes:
            apart.add(name)
    assert apart <= {"as_strided_scatter", "cdist", "to_sparse"}


@pytest.mark.parametrize("rule", [rules.VJP(), rules.Taylor(), Composite.of("inner", {"dense": rules.ZPlus()})])
def test_modules_that_are_one_step(rule: Any) -> None:
    """Also of targets that are graphs of their own, which share the module's call."""
    model = peers.randomise(
        nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3)), 3
    )
    model.double()
    composite = Composite.of("steps", {When(module="1"): rule})
    targets: list[Any] = [0, 2, lambda y: y[:, 0] * 2, lambda y: y[:, 1]]
    conditions = [{"0": [1, 2]}]
    x = oracle.draw(0, 3, 4)
    many = explain_many(model, x, targets, conditions=conditions, composite=composite, layers="1")
    for target, found in zip(targets, many, strict=True):
        alone = explain(model, x, target, condition=conditions[0], composite=composite, layers="1")
        same(found, alone, 1e-12)
        close(found.layers["1"], alone.layers["1"], 1e-12)
    composite_of_gradient = Composite.of("step", {When(module="1"): rules.VJP()})
    with pytest.raises(InputError, match="runs inside '1'"):
        explain(model, x, 0, composite=composite_of_gradient, condition={"1.0:input": [0]})


def test_targets_of_every_kind() -> None:
    """Functions, initial relevance and contrasts beside plain targets, in their order."""
    model, inputs, _ = sample("vgg")
    initial = oracle.draw(0, 2, 5)
    targets: list[Any] = [1, lambda y: y[:, 1] - y[:, 2], [0, 4], initial, None, Contrast(1, 2), Contrast([0, 1], None)]
    with passes() as sizes:
        many = explain_many(model, inputs, targets)
    assert sorted(sizes) == [1, 1, 5]
    for target, found in zip(targets, many, strict=True):
        same(found, explain(model, inputs, target), 1e-12)
    same(many[5], many[1], 1e-10)


def test_a_contrast_is_the_difference_of_two_explanations() -> None:
    """Multipliers are linear in where they start, as long as no rule needs relevance itself."""
    model, inputs, _ = sample("bert")
    one, other = explain_many(model, inputs, [2, 0], composite="attnlrp")
    contrast = explain(model, inputs, Contrast(2, 0), composite="attnlrp")
    close(contrast.tensors()[0], one.tensors()[0] - other.tensors()[0], 1e-10)
    close(contrast.value, one.value - other.value)
    every = explain_many(model, inputs, "all", composite="attnlrp")
    rest = sum(e.tensors()[0] for e in every[1:]) / (len(every) - 1)
    close(explain(model, inputs, Contrast(0), composite="attnlrp").tensors()[0], every[0].tensors()[0] - rest, 1e-10)
    close(
        explain(model, inputs, Contrast(), composite="attnlrp").value,
        torch.stack([(r.max() * len(r) - r.sum()) / (len(r) - 1) for r in model(**inputs).logits.detach()]),
        1e-10,
    )


@pytest.mark.parametrize("wrong", [lambda y: y[:, 0], torch.ones(2, 5, dtype=torch.float64), Contrast(1, 2)])
def test_contrasts_are_between_outputs(wrong: Any) -> None:
    model, inputs, _ = sample("vgg")
    with pytest.raises(TargetError, match="between two outputs"):
        explain(model, inputs, Contrast(1, wrong))


def test_masked_outputs_do_not_spoil_a_value() -> None:
    model = nn.Linear(3, 3)
    mask = torch.tensor([0.0, -torch.inf, 0.0])
    explanation = explain(lambda x: model(x) + mask, torch.randn(2, 3), Contrast(0, 2))
    assert explanation.ledger.closes


def test_pairs_of_positions_and_tokens() -> None:
    model, inputs, _ = sample("gpt2")
    y = model(**inputs).logits
    many = explain_many(lambda **given: model(**given).logits[:, -2:, :3], inputs, "all")
    assert len(many) == 6
    close(many[4].value, y[:, -1, 1].detach())
    same(many[4], explain(model, inputs, (-1, 1)), 1e-12)


@pytest.mark.parametrize("arguments", [{"targets": []}, {"conditions": []}, {"chunk": 0}])
def test_options_are_checked(arguments: Any) -> None:
    model, inputs, _ = sample("vgg")
    with pytest.raises(InputError):
        explain_many(model, inputs, **arguments)


def test_what_is_not_finite_is_found_among_many() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight[1] = 3e38
    with pytest.raises(NonFiniteError, match="not finite first behind MmBackward0"):
        explain_many(model, torch.full((1, 2), 3.0), [0, 1])


def test_nothing_is_left_behind() -> None:
    """No tensor outlives the explanations."""
    model, inputs, _ = sample("bert")

    def tensors() -> int:
        gc.collect()
        return sum(type(found) is Tensor for found in gc.get_objects())

    explain_many(model, inputs, "all")
    before = tensors()
    explain_many(model, inputs, "all")
    assert tensors() == before


def test_shared_weights_are_the_sum_of_untied_copies() -> None:
    """With rules that divide, in a net that runs one module three times."""

    class Shared(nn.Module):
        def __init__(self, lines: list[nn.Linear]) -> None:
            super().__init__()
            self.lines = nn.ModuleList(lines)

        def forward(self, x: Tensor) -> Tensor:
            for line in self.lines:
                x = x + line(x).relu()
            return x

    torch.manual_seed(4)
    line = nn.Linear(5, 5).double()
    untied = [nn.Linear(5, 5).double() for _ in range(3)]
    for copy in untied:
        copy.load_state_dict(line.state_dict())
    x = oracle.draw(1, 3, 5)
    for composite in ("attnlrp", "epsilon_plus", "epsilon_alpha2_beta1"):
        tied = explain(Shared([line] * 3), x, 2, composite=composite, parameters="*")
        apart = explain(Shared(untied), x, 2, composite=composite, parameters="*")
        assert list(tied.parameters) == ["lines.0.weight", "lines.0.bias"]
        for name in ("weight", "bias"):
            each = [apart.parameters[f"lines.{n}.{name}"] for n in range(3)]
            close(tied.parameters[f"lines.0.{name}"], sum(each))  # type: ignore[arg-type]
        same(tied, apart)


def test_a_glob_finds_a_tied_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = oracle.draw(1, 3, 4)
    assert list(explain(model, x, 2, parameters=["*.weight", "?.weight"]).parameters) == ["0.weight"]
    both = explain(model, x, 2, parameters=["*.weight", "2.weight"]).parameters
    close(both["0.weight"], both["2.weight"])

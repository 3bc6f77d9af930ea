"""The benchmarks' own functions, on tiny cases and without the libraries that they compare with."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import charts, exactness, faults, speed
from benchmarks.architectures import Case
from benchmarks.results import table, write_section
from benchmarks.rivals import METHODS, Method
from benchmarks.rivals.plain import integrated_gradients
from benchmarks.timing import Timing, interleaved, peak_memory, slope
from dynlrp import explain


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 16, 5),
    )  # fmt: skip
    return Case(model.eval(), torch.randn(2, 3, 8, 8)).to(torch.float64)


class Masked(nn.Module):
    """Takes ids of masks beside what is explained, as transformers do."""

    def forward(self, mask: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"scores": (mask[..., None] * x).cumsum(1)}


def test_every_method_that_is_there_gives_relevance_and_leaves_the_model_alone(case: Case) -> None:
    target = torch.tensor([3, 1])
    before, state = case.run(), {key: value.clone() for key, value in case.model.state_dict().items()}
    names = [name for name, method in METHODS.items() if method.installed and method.fits(case)]
    assert {"dynlrp auto", "gradient", "Grad-CAM", "random"} <= set(names)
    for name in names:
        found = METHODS[name](case, target)
        assert found.shape == case.x.shape, name
        assert found.isfinite().all(), name
        assert not found.requires_grad, name
        assert torch.equal(found, METHODS[name](case, target)), f"{name} is not repeatable"
        assert torch.equal(case.run(), before), f"{name} altered the model"
        after = case.model.state_dict()
        assert list(after) == list(state), name
        assert all(torch.equal(after[key], state[key]) for key in state), name


def test_composites_that_equal_methods_can_be_used(case: Case) -> None:
    for method in METHODS.values():
        if method.composite is not None:
            assert explain(case.model, case.inputs, 1, composite=method.composite).ledger.closes, method.name


def test_gradient_x_input_equals_the_composite(case: Case) -> None:
    method = METHODS["gradient x input"]
    ours = explain(case.model, case.inputs, [3, 1], composite=method.composite).relevance
    # The same products in another order, float64.
    torch.testing.assert_close(method(case, torch.tensor([3, 1])), ours, rtol=1e-12, atol=1e-14)


def test_integrated_gradients_are_complete() -> None:
    torch.manual_seed(0)
    case = Case(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 6)).to(torch.float64)
    target = torch.tensor([2, 1])
    expected = case.scores(target) - case.at(torch.zeros_like(case.x)).scores(target)
    # The midpoint rule's error is 1/24 of the second derivative times the step of 1/32 squared: some 1e-4.
    torch.testing.assert_close(integrated_gradients(case, target).sum(1), expected, rtol=0, atol=5e-4)


def test_the_explained_input_is_the_first_with_floating_point_numbers() -> None:
    x = torch.rand(2, 3, 4, dtype=torch.float64)
    case = Case(Masked(), {"mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "x": x}, "scores")
    assert case.name == "x"
    assert case.x is x
    # The last position's output sums over positions; its gradient is the mask.
    target = torch.tensor([8, 9])
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    expected[0, :2, 0] = expected[1, :, 1] = 1
    assert torch.equal(METHODS["gradient"](case, target), expected)
    assert torch.equal(case.scores(target), case.run().flatten(1)[[0, 1], [8, 9]])
    assert torch.equal(case.scores(), case.run().flatten(1).amax(1))


def test_the_timing_loop_takes_turns_and_keeps_first_calls_apart() -> None:
    order: list[str] = []
    first, second = interleaved([lambda: order.append("a"), lambda: order.append("b")], 2, inner=2, warm=2)
    # Round 0 is one call of each, later rounds two of each; the last two of four rounds count.
    assert "".join(order) == "ab" + "aabb" * 3
    assert len(first.later) == len(second.later) == 2
    assert first.first > 0


def test_a_budget_ends_the_rounds_but_not_before_one_counts() -> None:
    calls: list[int] = []
    (timing,) = interleaved([lambda: calls.append(1)], 9, warm=2, budget=0.0)
    assert len(timing.later) == 1
    assert len(calls) == 3


def test_median_and_spread() -> None:
    timing = Timing(0.5, [1.0, 2.0, 4.0, 5.0, 9.0])
    assert timing.median == 4
    # Quartiles of five values by the exclusive method: 1.5 and 7.
    assert timing.spread == pytest.approx((7 - 1.5) / 2 / 4)


def test_peak_memory_is_that_of_what_lives_at_once() -> None:
    def function() -> None:
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(500_000)
        third = torch.empty(250_000)
        del second, third

    function()
    # 4 bytes per number; the profiler sees blocks as they are asked for.
    assert peak_memory(function) == 4_000_000


def test_slope_of_powers() -> None:
    assert slope([10, 100, 1000], [3e-4, 3e-2, 3.0]) == pytest.approx(2)


def test_rows_of_the_grid_name_what_fails(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case, target: Tensor | None) -> Tensor:
        raise ValueError("no rule for this\nand more")

    monkeypatch.setitem(METHODS, "zennit Epsilon", Method("zennit Epsilon", fails, composite="epsilon"))
    methods = ["dynlrp epsilon", "zennit Epsilon", "gradient x input"]
    ours, failed, plain = speed.measure("tiny", case, speed.Load(), methods, rounds=2, budget=60.0)
    assert failed.error == "ValueError: no rule for this"
    assert ours.time > 0
    assert ours.memory > 0
    assert plain.memory >= 1  # the product is one tensor more
    assert ours.weights == sum(p.numel() for p in case.model.parameters())
    assert "no rule for this" in speed.table_of_rows([ours, failed, plain], {"": ""}).splitlines()[3]


def row(model: str, method: str, time: float, memory: float = 1.0, weights: int = 80_000_000) -> speed.Row:
    return speed.Row(model, weights, "1 x 128", method, 0.1, time, 0.01, 1.5, 2**20, memory)


def test_goals_hold_each_composite_against_the_library_that_does_the_same() -> None:
    net = "VGG16"
    rows = [
        row(net, "dynlrp epsilon", 1.2), row(net, "dynlrp epsilon_plus", 1.8), row(net, "dynlrp auto", 1.5, 1.6),
        row(net, "zennit Epsilon", 3.0), row(net, "zennit EpsilonPlus", 3.0), row(net, "autoLRP attnlrp", 4.0),
        row("text", "dynlrp attnlrp", 1.0), row("text", "LXT AttnLRP", 0.9),
        row("tiny", "dynlrp epsilon", 9.0, weights=9),
        replace(row(net, "dynlrp epsilon", 9.0, 1.1), setting="once", spread=0.0),
    ]  # fmt: skip
    points = [speed.Point("layers", n, "dynlrp epsilon", n**1.5, n) for n in (10, 100, 1000)]
    missed = [goal.missed for goal in speed.goals(rows, points)]
    assert missed == [
        {"VGG16, 1 x 128, epsilon": 1.2},  # neither the tiny net nor AttnLRP's 1.0
        {"VGG16, 1 x 128, epsilon_plus": 1.8},
        {"VGG16, 1 x 128, zennit EpsilonPlus": pytest.approx(1.8 / 3)},  # 1.2 of 3 and 1.5 of 4 are within a half
        {"text, 1 x 128, LXT AttnLRP": pytest.approx(1 / 0.9)},
        {"dynlrp epsilon": pytest.approx(1.5)},
        {"VGG16, once, epsilon": 1.1},  # memory needs no second round, time does
        {"VGG16, 1 x 128, auto": 1.6},
        {},
    ]
    first = speed.table_of_goals(speed.goals(rows, points)).splitlines()[2]
    assert first.endswith("| 1 of 2 | 1.200: VGG16, 1 x 128, epsilon |")


def test_rows_that_are_measured_again_replace_the_old(tmp_path: Path) -> None:
    old, new = row("net", "dynlrp epsilon", 1.2), row("net", "dynlrp epsilon", 1.1)
    point = speed.Point("layers", 10, "dynlrp epsilon", 0.5, 100)
    lines = [{"part": "grid", **asdict(old)}, {"part": "scaling", **asdict(point)}, {"part": "grid", **asdict(new)}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert speed.read(path) == ([new], [], [point])


def test_readings_of_exactness() -> None:
    def compared(method: str, model: str, difference: float, exact: float | None = None) -> str:
        return exactness.reading(exactness.Comparison(model, method, difference, exact, 1.0, 1.0, 1.0, 1e-16))

    assert compared("LXT AttnLRP", "BERT", 2e-7) == "equal"
    assert compared("zennit Epsilon", "ResNet-50", 1e-3, 1e-9) == "equal but for a stabiliser"
    assert compared("zennit Epsilon", "ResNet-50", 1e-3, 1e-4) == "unexplained"
    assert compared("captum LRP", "ResNet-50", 1e35, 1e20) == "sums"


def test_a_method_is_compared_with_the_composite_that_has_its_rules(case: Case) -> None:
    double = Method("twice", lambda case, target: 2 * METHODS["dynlrp epsilon"](case, target), composite="epsilon")
    found = exactness.compare("tiny", case, double)
    assert found.difference == pytest.approx(1)
    assert found.cosine == pytest.approx(1)
    assert found.theirs == pytest.approx(2 * found.ours)
    assert found.residual < 1e-10


def test_the_oracle_of_the_shared_layer_is_what_is_explained() -> None:
    model, x = faults.Twice(), faults.draw(1, 6, seed=2)
    truth = model.oracle(x)
    # No bias: relevance is all of the output; and the oracle is a product of matrices, not one of either use alone.
    assert float(truth.sum()) == pytest.approx(model(x)[0, 0].item(), rel=1e-12)
    assert faults.off(faults.ours(model, x).relevance, truth) < 1e-12


def test_what_was_measured_elsewhere_is_marked_and_not_compared() -> None:
    here, there = "8 threads", "1 thread"
    rows = [
        replace(row("net", "dynlrp epsilon", 1.2), where=here),
        replace(row("net", "captum LRP", 2.0), where=here),
        replace(row("net", "zennit Epsilon", 2.0), where=there),
    ]
    marks = speed.places(rows)
    assert marks == {here: "", there: "¹"}
    lines = speed.table_of_rows(rows, marks).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["dynlrp epsilon", "captum LRP", "zennit Epsilon¹"]
    half = speed.goals(rows, [])[2]
    assert half.figures == {"net, 1 x 128, captum LRP": pytest.approx(0.6)}


def test_a_section_is_replaced_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    for title, text in (("A", "one"), ("B", "two"), ("A", "three")):
        write_section(path, title, text)
    assert path.read_text("utf-8").endswith("## A\n\nthree\n\n## B\n\ntwo\n")
    assert table(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"


def test_charts_are_the_same_for_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "CHARTS", tmp_path / "charts")
    monkeypatch.setattr(charts, "FOLDER", tmp_path)
    rows = [row("net", "dynlrp epsilon", 1.2), row("net", "zennit Epsilon", 3.0)]
    drawn = []
    for _ in range(2):
        assert charts.bars(rows, "time", "time", "speed") == "![time, by model and method](charts/speed.svg)"
        drawn.append((tmp_path / "charts" / "speed.svg").read_text("utf-8"))
    assert drawn[0] == drawn[1]

"""The benchmark of faithfulness on models small enough to check by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.faithfulness import candidates, methods
from benchmarks.faithfulness.problem import Problem
from benchmarks.faithfulness.randomisation import similarity
from dynlrp import COMPOSITES, Composite


def problem(model: nn.Module, inputs: torch.Tensor, network: str = "net") -> Problem:
    return Problem(
        name="test",
        family="convolutional",
        network=network,
        settings="",
        model=model,
        inputs=inputs,
        explained=lambda x, rows: model(x)[:, 0],
        measure=lambda maps, rows: {"sum": maps.flatten(1).sum(1)},
        chunk=2,
        main="sum",
    )


@pytest.fixture
def linear() -> Problem:
    torch.manual_seed(0)
    return problem(nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, 1, bias=False)), torch.randn(3, 2, 4, 4))


@pytest.mark.parametrize("name", ["auto", "gradient x input", "Integrated Gradients"])
def test_on_a_linear_model_attributions_agree(linear, name):
    method = (methods.others(linear) | {"auto": methods.lrp("auto", COMPOSITES["auto"])})[name]
    expected = (linear.inputs * linear.model[1].weight.view(2, 4, 4)).sum(1)
    assert torch.allclose(method(linear, torch.arange(3)), expected, atol=1e-6)
    assert torch.allclose(linear.run(method)["sum"], linear.model(linear.inputs)[:, 0], atol=1e-5)
    assert torch.allclose(linear.run(method, torch.tensor([2]))["sum"], linear.model(linear.inputs)[2:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["gradient", "SmoothGrad"])
def test_of_gradients_the_length_counts(linear, name):
    length = linear.model[1].weight.view(2, 4, 4).norm(dim=0).expand(3, 4, 4)
    assert torch.allclose(methods.others(linear)[name](linear, torch.arange(3)), length, atol=1e-6)


def test_grad_cam_is_for_convolutions(linear):
    assert "Grad-CAM" not in methods.others(linear)
    assert "Grad-CAM" in methods.others(problem(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 4, 4)))


def test_what_ignores_the_weights_fails_the_check_with_shuffled_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 2)).eval()
    case = problem(model, torch.randn(4, 3, 16, 16))
    before = [p.clone() for p in model.parameters()]
    rows = torch.arange(4)
    assert similarity(case, methods.edges, rows).tolist() == pytest.approx([1] * 4)
    assert similarity(case, methods.others(case)["random"], rows).tolist() == pytest.approx([1] * 4)
    found = similarity(case, methods.lrp("epsilon", COMPOSITES["epsilon"]), rows)
    assert found.abs().max() < 0.3  # 256 pixels: 0.06 by chance
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_padding_does_not_count_as_likeness():
    torch.manual_seed(0)
    model, inputs, valid = nn.Linear(8, 1, bias=False), torch.randn(2, 40, 8), (torch.arange(40) < 10).expand(2, -1)
    rows = torch.arange(2)

    def relevance(case, rows):
        return (case.inputs[rows] * valid[:, : case.inputs.shape[1], None]) @ model.weight[0].detach()

    words = similarity(problem(model, inputs[:, :10]), relevance, rows)
    padded = problem(model, inputs)
    assert similarity(replace(padded, valid=valid), relevance, rows).tolist() == pytest.approx(words.tolist())
    assert (similarity(padded, relevance, rows) - words).abs().min() > 0.05


def test_the_variants_of_auto_are_of_the_auto_that_there_is():
    assert Composite.of("auto", candidates.AUTO) == COMPOSITES["auto"]
    rules = [composite.entries for composite in candidates.CONVOLUTIONAL.values()]
    assert len(set(rules)) == len(rules)  # no composite under two names


def results(**networks: dict[str, list[float]]):
    """A result for each network from the methods' numbers."""
    pytest.importorskip("matplotlib")
    from benchmarks.faithfulness.report import Result

    return [
        Result(
            problem(nn.Identity(), torch.randn(2, 1, 2, 2), network),
            ["auto", "other", "third"],
            {name: {"sum": torch.tensor(values)} for name, values in found.items()},
        )
        for network, found in networks.items()
    ]


def test_the_other_networks_choose_for_the_one_that_is_left_out():
    found = results(
        a={"auto": [1.0, 1.0], "other": [2.0, 2.0], "third": [0.0, 4.0], "random": [0.0, 0.0]},
        b={"auto": [10.0, 30.0], "other": [40.0, 40.0], "third": [10.0, 10.0], "random": [0.0, 0.0]},
        c={"auto": [3.0, 3.0], "other": [2.0, 2.0], "third": [2.5, 2.5], "random": [1.0, 1.0]},
    )
    from benchmarks.faithfulness import report

    a, b, c = found
    assert b.points("auto") == pytest.approx(0.5)
    assert c.points("other") == pytest.approx(0.5)  # chance counts as 0
    assert report.ranking([a, b]) == pytest.approx({"other": 1.0, "third": 0.625, "auto": 0.5})
    assert list(report.ranking([b, c])) == ["auto", "other", "third"]
    text = report.choice(found)
    assert "| a | auto | test | 1.000 | 1.000 |  |" in text
    assert "| c | other | test | 2.000 | 3.000 | -1.000 [-1.000, -1.000] |" in text
    assert b.versus("third", "auto") == "-10.000 [-20.000, +0.000]"


def test_tables_have_the_best_first_beside_auto():
    (result,) = results(a={"auto": [1.0, 1.0], "other": [2.0, 2.0], "third": [0.0, 0.0], "random": [0.0, 0.5]})
    from benchmarks.faithfulness import report

    lines = report.text_of(result).splitlines()
    assert lines[-4] == "| other | 2.000 [2.000, 2.000] | +1.000 [+1.000, +1.000] |"
    assert lines[-3] == "| **auto** | 1.000 [1.000, 1.000] |  |"
    assert lines[-2].startswith("| random | 0.250 [0.000, 0.500] | -0.750 [-1.000, -0.500] |")


def test_scores_of_photos_are_probability_logit_and_choice():
    pytest.importorskip("rich")
    from benchmarks.faithfulness import photos

    logits = torch.tensor([[0.0, 1.0], [3.0, 3.0 - torch.log(torch.tensor(3.0))]])
    assert photos.scores(logits, torch.tensor([0, 0])).tolist() == [
        pytest.approx([1 / (1 + torch.e), 0.0, 0.0]),
        pytest.approx([0.75, 3.0, 1.0]),
    ]


def test_a_square_has_two_above_two():
    pytest.importorskip("rich")
    from benchmarks.faithfulness import photos

    parts = [torch.full((1, 1, 2), i) for i in range(4)]
    assert photos.square(parts).tolist() == [[[0, 0, 1, 1], [2, 2, 3, 3]]]


def test_the_retrieval_questions_have_one_answer():
    pytest.importorskip("transformers")
    from benchmarks.faithfulness import retrieval

    ids, answer = retrieval.draw(50, torch.Generator().manual_seed(0))
    for context, questions, start in zip(ids[:, :18].tolist(), ids[:, 18:].tolist(), answer.tolist(), strict=True):
        keys = context[::3]
        assert len(set(keys)) == retrieval.PAIRS
        for query, key, *values in zip(*[iter(questions)] * 4, strict=True):
            assert query == retrieval.QUERY
            at = 3 * keys.index(key) + 1
            assert context[at : at + 2] == values
        assert start == 3 * keys.index(questions[1]) + 1
    assert retrieval.answers(ids)[0].tolist() == [v for i in range(0, 24, 4) for v in ids[0, 18 + i + 2 : 18 + i + 4]]


def test_an_answer_is_found_by_the_two_most_relevant_valid_positions():
    pytest.importorskip("transformers")
    from benchmarks.faithfulness.retrieval import answer_found

    answer = torch.tensor([[False, True, True, False]])
    valid = torch.tensor([[True, True, True, False]])
    found = answer_found(torch.tensor([[2.0, 3.0, -1.0, 9.0]]), answer, valid)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"IoU": 1 / 3, "top-1": 1.0, "top-2": 0.5, "mass on the answer": 0.6}
    )


def test_the_table_of_the_encoder_has_two_values_for_the_key():
    pytest.importorskip("transformers")
    from benchmarks.faithfulness import lookup

    ids, values, answer = lookup.draw(50, torch.Generator().manual_seed(0))
    for (key, *tokens), two, where in zip(ids.tolist(), values.tolist(), answer.tolist(), strict=True):
        pairs = [divmod(token - lookup.KEYS, lookup.VALUES) for token in tokens]
        assert sorted(k for k, _ in pairs) == sorted(2 * list(range(lookup.KEYS)))
        assert [False, *(k == key for k, _ in pairs)] == where
        assert sorted(v for k, v in pairs if k == key) == sorted(two)
        assert len(set(two)) == 2


def test_the_masks_of_shapes_are_what_is_seen():
    pytest.importorskip("skimage")
    pytest.importorskip("transformers")
    from benchmarks.faithfulness import shapes

    scenes = shapes.draw(20, torch.Generator().manual_seed(0))
    assert scenes.masks.sum(1).max() == 1  # no pixel is of two shapes
    assert all(len(set(row)) == shapes.PASTED for row in scenes.classes.tolist())
    one_colour = [
        scenes.images[i][:, mask].std(1).max() for i in range(20) for mask in scenes.masks[i] if mask.sum() > 40
    ]
    assert max(one_colour) < 0.08  # noise of 0.05
    grid = (torch.arange(200) + 0.5) / 100 - 1
    outlines = shapes.outlines(grid.view(1, -1), grid.view(-1, 1))
    assert outlines[0].float().mean().item() == pytest.approx(0.8**2 * torch.pi / 4, rel=0.02)
    assert outlines[2].float().mean().item() == pytest.approx(0.7**2, rel=0.02)

"""The answer as numbers and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import Explanation, InputError, explain, plot
from tests.conftest import bias_free, close, sample
from tests.peers import models as peers

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain(tree: Any) -> Any:
    """The reverse of ``to_dict`` for nested lists."""
    return torch.tensor(tree, dtype=torch.float64)


def test_to_dict_is_json_with_the_same_numbers() -> None:
    model, inputs, _ = sample("bert")
    explanation = explain(model, inputs, 1, layers="classifier", parameters=["classifier.bias", "*pooler*"])
    numbers = json.loads(json.dumps(explanation.to_dict()))
    close(plain(numbers["relevance"]["input_ids"]), explanation.relevance["input_ids"], 0.0)
    assert numbers["relevance"]["attention_mask"] is None
    close(plain(numbers["value"]), explanation.value, 0.0)
    close(plain(numbers["layers"]["classifier"]), explanation.layers["classifier"], 0.0)
    close(plain(numbers["parameters"]["classifier.bias"]), explanation.parameters["classifier.bias"], 0.0)
    assert numbers["composite"] == "auto"
    ledger = numbers["ledger"]
    assert ledger["closes"] is True
    names = ("inputs", "parameters", "constants", "offsets", "absorbed", "held back", "residual")
    assert sum(ledger[name] for name in names) == pytest.approx(ledger["output"])
    assert set(numbers["promises"]) == {"count", "internal", "delta", "density"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(X, list), ((X,), list), ([X], list), ({"input": X}, dict)],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_to_dict_mirrors_the_inputs(inputs: Any, expected: type) -> None:
    relevance = json.loads(json.dumps(explain(bias_free(4, 3), inputs, 1).to_dict()))["relevance"]
    assert isinstance(relevance, expected)
    numbers = relevance["input"] if isinstance(relevance, dict) else relevance
    numbers = numbers if isinstance(inputs, dict | Tensor) else numbers[0]
    close(plain(numbers), explain(bias_free(4, 3), X, 1).relevance, 0.0)


def test_to_dict_with_a_module_called_twice_and_one_without_part() -> None:
    shared = bias_free(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    numbers = json.loads(json.dumps(explain(model, X, 1, layers=["0", "1"]).to_dict()))
    assert len(numbers["layers"]["0"]) == 2
    assert plain(numbers["layers"]["0"]).shape == (2, 2, 4)


def test_repr_of_a_tensor() -> None:
    explanation = explain(bias_free(4, 3), X, 1, composite="epsilon_plus")
    text = repr(explanation)
    assert "\n" not in text
    assert "(2, 4)" in text
    assert "epsilon_plus" in text
    assert "closes" in text
    assert "NOT" not in text
    for value in explanation.value.tolist():
        assert f"{value:.4g}" in text


def test_repr_names_inputs_and_what_is_unattributed() -> None:
    model, inputs, _ = sample("bert")
    text = repr(explain(model, inputs, 1))
    assert "input_ids: (2, 7)" in text
    assert "attention_mask: unattributed" in text
    assert len(text) < 400


def test_repr_of_many_and_of_nested() -> None:
    model = bias_free(4, 3)
    text = repr(explain(model, X.repeat(50, 1), 1))
    assert "..." in text
    assert len(text) < 300
    nested = explain(lambda pair, flag: model(pair["a"]), ({"a": X}, True), 1)
    assert "(2, 4)" in repr(nested)


def test_repr_says_when_the_ledger_does_not_close() -> None:
    explanation = explain(bias_free(4, 3), X, 1)
    explanation.ledger._output = explanation.ledger._output + 1.0
    assert "does NOT close" in repr(explanation)
    assert "does NOT close" in repr(explanation.ledger)


def test_tensors_and_finite() -> None:
    explanation = explain(lambda a, b, mask: a * 2 + b, (X, X, X > 0), 1)
    assert len(explanation.tensors()) == 2
    assert explanation.finite()
    explanation.relevance[0][0, 0] = torch.inf
    assert not explanation.finite()
    explanation.relevance[0][0, 0] = torch.nan
    assert not explanation.finite()


def test_large_but_finite_relevance_is_finite() -> None:
    explanation = explain(bias_free(4, 3).float(), X.float(), 1)
    explanation.relevance[:] = 3e38
    assert explanation.finite()
    explanation.relevance[0] = -3e38
    assert explanation.finite()


def test_promises_of_a_frozen_chain() -> None:
    """A frozen linear layer keeps no input; z-plus needs it, so the layer below is replayed, once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double().requires_grad_(False)
    multipliers = explain(model, X, 1, composite="attnlrp").promises
    assert multipliers.internal == 0
    assert multipliers.delta == 0
    from dynlrp import Composite
    from dynlrp.rules import ZPlus

    report = explain(model, X, 1, composite=Composite.of("z", {"dense": ZPlus()})).promises
    # Three layers wait: the last for its input, two operations deep, the next for its output as well.
    assert report.lengths == (2, 2, 1)
    assert report.internal == 2
    assert report.density == 3 / report.visited
    assert f"{report.count} promises" in repr(report)


def test_pictures_of_a_batch_take_one_entry_per_sample(tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    explanation = explain(nn.Sequential(nn.Flatten(), bias_free(108, 3)), pictures)
    for given in (pictures, list(pictures)):
        assert explanation.save(tmp_path / "batch.png", image=given).exists()
    assert explanation.save(tmp_path / "one.html", image=pictures[1], sample=1).exists()
    with pytest.raises(InputError, match="image= holds 3 entries for 2 samples"):
        explanation.save(tmp_path / "one.png", image=pictures[0])


def test_a_limit_sets_the_full_colour(tmp_path: Path) -> None:
    explanation = explain(bias_free(4, 3), X)
    words, second = ["a", "b", "c", "d"], float(explanation.relevance[0].abs().sort().values[-2])
    page = explanation.save(tmp_path / "x.html", tokens=words, sample=0, limit=second).read_text("utf-8")
    for number, value in enumerate(explanation.relevance[0].tolist()):
        red, green, blue = plot.colours([value], limit=second)[0]
        assert (
            f"background:rgb({red},{green},{blue})" in page.split(f">{words[number]}</span>")[0].rsplit("<span", 1)[1]
        )
    (bars,) = explanation.plot(limit=second).axes[0].containers
    shown = torch.tensor([bar.get_facecolor()[:3] for bar in bars], dtype=torch.float64) * 255
    close(shown, plain(plot.colours(explanation.relevance[0], limit=second).tolist()), 1e-9)


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    explanation = explain(bias_free(4, 3), X)
    with pytest.raises(InputError, match="no sample 2 in a batch of 2"):
        explanation.plot(sample=2)
    with pytest.raises(InputError, match=r"\.png or \.html"):
        explanation.save(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="2 tokens need relevance"):
        explanation.plot(tokens=["a", "b"])
    model, inputs, _ = sample("bert")
    for entry in ("attention_mask", "labels"):
        with pytest.raises(InputError, match=f"no relevance to show in '{entry}'"):
            explain(model, inputs).plot(entry=entry)


def test_relevance_is_plain_data() -> None:
    model, inputs = peers.build("vgg", peers.NETWORKS), peers.inputs((2, 3, 16, 16), 3)
    explanation = explain(model, inputs, 1, layers="0", parameters="0.weight")
    assert isinstance(explanation, Explanation)
    tensors = [
        explanation.relevance,
        explanation.value,
        explanation.layers["0"],
        explanation.parameters["0.weight"],
    ]
    for tensor in tensors:
        assert isinstance(tensor, Tensor)
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
        assert not tensor.is_inference()
    # Independent of the model and the input: changing it changes nothing else.
    before = inputs.clone()
    explanation.relevance.zero_()
    assert torch.equal(inputs, before)

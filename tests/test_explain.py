"""What goes into ``explain`` and what comes out: inputs, targets, outputs, layers, parameters."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import COMPOSITES, Composite, InputError, NoPathError, TargetError, explain
from dynlrp.rules import AlphaBeta, Epsilon, Gamma, ZPlus
from tests.conftest import bias_free, close, gradient_x_input, same, sample
from tests.peers import models as peers


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Inputs -----------------------------------------------------------------------------------------------------

A, B = draw(2, 4, seed=1), draw(2, 3, seed=2)
WA, WB = draw(4, 5, seed=3).requires_grad_(), draw(3, 5, seed=4).requires_grad_()
RA, RB = A * WA[:, 2].detach(), B * WB[:, 2].detach()
"""Relevance of A and B in output 2 of A @ WA + B @ WB."""


class Frozen(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


Pair = namedtuple("Pair", "a b")


def two(a: Tensor, b: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
    return (a @ WA + b @ WB) * scale


def nested(first: Any, second: Any = None) -> Tensor:
    return two(first["a"], first["rest"][0])


def nested_list(first: Any, second: Any) -> Tensor:
    return two(first[1], second["b"])


STRUCTURES: dict[str, tuple[Callable[..., Tensor], Any, Any]] = {
    "tensor": (lambda a: a @ WA, A, RA),
    "tuple": (two, (A, B), (RA, RB)),
    "list": (two, [A, B], [RA, RB]),
    "named tuple": (two, Pair(A, B), Pair(RA, RB)),
    "dict": (two, {"b": B, "a": A}, {"b": RB, "a": RA}),
    "user dict": (two, UserDict(a=A, b=B), {"a": RA, "b": RB}),
    "mapping": (two, Frozen(a=A, b=B), {"a": RA, "b": RB}),
    "number": (two, (A, B, 2.0), (2 * RA, 2 * RB, None)),
    "None": (two, {"a": A, "b": B, "mask": None}, {"a": RA, "b": RB, "mask": None}),
    "bool": (two, {"a": A, "b": B, "mask": A > 0}, {"a": RA, "b": RB, "mask": None}),
    "int": (two, {"a": A, "b": B, "mask": torch.ones(2, 4).long()}, {"a": RA, "b": RB, "mask": None}),
    "nested": (nested, ({"a": A, "rest": (B,)},), ({"a": RA, "rest": (RB,)},)),
    "nested list": (nested_list, ([None, A], {"b": B}), ([None, RA], {"b": RB})),
    "nested user dict": (nested, (UserDict(a=A, rest=(B,)), A), (UserDict(a=RA, rest=(RB,)), None)),
}


def equal_trees(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        close(found, expected)
    elif expected is None:
        assert found is None
    elif isinstance(expected, Mapping):
        assert isinstance(found, Mapping)
        assert list(found) == list(expected)
        for key in expected:
            equal_trees(found[key], expected[key])
    else:
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            equal_trees(one, other)


@pytest.mark.parametrize("name", STRUCTURES)
def test_relevance_mirrors_the_inputs(name: str) -> None:
    model, inputs, expected = STRUCTURES[name]
    equal_trees(explain(model, inputs, 2).relevance, expected)


def test_an_unused_float_input_is_unattributed() -> None:
    relevance = explain(lambda a, b: a @ WA, (A, B), 2).relevance
    close(relevance[0], RA)
    assert relevance[1] is None


def test_the_same_tensor_given_twice_is_explained_per_argument() -> None:
    relevance = explain(lambda a, b: (a @ WA) * 1.0 + (b @ WA) * 3.0, (A, A), 2).relevance
    equal_trees(relevance, (RA, 3 * RA))


def test_an_input_that_is_returned_unchanged() -> None:
    relevance = explain(lambda a: a, A, 1).relevance
    close(relevance, torch.zeros_like(A).index_copy_(1, torch.tensor([1]), A[:, 1:2]))


@pytest.mark.parametrize("ids", [torch.arange(4).repeat(2, 1), torch.tensor([[3, 1, 1, 0], [2, 2, 5, 4]])])
@pytest.mark.parametrize("frozen", [False, True])
class TestIds:
    """Integers are explained at the embedding they index."""

    @pytest.fixture(autouse=True)
    def _parts(self, frozen: bool, ids: Tensor) -> None:
        self.ids, self.frozen = ids, frozen
        self.words = peers.randomise(nn.Embedding(6, 5), 1, 1.0).double().requires_grad_(not frozen)
        self.types = peers.randomise(nn.Embedding(4, 5), 2, 1.0).double().requires_grad_(not frozen)
        self.places = peers.randomise(nn.Embedding(4, 5), 3, 1.0).double().requires_grad_(not frozen)
        self.head = bias_free(20, 8, 3).requires_grad_(not frozen)

    def module(self, forward: Callable[..., Tensor]) -> nn.Module:
        parts = self

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.types, self.places = parts.words, parts.types, parts.places
                self.head = parts.head
                self.register_buffer("position", torch.arange(4).unsqueeze(0))

            def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
                return self.head(forward(self, *inputs, **named).flatten(1))

        return Model()

    def expected(self, function: Callable[..., Tensor], *embedded: Tensor) -> list[Tensor]:
        return gradient_x_input(lambda *e: self.head(function(*e).flatten(1))[:, 1], *embedded)

    def test_one_number_per_id(self) -> None:
        model = self.module(lambda m, ids: m.words(ids))
        (expected,) = self.expected(lambda e: e, self.words(self.ids))
        close(explain(model, self.ids, 1).relevance, expected.sum(-1))
        equal_trees(explain(model, {"ids": self.ids}, 1).relevance, {"ids": expected.sum(-1)})

    def test_scaled_embeddings(self) -> None:
        model = self.module(lambda m, ids: m.words(ids) * 5**0.5)
        (expected,) = self.expected(lambda e: e * 5**0.5, self.words(self.ids))
        close(explain(model, self.ids, 1).relevance, expected.sum(-1))

    def test_functional_embedding(self) -> None:
        model = self.module(lambda m, ids: F.embedding(ids, m.words.weight, padding_idx=1))
        (expected,) = self.expected(lambda e: e, self.words(self.ids))
        close(explain(model, self.ids, 1).relevance, expected.sum(-1))

    @pytest.mark.parametrize(
        "lookup",
        [
            lambda w, ids: w[ids],
            lambda w, ids: w[ids, :],
            lambda w, ids: w.t()[:, ids].permute(1, 2, 0),
            lambda w, ids: (w * 1.0).view(6, 5)[ids.long()],
            lambda w, ids: w.index_select(0, ids.view(-1)).view(2, 4, 5),
            lambda w, ids: w.t().index_select(-1, ids.view(-1)).view(5, 2, 4).permute(1, 2, 0),
            lambda w, ids: w.gather(0, ids.view(-1, 1).expand(-1, 5)).view(2, 4, 5),
            lambda w, ids: w.gather(0, ids.view(-1, 1).repeat(1, 5)).view(2, 4, 5),
            lambda w, ids: w.take(ids.unsqueeze(-1) * 5 + torch.arange(5)),
            lambda w, ids: torch.embedding(w, ids),
            lambda w, ids: torch.stack([w[row] for row in ids]),
        ],
        ids=["index", "rows", "columns", "made of it", "select", "select columns", "gather", "gather copies", "take",
             "embedding", "one by one"],
    )  # fmt: skip
    def test_a_bare_parameter_is_an_embedding(self, lookup: Any, request: pytest.FixtureRequest) -> None:
        model = self.module(lambda m, ids: lookup(m.words.weight, ids))
        if any(name in request.node.callspec.id for name in ("gather copies", "take")):
            with pytest.raises(NoPathError, match="index an embedding or a parameter"):
                explain(model, self.ids, 1)  # numbers of another shape, or others
            return
        (expected,) = self.expected(lambda e: e, self.words(self.ids))
        found = explain(model, self.ids, 1)
        close(found.relevance, expected.sum(-1))
        assert found.ledger.closes
        assert found.ledger.accounts["inputs"] == pytest.approx(float(expected.sum()), abs=1e-12)

    def test_ids_that_choose_among_hidden_states_are_no_ids_of_a_table(self) -> None:
        chosen = torch.tensor([[3, 0, 0, 1], [2, 2, 1, 0]])
        for table in (lambda m, ids: m.words.weight[ids], lambda m, ids: m.words(ids)):
            model = self.module(lambda m, ids, i, t=table: t(m, ids).gather(1, i.unsqueeze(-1).expand(-1, -1, 5)))
            (expected,) = self.expected(
                lambda e: e.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 5)), self.words(self.ids)
            )
            equal_trees(explain(model, (self.ids, chosen), 1).relevance, (expected.sum(-1), None))
        x = draw(2, 4, 5)
        model = self.module(lambda m, x, i: torch.stack([x[n, i[n]] for n in range(2)]))
        found = explain(model, (x, chosen), 1).relevance
        assert found[1] is None

    def test_a_buffer_is_no_table(self) -> None:
        model = self.module(lambda m, ids: m.table[ids])
        model.register_buffer("table", draw(6, 5))
        with pytest.raises(NoPathError, match="make it a Parameter"):
            explain(model, self.ids, 1)

    def test_ids_cast_and_reshaped_by_the_model(self) -> None:
        model = self.module(lambda m, ids: m.words(ids.long().view(-1)).view(2, 4, 5))
        (expected,) = self.expected(lambda e: e, self.words(self.ids))
        close(explain(model, self.ids.int(), 1).relevance, expected.sum(-1))

    def test_ids_transposed_by_the_model(self) -> None:
        model = self.module(lambda m, ids: m.words(ids.t()).transpose(0, 1))
        (expected,) = self.expected(lambda e: e, self.words(self.ids))
        close(explain(model, self.ids, 1).relevance, expected.sum(-1))

    @pytest.mark.parametrize(
        ("copy", "of_embedded"),
        [
            (lambda ids: ids.t().contiguous(), lambda e: e.transpose(0, 1)),
            (lambda ids: F.pad(ids, (0, 3), value=5), lambda e: F.pad(e, (0, 0, 0, 3))),
            (lambda ids: F.pad(ids, (2, 0), value=5), lambda e: F.pad(e, (0, 0, 2, 0))),
            (lambda ids: ids[:, 1:].contiguous(), lambda e: e[:, 1:]),
            (lambda ids: ids[:, :3].contiguous(), lambda e: e[:, :3]),
        ],
        ids=["transposed", "padded", "padded in front", "cut in front", "cut"],
    )
    def test_ids_copied_by_the_model(self, copy: Callable[[Tensor], Tensor], of_embedded: Any) -> None:
        weights = draw(5, *copy(self.ids).shape, 5)
        model = self.module(lambda m, ids: m.words(copy(ids)) * weights)
        model.head = nn.Flatten()
        embedded = self.words(self.ids)
        (expected,) = gradient_x_input(lambda e: (of_embedded(e) * weights).sum((1, 2)), embedded)
        explanation = explain(model, self.ids, lambda y: y.sum(1))
        close(explanation.relevance, expected.sum(-1))
        assert explanation.ledger.closes

    def test_two_embeddings_of_the_same_ids_are_summed(self) -> None:
        ids = self.ids % 4
        model = self.module(lambda m, ids: m.words(ids) + 2 * m.types(ids))
        both = self.expected(lambda e, f: e + 2 * f, self.words(ids), self.types(ids))
        close(explain(model, ids, 1).relevance, (both[0] + both[1]).sum(-1))

    def test_two_inputs_with_their_own_embeddings(self) -> None:
        types = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
        model = self.module(lambda m, ids, types: m.words(ids) + m.types(types))
        expected = self.expected(lambda e, f: e + f, self.words(self.ids), self.types(types))
        equal_trees(explain(model, (self.ids, types), 1).relevance, tuple(e.sum(-1) for e in expected))

    def test_two_inputs_with_equal_ids_keep_their_own_relevance(self) -> None:
        ids = self.ids % 4
        model = self.module(lambda m, left, right: m.words(left) + 2 * m.types(right))
        expected = self.expected(lambda e, f: e + 2 * f, self.words(ids), self.types(ids))
        equal_trees(explain(model, (ids, ids.clone()), 1).relevance, tuple(e.sum(-1) for e in expected))

    def test_a_mask_equal_to_other_ids_is_unattributed(self) -> None:
        types = torch.ones(2, 4, dtype=torch.long)
        model = self.module(lambda m, ids, types, mask: (m.words(ids) + m.types(types)) * mask.unsqueeze(-1))
        relevance = explain(model, {"ids": self.ids, "types": types, "mask": types.clone()}, 1).relevance
        assert relevance["mask"] is None

    def test_positions_that_the_model_makes_do_not_count_for_equal_ids(self) -> None:
        ids = self.ids[:1]
        model = self.module(lambda m, ids: m.words(ids) + m.places(m.position))
        expected = self.expected(lambda e, f: e + f, self.words(ids), self.places(torch.arange(4)[None]))
        close(explain(model, ids, 1).relevance, expected[0].sum(-1))

    def test_floats_and_ids_together(self) -> None:
        x = draw(2, 4, 5)
        model = self.module(lambda m, ids, x: m.words(ids) * 0.5 + x)
        expected = self.expected(lambda e, x: e * 0.5 + x, self.words(self.ids), x)
        equal_trees(explain(model, (self.ids, x), 1).relevance, (expected[0].sum(-1), expected[1]))

    def test_the_embedding_as_parameter_and_layer(self) -> None:
        model = self.module(lambda m, ids: m.words(ids))
        (expected,) = self.expected(lambda e: e, self.words(self.ids))
        explanation = explain(model, self.ids, 1, layers="words", parameters="words.weight")
        close(explanation.layers["words"], expected)
        table = torch.zeros(6, 5, dtype=torch.float64).index_add_(0, self.ids.view(-1), expected.view(-1, 5))
        close(explanation.parameters["words.weight"], table)
        close(explanation.relevance, expected.sum(-1))

    def test_every_use_counts_in_a_table_with_padding_or_frequencies(self) -> None:
        for options in ({"padding_idx": 1}, {"scale_grad_by_freq": True}):

            def lookup(m: Any, ids: Tensor, options: Any = options) -> Tensor:
                return F.embedding(ids, m.words.weight, **options)

            (expected,) = self.expected(lambda e: e, self.words(self.ids))
            table = torch.zeros(6, 5, dtype=torch.float64).index_add_(0, self.ids.view(-1), expected.view(-1, 5))
            found = explain(self.module(lookup), self.ids, 1, parameters="words.weight").parameters
            close(found["words.weight"], table)


def test_token_types_of_bert_are_explained_and_masks_are_not() -> None:
    model, inputs, _ = sample("bert")
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    explanation = explain(
        model,
        {**inputs, "token_type_ids": types},
        1,
        layers=["bert.embeddings.word_embeddings", "bert.embeddings.token_type_embeddings"],
        composite="attnlrp",
    )
    rows = {name.split(".")[-1]: r.sum(-1) for name, r in explanation.layers.items()}
    close(explanation.relevance["input_ids"], rows["word_embeddings"])
    close(explanation.relevance["token_type_ids"], rows["token_type_embeddings"])
    assert explanation.relevance["attention_mask"] is None
    inside = sum(float(r.sum()) for r in explanation.tensors())
    assert abs(inside - explanation.ledger.accounts["inputs"]) < 1e-10


def test_a_batch_encoding_goes_straight_in() -> None:
    from transformers import BatchEncoding

    model, inputs, _ = sample("bert")
    same(explain(model, BatchEncoding(inputs), 1), explain(model, inputs, 1))


def test_rotary_positions_are_unattributed() -> None:
    model, inputs, _ = sample("llama")
    positions = torch.arange(7).repeat(2, 1)
    relevance = explain(model, {**inputs, "position_ids": positions}, (-1, 3)).relevance
    assert relevance["position_ids"] is None
    close(relevance["input_ids"], explain(model, inputs, (-1, 3)).relevance["input_ids"])


@pytest.mark.parametrize("inputs", [(), {}, 5, None, "text", [1.0], ("a", 3)])
def test_inputs_without_tensors_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match="no tensor"):
        explain(nn.Identity(), inputs)


# Targets ----------------------------------------------------------------------------------------------------

FLAT = bias_free(4, 7, 5)
X = draw(2, 4, seed=7)


def grid(x: Tensor) -> Tensor:
    """An output of shape (2, 3, 5)."""
    return torch.stack([FLAT(x), FLAT(x * 0.5 - 0.1 * x.relu()), FLAT(-x)], 1)


def at(model: Any, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    (relevance,) = gradient_x_input(lambda x: pick(model(x)), X)
    return relevance, pick(model(X)).detach()


ROWS = torch.arange(2)
BEST = int(FLAT(X)[0].argmax())
TARGETS: list[tuple[Any, Any, Callable[[Tensor], Tensor]]] = [
    (FLAT, None, lambda y: y.amax(1)),
    (FLAT, 3, lambda y: y[:, 3]),
    (FLAT, 0, lambda y: y[:, 0]),
    (FLAT, -1, lambda y: y[:, 4]),
    (FLAT, -5, lambda y: y[:, 0]),
    (FLAT, [3, 1], lambda y: y[ROWS, [3, 1]]),
    (FLAT, (3, 1), lambda y: y[ROWS, [3, 1]]),
    (FLAT, [-1, 0], lambda y: y[ROWS, [4, 0]]),
    (FLAT, torch.tensor([3, 1]), lambda y: y[ROWS, [3, 1]]),
    (FLAT, torch.tensor([3, 1], dtype=torch.int32), lambda y: y[ROWS, [3, 1]]),
    (FLAT, torch.tensor(2), lambda y: y[:, 2]),
    (FLAT, torch.tensor([[3], [1]]), lambda y: y[ROWS, [3, 1]]),
    (FLAT, [torch.tensor(3), torch.tensor(1)], lambda y: y[ROWS, [3, 1]]),
    (FLAT, [np.int64(3), np.int64(1)], lambda y: y[ROWS, [3, 1]]),
    (FLAT, np.array([3, 1]), lambda y: y[ROWS, [3, 1]]),
    (FLAT, [(3,), (1,)], lambda y: y[ROWS, [3, 1]]),
    (FLAT, lambda y: y[:, 1] - y[:, 2], lambda y: y[:, 1] - y[:, 2]),
    (FLAT, lambda y: y[:, [0, 3]].sum(1, keepdim=True), lambda y: y[:, 0] + y[:, 3]),
    (grid, None, lambda y: y.flatten(1).amax(1)),
    (grid, (1, 3), lambda y: y[:, 1, 3]),
    (grid, (-1, -2), lambda y: y[:, 2, 3]),
    (grid, (np.int64(-1), torch.tensor(3)), lambda y: y[:, 2, 3]),
    (grid, [(torch.tensor(1), 3), (0, np.int64(2))], lambda y: y[ROWS, [1, 0], [3, 2]]),
    (grid, [(1, 3), (0, 2)], lambda y: y[ROWS, [1, 0], [3, 2]]),
    (grid, [[1, 3], [-1, 2]], lambda y: y[ROWS, [1, 2], [3, 2]]),
    (grid, torch.tensor([[1, 3], [0, 2]]), lambda y: y[ROWS, [1, 0], [3, 2]]),
    (grid, lambda y: y[:, 0, 1] + y[:, 2, 3], lambda y: y[:, 0, 1] + y[:, 2, 3]),
    (lambda x: FLAT(x)[:, 2], None, lambda y: y),
    (lambda x: FLAT(x)[:, 2], 0, lambda y: y),
    (lambda x: FLAT(x)[:, 2:3], 0, lambda y: y[:, 0]),
]


@pytest.mark.parametrize(("model", "target", "pick"), TARGETS)
def test_targets(model: Any, target: Any, pick: Callable[[Tensor], Tensor]) -> None:
    relevance, value = at(model, pick)
    explanation = explain(model, X, target, composite="attnlrp")
    close(explanation.relevance, relevance)
    close(explanation.value, value)
    assert abs(explanation.ledger.output - float(value.sum())) < 1e-12
    assert explanation.ledger.closes


def test_a_scalar_output_is_explained_as_one_sample() -> None:
    explanation = explain(lambda x: FLAT(x)[0, 2], X)
    close(explanation.value, FLAT(X)[0, 2:3].detach())
    close(explanation.relevance, at(FLAT, lambda y: y[:1, 2])[0])


def test_initial_relevance() -> None:
    y, seed = FLAT(X).detach(), draw(2, 5, seed=9)
    (expected,) = gradient_x_input(lambda x: FLAT(x) * (seed / y), X)
    explanation = explain(FLAT, X, seed)
    close(explanation.relevance, expected)
    close(explanation.value, seed.sum(1))
    assert explanation.ledger.closes
    one_hot = torch.zeros_like(y).index_fill_(1, torch.tensor([3]), 1.0)
    same(explain(FLAT, X, y * one_hot), explain(FLAT, X, 3))


def test_a_contrast_is_the_difference_of_two_logits() -> None:
    model, inputs, _ = sample("bert")
    left, right = (explain(model, inputs, t, composite="attnlrp").relevance["input_ids"] for t in (1, 2))
    contrast = explain(model, inputs, lambda y: y[:, 1] - y[:, 2], composite="attnlrp")
    close(contrast.relevance["input_ids"], left - right, 1e-10)
    assert contrast.ledger.closes


def test_a_probability_can_be_the_target() -> None:
    explanation = explain(FLAT, X, lambda y: y.softmax(1)[:, 2])
    close(explanation.value, FLAT(X).softmax(1)[:, 2].detach())
    assert explanation.ledger.closes


WRONG_TARGETS: dict[str, tuple[Any, Any]] = {
    "too large": (FLAT, 5),
    "too small": (FLAT, -6),
    "one of them too large": (FLAT, [0, 5]),
    "tensor too large": (FLAT, torch.tensor([0, 7])),
    "too few": (FLAT, [0]),
    "too many": (FLAT, [0, 1, 2]),
    "an int for two dimensions": (grid, 3),
    "one index per sample for two dimensions": (grid, [1, 2]),
    "three indices": (grid, (0, 0, 0)),
    "one-hot integers": (FLAT, torch.eye(5, dtype=torch.long)[:2]),
    "two indices for one dimension": (FLAT, [(0, 1), (0, 1)]),
    "second index too large": (grid, (0, 5)),
    "bool": (FLAT, True),
    "bools": (FLAT, [True, False]),
    "bool tensor": (FLAT, torch.tensor([True, False])),
    "string": (FLAT, "dog"),
    "strings": (FLAT, ["dog", "cat"]),
    "float": (FLAT, 1.0),
    "floats": (FLAT, [1.0, 2.0]),
    "relevance of another shape": (FLAT, torch.ones(2, 4)),
    "nothing per sample": (FLAT, []),
    "callable: the whole output": (FLAT, lambda y: y),
    "callable: one sample": (FLAT, lambda y: y[0]),
    "callable: number": (FLAT, lambda y: 1.0),
    "callable: int tensor": (FLAT, lambda y: y.argmax(1)),
    "callable: detached": (FLAT, lambda y: y[:, 0].detach()),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_targets_that_do_not_fit(name: str) -> None:
    model, target = WRONG_TARGETS[name]
    with pytest.raises(TargetError) as raised:
        explain(model, X, target)
    assert len(str(raised.value)) > 20


# Structured outputs -----------------------------------------------------------------------------------------


@dataclass
class Answer:
    ids: Tensor
    scores: Tensor
    others: Any = None


def model_output(**fields: Any) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(**fields)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str | int | None, int]] = {
    "logits of a dict": (lambda y: {"aux": y * 2, "logits": y}, None, 1),
    "first float of a dict": (lambda y: {"ids": y.argmax(1), "b": y * 2, "a": y}, None, 2),
    "first float of a tuple": (lambda y: (y.argmax(1), y * 3, y), None, 3),
    "list": (lambda y: [None, "text", y], None, 1),
    "dataclass": (lambda y: Answer(y.argmax(1), y * 2), None, 2),
    "nested": (lambda y: ({"deep": [y.argmax(1), (y * 4,)]}, y), None, 4),
    "model output": (lambda y: model_output(loss=y.sum(), logits=y * 2), None, 2),
    "by key": (lambda y: {"logits": y, "aux": y * 2}, "aux", 2),
    "by attribute": (lambda y: Answer(y.argmax(1), y, y * 5), "others", 5),
    "by field": (lambda y: model_output(logits=y, hidden_states=(y,), loss=y * 3), "loss", 3),
    "by position": (lambda y: (y, y * 2, y * 3), 1, 2),
    "from the end": (lambda y: [y, y * 2, y * 3], -1, 3),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_structured_outputs(name: str) -> None:
    wrap, output, factor = OUTPUTS[name]
    relevance, value = at(FLAT, lambda y: y[:, 3])
    explanation = explain(lambda x: wrap(FLAT(x)), X, 3, output=output)
    close(explanation.relevance, factor * relevance)
    close(explanation.value, factor * value)


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda y: {"logits": y}, "scores"),
        (lambda y: (y,), 1),
        (lambda y: Answer(y, y), "missing"),
        (lambda y: (y, "text"), 1),
        (lambda y: {"logits": y.argmax(1)}, None),
        (lambda y: ("nothing",), None),
        (lambda y: None, None),
        (lambda y: {"ids": y.argmax(1), "logits": y}, "ids"),
    ],
)
def test_outputs_that_are_not_there(wrap: Callable[[Tensor], Any], output: Any) -> None:
    with pytest.raises((TargetError, NoPathError)):
        explain(lambda x: wrap(FLAT(x)), X, 0, output=output)


# Functions and shared modules -------------------------------------------------------------------------------

SHARED = peers.randomise(nn.Linear(4, 4, bias=False), 11).double()


def in_place_sum(x: Tensor) -> Tensor:
    h = SHARED(x)
    h += x
    h.relu_()
    return SHARED(h).mul_(3.0)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sequential": FLAT,
    "lambda": lambda x: FLAT(x).relu(),
    "plain function": in_place_sum,
    "bound method": FLAT.forward,
    "shared twice": lambda x: SHARED(SHARED(x).relu()),
    "shared side by side": lambda x: SHARED(x) - 0.3 * SHARED(x.flip(1)).relu(),
    "residual as an operator": lambda x: x + SHARED(x).relu(),
    "residual as a function": lambda x: torch.add(SHARED(x).relu(), x, alpha=0.5),
    "difference": lambda x: torch.sub(SHARED(x), x, alpha=2) / 0.7,
    "leaky": lambda x: F.leaky_relu(SHARED(x), 0.1).abs(),
    "cat, slices and sums": lambda x: torch.cat([x[:, :2].sum(1, keepdim=True), SHARED(x)[:, 1:]], 1),
    "maximum": lambda x: torch.maximum(SHARED(x), x).amax(1, keepdim=True).expand(2, 4),
    "einsum": lambda x: torch.einsum("bi,oi->bo", x, SHARED.weight).relu() @ SHARED.weight.T,
    "masked": lambda x: torch.where(x > 0, SHARED(x), x * 2).masked_fill(x > 1, 0.0),
    "norm": lambda x: SHARED(x).norm(dim=1, keepdim=True) * SHARED.weight[0],
}


@pytest.mark.parametrize("composite", ["epsilon", "attnlrp", "auto"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_biases_relevance_is_gradient_times_input(name: str, composite: str) -> None:
    model = FUNCTIONS[name]
    (expected,) = gradient_x_input(lambda x: model(x)[:, 2], X)
    explanation = explain(model, X, 2, composite=composite)
    close(explanation.relevance, expected, 1e-13)
    # Nothing is lost on the way.
    close(explanation.relevance.sum(1), explanation.value, 1e-13)
    assert explanation.ledger.closes


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_without_biases_nets_of_convolutions_give_gradient_times_input(name: str) -> None:
    model = peers.build("vgg", peers.NETWORKS) if name == "vgg" else nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, stride=2), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5),
    ).double()  # fmt: skip
    x = peers.inputs((2, 3, 16, 16), 5)
    model(x)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.zeros_(parameter)
    (expected,) = gradient_x_input(lambda x: model(x)[:, 2], x)
    close(explain(model, x, 2, composite="attnlrp").relevance, expected, 1e-12)


# Layers -----------------------------------------------------------------------------------------------------


def cut_net(inplace: bool = False) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    return peers.randomise(model, 12).double()  # type: ignore[return-value]


PICTURE = peers.inputs((2, 3, 8, 8), 13)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus", "epsilon_alpha2_beta1", "dynamiclrp"])
@pytest.mark.parametrize("cut", [2, 3, 6, 7, 8])
def test_layer_relevance_is_that_of_the_rest_of_the_model(cut: int, composite: str, frozen: bool) -> None:
    model = cut_net().requires_grad_(not frozen)
    explanation = explain(model, PICTURE, 2, composite=composite, layers=str(cut))
    found = explanation.layers[str(cut)]
    rest = explain(model[cut + 1 :], model[: cut + 1](PICTURE), 2, composite=composite)
    close(found, rest.relevance, 1e-10)
    booked = sum(
        amount
        for (account, path), amount in explanation.ledger.by_module().items()
        if account != "inputs" and int(path or 0) > cut
    )
    assert abs(float(found.sum()) - (explanation.ledger.output - booked)) < 1e-9
    same(explain(model, PICTURE, 2, composite=composite), explanation)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_asking_for_every_layer_changes_nothing_and_in_place_does_neither(composite: str) -> None:
    plain = explain(cut_net(), PICTURE, 2, composite=composite)
    every = explain(cut_net(), PICTURE, 2, composite=composite, layers="*")
    in_place = explain(cut_net(True), PICTURE, 2, composite=composite, layers="*")
    same(every, plain)
    same(in_place, plain)
    assert list(every.layers) == list(in_place.layers)
    for name in every.layers:
        close(in_place.layers[name], every.layers[name], 1e-10)


@pytest.mark.parametrize("composite", ["auto", "epsilon_plus", "dynamiclrp"])
def test_a_convolution_that_takes_its_norm_in_has_the_relevance_of_both(composite: str) -> None:
    model, inputs, target = sample("conv_bn")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    before = [str(int(name) - 1) for name in names]
    layers = explain(model, inputs, target, composite=composite, layers=[*names, *before]).layers
    for norm, convolution in zip(names, before, strict=True):
        close(layers[convolution], layers[norm], 1e-10)


def test_a_layer_changed_in_place_afterwards_keeps_its_own_relevance() -> None:
    class Block(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.second = (peers.randomise(nn.Linear(4, 4), n).double() for n in (1, 2))
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if self.in_place:
                h += x  # as ResNets of torchvision do
            else:
                h = h + x
            return self.second(h)

    for frozen in (False, True):
        plain, changed = (
            explain(Block(flag).requires_grad_(not frozen), X, 2, layers="first") for flag in (False, True)
        )
        close(changed.relevance, plain.relevance)
        close(changed.layers["first"], plain.layers["first"])


def test_a_module_called_twice_has_a_list() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.act = SHARED, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.act(self.shared(x)))

    layers = explain(Twice(), X, 2, layers=["shared", "act"]).layers
    first = SHARED(X)
    assert len(layers["shared"]) == 2
    close(layers["shared"][0], gradient_x_input(lambda h: SHARED(h.relu())[:, 2], first)[0])
    close(layers["shared"][1], gradient_x_input(lambda h: h[:, 2], SHARED(first.relu()))[0])
    close(layers["act"], layers["shared"][0])


def test_layers_by_name_glob_and_list() -> None:
    model, inputs, _ = sample("bert")
    for layers, number in (("bert.encoder.layer.*.output", 4), (["bert.pooler", "classifier"], 2), ((), 0)):
        assert len(explain(model, inputs, 1, layers=layers).layers) == number
    whole = explain(model, inputs, 1, layers=["classifier"]).layers["classifier"]
    assert whole.count_nonzero() == 2  # the logit of class 1 of both samples, and nothing else


def test_a_layer_reached_by_two_names() -> None:
    model = nn.Sequential(SHARED, nn.ReLU(), SHARED)
    assert len(explain(model, X, 2, layers="2").layers["2"]) == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_fed_by_parameters_alone(frozen: bool) -> None:
    """The position embeddings: what the ledger books there, though no input goes through it."""
    model, inputs, _ = sample("bert")
    model.requires_grad_(not frozen)
    name = "bert.embeddings.position_embeddings"
    explanation = explain(model, inputs, 1, layers=name, parameters=name + ".weight")
    position, weight = explanation.layers[name], explanation.parameters[name + ".weight"]
    assert position is not None
    assert weight is not None
    close(position.sum((0, -1)), weight[:7].sum(-1))


def test_a_layer_without_relevance_is_none() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.cut = SHARED, nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x) + self.cut(x).detach()

    layers = explain(Model(), X, 2, layers=["used", "unused"]).layers
    assert layers["unused"] is None
    assert layers["used"] is not None


@pytest.mark.parametrize("what", ["layers", "parameters"])
def test_unknown_names_are_refused(what: str) -> None:
    with pytest.raises(InputError, match="no_such"):
        explain(FLAT, X, 0, **{what: "no_such*"})
    with pytest.raises(InputError):
        explain(lambda x: FLAT(x), X, 0, **{what: "0"})


# Parameters -------------------------------------------------------------------------------------------------


def parameter_gradients(model: nn.Module, score: Callable[[Tensor], Tensor], x: Any) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(score(model(x)).sum(), list(named.values()), allow_unused=True)
    return {name: g * p.detach() for (name, p), g in zip(named.items(), grads, strict=True) if g is not None}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["dense", "vgg", "conv1d", "mixed_conv"])
def test_parameter_relevance_in_relu_nets_is_gradient_times_parameter(name: str, frozen: bool) -> None:
    model = peers.build(name, peers.NETWORKS)
    x = peers.inputs(peers.NETWORKS[name][1], 3)
    expected = parameter_gradients(model, lambda y: y[:, 2], x)
    model.requires_grad_(not frozen)
    explanation = explain(model, x, 2, composite="attnlrp", parameters="*")
    assert list(explanation.parameters) == [n for n, _ in model.named_parameters()]
    for parameter, relevance in explanation.parameters.items():
        close(relevance, expected[parameter], 1e-10)
    biases = sum(float(r.sum()) for n, r in explanation.parameters.items() if n.endswith("bias") and r is not None)
    assert abs(biases - explanation.ledger.accounts["parameters"]) < 1e-10
    same(explain(model, x, 2, composite="attnlrp"), explanation)


@pytest.mark.parametrize("rule", [Epsilon(), Epsilon(0.1), Gamma(0.25), ZPlus(), AlphaBeta(2.0, 1.0)], ids=repr)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_contribution_counts_for_its_weight_as_for_its_input(rule: Any, frozen: bool) -> None:
    """Every rule on z = W x splits relevance into contributions of x_i and w_ij, so both sums agree."""
    layer = peers.randomise(nn.Linear(4, 5, bias=False), 3).double().requires_grad_(not frozen)
    explanation = explain(layer, X, 2, composite=Composite.of("one", {"dense": rule}), parameters="weight")
    weight = explanation.parameters["weight"]
    assert weight is not None
    close(weight.sum(0), explanation.relevance.sum(0))
    assert weight[[0, 1, 3, 4]].count_nonzero() == 0


@pytest.mark.parametrize("rule", [Epsilon(0.1), Gamma(0.25), ZPlus(), AlphaBeta(2.0, 1.0)], ids=repr)
def test_the_relevance_of_a_bias_is_what_the_ledger_books(rule: Any) -> None:
    layer = peers.randomise(nn.Linear(4, 5), 3).double()
    explanation = explain(layer, X, 2, composite=Composite.of("one", {"dense": rule}), parameters="bias")
    bias = explanation.parameters["bias"]
    assert bias is not None
    assert abs(float(bias.sum()) - explanation.ledger.accounts["parameters"]) < 1e-12
    assert bias.count_nonzero() == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_shared_weights_are_summed_over_their_uses(frozen: bool) -> None:
    shared = peers.randomise(nn.Linear(4, 4, bias=False), 5).double()
    model = nn.Sequential(shared, nn.ReLU(), shared)
    expected = parameter_gradients(model, lambda y: y[:, 2], X)
    model.requires_grad_(not frozen)
    close(explain(model, X, 2, parameters="0.weight").parameters["0.weight"], expected["0.weight"])


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = peers.randomise(nn.Embedding(6, 4), 4, 1.0).double()
        self.head = nn.Linear(4, 6, bias=False).double()
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).sum(1).relu())


@pytest.mark.parametrize("frozen", [False, True])
def test_tied_weights_are_summed_over_their_uses(frozen: bool) -> None:
    model, ids = Tied(), torch.tensor([[0, 3, 3], [5, 1, 2]])
    expected = parameter_gradients(model, lambda y: y[:, 2], ids)
    model.requires_grad_(not frozen)
    explanation = explain(model, ids, 2, parameters="words.weight")
    close(explanation.parameters["words.weight"], expected["words.weight"])
    close(explanation.relevance.sum(1), explanation.value)


def test_tied_weights_have_both_names() -> None:
    ids = torch.tensor([[0, 3, 3], [5, 1, 2]])
    found = explain(Tied(), ids, 2, parameters=["words.weight", "head.weight"]).parameters
    close(found["head.weight"], found["words.weight"])


def test_a_parameter_without_part_is_none() -> None:
    model = nn.ModuleDict({"used": SHARED, "unused": nn.Linear(4, 4).double()})
    model.forward = lambda x: SHARED(x)
    found = explain(model, X, 2, parameters=["used.*", "unused.weight"]).parameters
    assert list(found) == ["used.weight", "unused.weight"]
    assert found["unused.weight"] is None
    assert found["used.weight"] is not None


@pytest.mark.parametrize("name", ["conv_bn", "resnet", "vit", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus"])
def test_asking_for_all_parameters_changes_nothing_else(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    plain = explain(model, inputs, target, composite=composite)
    asked = explain(model, inputs, target, composite=composite, parameters="*")
    same(asked, plain)
    model.requires_grad_(False)
    frozen = explain(model, inputs, target, composite=composite, parameters="*")
    same(frozen, plain)
    for parameter, relevance in asked.parameters.items():
        other = frozen.parameters[parameter]
        assert (relevance is None) == (other is None), parameter
        if relevance is not None:
            assert relevance.shape == model.get_parameter(parameter).shape
            close(other, relevance, 1e-10)


# Modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_grad_mode_outside_does_not_matter(mode: Any) -> None:
    expected = explain(cut_net(), PICTURE, 2)
    model = cut_net()
    with mode():
        same(explain(model, PICTURE, 2), expected)
        assert explain(model.requires_grad_(False), PICTURE.clone(), 2).ledger.closes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_explained_in_its_own_dtype(dtype: torch.dtype) -> None:
    model, x = bias_free(4, 7, 5).to(dtype), X.to(dtype)
    explanation = explain(model, x, 2)
    assert explanation.relevance.dtype == dtype
    rough = explain(bias_free(4, 7, 5), X, 2).relevance
    close(explanation.relevance.double(), rough, {torch.float32: 1e-6}.get(dtype, 0.03))

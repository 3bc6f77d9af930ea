"""Retrieval with a known answer: a small Llama finds values among keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.faithfulness.cache import trained
from benchmarks.faithfulness.problem import Numbers, Problem
from dynlrp import metrics

KEYS, VALUES, PAIRS, ASKED = 16, 32, 6, 400
QUERY, FIRST_KEY, FIRST_VALUE = 0, 1, 1 + KEYS
CONTEXT = 3 * PAIRS
SIZES: dict[str, Any] = {
    "vocab_size": FIRST_VALUE + VALUES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip


class Questions(NamedTuple):
    """``pairs`` times key, value, value; then as often ``?``, key, value, value in another order."""

    ids: Tensor  # (batch, 7 * pairs)
    answer: Tensor  # (batch,) where the values of the first question stand in the context


def draw(count: int, generator: torch.Generator, pairs: int = PAIRS) -> Questions:
    """Questions with keys that differ and values that may repeat."""
    keys = FIRST_KEY + torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = FIRST_VALUE + torch.randint(VALUES, (count, pairs, 2), generator=generator)
    context = torch.cat([keys[..., None], values], 2)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    asked = context.gather(1, order[..., None].expand(-1, -1, 3))
    questions = torch.cat([torch.full((count, pairs, 1), QUERY), asked], 2)
    return Questions(torch.cat([context.flatten(1), questions.flatten(1)], 1), 3 * order[:, 0] + 1)


def answers(ids: Tensor, pairs: int = PAIRS) -> Tensor:
    """(batch, 2 * pairs): the values of every question."""
    return ids[:, 3 * pairs :].unflatten(1, (-1, 4))[..., 2:].flatten(1)


class Retriever(nn.Module):
    """A Llama, from embeddings to the logits of the values of every question, ``(batch, 2 * questions, vocabulary)``:
    each value is said before it is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))

    def embedded(self, ids: Tensor) -> Tensor:
        """What the model is given: the last value is never read."""
        found: Tensor = self.model.get_input_embeddings()(ids[:, :-1])
        return found

    def forward(self, embedded: Tensor, pairs: int = PAIRS) -> Tensor:
        place = torch.arange(embedded.shape[1] - 3 * pairs) % 4
        logits: Tensor = self.model(inputs_embeds=embedded).logits[:, 3 * pairs :]
        return logits[:, (place == 1) | (place == 2)]


def build() -> Retriever:
    """The trained model. It learns on two pairs to ``PAIRS``, as few show sooner what is asked."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        pairs = int(torch.randint(2, PAIRS + 1, (), generator=generator))
        ids = draw(64, generator, pairs).ids
        assert isinstance(model, Retriever)
        logits = model(model.embedded(ids), pairs)
        return F.cross_entropy(logits.flatten(0, 1), answers(ids, pairs).flatten())

    model = trained("retrieval", Retriever(), loss, steps=2000, rate=1e-3, data="1")
    assert isinstance(model, Retriever)
    return model


def answer_found(maps: Tensor, answer: Tensor, valid: Tensor) -> Numbers:
    """How well maps point at an answer of two positions, among the valid ones; all ``(batch, length)``."""
    second = metrics.top_k(maps, answer, 2, valid)
    return {
        "IoU": second.iou,
        "top-1": metrics.top_k(maps, answer, 1, valid).accuracy,
        "top-2": second.accuracy,
        "mass on the answer": metrics.mass_accuracy(maps * valid, answer),
    }


def retrieval() -> Problem:
    """Where does the answer come from?"""
    model = build()
    questions = draw(ASKED, torch.Generator().manual_seed(1))
    values = answers(questions.ids)[:, :2]
    with torch.no_grad():
        inputs = model.embedded(questions.ids[:, : CONTEXT + 4])
        right = (model(inputs).argmax(2) == values).all(1)
    inputs, values, start = inputs[right], values[right], questions.answer[right, None]

    def explained(x: Tensor, rows: Tensor) -> Tensor:
        return model(x).gather(2, values[rows, :, None]).sum((1, 2))

    positions = torch.arange(inputs.shape[1])
    answer = (positions >= start) & (positions <= start + 1)
    context = (positions < CONTEXT).expand_as(answer)

    return Problem(
        name="retrieval, decoder",
        family="transformer",
        network="small Llama",
        settings=(
            f"After {PAIRS} keys with two values each, a small Llama (2 layers, 64 wide) is given `? key` and says the "
            f"two values of that key: {len(inputs)} of {ASKED} answers are right and explained, by the sum of the two "
            "logits. Top-1, top-2 and IoU as the DynamicLRP paper has them for SQuAD, among the positions before the "
            "question."
        ),
        model=model,
        inputs=inputs,
        explained=explained,
        measure=lambda maps, rows: answer_found(maps, answer[rows], context[rows]),
        chunk=200,
        main="IoU",
    )

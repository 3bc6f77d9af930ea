"""Retrieval with a known answer: a small BERT says which values stand with the key that is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from benchmarks.faithfulness.cache import trained
from benchmarks.faithfulness.problem import Problem
from benchmarks.faithfulness.retrieval import answer_found

KEYS, VALUES, ASKED = 8, 16, 400
LENGTH = 2 * KEYS
"""Tokens of a table: two of each key."""


class Questions(NamedTuple):
    """A key; then a table in any order, with two tokens of each key, each of another value."""

    ids: Tensor  # (batch, 1 + LENGTH): keys are 0 to KEYS - 1, tokens of the table KEYS + key * VALUES + value
    values: Tensor  # (batch, 2) that stand with the key
    answer: Tensor  # (batch, 1 + LENGTH) bool, where they stand


def draw(count: int, generator: torch.Generator) -> Questions:
    """Questions at random."""
    values = torch.rand(count, KEYS, VALUES, generator=generator).argsort(2)[..., :2]
    tokens = (KEYS + torch.arange(KEYS)[:, None] * VALUES + values).flatten(1)
    key = torch.randint(KEYS, (count, 1), generator=generator)
    order = torch.rand(count, LENGTH, generator=generator).argsort(1)
    ids = torch.cat([key, tokens.gather(1, order)], 1)
    return Questions(ids, values[torch.arange(count), key[:, 0]], F.pad(order // 2 == key, (1, 0)))


class Reader(nn.Module):
    """A BERT, from embeddings to the logits of all values, ``(batch, VALUES)``, read off where the key stands."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": KEYS + KEYS * VALUES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
        self.encoder: Any = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        self.head = nn.Linear(64, VALUES)

    def embedded(self, ids: Tensor) -> Tensor:
        """What the model is given."""
        found: Tensor = self.encoder.get_input_embeddings()(ids)
        return found

    def forward(self, embedded: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(inputs_embeds=embedded).last_hidden_state[:, 0])
        return logits


def build() -> Reader:
    """The trained model."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        ids, values, _ = draw(64, generator)
        assert isinstance(model, Reader)
        return -model(model.embedded(ids)).log_softmax(1).gather(1, values).mean()

    model = trained("lookup", Reader(), loss, steps=1000, rate=3e-3, data="1")
    assert isinstance(model, Reader)
    return model


def lookup() -> Problem:
    """Where do the values come from?"""
    model = build()
    ids, values, answer = draw(ASKED, torch.Generator().manual_seed(1))
    with torch.no_grad():
        inputs = model.embedded(ids)
        right = (model(inputs).topk(2).indices.sort(1).values == values.sort(1).values).all(1)
    inputs, values, answer = inputs[right], values[right], answer[right]
    table = torch.arange(1 + LENGTH).expand_as(answer) > 0

    def explained(x: Tensor, rows: Tensor) -> Tensor:
        return model(x).gather(1, values[rows]).sum(1)

    return Problem(
        name="retrieval, encoder",
        family="transformer",
        network="small BERT",
        settings=(
            f"A small BERT (2 layers, 64 wide) is given a key and, in any order, {LENGTH} tokens that each stand for a "
            "key and a value, two for each key, and says the two values of the key that is asked for: "
            f"{len(inputs)} of {ASKED} answers are right and explained, by the sum of the two logits. Top-1, top-2 and "
            "IoU as for the decoder, among all tokens but the first. As they are near 1 for most methods, methods are "
            "ranked by the share of the positive relevance on the two tokens."
        ),
        model=model,
        inputs=inputs,
        explained=explained,
        measure=lambda maps, rows: answer_found(maps, answer[rows], table[rows]),
        chunk=200,
        main="mass on the answer",
    )

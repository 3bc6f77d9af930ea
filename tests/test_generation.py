"""Generated text: every token as its own run explains it, for decoders and encoder-decoders."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dynlrp import Generation, InputError, explain, explain_generation
from tests.conftest import close
from tests.peers import models as peers
from tests.test_many import passes

module: Any = importlib.import_module("dynlrp.generation")
WORDS = ["<pad>", "</s>", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept", "all", "day", "long"]


class Tokenizer:
    """Words by number, as Hugging Face's tokenizers answer."""

    def __call__(self, text: str, return_tensors: str = "", add_special_tokens: bool = True) -> dict[str, Tensor]:
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[number] for number in ids)


def build(name: str) -> nn.Module:
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    torch.manual_seed(5)
    model: nn.Module
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=15, n_embd=16, n_layer=2, n_head=2, n_positions=32, **special))
    elif name == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=15, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                intermediate_size=24, max_position_embeddings=32, **special,
            )
        )  # fmt: skip
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=15, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
                tie_word_embeddings=False, **special,
            )
        )  # fmt: skip
    return peers.randomise(model, 3, std=0.3).eval()


MODELS = {name: build(name) for name in ("gpt2", "llama", "t5")}
PROMPT, AFTER = "the cat sat on a mat", "and then it slept"


def own_run(name: str, generation: Generation, row: int) -> tuple[Tensor, Tensor]:
    """The token of one row explained after the prompt and the tokens before it alone."""
    model, column = MODELS[name], generation.first + row
    token = int(generation.ids[column])
    if name != "t5":
        explanation = explain(model, {"input_ids": generation.ids[None, :column]}, (-1, token))
        return explanation.relevance["input_ids"][0], explanation.value[0]
    inputs = {"input_ids": generation.ids[None, :6], "decoder_input_ids": generation.ids[None, 6:column]}
    explanation = explain(model, inputs, (-1, token))
    return torch.cat([explanation.relevance[key] for key in inputs], 1)[0], explanation.value[0]


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_each_token_equals_its_own_run(name: str, chunk: int | None) -> None:
    calls: list[int] = []
    hook = MODELS[name].register_forward_hook(lambda *_: calls.append(1))
    with passes() as sizes:
        generation = explain_generation(MODELS[name], Tokenizer(), PROMPT, continuation=AFTER, chunk=chunk)
    hook.remove()
    assert max(sizes) == (chunk or 4)
    assert len(calls) == 1 + (name == "t5")  # whose ledger needs values that its graph did not keep
    start = 7 if name == "t5" else 6
    assert generation.relevance.shape == (4, start + 4)
    assert generation.tokens == [*PROMPT.split(), *["<pad>"] * (name == "t5"), *AFTER.split()]
    for row in range(4):
        expected, value = own_run(name, generation, row)
        close(generation.relevance[row, : start + row], expected, 1e-5)  # float32, with other sequence lengths
        close(generation.values[row], value, 1e-5)
        assert not generation.relevance[row, start + row :].any()
        assert bool(generation.relevance[row, : start + row].abs().min() > 0)
    assert all(ledger.closes for ledger in generation.ledgers)


@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str) -> None:
    """Every token is the one with the largest logit, and the same ids given as a continuation say the same."""
    model = MODELS[name]
    found = explain_generation(model, Tokenizer(), PROMPT, max_new_tokens=3)
    assert len(found.relevance) == 3
    for row in range(3):
        column = found.first + row
        ids = found.ids[None, :column]
        inputs = {"input_ids": ids} if name != "t5" else {"input_ids": ids[:, :6], "decoder_input_ids": ids[:, 6:]}
        logits = model(**inputs).logits[0, -1].detach()
        assert int(logits.argmax()) == int(found.ids[column])
        close(found.values[row], logits.max(), 1e-5)
    given = explain_generation(model, Tokenizer(), found.ids[:6], continuation=found.ids[found.first :])
    close(given.relevance, found.relevance, 1e-6)
    assert given.tokens == found.tokens


@pytest.mark.parametrize("name", MODELS)
def test_whatever_form_generate_answers_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]
    expected = explain_generation(model, Tokenizer(), PROMPT, max_new_tokens=2)
    monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
    monkeypatch.setattr(model.generation_config, "output_scores", True)
    found = explain_generation(model, Tokenizer(), PROMPT, max_new_tokens=2)
    assert found.tokens == expected.tokens
    assert torch.equal(found.relevance, expected.relevance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["mask", "ids", "list", "tokenizer"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_of_the_prompt_is_left_out(name: str, form: str, side: str) -> None:
    model = MODELS[name]
    expected = explain_generation(model, Tokenizer(), PROMPT, max_new_tokens=2)
    ids = Tokenizer()(PROMPT)["input_ids"]
    around = (3, 0) if side == "left" else (0, 3)
    padded = nn.functional.pad(ids, around)
    encoding = BatchEncoding({"input_ids": padded, "attention_mask": nn.functional.pad(torch.ones_like(ids), around)})
    if form == "mask":
        encoding["input_ids"] = padded + (encoding["attention_mask"] == 0) * 3  # what is masked may be anything
    prompts: dict[str, Any] = {"mask": encoding, "ids": padded, "list": padded[0].tolist(), "tokenizer": PROMPT}

    class Padding(Tokenizer):
        def __call__(self, text: str, return_tensors: str = "", add_special_tokens: bool = True) -> Any:
            return encoding

    found = explain_generation(model, Padding(), prompts[form], max_new_tokens=2)
    assert found.tokens == expected.tokens
    assert torch.equal(found.relevance, expected.relevance)


def test_padding_that_ends_texts_is_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["gpt2"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, 0])
    found = explain_generation(model, Tokenizer(), [0, 2, 3], continuation=AFTER)
    assert found.tokens[:3] == ["<pad>", "the", "cat"]


def test_what_cannot_be_explained() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(3, 3)

    with pytest.raises(InputError, match="no generate"):
        explain_generation(Silent(), Tokenizer(), PROMPT)
    with pytest.raises(InputError, match="no generated token"):
        explain_generation(MODELS["gpt2"], Tokenizer(), PROMPT, continuation=[])
    with pytest.raises(InputError, match="one text at a time"):
        explain_generation(MODELS["gpt2"], Tokenizer(), torch.zeros(2, 3, dtype=torch.long))


def test_the_model_stays_as_it_was() -> None:
    model = MODELS["llama"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    explain_generation(model, Tokenizer(), PROMPT, max_new_tokens=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("progress", "patience", "shown"), [(True, 99, 1), (None, 99, 0), (None, 0, 1), (False, 0, 0)])
def test_a_bar_is_shown_on_request_or_after_a_while(
    progress: Any, patience: float, shown: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    bars = []
    monkeypatch.setattr(module, "PATIENCE", patience)
    start = module._rich
    monkeypatch.setattr(module, "_rich", lambda *given: bars.append(start(*given)) or bars[-1])
    explain_generation(MODELS["gpt2"], Tokenizer(), PROMPT, continuation=AFTER, progress=progress)
    assert len(bars) == shown
    assert all(bar.finished for bar in bars)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("progress", [True, None])
def test_without_rich(progress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0)
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    if progress is None:
        explain_generation(MODELS["gpt2"], Tokenizer(), PROMPT, continuation=AFTER)
    else:
        with pytest.raises(ImportError, match="pip install"):
            explain_generation(MODELS["gpt2"], Tokenizer(), PROMPT, continuation=AFTER, progress=True)


def test_pictures_and_pages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    generation = explain_generation(MODELS["llama"], Tokenizer(), PROMPT, continuation=AFTER)
    page = generation.save(tmp_path / "x.html").read_text("utf-8")
    for word in generation.tokens:
        assert f">{word}</span>" in page
    looks = re.search(r"const looks = (.*);", page)
    assert looks is not None
    assert looks[1].count("background:") == 4 * 10
    assert page.count("<img") == 1
    assert "http" not in page
    assert generation.save(tmp_path / "x.png").stat().st_size > 10_000
    matrix, scale = generation.plot().axes
    assert [label.get_text() for label in matrix.get_xticklabels()] == generation.tokens
    assert [label.get_text() for label in matrix.get_yticklabels()] == AFTER.split()
    assert len(scale.get_xticklabels()) == 3

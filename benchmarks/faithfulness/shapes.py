"""Shapes pasted on photos, with exact masks: small convolutional nets and a small ViT say which shapes are there."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.faithfulness.cache import trained
from benchmarks.faithfulness.problem import Numbers, Problem
from dynlrp import metrics

SIDE, SHAPES, PASTED, EXPLAINED = 48, 8, 3, 200
PATCH, STEPS = 4, 6


class Scenes(NamedTuple):
    """Images with ``PASTED`` shapes of different classes on each."""

    images: Tensor  # (batch, 3, SIDE, SIDE), 0 mean, about -1 to 1
    classes: Tensor  # (batch, PASTED)
    masks: Tensor  # (batch, PASTED, SIDE, SIDE) bool: visible pixels of each


@cache
def backgrounds() -> tuple[Tensor, ...]:
    """Photos and textures, (3, height, width)."""
    import skimage.data

    data: Any = skimage.data
    photos = (torch.from_numpy(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket"))
    textures = (torch.from_numpy(getattr(data, name)()) for name in ("brick", "grass", "gravel"))
    return (
        *(p.movedim(-1, 0).float() / 127.5 - 1 for p in photos),
        *(t.expand(3, -1, -1).float() / 127.5 - 1 for t in textures),
    )


def outlines(x: Tensor, y: Tensor) -> Tensor:
    """(SHAPES, ...) bool: the shapes within the unit circle around 0."""
    radius, ax, ay = (x.square() + y.square()).sqrt(), x.abs(), y.abs()
    square = torch.maximum(ax, ay) < 0.7
    return torch.stack(
        [
            radius < 0.8,  # disc
            (radius < 0.9) & (radius > 0.5),  # ring
            square,
            square & (torch.maximum(ax, ay) > 0.35),  # frame
            (y < 0.7) & (y > 2 * ax - 0.9),  # triangle
            (torch.minimum(ax, ay) < 0.25) & (torch.maximum(ax, ay) < 0.9),  # plus
            ((ax - ay).abs() < 0.35) & (torch.maximum(ax, ay) < 0.75),  # x
            (ax < 0.9) & (ay < 0.3),  # bar
        ]
    )


def draw(count: int, generator: torch.Generator) -> Scenes:
    """Scenes at random: three different shapes of any colour and 12 to 20 pixels, the later ones over the earlier."""

    def uniform(*size: int, low: float, high: float) -> Tensor:
        return torch.rand(*size, generator=generator) * (high - low) + low

    sources, images = backgrounds(), []
    for source in torch.randint(len(sources), (count,), generator=generator).tolist():
        photo = sources[source]
        top, left = (int(torch.randint(size - SIDE, (), generator=generator)) for size in photo.shape[1:])
        images.append(photo[:, top : top + SIDE, left : left + SIDE])
    image = torch.stack(images)
    classes = torch.rand(count, SHAPES, generator=generator).argsort(1)[:, :PASTED]
    radius, angle = uniform(count, PASTED, 1, 1, low=6, high=10), uniform(count, PASTED, 1, 1, low=-0.3, high=0.3)
    middle = uniform(count, PASTED, 2, 1, 1, low=8, high=SIDE - 8)
    grid = torch.arange(SIDE) + 0.5
    x, y = (grid.view(1, -1) - middle[:, :, 0]) / radius, (grid.view(-1, 1) - middle[:, :, 1]) / radius
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    shapes = outlines(x, y).gather(0, classes[None, :, :, None, None].expand(1, -1, -1, SIDE, SIDE))[0]
    colours = uniform(count, PASTED, 3, 1, 1, low=-1, high=1)
    for i in range(PASTED):
        image = torch.where(shapes[:, i, None], colours[:, i], image)
    above = torch.zeros_like(shapes[:, 0])
    masks = []
    for i in reversed(range(PASTED)):
        masks.insert(0, shapes[:, i] & ~above)
        above = above | shapes[:, i]
    return Scenes(image + 0.05 * torch.randn(image.shape, generator=generator), classes, torch.stack(masks, 1))


def convolutions(width: int) -> nn.Sequential:
    """VGG in small: two convolutions, then max pooling, three times; the largest of what the last finds decides."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [*block(before, after), *block(after, after), nn.MaxPool2d(2)]
    last = block(4 * width, 4 * width)
    return nn.Sequential(*layers, *last, nn.MaxPool2d(SIDE // 8), nn.Flatten(), nn.Linear(4 * width, SHAPES))


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        shortcut = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if before != after else ()
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residuals() -> nn.Sequential:
    """ResNet in small: six blocks; the largest of what they find decides."""
    blocks = [
        Residual(*sizes) for sizes in ((16, 24, 2), (24, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 32, 1))
    ]
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, SHAPES))


def build(name: str) -> nn.Module:
    """The trained net: ``vgg``, ``resnet`` or ``vit``."""
    torch.manual_seed(0)
    steps, rate = 1200, 3e-3
    if name == "vgg":
        model: nn.Module = convolutions(8)
    elif name == "resnet":
        model = residuals()
    else:
        config = ViTConfig(
            image_size=SIDE, patch_size=6, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=128, num_labels=SHAPES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )  # fmt: skip
        model, steps, rate = Logits(ViTForImageClassification(config)), 6000, 1e-3

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        scenes = draw(64, generator)
        present = torch.zeros(64, SHAPES).scatter_(1, scenes.classes, 1)
        return F.binary_cross_entropy_with_logits(model(scenes.images), present)

    return trained(f"shapes-{name}", model, loss, steps=steps, rate=rate, data="1")


class Logits(nn.Module):
    """A classifier of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def shapes(name: str) -> Problem:
    """How much of a map lies on the shape that is explained, of three? And pixel flipping."""
    model = build(name)
    scenes = draw(2 * EXPLAINED, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(scenes.images).gather(1, scenes.classes)[:, 0] > 0
    seen = (found & (scenes.masks[:, 0].sum((1, 2)) >= 40)).nonzero()[:EXPLAINED, 0]
    images, classes, masks = scenes.images[seen], scenes.classes[seen, :1], scenes.masks[seen, 0]

    def explained(x: Tensor, rows: Tensor) -> Tensor:
        logit: Tensor = model(x).gather(1, classes[rows])[:, 0]
        return logit

    def measure(maps: Tensor, rows: Tensor) -> Numbers:
        curves = metrics.flip_pixels(
            lambda x: explained(x, rows), images[rows], maps, patch=PATCH, steps=STEPS, fill=metrics.blur(47, 20.0)
        )
        return {
            "mass in the shape": metrics.mass_accuracy(maps, masks[rows]),
            "rank accuracy": metrics.rank_accuracy(maps, masks[rows]),
            "ABPC, logit": curves.abpc,
        }

    return Problem(
        name=f"shapes, {name}",
        family="transformer" if name == "vit" else "convolutional",
        network=NETS[name],
        settings=(
            f"A small {NETS[name]} says which of {SHAPES} shapes are pasted on a photo of {SIDE} x {SIDE}; three "
            f"are. On {len(images)} such images explained: the logit of one of them that the net finds. Share of the "
            "positive relevance inside its mask (Arras et al. 2022), share of the most relevant pixels that are "
            f"inside; pixel flipping for the logit in {STEPS} steps of patches of {PATCH} x {PATCH}, filled by blur "
            "(kernel 47, sigma 20)."
        ),
        model=model,
        inputs=images,
        explained=explained,
        measure=measure,
        chunk=100,
        main="mass in the shape",
    )


NETS = {
    "vgg": "VGG with batch norm (7 convolutions)",
    "resnet": "ResNet (6 blocks, 15 convolutions, batch norm)",
    "vit": "ViT (4 layers, 64 wide)",
}

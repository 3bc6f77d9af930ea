"""ImageNet photos that ship with foolbox and scikit-image, and EfficientNet-Lite0."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.faithfulness.problem import Numbers, Problem, package_folder
from dynlrp import metrics
from dynlrp.demo import load_classifier

SIDE, PATCH, STEPS = 224, 16, 14
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def prepared(photo: Tensor, side: int) -> Tensor:
    """The middle square of a (3, H, W) uint8 photo, as the model takes it."""
    short = min(photo.shape[1:])
    top, left = ((size - short) // 2 for size in photo.shape[1:])
    square = photo[None, :, top : top + short, left : left + short].float()
    return (F.interpolate(square, (side, side), mode="bicubic", antialias=True)[0].clamp(0, 255) - 127) / 128


@cache
def read() -> tuple[list[Tensor], list[int]]:
    """Foolbox's twenty photos and scikit-image's five, and the labels of the former."""
    import numpy as np
    from PIL import Image

    images = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(path.stem.split("_")[-1]) for path in images]
    images += [package_folder("skimage") / "data" / name for name in PHOTOS]
    arrays: list[Any] = [np.array(Image.open(path).convert("RGB")) for path in images]
    return [torch.from_numpy(array).movedim(-1, 0) for array in arrays], labels


def scores(logits: Tensor, classes: Tensor) -> Tensor:
    """(batch, 3): probability and logit of the classes, and whether they are the model's choice."""
    at = classes[:, None]
    chosen = logits.argmax(1, keepdim=True) == at
    return torch.cat([logits.softmax(1).gather(1, at), logits.gather(1, at), chosen.float()], 1)


def one_by_one(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs; on a CPU single images are quicker, as they stay in its cache."""
    return torch.cat([model(image) for image in images.split(1)])


def photos() -> Problem:
    """Pixel flipping for the class that the model chose."""
    model = load_classifier()[0].to(memory_format=torch.channels_last)  # quicker on a CPU
    images = torch.stack([prepared(photo, SIDE) for photo in read()[0]])
    with torch.no_grad():
        classes = one_by_one(model, images).argmax(1)

    def measure(maps: Tensor, rows: Tensor) -> Numbers:
        x, target = images[rows], classes[rows]
        found: Numbers = {}
        curves = metrics.flip_pixels(lambda x: scores(one_by_one(model, x), target), x, maps, patch=PATCH, steps=STEPS)
        for i, name in enumerate(("probability", "logit", "accuracy")):
            found[f"ABPC, {name}"] = curves.abpc[:, i]
        found["accuracy, times 4"] = 4 * found["ABPC, accuracy"]
        found["insertion"], found["deletion"] = curves.insertion[:, 0], curves.deletion[:, 0]
        return found

    return Problem(
        name="photos",
        family="convolutional",
        network="EfficientNet-Lite0",
        settings=(
            f"EfficientNet-Lite0 on 25 photos of foolbox and scikit-image, {SIDE} x {SIDE}; explained: the logit of "
            f"the class it chose. Pixel flipping in {STEPS} steps of {SIDE**2 // PATCH**2 // STEPS} patches of "
            f"{PATCH} x {PATCH} pixels by the sum of their relevance, filled from the photo blurred with kernel 51, "
            "sigma 20. Accuracy: whether the class is still the choice; times 4 it is the DynamicLRP paper's unit. "
            "Insertion and deletion are areas for the probability. No normalisation."
        ),
        model=model,
        inputs=images,
        explained=lambda x, rows: model(x).gather(1, classes[rows, None])[:, 0],
        measure=measure,
        chunk=5,
        main="ABPC, probability",
    )


def square(parts: list[Tensor]) -> Tensor:
    """Four (channels, height, width) side by side, two above two."""
    return torch.cat([torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)], 1)


def mosaics() -> Problem:
    """Four photos in a square, one of them of the class that is explained: how much of a map lies on that one?"""
    model = load_classifier()[0].to(memory_format=torch.channels_last)  # quicker on a CPU
    images, labels = read()
    small = torch.stack([prepared(photo, SIDE // 2) for photo in images[: len(labels)]])
    generator = torch.Generator().manual_seed(0)
    inputs, classes, masks = [], [], []
    for shown in range(len(labels)):
        place = int(torch.randint(4, (), generator=generator))
        order = torch.randperm(len(labels), generator=generator).tolist()
        others = [j for j in order if labels[j] != labels[shown]][:3]
        parts = [small[j] for j in [*others[:place], shown, *others[place:]]]
        inputs.append(square(parts))
        masks.append(square([torch.full_like(small[0, :1], i == place, dtype=torch.bool) for i in range(4)])[0])
        classes.append(labels[shown])
    mask, target = torch.stack(masks), torch.tensor(classes)

    def measure(maps: Tensor, rows: Tensor) -> Numbers:
        return {
            "mass in the photo": metrics.mass_accuracy(maps, mask[rows]),
            "rank accuracy": metrics.rank_accuracy(maps, mask[rows]),
        }

    return Problem(
        name="mosaics",
        family="convolutional",
        network="EfficientNet-Lite0",
        settings=(
            f"EfficientNet-Lite0 on {len(labels)} mosaics of four of foolbox's photos; explained: the logit of the "
            "label of one of them. Share of the positive relevance in that quarter (Arras et al. 2022; 0.25 by "
            "chance), and of the most relevant quarter of all pixels."
        ),
        model=model,
        inputs=torch.stack(inputs),
        explained=lambda x, rows: model(x).gather(1, target[rows, None])[:, 0],
        measure=measure,
        chunk=5,
        main="mass in the photo",
    )

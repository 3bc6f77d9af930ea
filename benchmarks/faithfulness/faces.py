"""The last net of the face detector MTCNN (Zhang et al. 2016) on scikit-image's faces and other patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.faithfulness.problem import Numbers, Problem, package_folder
from dynlrp import metrics

SIDE, PATCH, STEPS = 48, 4, 6


class ONet(nn.Module):
    """Log-odds of *other* and of *face*; the branches for boxes and landmarks are left out."""

    def __init__(self) -> None:
        super().__init__()
        for i, (before, after, size) in enumerate(((3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2)), 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, size))
            self.add_module(f"prelu{i}", nn.PReLU(after))
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 2, ceil_mode=True) for size in (3, 3, 2))
        self.dense5, self.prelu5, self.dense6_1 = nn.Linear(1152, 256), nn.PReLU(256), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 48, 48) to (batch, 2)."""
        for i in range(1, 5):
            x = self.get_submodule(f"prelu{i}")(self.get_submodule(f"conv{i}")(x))
            x = self.pools[i - 1](x) if i < 4 else x
        odds: Tensor = self.dense6_1(self.prelu5(self.dense5(x.permute(0, 3, 2, 1).flatten(1))))
        return odds


def faces() -> Problem:
    """Pixel flipping for the side that the net takes, face or not."""
    import numpy as np

    model = ONet()
    weights = torch.load(package_folder("facenet_pytorch") / "data" / "onet.pt", weights_only=True)
    weights = {name: value for name, value in weights.items() if not name.startswith(("dense6_2", "dense6_3"))}
    for name in ("dense6_1.weight", "dense6_1.bias"):  # the difference of two logits in one layer
        weights[name] = weights[name] - weights[name].flip(0)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    grey = torch.from_numpy(np.load(package_folder("skimage") / "data" / "lfw_subset.npy")[::2]).float()
    images = F.interpolate(grey[:, None].expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear") * 2 - 1
    with torch.no_grad():
        answer = model(images).argmax(1)
    right = int((answer == (torch.arange(len(images)) < len(images) // 2)).sum())  # the first half are faces

    def explained(x: Tensor, rows: Tensor) -> Tensor:
        odds: Tensor = model(x).gather(1, answer[rows, None])[:, 0]
        return odds

    def measure(maps: Tensor, rows: Tensor) -> Numbers:
        def score(x: Tensor) -> Tensor:
            odds = explained(x, rows)
            return torch.stack([odds.sigmoid(), odds], 1)

        curves = metrics.flip_pixels(score, images[rows], maps, patch=PATCH, steps=STEPS, fill=metrics.blur(47, 20.0))
        return {"ABPC, probability": curves.abpc[:, 0], "ABPC, log-odds": curves.abpc[:, 1]}

    return Problem(
        name="faces",
        family="convolutional",
        network="ONet",
        settings=(
            f"MTCNN's ONet on every second of the 200 patches of scikit-image's lfw_subset, {SIDE} x {SIDE}; {right} "
            f"of {len(images)} are told right as face or not. Explained: log-odds of the answer it gave. Pixel "
            f"flipping in {STEPS} steps of {SIDE**2 // PATCH**2 // STEPS} patches of {PATCH} x {PATCH}, filled from "
            "the blurred image (kernel 47, the largest that fits, sigma 20). No normalisation."
        ),
        model=model,
        inputs=images,
        explained=explained,
        measure=measure,
        chunk=100,
        main="ABPC, log-odds",
    )

"""Convolutional nets that no library here defines, written out plainly after their papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def vgg16(width: int = 64, classes: int = 1000) -> nn.Module:
    """VGG16 (Simonyan & Zisserman 2015, configuration D) for 224 x 224 pixels; ``width`` of the first convolution."""
    layers: list[nn.Module] = []
    channels = 3
    for factor in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0):
        if factor == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
    dense = 64 * width
    head = [nn.Flatten(), nn.Linear(channels * 49, dense), nn.ReLU(), nn.Linear(dense, dense), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(dense, classes))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with batch norm and a skip (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """A block's output."""
        return torch.relu(self.body(x) + self.skip(x))


def resnet50(width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016, with the stride in the 3x3 convolution); ``width`` of the stem."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = width
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
            channels = 4 * width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class MBConv(nn.Module):
    """A widening convolution, a narrowing 1x1 one, and a skip where shapes allow it (Tan & Le 2021).

    ``squeeze``: between them a depthwise convolution and channels gated by their means; else the widening convolution
    is 3x3 itself (Fused-MBConv).
    """

    def __init__(self, channels: int, out: int, expand: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        wide = channels * expand
        body = [_conv(channels, wide, 1), _conv(wide, wide, 3, stride, groups=wide), Squeeze(wide, channels // 4)]
        self.body = nn.Sequential(
            *(body if squeeze else [_conv(channels, wide if expand > 1 else out, 3, stride)]),
            *([_conv(wide, out, 1, act=False)] if expand > 1 else []),
        )
        self.skips = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """A block's output."""
        out: Tensor = self.body(x)
        return x + out if self.skips else out


class Squeeze(nn.Module):
    """Channels gated by a function of their means (squeeze and excitation)."""

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, narrow, 1), nn.SiLU(), nn.Conv2d(narrow, channels, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The gated channels."""
        gate: Tensor = self.gate(x)
        return x * gate


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.SiLU()] if act else []))


STAGES = (
    (1, 3, 1, 24, False), (4, 5, 2, 48, False), (4, 5, 2, 80, False), (4, 7, 2, 160, True), (6, 14, 1, 176, True),
    (6, 18, 2, 304, True), (6, 5, 1, 512, True),
)  # fmt: skip
"""EfficientNetV2-M: expansion, blocks, stride, channels, squeeze."""


def efficientnet_v2_m(
    stages: Sequence[tuple[int, int, int, int, bool]] = STAGES, head: int = 1280, classes: int = 1000
) -> nn.Module:
    """EfficientNetV2-M (Tan & Le 2021)."""
    channels = stages[0][3]
    layers: list[nn.Module] = [_conv(3, channels, 3, 2)]
    for expand, depth, stride, out, squeeze in stages:
        for block in range(depth):
            layers.append(MBConv(channels, out, expand, 1 if block else stride, squeeze))
            channels = out
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, classes)]
    return nn.Sequential(*layers, _conv(channels, head, 1), *pooled)

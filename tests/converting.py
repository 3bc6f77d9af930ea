"""A network for the converters, and what must be true of a model that a tool has quantized."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.peers import models as peers

PAGE = Path(__file__).parents[1] / "docs/pages/howto/converters.md"


def run_example(title: str) -> None:
    """Execute what the page says of one tool, after what it says before them all."""
    start, *sections = PAGE.read_text("utf-8").split("\n## ")
    (section,) = (text for text in sections if text.startswith(title))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for text in (start, section):
        blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        assert blocks
        for code in blocks:
            exec(compile(code, str(PAGE), "exec", dont_inherit=True), namespace)


class Block(nn.Module):
    """Attention and two dense layers on a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    """A convolution with a batch norm, one without, a depthwise one, two blocks and two dense layers behind a mean."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mix(self.norm(self.patches(x))))
        x = self.depthwise(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(self.hidden(x.mean(1))))


class Convolutions(nn.Module):
    """In one dimension and in three."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3)
        self.three = nn.Conv3d(8, 6, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.one(x))[..., None, None]).flatten(1)


def convolutions() -> tuple[Convolutions, Tensor]:
    """With inputs."""
    return peers.randomise(Convolutions(), 3).eval(), peers.inputs((2, 4, 12), 4).float()  # type: ignore[return-value]


def network() -> Network:
    """In eval mode, with running statistics and biases that are not zero."""
    return peers.randomise(Network(), 3).eval()  # type: ignore[return-value]


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def is_rounded(rounded: Tensor, weight: Tensor, bits: int, group: int | None = None, steps: float = 1.0) -> None:
    """Each row of ``(outputs, weights)`` (or group in it) has at most ``2^bits`` values, each within ``steps`` of the
    step that this many levels have over its range, symmetric around zero; and it is not the weight itself."""
    rows, was = (w.detach().float().reshape(-1, group or w[0].numel()) for w in (rounded, weight))
    assert max(row.unique().numel() for row in rows) <= 2**bits
    step = 2 * was.abs().amax(1, keepdim=True) / (2**bits - 1)
    assert bool(((rows - was).abs() <= steps * step * (1 + 1e-4)).all())
    if was.shape[1] > 2**bits:
        assert max(row.unique().numel() for row in rows) > 2 ** (bits - 1)  # the bits are used
        assert not torch.equal(rows, was)


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy with other weights, in float."""
    made = copy.deepcopy(model)
    for name, weight in weights.items():
        module = made.get_submodule(name)
        module.weight = nn.Parameter(weight.detach().clone().to(module.weight.dtype).reshape(module.weight.shape))
    return made


def agree(ours: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value."""
    ours, other = ours.detach(), other.detach()
    assert float((ours - other).abs().max()) <= tolerance * float(other.abs().max())


def others_are_the_same(quantized: nn.Module, model: nn.Module, names: Mapping[str, int]) -> None:
    """All parameters and buffers but the weights of these layers."""
    after = dict(quantized.named_parameters()) | dict(quantized.named_buffers())
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = [name for name in before if name.removesuffix(".weight") not in names]
    assert len(kept) == len(before) - len(names)
    for name in kept:
        assert torch.equal(after[name], before[name]), name

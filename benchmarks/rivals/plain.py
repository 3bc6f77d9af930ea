"""Methods that need no library: gradients, their averages, Grad-CAM, and chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method, convolutional

STEPS = 32
"""Steps of integrated gradients."""
DRAWS = 25
"""Draws of SmoothGrad."""


def at_target(case: Case, target: Tensor | None) -> Tensor:
    """The target, or the place of the largest output of each sample: methods that move the input need it fixed."""
    if target is not None:
        return target
    with torch.no_grad():
        return case.run().flatten(1).argmax(1)


def gradient(case: Case, target: Tensor | None = None) -> Tensor:
    """The gradient of the explained outputs."""
    x = case.x.detach().requires_grad_()
    (found,) = torch.autograd.grad(case.at(x).scores(target).sum(), x)
    return found


def gradient_x_input(case: Case, target: Tensor | None = None) -> Tensor:
    """Gradient times input."""
    return gradient(case, target) * case.x


def integrated_gradients(case: Case, target: Tensor | None = None) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017) from a baseline of zeros, by the midpoint rule."""
    target = at_target(case, target)
    total = torch.zeros_like(case.x)
    for step in range(STEPS):
        total += gradient(case.at(case.x * ((step + 0.5) / STEPS)), target)
    return total / STEPS * case.x


def smoothgrad(case: Case, target: Tensor | None = None) -> Tensor:
    """SmoothGrad (Smilkov et al. 2017): mean gradient under noise of 15 % of each sample's range."""
    target = at_target(case, target)
    generator = torch.Generator().manual_seed(0)
    flat = case.x.flatten(1)
    spread = 0.15 * (flat.amax(1) - flat.amin(1)).reshape(-1, *[1] * (case.x.ndim - 1))
    total = torch.zeros_like(case.x)
    for _ in range(DRAWS):
        noise = torch.randn(case.x.shape, generator=generator, dtype=case.x.dtype)
        total += gradient(case.at(case.x + noise * spread), target)
    return total / DRAWS


def _last_map(model: nn.Module, run: Callable[[], object]) -> nn.Module:
    """The convolution, or the batch norm behind it, that gives the last map of features wider than one pixel."""
    found: list[nn.Module] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4 and output.shape[-1] > 1:
            found.append(module)

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, kinds)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[-1]


def grad_cam(case: Case, target: Tensor | None = None) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) at the last map of features, scaled up; in equal parts over the channels."""
    with torch.no_grad():
        layer = _last_map(case.model, case.run)
    kept: list[Tensor] = []
    # A copy goes on through the model, so that an operation in place behind it does not alter the map.
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output) or output.clone())
    try:
        score = case.at(case.x.detach().requires_grad_()).scores(target).sum()
        (slope,) = torch.autograd.grad(score, kept[0])
    finally:
        handle.remove()
    cam = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu()
    scaled = F.interpolate(cam, case.x.shape[2:], mode="bilinear", align_corners=False)
    return (scaled / case.x.shape[1]).expand_as(case.x)


def chance(case: Case, target: Tensor | None = None) -> Tensor:
    """Uniform numbers, the same for every model."""
    return torch.rand(case.x.shape, generator=torch.Generator().manual_seed(0), dtype=case.x.dtype)


METHODS = [
    Method("gradient", gradient),
    Method("gradient x input", gradient_x_input, composite="gradient_x_input"),
    Method("SmoothGrad", smoothgrad),
    Method("Integrated Gradients", integrated_gradients),
    Method("Grad-CAM", grad_cam, convolutional),
    Method("random", chance),
]

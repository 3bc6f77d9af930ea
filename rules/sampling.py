"""Resampling: linear in the picture, and the places that it is sampled at are coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.operation import linear_operation

aten: Any = torch.ops.aten


def _resize(name: str, function: str, *settings: str, **traits: Any) -> None:
    def replay(step: Any, x: Tensor) -> Tensor:
        kernel = getattr(aten, function).default
        result: Tensor = kernel(x, step.saved("output_size"), *(step.saved(setting) for setting in settings))
        return result

    linear_operation(name, family="pooling", operands="+", replay=replay, **traits)


_scales = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}
for _d, _names in _scales.items():
    _resize(f"UpsampleNearest{_d}DBackward0", f"upsample_nearest{_d}d", *_names, copies=True, sign="same")
    _resize(f"UpsampleNearestExact{_d}DBackward0", f"_upsample_nearest_exact{_d}d", *_names, copies=True, sign="same")
for _kind, _d in (("Linear", 1), ("Bilinear", 2), ("Trilinear", 3)):
    _resize(
        f"Upsample{_kind}{_d}DBackward0", f"upsample_{_kind.lower()}{_d}d", "align_corners", *_scales[_d], sign="same"
    )
_resize("UpsampleBicubic2DBackward0", "upsample_bicubic2d", "align_corners", *_scales[2])
for _kind, _sign in (("Bilinear", "same"), ("Bicubic", ""), ("Lanczos", "")):
    _resize(
        f"Upsample{_kind}2DAaBackward0", f"_upsample_{_kind.lower()}2d_aa", "align_corners", *_scales[2], sign=_sign
    )


def _sample(name: str, function: str, image: str = "input", *settings: str) -> None:
    def replay(step: Any, *operands: Tensor | None) -> Tensor:
        x, grid = (
            step.saved(at) if value is None else value for at, value in zip((image, "grid"), operands, strict=True)
        )
        result: Tensor = getattr(aten, function)(x, grid, *(step.saved(setting) for setting in settings))
        return result

    linear_operation(name, family="pooling", operands="+-", saved={0: image, 1: "grid"}, replay=replay)


_modes = ("interpolation_mode", "padding_mode", "align_corners")
_sample("GridSampler2DBackward0", "grid_sampler_2d", "input", *_modes)
_sample("GridSampler3DBackward0", "grid_sampler_3d", "input", *_modes)
_sample("GridSampler2DCpuFallbackBackward0", "_grid_sampler_2d_cpu_fallback", "input", *_modes)
_sample("CudnnGridSamplerBackward0", "cudnn_grid_sampler", "self")


def _affine_grid(step: Any, theta: Tensor) -> Tensor:
    result: Tensor = aten.affine_grid_generator(theta, step.saved("size"), step.saved("align_corners"))
    return result


def _cudnn_affine_grid(step: Any, theta: Tensor) -> Tensor:
    result: Tensor = aten.cudnn_affine_grid_generator(theta, *(step.saved(name) for name in "NCHW"))
    return result


linear_operation("AffineGridGeneratorBackward0", operands="+", replay=_affine_grid)
linear_operation("CudnnAffineGridGeneratorBackward0", operands="+", replay=_cudnn_affine_grid)

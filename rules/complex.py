"""Complex numbers: their real and imaginary parts, polar form, and Fourier transforms.

Multipliers follow autograd's gradients: the multiplier of z = x + iy is m = m_x + i m_y, so that the relevance of z is
the real number R = x m_x + y m_y = Re(conj(m) z).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.expansion import expand
from dynlrp.rules.operation import linear_operation, missing
from dynlrp.rules.shape import dims

aten: Any = torch.ops.aten

# Relevance itself is real, so it needs multipliers to know the parts that it came from.
for _kind in ("", "_copy"):
    linear_operation("ViewAsRealBackward0" + _kind, family="movement", replay=lambda step, z: torch.view_as_real(z))
    linear_operation(
        "ViewAsComplexBackward0" + _kind, family="movement", replay=lambda step, x: torch.view_as_complex(x)
    )
    linear_operation("ConjBackward0" + _kind, family="movement", copies=True, replay=lambda step, z: z.conj())
linear_operation(
    "ConjPhysicalBackward0", "ConjPhysicalBackward1", family="movement", copies=True, replay=lambda step, z: z.conj()
)


def _complex(step: Any, real: Tensor, imag: Tensor) -> Tensor:
    return torch.complex(real, imag)


linear_operation("ComplexBackward0", family="movement", hides=missing, replay=_complex)


def _polar(step: Any, size: Tensor | None, angle: Tensor | None) -> Tensor:
    """``size * (cos(angle) + i sin(angle))``; what was not recorded is read from the result."""
    z = step.saved("result").detach()
    if angle is None:
        assert size is not None
        empty = size.detach() == 0
        return size * torch.where(empty, 1.0, z / torch.where(empty, 1.0, size.detach()))
    if size is None:
        size = z.real * angle.detach().cos() + z.imag * angle.detach().sin()
    return torch.complex(size * angle.cos(), size * angle.sin())


expand("PolarBackward0", _polar, result="result")

# Fourier transforms are linear, and their VJP is the transform back.


def _to_real(step: Any, z: Tensor) -> Tensor:
    axes = dims(step)
    size = step.node._input_metadata[0].shape[axes[-1]]
    x: Tensor = aten._fft_c2r(z, axes, step.saved("normalization"), size)
    return x


linear_operation(
    "FftC2CBackward0",
    replay=lambda step, z: aten._fft_c2c(z, dims(step), step.saved("normalization"), step.saved("forward")),
)
linear_operation(
    "FftR2CBackward0",
    saved={0: "self"},
    replay=lambda step, x: aten._fft_r2c(x, dims(step), step.saved("normalization"), step.saved("onesided")),
)
linear_operation("FftC2RBackward0", replay=_to_real)

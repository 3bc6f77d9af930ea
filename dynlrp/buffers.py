"""Buffers as they are before a forward pass, to be put back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

Buffer = tuple[nn.Module, str, Tensor]
"""A buffer with the module that owns it."""

SMALL = 65536
"""Largest buffer that is copied together with others, as a net may have hundreds of them."""
_compare = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _One:
    """A buffer, with what tells and undoes a change."""

    __slots__ = ("buffer", "copy", "memory", "module", "name", "plain", "version")

    def __init__(self, module: nn.Module, name: str, buffer: Tensor) -> None:
        self.module, self.name, self.buffer = module, name, buffer
        self.memory = buffer.detach()
        """The same numbers, also where the buffer is given other memory."""
        self.plain = _is_plain(self.memory)
        self.version = _version(buffer)
        self.copy = self.memory

    def is_written(self, training: bool) -> bool:
        """Whether it holds other numbers. On a GPU a look would wait for the forward pass: there versions tell, which a
        write through ``.data`` does not count."""
        if _version(self.buffer) != self.version:
            return True
        if not self.plain:
            return training and not torch.equal(self.memory, self.copy)
        return (training or _tells(self.memory)) and not _same(self.memory, self.copy.view(self.memory.shape))

    def put_back(self, written: bool) -> None:
        self.module._buffers[self.name] = self.buffer
        if self.plain and not self.buffer.is_set_to(self.memory):
            self.buffer.data = self.memory
        if written:
            self.buffer.copy_(self.copy.view(self.buffer.shape) if self.plain else self.copy)


class Kept:
    """Buffers as they are now.

    Large ones that hold the same are copied once, where a look is cheap: many models have a mask or a table of
    positions in every layer.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        ones = [_One(*entry) for entry in buffers]
        self._apart = [one for one in ones if not one.plain or one.memory.numel() > SMALL]
        self._together: list[tuple[list[_One], Tensor]] = []
        """Small ones of one kind, and what they hold in one vector."""
        kinds: dict[tuple[torch.dtype, torch.device], list[_One]] = {}
        for one in ones:
            if one.plain and one.memory.numel() <= SMALL:
                kinds.setdefault((one.memory.dtype, one.memory.device), []).append(one)
        for some in kinds.values():
            vector = _joined(some)
            for one, part in zip(some, torch.split(vector, [one.memory.numel() for one in some]), strict=True):
                one.copy = part
            self._together.append((some, vector))
        latest: dict[tuple[object, ...], Tensor] = {}
        for one in self._apart:
            kind = (one.memory.shape, one.memory.dtype, one.memory.device)
            looks = one.plain and _tells(one.memory) and kind in latest
            if not (looks and _same(one.memory, latest[kind])):
                latest[kind] = one.memory.clone()
            one.copy = latest[kind]

    @torch.no_grad()
    def put_back(self, training: bool) -> None:
        """``training``: kernels of batch statistics may have written, which count no versions."""
        for one in self._apart:
            one.put_back(one.is_written(training))
        for ones, vector in self._together:
            same = _tells(vector) and _same(_joined(ones), vector)
            for one in ones:
                one.put_back(not same and one.is_written(training))


def _tells(x: Tensor) -> bool:
    """Whether a look at numbers costs no more than the look."""
    return x.device.type == "cpu"


def _is_plain(x: Tensor) -> bool:
    """Whether it is numbers in memory and nothing else."""
    strided = type(x) is Tensor and x.layout is torch.strided and not x.is_nested and not x.is_quantized
    return strided and not x.is_meta and not x.is_conj() and not x.is_neg() and not is_functorch_wrapped_tensor(x)


def _same(x: Tensor, y: Tensor) -> bool:
    """Bit by bit, of tensors of one shape and type: zeros have a sign, and what is not a number equals itself."""
    if x.device.type == "cpu" and x.is_contiguous() and y.is_contiguous():
        return not _compare(x.data_ptr(), y.data_ptr(), x.nbytes)  # torch goes entry by entry, three times as long
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    dtype = INTEGERS[x.element_size()]
    return torch.equal(x.view(dtype), y.view(dtype))


def _joined(ones: Sequence[_One]) -> Tensor:
    return torch.cat([one.memory.reshape(-1) for one in ones])


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version

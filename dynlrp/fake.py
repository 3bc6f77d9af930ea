"""Models without memory: every tensor has a shape, a type and a graph, but no numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def faked(model: Any, inputs: Any) -> Iterator[tuple[Any, Any]]:
    """A copy of a model and of its inputs in fake tensors; inside, everything that torch makes is fake.

    The model is not touched and nothing is computed. What is on the meta device comes to lie on the CPU, whose kernels
    then decide which operations are recorded.
    """
    mode = FakeTensorMode()
    memo: dict[int, Any] = {}
    modules = model.modules() if isinstance(model, nn.Module) else ()
    with mode:
        for module in modules:
            for tensors in (module._parameters, module._buffers, vars(module)):
                memo.update((id(t), _fake(mode, t)) for t in tensors.values() if isinstance(t, Tensor))
    with FakeCopyMode(mode):
        model = copy.deepcopy(model, memo)
    with mode, _Grouped(), _quiet():  # type: ignore[no-untyped-call]
        yield model, pytree.tree_map(lambda leaf: _fake(mode, leaf) if isinstance(leaf, Tensor) else leaf, inputs)


class _Grouped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets grouped matrix products of any type through: torch knows the shape of bfloat16 ones alone, of which the
    others are no different, as their kernels know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype is torch.bfloat16:
            return func(*args, **(kwargs or {}))
        a, b, *rest = args
        return func(a.to(torch.bfloat16), b.to(torch.bfloat16), *rest, **(kwargs or {})).to(a.dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report, on top of the error it raises, of an operation that needs numbers."""
    level = LOG.level
    LOG.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        LOG.setLevel(level)


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    device = "cpu" if tensor.device.type == "meta" else tensor.device
    if tensor.device.type != "meta" and not isinstance(tensor, nn.Parameter):
        return mode.from_tensor(tensor)
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

"""Relevance in a wider dtype than the model's: a half precision model explained in float32.

Autograd's nodes compute in the dtype of what they saved. So what they save is handed out in the wide dtype while
relevance moves: the model runs as it is and keeps no more than it does, and every derivative and rule computes as if
its numbers had been made in half precision and then written as float32. A few nodes must be called in their own dtype
all the same: those with kernels for it alone (flash attention), or that return to it by themselves (cumulative sums),
custom functions, which may hold tensors by other means, and those inside somebody else's saved-tensor hooks
(checkpointing). Their multipliers are scaled by a power of two, so that they neither overflow nor vanish; unless the
node only moves them, they lose the digits that the dtype does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dynlrp.errors import InputError
from dynlrp.graph import Node, hooks_around, saved, vjp
from dynlrp.rules.operation import REGISTRY, Grads
from dynlrp.unread import Packed, Unread

DTYPES = (torch.float32, torch.float64)
OF_DTYPE = re.compile("dtype|scalar type|data type|input type|float16|half", re.IGNORECASE)
"""What kernels say that compute in other dtypes."""
PIECES = 3
"""bfloat16 has 8 digits, float32 has 24."""


class _Around(NamedTuple):
    """What a hook that was set around made of a saved tensor."""

    kept: Any


class Wide:
    """Everything that is read or computed on the way of relevance, in at least ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise InputError(f"precision is torch.float32 or torch.float64, not {dtype!r}")
        self.dtype = dtype
        self._widens = False

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of relevance where tensors have ``dtype``."""
        if dtype.is_floating_point or dtype.is_complex:
            return torch.promote_types(dtype, self.dtype)
        return dtype

    def cast(self, value: Any) -> Any:
        """A tensor in its wide dtype; anything else as it is."""
        return value.to(self.of(value.dtype)) if isinstance(value, Tensor) else value

    @contextmanager
    def saving(self, unread: Unread | None = None) -> Iterator[None]:
        """What is saved in here can be handed out in the wide dtype. Hooks that are set already keep their part, and so
        does what is ``unread``."""
        outer = hooks_around()

        def pack(tensor: Tensor) -> _Around | Packed | None:
            if outer is not None:
                return _Around(outer[0](tensor))
            return Packed.of(tensor) if unread is None else unread.pack(tensor)

        def unpack(packed: _Around | Packed | None) -> Tensor:
            if isinstance(packed, _Around):
                assert outer is not None
                value: Tensor = outer[1](packed.kept)
            elif unread is not None:
                value = unread.unpack(packed)
            else:
                assert packed is not None
                value = packed.tensor()
            return self.cast(value) if self._widens else value

        with nullcontext() if unread is None else unread.allowed(), saved_tensors_hooks(pack, unpack):
            yield

    def saved(self, node: Node, name: str | int) -> Any:
        """What a node saved, in the wide dtype."""
        with self._widening(not _foreign(node)):
            return self.cast(saved(node, name))

    def vjp(self, node: Node, grads: Grads) -> Sequence[Tensor | None]:
        """Call a node in the wide dtype, or in its own where it can do nothing else."""
        operation = REGISTRY.get(node.name())
        custom = isinstance(node, torch._C._FunctionBase)
        # A copy in pieces of a few digits each is exact; what computes rounds its result in any case.
        pieces = PIECES if operation is not None and operation.copies else 1
        if not custom and not (operation is not None and operation.own_dtype) and not _foreign(node):
            try:
                with self._widening(True):
                    results = vjp(node, grads)
                if all(m is None or m.dtype is self.of(m.dtype) for m in results):
                    return results
                pieces = PIECES
            except RuntimeError as error:
                if not OF_DTYPE.search(str(error)):
                    raise
        return self._narrow(node, grads, pieces)

    @contextmanager
    def _widening(self, widens: bool) -> Iterator[None]:
        """In here saved tensors come in the wide dtype."""
        self._widens = widens
        try:
            yield
        finally:
            self._widens = False

    def _narrow(self, node: Node, grads: Grads, pieces: int) -> Sequence[Tensor | None]:
        """In the node's own dtype: the largest multiplier is brought to 1, and the results back."""
        sizes = [g.abs().amax().to(self.dtype) for g in grads if g is not None and g.numel()]
        exponent = torch.frexp(torch.stack(sizes).amax()).exponent if sizes else torch.zeros((), dtype=torch.int32)
        rest = [None if g is None else torch.ldexp(g, -exponent) for g in grads]
        total: list[Tensor | None] = []
        for _ in range(pieces):
            piece = [
                None if g is None else g.to(made.dtype) for g, made in zip(rest, node._input_metadata, strict=True)
            ]
            results = [None if m is None else torch.ldexp(self.cast(m), exponent) for m in vjp(node, piece)]
            total = [_sum(m, n) for m, n in zip(total, results, strict=True)] if total else results
            rest = [None if g is None or p is None else g - p for g, p in zip(rest, piece, strict=True)]
        return total


def _foreign(node: Node) -> bool:
    """Whether what the node saved went through somebody else's hooks, which may run a part of the model again."""
    kind: Any = type(node)
    for name in _raw(kind):
        kept = getattr(node, name)
        for tensor in kept if isinstance(kept, tuple | list) else (kept,):
            data = tensor.data if tensor is not None else None
            # Numbers go through no hooks.
            if (
                data is not None
                and not isinstance(data, Packed | _Around)
                and not (isinstance(data, Tensor) and not data.ndim)
            ):
                return True
    return False


@cache
def _raw(kind: Any) -> tuple[str, ...]:
    """Attributes of a node type that hold saved tensors as they were packed."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _sum(m: Tensor | None, n: Tensor | None) -> Tensor | None:
    return n if m is None else m if n is None else m + n

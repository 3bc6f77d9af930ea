"""Tensors that autograd saves and no rule reads: let go at once, from the second explanation of a kind on.

A gradient reads the input of every layer, for its weight, and all factors of a product. Relevance reads a part of that:
half of it on most networks. Which part shows in the first explanation, and holds for every graph of the same structure
under the same composite. Where a later forward pass makes another graph, or a rule reads more after all, that pass is
repeated with everything saved, and the model is not tried again.
"""

from __future__ import annotations

import traceback
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.autograd.graph import saved_tensors_hooks

from dynlrp.errors import DynLRPError
from dynlrp.graph import CHANGED, Structure

WORTH = 1 << 20
"""Bytes to let go that are worth a call of Python for every saved tensor."""
KINDS = 64
"""Kinds of explanation that are known of one model."""


class NotKept(DynLRPError):
    """What was let go is wanted after all, or the graph is another one: never leaves the package."""


class Packed(NamedTuple):
    """A saved tensor with the version that it had, which autograd does not check under hooks."""

    kept: Tensor
    version: int
    number: int = -1

    @classmethod
    def of(cls, tensor: Tensor, number: int = -1) -> Packed:
        return cls(tensor.detach(), tensor._version, number)  # as a result knows the node that saves it

    def tensor(self) -> Tensor:
        if self.kept._version != self.version:
            raise RuntimeError(f"one of the saved tensors has been {CHANGED}")
        return self.kept


@dataclass(frozen=True)
class Lesson:
    """What an explanation taught about its kind."""

    structure: Structure
    read: bytes
    """For every saved tensor in its order, whether somebody read it."""
    bytes_per_input: float
    """What the others hold, per byte of the inputs."""

    def fits(self, structure: Structure) -> bool:
        """Whether a graph is the same."""
        ours, theirs = self.structure.skeleton, structure.skeleton
        alike = ours is theirs or (ours.names == theirs.names and ours.operands == theirs.operands)
        return alike and replace(self.structure, skeleton=theirs) == structure


# Lessons hold no tensors, and are checked against the graph whenever they are used.
_lessons: WeakKeyDictionary[nn.Module, dict[Hashable, Lesson | None]] = WeakKeyDictionary()


class Unread:
    """The saved tensors of one forward pass."""

    def __init__(self, model: nn.Module, kind: Hashable, size: int) -> None:
        """``kind``: what else decides which graph it is and what is read of it; ``size``: bytes of the inputs."""
        self._kinds = _lessons.setdefault(model, {})
        self._kind, self._size = kind, max(1, size)
        self._lesson = self._kinds.get(kind)
        self._read = bytearray()
        self._bytes: dict[int, int] = {}
        """Of the memory that is seen for the first time, by the tensor's number: its size."""
        self._memory: dict[int, int] = {}
        """By address, the number of the tensor that was the first in it."""
        self._same: list[int] = []
        """For every tensor, the first in the same memory."""

    @classmethod
    def of(cls, model: Any, kind: Hashable, size: int) -> Unread | None:
        """None where it is not worth the while, or others follow what is saved."""
        autograd: Any = torch._C._autograd
        allowed = autograd._saved_tensors_hooks_is_enabled()
        followed = autograd._top_saved_tensors_default_hooks(False) is not None
        if not isinstance(model, nn.Module) or not allowed or followed or active_fake_mode() is not None:
            return None
        known = _lessons.get(model, {})
        if kind in known:
            lesson = known[kind]
            return None if lesson is None or lesson.bytes_per_input * size < WORTH else cls(model, kind, size)
        return cls(model, kind, size) if len(known) < KINDS else None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is saved in here is watched, or let go if a lesson says that nobody reads it."""
        with self.allowed(), saved_tensors_hooks(self.pack, self.unpack):
            yield

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Hooks may be set in here, unless the model, or ``torch.func`` in it, forbids it."""
        try:
            yield
        except RuntimeError as error:
            frames = traceback.extract_tb(error.__traceback__)
            if frames[-1].filename != torch.autograd.graph.__file__:
                raise
            raise NotKept from error

    def pack(self, tensor: Tensor) -> Packed | None:
        number, lesson = len(self._read), self._lesson
        self._read.append(False)
        if lesson is None:
            self._look(tensor, number)
        elif number < len(lesson.read) and not lesson.read[number]:
            return None
        return Packed.of(tensor, number)

    def unpack(self, packed: Packed | None) -> Tensor:
        if packed is None:
            raise NotKept
        self._read[packed.number] = True
        return packed.tensor()

    def _look(self, tensor: Tensor, number: int) -> None:
        """Note whose memory it is."""
        base = tensor if tensor._base is None else tensor._base
        if base.is_leaf or tensor.layout is not torch.strided or tensor.is_nested:  # weights stay where they are
            self._same.append(-1)
            return
        storage = tensor.untyped_storage()
        first = self._memory.setdefault(storage.data_ptr(), number)
        self._same.append(first)
        self._bytes.setdefault(first, storage.nbytes())

    def check(self, structure: Structure) -> None:
        """Raise :class:`NotKept` if what was let go was for another graph."""
        if self._lesson is not None and not (
            len(self._read) == len(self._lesson.read) and self._lesson.fits(structure)
        ):
            raise NotKept

    def learn(self, structures: Sequence[Structure | None]) -> None:
        """The explanations are made: what nobody has read by now nobody reads, if they were all of one graph."""
        (structure, *others) = structures
        if others or structure is None:
            self.give_up()
        elif self._lesson is None:
            wanted = {first for first, read in zip(self._same, self._read, strict=True) if read}
            free = sum(size for first, size in self._bytes.items() if first not in wanted)
            self._kinds[self._kind] = Lesson(structure, bytes(self._read), free / self._size)

    def give_up(self) -> None:
        """Keep everything for this kind from now on."""
        self._kinds[self._kind] = None

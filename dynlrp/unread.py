"""Tensors that autograd saves and no rule reads: let go at once, from the second explanation of a kind on.

A gradient reads the input of every layer, for its weight, and all factors of a product. Relevance reads a part of that:
half of it on most networks. Which part shows in the first explanation. Should a rule read more later, as the model took
another way, then that pass is repeated with everything saved, and what it read is kept from then on.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import active_fake_mode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from dynlrp.errors import FreedGraphError
from dynlrp.graph import CHANGED, hooks_around, next_number
from dynlrp.state import modules

WORTH = 1 << 14
"""Bytes to let go for every saved tensor that are worth the call of Python that each takes."""
KINDS = 64
"""Kinds of explanation that are known of one model."""
FURTHER = 4
"""How many times larger inputs are to be measured anew, if those before were not worth the while."""
MISSES = 8
"""Forward passes that may be repeated for one kind; then everything is kept."""


class LetGoError(FreedGraphError):
    """Somebody reads what was let go."""

    def __init__(self, unread: Unread) -> None:
        self.unread = unread
        super().__init__(
            "explain() let go of what its rules do not read of this graph, which is still in use: clear what the model "
            "keeps of it and run the model once more, or call explain() inside hooks for saved tensors, which keep "
            "everything (with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x): ...)"
        )


class Packed(NamedTuple):
    """A saved tensor with the version that it had, which autograd does not check under hooks."""

    kept: Tensor
    version: int
    place: int = -1

    @classmethod
    def of(cls, tensor: Tensor, place: int = -1) -> Packed:
        # A result knows the node that saves it.
        return cls(tensor if tensor.is_leaf else tensor.detach(), tensor._version, place)

    def tensor(self) -> Tensor:
        if self.kept._version != self.version:
            raise RuntimeError(f"one of the saved tensors has been {CHANGED}")
        return self.kept


@dataclass
class Lesson:
    """What explanations of one kind taught. Saved tensors are known by their place: the operation's number in the
    forward pass, and their own among what it saves."""

    seen: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    unread: frozenset[int] = frozenset()
    worth: float = 0.0
    """Bytes that nobody reads, for every saved tensor and byte of the inputs."""
    size: int = 0
    """Bytes of the inputs when that was measured."""
    misses: int = 0

    def watches(self, size: int) -> str:
        """Whether inputs of this size are worth it: to ``"learn"`` how much there is, to let ``"go"`` of it, or not."""
        if self.misses > MISSES:
            return ""
        if self.seen and self.worth * size >= WORTH:
            return "go"
        return "learn" if size > FURTHER * self.size else ""


# Lessons hold no tensors. Kinds are hashes, as a composite may know the model.
_lessons: WeakKeyDictionary[nn.Module, dict[int, Lesson]] = WeakKeyDictionary()


class Unread:
    """The saved tensors of one forward pass."""

    def __init__(self, lesson: Lesson, size: int, goes: bool) -> None:
        """``goes``: what nobody reads is let go."""
        self._lesson, self._size = lesson, size
        self._unread = lesson.unread if goes else frozenset()
        self._learns = not goes
        self._start = self._last = self._ordinal = 0
        self._places: list[int] = []
        self._read: set[int] = set()
        self._memory: dict[int, tuple[int, list[int]]] = {}
        """By storage, the size of what is there and the places that have it, while that is learned."""
        self._done = False
        self.missed = False
        """Somebody read what had been let go."""

    @classmethod
    def of(cls, model: Any, kind: int, size: int) -> Unread | None:
        """``kind``: a hash of what else decides what is read; ``size``: bytes of the inputs. None where it is not worth
        the while, or where others may read what is saved."""
        autograd: Any = torch._C._autograd
        allowed = autograd._saved_tensors_hooks_is_enabled() and not parametrize._cache_enabled
        if not isinstance(model, nn.Module) or not allowed or hooks_around() or active_fake_mode() is not None:
            return None
        lessons = _lessons.setdefault(model, {})
        lesson = lessons.pop(kind, None) or Lesson()
        lessons[kind] = lesson  # the last used is last
        if len(lessons) > KINDS:
            del lessons[next(iter(lessons))]
        watches = lesson.watches(max(1, size))
        return None if not watches or _is_hooked(model) else cls(lesson, max(1, size), watches == "go")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is saved in here is watched, and let go if a lesson says that nobody reads it."""
        with self.allowed(), saved_tensors_hooks(self.pack, self.unpack):
            yield

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Hooks may be set in here, unless the model, or ``torch.func`` in it, forbids it."""
        self._start = self._last = next_number()
        try:
            yield
        except Exception as error:
            if not _is_refusal(error):
                raise
            self.leave()
            raise LetGoError(self) from error

    def pack(self, tensor: Tensor) -> Packed | None:
        number = next_number()
        self._ordinal = self._ordinal + 1 if number == self._last else 0
        self._last = number
        place = (number - self._start) << 16 | self._ordinal
        self._places.append(place)
        if place in self._unread:
            return None
        if self._learns:
            self._look(tensor, place)
        return Packed.of(tensor, place)

    def unpack(self, packed: Packed | None) -> Tensor:
        if packed is None:
            self.missed = True
            if self._done:
                self.leave()  # the next graph is whole
            raise LetGoError(self)
        self._read.add(packed.place)
        return packed.tensor()

    def _look(self, tensor: Tensor, place: int) -> None:
        """Note whose memory it is."""
        base = tensor if tensor._base is None else tensor._base
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and not is_functorch_wrapped_tensor(tensor)
        if plain and not base.is_leaf:  # weights stay where they are
            storage = tensor.untyped_storage()
            self._memory.setdefault(storage._cdata, (storage.nbytes(), []))[1].append(place)

    def learn(self) -> None:
        """The explanation is made: what nobody has read by now nobody reads."""
        lesson, self._done = self._lesson, True
        lesson.seen.update(self._places)
        lesson.read |= self._read
        lesson.unread = frozenset(lesson.seen - lesson.read)
        if self._learns:
            free = sum(size for size, places in self._memory.values() if not lesson.read.intersection(places))
            lesson.worth, lesson.size = free / self._size / max(1, len(self._places)), self._size

    def leave(self) -> None:
        """Follow this kind no more."""
        self._lesson.misses = MISSES + 1

    def again(self) -> Unread | None:
        """For a repeated forward pass that saves everything; None where that was once too often."""
        self._lesson.misses += 1
        if self._lesson.misses > MISSES:
            return None
        return Unread(self._lesson, self._size, False)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that no hooks are allowed: by the model, or ``torch.func``."""
    while error is not None:
        trace = traceback.extract_tb(error.__traceback__)
        if trace and trace[-1].name == "disable_saved_tensors_hooks":
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_hooked(model: nn.Module) -> bool:
    """Whether functions of the caller are given tensors of the graph, which they may keep."""
    module: Any = torch.nn.modules.module
    around = [*module._global_forward_hooks.values(), *module._global_forward_pre_hooks.values()]
    own = "dynlrp.capture"  # of an explanation in another thread
    return any(getattr(hook, "__module__", "") != own for hook in around) or any(
        m._forward_hooks or m._forward_pre_hooks for m in modules(model)
    )

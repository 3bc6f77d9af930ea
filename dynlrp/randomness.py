"""The generators of random numbers that all threads share, and which of them this thread draws from."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

TRAINING = ("dropout_p", "dropout", "train", "training")
"""Arguments that tell, where they are 0 or false, that an operation draws nothing although others of its name do."""
SETTERS = ("manual_seed", "seed", "set_state", "set_offset")
PATIENCE = 2.0
"""Seconds, on top of ten times its usual time, after which a run that does not end is taken to wait for numbers."""


class Source(NamedTuple):
    """A generator of the whole process: how to read, set and compare its state."""

    kind: str
    get: Callable[[], Any]
    put: Callable[[Any], object]
    same: Callable[[Any, Any], bool]


def sources() -> list[Source]:
    """Every generator that a model may draw from without naming it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return [
        Source("torch", torch.get_rng_state, torch.set_rng_state, torch.equal),
        *(
            Source("torch", partial(torch.cuda.get_rng_state, d), partial(_put_cuda, d), torch.equal)
            for d in devices
        ),
        Source("python", random.getstate, random.setstate, lambda a, b: bool(a == b)),
        Source("numpy", np.random.get_state, np.random.set_state, _same_numpy),
    ]  # fmt: skip


def alone() -> bool:
    """Whether no other thread of Python is there: then all draws are this one's."""
    return len(sys._current_frames()) == 1


class Draws:
    """Who draws from some sources while this thread repeats what it did."""

    def __init__(self, watched: Iterable[Source], again: Callable[[], object]) -> None:
        self._sources = list(watched)
        self._last = [source.get() for source in self._sources]
        self.ours: set[Source] = set()
        self.others: set[Source] = set()
        begun = time.monotonic()
        with _Operations(self), self._calls(), suppress(Exception):  # it may be why we are asked
            again()
        self._look("python")
        self._look("torch")
        numpy = [source for source in self._sources if source.kind == "numpy"]
        if numpy and not all(self._unchanged(source) for source in numpy):
            # Nobody can tell from outside who calls its functions, but they take a lock.
            taken = time.monotonic() - begun
            mine = _waits(again, 10 * taken + PATIENCE)
            (self.ours if mine else self.others).update(numpy)
            self._last = [source.get() for source in self._sources]
            time.sleep(taken)
            self._look("numpy")

    def _unchanged(self, source: Source) -> bool:
        return source.same(self._last[self._sources.index(source)], source.get())

    def _look(self, kind: str, ours: bool = False) -> None:
        """Note who changed the state of the sources of one kind since the last look."""
        for place, source in enumerate(self._sources):
            if source.kind == kind and not source.same(self._last[place], now := source.get()):
                self._last[place] = now
                (self.ours if ours else self.others).add(source)

    @contextmanager
    def drawing(self, kind: str) -> Iterator[None]:
        """What changes in here is this thread's doing."""
        self._look(kind)
        yield
        self._look(kind, ours=True)

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Watch the functions that this thread calls for those of Python's generator, and for seeds."""
        python, before = random.random.__self__, sys.getprofile()  # type: ignore[attr-defined]

        def called(frame: Any, event: str, function: Any) -> None:
            if event.startswith("c_"):
                owner = getattr(function, "__self__", None)
            else:
                owner = frame.f_locals.get("self") if frame.f_code.co_filename == random.__file__ else None
            if owner is python:
                self._look("python", event not in ("call", "c_call"))
            elif event == "c_call" and isinstance(owner, torch.Generator) and function.__name__ in SETTERS:
                self.ours.update(source for source in self._sources if source.kind == "torch")

        sys.setprofile(called)
        try:
            yield
        finally:
            sys.setprofile(before)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the operations that this thread runs for those that draw."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _may_draw(func, args, kwargs):
            return func(*args, **kwargs)
        with self._draws.drawing("torch"):
            return func(*args, **kwargs)


def _may_draw(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation may draw from a shared generator; those of others than PyTorch do not say."""
    if func.namespace in ("aten", "prims", "prim") and torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name in TRAINING and given is not None and not given:
            return False
        if argument.name == "generator" and given is not None:
            shared: list[Any] = [torch.default_generator, *torch.cuda.default_generators]
            return any(given._cdata == generator._cdata for generator in shared)
    return True


def _waits(again: Callable[[], object], limit: float) -> bool:
    """Whether a run does not end while another thread holds the lock of numpy's generator, for ``limit`` seconds."""
    lock = np.random.rand.__self__._bit_generator.lock  # type: ignore[attr-defined]
    held, done = threading.Event(), threading.Event()
    waited: list[bool] = []

    def hold() -> None:
        with lock:
            held.set()
            waited.append(not done.wait(limit))

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        with suppress(Exception):
            again()
    finally:
        done.set()
        holder.join()
    return waited[0]


def _put_cuda(device: int, state: Any) -> None:
    torch.cuda.set_rng_state(state, device)


def _same_numpy(a: Any, b: Any) -> bool:
    return bool(a[2:] == b[2:] and (a[1] == b[1]).all())

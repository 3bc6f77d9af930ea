"""Many calls of one function, each in a process that may crash or hang without harm to the others."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from dynlrp.errors import described

SPAWN = multiprocessing.get_context("spawn")
START = 300.0
"""Seconds for a process to be ready for a call: the first one waits for its imports."""


class Outcome(NamedTuple):
    """What became of one call."""

    argument: Any
    value: Any = None
    error: str = ""
    """Why there is no value."""


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    argument: Any = None
    deadline: float = 0.0


def run(
    function: Callable[[Any], Any], arguments: Sequence[Any], *, jobs: int, timeout: float, memory: float = 0.0
) -> Iterator[Outcome]:
    """Call ``function``, which a module must define, on each argument; outcomes come as they are ready.

    Args:
        jobs: number of processes.
        timeout: seconds for one call; then its process is ended.
        memory: GiB of data that a process may have; what asks for more fails. 0 is no limit.
    """
    waiting = deque(arguments)
    workers = [_start(function, memory) for _ in range(min(jobs, len(waiting)))]
    try:
        busy = [worker for worker in workers if _next(worker, waiting)]
        while busy:
            nearest = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.pipe for worker in busy], max(0.0, nearest))
            for worker in list(busy):
                if worker.pipe in ready:
                    outcome = _receive(worker)
                elif time.monotonic() > worker.deadline:
                    outcome = _ended(worker, f"more than {timeout:g} s")
                else:
                    continue
                if outcome is None:  # it starts only now
                    worker.deadline = time.monotonic() + timeout
                    continue
                yield outcome
                if not worker.process.is_alive() and waiting:
                    workers[workers.index(worker)] = fresh = _start(function, memory)
                    busy[busy.index(worker)] = worker = fresh
                if not (worker.process.is_alive() and _next(worker, waiting)):
                    busy.remove(worker)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _start(function: Callable[[Any], Any], memory: float) -> _Worker:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(function, theirs, memory), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _next(worker: _Worker, waiting: deque[Any]) -> bool:
    if not waiting:
        return False
    worker.argument, worker.deadline = waiting.popleft(), time.monotonic() + START
    with suppress(BrokenPipeError):  # it ended; who waits for its answer will see
        worker.pipe.send(worker.argument)
    return True


def _receive(worker: _Worker) -> Outcome | None:
    try:
        answer = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _ended(worker, f"the process ended with {how}")
    return None if answer is None else Outcome(worker.argument, *answer)


def _ended(worker: _Worker, why: str) -> Outcome:
    worker.process.kill()
    worker.process.join()
    return Outcome(worker.argument, error=why)


def _serve(function: Callable[[Any], Any], pipe: Connection, memory: float) -> None:
    """A worker's life."""
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        pipe.send(None)
        try:
            answer = function(argument), ""
        except Exception as error:
            answer = None, described(error)
        pipe.send(answer)

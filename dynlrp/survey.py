"""Coverage reports on many models: each in a process of its own, and none made twice where a file keeps them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from dynlrp import jobs
from dynlrp._version import __version__
from dynlrp.composite import composite_named
from dynlrp.coverage import Coverage
from dynlrp.errors import InputError
from dynlrp.zoo import examine, find


class Task(NamedTuple):
    """One report that is wanted."""

    model: str
    digest: str = ""
    keeps: bool = True
    shape: tuple[int, ...] | None = None
    composite: str = "auto"
    verify: bool = False

    @property
    def key(self) -> str:
        """What the report depends on."""
        return json.dumps([self.model, self.digest, self.shape, self.composite, self.verify, versions()])


def tasks(
    models: Sequence[str], *, shape: tuple[int, ...] | None = None, composite: str = "auto", verify: bool = False
) -> list[Task]:
    """One task for each model that the texts mean; see :func:`dynlrp.zoo.find`, which raises for unknown ones."""
    composite = composite_named(composite).name  # or an error, before anything runs
    entries = {entry.name: entry for model in models for entry in find(model, shape)}
    return [Task(entry.name, entry.digest, entry.keeps, shape, composite, verify) for entry in entries.values()]


def survey(
    wanted: Sequence[Task],
    *,
    processes: int = 1,
    timeout: float = 300.0,
    memory: float = 0.0,
    kept: Path | None = None,
    make: Callable[[Task], Coverage] | None = None,
) -> Iterator[Coverage]:
    """The reports, as they are ready. What crashes or takes too long is a report that says so.

    Args:
        processes: how many run at once.
        timeout: seconds for one model.
        memory: GiB for one process; 0 is no limit.
        kept: a file of JSON lines to which reports are added. Those it has from the same versions are not made again;
            its other lines are left as they are.
        make: makes one report; by default that on a model of the zoo.
    """
    keys = {task.key for task in wanted if task.keeps}
    old = {} if kept is None else _read(kept, keys)
    missing = []
    for task in wanted:
        if task.keeps and task.key in old:
            yield old[task.key]
        else:
            missing.append(task)
    for task, report, error in jobs.run(make or report_on, missing, jobs=processes, timeout=timeout, memory=memory):
        if report is None:
            report = Coverage(task.model, error=error)
        elif kept is not None and task.keeps:
            _append(kept, json.dumps({"key": task.key, "report": report.to_dict()}))
        yield report


def report_on(task: Task) -> Coverage:
    """The report on one task, in a process of its own."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    (entry,) = find(task.model, task.shape)
    return examine(entry, composite=task.composite, verify=task.verify)


@cache
def versions() -> dict[str, str]:
    """What a report is true of: packages, and this package's own source."""
    found = {"dynlrp": __version__, "torch": torch.__version__}
    for package in ("transformers", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    here = Path(__file__).parent
    source = hashlib.sha256()
    for file in sorted([*here.rglob("*.py"), *(here / "rules").rglob("*.py")]):
        source.update(file.read_bytes())
    return {**found, "source": source.hexdigest()[:16]}


def _read(file: Path, keys: Container[str]) -> dict[str, Coverage]:
    """The reports of a file that have one of these keys."""
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    if text and not text.startswith('{"key"'):
        raise InputError(f"{file} has something else than kept reports in it; give a new file or one that --keep made")
    found = {}
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off, or changed
            entry = json.loads(line)
            if entry["key"] in keys:
                found[entry["key"]] = Coverage.from_dict(entry["report"])
    return found


def _append(file: Path, line: str) -> None:
    """Add a line, on its own even where the last one was cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        if stream.seek(0, os.SEEK_END) and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            stream.write(b"\n")
        stream.write(line.encode() + b"\n")


def order(reports: Sequence[Coverage], wanted: Sequence[Task]) -> list[Coverage]:
    """Reports in the order of their tasks."""
    place = {task.model: number for number, task in enumerate(wanted)}
    return sorted(reports, key=lambda report: place[report.model])

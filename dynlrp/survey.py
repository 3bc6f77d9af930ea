"""Coverage reports on many models: each in a process of its own, and none made twice where a file keeps them."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from dynlrp import jobs
from dynlrp._version import __version__
from dynlrp.composite import composite_named
from dynlrp.coverage import Coverage
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
        return json.dumps([self.model, self.digest, self.composite, self.verify, versions()])


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
        kept: a file of JSON lines to which reports are added. Those it has from the same versions are not made again.
        make: makes one report; by default that on a model of the zoo.
    """
    old = _read(kept)
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
            kept.parent.mkdir(parents=True, exist_ok=True)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": task.key, "report": report.to_dict()}) + "\n")
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


def _read(file: Path | None) -> dict[str, Coverage]:
    if file is None or not file.exists():
        return {}
    found = {}
    for line in file.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was cut off
            continue
        found[entry["key"]] = Coverage.from_dict(entry["report"])
    return found


def order(reports: Sequence[Coverage], wanted: Sequence[Task]) -> list[Coverage]:
    """Reports in the order of their tasks."""
    place = {task.model: number for number, task in enumerate(wanted)}
    return sorted(reports, key=lambda report: place[report.model])

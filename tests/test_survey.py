"""Many models in processes of their own: what crashes, hangs or was interrupted harms no other."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dynlrp import Coverage, InputError, jobs, survey
from dynlrp.survey import Task
from dynlrp.zoo import ZooError


def misbehave(task: str) -> Any:
    """What a model may do to the process that it runs in."""
    what, _, argument = task.partition(" ")
    if what == "raise":
        raise ValueError(argument)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(7)
    if what == "sleep":
        time.sleep(600)
    if what == "eat":
        return len(bytearray(4 * 2**30))
    return f"{argument} in {os.getpid()}"


def test_no_call_harms_another() -> None:
    tasks = ["say a", "kill", "say b", "raise c", "sleep", "exit", "eat", "say d", "say e"]
    found = {o.argument: o for o in jobs.run(misbehave, tasks, jobs=2, timeout=2, memory=3)}
    assert sorted(found) == sorted(tasks)
    assert [found[f"say {x}"].value.split()[0] for x in "abde"] == ["a", "b", "d", "e"]
    assert re.fullmatch(r"ValueError: c \(test_survey.py:\d+\)", found["raise c"].error)
    assert found["kill"].error == "the process ended with SIGSEGV"
    assert found["exit"].error == "the process ended with exit code 7"
    assert found["sleep"].error == "more than 2 s"
    assert found["eat"].error.startswith("MemoryError")
    assert all(found[task].value is None for task in ("kill", "raise c", "sleep", "exit", "eat"))


def test_nothing_to_do_starts_nothing() -> None:
    assert list(jobs.run(misbehave, [], jobs=4, timeout=1)) == []


def noted(task: Task) -> Coverage:
    """A report that leaves a trace of having been made."""
    with open(os.environ["DYNLRP_TEST_NOTES"], "a") as file:
        file.write(task.model + "\n")
    if task.model == "bad":
        raise ValueError("no such thing")
    return Coverage(task.model, composite=task.composite, nodes=3, covered=3)


def here(function: Callable[[Any], Any], arguments: Sequence[Any], **_: Any) -> Iterator[jobs.Outcome]:
    """Calls in this process."""
    for argument in arguments:
        try:
            yield jobs.Outcome(argument, function(argument))
        except ValueError as error:
            yield jobs.Outcome(argument, error=f"ValueError: {error}")


def test_a_run_is_taken_up_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what has no report yet is made: not what failed, nor what a cut-off line or another version said."""
    notes, kept = tmp_path / "notes", tmp_path / "kept.jsonl"
    monkeypatch.setenv("DYNLRP_TEST_NOTES", str(notes))
    monkeypatch.setattr(jobs, "run", here)
    tasks = [Task("one"), Task("bad"), Task("mine", keeps=False), Task("two")]

    def run(*wanted: Task) -> tuple[list[Coverage], list[str]]:
        notes.write_text("")
        reports = survey.order(list(survey.survey(wanted, kept=kept, make=noted)), wanted)
        return reports, notes.read_text().split()

    first, made = run(*tasks)
    assert made == ["one", "bad", "mine", "two"]
    assert [report.status for report in first] == ["covered", "failed", "covered", "covered"]
    assert first[1].error == "ValueError: no such thing"
    again, made = run(*tasks)
    assert made == ["bad", "mine"]
    assert again == first
    _, made = run(tasks[0]._replace(verify=True), tasks[3]._replace(digest="other"))
    assert made == ["one", "two"]
    text = kept.read_text().splitlines()
    kept.write_text(text[0] + "\n" + text[1][:40])
    assert run(*tasks)[1] == ["bad", "mine", "two"]
    assert run(*tasks)[1] == ["bad", "mine"]  # a report begins a line of its own behind one that was cut off
    assert run(tasks[0]._replace(shape=(1, 2)))[1] == ["one"]
    monkeypatch.setattr(survey, "versions", lambda: {"dynlrp": "other"})
    assert run(*tasks)[1] == ["one", "bad", "mine", "two"]


@pytest.mark.parametrize("line", [
    {"key": Task("one").key},
    {"key": Task("one").key, "report": {"model": "one"}},
    {"key": Task("one").key, "report": {**Coverage("one").to_dict(), "rho": [], "operations": [{"name": "x"}]}},
    {"key": "another", "report": 7},
])  # fmt: skip
def test_reports_of_another_make_are_made_again(
    line: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(jobs, "run", here)
    (report,) = survey.survey([Task("one")], kept=kept, make=lambda task: Coverage(task.model, nodes=1))
    assert report.nodes == 1
    assert len(kept.read_text().splitlines()) == 2


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "page.html"
    kept.write_text("<!DOCTYPE html>")
    with pytest.raises(InputError, match="something else than kept reports"):
        list(survey.survey([Task("one")], kept=kept, make=noted))
    assert kept.read_text() == "<!DOCTYPE html>"


CRASHES = {
    "raises": "raise RuntimeError('on import')",
    "leaves": "import sys; sys.exit(3)",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "misspelt": "def build(: pass",
    "works": "from torch import nn, zeros\ndef build(): return nn.Linear(2, 2), zeros(1, 2)",
}


def test_a_module_that_crashes_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in CRASHES.items():
        (tmp_path / f"users_{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent.parent}")
    wanted = survey.tasks([f"users_{name}:build" for name in CRASHES])
    reports = dict(zip(CRASHES, survey.order(list(survey.survey(wanted)), wanted), strict=True))
    assert reports["raises"].error == "RuntimeError: on import (users_raises.py:1)"
    assert reports["leaves"].error == "the process ended with exit code 3"
    assert reports["dies"].error == "the process ended with SIGSEGV"
    assert reports["misspelt"].error.startswith("SyntaxError: ")
    assert reports["works"].status == "covered"


def test_tasks_are_named_once_and_unknown_ones_are_refused() -> None:
    tasks = survey.tasks(["paper/gpt*", "gpt2", "family/bert"], composite="attnlrp", verify=True)
    assert [task.model for task in tasks] == ["paper/gpt2", "family/bert"]
    assert all(task.composite == "attnlrp" and task.verify and task.keeps for task in tasks)
    with pytest.raises(ZooError, match="did you mean family/bert"):
        survey.tasks(["paper/gpt2", "bertt"])


def test_versions_tell_the_source_apart() -> None:
    assert set(survey.versions()) >= {"dynlrp", "torch", "transformers", "source"}
    assert len(survey.versions()["source"]) == 16

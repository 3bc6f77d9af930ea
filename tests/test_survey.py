"""Many models in processes of their own: what crashes, hangs or was interrupted harms no other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dynlrp import Coverage, jobs, survey
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
    assert found["raise c"].error == "ValueError: c"
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
    monkeypatch.setattr(survey, "versions", lambda: {"dynlrp": "other"})
    assert run(*tasks)[1] == ["one", "bad", "mine", "two"]


def test_tasks_are_named_once_and_unknown_ones_are_refused() -> None:
    tasks = survey.tasks(["paper/gpt*", "gpt2", "family/bert"], composite="attnlrp", verify=True)
    assert [task.model for task in tasks] == ["paper/gpt2", "family/bert"]
    assert all(task.composite == "attnlrp" and task.verify and task.keeps for task in tasks)
    with pytest.raises(ZooError, match="did you mean family/bert"):
        survey.tasks(["paper/gpt2", "bertt"])


def test_versions_tell_the_source_apart() -> None:
    assert set(survey.versions()) >= {"dynlrp", "torch", "transformers", "source"}
    assert len(survey.versions()["source"]) == 16

"""Coverage reports as tables and as a page: totals, formats, and that no text is ever read as markup."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynlrp import Coverage, InputError, report
from dynlrp.cli import app
from dynlrp.coverage import Idle, OperationCount, Uncovered
from dynlrp.survey import Task
from dynlrp.verification import Balances, Unbalanced, Verification
from tests.browser import browse, needs_browser

EVIL = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">|`&"
VERSIONS = {"dynlrp": "1", "torch": "2"}


def passed(**balances: tuple[int, int]) -> Verification:
    return Verification({n: Balances(*b) for n, b in balances.items()}, (), 1e-8, True, True, True, 0.01, 0.02)


MUL, ADD = ("MulBackward0", "product", ("Share",)), ("AddBackward0", "addition", ("VJP",))
GOOD = Coverage(
    "family/good", modality="text", composite="auto", parameters=1234, nodes=10, leaves=3, reached=9, covered=10,
    operations=(OperationCount(*MUL, 4, 3, 4), OperationCount(*ADD, 6, 6, 6)), roles={"gate": 2, "self gate": 1},
    idle=(Idle("vision_tower", 617, False), Idle("pooler", 61, True)),
    promises=5, replayed=2, delta=1, rho=0.25, seconds=0.5,
    verification=passed(MulBackward0=(3, 3), AddBackward0=(6, 6)),
)  # fmt: skip
GAPS = Coverage(
    "family/gaps", title="With | gaps", modality="vision", nodes=10, leaves=1, reached=10, covered=7,
    operations=(OperationCount(*MUL, 4, 4, 4), OperationCount("OpaqueBackward", "", (), 6, 6, 3)),
    uncovered=(Uncovered("OpaqueBackward", "layer.0", 2, True, "", "OpakeBackward"),
               Uncovered("OpaqueBackward", "", 1, False, "a loss", "")),
    verification=Verification(error="UnknownOperationError: no rule"),
)  # fmt: skip
OPEN = Coverage(
    "family/open", nodes=5, covered=5, reached=5, operations=(OperationCount(*ADD, 5, 5, 5),),
    verification=Verification(
        {"AddBackward0": Balances(5, 2)},
        (Unbalanced("AddBackward0", "layer", 2, 0.125, ""), Unbalanced("AddBackward0", "", 1, 0.0, "it is lost")),
        0.25, False, True, False, 0.0, 0.1,
    ),
)  # fmt: skip
FAILED = Coverage("family/failed", error="ZooError: no inputs fit:\n    " + EVIL)
ALL = [GOOD, GAPS, OPEN, FAILED]


def test_totals() -> None:
    total = report.summary(ALL)
    assert (total.models, total.failed, total.nodes, total.covered) == (4, 1, 25, 22)
    assert (total.operations, total.operations_covered) == (3, 2)
    assert (total.asked, total.passed, total.verified) == (3, 1, 11)
    assert total.reached == 24
    assert str(total) == (
        "4 models, 1 of them without a report: 22 of 25 nodes covered (88.00 %), 2 of 3 operations; 1 of 3 explained "
        "with a closing ledger, 11 of the 24 nodes that relevance reaches verified (45.83 %)"
    )
    assert str(report.summary([GOOD])) == (
        "1 model: 10 of 10 nodes covered (100 %), 2 of 2 operations; 1 of 1 explained with a closing ledger, "
        "9 of the 9 nodes that relevance reaches verified (100 %)"
    )
    assert str(report.summary([])) == "0 models: 0 of 0 nodes covered (0.00 %), 0 of 0 operations"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (99_999, 100_000, "99.99 %"),
        (31_440, 31_465, "99.92 %"),
        (57, 100, "57.00 %"),
        (3, 3, "100 %"),
        (0, 0, "0.00 %"),
    ],
)
def test_only_everything_is_all(part: int, whole: int, text: str) -> None:
    assert report.percent(part, whole) == text


def test_nothing_that_is_wrong_is_hidden() -> None:
    found = report.problems(ALL)
    assert [(model, where, operation) for model, where, operation, _ in found] == [
        ("family/gaps", "layer.0", "OpaqueBackward"),
        ("family/gaps", "the model itself", "OpaqueBackward"),
        ("family/gaps", "not verified", ""),
        ("family/open", "layer", "AddBackward0"),
        ("family/open", "the model itself", "AddBackward0"),
        ("family/open", "not verified", ""),
        ("family/failed", "no report", ""),
    ]
    assert [what for *_, what in found][:6] == [
        "2 nodes. nearest rule: OpakeBackward",
        "a loss; relevance does not reach it",
        "UnknownOperationError: no rule",
        "2 nodes. its own balance is open by 1.2e-01",
        "balance unknown: it is lost",
        "the ledger is open by 2.5e-01; nodes do not balance; the output changed",
    ]
    assert report.problems([GOOD]) == []


def test_towers_that_take_no_part_are_told() -> None:
    """A twentieth of 1,234 parameters is 61.7: the pooler is no tower."""
    assert report.towers(ALL) == [("family/good", "vision_tower", "50 %", "did not run")]


def test_numbers_in_float64_are_told() -> None:
    check = replace(passed(AddBackward0=(1, 1)), float64=True)
    assert report.COLUMNS["residual"](replace(GOOD, verification=check)) == "1e-08 (float64)"


def test_markdown() -> None:
    text = report.to_markdown(ALL)
    assert "| family/good | vision_tower | 50 % | did not run |" in text
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows[:6]} == {len(report.COLUMNS)}
    cells = dict(zip(report.COLUMNS, (cell.strip() for cell in rows[2]), strict=True))
    assert cells == {
        "model": "family/good", "kind": "text", "parameters": "1,234", "nodes": "10", "leaves": "3", "covered": "10",
        "operations": "2/2", "reached": "9", "verified": "9", "residual": "1e-08", "promises": "5", "delta": "1",
        "rho": "0.250", "roles": "gate 2, self gate 1", "time": "2.0x", "status": "verified",
    }  # fmt: skip
    assert "With \\| gaps" in text
    assert "<" not in text
    assert "&lt;/script&gt;" in text


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv(ALL))))
    assert [row["model"] for row in rows] == [one.model for one in ALL]
    assert rows[0]["roles"] == "gate=2 self_gate=1"
    assert rows[0]["idle"] == "vision_tower pooler"
    assert (rows[1]["uncovered"], rows[1]["operations"], rows[1]["operations_covered"]) == ("OpaqueBackward", "2", "1")
    assert float(rows[2]["residual"]) == 0.25
    assert rows[3]["error"] == FAILED.error
    assert rows[3]["residual"] == ""


def test_json_and_back() -> None:
    text = report.to_json(ALL, VERSIONS)
    assert report.from_json(text) == ALL
    data = json.loads(text)
    assert data["versions"] == VERSIONS
    assert data["summary"]["covered"] == 22
    assert [model["status"] for model in data["models"]] == ["verified", "gaps", "not verified", "failed"]


def test_the_papers_figures_stand_beside_all_fifteen_alone() -> None:
    fifteen = [Coverage(f"paper/{number}", nodes=1, covered=1) for number in range(15)]
    assert "31,440" in report.to_markdown(fifteen)
    assert "31,465" in report.to_html(fifteen, VERSIONS)
    assert "31,440" not in report.to_markdown(fifteen[:14])


def test_the_papers_rows_stand_beside_ours() -> None:
    """The paper's rows add up to less than its total."""
    covered, nodes = (sum(row[k] for row in report.PAPER_ROWS.values()) for k in (0, 1))
    assert (covered + 600, nodes + 600) == report.PAPER_TOTAL
    mamba = Coverage("paper/mamba-130m", nodes=10, covered=10)
    assert report.to_markdown([mamba]).splitlines()[2].endswith("| 3,397/3,421, 25/26 |")
    assert "the paper" not in report.to_markdown([GOOD])
    assert "3,397/3,421" in report.to_html([mamba], VERSIONS)


class Tags(HTMLParser):
    """The tags of a page, as a browser opens them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.opened.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data-src")]


def test_a_page_is_one_file_and_its_texts_are_no_markup() -> None:
    evil = Coverage(EVIL, title=EVIL, modality=EVIL, nodes=1, uncovered=(Uncovered(EVIL, EVIL, 1, True, EVIL, EVIL),))
    plain, page = (Tags(report.to_html(some, VERSIONS, EVIL)) for some in ([GOOD], [*ALL, evil]))
    assert page.opened.count("script") == plain.opened.count("script") == 2
    assert "img" not in page.opened
    assert page.addresses == []
    assert not re.search(r"https?://(?!www\.w3\.org)", report.to_html(ALL, VERSIONS))


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    evil = Coverage(
        "family/" + EVIL, title=EVIL, nodes=1, covered=1, operations=(OperationCount(EVIL, "x", (), 1, 1, 1),)
    )
    page = report.to_html([*ALL, evil], VERSIONS, "A title")
    seen = browse(
        tmp_path,
        page,
        """
        const out = [document.title], rows = () => [...document.querySelectorAll("tr.row")];
        const names = () => rows().map(row => row.querySelector("button").textContent.slice(0, 13)).join(",");
        const say = (id, value, kind) => {
          const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event(kind)) };
        const head = name => [...document.querySelectorAll("thead button")].find(b => b.textContent === name);
        const count = what => document.querySelectorAll(what).length;
        const detail = () => document.querySelector("tr.detail").textContent;
        out.push(rows().length, count(".tile"), count(".row .bar"));
        head("nodes").click(); out.push(names());
        head("nodes").click(); out.push(names());
        say("search", "opaque", "input"); out.push(names());
        rows()[0].click();
        out.push(count("tr.detail"), detail().includes("OpakeBackward"));
        say("search", "", "input"); say("status", "verified", "change"); out.push(names());
        say("status", "", "change"); say("kind", "vision", "change"); out.push(names());
        document.getElementById("by-operation").click(); out.push(names());
        rows()[0].click(); out.push(detail().includes("family/good"));
        say("search", "nothing fits this", "input"); out.push(rows().length);
        document.getElementById("theme").click(); out.push(document.documentElement.dataset.theme);
        out.push(document.images.length, count("script"));
        return out.join("; ");
        """,
    )
    assert seen.split("; ") == [
        "A title", "5", "5", "4",
        "family/good,With | gaps,family/open,</script><scr,family/failed",
        "family/failed,</script><scr,family/open,family/good,With | gaps",
        "With | gaps", "1", "true", "family/good", "With | gaps",
        "AddBackward0,MulBackward0,OpaqueBackwar,</script><scr", "true", "0", "dark", "0", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("ending", report.WRITERS)
def test_files(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"report{ending}"
    report.write(path, ALL, VERSIONS)
    assert "family/good" in path.read_text("utf-8")
    with pytest.raises(InputError, match=r"written as \.md, \.csv, \.json, \.html, not as \.pdf"):
        report.write(tmp_path / "report.pdf", ALL, VERSIONS)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line gets these reports, and makes none."""
    made = {one.model: one for one in ALL}
    monkeypatch.setattr("dynlrp.survey.tasks", lambda models, **_: [Task(model) for model in models])
    monkeypatch.setattr("dynlrp.survey.survey", lambda wanted, **_: (made[task.model] for task in reversed(wanted)))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["coverage", *arguments])


@pytest.mark.usefixtures("reports")
def test_the_command(tmp_path: Path) -> None:
    good = run("family/good")
    assert (good.exit_code, good.stdout.splitlines()[0].split()[:3]) == (0, ["model", "kind", "parameters"])
    assert "1 model: 10 of 10 nodes covered (100 %)" in good.stdout
    every = run(*(one.model for one in ALL), "-o", str(tmp_path / "a.html"), "-o", str(tmp_path / "a.json"), "--json")
    assert every.exit_code == 1
    assert report.from_json(every.stdout) == report.from_json((tmp_path / "a.json").read_text("utf-8")) == ALL
    assert "written: " in every.stderr
    assert run("family/good", "--csv").stdout.count("\n") == 2
    assert run("family/good", "--markdown").stdout.startswith("| model |")
    assert "only one of" in run("family/good", "--csv", "--json").stderr
    wrong = run("family/good", "-o", "a.pdf")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "written as .md, .csv, .json, .html" in wrong.stderr


def test_a_run_that_is_stopped_tells_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(wanted: Any, **_: Any) -> Iterator[Coverage]:
        yield GOOD
        raise KeyboardInterrupt

    monkeypatch.setattr("dynlrp.survey.tasks", lambda models, **_: [Task(model) for model in models])
    monkeypatch.setattr("dynlrp.survey.survey", stopped)
    result = run("family/good", "family/gaps")
    assert result.exit_code == 1
    assert "stopped after 1 of 2 models" in result.stderr
    assert "1 model: 10 of 10 nodes covered" in result.stdout


@pytest.mark.usefixtures("reports")
def test_columns_without_anything_are_left_out() -> None:
    """A report that failed has no numbers, and what was not asked for has no column."""
    heads, failed, *_ = run("family/failed").stdout.splitlines()
    assert heads.split() == ["model", "status"]
    assert failed.split() == ["family/failed", "failed"]
    assert "time" not in run("family/gaps").stdout.splitlines()[0].split()
    cells = [cell.strip() for cell in report.models_table([FAILED]).splitlines()[-1].split("|")]
    assert [cell for cell in cells if cell] == ["family/failed", "failed"]


def test_unknown_models_on_the_command_line() -> None:
    result = run("bertt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("no model is called 'bertt': did you mean family/bert")
    assert "no shape such as" in run("bert", "--shape", "1,x").stderr
    assert "no composite is called 'nope'" in run("bert", "--composite", "nope").stderr


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing is replaced here: a model is found, reported on in another process, and kept."""
    kept = tmp_path / "kept.jsonl"
    result = run("family/bert", "--verify", "--json", "--keep", str(kept))
    assert result.exit_code == 0, result.stderr
    (one,) = report.from_json(result.stdout)
    assert (one.model, one.status, one.nodes) == ("family/bert", "verified", one.covered)
    assert run("family/bert", "--verify", "--json", "--keep", str(kept)).stdout == result.stdout


def test_the_zoo_on_the_command_line() -> None:
    result = CliRunner().invoke(app, ["zoo", "paper/*"])
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["name", "model", "class", "modality", "parameters"]
    assert lines[1].split() == ["paper/vgg16", "VGG16", "dynlrp.zoo.nets.vgg16", "vision", "138,357,544"]
    assert lines[-1] == "15 models"


def test_the_zoo_is_searched() -> None:
    def search(*texts: str) -> Any:
        return CliRunner().invoke(app, ["zoo", *texts])

    lines = search("GPT2").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["paper/gpt2", "family/gpt2"]
    assert ["family/roc_bert", "RoCBertModel", "text"] in [
        line.split() for line in search("bertmodel").stdout.splitlines()
    ]
    assert search("DeepLabV3").exit_code == 1
    nothing = search("bertt", "paper/rexnet*")
    assert (nothing.exit_code, nothing.stdout) == (1, "")
    assert nothing.stderr.startswith("no model is like bertt, paper/rexnet*; did you mean family/bert,")

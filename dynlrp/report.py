"""Coverage reports as tables: Markdown, CSV, JSON and one HTML page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dynlrp.coverage import Coverage, Uncovered
from dynlrp.errors import InputError
from dynlrp.verification import Unbalanced, Verification

PAPER_TOTAL = (31_440, 31_465)
PAPER_ROWS = {
    "paper/vgg16": (90, 90, 9, 9),
    "paper/resnet50": (339, 339, 10, 10),
    "paper/vit-b16": (779, 779, 16, 16),
    "paper/efficientnetv2-m": (1_526, 1_526, 12, 12),
    "paper/siglip2-so400m": (2_178, 2_178, 19, 19),
    "paper/wav2vec2-xls-r-300m": (2_021, 2_022, 18, 19),
    "paper/whisper-small": (2_729, 2_729, 22, 22),
    "paper/gpt2": (885, 885, 19, 19),
    "paper/roberta-large": (1_461, 1_461, 14, 14),
    "paper/llama-3.2-1b": (1_787, 1_787, 24, 24),
    "paper/gemma-3-270m": (2_482, 2_482, 24, 24),
    "paper/qwen3-0.6b": (2_590, 2_590, 18, 18),
    "paper/flan-t5-large": (5_713, 5_713, 24, 24),
    "paper/deplot": (2_863, 2_863, 23, 23),
    "paper/mamba-130m": (3_397, 3_421, 25, 26),
}
"""What *Always Keep Your Promises* (arXiv:2512.07010v1, table of operation coverage) says of its fifteen models:
covered nodes, nodes, covered operations, operations. It counts leaves as nodes, of one operation."""
PAPER = (
    "The paper (arXiv:2512.07010v1) gives 31,440 of 31,465 nodes in total, which is 600 more than its rows add up to; "
    "it lacks WeightNormInterface and SplitWithSizes. It counts leaves as nodes; here they stand apart. Else the "
    "numbers of nodes depend on the versions of PyTorch and transformers, on heads, dropout and the length of the "
    "inputs: Mamba's scan has nodes for every step."
)
COLUMNS: dict[str, Callable[[Coverage], str]] = {
    "model": lambda r: r.title or r.model,
    "kind": lambda r: r.modality,
    "parameters": lambda r: f"{r.parameters:,}",
    "nodes": lambda r: f"{r.nodes:,}",
    "leaves": lambda r: f"{r.leaves:,}",
    "covered": lambda r: f"{r.covered:,}",
    "operations": lambda r: f"{r.operations_covered}/{len(r.operations)}",
    "reached": lambda r: f"{r.reached:,}",
    "verified": lambda r: f"{r.verified:,}" if r.verification else "",
    "residual": lambda r: _residual(r.verification) if r.verification and not r.verification.error else "",
    "promises": lambda r: f"{r.promises:,}",
    "delta": lambda r: str(r.delta),
    "rho": lambda r: f"{r.rho:.3f}",
    "roles": lambda r: ", ".join(f"{name} {count}" for name, count in r.roles.items()),
    "time": lambda r: f"{r.verification.ratio:.1f}x" if r.verification and r.verification.ratio else "",
    "status": lambda r: r.status,
}
"""The columns of a table for people."""


def _residual(check: Verification) -> str:
    return f"{check.residual:.0e}" + " (float64)" * check.float64


def columns_for(reports: Iterable[Coverage]) -> dict[str, Callable[[Coverage], str]]:
    """The columns of a table, with the paper's figures where there are any. Of a report that failed, the model and the
    status alone are known."""
    columns = {**COLUMNS, "the paper": _paper} if any(report.model in PAPER_ROWS for report in reports) else COLUMNS
    return {
        name: cell if name in ("model", "status") else partial(_unless_failed, cell) for name, cell in columns.items()
    }


def _unless_failed(cell: Callable[[Coverage], str], report: Coverage) -> str:
    return "" if report.error else cell(report)


def _paper(report: Coverage) -> str:
    if report.model not in PAPER_ROWS:
        return ""
    covered, nodes, known, operations = PAPER_ROWS[report.model]
    return f"{covered:,}/{nodes:,}, {known}/{operations}"


TEXT = ("model", "kind", "roles", "status")
"""Columns that are no numbers."""


@dataclass(frozen=True)
class Summary:
    """Totals over models; those that failed count as models alone."""

    models: int
    failed: int
    nodes: int
    leaves: int
    covered: int
    operations: int
    """Different ones."""
    operations_covered: int
    asked: int
    """Models that were to be verified."""
    passed: int
    reached: int
    """Nodes of those models that relevance reaches."""
    verified: int

    def __str__(self) -> str:
        text = counted(self.models, "model")
        text += f", {self.failed} of them without a report" * bool(self.failed)
        text += f": {self.covered:,} of {counted(self.nodes, 'node')} covered ({percent(self.covered, self.nodes)})"
        text += f", {self.operations_covered} of {counted(self.operations, 'operation')}"
        if self.asked:
            text += f"; {self.passed} of {self.asked} explained with a closing ledger, "
            text += f"{self.verified:,} of the {counted(self.reached, 'node')} that relevance reaches verified "
            text += f"({percent(self.verified, self.reached)})"
        return text


def counted(number: int, noun: str) -> str:
    """A number and what it counts, as in ``1 model``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    """A share, rounded down, so that only everything is 100 %; the page's script does the same."""
    hundredths = 10_000 * part // whole if whole else 0
    return "100 %" if hundredths == 10_000 else f"{hundredths / 100:.2f} %"


def summary(reports: Sequence[Coverage]) -> Summary:
    """Totals of several reports."""
    seen = [operation for report in reports for operation in report.operations]
    gaps = {operation.name for operation in seen if operation.covered < operation.nodes}
    names = {operation.name for operation in seen}
    good = [report for report in reports if not report.error]
    return Summary(
        models=len(reports),
        failed=len(reports) - len(good),
        nodes=sum(report.nodes for report in good),
        leaves=sum(report.leaves for report in good),
        covered=sum(report.covered for report in good),
        operations=len(names),
        operations_covered=len(names - gaps),
        asked=sum(report.verification is not None for report in good),
        passed=sum(report.verification is not None and report.verification.passed for report in good),
        reached=sum(report.reached for report in good if report.verification is not None),
        verified=sum(report.verified for report in good),
    )


def problems(reports: Iterable[Coverage]) -> list[tuple[str, str, str, str]]:
    """Everything that is not as it should be: model, place or kind, operation, and what is known of it."""
    found = []
    for report in reports:
        if report.error:
            found.append((report.model, "no report", "", _line(report.error)))
        for gap in report.uncovered:
            known = gap.reason or (f"nearest rule: {gap.nearest}" if gap.nearest else "")
            beside = "" if gap.reached else f"relevance does not reach {'them' if gap.nodes > 1 else 'it'}"
            found.append(_place(report, gap, "; ".join(filter(None, (known, beside)))))
        check = report.verification
        if check is not None:
            found += [_place(report, one, str(one)) for one in check.unbalanced]
        if check is not None and not check.passed:
            why = _line(check.error) or "; ".join(
                text
                for text, wrong in (
                    (f"the ledger is open by {check.residual:.1e}", not check.closes),
                    ("nodes do not balance", any(not one.unknown for one in check.unbalanced)),
                    ("relevance is not finite", not check.finite),
                    ("the output changed", not check.unchanged),
                )
                if wrong
            )
            found.append((report.model, "not verified", "", why))
    return found


TOWER = 0.05
"""Share of a model's parameters from which on a module that takes no part is told."""


def towers(reports: Iterable[Coverage]) -> list[tuple[str, str, str, str]]:
    """Modules of some size that take no part in what was explained: model, path, share of its parameters, and why."""
    return [
        (report.model, one.path, f"{100 * one.parameters / report.parameters:.0f} %", str(one))
        for report in reports
        for one in report.idle
        if one.parameters >= TOWER * report.parameters
    ]


def _place(report: Coverage, one: Uncovered | Unbalanced, what: str) -> tuple[str, str, str, str]:
    nodes = f"{one.nodes} nodes. " if one.nodes > 1 else ""
    return report.model, one.path or "the model itself", one.operation, nodes + what


def _line(text: str, most: int = 200) -> str:
    """The beginning of a text, as one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def to_json(reports: Sequence[Coverage], versions: Mapping[str, str]) -> str:
    """Everything."""
    data = {
        "versions": dict(versions),
        "summary": asdict(summary(reports)),
        "models": [report.to_dict() for report in reports],
    }
    return json.dumps(data, indent=1)


def from_json(text: str) -> list[Coverage]:
    """The reports that :func:`to_json` wrote."""
    return [Coverage.from_dict(entry) for entry in json.loads(text)["models"]]


def to_csv(reports: Sequence[Coverage]) -> str:
    """A line for each model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    flat = [
        "model", "title", "modality", "status", "composite", "parameters", "nodes", "leaves", "reached", "covered",
        "verified", "promises", "replayed", "delta", "rho", "runs", "seconds", "error",
    ]  # fmt: skip
    checked = ("residual", "float64", "gradient_seconds", "explain_seconds")
    writer.writerow([*flat, "operations", "operations_covered", "roles", "uncovered", "idle", *checked])
    for report in reports:
        check = report.verification
        writer.writerow(
            [
                *(getattr(report, name) for name in flat),
                len(report.operations),
                report.operations_covered,
                " ".join(f"{name.replace(' ', '_')}={count}" for name, count in report.roles.items()),
                " ".join(dict.fromkeys(gap.operation for gap in report.uncovered)),
                " ".join(one.path for one in report.idle),
                *("" if check is None else getattr(check, name) for name in checked),
            ]
        )
    return text.getvalue()


def to_markdown(reports: Sequence[Coverage]) -> str:
    """A table, the totals, and a list of all that is wrong."""
    parts = [models_table(reports), f"{summary(reports)}."]
    wrong = problems(reports)
    if wrong:
        parts.append(table(wrong, PROBLEM))
    if towers(reports):
        parts.append(table(towers(reports), TOWERS, TOWERS[2:3]))
    if is_paper(reports):
        parts.append(PAPER)
    return "\n\n".join(parts) + "\n"


PROBLEM = ("model", "where", "operation", "what")
"""The columns of :func:`problems`."""
TOWERS = ("model", "takes no part", "of the parameters", "as it")
"""The columns of :func:`towers`."""


def models_table(reports: Sequence[Coverage], without: Sequence[str] = ()) -> str:
    """A Markdown table with a line for each model, and every column but some."""
    columns = {name: cell for name, cell in columns_for(reports).items() if name not in without}
    rows = [[cell(report) for cell in columns.values()] for report in reports]
    return table(rows, [*columns], [name for name in columns if name not in TEXT])


def table(rows: Iterable[Sequence[str]], columns: Sequence[str], numbers: Sequence[str] = ()) -> str:
    """A Markdown table; the columns ``numbers`` stand to the right."""
    marks = ["---:" if name in numbers else "---" for name in columns]
    lines = [columns, marks, *[[_cell(text) for text in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """One line that Markdown takes as it stands."""
    line = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "\\`")


def to_html(reports: Sequence[Coverage], versions: Mapping[str, str], title: str = "Coverage") -> str:
    """One page that needs nothing else."""
    from dynlrp.pages import render

    return render(
        "coverage.html",
        title=title,
        data={
            "models": [{**report.to_dict(), "paper": _paper(report)} for report in reports],
            "summary": asdict(summary(reports)),
            "versions": dict(versions),
            "note": PAPER if is_paper(reports) else "",
        },
    )


def is_paper(reports: Sequence[Coverage]) -> bool:
    """Whether these are the paper's fifteen, all of them."""
    return len(reports) == 15 and all(report.model.startswith("paper/") for report in reports)


WRITERS: dict[str, Callable[[Sequence[Coverage], Mapping[str, str]], str]] = {
    ".md": lambda reports, versions: to_markdown(reports),
    ".csv": lambda reports, versions: to_csv(reports),
    ".json": to_json,
    ".html": to_html,
}
"""Formats by the ending of a file's name."""


def check_ending(path: Path) -> None:
    """Raise for a file whose name ends in no known format."""
    if path.suffix not in WRITERS:
        raise InputError(f"{path}: reports are written as {', '.join(WRITERS)}, not as {path.suffix or 'a bare name'}")


def write(path: Path, reports: Sequence[Coverage], versions: Mapping[str, str]) -> None:
    """Write a report in the format that the file's name ends in."""
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(WRITERS[path.suffix](reports, versions), encoding="utf-8")

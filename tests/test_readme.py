"""The examples of the README run as they stand, and its table of composites is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dynlrp import COMPOSITES

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> dict[str, Any]:
    """Execute a page's Python blocks in order and in one namespace, which is returned."""
    text = page.read_text("utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        above = text.count("\n", 0, block.start(2))  # so that a traceback shows the line in the page
        code = re.sub(f"^{block[1]}", "", block[2], flags=re.MULTILINE)
        exec(compile("\n" * above + code, str(page), "exec", dont_inherit=True), namespace)
    return namespace


@pytest.mark.usefixtures("registry")
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "README.md")
    assert (tmp_path / "image.png").stat().st_size
    assert (tmp_path / "words.html").stat().st_size


def test_readme_lists_every_composite() -> None:
    rows = re.findall(r"^\| `(\w+)`", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert rows == list(COMPOSITES)


def test_numbers_of_faithfulness_are_those_of_the_results() -> None:
    part = (ROOT / "README.md").read_text("utf-8").split("## How good the maps are\n")[1].split("\n## ")[0]
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8")
    header, _, *rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in part.splitlines() if "|" in line]
    assert rows
    for problem, measure, *numbers in rows:
        lines = results.split(f"### {problem}\n")[1].split("\n### ")[0].split("\n## ")[0].splitlines()
        assert any(line.startswith(f"| method | {measure} |") for line in lines)
        for method, number in zip(header[2:], numbers, strict=True):
            name = "**auto**" if method == "`auto`" else method.strip("`")
            found = [line.split(" | ")[1].split(" [")[0] for line in lines if line.startswith(f"| {name} |")]
            assert found == ([number] if number else []), (problem, method)


def test_links_of_the_readme_lead_somewhere() -> None:
    prose = BLOCK.sub("", (ROOT / "README.md").read_text("utf-8"))
    links = re.findall(r"\]\((?!http)([^)]+)\)", prose)
    for file, _, anchor in (link.partition("#") for link in links):
        assert (ROOT / file).exists(), file
        heads = re.findall(r"^#+ (.+)$", (ROOT / file).read_text("utf-8"), re.MULTILINE) if anchor else [anchor]
        assert anchor in [head.lower().replace(" ", "-") for head in heads], anchor

"""The pages of results say what is so: a slice of both zoos is made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from dynlrp.zoo import entries, examine, find
from dynlrp.zoo.families import model_types

PAGES = Path(__file__).parent.parent / "docs" / "pages" / "zoo"


def rows(page: str) -> dict[str, dict[str, str]]:
    """The table of models: its rows by the first cell."""
    lines = [line for line in (PAGES / page).read_text("utf-8").splitlines() if line.startswith("| ")]
    start = next(number for number, line in enumerate(lines) if "| residual |" in line)
    heads = [cell.strip() for cell in lines[start].split("|")[1:-1]]
    found = {}
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != len(heads):
            break
        found[cells[0]] = dict(zip(heads, cells, strict=True))
    return found


def test_all_fifteen_of_the_paper_are_covered_and_verified() -> None:
    titles = [entry.title for name, entry in entries().items() if name.startswith("paper/")]
    found = rows("paper.md")
    assert list(found) == titles
    for row in found.values():
        assert row["covered"] == row["nodes"] == row["verified"]
        assert row["status"] == "verified"
        assert re.fullmatch(r"[\d,]+/[\d,]+, \d+/\d+", row["the paper"])


def test_nearly_every_node_of_every_family_is_covered() -> None:
    found = rows("families.md")
    assert len(found) >= 500
    nodes, covered = (sum(int(row[name].replace(",", "")) for row in found.values()) for name in ("nodes", "covered"))
    assert covered / nodes >= 0.999
    assert sum(row["status"] == "verified" for row in found.values()) >= 0.99 * len(found)


def test_every_family_is_on_the_page() -> None:
    text = (PAGES / "families.md").read_text("utf-8")
    if transformers.__version__ not in text:
        pytest.skip("the page was made with another release of transformers")
    listed = set(re.findall(r"^\| (family/[^ ]+)", text, re.MULTILINE))
    assert listed == {f"family/{name}" for name in model_types()}


@pytest.mark.parametrize("name", ["paper/gpt2", "paper/efficientnetv2-m", "paper/roberta-large", "family/bart",
                                  "family/clip", "family/jamba", "family/mamba2", "family/mobilevit", "family/mixtral",
                                  "family/patchtst", "family/t5", "family/wav2vec2"])  # fmt: skip
def test_a_slice_is_still_true(name: str) -> None:
    page = name.replace("paper/", "paper.md/").replace("family/", "families.md/").partition("/")[0]
    (entry,) = find(name)
    row = rows(page)[entry.title or name]
    report = examine(entry, verify=True)
    assert report.status == row["status"] == "verified"
    assert report.covered == report.nodes
    assert report.verified == report.reached
    text = (PAGES / page).read_text("utf-8")
    if all(f"{package.__name__} {package.__version__.partition('+')[0]}" in text for package in (torch, transformers)):
        assert f"{report.nodes:,}" == row["nodes"]
        assert f"{report.operations_covered}/{len(report.operations)}" == row["operations"]

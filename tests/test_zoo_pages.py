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
        assert row["covered"] == row["nodes"]
        assert row["verified"] == row["reached"]
        assert row["status"] == "verified"
        assert re.fullmatch(r"[\d,]+/[\d,]+, \d+/\d+", row["the paper"])


def test_nearly_every_node_of_every_family_is_covered() -> None:
    found = rows("families.md")
    assert len(found) >= 610
    nodes, covered = (sum(int(row[name].replace(",", "")) for row in found.values()) for name in ("nodes", "covered"))
    assert covered / nodes >= 0.999
    assert sum(row["status"] == "verified" for row in found.values()) >= 0.99 * len(found)


def test_every_node_of_timm_is_covered_and_every_model_explained() -> None:
    found = rows("timm.md")
    assert len(found) >= 90
    for row in found.values():
        assert row["covered"] == row["nodes"]
        assert row["status"] == "verified"
    nodes = sum(int(row["nodes"].replace(",", "")) for row in found.values())
    readme = " ".join((PAGES.parents[2] / "README.md").read_text("utf-8").split())
    assert f"all of their {nodes:,} nodes are covered, and all {len(found)} are explained" in readme


def test_every_family_is_on_the_page() -> None:
    text = (PAGES / "families.md").read_text("utf-8")
    if transformers.__version__ not in text:
        pytest.skip("the page was made with another release of transformers")
    listed = set(re.findall(r"^\| (family/[^ ]+)", text, re.MULTILINE))
    assert listed == {f"family/{name}" for name in model_types()}


def test_the_totals_in_the_readme_are_those_of_the_page() -> None:
    readme = " ".join((PAGES.parents[2] / "README.md").read_text("utf-8").split())
    page = (PAGES / "families.md").read_text("utf-8")
    found = re.search(
        r"(\d+) models, (\d+) of them without a report: ([\d,]+) of ([\d,]+) nodes .*?; (\d+) of (\d+) explained .*?, "
        r"([\d,]+) of the ([\d,]+) nodes that relevance reaches",
        page,
    )
    assert found is not None
    models, failed, covered, nodes, passed, good, verified, reached = found.groups()
    assert int(good) == int(models) - int(failed)
    assert f"{good} of {models} could be built. {covered} of their {nodes} nodes are covered" in readme
    assert f"and {passed} are explained" in readme
    assert f"{verified} of the {reached} nodes that relevance passes" in readme


def test_the_example_of_seventy_billion_parameters(tmp_path: Path) -> None:
    """What the how-to shows of Llama's largest configuration."""
    lines = (PAGES.parent / "howto" / "coverage.md").read_text("utf-8").splitlines()
    shown = next(line.split() for line in lines if line.startswith("    LlamaForCausalLM"))
    transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    made = examine(find(str(tmp_path))[0])
    assert made.covered == made.nodes
    assert [made.title, made.modality, f"{made.parameters:,}", made.status] == [*shown[:3], shown[-1]]
    if f"transformers {transformers.__version__}" in (PAGES / "families.md").read_text("utf-8"):
        counts = [
            f"{made.nodes:,}",
            f"{made.leaves:,}",
            f"{made.covered:,}",
            f"{made.operations_covered}/{len(made.operations)}",
        ]
        assert shown[3:7] == counts


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

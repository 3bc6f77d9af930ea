"""autoLRP: rules on autograd nodes, by a wrapper around the input."""

from __future__ import annotations

import warnings
from functools import partial

from torch import Tensor

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method
from dynlrp import Composite
from dynlrp.rules import Epsilon, Gamma, Magnitude, ZPlus


def relevance(case: Case, target: Tensor | None, preset: str) -> Tensor:
    """With one of its presets."""
    import autolrp

    x = autolrp.tensor(case.x)
    with warnings.catch_warnings():  # on operations in place; benchmarks.exactness has the consequences
        warnings.simplefilter("ignore")
        total = case.at(x).scores(target).sum()
        total.lrp(config=getattr(autolrp.LRPConfig, preset)())
    # It starts with 1 for the sum, of which each sample gets its share, where others start with the sample's output.
    found: Tensor = x.relevance.as_subclass(Tensor) * total.detach().as_subclass(Tensor)
    return found


_PRESETS = {
    "attnlrp": Composite.of("autoLRP attnlrp", {"addition": Magnitude(), "convolution": Gamma(0.25, epsilon=1e-11)}),
    "composite": Composite.of(
        "autoLRP composite", {"addition": Magnitude(), "convolution": ZPlus(), "dense": Epsilon(1e-6)}
    ),
}

METHODS = [
    Method(f"autoLRP {preset}", partial(relevance, preset=preset), composite=same, package="autolrp")
    for preset, same in _PRESETS.items()
]

"""What a way to explain is: a name, what it fits, and a function from a model with inputs to relevance."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.architectures import Case
from dynlrp import Composite

Explain = Callable[[Case, Tensor | None], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to explain.

    ``explain(case, target)`` gives relevance of the shape of ``case.x``; ``target``, of shape (samples,), has the
    place of the explained output among all of a sample's, None takes the largest. ``fits(case)``: whether the method
    is made for that model. ``composite``: that of dynlrp with the same rules. ``package``: what has to be installed.
    ``exact``: the same with hardly a stabiliser where dynlrp has none, which is in pooling and sums.
    """

    name: str
    explain: Explain
    fits: Callable[[Case], bool] = lambda case: True
    composite: str | Composite | None = None
    package: str | None = None
    exact: Explain | None = None

    def __call__(self, case: Case, target: Tensor | None = None) -> Tensor:
        """Relevance of ``case.x``, detached."""
        return self.explain(case, target).detach()

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """Its package with the version."""
        return f"{self.package} {importlib.metadata.version(self.package)}" if self.package else ""


def convolutional(case: Case) -> bool:
    """Whether a model takes one tensor of images and is a convolutional net."""
    modules = list(case.model.modules())
    return (
        isinstance(case.inputs, Tensor)
        and any(isinstance(module, nn.Conv2d) for module in modules)
        and not any(isinstance(module, nn.LayerNorm) for module in modules)
    )

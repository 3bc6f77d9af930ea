"""How something is explained: what the ways in have in common, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from dynlrp.composite import Composite, composite_named
from dynlrp.errors import InputError
from dynlrp.precision import Wide

Names = str | Iterable[str]
OnUnknown = Literal["error", "gradient"]


class Options:
    """The keyword arguments of :func:`dynlrp.explain` that are the same for all targets and conditions."""

    def __init__(
        self,
        composite: str | Composite = "auto",
        *,
        layers: Names = (),
        parameters: Names = (),
        output: str | int | None = None,
        precision: torch.dtype | None = None,
        on_unknown: OnUnknown = "error",
        allow_training: bool = False,
        audit: bool = False,
        create_graph: bool = False,
    ) -> None:
        if on_unknown not in ("error", "gradient"):
            raise InputError(f"on_unknown is 'error' or 'gradient', not {on_unknown!r}")
        if audit and create_graph:
            raise InputError(
                "audit=True and create_graph=True do not go together: relevance is the same in both, so ask twice"
            )
        if precision is not None and create_graph:
            raise InputError(
                "precision= and create_graph=True do not go together: bring the model to that dtype instead"
            )
        self.composite = composite_named(composite)
        self.layers, self.parameters = _names("layers", layers), _names("parameters", parameters)
        self.output = output
        self.wide = None if precision is None else Wide(precision)
        self.on_unknown: OnUnknown = on_unknown
        self.allow_training = allow_training
        self.audit = audit
        self.create_graph = create_graph


def _names(option: str, names: Names) -> tuple[str, ...]:
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (names,)
    if not all(isinstance(name, str) for name in found):
        raise InputError(f"{option}= takes names or globs such as 'encoder.*', not {names!r:.80}")
    return found

"""The answer: relevance of inputs, layers and parameters, with the ledger that proves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynlrp.ledger import Ledger
from dynlrp.promise import PromiseReport


@dataclass(repr=False)
class Explanation:
    """Relevance of everything that was asked for, in units of the explained output."""

    relevance: Any
    """Mirrors the inputs: a tensor of the input's shape, one number per id, or None where nothing is attributed."""
    value: Tensor
    """The explained output, one number per sample."""
    ledger: Ledger
    promises: PromiseReport
    composite: str
    layers: dict[str, Any] = field(default_factory=dict)
    """Relevance of a module's output by name; a list where the module ran more than once."""
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    """Relevance of a parameter by name, summed over its uses and the batch; None where it took no part."""

    def tensors(self) -> list[Tensor]:
        """Every relevance tensor of the inputs."""
        return [t for t in pytree.tree_leaves(self.relevance) if isinstance(t, Tensor)]

    def finite(self) -> bool:
        """Whether no relevance is NaN or infinite."""
        values = [*self.tensors(), self.value]
        return bool(torch.stack([torch.isfinite(v).all() for v in values]).all())

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers and lists, ready for JSON."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else None if value is None else value

        def all_plain(tree: Any) -> Any:
            return pytree.tree_map(plain, tree)

        return {
            "relevance": all_plain(self.relevance),
            "value": self.value.tolist(),
            "composite": self.composite,
            "layers": all_plain(self.layers),
            "parameters": all_plain(self.parameters),
            "ledger": {
                "output": self.ledger.output,
                **self.ledger.accounts,
                "residual": self.ledger.residual,
                "closes": self.ledger.closes,
            },
            "promises": {
                "count": self.promises.count,
                "internal": self.promises.internal,
                "delta": self.promises.delta,
                "density": self.promises.density,
            },
        }

    def save(self, path: str | Path, **options: Any) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        def shape(value: Any) -> str:
            return f"{tuple(value.shape)}" if isinstance(value, Tensor) else "unattributed"

        if isinstance(self.relevance, dict):
            parts = ", ".join(f"{name}: {shape(value)}" for name, value in self.relevance.items())
        elif isinstance(self.relevance, tuple | list):
            parts = ", ".join(shape(value) for value in self.relevance)
        else:
            parts = shape(self.relevance)
        values = ", ".join(f"{v:.4g}" for v in self.value[:4].tolist()) + (" ..." if len(self.value) > 4 else "")
        return (
            f"Explanation(relevance {parts}; value [{values}]; composite {self.composite}; "
            f"ledger {'closes' if self.ledger.closes else 'does NOT close'} to {self.ledger.error:.1e})"
        )

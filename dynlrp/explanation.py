"""The answer: relevance of inputs, layers and parameters, with the ledger that proves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynlrp.audit import Audit
from dynlrp.errors import InputError
from dynlrp.ledger import Ledger
from dynlrp.promise import PromiseReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Ranking(NamedTuple):
    """Channels from the most to the least relevant, ``(batch, channels)``."""

    channels: Tensor
    relevance: Tensor


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
    """Relevance by the name that was asked for, of a module's output or another tensor, also where a condition names
    it (of what passed); a list where the module ran more than once."""
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    """Relevance of a parameter by name, summed over its uses and the batch; None where it took no part, as
    the parameters of a batch norm that a composite merges into the layer before it."""
    audit: Audit | None = None
    """Every local balance, where ``audit=True`` asked for it."""
    output: Any = None
    """What the model returned, with its graph, from the forward pass that was explained: for a loss in the same step.
    Only of ``explain(..., create_graph=True)``."""

    axes: dict[str, int] = field(default_factory=dict)
    """The axis of ``layers`` that holds the channels, or the heads."""

    def by_channel(self, name: str, axis: int | None = None) -> Tensor:
        """Relevance of each channel of ``layers[name]``, ``(batch, channels)``.

        Args:
            name: as in ``layers``; calls of a module that ran more than once are added up.
            axis: another axis than that of the channels: positions of a residual stream, heads, neurons.
        """
        found = self.layers.get(name)
        calls = [call for call in (found if isinstance(found, list) else [found]) if call is not None]
        if not calls:
            raise InputError(f"there is no relevance of {name!r}; there is of {[n for n in self.layers if n != name]}")
        along = self.axes[name] if axis is None else axis
        shapes = {tuple(call.shape) for call in calls}
        if any(not -len(shape) <= along < len(shape) or along % len(shape) == 0 for shape in shapes):
            raise InputError(f"{name!r} of shape {shapes.pop()} has no axis {along} beside that of the samples")
        rows = [call.transpose(1, along).flatten(2).sum(2) if call.ndim > 2 else call for call in calls]
        if len({row.shape for row in rows}) > 1:
            raise InputError(f"the calls of {name!r} have shapes {shapes}: add up those of layers[{name!r}] you mean")
        total: Tensor = sum(rows[1:], rows[0])
        return total

    def rank(self, name: str, axis: int | None = None, top: int | None = None) -> Ranking:
        """Channels of ``layers[name]`` by size of relevance, the largest first; arguments as in :meth:`by_channel`.

        Args:
            top: how many of them.
        """
        found = self.by_channel(name, axis)
        index = found.abs().argsort(stable=True, dim=1, descending=True)[:, :top]
        return Ranking(index, found.gather(1, index))

    def tensors(self) -> list[Tensor]:
        """Every relevance tensor of the inputs."""
        return [t for t in pytree.tree_leaves(self.relevance) if isinstance(t, Tensor)]

    def everything(self) -> list[Tensor]:
        """All relevance and all amounts of the ledger, for :meth:`filled`."""
        return [*self._relevance(), *self.ledger.tensors()]

    def filled(self, tensors: Sequence[Tensor]) -> Explanation:
        """The same explanation with other numbers, in the order of :meth:`everything`."""
        rest = iter(tensors)
        trees = (self.relevance, self.layers, self.parameters)
        relevance, layers, parameters = pytree.tree_map(lambda t: next(rest) if isinstance(t, Tensor) else t, trees)
        ledger = self.ledger.with_tensors(list(rest))
        return replace(self, relevance=relevance, layers=layers, parameters=parameters, ledger=ledger)

    def complete(self, value: Tensor) -> None:
        """Enter the explained output."""
        self.value, ledger = value, self.ledger
        ledger._output = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
        if ledger.unresolved and ledger.closes:
            ledger.unresolved.clear()  # constants that nobody kept add up to nothing: paddings and masks

    def _relevance(self) -> list[Tensor]:
        trees = (self.relevance, self.layers, self.parameters)
        return [t for t in pytree.tree_leaves(trees) if isinstance(t, Tensor)]

    def finite(self) -> bool:
        """Whether no relevance, and nothing in the ledger, is NaN or infinite."""
        found = [t.detach() for t in self._relevance()]
        totals = [self.value.sum(), *self.ledger.looks()]
        # One look for all, as looking waits for an accelerator.
        if math.isfinite(sum(t.sum(dtype=torch.float64).to(self.value.device) for t in (*found, *totals))):
            return True
        # A sum may overflow where none of its terms does, in half precision above all.
        return all(bool(torch.isfinite(t).all()) for t in (*found, self.value)) and self.ledger.finite()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers and lists, ready for JSON."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else None if value is None else value

        def all_plain(tree: Any) -> Any:
            return pytree.tree_map(plain, tree)

        numbers = {
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
        return numbers if self.audit is None else {**numbers, "audit": self.audit.to_dict()}

    def plot(
        self,
        *,
        sample: int = 0,
        image: Any = None,
        tokens: Sequence[str] | None = None,
        values: Any = None,
        entry: str | int | None = None,
        title: str | None = None,
        limit: float | None = None,
    ) -> Figure:
        """One sample's relevance as a matplotlib figure (needs ``dynlrp[plot]``).

        Args:
            sample: number in the batch.
            image: the photo to show beside an image's heatmap, ``(C, H, W)`` or ``(H, W, C)``.
            tokens: one text per id, for token relevance.
            values: the signal, for relevance along one dimension.
            entry: which input, by name or position; by default the first that has relevance.
            title: a line above the picture.
            limit: the ``|relevance|`` that gets the full colour; by default the largest, of an image nearly so.
        """
        figure: Figure = self._panel(sample, image, tokens, values, entry, title, limit, text=False)
        return figure

    def save(
        self,
        path: str | Path,
        *,
        sample: int | None = None,
        image: Any = None,
        tokens: Sequence[Any] | None = None,
        values: Any = None,
        entry: str | int | None = None,
        title: str = "Relevance",
        limit: float | None = None,
    ) -> Path:
        """Write a picture (``.png``) or a self-contained page (``.html``) with the ledger and the audit, where
        there is one; returns the path.

        Arguments are those of :meth:`plot`. ``sample=None`` shows the whole batch; ``image``, ``tokens`` and
        ``values`` then hold one entry per sample (for a batch of one, the entry itself will do).
        """
        from dynlrp import plot

        batch = len(self._entry(entry))
        if sample is None and batch == 1:
            sample = 0
            image, values = (v[0] if isinstance(v, Tensor) and v.ndim == 4 else v for v in (image, values))
            tokens = tokens[0] if tokens and not isinstance(tokens[0], str) else tokens
        numbers = range(batch) if sample is None else [sample]
        for option, given in (("image", image), ("tokens", tokens), ("values", values)):
            if sample is None and given is not None and len(given) != batch:
                raise InputError(
                    f"{option}= holds {len(given)} entries for {batch} samples: give one for each, or name a sample="
                )

        def of(given: Any, number: int) -> Any:
            return given if given is None or sample is not None else given[number]

        panels = [
            self._panel(n, of(image, n), of(tokens, n), of(values, n), entry, None, limit, text=True) for n in numbers
        ]
        return plot.save(
            path,
            *panels,
            title=title,
            facts={
                "value": ", ".join(f"{v:.4g}" for v in self.value.tolist()),
                "composite": self.composite,
                "ledger": "closes" if self.ledger.closes else "does not close",
            },
            ledger=self.ledger.accounts,
            output=self.ledger.output,
            tables=() if self.audit is None else self.audit.tables(),
        )

    def _entry(self, entry: str | int | None) -> Tensor:
        try:
            found = self.relevance if entry is None or isinstance(self.relevance, Tensor) else self.relevance[entry]
        except (KeyError, IndexError, TypeError):
            found = None
        tensor = next((t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)), None)
        if tensor is None:
            raise InputError(f"no relevance to show in {'the inputs' if entry is None else repr(entry)}")
        return tensor

    def _panel(
        self,
        sample: int,
        image: Any,
        tokens: Any,
        values: Any,
        entry: Any,
        title: str | None,
        limit: float | None,
        *,
        text: bool,
    ) -> Any:
        from dynlrp import plot

        found = self._entry(entry)
        if not -len(found) <= sample < len(found):
            raise InputError(f"there is no sample {sample} in a batch of {len(found)}")
        relevance = found[sample].detach()
        if tokens is not None:
            if relevance.ndim > 1:
                relevance = relevance.flatten(1).sum(1)
            if text:
                return plot.Tokens(tokens, relevance, title, limit)
            return plot.tokens_figure(tokens, relevance, title=title, limit=limit)
        if relevance.ndim >= 3 or (relevance.ndim == 2 and image is not None):
            return plot.heatmap(relevance, image, title=title, limit=limit)
        return plot.series(relevance, values, title=title, limit=limit)

    def __repr__(self) -> str:
        def shape(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{tuple(value.shape)}"
            if isinstance(value, dict):
                return ", ".join(f"{name}: {shape(inner)}" for name, inner in value.items())
            if isinstance(value, tuple | list):
                return "[" + ", ".join(map(shape, value)) + "]"
            return "unattributed"

        parts = shape(self.relevance)
        values = ", ".join(f"{v:.4g}" for v in self.value[:4].tolist()) + (" ..." if len(self.value) > 4 else "")
        return (
            f"Explanation(relevance {parts}; value [{values}]; composite {self.composite}; "
            f"ledger {'closes' if self.ledger.closes else 'does NOT close'} to {self.ledger.error:.1e})"
        )

"""What a method has to explain, and how its maps are judged."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Numbers = dict[str, Tensor]
"""One number per sample for each measure."""


@dataclass(frozen=True)
class Problem:
    """Samples, the outputs to explain, and the measures."""

    name: str
    family: str
    """What kind of network it is: composites are chosen for each."""
    network: str
    settings: str
    """All that the numbers depend on."""
    model: nn.Module
    inputs: Tensor
    """Images ``(samples, channels, height, width)`` or embeddings ``(samples, length, width)``."""
    explained: Callable[[Tensor, Tensor], Tensor]
    """From inputs and their row numbers to ``(rows,)``: what methods explain."""
    measure: Callable[[Tensor, Tensor], Numbers]
    """From maps, without channels, and their row numbers to numbers."""
    main: str
    """The measure by which methods are ranked: the more the better."""
    chunk: int = 50
    valid: Tensor | None = None
    """``(samples, length)`` bool, False for what is the same in all texts, such as padding; None where nothing is."""

    @property
    def channels(self) -> int:
        """The dimension that maps do not have."""
        return 1 if self.inputs.ndim == 4 else -1

    def rows(self, only: Tensor | None = None) -> Iterator[Tensor]:
        """Row numbers, ``chunk`` at a time."""
        yield from (torch.arange(len(self.inputs)) if only is None else only).split(self.chunk)

    def run(self, method: Callable[[Problem, Tensor], Tensor], only: Tensor | None = None) -> Numbers:
        """A method's numbers for every sample, or for some."""
        found = [self.measure(method(self, rows), rows) for rows in self.rows(only)]
        return {name: torch.cat([numbers[name] for numbers in found]) for name in found[0]}


Method = Callable[[Problem, Tensor], Tensor]
"""From a problem and row numbers to maps ``(rows, height, width)`` or ``(rows, length)``."""


def package_folder(name: str) -> Path:
    """Where a package's files lie, without importing it (some ask for libraries that its data does not need)."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    return Path(next(iter(found.submodule_search_locations)))

"""What the solver chooses from, for activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from dynlrp.allocation.budget import Budget
from dynlrp.allocation.products import Product
from dynlrp.allocation.ranges import Survey
from dynlrp.allocation.solver import Limit, Matrix
from dynlrp.errors import InputError

FLOAT = 16
"""Bits of what is not rounded, in ``bitops``."""
MOST = 20_000
"""How many choices of bits activations may have that products and groups connect."""


class Choices:
    """What the solver chooses for: groups of activations, those together whose bits are multiplied with each other."""

    def __init__(
        self,
        groups: Sequence[tuple[list[str], tuple[int, ...]]],
        found: Survey,
        weights: Mapping[str, int],
        budget: Budget,
    ) -> None:
        import networkx as nx

        owner = {name: number for number, (names, _) in enumerate(groups) for name in names}
        together = nx.empty_graph(len(groups))
        free = [[name for name in product.activations if name in owner] for product in found.products]
        if budget.bitops is not None:
            together.add_edges_from((owner[names[0]], owner[name]) for names in free for name in names)
        self.groups = [[groups[number] for number in sorted(item)] for item in nx.connected_components(together)]
        for item in self.groups:
            if math.prod(len(widths) for _, widths in item) > MOST:
                raise InputError(
                    f"bits of {len(item)} activations, from {item[0][0][0]!r} to {item[-1][0][-1]!r}, are connected by "
                    f"products and groups, too many for bitops: make groups smaller, or limit average_bits"
                )
        self.choices = [list(itertools.product(*(widths for _, widths in item))) for item in self.groups]
        sizes = np.array([len(choices) for choices in self.choices])
        self.allowed = np.arange(sizes.max())[None] < sizes[:, None]
        self.limits = []
        if budget.average_bits is not None:
            counts = found.multiplications
            use = self.table(lambda _, bits: sum(counts[name] * b for name, b in bits.items()))
            total = sum(counts[name] for name in owner)
            self.limits.append(Limit("average_bits", use, budget.average_bits * total, total))
        if budget.bitops is not None:
            item_of = {name: number for number, item in enumerate(self.groups) for names, _ in item for name in names}
            products: list[list[Product]] = [[] for _ in self.groups]
            rest = 0.0
            for product, names in zip(found.products, free, strict=True):
                if names:
                    products[item_of[names[0]]].append(product)
                else:
                    rest += operations(product, {}, weights)
            share = rest / len(self.groups)  # so that messages show whole models
            use = self.table(lambda item, bits: share + sum(operations(p, bits, weights) for p in products[item]))
            self.limits.append(Limit("bitops", use, budget.bitops))

    def table(self, of: Callable[[int, dict[str, int]], float]) -> Matrix:
        """A number for each item and each choice of bits for its activations."""
        made = np.zeros(self.allowed.shape)
        for item, choices in enumerate(self.choices):
            made[item, : len(choices)] = [of(item, self._named(item, choice)) for choice in choices]
        return made

    def bits(self, chosen: Iterable[int]) -> dict[str, int]:
        """By activation, for a choice of every item."""
        return {
            name: bits
            for item, choice in enumerate(chosen)
            for name, bits in self._named(item, self.choices[item][choice]).items()
        }

    def _named(self, item: int, choice: Sequence[int]) -> dict[str, int]:
        return {name: bits for (names, _), bits in zip(self.groups[item], choice, strict=True) for name in names}


def operations(product: Product, bits: Mapping[str, int], weights: Mapping[str, int]) -> float:
    """On bits, of one sample."""
    first, *others = (bits.get(name, FLOAT) for name in product.activations)
    return product.multiplications * first * (others[0] if others else weights.get(product.name, FLOAT))

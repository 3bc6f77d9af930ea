"""How much an allocation may use: bits for each weight on average, bytes of the model, operations on bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dynlrp.allocation.layers import Layer
from dynlrp.allocation.operations import multiply_accumulates
from dynlrp.allocation.scores import Task
from dynlrp.allocation.solver import Limit, Matrix
from dynlrp.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Limits; all that are given hold.

    Args:
        average_bits: bits for each weight of the allocated layers, with their scales and zero points. Layers that are
            pinned to None do not count.
        size: bytes of all parameters of the model, those that are not quantized as they are.
        bitops: multiplications of bits for one sample: multiply-accumulates times bits of the weight times
            ``activation_bits``, over the allocated layers.
        activation_bits: of what is multiplied with the weights.
    """

    average_bits: float | None = None
    size: float | None = None
    bitops: float | None = None
    activation_bits: int = 16

    def __post_init__(self) -> None:
        limits = (self.average_bits, self.size, self.bitops)
        if all(limit is None for limit in limits):
            raise InputError("a budget needs a limit: average_bits, size or bitops")
        if any(limit is not None and not 0 < limit < math.inf for limit in limits):
            raise InputError(f"limits are positive numbers, not {limits}")

    @classmethod
    def of(cls, budget: float | Budget) -> Budget:
        """A number is one of average bits."""
        return budget if isinstance(budget, Budget) else cls(average_bits=float(budget))


def make_limits(budget: Budget, groups: Sequence[Sequence[str]], task: Task) -> list[Limit]:
    """What each group of layers uses of each limit with each candidate."""

    def use(of: Callable[[Layer, int], float]) -> Matrix:
        return np.array(
            [[sum(of(task.layers[name], bits) for name in group) for bits in task.candidates] for group in groups]
        )

    limits = []
    if budget.average_bits is not None:
        weights = sum(layer.weights for layer in task.layers.values())
        limits.append(Limit("average_bits", use(task.quantizer.bits_of), budget.average_bits * weights, weights))
    if budget.size is not None:
        rest = unquantized_size(task.model, task.layers)
        share = rest / len(groups)  # so that messages show whole models
        limits.append(Limit("size", use(task.quantizer.bits_of) / 8 + share, budget.size))
    if budget.bitops is not None:
        counts, width = multiply_accumulates(task), budget.activation_bits
        limits.append(Limit("bitops", use(lambda layer, bits: counts[layer.name] * bits * width), budget.bitops))
    return limits


def unquantized_size(model: nn.Module, layers: Mapping[str, Layer]) -> int:
    """Bytes of the parameters that stay as they are; those tied to a layer's weight stay too, as its quantized copy
    is another."""
    replaced = {id(layer.weight) for layer in layers.values() if not layer.elsewhere}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in replaced)

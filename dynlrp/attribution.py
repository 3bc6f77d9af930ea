"""LRP behind the interface of captum's attribution methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dynlrp.composite import Composite
from dynlrp.explain import explain
from dynlrp.target import Target


def _as_captum_has_it(attribute: Callable[..., Any]) -> Callable[..., Any]:
    """Noise tunnels look for the function that captum's own decorator has wrapped."""

    @wraps(attribute)
    def call(*args: Any, **kwargs: Any) -> Any:
        return attribute(*args, **kwargs)

    return call


class LRP:
    """What takes a method of captum takes this: its metrics and noise tunnels, inseq, and whatever calls ``attribute``.

    Args:
        forward_func: a model, or a function of tensors.
        composite: as in :func:`dynlrp.explain`.
        options: others of its arguments, such as ``output`` or ``precision``.
    """

    multiplies_by_inputs = True

    def __init__(self, forward_func: Callable[..., Any], composite: str | Composite = "auto", **options: Any) -> None:
        self.forward_func = forward_func
        self._options = {"composite": composite, **options}

    def has_convergence_delta(self) -> bool:
        """Whether ``attribute`` can tell what is missing to the output."""
        return True

    @_as_captum_has_it
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Relevance of the inputs.

        Args:
            inputs: a tensor or several, samples along the first dimension; ids count where they index an embedding.
            target: as in :func:`dynlrp.explain`, or a tensor of integers with one for each sample.
            additional_forward_args: what ``forward_func`` is called with behind the inputs: one argument, or a tuple.
            return_convergence_delta: return the sum of relevance minus the output as well, one number per sample. This
                is no error: biases and other accounts of the ledger have the rest.

        Returns:
            A tensor for every input, of its shape, in a tuple where a tuple was given.
        """
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        more = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
        if additional_forward_args is None:
            more = ()
        if isinstance(target, Tensor) and not target.is_floating_point():
            target = target.tolist()
        explanation = explain(self.forward_func, (*given, *more), target, **self._options)
        found = tuple(
            torch.zeros_like(x) if r is None else r for x, r in zip(given, explanation.relevance, strict=False)
        )
        attributions = found if isinstance(inputs, tuple) else found[0]
        if not return_convergence_delta:
            return attributions
        total = sum((r.flatten(1).sum(1) for r in found), -explanation.value)
        return attributions, total

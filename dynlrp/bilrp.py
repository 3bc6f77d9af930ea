"""Which parts of two inputs make them similar: second-order relevance (BiLRP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dynlrp.composite import Composite
from dynlrp.errors import InputError
from dynlrp.explain import explanations
from dynlrp.options import OnUnknown, Options


@dataclass(frozen=True)
class Interaction:
    """Relevance of pairs of positions for the similarity of two inputs."""

    relevance: Tensor
    """``(batch, positions of a, positions of b)``, in units of the similarity."""
    value: Tensor
    """The similarity of each pair of samples, ``(batch,)``. Relevance adds up to it where the model has no biases
    and its rules absorb nothing; else a part of it belongs to those."""


def bilrp(
    model: Callable[..., Any],
    a: Any,
    b: Any,
    *,
    similarity: Literal["dot", "cosine"] = "dot",
    positions: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
    composite: str | Composite = "auto",
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    allow_training: bool = False,
) -> Interaction:
    """Explain the similarity ``phi(a) . phi(b)`` of two embeddings by pairs of positions (Eberle et al. 2020).

    LRP on a product of two embeddings gives ``R_ij = sum_k R_i(phi_k(a)) R_j(phi_k(b))``: the relevance of every
    embedding dimension is found for each input, all dimensions in batched passes, and multiplied (their eq. 7).

    Args:
        model: gives embeddings ``(batch, dimensions)``.
        a, b: inputs of the same batch size, as in :func:`dynlrp.explain`; the first that has relevance is explained.
        similarity: ``"dot"``, or ``"cosine"``, whose norms are coefficients.
        positions: from relevance of the input's shape to that of positions, ``(batch, positions)``, such as patches of
            a picture. By default tokens, series of vectors by their sum over the last dimension, and pictures pixel by
            pixel, summed over their channels.
        chunk, composite, output, precision, on_unknown, allow_training: as in :func:`dynlrp.explain_many`.
    """
    if similarity not in ("dot", "cosine"):
        raise InputError(f"similarity is 'dot' or 'cosine', not {similarity!r}")
    options = Options(
        composite, output=output, precision=precision, on_unknown=on_unknown, allow_training=allow_training
    )

    def factors(inputs: Any) -> tuple[Tensor, Tensor]:
        """Embedding and relevance of its dimensions, ``(batch, dimensions)`` and ``(batch, dimensions, positions)``."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for number, explanation in explanations(model, inputs, "all", [{}], options, chunk):
            relevance = (positions or _positions)(explanation.tensors()[0])
            if relevance.ndim != 2 or len(relevance) != len(explanation.value):
                raise InputError(f"positions= must return (batch, positions), not shape {tuple(relevance.shape)}")
            found[number] = explanation.value, relevance
        dimensions = [found[number] for number in sorted(found)]
        return torch.stack([value for value, _ in dimensions], 1), torch.stack([r for _, r in dimensions], 1)

    (one, left), (other, right) = factors(a), factors(b)
    if one.shape != other.shape:
        raise InputError(
            f"embeddings of shapes {tuple(one.shape)} and {tuple(other.shape)} have no {similarity} product"
        )
    relevance, value = torch.einsum("bki,bkj->bij", left, right), (one * other).sum(1)
    if similarity == "cosine":
        norms = one.norm(dim=1) * other.norm(dim=1)
        relevance, value = relevance / norms[:, None, None], value / norms
    return Interaction(relevance, value)


def _positions(relevance: Tensor) -> Tensor:
    if relevance.ndim < 3:
        return relevance
    return relevance.sum(-1) if relevance.ndim == 3 else relevance.sum(1).flatten(1)

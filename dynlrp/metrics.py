"""How good is an explanation? Measures of faithfulness and of localisation, with bootstrap intervals.

*Faithful* are maps whose most relevant parts matter most to the model: hide parts of the input, the most relevant first
(MoRF) or the least relevant first (LeRF), and watch the score. :func:`flip_pixels` and :func:`flip_tokens` do so for
images and texts, :func:`flip` for anything else; each gives :class:`Curves`, from which the usual numbers are read.
Where the right answer is known, :func:`top_k`, :func:`iou`, :func:`mass_accuracy` and :func:`rank_accuracy` say how
much of a map lies on it. All take batches and return one number per sample, for :func:`bootstrap` to average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dynlrp.errors import InputError

Score = Callable[[Tensor], Tensor]
"""A function from what the model is given to ``(batch,)`` scores, or to ``(batch, n)`` if there are several."""
Fill = Callable[[Tensor], Tensor]
"""A function from images to what stands in for hidden pixels, in a shape that broadcasts against them."""


@dataclass(frozen=True)
class Curves:
    """Scores while parts of the input are hidden, from none (first) to all (last).

    Areas are means over the share that is hidden, from 0 to 1, by the trapezoidal rule: in the units of the score,
    whatever the number of steps.
    """

    morf: Tensor
    """Most relevant first, ``(batch, steps + 1)`` or ``(batch, steps + 1, n)``."""
    lerf: Tensor
    """Least relevant first, of the same shape."""

    @property
    def deletion(self) -> Tensor:
        """Area under ``morf``: lower is better (Petsiuk et al. 2018)."""
        return _area(self.morf)

    @property
    def insertion(self) -> Tensor:
        """Area under ``lerf``: higher is better.

        To hide the least relevant until nothing is left is to insert the most relevant into nothing, read backwards, so
        this is the insertion score of Petsiuk et al. (2018).
        """
        return _area(self.lerf)

    @property
    def abpc(self) -> Tensor:
        """Area between the curves, ``insertion - deletion``: higher is better, 0 for a map that knows nothing
        (Schulz et al. 2020; Bluecher et al. 2024).

        The DynamicLRP paper (2025) reports about four times this, for the accuracy as score.
        """
        return self.insertion - self.deletion

    @property
    def comprehensiveness(self) -> Tensor:
        """How far the score falls without the most relevant parts: higher is better (DeYoung et al. 2020)."""
        return self.morf[:, 0] - self.deletion

    @property
    def sufficiency(self) -> Tensor:
        """How far the score falls with the most relevant parts alone: lower is better (DeYoung et al. 2020)."""
        return self.lerf[:, 0] - self.insertion

    def normalized(self) -> Curves:
        """Each sample's curves with the score of the whole input as 1 and that of nothing as 0.

        Raises:
            InputError: a sample's score is the same for both.
        """
        first, last = self.morf[:, :1], self.morf[:, -1:]
        if bool((first == last).any()):
            raise InputError(
                "the score is the same for the whole input and for nothing: there is no unit to measure in"
            )
        return Curves((self.morf - last) / (first - last), (self.lerf - last) / (first - last))


def _area(curve: Tensor) -> Tensor:
    return (curve[:, 1:] + curve[:, :-1]).mean(1) / 2


@torch.no_grad()
def flip(score: Score, relevance: Tensor, *, steps: int, valid: Tensor | None = None) -> Curves:
    """Hide features by relevance, in both orders (Samek et al. 2017).

    After step ``i`` of ``steps`` the share ``i / steps`` of each sample's features is hidden, to the nearest number. Of
    features of equal relevance the earlier one counts as more relevant.

    Args:
        score: from ``kept``, a ``(batch, features)`` bool tensor, False where a feature is hidden, to the scores.
        relevance: ``(batch, features)``.
        steps: number of steps.
        valid: ``(batch, features)``, False for features that are never hidden, such as padding.

    Raises:
        InputError: shapes do not fit, or no steps.
    """
    _fits(relevance, valid, "valid")
    if relevance.ndim != 2 or steps < 1:
        raise InputError(
            f"flip needs (batch, features) and one step at least, not {tuple(relevance.shape)}, {steps} steps"
        )
    valid = torch.ones_like(relevance, dtype=torch.bool) if valid is None else valid.bool()
    order = relevance.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(relevance.shape[1], device=relevance.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    count = valid.sum(1, keepdim=True)
    curves: list[list[Tensor]] = [[], []]
    for step in range(steps + 1):
        hidden = (count * step + steps // 2) // steps
        for curve, gone in zip(curves, (rank < hidden, rank >= count - hidden), strict=True):
            curve.append(score(~(gone & valid)))
    morf, lerf = (torch.stack(curve, 1) for curve in curves)
    return Curves(morf, lerf)


def flip_pixels(
    score: Score,
    images: Tensor,
    relevance: Tensor,
    *,
    fill: Fill | None = None,
    patch: int = 16,
    steps: int = 14,
) -> Curves:
    """Pixel flipping: hide square patches of images by their relevance, in both orders (Samek et al. 2017).

    Args:
        score: from images to scores, such as ``lambda x: model(x).softmax(-1)[:, 3]``; called ``2 * steps + 2`` times.
        images: ``(batch, channels, height, width)``, as the model takes them.
        relevance: of the images' shape, or without channels. Summed over channels and patches.
        fill: what stands in for hidden pixels: :func:`blur` (default), :func:`mean` or :func:`zero`. Which one it is
            changes the ranking of methods, so say it beside the result (Bluecher et al. 2024).
        patch: side of the patches in pixels; those at the right and lower border may be smaller.
        steps: number of steps.

    Raises:
        InputError: shapes do not fit.
    """
    if relevance.ndim == 3:
        relevance = relevance[:, None]
    if images.ndim != 4 or relevance.shape not in (images.shape, (len(images), 1, *images.shape[2:])):
        raise InputError(f"relevance of shape {tuple(relevance.shape)} does not fit images of {tuple(images.shape)}")
    sums = F.avg_pool2d(relevance.sum(1, keepdim=True), patch, ceil_mode=True, divisor_override=1)
    stand_in = (fill or blur())(images)

    def masked(kept: Tensor) -> Tensor:
        mask = kept.view(sums.shape).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        return score(torch.where(mask[..., : images.shape[2], : images.shape[3]], images, stand_in))

    return flip(masked, sums.flatten(1), steps=steps)


def flip_tokens(
    score: Score,
    input_ids: Tensor,
    relevance: Tensor,
    *,
    fill: int,
    steps: int = 10,
    valid: Tensor | None = None,
) -> Curves:
    """Token flipping: replace tokens by their relevance, in both orders (DeYoung et al. 2020; Schulz et al. 2020).

    To hide tokens in another way, by the attention mask, say, use :func:`flip`.

    Args:
        score: from ids to scores, such as ``lambda ids: model(ids).logits[:, 1]``.
        input_ids: ``(batch, length)``.
        relevance: ``(batch, length)``, one number per token.
        fill: the id that stands in for hidden tokens: mask, unknown or padding token.
        steps: number of steps.
        valid: ``(batch, length)``, False for tokens that stay, such as padding and ``[CLS]``.

    Raises:
        InputError: shapes do not fit.
    """
    _fits(relevance, input_ids, "input_ids")
    return flip(lambda kept: score(torch.where(kept, input_ids, fill)), relevance, steps=steps, valid=valid)


def blur(kernel: int = 51, sigma: float = 20.0) -> Fill:
    """A Gaussian blur with mirrored borders, ``kernel`` pixels wide (odd), with ``sigma`` in pixels. The default is the
    DynamicLRP paper's."""
    weights = torch.exp(-0.5 * (torch.arange(kernel, dtype=torch.float64) - kernel // 2).div(sigma).square())
    weights = weights / weights.sum()

    def blurred(images: Tensor) -> Tensor:
        line = weights.to(images).view(1, 1, 1, -1)
        channels = F.pad(images.flatten(0, 1)[:, None], (kernel // 2,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(channels, line), line.mT).view_as(images)

    return blurred


def mean(images: Tensor) -> Tensor:
    """The mean colour of each image."""
    return images.mean((2, 3), keepdim=True)


def zero(images: Tensor) -> Tensor:
    """0, in the model's own units: grey where pixels are normalised to mean 0."""
    return images.new_zeros(())


class TopK(NamedTuple):
    """See :func:`top_k`."""

    accuracy: Tensor
    """(batch,): share of the k places that hit."""
    iou: Tensor
    """(batch,): intersection over union."""


def top_k(relevance: Tensor, mask: Tensor, k: int = 2, valid: Tensor | None = None) -> TopK:
    """Whether the k most relevant positions lie on the answer, as the DynamicLRP paper (2025) counts for SQuAD.

    ``accuracy = hits / k`` and ``iou = hits / (k + misses)``. An answer of fewer than k positions counts as often as it
    must to make k, and places behind its last position are not looked at. With ``mask`` True for all of the answer
    this is the paper's figure, with True for first and last position alone its strict one (in parentheses there).

    Args:
        relevance: ``(batch, positions)``.
        mask: ``(batch, positions)``, True for the answer.
        k: number of places; 1 gives the top-1 accuracy.
        valid: ``(batch, positions)``, False for positions out of the race, such as the question and padding.

    Raises:
        InputError: shapes do not fit, or a sample has no answer.
    """
    _fits(relevance, mask, "mask")
    _fits(relevance, valid, "valid")
    size = mask.sum(1)
    if bool((size == 0).any()):
        raise InputError("the mask of a sample is empty: leave samples without an answer out")
    if valid is not None:
        relevance = relevance.masked_fill(~valid, -torch.inf)
    hit = mask.gather(1, relevance.argsort(dim=1, descending=True, stable=True)[:, :k])
    found = hit.cumsum(1)
    misses = (~hit & (found < size[:, None])).sum(1)
    hits = found[:, -1] * k / size.clamp(max=k)
    return TopK(hits / k, hits / (k + misses))


def iou(relevance: Tensor, mask: Tensor, above: float = 0.5) -> Tensor:
    """(batch,) intersection over union of ``mask`` and what has more than ``above`` of the largest relevance.

    With 0.5 it is the binarisation of AttnLRP (Achtibat et al. 2024) for SQuAD. A map that is nowhere positive gives 0.

    Args:
        relevance: ``(batch, ...)``.
        mask: of the same shape, True for the answer.
        above: share of the sample's largest relevance, from 0 on.
    """
    _fits(relevance, mask, "mask")
    relevance, mask = relevance.flatten(1), mask.flatten(1).bool()
    chosen = (relevance > above * relevance.amax(1, keepdim=True)) & (relevance > 0)
    return (chosen & mask).sum(1) / (chosen | mask).sum(1)


def mass_accuracy(relevance: Tensor, mask: Tensor) -> Tensor:
    """(batch,) share of the positive relevance that lies in ``mask``: relevance mass accuracy (Arras et al. 2022).

    Args:
        relevance: ``(batch, ...)``, summed over channels by the caller.
        mask: of the same shape, True for the object. A map that is nowhere positive gives 0.
    """
    _fits(relevance, mask, "mask")
    positive = relevance.flatten(1).clamp(min=0)
    whole = positive.sum(1)
    return (positive * mask.flatten(1)).sum(1) / torch.where(whole > 0, whole, 1)


def rank_accuracy(relevance: Tensor, mask: Tensor) -> Tensor:
    """(batch,) share of the ``mask.sum()`` most relevant positions that lie in ``mask``: relevance rank accuracy
    (Arras et al. 2022).

    Args:
        relevance: ``(batch, ...)``, summed over channels by the caller.
        mask: of the same shape, True for the object.
    """
    _fits(relevance, mask, "mask")
    size = mask.flatten(1).sum(1, keepdim=True)
    order = relevance.flatten(1).argsort(dim=1, descending=True, stable=True)
    inside = mask.flatten(1).gather(1, order) & (torch.arange(order.shape[1], device=order.device) < size)
    return inside.sum(1) / size[:, 0].clamp(min=1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(batch,) Spearman's correlation of two maps, equal values sharing their mean rank; 0 where one is constant.

    Of the maps of a trained model and of one with random weights it should be near 0 (Adebayo et al. 2018).
    """
    _fits(a, b, "the other map")
    ranks = [_ranks(x.flatten(1)) for x in (a, b)]
    x, y = (r - r.mean(1, keepdim=True) for r in ranks)
    size = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return ((x * y).sum(1) / torch.where(size > 0, size, 1)).float()


def _ranks(x: Tensor) -> Tensor:
    """(batch, n) ranks in float64, equal values with their mean rank."""
    x = x.contiguous()
    sorted_x = x.sort(1).values
    return (torch.searchsorted(sorted_x, x) + torch.searchsorted(sorted_x, x, right=True) - 1).double() / 2


class Interval(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Tensor,
    *,
    groups: Sequence[int] | Tensor | None = None,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of one number per sample, with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    To compare two methods on the same samples, give the differences: the better one is better beyond doubt where the
    interval excludes 0.

    Args:
        values: ``(samples,)``.
        groups: a whole number per sample: samples of one group, such as crops of one photo, are drawn together, and
            each group counts once.
        confidence: share of the draws inside the interval.
        draws: number of resamples.
        seed: of the random draws, which leave PyTorch's random state as it is.

    Raises:
        InputError: no values, or not one-dimensional.
    """
    if values.ndim != 1 or not len(values):
        raise InputError(f"bootstrap takes one number per sample, not a tensor of shape {tuple(values.shape)}")
    values = values.detach().double().cpu()
    if groups is not None:
        of = torch.unique(torch.as_tensor(groups).cpu(), return_inverse=True)[1]
        values = torch.zeros(int(of.max()) + 1, dtype=values.dtype).scatter_reduce(
            0, of, values, "mean", include_self=False
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    tail = (1 - confidence) / 2
    low, high = values[drawn].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return Interval(float(values.mean()), low, high)


def _fits(relevance: Tensor, other: Tensor | None = None, name: str = "") -> None:
    if other is not None and relevance.shape != other.shape:
        raise InputError(f"relevance of shape {tuple(relevance.shape)} does not fit {name} of {tuple(other.shape)}")
    if not bool(relevance.isfinite().all()):
        raise InputError("relevance is not finite, so it has no order")

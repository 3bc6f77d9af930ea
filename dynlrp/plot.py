"""Pictures and pages of relevance.

Functions of plain tensors and arrays; nothing here knows how the relevance was computed. Red speaks for the
explained output, blue against it, white is no relevance; every colour scale is symmetric around zero.

Matplotlib, Pillow and Jinja2 are optional (``pip install dynlrp[plot]``) and imported on first use. Figures
are plain :class:`matplotlib.figure.Figure` objects: no window, no backend, no global state.

Arguments that several functions share:

* ``quantile``: the quantile of ``|relevance|`` that gets the full colour; what is larger is clipped.
* ``limit``: the ``|relevance|`` that gets the full colour, instead: one scale for several pictures.
* ``title``: a line above the picture.

All of them raise InputError where a shape is wrong or a value NaN, infinite or complex, and ImportError where
an optional package is missing.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from dynlrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Steps", "Table", "Tokens", "balances", "bits", "colours", "heatmap", "matrix", "save", "series", "tokens_figure",
    "tokens_html",
]  # fmt: skip

Values = torch.Tensor | npt.ArrayLike
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

# Blue to white to red; at equal distance from zero both arms are about equally light.
_STOPS = np.array([-1.0, -0.6, -0.2, 0.0, 0.2, 0.6, 1.0])
_BLUES = [(16, 55, 128), (79, 134, 214), (205, 224, 247)]
_REDS = [(252, 214, 205), (225, 92, 75), (142, 12, 30)]
_RGB = np.array([*_BLUES, (255, 255, 255), *_REDS])
_INK, _QUIET, _RULE = "#1d232b", "#69717d", "#d5d9df"
_DPI = 200


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"pictures and pages need {error.name}: pip install dynlrp[plot]") from error


def _array(values: Values, name: str) -> Floats:
    tensor = values.detach() if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    if tensor.is_complex():
        raise InputError(f"{name} is complex: pass its real part or its magnitude")
    array: Floats = tensor.to("cpu", torch.float64).numpy()
    if not array.size or not np.isfinite(array).all():
        raise InputError(f"{name} of shape {array.shape} is empty, or holds NaN or infinite values")
    return array


def _full(relevance: Floats, quantile: float, limit: float | None) -> float:
    """Return the |relevance| that gets the full colour."""
    if not 0 < quantile <= 1 or (limit is not None and not 0 < limit < math.inf):
        raise InputError(f"quantile must lie in (0, 1] and limit be positive, not {quantile} and {limit}")
    size = np.abs(relevance)
    # Sparse relevance has a quantile of zero, and its few values still have to be seen.
    return limit or float(np.quantile(size, quantile)) or float(size.max()) or 1.0


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def colours(relevance: Values, *, quantile: float = 0.995, limit: float | None = None) -> Bytes:
    """Colours of signed relevance of any shape: uint8 RGB of that shape with a last dimension of 3."""
    array = _array(relevance, "relevance")
    scaled = array / _full(array, quantile, limit)  # beyond -1 and 1, interp stays at its ends
    rgb = np.stack([np.interp(scaled, _STOPS, _RGB[:, channel]) for channel in range(3)], axis=-1)
    return np.asarray(rgb.round(), dtype=np.uint8)


def _ink(rgb: Bytes) -> str:
    """Return black or white, whichever has the higher WCAG contrast on a colour."""
    part = rgb / 255.0
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "#ffffff"


def _figure(width: float, height: float, title: str | None) -> Figure:
    """Make a white figure of a size in inches, taller by its title."""
    with _extra():
        from matplotlib.figure import Figure
    total = height + (0.4 if title else 0)
    figure = Figure(figsize=(width, total), dpi=100, facecolor="white")
    if title:
        heading = figure.text(0.15 / width, 1 - 0.15 / total, title, va="top", color=_INK, parse_math=False)
        heading.set(size=13, weight="bold")
    figure.set_label(title or "relevance")
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes without a frame at a place in inches."""
    wide, tall = figure.get_size_inches()
    axes = figure.add_axes((left / wide, bottom / tall, width / wide, height / tall))
    axes.spines[:].set(visible=False, color=_RULE)
    axes.tick_params(length=0, labelsize=8.5, colors=_QUIET)
    return axes


def _scale(figure: Figure, left: float, width: float, relevance: Floats, full: float) -> None:
    """Draw the colour scale at the foot of a figure."""
    axes = _axes(figure, left, 0.3, width, 0.1)
    axes.imshow(colours(np.linspace(-1, 1, 255)[None], limit=1), aspect="auto", extent=(-1, 1, 0, 1))
    low, high = ("\u2264 ", "\u2265 ") if np.abs(relevance).max() > full else ("", "")
    axes.set_xticks([-1, 0, 1], [low + _signed(-full), "0", high + _signed(full)])
    first, _, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axes.set_yticks([])
    axes.spines[:].set_visible(True)


def _photo(image: Values) -> Floats:
    """Return an image as (H, W, 1 or 3) floats in 0..1."""
    array = _array(image, "image")
    array = array[None] if array.ndim == 2 else array
    array = np.moveaxis(array, 0, -1) if array.shape[0] in (1, 3) else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise InputError(f"image must be (H, W), (C, H, W) or (H, W, C) with C 1 or 3, not {array.shape}")
    if array.min() < 0 or array.max() > 255:
        return np.asarray((array - array.min()) / np.ptp(array))
    return array / 255 if array.max() > 1 else array


def _overlay(pixels: Floats, photo: Floats, full: float) -> Floats:
    """Colour the grey photo, the more densely the larger the relevance."""
    high, wide = photo.shape[:2]
    rows, columns = (np.arange(n) * m // n for n, m in zip((high, wide), pixels.shape, strict=True))
    spread = pixels[np.ix_(rows, columns)]
    density = np.minimum(np.abs(spread) / full, 1)[..., None] ** 0.6
    grey = 0.3 + 0.7 * photo.mean(-1, keepdims=True)
    return np.asarray((1 - density) * grey + density * colours(spread, limit=full) / 255)


def heatmap(
    relevance: Values,
    image: Values | None = None,
    *,
    title: str | None = None,
    captions: Sequence[str] = (),
    classes: Sequence[tuple[str, float]] = (),
    pool: int = 1,
    quantile: float = 0.995,
    limit: float | None = None,
) -> Figure:
    """Relevance of an image, or of a batch of images, as a heatmap.

    Args:
        relevance: (H, W), (C, H, W) or a batch (B, C, H, W); summed over channels. A batch shares one scale.
        image: the photo, (H, W), (C, H, W) or (H, W, C), with B in front for a batch, at any resolution.
            Values count 0 to 255, or 0 to 1 where none is larger; others are stretched over that range.
            Photo, heatmap and the heatmap over the photo stand side by side; in a batch, photo and heatmap.
        captions: a text for every image of a batch.
        classes: (name, probability in 0..1) of the top classes, the explained one first, for one image.
        pool: sum the relevance of blocks of ``pool`` by ``pool`` pixels; the total stays what it was.
    """
    array = _array(relevance, "relevance")
    if array.ndim not in (2, 3, 4) or pool < 1:
        raise InputError(f"relevance must be (H, W), (C, H, W) or (B, C, H, W), not {array.shape}; pool positive")
    batch = array.ndim == 4
    pixels = array if array.ndim == 2 else array.sum(-3)
    for axis in (-2, -1):
        pixels = np.add.reduceat(pixels, np.arange(0, pixels.shape[axis], pool), axis=axis)
    maps = pixels if batch else pixels[None]
    photos = [] if image is None else [_photo(one) for one in (_array(image, "image") if batch else [image])]
    if {len(photos), len(captions)} - {0, len(maps)} or (batch and classes):
        raise InputError(
            f"{len(maps)} relevance maps, but {len(photos)} images and {len(captions)} captions; "
            "classes belong to a single image"
        )
    full = _full(maps, quantile, limit)

    gap, side, foot, head = 0.15, 1.5 if batch else 2.9, 0.6, 0.15 if batch and not captions else 0.32
    pictures = 1 if not photos else 2 if batch else 3
    across = min(len(maps), max(1, round(math.sqrt(len(maps) * 1.6 / pictures))))
    down = -(-len(maps) // across)
    tall = side * min(max(array.shape[-2] / array.shape[-1], 0.2), 3)
    near = 0.05 if batch else gap
    cell = pictures * (side + near) - near + gap
    used = across * cell
    figure = _figure(used + gap + (3.1 if classes else 0), down * (tall + head) + foot, title)
    for index, flat in enumerate(maps):
        strip: dict[str, Floats | Bytes] = {"relevance": colours(flat, limit=full)}
        if photos:
            strip = {"input": photos[index], **strip}
        if photos and not batch:
            strip["relevance over input"] = _overlay(flat, photos[index], full)
        bottom = foot + (down - 1 - index // across) * (tall + head)
        for place, (name, picture) in enumerate(strip.items()):
            left = gap + index % across * cell + place * (side + near)
            axes = _axes(figure, left, bottom, side, tall)
            smooth = "antialiased" if name == "input" else "nearest"
            axes.imshow(picture, "gray", aspect="auto", vmin=0, vmax=1, interpolation=smooth)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            text = ("" if place or not captions else captions[index]) if batch else name
            ink = _INK if batch else _QUIET
            axes.set_title(text, size=9.5, pad=4, loc="left", color=ink, parse_math=False)
    length = min(side, 2.2)
    centre = gap + (1.5 * side + gap if pictures == 3 else (used - gap) / 2)
    _scale(figure, centre - length / 2, length, maps, full)
    if classes:
        axes = _axes(figure, used + 2 * gap, foot, 2.75, tall)
        for place, (name, share) in enumerate(classes):
            axes.barh(place, 1, height=0.26, color="#eef0f3")
            axes.barh(place, share, height=0.26, color="#9bb4d6" if place else "#3c6fb4")
            axes.text(0, place - 0.22, name, size=9, color=_INK, parse_math=False)
            axes.text(1, place - 0.22, f"{share:.1%}", size=9, color=_INK, ha="right")
        axes.set(xlim=(0, 1), ylim=(max(len(classes), 4) - 0.8, -0.7), xticks=[], yticks=[])
        axes.set_title("top classes", size=9.5, pad=4, loc="left", color=_QUIET)
    return figure


def series(
    relevance: Values,
    values: Values | None = None,
    *,
    title: str | None = None,
    names: Sequence[str] = (),
    quantile: float = 1.0,
    limit: float | None = None,
) -> Figure:
    """Relevance along a one-dimensional signal.

    Args:
        relevance: (L,) or (C, L): one row for every channel, all on one scale; drawn as bars.
        values: the signal, in the same shape: drawn as a line, the relevance as colour behind it.
        names: one for every channel.
    """
    rows = np.atleast_2d(_array(relevance, "relevance"))
    lines = None if values is None else np.atleast_2d(_array(values, "values"))
    if rows.ndim != 2 or (lines is not None and lines.shape != rows.shape):
        raise InputError(f"relevance must be (L,) or (C, L), not {rows.shape}, and values have its shape")
    full, length = _full(rows, quantile, limit), rows.shape[1]
    foot, tall = 0.85, 1.5 if len(rows) < 5 else 0.9
    figure = _figure(8, foot + len(rows) * (tall + 0.15), title)
    for place, row in enumerate(rows):
        axes = _axes(figure, 0.75, foot + (len(rows) - 1 - place) * (tall + 0.15), 7.1, tall)
        if lines is None:
            axes.bar(np.arange(length), row, width=1, color=colours(row, limit=full) / 255)
            axes.axhline(0, color=_QUIET, linewidth=0.6)
            axes.set_ylim(-1.05 * full, 1.05 * full)
        else:
            margin = 0.08 * float(np.ptp(lines[place])) or 1.0
            extent = (-0.5, length - 0.5, lines[place].min() - margin, lines[place].max() + margin)
            axes.imshow(colours(row[None], limit=full), aspect="auto", extent=extent, interpolation="nearest")
            axes.plot(lines[place], color=_INK, linewidth=1.1)
        axes.set_xlim(-0.5, length - 0.5)
        axes.tick_params(labelbottom=place == len(rows) - 1)
        axes.spines[["left", "bottom"]].set_visible(True)
        axes.set_ylabel(names[place] if names else "", size=9, color=_INK, parse_math=False)
    _scale(figure, 0.75, 2.2, rows, full)
    return figure


def matrix(
    relevance: Values,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    title: str | None = None,
    across: str = "",
    down: str = "",
    quantile: float = 0.995,
    limit: float | None = None,
) -> Figure:
    """Relevance of pairs, a cell for each.

    Args:
        relevance: (R, C).
        rows, columns: names of the R rows and C columns; where there is no room for all, some are left out.
        across, down: what the columns and the rows are.
    """
    array = _array(relevance, "relevance")
    if array.ndim != 2 or {len(rows), array.shape[0]} - {0, array.shape[0]} or len(columns) not in (0, array.shape[1]):
        raise InputError(f"relevance must be (R, C), not {array.shape}; {len(rows)} rows, {len(columns)} columns named")
    full = _full(array, quantile, limit)
    cell = min(0.3, max(11.0 / array.shape[1], 0.04))
    wide, tall = (max(size * cell, 2.2) for size in array.shape[::-1])
    texts = [_shown(rows), _shown(columns)]
    left, head = (
        0.35 + (0.3 if name else 0) + 0.085 * max(map(len, names), default=0)
        for name, names in zip((down, across), texts, strict=True)
    )
    figure = _figure(left + wide + 0.2, head + tall + 0.65, title)
    axes = _axes(figure, left, 0.65, wide, tall)
    axes.imshow(colours(array, limit=full), aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    families = _families("".join(map("".join, texts)))
    for axis, names, name in ((axes.yaxis, texts[0], down), (axes.xaxis, texts[1], across)):
        step = max(1, math.ceil(0.13 / cell))
        axis.set_ticks(range(0, len(names), step), names[::step])
        axis.set_label_text(name, size=9.5, color=_QUIET)
        for label in axis.get_ticklabels():
            label.set(family=families, parse_math=False, rotation=90 if axis is axes.xaxis else 0)
    _scale(figure, left, 2.2, array, full)
    return figure


_PALETTE = ("#3c6fb4", "#e0912f", "#4a9c6d", "#c1432e", "#8e6bb0", "#7a8793", "#b59a2d", "#5fb3c4")


def balances(
    names: Sequence[str],
    incoming: Sequence[float | None],
    parts: Mapping[str, Sequence[float]],
    *,
    title: str | None = None,
) -> Figure:
    """What came into each of several places, and what of it ended there, as horizontal bars.

    Args:
        names: N places, from top to bottom.
        incoming: N amounts; None is unknown.
        parts: kind -> N amounts that ended there, stacked to the right of zero, or to the left where negative.
    """
    if {len(incoming), *map(len, parts.values())} != {len(names)} or not names:
        raise InputError(f"{len(names)} names need as many amounts of each kind")
    known = _array([amount or 0.0 for amount in incoming], "incoming")
    ended = {kind: _array(amounts, kind) for kind, amounts in parts.items()}
    line, foot, head = 0.24, 0.35, 0.6
    left = 0.35 + 0.075 * max(map(len, names))
    tall = line * len(names)
    figure = _figure(left + 8.2, tall + foot + head, title)
    for place, text in enumerate(("came in", "ended there")):
        axes = _axes(figure, left + place * 4.1, foot, 3.9, tall)
        axes.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)))
        axes.set_yticklabels([] if place else names, parse_math=False)
        axes.set_title(text, size=9.5, pad=26 if ended else 6, loc="left", color=_QUIET)
        axes.grid(axis="x", color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.axvline(0, color=_QUIET, linewidth=0.8)
        axes.locator_params(axis="x", nbins=6)
        if not place:
            axes.barh(range(len(names)), known, height=0.62, color="#9bb4d6")
            for row, amount in enumerate(incoming):
                if amount is None:
                    axes.text(0, row, " unknown", size=8, va="center", color=_QUIET)
            continue
        ends = np.zeros((2, len(names)))
        for kind, amounts, colour in zip(ended, ended.values(), itertools.cycle(_PALETTE), strict=False):
            side = (amounts < 0).astype(int)
            start = ends[side, np.arange(len(names))]
            axes.barh(range(len(names)), amounts, left=start, height=0.62, color=colour, label=kind)
            ends[side, np.arange(len(names))] += amounts
        if ended:
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(ended), fontsize=8, frameon=False,
                handlelength=1, columnspacing=1.1, handletextpad=0.4, borderpad=0.2, labelcolor=_QUIET,
            )  # fmt: skip
    return figure


def bits(
    names: Sequence[str],
    widths: Sequence[int],
    scores: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    title: str | None = None,
    label: str = "score",
) -> Figure:
    """The bits of every layer, and the score that they were given for, as horizontal bars.

    Args:
        names: N layers, from top to bottom; where there is no room for all, some are left out.
        widths: N numbers of bits.
        scores: N scores, and the bounds of their confidence intervals in ``low`` and ``high``.
        label: what the score is.
    """
    if {len(widths), len(scores), len(low), len(high)} != {len(names)} or not names:
        raise InputError(f"{len(names)} names need as many bits, scores and bounds")
    sizes = _array(scores, "scores")
    reach = np.abs(np.stack([sizes - _array(low, "low"), _array(high, "high") - sizes]))
    line, foot = min(0.24, max(20 / len(names), 0.012)), 0.45
    left = 0.35 + 0.075 * max(map(len, names))
    figure = _figure(left + 8.2, line * len(names) + foot + 0.4, title)
    step, rows = math.ceil(0.13 / line), np.arange(len(names))
    for place, (text, numbers) in enumerate({"bits": np.asarray(widths, float), label: sizes}.items()):
        axes = _axes(figure, left + place * 4.1, foot, 3.9, line * len(names))
        axes.set(ylim=(len(names) - 0.5, -0.5), yticks=rows[::step])
        axes.set_yticklabels([] if place else names[::step], parse_math=False)
        axes.set_title(text, size=9.5, loc="left", color=_QUIET, parse_math=False)
        axes.grid(axis="x", color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=6)
        bars = axes.barh(rows, numbers, height=0.62, color=_PALETTE[0] if place else "#9bb4d6")
        if place:
            axes.errorbar(numbers, rows, xerr=reach, fmt="none", ecolor=_INK, elinewidth=0.8)
        elif step == 1:
            axes.bar_label(bars, [str(width) for width in widths], padding=3, size=8, color=_QUIET)
    return figure


@dataclass(frozen=True, eq=False)
class Table:
    """A table of texts as a part of a page: a label and a text per column in every line."""

    title: str
    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = ()
    """Lines of text below."""
    folded: bool = False
    """Shown only when clicked."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Words with their relevance, as a panel of :func:`save`; the fields are as in :func:`tokens_html`."""

    tokens: Sequence[str]
    relevance: Values
    title: str | None = None
    limit: float | None = None


@dataclass(frozen=True, eq=False)
class Steps:
    """Words that were made one after the other, each explained by those before it, as a panel of :func:`save`.

    A page shows the relevance for the word that is pointed at. At first, as a picture does, it shows the sum over all.
    """

    tokens: Sequence[str]
    relevance: Values
    """``(made, N)``: a row for each of the words that were made, which are the last of the N tokens."""
    title: str | None = None

    def total(self) -> Tokens:
        """The sum over all words that were made."""
        array = _array(self.relevance, "relevance")
        if array.ndim != 2 or array.shape[1] != len(self.tokens) or len(array) > len(self.tokens):
            raise InputError(f"{len(self.tokens)} tokens need relevance (made, {len(self.tokens)}), not {array.shape}")
        return Tokens(self.tokens, array.sum(0), self.title)


def _shown(tokens: Sequence[str]) -> list[str]:
    return [token.replace("\n", "\u23ce").replace("\t", "\u21e5").strip() or "\u2423" for token in tokens]


def _words(tokens: Sequence[str], relevance: Values, limit: float | None) -> tuple[list[str], Floats, float]:
    """Return the texts as shown, their relevance and the |relevance| of the full colour."""
    array = _array(relevance, "relevance")
    if array.shape != (len(tokens),):
        raise InputError(f"{len(tokens)} tokens need relevance ({len(tokens)},), not {array.shape}")
    return _shown(tokens), array, _full(array, 1, limit)


def tokens_html(
    tokens: Sequence[str], relevance: Values, *, title: str | None = None, limit: float | None = None
) -> str:
    """Words coloured by relevance, as an HTML fragment with its own styles; the number shows on hover.

    Args:
        tokens: N strings in reading order, shown with a gap between them; everything is escaped.
        relevance: (N,).
    """
    texts, array, full = _words(tokens, relevance, limit)
    spans = "\n".join(
        f'<span title="{note}" style="{style};padding:.12em .3em;border-radius:.25em">{html.escape(text)}</span>'
        for text, (note, style) in zip(texts, _looks(array, full), strict=True)
    )
    ramp = ",".join(f"rgb({r},{g},{b})" for r, g, b in colours(_STOPS, limit=1))
    head = f'<div style="font-weight:600;margin-bottom:.4em">{html.escape(title)}</div>\n' if title else ""
    return (
        f'<div style="font-family:system-ui,sans-serif;color:{_INK};margin:1.5em 0">\n{head}'
        f'<div style="line-height:1.9;font-size:1.1em;overflow-wrap:anywhere">{spans}</div>\n'
        f'<div style="font-size:.8em;color:{_QUIET};margin-top:.5em">{_signed(-full)} <span style="width:9em;'
        f"display:inline-block;height:.7em;border:1px solid {_RULE};background:linear-gradient(90deg,{ramp})"
        f'"></span> {_signed(full)} relevance</div>\n</div>'
    )


def _looks(relevance: Floats, full: float) -> list[tuple[str, str]]:
    """The number and the colours of every word."""
    return [
        (_signed(value), f"background:rgb({','.join(map(str, rgb))});color:{_ink(rgb)}")
        for value, rgb in zip(relevance, colours(relevance, limit=full), strict=True)
    ]


def _steps_html(steps: Steps) -> str:
    """Words as an HTML fragment that recolours them for the word that is pointed at."""
    total = steps.total()
    array = _array(steps.relevance, "relevance")
    full = [_full(row, 1, None) for row in array]
    looks = json.dumps([(f"{most:.3g}", _looks(row, most)) for row, most in zip(array, full, strict=True)])
    name = f"steps-{zlib.crc32(looks.encode()):x}"
    return (
        f'<div id="{name}">\n{tokens_html(total.tokens, total.relevance, title=total.title)}\n'
        f'<p style="font-size:.8em;color:{_QUIET}">The sum over all words that were made. Point at one of the last '
        f"{len(array)} words, or choose it with the Tab key, to see what made it.</p>\n</div>\n"
        f"<script>\n(() => {{\nconst looks = {looks};\n"
        f'const words = [...document.querySelectorAll("#{name} span[title]")];\n'
        f'const note = document.querySelector("#{name} p"), first = words.length - looks.length;\n'
        "looks.forEach(([full, look], number) => {\n"
        "  const word = words[first + number];\n"
        "  const show = () => {\n"
        "    words.forEach((one, place) => {\n"
        "      one.title = look[place][0];\n"
        "      one.style.cssText += look[place][1];\n"
        '      one.style.outline = place === first + number ? "2px solid currentColor" : "";\n'
        "      one.style.opacity = place > first + number ? 0.3 : 1;\n"
        "    });\n"
        "    note.textContent = `Relevance for \u201c${word.textContent}\u201d; the full colour is ${full}.`;\n"
        "  };\n"
        "  word.tabIndex = 0;\n"
        '  word.style.cursor = "pointer";\n'
        '  for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, show);\n'
        "});\n})();\n</script>"
    )


def _families(text: str) -> list[str]:
    """Name DejaVu Sans, which Matplotlib ships, and installed fonts for the characters that it lacks."""
    from matplotlib import font_manager, ft2font

    names, missing = ["DejaVu Sans"], {ord(character) for character in text}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name not in names):
        if missing - set(range(128)) and font.style == "normal" and not font.name.startswith("Last Resort"):
            found = missing & ft2font.FT2Font(font.fname).get_charmap().keys()
            names += [font.name] if found and font.name not in names else []
            missing -= found
    return names


def tokens_figure(
    tokens: Sequence[str],
    relevance: Values,
    *,
    title: str | None = None,
    limit: float | None = None,
    width: float = 8.0,
) -> Figure:
    """Words coloured by relevance, as a figure ``width`` inches wide.

    Args:
        tokens: N strings in reading order; lines wrap, and words wider than a line break, by measured width.
        relevance: (N,).
    """
    texts, array, full = _words(tokens, relevance, limit)
    with _extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.font_manager import FontProperties
        from matplotlib.patches import FancyBboxPatch
    font = FontProperties(family=_families("".join(texts)), size=13)
    ruler = _figure(1, 1, None)
    FigureCanvasAgg(ruler)
    measured = ruler.text(0, 0, "", fontproperties=font, parse_math=False)
    pad, gap, line, room = 0.06, 0.07, 0.34, width - 0.3

    def measure(text: str) -> float:
        measured.set_text(text)
        return measured.get_window_extent().width / ruler.dpi + 2 * pad

    x, row, placed = 0.0, 0, []
    for text, colour in zip(texts, colours(array, limit=full), strict=True):
        while text:
            part = text
            while (wide := measure(part)) > room and len(part) > 1:
                part = part[: max(1, min(len(part) - 1, int(len(part) * room / wide)))]
            if x and x + wide > room:
                x, row = 0.0, row + 1
            placed.append((x, row, wide, part, colour))
            x, text = x + wide + gap, text[len(part) :]
    height = 0.75 + (row + 1) * line
    figure = _figure(width, height, title)
    inches = figure.dpi_scale_trans
    for x, row, wide, text, colour in placed:
        left, bottom = 0.15 + x, height - 0.1 - (row + 1) * line
        box = "round,pad=0,rounding_size=0.05"
        style = {"facecolor": colour / 255, "linewidth": 0, "transform": inches}
        figure.add_artist(FancyBboxPatch((left, bottom), wide, line - 0.06, box, **style))
        style = {"color": _ink(colour), "fontproperties": font, "parse_math": False, "transform": inches}
        figure.text(left + pad, bottom + 0.085, text, **style)
    _scale(figure, 0.15, 2.2, array, full)
    return figure


def save(
    path: str | PathLike[str],
    *panels: Figure | Tokens | Steps,
    title: str = "Relevance",
    facts: Mapping[str, object] | None = None,
    ledger: Mapping[str, float] | None = None,
    output: float | None = None,
    tables: Sequence[Table] = (),
) -> Path:
    """Write panels to one PNG, or to one self-contained HTML page, and return its path.

    Args:
        path: ends in ``.png`` (the panels below each other, 200 dots per inch) or in ``.html``.
        panels: figures, or :class:`Tokens` and :class:`Steps`, which a page shows as text.
        title: heading of the page; a PNG keeps it in its metadata.
        facts: short facts under the heading (model, target, value, time); in a page only.
        ledger: account -> amount, in units of the output, as a table; in a page only.
        output: the output that the accounts add up to, for the share of each; their sum by default.
        tables: more tables below the ledger; in a page only.

    Raises:
        InputError: another suffix, or no panel for a PNG.
    """
    path = Path(path)
    if path.suffix.lower() == ".png" and panels:
        with _extra():
            from PIL import Image, PngImagePlugin
        images = [Image.open(io.BytesIO(_png(panel))).convert("RGB") for panel in panels]
        size = max(image.width for image in images), sum(image.height for image in images)
        sheet = Image.new("RGB", size, "white")
        for index, image in enumerate(images):
            sheet.paste(image, (0, sum(above.height for above in images[:index])))
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("Title", title)
        sheet.save(path, dpi=(_DPI, _DPI), pnginfo=notes)
    elif path.suffix.lower() == ".html":
        with _extra():
            from markupsafe import Markup
        from dynlrp.pages import render

        total = math.fsum((ledger or {}).values()) if output is None else output
        largest = max(map(abs, [total, *(ledger or {}).values()]))
        places = max(0, 4 - math.floor(math.log10(largest))) if largest else 0
        text = render(
            "page.html",
            filters={
                "number": lambda value: f"{round(value, places) + 0.0:+,.{places}f}",
                "share": lambda value: f"{round(value, 3) + 0.0:.1%}",
            },
            title=title,
            facts=facts,
            panels=[Markup(_fragment(panel)) for panel in panels],
            ledger=ledger,
            output=total,
            tables=tables,
        )
        path.write_text(text, encoding="utf-8")
    else:
        problem = "a PNG needs a panel" if path.suffix.lower() == ".png" else "the suffix must be .png or .html"
        raise InputError(f"cannot write {path.name!r}: {problem}")
    return path


def _png(panel: Figure | Tokens | Steps) -> bytes:
    if isinstance(panel, Steps):
        panel = replace(panel.total(), title=panel.title or "Relevance for all words that were made")
    if isinstance(panel, Tokens):
        panel = tokens_figure(panel.tokens, panel.relevance, title=panel.title, limit=panel.limit)
    buffer = io.BytesIO()
    panel.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _fragment(panel: Figure | Tokens | Steps) -> str:
    if isinstance(panel, Steps):
        return _steps_html(panel)
    if isinstance(panel, Tokens):
        return tokens_html(panel.tokens, panel.relevance, title=panel.title, limit=panel.limit)
    data = base64.b64encode(_png(panel)).decode()
    alt, width = html.escape(str(panel.get_label())), round(panel.get_figwidth() * 96)
    return f'<img src="data:image/png;base64,{data}" width="{width}" alt="{alt}">'

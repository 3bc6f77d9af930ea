"""A folded graph of operations as an SVG picture: places in rows, boxes, lines."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx as nx

COLOURS = {
    "input": "#20242b",
    "linear": "#4878cf",
    "piecewise linear": "#59a36a",
    "elementwise": "#e8963e",
    "product": "#d65f7d",
    "reduction": "#4fb0ae",
    "normalisation": "#c9a227",
    "attention": "#8d63c9",
    "recurrent": "#9c6b4f",
    "routing": "#9aa5b1",
    "composite": "#e07bb5",
    "coefficient": "#6f7782",
    "custom": "#2aa9c9",
    "uncovered": "#e02b20",
}
"""Of nodes, by the class of their operation."""
WIDE, HIGH, GAP, ROW = 148, 34, 16, 62
"""Size of a node and distances in a picture, in pixels."""


def layout(graph: nx.DiGraph[str]) -> dict[str, tuple[float, float]]:
    """Places in rows: a node stands below all that come before it, as near under them as there is room; what only
    makes weights and coefficients stands just above where it is used.

    A few passes over nodes and edges. Folded modules may form cycles; an edge back to an earlier node moves nothing.
    """
    rows: dict[str, int] = {}
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {node: [] for node in graph}
    for node in graph:  # in the order of the data
        before[node] = [other for other in graph.predecessors(node) if other in rows]
        for other in before[node]:
            after[other].append(node)
        rows[node] = 1 + max((rows[other] for other in before[node]), default=-1)
    ahead: dict[str, int] = {}
    for node in reversed(list(graph)):
        ahead[node] = 1 + max((ahead[other] for other in after[node]), default=0)
        if not graph.nodes[node]["reached"] and after[node]:
            rows[node] = min(rows[other] for other in after[node]) - 1
    lines: dict[int, list[str]] = {}
    for node, row in rows.items():
        lines.setdefault(row, []).append(node)
    places: dict[str, tuple[float, float]] = {}
    for row in sorted(lines):
        wanted = {}
        for node in lines[row]:
            near, aside = [places[other][0] for other in before[node]], 0
            if not near:
                near = [places[o][0] for user in after[node] for o in before[user] if o in places]
                aside = WIDE + GAP
            wanted[node] = sum(near) / len(near) + aside if near else 0.0
        line = sorted(lines[row], key=wanted.__getitem__)
        xs: list[float] = []
        for node in line:
            xs.append(max(wanted[node], xs[-1] + WIDE + GAP) if xs else wanted[node])
        # The way that goes on for longest runs straight down.
        most = max(ahead[node] for node in line)
        main = [place for place, node in enumerate(line) if ahead[node] == most]
        main = main[(len(main) - 1) // 2 : len(main) // 2 + 1]
        shift = sum(xs[place] - wanted[line[place]] for place in main) / len(main)
        places.update((node, (x - shift, row * ROW)) for x, node in zip(xs, line, strict=True))
    return places


def svg(graph: nx.DiGraph[str], title: str) -> str:
    """The picture, as text."""
    places = layout(graph)
    left = min((x for x, _ in places.values()), default=0) - 20
    right = max((x for x, _ in places.values()), default=0) + WIDE + 20
    bottom = max((y for _, y in places.values()), default=0) + HIGH + 20
    used = [name for name in COLOURS if any(name in (d["class"], *d["parts"]) for _, d in graph.nodes(data=True))]
    right = max(right, left + 40 + 128 * len(used))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} -84 {right - left:.0f} {bottom + 84:.0f}" '
        f'width="{right - left:.0f}" height="{bottom + 84:.0f}" font-family="system-ui, sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect x="{left:.0f}" y="-84" width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{left + 20:.0f}" y="-58" font-size="15" font-weight="600" fill="#1b2129">{escape(title)}</text>',
        *_legend(used, left + 20),
        '<g fill="none" stroke-width="1.2">',
        *(_curve(places[a], places[b], d["carries"]) for a, b, d in graph.edges(data=True)),
        "</g>",
        *(_box(*places[name], data) for name, data in graph.nodes(data=True)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend(names: Iterable[str], left: float) -> Iterable[str]:
    for number, name in enumerate(names):
        x = left + 128 * number
        yield f'<rect x="{x:.0f}" y="-42" width="11" height="11" rx="3" fill="{COLOURS[name]}"/>'
        yield f'<text x="{x + 17:.0f}" y="-32" fill="#566070">{escape(name)}</text>'


def _curve(start: tuple[float, float], end: tuple[float, float], carries: bool) -> str:
    x1, y1, x2, y2 = start[0] + WIDE / 2, start[1] + HIGH, end[0] + WIDE / 2, end[1]
    bend = max(18.0, (y2 - y1) / 2)
    aside = 0.85 * WIDE if y2 - y1 > ROW and abs(x2 - x1) < WIDE / 2 else 0.0  # around the boxes between
    stroke = 'stroke="#4878cf" stroke-opacity=".75"' if carries else 'stroke="#b8c0ca" stroke-dasharray="3 3"'
    bends = f"{x1 + aside:.0f} {y1 + bend:.0f} {x2 + aside:.0f} {y2 - bend:.0f}"
    return f'<path d="M{x1:.0f} {y1:.0f}C{bends} {x2:.0f} {y2:.0f}" {stroke}/>'


def _box(x: float, y: float, data: dict[str, Any]) -> str:
    label, detail, parts = data["label"], data["detail"], data["parts"]
    total = sum(parts.values())
    lines = []
    if parts:
        lines.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDE}" height="{HIGH}" rx="6" fill="#eef1f5" stroke="#97a2b0"/>'
        )
        at = x + 6
        for name, count in parts.items():
            width = (WIDE - 12) * count / total
            lines.append(
                f'<rect x="{at:.1f}" y="{y + HIGH - 9:.0f}" width="{width:.1f}" height="4" fill="{COLOURS[name]}"/>'
            )
            at += width
        detail = f"{total} operation{'s' * (total > 1)}"
        lines.append(_text(x, y + 13, _short(label), "#1b2129", 600))
        lines.append(_text(x, y + 22, detail, "#667080", 400, 8))
    else:
        fill = COLOURS[data["class"]]
        lines.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDE}" height="{HIGH}" rx="6" fill="{fill}"/>')
        lines.append(_text(x, y + (15 if detail else 21), _short(label), "#ffffff", 600))
        if detail:
            lines.append(_text(x, y + 27, _short(detail, 26), "#ffffff", 400, 9))
        if data["role"]:
            lines.append(f'<circle cx="{x + WIDE - 10:.0f}" cy="{y + 10:.0f}" r="3.5" fill="#ffffff"/>')
    return f"<g><title>{escape(label)}{escape(': ' + detail if detail else '')}</title>{''.join(lines)}</g>"


def _text(x: float, y: float, text: str, fill: str, weight: int, size: int = 11) -> str:
    middle = x + WIDE / 2
    return (
        f'<text x="{middle:.0f}" y="{y:.0f}" text-anchor="middle" fill="{fill}" font-weight="{weight}" '
        f'font-size="{size}">{escape(text)}</text>'
    )


def _short(text: str, most: int = 21) -> str:
    """The end of a long name: that is where modules differ."""
    return text if len(text) <= most else "\N{HORIZONTAL ELLIPSIS}" + text[1 - most :]

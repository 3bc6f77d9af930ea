"""The graph of a model's operations as a picture, a page to explore, or data, through networkx."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlrp.catalogue import class_of
from dynlrp.coverage import capture, copies, covers
from dynlrp.errors import InputError
from dynlrp.explain import Settled
from dynlrp.graph import LEAF
from dynlrp.pages import render
from dynlrp.roles import NO_ROLE, roles
from dynlrp.rules.operation import REGISTRY

if TYPE_CHECKING:
    import networkx as nx

    from dynlrp.zoo.entry import Entry

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
SHOWN = 250
"""Nodes in a picture where the caller names no depth, if modules can be folded so far."""
WIDE, HIGH, GAP, ROW = 148, 34, 16, 62
"""Size of a node and distances in a picture, in pixels."""


def graph_of(entry: Entry, composite: str = "auto") -> nx.DiGraph[int]:
    """The operations of a model of the zoo; see :func:`to_networkx`."""
    example = entry.build()
    (settled, _), _ = capture(example.model, example.inputs, composite=composite, allow_training=example.random)
    return to_networkx(settled)


def to_networkx(settled: Settled) -> nx.DiGraph[int]:
    """Operations as nodes, numbered so that operands come first; edges go the way of the data.

    A node has ``operation``, ``family``, ``class``, ``rule``, ``roles``, ``module``, ``reached`` (relevance passes
    it), ``covered`` (it has a rule of its own) and ``parameters`` (how many are its operands); an edge has ``carries``
    (relevance travels along it).
    """
    import networkx as nx

    graph, steps, facts = settled.graph, settled.steps(), settled.facts()
    found, ours = roles(settled.structure), copies(settled)
    made: nx.DiGraph[int] = nx.DiGraph()
    for index, (name, node) in enumerate(zip(graph.names, graph.nodes, strict=True)):
        if name == LEAF:
            continue
        step, operation = steps.get(index), REGISTRY.get(name)
        covered = covers(name, facts.get(index), step)[1]
        kind = "input" if index in ours else class_of(operation.family) if operation and covered else "uncovered"
        below = [edge for edge in graph.operands[index] if edge is not None]
        made.add_node(
            index,
            operation="input" if index in ours else name,
            family=operation.family if operation is not None else "",
            rule=type(step.rule).__name__ if step is not None else "",
            roles=", ".join(sorted(found.get(index, NO_ROLE).names)),
            module="" if index in ours else settled.path(node._sequence_nr()),
            reached=step is not None,
            covered=covered,
            parameters=sum(graph.names[edge.node] == LEAF for edge in below) if index not in ours else 0,
            **{"class": kind},
        )
        for place, edge in enumerate(graph.operands[index]):
            if edge is not None and graph.names[edge.node] != LEAF:
                carries = bool(step is not None and step.signals[place])
                carries = carries or made.edges.get((edge.node, index), {}).get("carries", False)
                made.add_edge(edge.node, index, carries=carries)
    return made


def folded(graph: nx.DiGraph[int], depth: int) -> nx.DiGraph[str]:
    """The graph with all operations of a module that is nested deeper than ``depth`` as one node.

    Its nodes have ``label``, ``detail``, ``class``, ``reached`` and, of modules, ``parts``: the number of operations by
    class.
    """
    import networkx as nx

    members: dict[str, list[int]] = {}
    for index, data in graph.nodes(data=True):
        parts = data["module"].split(".") if data["module"] else []
        name = str(index) if len(parts) <= depth else "module " + ".".join(parts[: depth + 1])
        members.setdefault(name, []).append(index)

    def first(name: str) -> int:
        """Weights are made before anything else, so what relevance reaches tells a module's place."""
        return next((index for index in members[name] if graph.nodes[index]["reached"]), members[name][0])

    small: nx.DiGraph[str] = nx.DiGraph()
    for name in sorted(members, key=first):
        own = [graph.nodes[index] for index in members[name]]
        module, data = name.startswith("module "), own[0]
        small.add_node(
            name,
            label=name.removeprefix("module ") if module else _label(data["operation"]),
            detail="" if module else data["roles"] or data["rule"],
            parts=Counter(one["class"] for one in own) if module else {},
            reached=any(one["reached"] or one["class"] == "input" for one in own),
            **{"class": "" if module else data["class"]},
        )
    names = {index: name for name, indices in members.items() for index in indices}
    for one, other, data in graph.edges(data=True):
        a, b = names[one], names[other]
        if a != b:
            small.add_edge(a, b, carries=data["carries"] or small.edges.get((a, b), {}).get("carries", False))
    return small


def _label(operation: str) -> str:
    return operation.removesuffix("0").removesuffix("Backward")


def depth_for(graph: nx.DiGraph[int], most: int = SHOWN) -> int:
    """How deep modules can be unfolded so that no more than ``most`` nodes are seen."""
    modules = [data["module"].split(".") if data["module"] else [] for _, data in graph.nodes(data=True)]
    depth = 0
    while depth < max(map(len, modules), default=0):
        deeper = depth + 1
        seen = {tuple(m[: deeper + 1]) if len(m) > deeper else (number,) for number, m in enumerate(modules)}
        if len(seen) > most:
            break
        depth = deeper
    return depth


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
        main = [place for place, node in enumerate(line) if ahead[node] == max(ahead[other] for other in line)]
        main = main[(len(main) - 1) // 2 : len(main) // 2 + 1]
        shift = sum(xs[place] - wanted[line[place]] for place in main) / len(main)
        places.update((node, (x - shift, row * ROW)) for x, node in zip(xs, line, strict=True))
    return places


def to_svg(graph: nx.DiGraph[int], title: str, depth: int | None = None) -> str:
    """A picture without script."""
    small = folded(graph, depth_for(graph) if depth is None else depth)
    places = layout(small)
    left = min((x for x, _ in places.values()), default=0) - 20
    right = max((x for x, _ in places.values()), default=0) + WIDE + 20
    bottom = max((y for _, y in places.values()), default=0) + HIGH + 20
    used = [name for name in COLOURS if any(name in (d["class"], *d["parts"]) for _, d in small.nodes(data=True))]
    right = max(right, left + 40 + 128 * len(used))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} -84 {right - left:.0f} {bottom + 84:.0f}" '
        f'width="{right - left:.0f}" height="{bottom + 84:.0f}" font-family="system-ui, sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect x="{left:.0f}" y="-84" width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{left + 20:.0f}" y="-58" font-size="15" font-weight="600" fill="#1b2129">{escape(title)}</text>',
        *_legend(used, left + 20),
        '<g fill="none" stroke-width="1.2">',
        *(_curve(places[a], places[b], d["carries"]) for a, b, d in small.edges(data=True)),
        "</g>",
        *(_box(*places[name], data) for name, data in small.nodes(data=True)),
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


def to_html(graph: nx.DiGraph[int], title: str, depth: int | None = None) -> str:
    """A page to explore: modules fold and unfold, everything can be searched."""
    number = {node: place for place, node in enumerate(graph)}
    keys = ("operation", "family", "rule", "roles", "module", "class", "reached", "covered", "parameters")
    return render(
        "graph.html",
        title=title,
        data={
            "nodes": [[data[key] for key in keys] for _, data in graph.nodes(data=True)],
            "edges": [[number[a], number[b], int(data["carries"])] for a, b, data in graph.edges(data=True)],
            "colours": COLOURS,
            "depth": depth_for(graph) if depth is None else depth,
        },
    )


def to_graphml(graph: nx.DiGraph[int], title: str, depth: int | None = None) -> str:
    """GraphML, for Gephi, yEd, Cytoscape and others; every operation is there."""
    import networkx as nx

    return "\n".join(nx.generate_graphml(graph)) + "\n"


def to_json(graph: nx.DiGraph[int], title: str, depth: int | None = None) -> str:
    """Node-link data, as ``networkx.node_link_graph`` reads it; every operation is there."""
    import networkx as nx

    return json.dumps({"title": title, **nx.node_link_data(graph, edges="edges")}, indent=1)


WRITERS: dict[str, Callable[..., str]] = {
    ".svg": to_svg,
    ".html": to_html,
    ".graphml": to_graphml,
    ".json": to_json,
}
"""Formats by the ending of a file's name."""


def check_ending(path: Path) -> None:
    """Raise for a file whose name ends in no known format."""
    if path.suffix not in WRITERS:
        raise InputError(f"{path}: graphs are written as {', '.join(WRITERS)}, not as {path.suffix or 'a bare name'}")


def write(path: Path, graph: nx.DiGraph[int], *, title: str, depth: int | None = None) -> None:
    """Write a graph in the format that the file's name ends in."""
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(WRITERS[path.suffix](graph, title, depth), encoding="utf-8")

"""The graph of a model's operations as a picture, a page to explore, or data, through networkx."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dynlrp.catalogue import class_of
from dynlrp.coverage import capture, copies, covers
from dynlrp.drawing import COLOURS, svg
from dynlrp.errors import InputError
from dynlrp.graph import LEAF
from dynlrp.pages import render
from dynlrp.roles import NO_ROLE, roles
from dynlrp.rules.operation import REGISTRY
from dynlrp.run import Settled

if TYPE_CHECKING:
    import networkx as nx

    from dynlrp.zoo.entry import Entry

SHOWN = 250
"""Nodes in a picture where the caller names no depth, if modules can be folded so far."""


def graph_of(entry: Entry, composite: str = "auto") -> nx.DiGraph[int]:
    """The operations of a model of the zoo; see :func:`to_networkx`."""
    example = entry.build()
    captured = capture(example.model, example.inputs, composite=composite, allow_training=example.random)
    return to_networkx(captured.settled)


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

    Its nodes have ``label``, ``detail``, ``role`` (whether it has one), ``class``, ``reached`` and, of modules,
    ``parts``: the number of operations by class.
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
            role=not module and bool(data["roles"]),
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


def to_svg(graph: nx.DiGraph[int], title: str, depth: int | None = None) -> str:
    """A picture without script."""
    return svg(folded(graph, depth_for(graph) if depth is None else depth), title)


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

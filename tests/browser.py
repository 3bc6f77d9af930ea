"""Pages in headless Chromium, where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def browse(folder: Path, page: str, script: str) -> str:
    """What a script that runs at the end of a page returns."""
    file = folder / "page.html"
    file.write_text(
        page.replace("</body>", f"<script>document.title = (() => {{{script}}})();</script></body>"), "utf-8"
    )
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom",
        "--window-size=1200,800", f"--user-data-dir={folder / 'profile'}", file.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert found is not None
    return unescape(found[1])

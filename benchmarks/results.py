"""One Markdown file of results, a section for each benchmark."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = "# Results\n\nWritten by the scripts in this folder; each section names its command.\n"


def write_section(path: Path, title: str, text: str) -> None:
    """Replace, or add, the section ``title`` of the file."""
    before = path.read_text("utf-8") if path.exists() else HEAD
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(before):
        after = pattern.sub(lambda _: section + "\n", before)
    else:
        after = f"{before.rstrip()}\n\n{section}"
    path.write_text(after.rstrip() + "\n", encoding="utf-8")

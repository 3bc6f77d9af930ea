"""One Markdown file of results, a section for each benchmark, with its tables, charts and setting."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
CHARTS = FOLDER / "charts"
HEAD = """# Results

Written by the scripts in this folder; each section names its command. What they do not write is the first section, a
reading of the others.
"""


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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def machine() -> str:
    """The processor in words, with the cores and memory of this machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text("utf-8"), re.MULTILINE)
        name = re.sub(r"\((?:R|TM)\)", "", found[1]).strip() if found else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def place(packages: Iterable[str] = ()) -> str:
    """When, with what and on what something is measured."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", *packages)]
    threads = torch.get_num_threads()
    return (
        f"{datetime.date.today().isoformat()}; {machine()}, {threads} thread{'s' if threads > 1 else ''}; "
        f"{', '.join(versions)}, Python {platform.python_version()}"
    )


def setting(command: str, packages: Iterable[str] = ()) -> str:
    """The same, and by which command."""
    return f"{place(packages)}. Command: `{command}`."

"""Lists the operations of a family where a page says ``<!-- operations: family, family -->``."""

from __future__ import annotations

import re
from typing import Any

from dynlrp.rules import REGISTRY


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table in place of the comment."""
    return re.sub(r"<!-- operations: (.*?) -->", _table, markdown)


def _table(found: re.Match[str]) -> str:
    lines = ["| operation | family | rule of its own |", "|---|---|---|"]
    for family in found[1].split(", "):
        members = sorted(name for name, operation in REGISTRY.items() if operation.family == family)
        if not members:
            raise ValueError(f"no operation belongs to the family {family!r}")
        lines += [f"| `{name}` | {family} | `{REGISTRY[name].rule!r}` |" for name in members]
    return "\n".join(lines)

"""HTML pages that are one file: every text of theirs is escaped, or data that the page's own script sets as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynlrp.errors import InputError


def render(template: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Fill a template of this package, in which ``filters`` write numbers."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise InputError(f"pages need {error.name}: pip install dynlrp[cli]") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(values)

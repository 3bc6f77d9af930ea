"""HTML pages that are one file: data for the page's own script, with every text escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlrp.errors import InputError


def render(template: str, *, title: str, data: Any) -> str:
    """Fill a template of this package. ``data`` is plain data; the script sets it as text, never as HTML."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise InputError(f"pages need {error.name}: pip install dynlrp[cli]") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(title=title, data=data)

"""Shows the cross-references of docstrings, such as ``:class:`~a.b.C` ``, as the plain name."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(?:~[\w.]*\.)?([\w.]+)`")


class Roles(Extension):
    """Works on every docstring as it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Replace the cross-references in one docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"``\1``", obj.docstring.value)

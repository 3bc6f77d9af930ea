"""Names by glob: which of a model's modules, parameters or layers are meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from dynlrp.errors import InputError


def matching(pattern: str, names: Iterable[str], kind: str, why: str = "") -> list[str]:
    """The names that a glob fits, in order; an error where there are none.

    Args:
        kind: what they are names of.
        why: the reason why this one is not among them, where that is known.
    """
    names = list(dict.fromkeys(names))
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(
            f"no {kind} is called {pattern!r}{why and ': ' + why}; {_named(pattern, list(filter(None, names)))}"
        )
    return found


def _named(pattern: str, names: list[str]) -> str:
    """The names that come closest, or the first."""
    close = get_close_matches(pattern, names)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "there is none"

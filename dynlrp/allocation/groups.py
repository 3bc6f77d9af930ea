"""Layers or activations that must share bits, by names and globs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate

from dynlrp.allocation.quantizer import WIDTHS
from dynlrp.errors import InputError
from dynlrp.names import matching

Groups = Iterable[Sequence[str]]
"""Each entry lists names of those that share bits. Where names are globs, those whose stars stand for the same text
share: ``("*.query", "*.key", "*.value")`` makes a group in every block."""
Aliases = Mapping[str, Iterable[str]]
"""What gets bits, by name, with all names that it may be called by."""


def make_groups(named: Aliases, groups: Groups, kind: str = "layer") -> list[list[str]]:
    """All by group, in order; what no entry names is a group of its own."""
    leader = {name: name for name in named}

    def lead(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for entry in groups:
        if isinstance(entry, str):
            raise InputError(f"a group is a list of names, not the text {entry!r}")
        first: dict[tuple[str, ...], str] = {}
        for pattern in entry:
            for name, alias in _fitting(named, pattern, kind).items():
                leader[lead(name)] = lead(first.setdefault(_stars(pattern, alias), name))
    made: dict[str, list[str]] = {}
    for name in named:
        made.setdefault(lead(name), []).append(name)
    return list(made.values())


def _fitting(named: Aliases, pattern: str, kind: str) -> dict[str, str]:
    """Those that a glob fits, each with the first of its names that does."""
    owner = {alias: name for name, aliases in named.items() for alias in aliases}
    found = matching(pattern, owner, kind)
    return {owner[alias]: alias for alias in reversed(found)}


def _stars(pattern: str, name: str) -> tuple[str, ...]:
    """What the stars of a glob stand for in a name that it fits."""
    parts = re.split(r"(\*|\[.*?\])", pattern)
    glob = "".join("(.*)" if part == "*" else translate(part)[:-2] for part in parts)
    found = re.fullmatch(glob, name)
    assert found is not None
    return found.groups()


def make_pins(named: Aliases, pinned: Mapping[str, int | None], kind: str = "layer") -> dict[str, int | None]:
    """The bits of what is pinned, by name: None for what stays as it is. The last entry that fits counts."""
    pins: dict[str, int | None] = {}
    for pattern, bits in pinned.items():
        if bits is not None and bits not in WIDTHS:
            raise InputError(f"{pattern!r} is pinned to {bits} bits; it can have {WIDTHS[0]} to {WIDTHS[-1]}, or None")
        pins.update(dict.fromkeys(_fitting(named, pattern, kind), bits))
    return pins


def pin_groups(groups: Iterable[Sequence[str]], pins: Mapping[str, int | None]) -> list[tuple[list[str], int | None]]:
    """The groups that get bits, each with its pin (None for a free one); what is pinned to stay as it is drops out."""
    pinned: list[tuple[list[str], int | None]] = []
    for group in groups:
        wanted = {pins[name] for name in group if name in pins}
        if len(wanted) > 1 or (None in wanted and not all(name in pins for name in group)):
            raise InputError(
                f"{', '.join(group)} must share bits, but are pinned to {[pins.get(n, '-') for n in group]}"
            )
        if wanted != {None}:
            pinned.append((list(group), next(iter(wanted), None)))
    return pinned

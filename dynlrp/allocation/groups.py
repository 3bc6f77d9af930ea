"""Layers that must share bits, by names and globs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from dynlrp.allocation.layers import Layer
from dynlrp.allocation.quantizer import WIDTHS
from dynlrp.errors import InputError

Groups = Iterable[Sequence[str]]
"""Each entry lists names of layers that share bits. Where names are globs, layers whose stars stand for the same text
share: ``("*.query", "*.key", "*.value")`` makes a group in every block."""


def make_groups(layers: Mapping[str, Layer], groups: Groups) -> list[list[str]]:
    """All layers by group, in order; a layer that no entry names is a group of its own."""
    leader = {name: name for name in layers}

    def lead(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for entry in groups:
        if isinstance(entry, str):
            raise InputError(f"a group is a list of names, not the text {entry!r}")
        first: dict[tuple[str, ...], str] = {}
        for pattern in entry:
            found = list(_matches(layers, pattern))
            if not found:
                raise InputError(f"groups= names {pattern!r}; the layers are {list(layers)[:8]} ...")
            for name, stars in found:
                leader[lead(name)] = lead(first.setdefault(stars, name))
    made: dict[str, list[str]] = {}
    for name in layers:
        made.setdefault(lead(name), []).append(name)
    return list(made.values())


def _matches(layers: Mapping[str, Layer], pattern: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Layers that a glob fits, with what its stars stand for."""
    glob = re.compile("".join("(.*)" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern)))
    for name, layer in layers.items():
        for alias in layer.modules:
            found = glob.fullmatch(alias)
            if found is not None:
                yield name, found.groups()
                break


def make_pins(layers: Mapping[str, Layer], pinned: Mapping[str, int | None]) -> dict[str, int | None]:
    """The bits of pinned layers, by name: None for those that stay as they are. The last entry that fits counts."""
    pins: dict[str, int | None] = {}
    for pattern, bits in pinned.items():
        if bits is not None and bits not in WIDTHS:
            raise InputError(f"{pattern!r} is pinned to {bits} bits; it can have {WIDTHS[0]} to {WIDTHS[-1]}, or None")
        found = [name for name, layer in layers.items() if any(fnmatchcase(alias, pattern) for alias in layer.modules)]
        if not found:
            raise InputError(f"pinned= names {pattern!r}; the layers are {list(layers)[:8]} ...")
        pins.update(dict.fromkeys(found, bits))
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

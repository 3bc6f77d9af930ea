"""Every node type that autograd can record or that stands for several, and what becomes of relevance there.

``catalogue.csv`` joins what PyTorch says of an operation (its schema, its operands, what it saves) with the registry
of rules. ``python -m dynlrp.catalogue --write`` makes it anew, from the derivative table inside PyTorch's wheel.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dynlrp.graph import LEAF
from dynlrp.rules import REGISTRY

TABLE = Path(__file__).with_name("catalogue.csv")

CLASSES: dict[str, tuple[str, ...]] = {
    "linear": ("addition", "convolution", "dense", "linear map", "pooling", "scaling"),
    "piecewise linear": ("piecewise linear", "rounding"),
    "elementwise": ("binary", "elementwise"),
    "product": ("multilinear", "product", "quotient"),
    "reduction": ("reduction", "statistic"),
    "normalisation": ("normalization",),
    "attention": ("attention", "log softmax", "softmax"),
    "recurrent": ("recurrent",),
    "routing": ("choice", "embedding", "indexing", "movement"),
    "composite": ("composite", "submodule"),
    "coefficient": ("coefficient",),
    "blocked": ("blocked",),
    "leaf": (),
    "custom": ("custom",),
    "unclassified": (),
}
"""The families of each class. A family that is none of these was made by a user: ``custom``."""

_CLASS = {family: name for name, families in CLASSES.items() for family in families}


def class_of(family: str) -> str:
    """The class of an operation family; ``custom`` for one that a user made."""
    return _CLASS.get(family, "custom")


class Entry(NamedTuple):
    """One autograd node type."""

    node: str
    """Exact name, as ``grad_fn.name()`` gives it."""
    class_: str
    """A key of :data:`CLASSES`."""
    family: str
    """The operation family that composites go by."""
    rule: str
    """The rule it has where a composite names no other."""
    operands: tuple[str, ...]
    """What ``next_functions`` leads to, in this order; ``[]`` marks a list of tensors."""
    letters: str
    """A letter per operand; see :class:`~dynlrp.rules.operation.Operation`."""
    saved: tuple[str, ...]
    """Attributes that can be read from the node, without ``_saved_``."""
    schema: str
    """The aten operation; empty for nodes that are not in PyTorch's derivative table."""
    reason: str
    """Why it is blocked, always; an error tells where only some nodes of a type are."""


class Facts(NamedTuple):
    """What PyTorch says of a node type."""

    schema: str = ""
    operands: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


def catalogue() -> list[Entry]:
    """All node types by name, with the rules that are registered now."""
    known = _read()
    return [_entry(node, known.get(node, Facts())) for node in sorted({*known, *REGISTRY})]


def operand_names(node: str) -> tuple[str, ...]:
    """Arguments of the aten operation that ``next_functions`` of a node lead to."""
    return _read().get(node, Facts()).operands


@cache
def view_nodes() -> frozenset[str]:
    """Node types of operations that return the memory of their operand."""
    return frozenset(node for node, facts in _read().items() if "(a" in facts.schema)


def table_version() -> str:
    """The release of PyTorch whose node types the table lists."""
    with TABLE.open(encoding="utf-8") as lines:
        return next(lines).split()[2]


def generate() -> str:
    """The text of ``catalogue.csv`` under the PyTorch that is installed (needs PyYAML)."""
    facts = _derivatives()
    facts |= {node: Facts() for node in {LEAF, *REGISTRY} - set(facts)}
    bare = {node.rpartition("::")[2] for node in facts}
    for name in dir(torch._C._functions):
        if not name.startswith("_") and name not in bare:
            facts[name] = Facts()
    release = torch.__version__.partition("+")[0]
    entries = [_entry(node, facts[node]) for node in sorted(facts)]
    return f"# PyTorch {release} (written by python -m dynlrp.catalogue --write)\n{to_csv(entries)}"


def to_dict(entry: Entry) -> dict[str, Any]:
    """An entry with ``class`` under its own name."""
    return {name.rstrip("_"): value for name, value in entry._asdict().items()}


def to_csv(entries: Iterable[Entry]) -> str:
    """Entries as CSV with a header line, lists separated by blanks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(name.rstrip("_") for name in Entry._fields)
    for entry in entries:
        writer.writerow(" ".join(value) if isinstance(value, tuple) else value for value in entry)
    return text.getvalue()


def _entry(node: str, facts: Facts) -> Entry:
    operation = REGISTRY.get(node)
    if operation is None:
        class_ = "leaf" if node == LEAF else "unclassified"
        return Entry(node, class_, "", "", facts.operands, "", facts.saved, facts.schema, "")
    letters = "".join(map(operation.letter, range(len(facts.operands)))) or operation.operands or "+"
    reason = operation.blocked if isinstance(operation.blocked, str) else ""  # some depend on what a node saved
    return Entry(
        node,
        class_of(operation.family),
        operation.family,
        "" if reason else type(operation.rule).__name__,
        facts.operands,
        "" if reason else letters,
        facts.saved,
        facts.schema,
        reason,
    )


@cache
def _read() -> dict[str, Facts]:
    with TABLE.open(encoding="utf-8", newline="") as lines:
        next(lines)
        return {
            row["node"]: Facts(row["schema"], tuple(row["operands"].split()), tuple(row["saved"].split()))
            for row in csv.DictReader(lines)
        }


def _derivatives() -> dict[str, Facts]:
    """What PyTorch's table of derivatives says, by node name."""
    import torchgen
    from torchgen.api.autograd import match_differentiability_info
    from torchgen.gen import parse_native_yaml
    from torchgen.packaged.autograd.load_derivatives import load_derivatives

    packaged = Path(torchgen.__file__).with_name("packaged")
    native = packaged / "ATen" / "native"
    functions, tags = str(native / "native_functions.yaml"), str(native / "tags.yaml")
    infos, _ = load_derivatives(str(packaged / "autograd" / "derivatives.yaml"), functions, tags)
    matched = match_differentiability_info(parse_native_yaml(functions, tags).native_functions, infos)
    facts = {}
    for by_key in [*(function.info or {} for function in matched), *infos.values()]:
        for info in by_key.values():
            if info.op and info.op not in facts:
                arguments = [binding.argument for binding in info.args_with_derivatives]
                operands = (a.name + "[]" * (a.type.is_list_like() is not None) for a in arguments)
                facts[info.op] = Facts(str(info.func.func), tuple(operands), _saved(info.op))
    return facts


def _saved(node: str) -> tuple[str, ...]:
    """A node's class has an attribute for each; nodes without a class of their own show nothing."""
    cls = getattr(torch._C._functions, node, None)
    return tuple(name.removeprefix("_saved_") for name in dir(cls) if name.startswith("_saved_"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m dynlrp.catalogue", description="Make the table of operations.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE} instead of printing it")
    if parser.parse_args(arguments).write:
        TABLE.write_text(generate(), encoding="utf-8", newline="\n")
    else:
        print(generate(), end="")


if __name__ == "__main__":
    main()

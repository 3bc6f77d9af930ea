"""The command line: ``dynlrp`` or ``python -m dynlrp``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynlrp._version import __version__
from dynlrp.catalogue import CLASSES, Entry, catalogue, table_version, to_csv, to_dict

app = typer.Typer(
    help="Layer-wise Relevance Propagation for any PyTorch model.", no_args_is_help=True, add_completion=False
)


def _show(*tables: Table) -> None:
    """Print tables as wide as the terminal; into a file or a pipe nothing is cut or wrapped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    for number, table in enumerate(tables):
        with console.capture() as text:
            console.print(table)
        typer.echo("\n" * bool(number) + "\n".join(line.rstrip() for line in text.get().splitlines()))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynlrp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """A command is needed even where there is only one."""


@app.command()
def ops(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Globs of node names, as in 'upsample*'.")
    ] = None,
    class_: Annotated[str | None, typer.Option("--class", help=f"One of: {', '.join(CLASSES)}.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Only operations without a rule.")] = False,
    long: Annotated[bool, typer.Option("--long", "-l", help="Also what a node saves, and the aten schema.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Everything, as CSV.")] = False,
) -> None:
    """List the operations that autograd records, and what becomes of relevance in each."""
    if class_ is not None and class_ not in CLASSES:
        raise typer.BadParameter(f"{class_!r} is none of: {', '.join(CLASSES)}", param_hint="--class")
    if as_json and as_csv:
        raise typer.BadParameter("not both --json and --csv")
    entries = [
        entry
        for entry in catalogue()
        if (class_ is None or entry.class_ == class_)
        and (not missing or entry.class_ == "unclassified")
        and (not names or any(fnmatchcase(entry.node.lower(), name.lower()) for name in names))
    ]
    if as_json:
        typer.echo(json.dumps([to_dict(entry) for entry in entries], indent=1))
    elif as_csv:
        typer.echo(to_csv(entries), nl=False)
    else:
        _print(entries, long)


def _print(entries: Sequence[Entry], long: bool) -> None:
    table = Table(box=None, pad_edge=False)
    more = ["saved", "schema"] if long else []
    for heading in ["operation", "class", "family", "operands", "rule or reason", *more]:
        table.add_column(heading, overflow="fold")
    for entry in entries:
        cells = [entry.node, entry.class_, entry.family, _operands(entry), entry.reason or entry.rule]
        if long:
            cells += [" ".join(entry.saved), entry.schema]
        table.add_row(*map(escape, cells))
    counts = Counter(entry.class_ for entry in entries)
    totals = Table(box=None, pad_edge=False, show_header=False)
    totals.add_column()
    totals.add_column(justify="right")
    for name in CLASSES:
        if counts[name]:
            totals.add_row(name, str(counts[name]))
    totals.add_row(f"all, in PyTorch {table_version()}", str(len(entries)))
    _show(table, totals)


def _operands(entry: Entry) -> str:
    """The operands with their letters, as in ``self+ mat1* mat2*``."""
    return " ".join(name + letter for name, letter in zip_longest(entry.operands, entry.letters, fillvalue=""))

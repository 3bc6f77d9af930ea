"""The command line: ``dynlrp`` or ``python -m dynlrp``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dynlrp._version import __version__
from dynlrp.allocation.commands import allocate, allocate_activations
from dynlrp.catalogue import CLASSES, Entry, catalogue, table_version, to_csv, to_dict
from dynlrp.terminal import CompositeName, errors, show

if TYPE_CHECKING:
    from dynlrp.coverage import Coverage
    from dynlrp.survey import Task

app = typer.Typer(
    help="Layer-wise Relevance Propagation for any PyTorch model.", no_args_is_help=True, add_completion=False
)


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
    show(table, totals)


def _operands(entry: Entry) -> str:
    """The operands with their letters, as in ``self+ mat1* mat2*``."""
    return " ".join(name + letter for name, letter in zip_longest(entry.operands, entry.letters, fillvalue=""))


Shape = Annotated[
    str,
    typer.Option(
        help="Of the input of a model of yours, a folder's or timm's: 1,3,224,224 for an image, 1,512 for ids."
    ),
]


@app.command()
def coverage(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A name or a glob that `dynlrp zoo` knows, a folder with a transformers config.json, "
            "package.module:attribute, or a timm model.",
            show_default=False,
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Explain a small model too, and take the time.")] = False,
    composite: CompositeName = "auto",
    shape: Shape = "",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one model.")] = 300.0,
    memory: Annotated[float, typer.Option(min=0, help="GiB for one process; 0 is no limit.")] = 0.0,
    keep: Annotated[
        Path | None, typer.Option(help="A file that keeps reports, so that a run can be taken up again.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option("-o", "--out", help="Write .html, .json, .csv or .md; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A line for each model, as CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table, as Markdown.")] = False,
) -> None:
    """Report which operations of a model have a rule, and whether its explanation can be relied on.

    Leaves with 1 where an operation is not covered, a model failed or the run was stopped.
    """
    from dynlrp import report, survey

    if as_json + as_csv + as_markdown > 1:
        raise typer.BadParameter("only one of --json, --csv and --markdown")
    with errors():
        for path in out or ():
            report.check_ending(path)
        wanted = survey.tasks(models, shape=_sizes(shape), composite=composite, verify=verify)
        made = _survey(wanted, jobs, timeout, memory, keep)
        for path in out or ():
            report.write(path, made, survey.versions())
    if as_json or as_csv or as_markdown:
        ending = ".json" if as_json else ".csv" if as_csv else ".md"
        typer.echo(report.WRITERS[ending](made, survey.versions()), nl=not as_csv)
    else:
        _print_reports(made)
    for path in out or ():
        typer.echo(f"written: {path}", err=True)
    if len(made) < len(wanted) or any(one.status not in ("covered", "verified") for one in made):
        raise typer.Exit(1)


def _survey(wanted: Sequence[Task], jobs: int, timeout: float, memory: float, keep: Path | None) -> list[Coverage]:
    """All reports, with a bar; those that are there when the user breaks off."""
    from dynlrp import survey

    made: list[Coverage] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(wanted))
        try:
            for one in survey.survey(wanted, processes=jobs, timeout=timeout, memory=memory, kept=keep):
                made.append(one)
                progress.update(bar, advance=1, description=escape(one.model))
        except KeyboardInterrupt:
            progress.console.print(f"stopped after {len(made)} of {len(wanted)} models")
    return survey.order(made, wanted)


def _print_reports(made: Sequence[Coverage]) -> None:
    from dynlrp import report

    table = Table(box=None, pad_edge=False)
    columns = {name: cell for name, cell in report.columns_for(made).items() if any(map(cell, made))}
    for name in columns:
        table.add_column(name, justify="left" if name in report.TEXT else "right", overflow="fold")
    for one in made:
        table.add_row(*(escape(cell(one)) for cell in columns.values()))
    lists = []
    for names, rows in ((report.PROBLEM, report.problems(made)), (report.TOWERS, report.towers(made))):
        if rows:
            lists.append(Table(*names, box=None, pad_edge=False))
            for row in rows:
                lists[-1].add_row(*map(escape, row))
    total = Table(box=None, pad_edge=False, show_header=False)
    total.add_row(f"{report.summary(made)}.")
    if report.is_paper(made):
        total.add_row(report.PAPER)
    show(table, *lists, total)


@app.command()
def zoo(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="A part of a name or class, or a glob as in 'paper/*'.")
    ] = None,
) -> None:
    """List the models that coverage and graph know by name.

    Leaves with 1 where there is none.
    """
    from dynlrp import report
    from dynlrp.zoo import entries, near, search, without_timm

    with errors():
        found = entries() if not names else {entry.name: entry for name in names for entry in search(name)}
        if not found:
            like = ", ".join(dict.fromkeys(other for name in names or () for other in near(name)))
            typer.echo(
                f"no model is like {', '.join(names or ())}" + (f"; did you mean {like}?" if like else ""), err=True
            )
            raise typer.Exit(1)
        table = Table(box=None, pad_edge=False)
        for heading in ("name", "model", "class", "modality"):
            table.add_column(heading, overflow="fold")
        table.add_column("parameters", justify="right")
        for entry in found.values():
            size = f"{entry.published:,}" if entry.published else ""
            table.add_row(*map(escape, (entry.name, entry.title, entry.kind, entry.modality(), size)))
    total = Table(box=None, pad_edge=False, show_header=False)
    total.add_row(report.counted(len(found), "model"))
    if not names and without_timm():
        total.add_row(f"none of timm, which {escape(without_timm())}")
    show(table, total)


@app.command()
def graph(
    model: Annotated[str, typer.Argument(help="A model, as for coverage.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="A .svg, .html, .graphml or .json file.")],
    depth: Annotated[
        int | None, typer.Option(min=0, help="Modules nested deeper are one node each; by default what can be seen.")
    ] = None,
    composite: CompositeName = "auto",
    shape: Shape = "",
) -> None:
    """Draw the operations that relevance passes, by family of rule and by role."""
    from dynlrp import export
    from dynlrp.zoo import find

    with errors():
        export.check_ending(out)
        (entry, *others) = find(model, _sizes(shape))
    if others:
        raise typer.BadParameter(f"{model!r} means {1 + len(others)} models")
    with errors(model):
        drawn = export.graph_of(entry, composite)
        export.write(out, drawn, title=entry.title or entry.name, depth=depth)
    typer.echo(f"written: {out} ({len(drawn)} nodes, {drawn.number_of_edges()} edges)", err=True)


app.command()(allocate)
app.command()(allocate_activations)


def _sizes(shape: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(size) for size in shape.split(",")) if shape else None
    except ValueError:
        raise typer.BadParameter(f"{shape!r} is no shape such as 1,3,224,224", param_hint="--shape") from None

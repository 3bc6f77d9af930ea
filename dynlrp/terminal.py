"""What commands have in common: tables on the terminal, errors as text, lists of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from dynlrp.errors import DynLRPError, described

CompositeName = Annotated[str, typer.Option(help="Which rules: the name of a composite.")]


def show(*tables: Table) -> None:
    """Print tables as wide as the terminal; into a file or a pipe nothing is cut or wrapped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    for number, table in enumerate(tables):
        with console.capture() as text:
            console.print(table)
        typer.echo("\n" * bool(number) + "\n".join(line.rstrip() for line in text.get().splitlines()))


Number = TypeVar("Number", int, float)


def numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    """Of an option such as ``1,2,3``."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1,2,3", param_hint=option) from None


@contextmanager
def errors(model: str = "") -> Iterator[None]:
    """The project's errors as text; inside a model, all of them."""
    try:
        yield
    except DynLRPError as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(2) from error
    except Exception as error:
        if not model:
            raise
        typer.echo(f"{model}: {described(error)}", err=True)
        raise typer.Exit(1) from error

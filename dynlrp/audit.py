"""The audit: for every operation and module, what came in, what went out, and to which account the rest went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dynlrp.errors import InputError
from dynlrp.ledger import ACCOUNTS

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from dynlrp.plot import Table

By = Literal["module", "operation", "row"]
LINES = 30
"""A table of modules, or a chart, goes as deep as it can with so many of them."""


class Flow(NamedTuple):
    """Relevance on its way to another row."""

    row: int | None
    """Number of that row; None for an operand of the operation that this one is inside of."""
    amount: float | None


@dataclass(frozen=True, kw_only=True)
class Balance:
    """``incoming = outgoing + accounts + residual``, in units of the output, summed over the batch. None is unknown:
    neither kept nor recomputable."""

    incoming: float | None
    outgoing: float | None
    accounts: Mapping[str, float]

    @property
    def residual(self) -> float | None:
        """What is left of the relevance that came in; 0 but for rounding where all is right."""
        if self.incoming is None or self.outgoing is None:
            return None
        return self.incoming - self.outgoing - sum(self.accounts.values())

    def amounts(self) -> dict[str, float | None]:
        """All figures by name, with every account."""
        booked = {account: self.accounts.get(account, 0.0) for account in ACCOUNTS}
        return {"incoming": self.incoming, "outgoing": self.outgoing, **booked, "residual": self.residual}


@dataclass(frozen=True, kw_only=True)
class Row(Balance):
    """One operation of one run of the model."""

    operation: str
    """The node's name; of a linear operation that absorbed a batch norm, both names."""
    module: str
    """Path of the module it ran in."""
    occurrence: int
    """Its number among the operations of this name in this module, in the order in which they ran, from 0."""
    rule: str
    received: float | None
    """What all consumers together sent to it: what came in, but for rounding."""
    flows: tuple[Flow, ...]
    """What went out, by the operation that got it."""
    unresolved: str
    """Why an amount is unknown."""
    inside: tuple[Row, ...]
    """The operations that this one was re-run as; their accounts are part of this row's."""

    @property
    def gap(self) -> float | None:
        """What consumers sent minus what came in; 0 but for rounding."""
        return None if self.received is None or self.incoming is None else self.received - self.incoming

    @property
    def place(self) -> str:
        """Operation, number and module in words."""
        number = f" #{self.occurrence}" if self.occurrence else ""
        return f"{self.operation}{number} in {self.module or 'the model'}"

    @property
    def error(self) -> float:
        """The larger of residual and gap, where they are known; infinite where they are no numbers."""
        known = [abs(amount) for amount in (self.residual, self.gap) if amount is not None]
        return math.inf if any(map(math.isnan, known)) else max(known, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Total(Balance):
    """Several operations together. What unresolved ones booked is unknown, and so part of the residual."""

    count: int
    unresolved: int
    """Operations with an unknown amount."""


class Audit:
    """Every local balance of an explanation.

    ``print(audit)`` shows modules as deep as fits on a page; :meth:`table` shows more.
    """

    def __init__(self, rows: Sequence[Row], root: int, output: float, tolerance: float) -> None:
        self.rows = tuple(rows)
        """One per operation, in the order in which they ran."""
        self.output = output
        """The explained output, summed over the batch."""
        self.tolerance = tolerance
        """1e-10 in float64, 1e-4 in float32, some roundings in 16 bits; relative to the largest amount."""
        self._root = root
        """Number of the row that made the output."""

    # Does it close

    def everything(self) -> list[Row]:
        """All rows, each behind those inside it."""
        return _with_inside(self.rows)

    @cached_property
    def largest(self) -> float:
        """The largest amount that came in, went out or was booked anywhere."""
        amounts = [a for row in self.everything() for a in (row.incoming, row.outgoing, *row.accounts.values())]
        return max((abs(a) for a in amounts if a is not None), default=0.0)

    @cached_property
    def error(self) -> float:
        """The largest residual or gap of an operation, relative to the largest amount."""
        worst = max((row.error for row in self.everything()), default=0.0)
        return worst / self.largest if self.largest else worst

    @property
    def closes(self) -> bool:
        """Whether every local balance is known and closes."""
        return self.error <= self.tolerance and not self.unresolved

    @property
    def unresolved(self) -> list[Row]:
        """Operations with an unknown amount."""
        return [row for row in self.everything() if row.unresolved]

    def problem(self, row: Row) -> tuple[float, str] | None:
        """What is wrong with the balance of a row or of those inside it: its error relative to the largest amount, and
        why it is unknown (else empty). None where it closes."""
        rows = _with_inside([row])
        error = max(row.error for row in rows) / (self.largest or 1.0)
        unknown = next((row.unresolved for row in rows if row.unresolved), "")
        return None if error <= self.tolerance and not unknown else (error, unknown)

    def worst(self, n: int = 10) -> list[Row]:
        """The operations that close worst, those inside others among them."""
        return sorted(self.everything(), key=lambda row: -row.error)[:n]

    # Summing up

    def by_operation(self, module: str = "") -> dict[str, Total]:
        """Balances of all operations of one name, in ``module`` and below it: sums of their rows."""
        self._check("operation", module)
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if _below(row.module, module):
                groups.setdefault(row.operation, []).append(row)
        return {
            name: _total(rows, [row.incoming for row in rows], [row.outgoing for row in rows])
            for name, rows in groups.items()
        }

    def by_module(self) -> dict[str, Total]:
        """Balances of modules, each with all that is below it; ``""`` is the whole model.

        What came in, and what went out, crossed the module's border. What a module that runs several times hands from
        one run to the next stays inside.
        """
        return dict(self._modules)

    def by_level(self, depth: int) -> dict[str, Total]:
        """The same without overlap: an operation counts for the first ``depth`` names of its module's path alone."""
        return self._grouped(lambda path: [_cut(path, depth)])

    @cached_property
    def _modules(self) -> dict[str, Total]:
        return self._grouped(_parents)

    def _grouped(self, groups: Callable[[str], Sequence[str]]) -> dict[str, Total]:
        members = [groups(row.module) for row in self.rows]
        names = list(dict.fromkeys(name for own in members for name in own))
        rows: dict[str, list[Row]] = {name: [] for name in names}
        incoming: dict[str, list[float | None]] = {name: [] for name in names}
        outgoing: dict[str, list[float | None]] = {name: [] for name in names}
        for name in members[self._root]:
            incoming[name].append(self.output)
        for row, here in zip(self.rows, members, strict=True):
            for name in here:
                rows[name].append(row)
            for target, amount in row.flows:
                there = [] if target is None else members[target]
                for name in set(here).difference(there):
                    outgoing[name].append(amount)
                for name in set(there).difference(here):
                    incoming[name].append(amount)
        first: dict[str, int] = {}
        for place, name in enumerate(names):
            for parent in _parents(name):
                first.setdefault(parent, place)
        names.sort(key=lambda name: [first[parent] for parent in _parents(name)])
        return {name: _total(rows[name], incoming[name], outgoing[name]) for name in names}

    # Showing

    def table(self, by: By = "module", module: str = "", depth: int | None = None) -> str:
        """Plain text.

        Args:
            by: a line per ``"module"``, as a tree; per name of an ``"operation"``; or per operation, a ``"row"``.
            module: this module and what is below it alone.
            depth: modules down to so many names below ``module``; by default as deep as fits on a page.
        """
        self._check(by, module)
        columns, lines = self._lines(by, module, depth)
        wide = max(len(label) for label, _ in [(by, []), *lines])
        text = [by.ljust(wide) + "".join(name.rjust(12) for name in columns)]
        text += [label.ljust(wide) + "".join(figure.rjust(12) for figure in figures) for label, figures in lines]
        return "\n".join([*text, *self.verdict()])

    def verdict(self) -> list[str]:
        """Lines of text: whether everything closes, else what does not."""
        if self.error <= self.tolerance:
            state = f"every local balance closes to {self.error:.1e} of the largest amount"
            text = [state if not self.unresolved else f"every balance that is known closes to {self.error:.1e}"]
        else:
            text = [f"local balances do NOT close: off by {self.error:.1e} of the largest amount, most of all"]
            text += [f"  {row.error:.4g} at {row.place} ({row.rule})" for row in self.worst(3)]
        unknown = self.unresolved
        text += [f"unresolved: {row.place}: {row.unresolved}" for row in unknown[:5]]
        return text + ([f"unresolved: {len(unknown) - 5} more"] if len(unknown) > 5 else [])

    def __repr__(self) -> str:
        return self.table()

    def records(self, by: By = "row", module: str = "") -> list[dict[str, Any]]:
        """Names and numbers, one flat dictionary a line; rows inside another one say so in ``within``."""
        self._check(by, module)
        if by != "row":
            found = self.by_operation(module) if by == "operation" else self._modules
            return [
                {by: name, "count": total.count, **total.amounts(), "unresolved": total.unresolved}
                for name, total in found.items()
                if by == "operation" or _below(name, module)
            ]
        return [
            {
                "operation": row.operation,
                "module": row.module,
                "occurrence": row.occurrence,
                "rule": row.rule,
                **row.amounts(),
                "gap": row.gap,
                "unresolved": row.unresolved,
                "within": "" if outer is None else outer.operation,
            }
            for row, outer, _ in self._nested(module)
        ]

    def to_frame(self, by: By = "row", module: str = "") -> pandas.DataFrame:
        """:meth:`records` as a DataFrame (needs ``dynlrp[frame]``)."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ImportError(
                "a DataFrame needs pandas: pip install dynlrp[frame]. records() gives the same without it"
            ) from error
        return pandas.DataFrame(self.records(by, module))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python numbers and texts, ready for JSON."""
        return {
            "output": self.output,
            "closes": self.closes,
            "error": self.error,
            "tolerance": self.tolerance,
            "modules": self.records("module"),
            "operations": self.records("operation"),
            "rows": self.records("row"),
        }

    def plot(self, depth: int | None = None, *, title: str | None = None) -> Figure:
        """A bar chart by module: what came in, and how much of it went to which account (needs ``dynlrp[plot]``).

        Bars do not overlap, see :meth:`by_level`; ``depth`` is by default as deep as fits.
        """
        from dynlrp import plot

        found = self.by_level(self._depth(self.by_level) if depth is None else depth)
        accounts = [account for account in ACCOUNTS if any(total.accounts.get(account) for total in found.values())]
        return plot.balances(
            [name or "(model)" for name in found],
            [total.incoming for total in found.values()],
            {account: [total.accounts.get(account, 0.0) for total in found.values()] for account in accounts},
            title=title,
        )

    def tables(self) -> list[Table]:
        """For a page: modules; folded, operations by name and every operation."""
        from dynlrp.plot import Table

        return [
            Table("Audit by module", *self._lines("module", "", None), notes=self.verdict()),
            Table("Audit by operation", *self._lines("operation", "", None), folded=True),
            Table("Audit of every operation", *self._lines("row", "", None), folded=True),
        ]

    def _check(self, by: str, module: str) -> None:
        if by not in get_args(By):
            raise InputError(f"an audit is by {', '.join(map(repr, get_args(By)))}, not by {by!r}")
        if module and module not in self._modules:
            raise InputError(f"no operation ran in a module {module!r}; there are {list(self._modules)[1:9]} ...")

    def _lines(self, by: By, module: str, depth: int | None) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Names of the columns; and a label and figures for every line."""
        labelled: list[tuple[str, Balance]]
        if by == "operation":
            labelled = list(self.by_operation(module).items())
        elif by == "row":
            labelled = [("  " * level + row.place, row) for row, _, level in self._nested(module)]
        else:
            depth = self._depth(lambda depth: self._tree(module, depth)) if depth is None else depth
            labelled = list(self._tree(module, depth))
        used = {name for _, balance in labelled for name, amount in balance.accounts.items() if amount}
        columns = ["incoming", "outgoing", *(name for name in ACCOUNTS if name in used), "residual"]
        lines = []
        for label, balance in labelled:
            amounts = balance.amounts()
            number = [str(balance.count)] if isinstance(balance, Total) else []
            lines.append((label, number + [_figure(name, amounts[name]) for name in columns]))
        return (["operations"] if by != "row" else []) + columns, lines

    def _tree(self, module: str, depth: int) -> list[tuple[str, Total]]:
        """Modules down to some depth with indented labels, without those that hold all that the one above holds."""
        base = len(module.split(".")) if module else 0
        found: list[tuple[str, Total]] = []
        above: list[tuple[str, Total]] = []
        for name, total in self._modules.items():
            if not _below(name, module) or (name.count(".") + 1 if name else 0) - base > depth:
                continue
            while above and not _below(name, above[-1][0]):
                above.pop()
            if above and above[-1][1].count == total.count:
                continue
            short = name[len(above[-1][0]) :].lstrip(".") if above else name or "(model)"
            found.append(("  " * len(above) + short, total))
            above.append((name, total))
        return found

    def _depth(self, lines: Callable[[int], Sized]) -> int:
        deepest = max((row.module.count(".") + 1 for row in self.rows), default=1)
        return max((depth for depth in range(2, deepest + 1) if len(lines(depth)) <= LINES), default=1)

    def _nested(self, module: str) -> Iterator[tuple[Row, Row | None, int]]:
        """Rows, each before those inside it, with the one they are in and how deep."""
        stack: list[tuple[Row, Row | None, int]] = [(r, None, 0) for r in self.rows[::-1] if _below(r.module, module)]
        while stack:
            row, outer, level = stack.pop()
            yield row, outer, level
            stack += [(inner, row, level + 1) for inner in row.inside[::-1]]


def _total(rows: Sequence[Row], incoming: Sequence[float | None], outgoing: Sequence[float | None]) -> Total:
    accounts: dict[str, float] = {}
    for row in rows:
        for account, amount in row.accounts.items():
            accounts[account] = accounts.get(account, 0.0) + amount
    return Total(
        incoming=total(incoming),
        outgoing=total(outgoing),
        accounts=accounts,
        count=len(rows),
        unresolved=sum(bool(row.unresolved) for row in rows),
    )


def total(amounts: Iterable[float | None]) -> float | None:
    """The sum, unknown where one is."""
    found = 0.0
    for amount in amounts:
        if amount is None:
            return None
        found += amount
    return found


def _parents(path: str) -> list[str]:
    """The model, every module on the way, and the module itself."""
    ends = [place for place, sign in enumerate(path) if sign == "."]
    return ["", *(path[:end] for end in ends), *([path] if path else [])]


def _cut(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth])


def _with_inside(rows: Sequence[Row]) -> list[Row]:
    found: list[Row] = []
    stack = list(rows)
    while stack:
        row = stack.pop()
        found.append(row)
        stack += row.inside
    return found[::-1]


def _below(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")


def _figure(name: str, amount: float | None) -> str:
    return "unknown" if amount is None else f"{amount:.1e}" if name == "residual" else f"{amount:.5g}"

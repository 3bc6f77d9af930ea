"""The ledger: where every unit of the explained output went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from dynlrp.rules.operation import Account

ACCOUNTS: tuple[str, ...] = get_args(Account)


class Ledger:
    """``output = inputs + parameters + constants + offsets + absorbed + held back``.

    ``inputs``: relevance of the explained inputs. ``parameters``: of biases, class tokens, position embeddings.
    ``constants``: of additive constants. ``offsets``: f(0) of elementwise functions and what softmax does not
    conserve. ``absorbed``: what stabilisers took. ``held back``: what roles and rules stop, such as statistics.

    Amounts are sums over the batch, in units of the output.
    """

    def __init__(self) -> None:
        self._amounts: list[Tensor] = []
        self._places: list[tuple[str, int, str]] = []
        self._sums: list[float] | None = None
        self._output: Tensor = torch.zeros(())
        self._path: Callable[[int], str] = lambda sequence: ""
        self.unresolved: list[tuple[str, str]] = []
        """Operations whose constants nobody kept, as (operation, module path)."""
        self.fallbacks: list[tuple[str, str]] = []
        """Operations that were explained by their gradient on the caller's word."""

    def book(self, account: Account, name: str, sequence: int, amount: Tensor) -> None:
        """Enter a 0-d amount of one operation."""
        self._amounts.append(amount)
        self._places.append((account, sequence, name))

    def __len__(self) -> int:
        return len(self._amounts)

    def since(self, number: int) -> Tensor | float:
        """The sum of the entries from ``number`` on."""
        return sum(self._amounts[number:]) if number < len(self._amounts) else 0.0

    @property
    def output(self) -> float:
        """The explained output, summed over the batch."""
        return float(self._output)

    @property
    def accounts(self) -> dict[str, float]:
        """Amount by account."""
        totals = dict.fromkeys(ACCOUNTS, 0.0)
        for (account, _, _), amount in zip(self._places, self._values(), strict=True):
            totals[account] += amount
        return totals

    @property
    def residual(self) -> float:
        """Output minus all accounts: rounding, and what is listed as unresolved."""
        return self.output - sum(self._values())

    @property
    def error(self) -> float:
        """|residual| relative to the largest amount, the output among them."""
        largest = max([abs(self.output), *(abs(a) for a in self.accounts.values())])
        return abs(self.residual) / largest if largest else abs(self.residual)

    @property
    def closes(self) -> bool:
        """Whether everything is accounted for, to 1e-4 (1e-10 for float64 models)."""
        return self.error <= (1e-10 if self._output.dtype == torch.float64 else 1e-4)

    def by_operation(self) -> dict[tuple[str, str], float]:
        """Amount by (account, operation name)."""
        return self._group(lambda sequence, name: name)

    def by_module(self) -> dict[tuple[str, str], float]:
        """Amount by (account, module path)."""
        return self._group(lambda sequence, name: self._path(sequence))

    def _group(self, key: Callable[[int, str], str]) -> dict[tuple[str, str], float]:
        totals: dict[tuple[str, str], float] = defaultdict(float)
        for (account, sequence, name), amount in zip(self._places, self._values(), strict=True):
            totals[account, key(sequence, name)] += amount
        return dict(totals)

    def amounts(self) -> Tensor:
        """All entries, in float64."""
        if len({(a.dtype, a.device) for a in self._amounts}) > 1:
            return torch.stack([a.double().to(self._output.device) for a in self._amounts])
        return torch.stack(self._amounts).double() if self._amounts else torch.zeros(0, dtype=torch.float64)

    def _values(self) -> list[float]:
        if self._sums is None or len(self._sums) != len(self._amounts):
            self._sums = self.amounts().tolist()
        return self._sums

    def __repr__(self) -> str:
        lines = [f"{'output':<12}{self.output:>14.6g}"]
        lines += [f"{name:<12}{amount:>14.6g}" for name, amount in self.accounts.items()]
        lines.append(f"{'residual':<12}{self.residual:>14.3g}  ({'closes' if self.closes else 'does NOT close'})")
        lines += [f"constants not kept: {name} in {path or 'the model'}" for name, path in self.unresolved]
        lines += [f"explained by gradient: {name} in {path or 'the model'}" for name, path in self.fallbacks]
        return "\n".join(lines)

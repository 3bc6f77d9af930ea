"""The ledger: where every unit of the explained output went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from typing import get_args

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dynlrp.rules.operation import Account, inner, masked_product

ACCOUNTS: tuple[str, ...] = get_args(Account)

SMALL = 65536
"""Largest leaf that is copied to be multiplied with others."""


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
        self._later: list[tuple[str, int, str, Tensor, Tensor]] = []
        self._kept: list[tuple[list[Tensor], list[torch.Size], Tensor]] = []
        """Multipliers of many leaves, their shapes, and their values in one vector; multiplied when somebody reads."""
        self._products: list[tuple[Tensor, list[int]]] = []
        """Relevance of those leaves in one vector, with the length of each."""
        self._leaves: list[tuple[str, int, str]] = []
        """Places of those leaves."""
        self._weights: list[Tensor] = []
        """Sums of absolute values of what was booked as one amount."""
        self._output: Tensor = torch.zeros(())
        self._coarse = False
        """A model of float64 computes in a coarser dtype on the way."""
        self._path: Callable[[int], str] = lambda sequence: ""
        self.unresolved: list[tuple[str, str]] = []
        """Operations whose constants nobody kept, as (operation, module path)."""
        self.without_share: list[tuple[str, str]] = []
        """Operations that add something that autograd did not record, under a rule that gives it no share."""
        self.fallbacks: list[tuple[str, str]] = []
        """Operations that were explained by their gradient on the caller's word."""

    def book(self, account: Account, name: str, sequence: int, amount: Tensor) -> None:
        """Enter a 0-d amount of one operation."""
        self._amounts.append(amount.detach() if amount.requires_grad else amount)
        self._places.append((account, sequence, name))

    def book_inputs(self, name: str, sequence: int, relevance: Tensor) -> None:
        """Enter the relevance of an input, and how large it is where its parts cancel."""
        self.book("inputs", name, sequence, relevance.sum())
        if relevance.layout is torch.strided and not relevance.is_nested:
            wide = torch.promote_types(relevance.dtype, torch.float32)
            self._weights.append(torch.linalg.vector_norm(relevance.detach(), 1, dtype=wide))

    def book_later(self, account: Account, name: str, sequence: int, multiplier: Tensor, value: Tensor) -> None:
        """Enter the relevance of a leaf, by its multiplier or one that is yet to be summed to the leaf's shape.

        Small plain leaves are multiplied all together, and not before somebody reads the ledger.
        """
        if value.layout is not torch.strided or value.numel() > SMALL:
            self.book(account, name, sequence, inner(multiplier, value.detach()))
        else:
            if multiplier.requires_grad:
                multiplier = multiplier.detach()
            self._later.append((account, sequence, name, multiplier, value))

    def settle(self) -> None:
        """Copy the leaves whose relevance was entered for later, as they may change once the explanation is there."""
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[str, int, str, Tensor, Tensor]]] = defaultdict(list)
        for entry in self._later:
            groups[entry[4].dtype, entry[4].device].append(entry)
        self._later = []
        for entries in groups.values():
            values = [entry[4].detach() for entry in entries]
            copies = torch.cat([x if x.ndim == 1 else x.reshape(-1) for x in values])
            self._kept.append(([_alone(entry[3]) for entry in entries], [x.shape for x in values], copies))
            self._leaves += [entry[:3] for entry in entries]

    def _multiply(self) -> None:
        kept, self._kept = self._kept, []
        for multipliers, shapes, values in kept:
            m = torch.cat([m.sum_to_size(shape).reshape(-1) for m, shape in zip(multipliers, shapes, strict=True)])
            m = m.to(torch.promote_types(m.dtype, torch.float32))
            self._products.append((masked_product(m, values), [shape.numel() for shape in shapes]))

    def note(self, other: Ledger) -> None:
        """Take over which operations another ledger lists."""
        self.unresolved += other.unresolved
        self.without_share += other.without_share
        self.fallbacks += other.fallbacks

    def __len__(self) -> int:
        return len(self._amounts)

    def tensors(self) -> list[Tensor]:
        """All amounts as they are kept, for :meth:`with_tensors`."""
        self._multiply()
        return [*self._amounts, *self._weights, *(products for products, _ in self._products)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Ledger:
        """A ledger with the same entries and other amounts."""
        other, amounts, count = copy(self), len(self._amounts), len(self._amounts) + len(self._weights)
        other._amounts, other._weights, other._sums = list(tensors[:amounts]), list(tensors[amounts:count]), None
        sizes = [sizes for _, sizes in self._products]
        other._products = list(zip(tensors[count:], sizes, strict=True))
        other.unresolved, other.fallbacks = list(self.unresolved), list(self.fallbacks)
        return other

    def since(self, number: int) -> Tensor | float:
        """The sum of the entries from ``number`` on."""
        return sum(self._amounts[number:]) if number < len(self._amounts) else 0.0

    @property
    def output(self) -> float:
        """The explained output, summed over the batch."""
        return self._read()[-2]

    @property
    def accounts(self) -> dict[str, float]:
        """Amount by account."""
        totals = dict.fromkeys(ACCOUNTS, 0.0)
        for (account, _, _), amount in zip(self._places + self._leaves, self._values(), strict=True):
            totals[account] += amount
        return totals

    @property
    def residual(self) -> float:
        """Output minus all accounts: rounding, and what is listed as unresolved."""
        return self.output - sum(self._values())

    @property
    def error(self) -> float:
        """|residual| relative to the largest amount, the output among them; where they cancel, to a hundredth of the
        absolute values that they are sums of."""
        largest = max([abs(self.output), *(abs(a) for a in self.accounts.values()), 0.01 * self._read()[-1]])
        return abs(self.residual) / largest if largest else abs(self.residual)

    @property
    def tolerance(self) -> float:
        """How large the error may be: 1e-4, or 1e-10 where everything on the way is of float64."""
        return 1e-10 if self._output.dtype == torch.float64 and not self._coarse else 1e-4

    @property
    def closes(self) -> bool:
        """Whether everything is accounted for, to the tolerance."""
        return self.error <= self.tolerance

    def by_operation(self) -> dict[tuple[str, str], float]:
        """Amount by (account, operation name)."""
        return self._group(lambda sequence, name: name)

    def by_module(self) -> dict[tuple[str, str], float]:
        """Amount by (account, module path)."""
        return self._group(lambda sequence, name: self._path(sequence))

    def _group(self, key: Callable[[int, str], str]) -> dict[tuple[str, str], float]:
        totals: dict[tuple[str, str], float] = defaultdict(float)
        for (account, sequence, name), amount in zip(self._places + self._leaves, self._values(), strict=True):
            totals[account, key(sequence, name)] += amount
        return dict(totals)

    def amounts(self) -> Tensor:
        """All entries, in float64."""
        self._multiply()
        entries = [*self._amounts]
        for products, sizes in self._products:
            entries += [part.sum() for part in torch.split(products, sizes)]
        if len({(a.dtype, a.device) for a in entries}) > 1:
            return torch.stack([a.double().to(self._output.device) for a in entries])
        return torch.stack(entries).double() if entries else torch.zeros(0, dtype=torch.float64)

    def looks(self) -> list[Tensor]:
        """0-d numbers that are finite where all that was entered is, and rarely otherwise."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for amount in self._amounts:
            kinds[amount.dtype, amount.device].append(amount)
        booked = [torch.stack(amounts).sum(dtype=torch.float64) for amounts in kinds.values()]
        leaves = [values for *_, values in self._kept] + [products for products, _ in self._products]
        return booked + [values.sum(dtype=torch.float64) for values in leaves]

    def finite(self) -> bool:
        """Whether no amount is NaN and no leaf is NaN or inf (-inf may be a mask)."""
        amounts = all(not bool(torch.isnan(amount)) for amount in self._amounts)
        return amounts and not any(bool((x.isnan() | (x == torch.inf)).any()) for *_, x in self._kept)

    def _values(self) -> list[float]:
        return self._read()[:-2]

    def _read(self) -> list[float]:
        """All entries, the output and the sum of absolute values, in one look at the device."""
        if self._sums is None or len(self._sums) != len(self._places) + len(self._leaves) + 2:
            amounts = self.amounts()
            output = self._output.detach().reshape(1).to(amounts)
            weight = amounts.abs().sum() + sum(weight.to(amounts) for weight in self._weights)
            self._sums = torch.cat([amounts, output, weight.reshape(1)]).tolist()
        return self._sums

    def __repr__(self) -> str:
        lines = [f"{'output':<12}{self.output:>14.6g}"]
        lines += [f"{name:<12}{amount:>14.6g}" for name, amount in self.accounts.items()]
        lines.append(f"{'residual':<12}{self.residual:>14.3g}  ({'closes' if self.closes else 'does NOT close'})")
        lines += [f"constants not kept: {name} in {path or 'the model'}" for name, path in self.unresolved]
        lines += [f"takes no share: what {name} in {path or 'the model'} adds" for name, path in self.without_share]
        lines += [f"explained by gradient: {name} in {path or 'the model'}" for name, path in self.fallbacks]
        return "\n".join(lines)


def _alone(x: Tensor) -> Tensor:
    """A tensor that keeps no more memory than its own."""
    plain = x.layout is torch.strided and not x.is_nested and not is_functorch_wrapped_tensor(x)
    return x.clone() if plain and x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size() else x

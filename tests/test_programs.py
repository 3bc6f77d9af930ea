"""Random programs, explained by the engine and once more by a machine that knows nothing of tensors.

The machine keeps single numbers. Each has the numbers that it is made of, with what one unit of its own relevance
gives to one unit of theirs, and the amounts that leave for an account. A tensor is a numpy array of these numbers'
positions, so that views and writes into them are numpy's business. Relevance is one loop from the last number to the
first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from dynlrp import BrokenPromiseError, Composite, Explanation, NoPathError, explain, relevance
from dynlrp.rules import Shares
from tests.oracle import draw

CONSTANT, PARAMETER, COEFFICIENT, SIGNAL = range(4)
ACCOUNTS = ("constants", "parameters", "held back", "inputs")
LARGEST = 24
"""Elements of a tensor."""
BOUND = 1e3
"""Of values."""
PLAIN = Composite.of("plain", {"product": Shares()})
"""No roles: a product of a tensor with a function of itself is one of two signals too."""

Parts = Iterable[tuple[int, float]]
Run = Callable[[list[Tensor]], Any]
Numbers = np.ndarray[Any, np.dtype[Any]]


class Skip(Exception):
    """The operation cannot be done here."""


@dataclass(eq=False)
class Memory:
    """What a tensor and its views share."""

    kind: int
    saved: bool = False
    """Autograd needs the values as they are."""
    frozen: bool = False
    """No writes: a parameter, or views that autograd lets nobody write beside."""
    ordered: bool = True
    """The strides are those of the numpy array."""


@dataclass(eq=False)
class Array:
    """A tensor: the positions of its numbers."""

    ids: Numbers
    memory: Memory
    view: bool = False

    @property
    def kind(self) -> int:
        return self.memory.kind


class Machine:
    """Runs a program number by number while it is drawn."""

    def __init__(self, seed: int) -> None:
        self.values: list[float] = []
        self.parts: list[tuple[tuple[int, float], ...]] = []
        self.accounts: list[str] = []
        """Where the relevance of a number without parts goes."""
        self.offsets: list[tuple[str, float] | None] = []
        self.arrays: list[Array] = []
        self.steps: list[Run] = []
        self.random = Random(seed)

    # Numbers

    def number(
        self, value: float, parts: Parts = (), account: str = "", offset: tuple[str, float] | None = None
    ) -> int:
        """A number that is the sum of its parts, each times its factor, and of an offset."""
        if not abs(value) < BOUND:
            raise Skip
        kept = tuple((part, factor) for part, factor in parts if factor)
        if not account:
            total = sum(self.values[part] * factor for part, factor in kept) + (offset[1] if offset else 0.0)
            scale = sum(abs(self.values[part] * factor) for part, factor in kept) + abs(value)
            assert abs(total - value) <= 1e-12 * max(scale, 1.0)
        self.values.append(value)
        self.parts.append(kept)
        self.accounts.append(account)
        self.offsets.append(offset)
        return len(self.values) - 1

    def value(self, array: Array | Numbers) -> Numbers:
        ids = array.ids if isinstance(array, Array) else array
        return np.array([self.values[i] for i in ids.flat]).reshape(ids.shape)

    def apart(self, *ids: int) -> None:
        """Rounding does not tell these apart, or from zero: what chooses between them is not drawn."""
        made = {i: self.values[i] for i in ids}
        hard = {value for i, value in made.items() if not self.parts[i]}
        values = sorted([*(value for i, value in made.items() if self.parts[i]), *hard])
        if any(b - a < 1e-6 for a, b in pairwise(values)):
            raise Skip

    def leaf(self, values: Numbers, kind: int) -> None:
        ids = np.array([self.number(v, account=ACCOUNTS[kind]) for v in values.flat], dtype=int).reshape(values.shape)
        self.arrays.append(Array(ids, Memory(kind, frozen=kind == PARAMETER)))

    # Tensors

    def pick(self, fits: Callable[[Array], bool] = lambda a: True) -> int:
        """A tensor, more likely a late one."""
        found = [i for i, array in enumerate(self.arrays) if array.ids.size and fits(array)]
        if not found:
            raise Skip
        return found[max(self.random.randrange(len(found)) for _ in range(2))]

    def emit(self, ids: Numbers, of: Sequence[Array], run: Run, ordered: bool = False) -> Array:
        """A tensor whose numbers are there already, some of them those of ``of``."""
        if not 0 < ids.size <= LARGEST or ids.ndim > 4:
            raise Skip
        kind = max(array.kind for array in of)
        made = Array(self.settled(np.array(ids), kind), Memory(kind, ordered=ordered))
        self.arrays.append(made)
        self.steps.append(run)
        return made

    def settled(self, ids: Numbers, kind: int) -> Numbers:
        """A tensor that no relevance travels through goes into one account as a whole."""
        if kind is SIGNAL:
            return ids
        fresh = [self.number(self.values[i], account=ACCOUNTS[kind]) for i in ids.flat]
        return np.array(fresh, dtype=int).reshape(ids.shape)

    def look(self, array: Array, ids: Numbers, run: Run) -> None:
        """A view."""
        self.arrays.append(Array(ids, array.memory, view=True))
        self.steps.append(run)

    def constants(self, values: Numbers | float) -> Numbers:
        found = [self.number(float(v), account="constants") for v in np.asarray(values).flat]
        return np.array(found, dtype=int).reshape(np.shape(values))

    def save(self, *arrays: Array) -> None:
        for array in arrays:
            array.memory.saved = True

    # The answer

    def backward(self, seeds: Sequence[tuple[Array, Numbers]]) -> tuple[Numbers, dict[str, float], float]:
        """Relevance of every number, the accounts, and the largest relevance met."""
        m = np.zeros(len(self.values))
        for array, weights in seeds:
            np.add.at(m, array.ids, weights)
        accounts = dict.fromkeys((*ACCOUNTS, "offsets"), 0.0)
        for i in range(len(m) - 1, -1, -1):
            offset = self.offsets[i]
            if self.accounts[i]:
                accounts[self.accounts[i]] += m[i] * self.values[i]
            elif offset is not None:
                accounts[offset[0]] += m[i] * offset[1]
            for part, factor in self.parts[i]:
                m[part] += factor * m[i]
        r = m * np.array(self.values)
        return r, accounts, float(np.abs(r).max())


# Operations: each draws its operands, computes number by number, and gives the same in torch ------------------

OPERATIONS: list[Callable[[Machine], None]] = []


def operation(times: int) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    """Enter an operation, to be drawn that many times as often."""

    def enter(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        OPERATIONS.extend([function] * times)
        return function

    return enter


def each(machine: Machine, ids: Numbers, function: Callable[[int], int]) -> Numbers:
    return np.array([function(i) for i in ids.flat], dtype=int).reshape(ids.shape)


@operation(4)
def view(machine: Machine) -> None:
    """A look at the same memory."""
    number = machine.pick()
    array, draw_ = machine.arrays[number], machine.random
    ids, shape = array.ids, array.ids.shape
    axis = draw_.randrange(ids.ndim) if ids.ndim else 0
    kind = draw_.choice(["transpose", "select", "slice", "unsqueeze", "squeeze", "expand", "diagonal", "view", "move"])
    if kind == "transpose" and ids.ndim > 1:
        other = (axis + 1) % ids.ndim
        machine.look(array, ids.swapaxes(axis, other), lambda t: t[number].transpose(axis, other))
    elif kind == "select" and ids.ndim:
        at = draw_.randrange(-shape[axis], shape[axis])
        machine.look(array, np.moveaxis(ids, axis, 0)[at, ...], lambda t: t[number].select(axis, at))
    elif kind == "slice" and ids.ndim:
        start = draw_.randrange(shape[axis])
        stop, step = draw_.randint(start + 1, shape[axis]), draw_.randint(1, 2)
        part = (slice(None),) * axis + (slice(start, stop, step),)
        machine.look(array, ids[part], lambda t: t[number][part])
    elif kind == "unsqueeze" and ids.ndim < 3:
        machine.look(array, np.expand_dims(ids, axis), lambda t: t[number].unsqueeze(axis))
    elif kind == "squeeze" and 1 in shape:
        machine.look(array, ids.squeeze(), lambda t: t[number].squeeze())
    elif kind == "expand" and ids.ndim < 3 and ids.size * 2 <= LARGEST:
        size = (2, *shape)
        machine.look(array, np.broadcast_to(ids, size), lambda t: t[number].expand(size))
        array.memory.frozen = True  # elements that share memory
    elif kind == "diagonal" and ids.ndim > 1:
        part = np.einsum("ii...->...i", ids[: min(shape[:2]), : min(shape[:2])])
        machine.look(array, part, lambda t: t[number].diagonal())
    elif kind == "view" and array.memory.ordered and ids.flags.c_contiguous and ids.ndim:
        size = (-1, shape[-1]) if draw_.random() < 0.5 else (-1,)
        machine.look(array, ids.reshape(size), lambda t: t[number].view(size))
    elif kind == "move" and ids.ndim == 3:
        machine.look(array, np.moveaxis(ids, 0, 2), lambda t: t[number].movedim(0, 2))
    else:
        raise Skip


@operation(1)
def split(machine: Machine) -> None:
    """Several views by one operation."""
    number = machine.pick(lambda a: a.ids.ndim > 0 and a.ids.shape[-1] > 1)
    array = machine.arrays[number]
    size = machine.random.randint(1, array.ids.shape[-1] - 1)
    if -(-array.ids.shape[-1] // size) > 3:
        raise Skip
    array.memory.frozen = True
    first = len(machine.arrays)
    for place, start in enumerate(range(0, array.ids.shape[-1], size)):
        part = array.ids[..., start : start + size]
        if place:
            machine.look(array, part, lambda t, place=place: t[first]._parts[place])
        else:
            machine.look(array, part, lambda t: _first_part(t[number].split(size, -1)))


def _first_part(parts: Sequence[Tensor]) -> Tensor:
    parts[0]._parts = parts  # type: ignore[attr-defined]
    return parts[0]


@operation(2)
def copy(machine: Machine) -> None:
    """Elements moved to a new tensor."""
    number = machine.pick()
    array, draw_ = machine.arrays[number], machine.random
    ids = array.ids
    kind = draw_.choice(["clone", "flip", "roll", "repeat", "pad", "tril", "contiguous view"])
    if kind == "clone":
        made = machine.emit(ids, [array], lambda t: t[number].clone(memory_format=torch.contiguous_format), True)
        assert made.memory.ordered
    elif kind == "flip" and ids.ndim:
        machine.emit(np.flip(ids, -1), [array], lambda t: t[number].flip(-1))
    elif kind == "roll" and ids.ndim:
        machine.emit(np.roll(ids, 1, 0), [array], lambda t: t[number].roll(1, 0))
    elif kind == "repeat" and ids.ndim:
        times = (2,) + (1,) * (ids.ndim - 1)
        machine.emit(np.tile(ids, times), [array], lambda t: t[number].repeat(times))
    elif kind == "pad" and ids.ndim:
        zeros = machine.constants(np.zeros((*ids.shape[:-1], 1)))
        machine.emit(np.concatenate([ids, zeros], -1), [array], lambda t: F.pad(t[number], (0, 1)))
    elif kind == "tril" and ids.ndim > 1:
        zeros = machine.constants(np.zeros(ids.shape))
        machine.emit(np.where(np.tril(np.ones(ids.shape[-2:])) > 0, ids, zeros), [array], lambda t: t[number].tril())
    elif kind == "contiguous view":
        machine.emit(ids.reshape(-1), [array], lambda t: t[number].clone().reshape(-1)).view = True
    else:
        raise Skip


@operation(2)
def join(machine: Machine) -> None:
    """Two tensors side by side, or one on the other."""
    one = machine.pick(lambda a: a.ids.ndim > 0)
    shape = machine.arrays[one].ids.shape
    if machine.random.random() < 0.6:
        two = machine.pick(lambda a: a.ids.ndim == len(shape) and a.ids.shape[1:] == shape[1:])
        join_, run = np.concatenate, torch.cat
    else:
        two = machine.pick(lambda a: a.ids.shape == shape)
        join_, run = np.stack, torch.stack  # type: ignore[assignment]
    a, b = machine.arrays[one], machine.arrays[two]
    machine.emit(join_([a.ids, b.ids]), [a, b], lambda t: run([t[one], t[two]]))


@operation(2)
def index(machine: Machine) -> None:
    """Elements picked by number, some of them twice."""
    number = machine.pick(lambda a: a.ids.ndim > 0)
    array, draw_ = machine.arrays[number], machine.random
    ids = array.ids
    rows = np.array([draw_.randrange(ids.shape[0]) for _ in range(draw_.randint(1, 4))])
    torch_rows = torch.tensor(rows)
    kind = draw_.choice(["index", "index_select", "gather", "take", "masked_select"])
    if not kind.startswith("index"):
        machine.save(array)
    if kind == "index":
        machine.emit(ids[rows], [array], lambda t: t[number][torch_rows])
    elif kind == "index_select":
        machine.emit(ids[rows], [array], lambda t: t[number].index_select(0, torch_rows))
    elif kind == "gather":
        at = np.broadcast_to(rows.reshape(-1, *[1] * (ids.ndim - 1)), (len(rows), *ids.shape[1:]))
        torch_at = torch.tensor(at.copy())
        machine.emit(np.take_along_axis(ids, at, 0), [array], lambda t: t[number].gather(0, torch_at))
    elif kind == "take":
        machine.emit(ids.reshape(-1)[rows], [array], lambda t: t[number].take(torch_rows))
    else:
        mask = np.array([draw_.random() < 0.5 for _ in ids.flat]).reshape(ids.shape)
        torch_mask = torch.tensor(mask)
        machine.emit(ids[mask], [array], lambda t: t[number].masked_select(torch_mask))


@operation(2)
def choose(machine: Machine) -> None:
    """``where`` between two tensors, or a tensor and a number."""
    one = machine.pick()
    shape = machine.arrays[one].ids.shape
    two = machine.pick(lambda a: a.ids.shape == shape)
    a, b = machine.arrays[one], machine.arrays[two]
    mask = np.array([machine.random.random() < 0.5 for _ in a.ids.flat]).reshape(shape)
    torch_mask = torch.tensor(mask)
    if machine.random.random() < 0.7:
        machine.emit(np.where(mask, a.ids, b.ids), [a, b], lambda t: torch.where(torch_mask, t[one], t[two]))
    else:
        filled = machine.constants(np.full(shape, 0.7))
        machine.emit(np.where(mask, filled, a.ids), [a], lambda t: t[one].masked_fill(torch_mask, 0.7))


# Sums and products


def pair(machine: Machine) -> tuple[int, int, Array, Array, Numbers, Numbers]:
    """Two tensors that broadcast against each other."""

    def fits(x: Array) -> bool:
        try:
            return math.prod(np.broadcast_shapes(x.ids.shape, shape)) <= LARGEST
        except ValueError:
            return False

    one = machine.pick()
    shape = machine.arrays[one].ids.shape
    two = machine.pick(fits)
    a, b = machine.arrays[one], machine.arrays[two]
    return (one, two, a, b, *np.broadcast_arrays(a.ids, b.ids))  # type: ignore[return-value]


def both(machine: Machine, a: Numbers, b: Numbers, function: Callable[[int, int], int]) -> Numbers:
    return np.array([function(i, j) for i, j in zip(a.flat, b.flat, strict=True)], dtype=int).reshape(a.shape)


@operation(5)
def add(machine: Machine) -> None:
    one, two, a, b, x, y = pair(machine)
    factor = machine.random.choice([1.0, -1.0, 0.5])
    ids = both(machine, x, y, lambda i, j: _sum(machine, (i, 1.0), (j, factor)))
    machine.emit(ids, [a, b], lambda t: torch.add(t[one], t[two], alpha=factor))


def _sum(machine: Machine, *parts: tuple[int, float], offset: float = 0.0) -> int:
    value = sum(machine.values[i] * factor for i, factor in parts)
    return machine.number(value + offset, parts, offset=("constants", offset))


@operation(2)
def shift(machine: Machine) -> None:
    """With numbers of Python, which autograd does not record."""
    number = machine.pick()
    array = machine.arrays[number]
    kind = machine.random.choice(["plus", "minus from", "times", "over", "negative"])
    factor, offset = {
        "plus": (1.0, 0.3), "minus from": (-1.0, 1.0), "times": (-1.3, 0.0), "over": (0.5, 0.0), "negative": (-1.0, 0.0)
    }[kind]  # fmt: skip
    run: Run = {
        "plus": lambda t: t[number] + 0.3,
        "minus from": lambda t: 1 - t[number],
        "times": lambda t: t[number] * -1.3,
        "over": lambda t: t[number] / 2,
        "negative": lambda t: -t[number],
    }[kind]
    machine.emit(each(machine, array.ids, lambda i: _sum(machine, (i, factor), offset=offset)), [array], run)


def times(machine: Machine, a: Array, b: Array, i: int, j: int) -> list[tuple[int, float]]:
    """Parts of a product: two signals share, one takes all."""
    x, y = machine.values[i], machine.values[j]
    share = 0.5 if a.kind == b.kind == SIGNAL else 1.0
    return [(i, y * share)] * (a.kind == SIGNAL) + [(j, x * share)] * (b.kind == SIGNAL)


def product(machine: Machine, a: Array, b: Array, i: int, j: int) -> int:
    value = machine.values[i] * machine.values[j]
    parts = times(machine, a, b, i, j)
    return machine.number(value, parts, account="" if parts else ACCOUNTS[max(a.kind, b.kind)])


@operation(4)
def multiply(machine: Machine) -> None:
    one, two, a, b, x, y = pair(machine)
    machine.save(a, b)
    machine.emit(both(machine, x, y, lambda i, j: product(machine, a, b, i, j)), [a, b], lambda t: t[one] * t[two])


@operation(2)
def divide(machine: Machine) -> None:
    """The denominator is a coefficient."""
    one, two, a, b, x, y = pair(machine)
    if np.abs(machine.value(b)).min() < 0.1:
        raise Skip
    machine.save(a, b)
    ids, kind = quotient(machine, a, b, x, y)
    machine.emit(ids, [Array(ids, Memory(kind))], lambda t: t[one] / t[two])


def quotient(machine: Machine, a: Array, b: Array, x: Numbers, y: Numbers) -> tuple[Numbers, int]:
    """Its numbers and kind."""
    kind = a.kind if a.kind == SIGNAL else max(a.kind, COEFFICIENT if b.kind == SIGNAL else b.kind)

    def over(i: int, j: int) -> int:
        unit = 1 / machine.values[j]
        if kind == SIGNAL:
            return machine.number(machine.values[i] / machine.values[j], [(i, unit)])
        return machine.number(machine.values[i] / machine.values[j], account=ACCOUNTS[kind])

    return both(machine, x, y, over), kind


@operation(4)
def matmul(machine: Machine) -> None:
    """Of any two matrices: weights that are constants or parameters, or two signals."""
    one = machine.pick(lambda a: a.ids.ndim == 2)
    a = machine.arrays[one]
    two = machine.pick(lambda b: b.ids.ndim == 2 and a.ids.shape[1] in b.ids.shape)
    b = machine.arrays[two]
    turned = b.ids.shape[0] != a.ids.shape[1]
    right = b.ids.T if turned else b.ids
    if a.ids.shape[0] * right.shape[1] > LARGEST:
        raise Skip
    machine.save(a, b)
    kind = max(a.kind, b.kind)

    def entry(row: Numbers, column: Numbers) -> int:
        parts = [part for i, j in zip(row, column, strict=True) for part in times(machine, a, b, i, j)]
        value = sum(machine.values[i] * machine.values[j] for i, j in zip(row, column, strict=True))
        return machine.number(value, parts, account="" if parts else ACCOUNTS[kind])

    ids = np.array([[entry(row, column) for column in right.T] for row in a.ids])
    run: Run = (lambda t: F.linear(t[one], t[two])) if turned else (lambda t: t[one] @ t[two])
    machine.emit(ids, [a, b], run)


# Reductions


@operation(3)
def reduce(machine: Machine) -> None:
    """Along one dimension."""
    number = machine.pick(lambda a: a.ids.ndim > 0)
    array = machine.arrays[number]
    axis = machine.random.randrange(array.ids.ndim)
    rows = np.moveaxis(array.ids, axis, -1)
    size = rows.shape[-1]
    kind = machine.random.choice(["sum", "mean", "amax", "prod", "norm", "cumsum", "sort", "softmax", "layer_norm"])
    signal = array.kind == SIGNAL

    def made(value: float, parts: Parts, offset: float = 0.0) -> int:
        if not signal:
            return machine.number(value, account=ACCOUNTS[array.kind])
        return machine.number(value, parts, offset=("offsets", offset))

    def along(function: Callable[[Numbers], int | list[int]]) -> Numbers:
        found = [function(row) for row in rows.reshape(-1, size)]
        return np.array(found, dtype=int).reshape(*rows.shape[:-1], -1)

    def one_each(function: Callable[[Numbers], int]) -> Numbers:
        return along(function)[..., 0]

    if kind in ("sum", "mean"):
        unit = 1.0 if kind == "sum" else 1 / size
        ids = one_each(lambda row: _sum(machine, *[(i, unit) for i in row]))
        machine.emit(ids, [array], lambda t: getattr(t[number], kind)(axis))
    elif kind == "amax":
        machine.save(array)

        def largest(row: Numbers) -> int:
            machine.apart(*row)
            x = machine.value(row)
            ties = [(i, 1 / (x == x.max()).sum()) for i in row[x == x.max()]]
            return made(x.max(), ties)

        machine.emit(one_each(largest), [array], lambda t: t[number].amax(axis)).memory.saved = True
    elif kind == "prod":
        machine.save(array)

        def all_of(row: Numbers) -> int:
            x = machine.value(row)
            return made(x.prod(), [(i, np.delete(x, k).prod() / size) for k, i in enumerate(row)])

        machine.emit(one_each(all_of), [array], lambda t: t[number].prod(axis)).memory.saved = True
    elif kind == "norm":
        machine.save(array)

        def length(row: Numbers) -> int:
            x = machine.value(row)
            n = math.sqrt((x**2).sum())
            if n < 1e-6:
                raise Skip
            return made(n, [(i, v / n) for i, v in zip(row, x, strict=True)])

        ids = one_each(length)
        machine.emit(ids, [array], lambda t: torch.linalg.vector_norm(t[number], dim=axis)).memory.saved = True
    elif kind == "cumsum":
        ids = along(lambda row: [_sum(machine, *[(i, 1.0) for i in row[: k + 1]]) for k in range(size)])
        machine.emit(np.moveaxis(ids, -1, axis), [array], lambda t: t[number].cumsum(axis))
    elif kind == "sort":
        for row in rows.reshape(-1, size):
            machine.apart(*row)
        order = np.argsort(machine.value(rows), -1, kind="stable")
        ids = np.moveaxis(np.take_along_axis(rows, order, -1), -1, axis)
        machine.emit(ids, [array], lambda t: t[number].sort(dim=axis, stable=True)[0])
    elif kind == "softmax":

        def shares(row: Numbers) -> list[int]:
            x = machine.value(row)
            p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
            slopes = np.diag(p) - np.outer(p, p)
            parts = [list(zip(row, slope, strict=True)) for slope in slopes]
            return [made(p[k], parts[k], p[k] - slopes[k] @ x) for k in range(size)]

        ids = np.moveaxis(along(shares), -1, axis)
        machine.emit(ids, [array], lambda t: t[number].softmax(axis)).memory.saved = True
    else:
        machine.save(array)

        def normal(row: Numbers) -> list[int]:
            x = machine.value(row)
            scale = 1 / math.sqrt(x.var() + 0.1)
            slopes = (np.eye(size) - 1 / size) * scale
            return [made(slopes[k] @ x, list(zip(row, slopes[k], strict=True))) for k in range(size)]

        if axis == array.ids.ndim - 1:
            machine.emit(along(normal), [array], lambda t: F.layer_norm(t[number], (size,), eps=0.1))


# Functions of one element: the secant through the origin


def _phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float], float]] = {
    "relu": (torch.relu, lambda x: max(x, 0.0), 0.0),
    "leaky": (lambda x: F.leaky_relu(x, 0.2), lambda x: x if x > 0 else 0.2 * x, 0.2),
    "abs": (torch.abs, abs, 0.0),
    "tanh": (torch.tanh, math.tanh, 1.0),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + math.exp(-x)), 0.25),
    "exp": (lambda x: torch.exp(x.clamp(max=3)), lambda x: math.exp(min(x, 3)), 1.0),
    "cos": (torch.cos, math.cos, 0.0),
    "gelu": (F.gelu, lambda x: x * _phi(x), 0.5),
    "silu": (F.silu, lambda x: x / (1 + math.exp(-x)), 0.5),
    "softplus": (F.softplus, lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0.0), 0.5),
    "square": (torch.square, lambda x: x * x, 0.0),
    "clamp": (lambda x: x.clamp(-0.5, 1.5), lambda x: min(max(x, -0.5), 1.5), 1.0),
    "atan": (torch.atan, math.atan, 1.0),
}
"""In torch, for a number, and the slope at zero."""
STEPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "floor": (torch.floor, math.floor),
    "log": (lambda x: torch.log(x.abs() + 1), lambda x: math.log(abs(x) + 1)),
    "reciprocal": (lambda x: (x.square() + 1).reciprocal(), lambda x: 1 / (x * x + 1)),
}
"""Functions that carry nothing: a step, or infinite at zero."""


@operation(6)
def function(machine: Machine) -> None:
    number = machine.pick()
    array = machine.arrays[number]
    run, at, slope = FUNCTIONS[machine.random.choice(list(FUNCTIONS))]
    machine.save(array)

    def secant(i: int) -> int:
        x = machine.values[i]
        if array.kind != SIGNAL:
            return machine.number(at(x), account=ACCOUNTS[array.kind])
        if machine.parts[i] and abs(x) < 1e-5:  # rounding decides on which side of zero it lies
            raise Skip
        return machine.number(at(x), [(i, (at(x) - at(0.0)) / x if x else slope)], offset=("offsets", at(0.0)))

    made = machine.emit(each(machine, array.ids, secant), [array], lambda t: run(t[number]))
    made.memory.saved = True


@operation(2)
def step(machine: Machine) -> None:
    number = machine.pick()
    array = machine.arrays[number]
    run, at = STEPS[machine.random.choice(list(STEPS))]
    machine.save(array)
    kind = COEFFICIENT if array.kind == SIGNAL else array.kind
    x = machine.value(array)
    if run is torch.floor and bool((np.abs(x - np.round(x)) < 1e-6).any()):  # rounding decides
        raise Skip
    ids = each(machine, array.ids, lambda i: machine.number(at(machine.values[i]), account=ACCOUNTS[kind]))
    machine.emit(ids, [Array(ids, Memory(kind))], lambda t: run(t[number])).memory.saved = True


@operation(1)
def detach(machine: Machine) -> None:
    """What leaves the graph is a constant."""
    number = machine.pick()
    ids = machine.constants(machine.value(machine.arrays[number]))
    machine.emit(ids, [Array(ids, Memory(CONSTANT))], lambda t: t[number].detach().clone())


@operation(2)
def extreme(machine: Machine) -> None:
    """The larger of two elements; equal ones share."""
    one, two, a, b, x, y = pair(machine)
    machine.save(a, b)
    kind = max(a.kind, b.kind)

    def larger(i: int, j: int) -> int:
        machine.apart(i, j)
        u, v = machine.values[i], machine.values[j]
        if kind != SIGNAL:
            return machine.number(max(u, v), account=ACCOUNTS[kind])
        return machine.number(max(u, v), [(i, 0.5), (j, 0.5)] if u == v else [(i, 1.0)] if u > v else [(j, 1.0)])

    machine.emit(both(machine, x, y, larger), [a, b], lambda t: torch.maximum(t[one], t[two]))


# Writes


def target(machine: Machine) -> int:
    return machine.pick(
        lambda a: not a.memory.frozen and not a.memory.saved and a.ids.flags.writeable and a.ids.ndim > 0
    )


def write(machine: Machine, array: Array, place: Any, ids: Numbers, kind: int, run: Run) -> None:
    """Put other numbers into a part of a tensor, and whatever looks at the same memory sees them."""
    array.ids[place] = ids
    if array.memory.kind == SIGNAL or kind == SIGNAL:
        array.memory.kind = SIGNAL
    else:
        array.memory.kind = max(array.memory.kind, kind)
        base = array.ids
        while base.base is not None:
            base = base.base
        base[...] = machine.settled(base, array.memory.kind)
    machine.steps.append(run)


@operation(4)
def overwrite(machine: Machine) -> None:
    """Copies, sums, fills, products and quotients in a part of a tensor."""
    number = target(machine)
    array, draw_ = machine.arrays[number], machine.random
    at = draw_.randrange(array.ids.shape[0])
    place = at if draw_.random() < 0.5 else slice(at, None)
    part = array.ids[place]
    other = machine.pick(
        lambda a: (
            a.memory is not array.memory
            and a.ids.ndim <= part.ndim
            and all(n in (1, m) for n, m in zip(a.ids.shape[::-1], part.shape[::-1], strict=False))
        )
    )
    source = machine.arrays[other]
    ids = np.broadcast_to(source.ids, part.shape)
    kind = draw_.choice(["copy", "add", "subtract", "fill", "multiply", "divide"])
    if kind == "multiply":
        machine.save(source)
        made = both(machine, part, ids, lambda i, j: product(machine, array, source, i, j))
        write(machine, array, place, made, source.kind, lambda t: _do(t[number][place].mul_(t[other])))
    elif kind == "divide":
        if np.abs(machine.value(source)).min() < 0.1 or (array.kind == CONSTANT != source.kind):
            raise Skip
        machine.save(source)
        made, of = quotient(machine, array, source, part, ids)
        write(machine, array, place, made, of, lambda t: _do(t[number][place].div_(t[other])))
    elif kind == "copy":
        write(machine, array, place, ids, source.kind, lambda t: _do(t[number][place].copy_(t[other])))
    elif kind == "fill":
        filled = machine.constants(np.full(part.shape, 0.4))
        write(machine, array, place, filled, CONSTANT, lambda t: _do(t[number][place].fill_(0.4)))
    else:
        factor = 1.0 if kind == "add" else -1.0
        total = both(machine, part, ids, lambda i, j: _sum(machine, (i, 1.0), (j, factor)))
        write(machine, array, place, total, source.kind, lambda t: _do(t[number][place].add_(t[other], alpha=factor)))


def _do(result: Tensor) -> None:
    """Writes make no new tensor."""


@operation(2)
def scatter(machine: Machine) -> None:
    """By index or mask."""
    number = target(machine)
    array, draw_ = machine.arrays[number], machine.random
    rows = draw_.sample(range(array.ids.shape[0]), draw_.randint(1, array.ids.shape[0]))
    torch_rows = torch.tensor(rows)
    shape = (len(rows), *array.ids.shape[1:])
    kind = draw_.choice(["index_put", "index_add", "masked_fill"])
    if kind == "masked_fill":
        mask = np.array([draw_.random() < 0.5 for _ in array.ids.flat]).reshape(array.ids.shape)
        torch_mask, zeros = torch.tensor(mask), machine.constants(np.zeros(int(mask.sum())))
        write(machine, array, mask, zeros, CONSTANT, lambda t: _do(t[number].masked_fill_(torch_mask, 0.0)))
        return
    other = machine.pick(lambda a: a.memory is not array.memory and a.ids.shape == shape)
    source = machine.arrays[other]
    if kind == "index_put":

        def run(t: list[Tensor]) -> None:
            t[number][torch_rows] = t[other]

        write(machine, array, rows, source.ids, source.kind, run)
    else:
        total = both(machine, array.ids[rows], source.ids, lambda i, j: _sum(machine, (i, 1.0), (j, 1.0)))
        machine.save(source)
        write(machine, array, rows, total, source.kind, lambda t: _do(t[number].index_add_(0, torch_rows, t[other])))


@operation(3)
def change(machine: Machine) -> None:
    """A whole tensor in place."""
    number = target(machine)
    array, draw_ = machine.arrays[number], machine.random
    if array.view:
        raise Skip
    ids = array.ids
    kind = draw_.choice(["scale", "gate", "tanh", "relu", "negative", "copy"])
    if kind == "gate":
        # Autograd cannot differentiate by both factors of a product in place.
        other = machine.pick(lambda a: a.kind == CONSTANT and a.ids.shape == ids.shape)
        source = machine.arrays[other]
        machine.save(source)
        made = both(machine, ids, source.ids, lambda i, j: product(machine, array, source, i, j))
        write(machine, array, ..., made, source.kind, lambda t: _do(t[number].mul_(t[other])))
    elif kind == "copy":
        other = machine.pick(lambda a: a.memory is not array.memory and a.ids.shape == ids.shape)
        source = machine.arrays[other]
        write(machine, array, ..., source.ids, source.kind, lambda t: _do(t[number].copy_(t[other])))
    elif kind in ("scale", "negative"):
        factor = 0.7 if kind == "scale" else -1.0
        made = each(machine, ids, lambda i: _sum(machine, (i, factor)))
        run: Run = (lambda t: _do(t[number].mul_(0.7))) if kind == "scale" else (lambda t: _do(t[number].neg_()))
        write(machine, array, ..., made, array.kind, run)
    else:
        at: Callable[[float], float] = math.tanh if kind == "tanh" else lambda x: max(x, 0.0)

        def secant(i: int) -> int:
            x = machine.values[i]
            if machine.parts[i] and abs(x) < 1e-5:
                raise Skip
            return machine.number(at(x), [(i, at(x) / x if x else float(kind == "tanh"))])

        made = each(machine, ids, secant)
        write(machine, array, ..., made, array.kind, lambda t: _do(getattr(t[number], kind + "_")()))
        array.memory.saved = True


# The comparison ---------------------------------------------------------------------------------------------


class Program:
    """A drawn program in both forms."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.machine = machine = Machine(seeds[0])
        shapes = [(3, 4), (4,), (2, 3), (4, 3), (3,), (3, 3)]
        kinds = [SIGNAL, SIGNAL, SIGNAL, PARAMETER, PARAMETER, CONSTANT]
        self.given = [draw(seeds[0] + n, *shape) for n, shape in enumerate(shapes)]
        for values, kind in zip(self.given, kinds, strict=True):
            machine.leaf(values.numpy(), kind)
        self.leaves = [array.ids.copy() for array in machine.arrays[:3]]
        for seed in seeds[1:]:
            self._step(seed)
        weighed = [a for a in machine.arrays[6:] if a.kind == SIGNAL][-4:] or machine.arrays[:1]
        places = [next(i for i, a in enumerate(machine.arrays) if a is array) for array in weighed]
        weights = [draw(seeds[0] + 100 + n, *array.ids.shape) for n, array in enumerate(weighed)]
        self.outputs = list(zip(places, weights, strict=True))
        self.relevance, self.accounts, self.scale = machine.backward(
            [(array, w.numpy()) for array, w in zip(weighed, weights, strict=True)]
        )

    def _step(self, seed: int) -> None:
        """One operation; those that do not fit leave nothing behind."""
        machine = self.machine
        machine.random = Random(seed)
        for _ in range(10):
            before = len(machine.arrays), len(machine.steps)
            states = [(a.memory, a.memory.saved, a.memory.frozen) for a in machine.arrays]
            try:
                machine.random.choice(OPERATIONS)(machine)
                return
            except Skip:
                del machine.arrays[before[0] :], machine.steps[before[1] :]
                for memory, saved, frozen in states:
                    memory.saved, memory.frozen = saved, frozen

    def __call__(self, *inputs: Tensor) -> Tensor:
        parameters = [p.clone().requires_grad_() for p in self.given[3:5]]
        tensors = [*inputs, *parameters, self.given[5].clone()]
        for run in self.machine.steps:
            made = run(tensors)
            if made is not None:
                tensors.append(made)
        return sum(((tensors[i] * w).sum() for i, w in self.outputs), torch.zeros((), dtype=torch.float64))

    @property
    def tolerance(self) -> float:
        return 1e-9 * max(self.scale, 1e-3)

    def agrees(self, explanation: Explanation) -> None:
        """Relevance, value and accounts are those of the machine."""
        tolerance = self.tolerance
        for number, (ours, ids) in enumerate(zip(explanation.relevance, self.leaves, strict=True)):
            expected = torch.tensor(self.relevance[ids])
            ours = torch.zeros_like(expected) if ours is None else ours
            assert float((ours - expected).abs().max()) <= tolerance, f"input {number}"
        ledger = explanation.ledger
        assert not ledger.unresolved
        assert abs(ledger.residual) <= tolerance
        assert abs(ledger.output - sum(self.accounts.values())) <= tolerance
        for account, amount in self.accounts.items():
            assert abs(ledger.accounts[account] - amount) <= tolerance, (account, amount, ledger)


@st.composite
def programs(draw_: Callable[..., Any]) -> Program:
    """Of 1 to 40 operations."""
    length = draw_(st.integers(1, 40))
    program = Program(draw_(st.lists(st.integers(0, 2**32 - 1), min_size=length + 1, max_size=length + 1)))
    try:
        program(*[x.clone().requires_grad_().clone() for x in program.given[:3]])
    except RuntimeError:  # PyTorch itself refuses some writes into views
        reject()
    return program


@settings(max_examples=100)
@given(program=programs())
def test_programs(program: Program) -> None:
    program.agrees(explain(program, tuple(program.given[:3]), composite=PLAIN))


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_unrelated_programs(start: int) -> None:
    """Hypothesis likes to repeat itself."""
    for seed in range(start, start + 20):
        random = Random(seed)
        program = Program([random.randrange(2**32) for _ in range(random.randint(10, 41))])
        program.agrees(explain(program, tuple(program.given[:3]), composite=PLAIN))


@given(program=programs())
def test_backward_after_relevance(program: Program) -> None:
    """A graph that was explained gives the same gradients, and the same relevance without a second forward pass."""
    leaves = [x.clone().requires_grad_() for x in program.given[:3]]
    inputs = [leaf.clone() for leaf in leaves]
    sources = [x.view_as(x) for x in inputs]
    output = program(*[x.clone() for x in sources])
    if output.requires_grad:
        before = torch.autograd.grad(output, leaves, retain_graph=True, allow_unused=True)
        with suppress(BrokenPromiseError):  # what was written over is gone
            explanation = relevance(output, sources, composite=PLAIN)
            for ours, ids in zip(explanation.relevance, program.leaves, strict=True):
                expected = torch.tensor(program.relevance[ids])
                assert ours is None or float((ours - expected).abs().max()) <= program.tolerance
        after = torch.autograd.grad(output, leaves, allow_unused=True)
        for one, other in zip(before, after, strict=True):
            assert one is None if other is None else torch.equal(one, other)


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp", "epsilon_plus", "dynamiclrp"])
@given(program=programs())
def test_other_composites(program: Program, composite: str) -> None:
    """Whatever the rules, and in either gauge: nothing is lost and nothing counted twice."""
    try:
        explanation = explain(program, tuple(program.given[:3]), composite=composite)
    except NoPathError:
        assert composite == "cplrp"  # gates carry nothing there
        return
    assert explanation.finite()
    assert not explanation.ledger.unresolved
    assert explanation.ledger.error <= 1e-8

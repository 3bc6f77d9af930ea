"""Reading, filling, writing and adding by index, and tables that indices look rows up in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import Composite, explain, relevance
from dynlrp.errors import UnknownOperationError
from dynlrp.promise import Operands
from dynlrp.rules import REGISTRY, Gamma, indexing
from tests.examples import INDEX, MASK, Table, cases, is_of, linear, matrices, names, on, passes, registered
from tests.oracle import agrees, draw, number, same

ATEN = torch.ops.aten
ROWS = torch.tensor([1, 0])
GRID = torch.tensor([[0, 2, 1, 1], [0, 0, 2, 2]])
"""Two entries of the first column go to one place."""

READING: Table = {
    "IndexBackward0": [
        *on((3, 4))(
            lambda x: x[INDEX], lambda x: x[:, INDEX], lambda x: x[INDEX, INDEX], lambda x: x[MASK],
            lambda x: x[[0, 2], [-1, 1]],
        ),
        *on((3, 4, 3))(
            lambda x: x[:, INDEX], lambda x: x[INDEX, :, INDEX], lambda x: x[..., INDEX],
            lambda x: x[INDEX[:, None], :, INDEX],
        ),
    ],
    "UnsafeIndexBackward0": on((3, 4))(
        lambda x: ATEN._unsafe_index(x, [INDEX]), lambda x: ATEN._unsafe_index(x, [None, INDEX])
    ),
    "IndexSelectBackward0": on((3, 4))(lambda x: x.index_select(1, INDEX), lambda x: x.index_select(-2, INDEX)),
    "GatherBackward0": on((3, 4))(
        lambda x: x.gather(1, torch.tensor([[0, 3], [1, 1], [2, 0]])),
        lambda x: x.gather(-2, torch.tensor([[2, 0, 0, 1]])),
    ),
    "TakeBackward0": on((3, 4))(lambda x: x.take(INDEX), lambda x: x.take(torch.tensor([[-1, 7], [3, 3]]))),
    "MaskedSelectBackward0": on((3, 4))(lambda x: x.masked_select(MASK), lambda x: x.masked_select(MASK[:, :1])),
    "WhereBackward0": on((3, 4), (3, 4))(
        lambda a, b: torch.where(MASK, a, b), lambda a, b: torch.where(MASK[:, :1], a, b)
    ),
    "EmbeddingBackward0": on((5, 3))(
        lambda x: F.embedding(INDEX, x), lambda x: F.embedding(INDEX.view(1, 3), x),
        lambda x: F.embedding(INDEX, x, 0, scale_grad_by_freq=True),
    ),
}  # fmt: skip
FILLING: Table = {
    "MaskedFillBackward0": on((3, 4))(lambda x: x.masked_fill(MASK, 0.0)),
    "IndexFillBackward0": on((3, 4))(lambda x: x.index_fill(1, INDEX, 0.0)),
    "ScatterBackward1": on((3, 4))(lambda x: x.scatter(0, GRID, 0.0)),
    "UnsafeMaskedIndexBackward0": on((3, 4))(lambda x: ATEN._unsafe_masked_index(x, MASK[0, :3], [INDEX, INDEX], 0.0)),
}
WRITING: Table = {
    "MaskedFillBackward1": on((3, 4), ())(lambda x, v: x.masked_fill(MASK, v)),
    "IndexFillBackward1": on((3, 4), ())(lambda x, v: x.index_fill(-1, INDEX, v)),
    "MaskedScatterBackward0": on((3, 4), (9,))(
        lambda x, v: x.masked_scatter(MASK, v), lambda x, v: x.masked_scatter(MASK[:, 1:2], v)
    ),
    "IndexPutBackward0": [
        *on((3, 4), (3, 4))(
            lambda x, v: x.index_put((INDEX,), v), lambda x, v: x.index_put((INDEX,), v, accumulate=True),
        ),
        *on((3, 4), (4,))(
            lambda x, v: x.index_put((INDEX[:2],), v), lambda x, v: x.index_put((INDEX[:2],), v, accumulate=True),
        ),
        *on((3, 4), ())(lambda x, v: x.index_put((MASK,), v), lambda x, v: ATEN.index_put(x, [None, INDEX], v)),
    ],
    "UnsafeIndexPutBackward0": on((3, 4), (3, 4))(
        lambda x, v: ATEN._unsafe_index_put(x, [INDEX], v), lambda x, v: ATEN._unsafe_index_put(x, [INDEX], v, True)
    ),
    "IndexPutImplBackward0": on((3, 4), (3, 4))(
        lambda x, v: ATEN._index_put_impl_(x.clone(), [INDEX], v),
        lambda x, v: ATEN._index_put_impl_(x.clone(), [INDEX], v, True),
    ),
    "IndexCopyBackward0": [
        *on((3, 4), (3, 4))(lambda x, v: x.index_copy(0, INDEX, v)),
        *on((4, 3), (4, 3))(lambda x, v: x.index_copy(-1, INDEX, v)),
    ],
    "PutBackward0": on((3, 4), (3,))(
        lambda x, v: x.put(INDEX, v), lambda x, v: x.put(INDEX, v, accumulate=True),
        lambda x, v: x.put(torch.tensor([-1, 2, 11]), v),
    ),
    "ScatterBackward0": on((3, 4), (2, 4))(
        lambda x, v: x.scatter(0, GRID, v), lambda x, v: x.scatter(-2, GRID[:, :4], v)
    ),
}  # fmt: skip
ADDING: Table = {
    "IndexAddBackward0": [
        *on((3, 4), (3, 4))(
            lambda x, v: x.index_add(0, INDEX, v), lambda x, v: x.index_add(0, INDEX, v, alpha=-2.5)
        ),
        *on((3, 4), (3, 3))(lambda x, v: x.index_add(-1, INDEX, v)),
    ],
    "ScatterAddBackward0": on((3, 4), (2, 4))(
        lambda x, v: x.scatter_add(0, GRID, v), lambda x, v: x.scatter_add(-1, GRID, v)
    ),
    "UnsafeMaskedIndexPutAccumulateBackward0": on((3, 4), (3,))(
        lambda x, v: ATEN._unsafe_masked_index_put_accumulate(x, MASK[0, :3], [INDEX, INDEX], v)
    ),
    "ScatterReduceBackward0": on((3, 4), (2, 4))(
        lambda x, v: x.scatter_reduce(0, GRID, v, "sum"), lambda x, v: x.scatter_reduce(0, GRID, v, "mean"),
        lambda x, v: x.scatter_reduce(-1, GRID, v, "mean", include_self=False),
    ),
    "IndexReduceBackward0": on((3, 4), (3, 4))(
        lambda x, v: x.index_reduce(0, INDEX, v, "mean"),
        lambda x, v: x.index_reduce(0, INDEX, v, "mean", include_self=False),
    ),
}  # fmt: skip
BAG = (torch.tensor([2, 0, 2, 4, 1]), torch.tensor([0, 2, 2]))
BAGS: Table = {
    "EmbeddingBagBackward0": on((5, 3))(
        lambda x: F.embedding_bag(*_bag_of(x), mode="sum"), lambda x: F.embedding_bag(*_bag_of(x), mode="mean"),
        lambda x: F.embedding_bag(*_bag_of(x), mode="mean", padding_idx=2),
        lambda x: F.embedding_bag(*_bag_of(x), mode="sum", scale_grad_by_freq=True),
        lambda x: F.embedding_bag(BAG[0], x, torch.tensor([0, 2, 5]), mode="sum", include_last_offset=True),
        lambda x: F.embedding_bag(BAG[0][:4].view(2, 2), x, mode="mean"),
        lambda x: F.embedding_bag(*_bag_of(x), mode="sum", per_sample_weights=draw(8, 5)),
    ),
}  # fmt: skip
INDEXING = {**READING, **FILLING, **WRITING, **ADDING, **BAGS}


def _bag_of(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return BAG[0], table, BAG[1]


def test_no_operation_is_forgotten() -> None:
    blocked = {name for name, operation in REGISTRY.items() if operation.blocked}
    assert registered(indexing) - blocked == names([INDEXING])


@pytest.mark.parametrize(("name", "example"), cases(INDEXING))
def test_linear_operations(name: str, example: Any) -> None:
    """Also where several values are written to one place."""
    is_of(name, example)
    linear(example)
    passes(example, [draw(1 + i, *shape) for i, shape in enumerate(example.shapes)], matrices(example))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.masked_fill(MASK, 1.5),
        lambda x: x.index_fill(1, INDEX, 1.5),
        lambda x: x.scatter(0, GRID, 1.5),
        lambda x: ATEN._unsafe_masked_index(x, ~MASK[0, :3], [INDEX, INDEX], 1.5),
    ],
)
def test_filled_values_are_constants(function: Callable[[Tensor], Tensor]) -> None:
    x = draw(0, 3, 4)
    m = draw(1, *function(x).shape)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, m)
    constants = (function(torch.zeros_like(x)) * m).sum()
    assert float(constants) != 0
    agrees(explain(function, x, lambda y: (y * m).sum()), x * gradient, {"constants": constants})


# Reductions by index ----------------------------------------------------------------------------------------


def _members(index: Tensor, dim: int, shape: tuple[int, ...], include: bool) -> dict[Any, list[Any]]:
    """For every place of the output what it is made of: ``(operand, place)``."""
    found: dict[Any, list[Any]] = {place: [] for place in itertools.product(*map(range, shape))}
    for place in itertools.product(*map(range, index.shape)):
        goal = list(place)
        goal[dim] = int(index[place])
        found[tuple(goal)].append((1, place))
    for place, members in found.items():
        if include or not members:
            members.insert(0, (0, place))
    return found


def _shares(kind: str, values: list[float], carries: list[bool]) -> list[float]:
    """How much of the result each member holds."""
    if kind == "sum":
        return values
    if kind == "mean":
        return [v / len(values) for v in values]
    if kind == "prod":
        carriers = sum(carries) or len(values)
        whole = float(torch.tensor(values, dtype=torch.float64).prod())
        return [whole / carriers if carry or not any(carries) else 0.0 for carry in carries]
    best = max(values) if kind == "amax" else min(values)
    return [v / values.count(best) if v == best else 0.0 for v in values]


@pytest.mark.parametrize("role", ["input", "constant", "parameter"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("scatter", "sum"), *itertools.product(("scatter", "index"), ("mean", "amax", "amin", "prod"))],
)
def test_reductions_by_index(name: str, kind: str, include: bool, first: bool, role: str) -> None:
    """Against a list of what every output is made of, ties and values equal to a left-out one included. One operand is
    an input and the other plays the role."""
    x, v, m = draw(0, 3, 4), draw(1, 3, 4), draw(2, 3, 4)
    index = torch.tensor([[0, 2, 1, 1], [0, 0, 1, 2], [2, 0, 1, 2]])
    if name == "index":
        index = torch.tensor([2, 0, 2])
    for value, extreme in ((3.0, 0), (-3.0, 1)):  # equal to each other, and to the old value
        x[0, extreme] = x[2, extreme] = v[0, extreme] = v[1, extreme] = v[2, extreme] = value

    def function(x: Tensor, v: Tensor) -> Tensor:
        if name == "index":
            return x.index_reduce(0, index, v, kind, include_self=include)
        return x.scatter_reduce(0, index, v, kind, include_self=include)

    full = index[:, None].expand(3, 4) if name == "index" else index
    signals = (True, True) if role == "input" else (first, not first)
    expected = [torch.zeros(3, 4).double(), torch.zeros(3, 4).double()]
    result = torch.zeros(3, 4).double()
    for place, members in _members(full, 0, (3, 4), include).items():
        values = [float((x, v)[operand][at]) for operand, at in members]
        parts = _shares(kind, values, [signals[operand] for operand, _ in members])
        result[place] = sum(parts)
        for (operand, at), part in zip(members, parts, strict=True):
            expected[operand][at] += part * float(m[place])
    same(function(x, v), result, 1e-13)
    chosen = [i for i in (0, 1) if signals[i]]
    rest = sum(float(expected[i].sum()) for i in (0, 1) if not signals[i])
    wanted = [expected[i] for i in chosen]
    if role == "parameter":
        leaves = [x.requires_grad_(), v.requires_grad_()]
        explanation = relevance((function(*leaves) * m).sum(), [leaves[i] for i in chosen])
        agrees(explanation, wanted, {"parameters": rest}, scale=1.0)
        return

    def model(*given: Tensor) -> Tensor:
        operands = [x, v]
        for i, value in zip(chosen, given, strict=True):
            operands[i] = value
        return function(*operands)

    explanation = explain(model, tuple((x, v)[i] for i in chosen), lambda y: (y * m).sum())
    agrees(explanation, wanted, {"constants": rest}, scale=1.0)


def test_products_by_index_with_zeros() -> None:
    """A single zero has a multiplier and no relevance."""
    x, v = torch.ones(2).double(), torch.tensor([2.0, 0.0, 3.0, 5.0]).double()
    index = torch.tensor([0, 0, 0, 1])
    explanation = explain(lambda x, v: x.scatter_reduce(0, index, v, "prod"), (x, v), torch.sum)
    agrees(explanation, [torch.tensor([0.0, 2.5]).double(), torch.tensor([0.0, 0.0, 0.0, 2.5]).double()])


# Tables -----------------------------------------------------------------------------------------------------


def test_the_padding_row_of_an_embedding_has_relevance() -> None:
    """Training leaves it alone and autograd gives it no gradient; its value takes part all the same."""
    x, m = draw(0, 5, 3), draw(1, 3, 3)
    padded = explain(lambda x: F.embedding(INDEX, x, 0), x, lambda y: (y * m).sum())
    plain = explain(lambda x: F.embedding(INDEX, x), x, lambda y: (y * m).sum())
    agrees(padded, plain.relevance, {"inputs": plain.ledger.output})


def test_maximum_over_a_bag() -> None:
    """Of equal rows one is chosen."""
    x, m = draw(0, 5, 3), draw(1, 3, 3)
    x[0] = x[2]
    explanation = explain(lambda x: F.embedding_bag(*_bag_of(x), mode="max"), x, lambda y: (y * m).sum())
    expected = torch.zeros_like(x)
    for bag, ids in enumerate(([2, 0, 2], [], [4, 1])):
        ids = [[2, 0], [], [2, 4, 1]][bag]
        for column in range(3 if ids else 0):
            best = max(ids, key=lambda i: (float(x[i, column]), -ids.index(i)))
            expected[best, column] += x[best, column] * m[bag, column]
    agrees(explanation, expected)


@pytest.mark.parametrize("signals", ["weights", "table", "both"])
def test_weights_of_a_bag_are_factors(signals: str) -> None:
    table, weights, m = draw(0, 5, 3), draw(1, 5), draw(2, 3, 3)

    def function(table: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(*_bag_of(table), mode="sum", per_sample_weights=weights)

    def written_out(table: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(3, 3).double().index_add(0, torch.tensor([0, 0, 2, 2, 2]), table[BAG[0]] * weights[:, None])

    for constant in (True, False):
        leaves = [table.clone(), weights.clone()]
        wrt = {"weights": [1], "table": [0], "both": [0, 1]}[signals]
        for i in (0, 1):
            leaves[i].requires_grad_(not constant or i in wrt)
        fused = relevance((function(*leaves) * m).sum(), [leaves[i] for i in wrt])
        plain = relevance((written_out(*leaves) * m).sum(), [leaves[i] for i in wrt])
        agrees(fused, plain.relevance, plain.ledger.accounts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "weighed", "mean", "max"])
def test_relevance_per_look_up_in_bags(mode: str, padding: int | None, dtype: torch.dtype) -> None:
    """What each index adds to its bag, and the relevance of all bags in total."""
    table, weights, r = draw(0, 5, 3).to(dtype), draw(1, 5).to(dtype), draw(2, 3, 3).to(dtype)
    traits = {"mode": "sum", "per_sample_weights": weights} if mode == "weighed" else {"mode": mode}
    y = F.embedding_bag(*_bag_of(table.clone().requires_grad_()), padding_idx=padding, **traits)
    assert y.grad_fn is not None
    found = REGISTRY["EmbeddingBagBackward0"].rows(Operands(y.grad_fn), r, table)
    ids, bags = BAG[0].tolist(), [0, 0, 2, 2, 2]
    expected = torch.zeros(5).double()
    kind = {"weighed": "sum", "max": "amax"}.get(mode, mode)
    for bag, column in itertools.product(range(3), range(3)):
        members = [i for i in range(5) if bags[i] == bag and ids[i] != padding]
        values = [float(table[ids[i], column] * (weights[i] if mode == "weighed" else 1)) for i in members]
        if members:
            parts = _shares(kind, values, [True] * len(members))
            for i, part in zip(members, parts, strict=True):
                expected[i] += float(r[bag, column]) * part / sum(parts)
    same(found.double(), expected, 1e-10 if dtype == torch.float64 else 1e-4)
    number(float(found.sum()), (r * (y != 0)).sum(), 1e-10 if dtype == torch.float64 else 1e-4)


def test_what_autograd_cannot_derive_is_blocked() -> None:
    table = draw(0, 5, 3)
    with pytest.raises(UnknownOperationError, match="renormalises"):
        explain(lambda x: torch.embedding_renorm_(x.clone(), INDEX, 1.0, 2.0), table, torch.sum)


class Bagged(nn.Module):
    """Ids in bags, and the same without."""

    def __init__(self, mode: str, plain: bool) -> None:
        super().__init__()
        self.table, self.head, self.plain = nn.EmbeddingBag(9, 4, mode=mode), nn.Linear(4, 3), plain

    def forward(self, ids: Tensor) -> Tensor:
        if not self.plain:
            return self.head(torch.relu(self.table(ids)))
        rows = F.embedding(ids, self.table.weight)
        reduced = {"sum": rows.sum(1), "mean": rows.mean(1), "max": rows.amax(1)}[self.table.mode]
        return self.head(torch.relu(reduced))


@pytest.mark.parametrize("composite", ["attnlrp", "gamma"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_relevance_of_ids_in_bags(mode: str, frozen: bool, composite: str) -> None:
    models = [Bagged(mode, plain).double() for plain in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.tensor([[0, 3, 8, 1], [2, 2, 5, 7]])
    rules = Composite.of("gamma", {"dense": Gamma()}) if composite == "gamma" else composite
    found, expected = (explain(m.requires_grad_(not frozen), ids, 1, composite=rules) for m in models)
    agrees(found, expected.relevance, expected.ledger.accounts)

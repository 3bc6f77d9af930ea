"""Sparse tensors against the same dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import Composite, explain
from dynlrp.rules import REGISTRY, AlphaBeta, Epsilon, Gamma, Rule, WSquare, ZBox, ZPlus
from dynlrp.rules.linear import Flat
from tests.oracle import agrees, draw, same
from tests.test_elementwise import names

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
}
GRAPH = draw(90, 4, 4) * (draw(91, 4, 4) > -0.3)
"""Weights of the edges of a graph of four nodes."""
X, W = draw(92, 4, 3), draw(93, 3, 2)


def weighed(m: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: (y * m).sum()


def whole(x: Tensor) -> Tensor:
    return x if x.layout is torch.strided else x.to_dense()


# Graph networks: the graph is a constant --------------------------------------------------------------------

CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "graph @ x": lambda a, x: a @ x,
    "sparse.mm": torch.sparse.mm,
    "spmm": torch.spmm,
    "x @ graph": lambda a, x: (x.T @ a).T,
    "vector": lambda a, x: (a @ x[:, 0])[:, None],
    "alpha": lambda a, x: torch.sparse.addmm(torch.zeros(4, 3).double(), a, x, beta=0, alpha=-0.5),
}
RULES: dict[str, Rule] = {
    "epsilon=0": Epsilon(),
    "epsilon=0.1": Epsilon(0.1),
    "gamma": Gamma(0.25),
    "gamma, unsigned": Gamma(signed=False),
    "alpha_beta": AlphaBeta(),
    "zplus": ZPlus(),
    "zbox": ZBox(-3.0, 3.0),
    "wsquare": WSquare(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_graph_convolutions(rule: str, kind: str, layout: str) -> None:
    """Two layers of one; every rule equals that of a dense layer."""
    function, composite = CONVOLUTIONS[kind], Composite.of("test", {"dense": RULES[rule]})

    def model(graph: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: function(graph, function(graph, x).relu())

    m = draw(0, *model(GRAPH)(X).shape)
    sparse = explain(model(LAYOUTS[layout](GRAPH)), X, weighed(m), composite=composite)
    dense = explain(model(GRAPH), X, weighed(m), composite=composite)
    agrees(sparse, dense.relevance, dense.ledger.accounts, 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_counts_the_edges(layout: str) -> None:
    """Of a sparse matrix only the entries that are there link inputs to outputs."""
    links = (GRAPH != 0).double()
    explanation = explain(
        lambda x: LAYOUTS[layout](GRAPH) @ x, X, torch.sum, composite=Composite.of("flat", {"dense": Flat(epsilon=0.0)})
    )
    same(explanation.relevance, links.T @ ((GRAPH @ X) / links.sum(1, keepdim=True)))


def test_an_addend_is_a_bias() -> None:
    """One that requires grad takes its share, and so does one that autograd did not record."""
    graph, c, m = GRAPH.to_sparse(), draw(0, 4, 3), draw(1, 4, 3)
    epsilon = Composite.of("epsilon", {"dense": Epsilon(0.1)})

    class Layer(nn.Module):
        def __init__(self, graph: Tensor) -> None:
            super().__init__()
            self.c, self.graph = nn.Parameter(c), graph

        def forward(self, x: Tensor) -> Tensor:
            function = torch.sparse.addmm if self.graph.is_sparse else torch.addmm
            return function(self.c, self.graph, x, beta=2.0, alpha=-0.5)

    sparse = explain(Layer(graph), X, weighed(m), composite=epsilon)
    dense = explain(Layer(GRAPH), X, weighed(m), composite=epsilon)
    agrees(sparse, dense.relevance, dense.ledger.accounts)
    agrees(
        explain(lambda x: torch.sparse.addmm(c, graph, x), X, weighed(m)),
        X * (GRAPH.T @ m),
        {"constants": (m * c).sum()},
    )
    beside = explain(lambda x: torch.sparse.addmm(c, graph, x), X, weighed(m), composite=epsilon)
    plain = explain(lambda x: torch.addmm(c, GRAPH, x), X, weighed(m), composite=epsilon)
    agrees(beside, plain.relevance, plain.ledger.accounts)
    assert beside.ledger.closes
    assert beside.ledger.accounts["constants"] != 0


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, x: a @ x,
    "mean": lambda a, x: a @ x / (a != 0).sum(1, keepdim=True),
    "amax": lambda a, x: torch.where((a != 0)[..., None], a[..., None] * x, -torch.inf).amax(1),
    "amin": lambda a, x: torch.where((a != 0)[..., None], a[..., None] * x, torch.inf).amin(1),
}


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("signals", ["x", "both"])
def test_reductions_over_neighbours(reduce: str, signals: str) -> None:
    m, graph = draw(0, 4, 3), GRAPH.to_sparse_csr()
    leaf = X.clone().requires_grad_()
    y = REDUCTIONS[reduce](GRAPH, leaf)
    (gradient,) = torch.autograd.grad(y, leaf, m)
    same(torch.sparse.mm(graph, X, reduce), y.detach())
    if signals == "x":
        agrees(explain(lambda x: torch.sparse.mm(graph, x, reduce), X, weighed(m)), X * gradient)
    else:
        explanation = explain(lambda a, x: torch.sparse.mm(a, x, reduce), (graph, X), weighed(m))
        same(explanation.relevance[1], X * gradient / 2)
        same(explanation.relevance[0].sum(), (X * gradient / 2).sum())
        assert explanation.ledger.closes


# Sparse signals ---------------------------------------------------------------------------------------------

INDICES = torch.tensor([[0, 0, 1, 3, 0], [2, 1, 3, 0, 2]])
"""The first and the last are the same entry."""
PATHS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    "ToSparseBackward0": (lambda x: x.to_sparse(1).to_dense() @ W, lambda x: x @ W, X),
    "ToSparseBackward1": (lambda x: x.to_sparse() @ W, lambda x: x @ W, X),
    "ToSparseCsrBackward0": (lambda x: x.to_sparse_csr() @ W, lambda x: x @ W, X),
    "ToSparseCscBackward0": (lambda x: x.to_sparse_csc().to_dense() @ W, lambda x: x @ W, X),
    "ToSparseBsrBackward0": (lambda x: x.to_sparse_bsr((2, 1)).to_dense(), lambda x: x * 1, X),
    "ToSparseBscBackward0": (lambda x: x.to_sparse_bsc((2, 1)).to_dense(), lambda x: x * 1, X),
    "ToDenseBackward0": (lambda x: (x.to_sparse() * 2).to_dense() @ W, lambda x: x @ W * 2, X),
    "SparseMaskBackward0": (
        lambda x: x.sparse_mask(GRAPH.to_sparse()) @ X, lambda x: (x * (GRAPH != 0)) @ X, draw(0, 4, 4),
    ),
    "SparseSumBackward0": (lambda x: torch.sparse.sum(x.to_sparse(), 0).to_dense(), lambda x: x.sum(0), X),
    "ValuesBackward0": (lambda x: torch.sparse.sum(x.to_sparse()), lambda x: x.sum(), X),
    "CoalesceBackward0": (
        lambda v: torch.sparse_coo_tensor(INDICES, v, (4, 4)).coalesce().values(),
        lambda v: torch.stack([v[1], v[0] + v[4], v[2], v[3]]),
        draw(1, 5),
    ),
    "SparseCooTensorWithDimsAndTensorsBackward0": (
        lambda v: torch.sparse.mm(torch.sparse_coo_tensor(INDICES, v, (4, 4)), X),
        lambda v: torch.zeros(4, 4).double().index_put(tuple(INDICES), v, accumulate=True) @ X,
        draw(1, 5),
    ),
    "SparseCompressedTensorBackward0": (
        lambda v: torch.sparse.mm(torch.sparse_csr_tensor([0, 2, 3], [1, 2, 0], v, (2, 4)), X),
        lambda v: torch.stack([v[0] * X[1] + v[1] * X[2], v[2] * X[0]]),
        draw(1, 3),
    ),
    "SparseSparseMatmulBackward0": (
        lambda x: torch.sparse.mm(x.to_sparse(), GRAPH.to_sparse()).to_dense(), lambda x: x @ GRAPH, draw(0, 4, 4),
    ),
    "SparseAddmmBackward0": (lambda x: torch.sparse.mm(x.to_sparse(), W), lambda x: x @ W, X),
    "SparseSampledAddmmBackward0": (
        lambda x: torch.sparse.sampled_addmm(x.to_sparse_csr(), x, X @ X.T, beta=2.0, alpha=-0.5).to_dense(),
        lambda x: 2 * x - 0.5 * (x @ X @ X.T) * (GRAPH != 0),
        GRAPH,
    ),
    "SparseSoftmaxBackward0": (
        lambda x: torch.sparse.softmax(x.to_sparse(), 1).to_dense(),
        lambda x: torch.where(GRAPH != 0, x, -torch.inf).softmax(1),
        GRAPH,
    ),
    "SparseLogSoftmaxBackward0": (
        lambda x: torch.sparse.log_softmax(x.to_sparse(), 1).to_dense(),
        lambda x: torch.where(GRAPH != 0, torch.where(GRAPH != 0, x, -torch.inf).log_softmax(1), 0.0),
        GRAPH,
    ),
}  # fmt: skip
"""By way of a sparse tensor, and the same dense, with an input."""


def test_no_sparse_operation_is_forgotten() -> None:
    words = ("Sparse", "ToSparse", "ToDense", "Coalesce", "ValuesBackward0")
    others = {"ValuesBackward0_copy", "SparseMmReduceImplBackward0"}
    assert {name for name in REGISTRY if name.startswith(words)} - others == set(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_sparse_signals(name: str) -> None:
    sparse, dense, x = PATHS[name]
    y = dense(x)
    m = draw(9, *y.shape)
    assert name in names(sparse(x.clone().requires_grad_()))
    expected = explain(dense, x, weighed(m))
    agrees(explain(sparse, x, weighed(m)), expected.relevance, scale=1.0)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_inputs(layout: str) -> None:
    """A bag of words is explained word by word, and its relevance is sparse as it is."""
    bag = LAYOUTS[layout](GRAPH)
    explanation = explain(lambda a: F.relu(a @ X) @ W, bag, torch.sum)
    expected = explain(lambda a: F.relu(a @ X) @ W, GRAPH, torch.sum)
    same(whole(explanation.relevance), expected.relevance)
    assert explanation.ledger.closes
    one, two = explain(torch.sparse.mm, (bag, X), torch.sum).relevance
    first, second = explain(torch.mm, (GRAPH, X), torch.sum).relevance
    same(whole(one), first)
    same(two, second)

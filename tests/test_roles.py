"""Roles are read from the structure of a graph, whoever wrote the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dynlrp import Composite, When, explain, relevance
from dynlrp.graph import Graph
from dynlrp.roles import roles
from dynlrp.rules import VJP, Operation, Rule
from dynlrp.rules.operation import Grads, Step
from tests.conftest import calls
from tests.oracle import agrees, draw, same
from tests.test_product import gelu_erf, gelu_tanh, gelu_tanh_factors


class Spy(Rule):
    """Notes which operations it was chosen for, with the operand that gates."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None]] = []

    def operands(self, operation: Operation, gate: int | None) -> str:
        self.seen.append((operation.name, gate))
        return operation.operands

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return VJP()(step, grads)


def found(model: Callable[..., Tensor], *inputs: Tensor) -> dict[str, list[tuple[str, int | None]]]:
    """Operations by role."""
    spies = {role: Spy() for role in NOTHING}
    for role, spy in spies.items():
        explain(model, inputs, torch.sum, composite=Composite.of(role, {When(role=role): spy}))
    return {role: sorted(set(spy.seen)) for role, spy in spies.items()}


NOTHING: dict[str, list[tuple[str, int | None]]] = {"attention": [], "gate": [], "self gate": [], "transition": []}
X, Y = draw(0, 2, 3), draw(1, 2, 3)


@pytest.mark.parametrize("gate", [torch.sigmoid, F.silu, F.gelu, torch.tanh, F.hardsigmoid])
@pytest.mark.parametrize("left", [True, False])
def test_gates(gate: Callable[[Tensor], Tensor], left: bool) -> None:
    played = found((lambda a, b: gate(b) * a) if left else (lambda a, b: a * gate(b)), X, Y)
    assert played == {**NOTHING, "gate": [("MulBackward0", 0 if left else 1)]}


@pytest.mark.parametrize(
    "model",
    [
        lambda a, b: a * torch.sigmoid(b).view(3, 2).reshape(2, 3),
        lambda a, b: a * torch.sigmoid(b)[:, :1],
        lambda a, b: a * torch.sigmoid(b[:, :1]).expand(2, 3).unsqueeze(0).squeeze(0),
    ],
    ids=["view", "slice", "expand"],
)
def test_a_gate_may_be_moved_about(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(model, X, Y)["gate"] == [("MulBackward0", 1)]


@pytest.mark.parametrize(
    "model",
    [
        lambda a, b: a * b,
        lambda a, b: a * b.relu(),
        lambda a, b: a * 2.0 + torch.sigmoid(b) * 3.0,
        lambda a, b: a * torch.sigmoid(b.detach()),
        lambda a, b: a * a + b * b,
        lambda a, b: torch.sigmoid(a) + torch.sigmoid(b),
        lambda a, b: a * (torch.sigmoid(b) + b),
        lambda a, b: a * F.normalize(F.silu(b), dim=-1),
        lambda a, b: a @ torch.sigmoid(b).t(),
    ],
)
def test_other_products_are_no_gates(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(model, X, Y) == NOTHING


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_gates_the_one_that_is_never_negative(swapped: bool) -> None:
    """The input gate of an LSTM, whichever is written first."""

    def model(a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(a) * torch.sigmoid(b) if swapped else torch.sigmoid(b) * torch.tanh(a)

    assert found(model, X, Y) == {**NOTHING, "gate": [("MulBackward0", 1 if swapped else 0)]}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "share",
    [
        lambda z: 1 - z.sigmoid(),
        lambda z: torch.ones(2, 3, dtype=z.dtype) - z.sigmoid(),
        lambda z: 1 + z.sigmoid(),
        lambda z: (-z.sigmoid()).add(1.0).view(3, 2).reshape(2, 3),
        lambda z: 2 * z.sigmoid() / 3,
        lambda z: z.sigmoid().clamp(0.1, 0.9),
        lambda z: z.sigmoid().clamp(min=torch.tensor(0.1, dtype=z.dtype)),
        lambda z: torch.where(torch.tensor([True, False, True]), z.sigmoid(), 0.0),
    ],
    ids=["rsub", "sub", "one more", "negated", "scaled", "clamp", "clamp by a tensor", "where"],
)
def test_a_gate_through_constants(share: Callable[[Tensor], Tensor], swapped: bool) -> None:
    """The gate is a coefficient under CP-LRP, also before a tanh, whatever constants it was put together with."""

    def model(z: Tensor, n: Tensor) -> Tensor:
        return torch.tanh(n) * share(z) if swapped else share(z) * torch.tanh(n)

    assert found(model, X, Y) == {**NOTHING, "gate": [("MulBackward0", int(swapped))]}
    gate, signal = explain(model, (X, Y), torch.sum, composite="cplrp").relevance
    assert gate is None
    same(signal, share(X) * torch.tanh(Y))


def test_a_gru_as_the_papers_write_it() -> None:
    """The state h = (1 - z) n + z h is the GRU that PyTorch writes n + z (h - n)."""
    gru = nn.GRU(4, 3, batch_first=True).double().eval()

    def written(x: Tensor) -> Tensor:
        h = torch.zeros(2, 3, dtype=x.dtype)
        for t in range(x.shape[1]):
            r, z, n = F.linear(x[:, t], gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, -1)
            r_h, z_h, n_h = F.linear(h, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
            z = (z + z_h).sigmoid()
            h = (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h
        return h

    x = draw(0, 2, 5, 4)
    fused = explain(lambda x: gru(x)[0][:, -1], x, torch.sum, composite="cplrp")
    agrees(explain(written, x, torch.sum, composite="cplrp"), fused.relevance)


@pytest.mark.parametrize("composite", ["auto", "cplrp"])
@pytest.mark.parametrize(
    "gate",
    [
        torch.sigmoid,
        lambda z: 1 - z.sigmoid(),
        lambda z: 2 * F.silu(z),
        lambda z: torch.softmax(z, -1),
        lambda z: torch.softmax(z, -1).topk(3, -1).values,
        lambda z: torch.exp(-z),
        torch.sin,
    ],
    ids=["sigmoid", "one less", "silu", "softmax", "router", "decay", "none"],
)
def test_roles_reach_into_operations_that_are_expanded(gate: Callable[[Tensor], Tensor], composite: str) -> None:
    """Fused products know what their operands are, as products that are written out do."""
    zero = torch.zeros(2, 3, dtype=torch.float64)
    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
        "addcmul": (lambda z, n: torch.addcmul(zero, gate(z), n.tanh()), lambda z, n: gate(z) * n.tanh()),
        "swapped": (lambda z, n: torch.addcmul(n, n.sin(), gate(z)), lambda z, n: n + n.sin() * gate(z)),
        "lerp": (lambda z, n: torch.lerp(zero, n.tanh(), gate(z)), lambda z, n: gate(z) * n.tanh()),
        "between": (
            lambda z, n: torch.lerp(n.cos(), n.sin(), gate(z)),
            lambda z, n: n.cos() + gate(z) * (n.sin() - n.cos()),
        ),
    }
    for fused, written in ways.values():
        ours, expected = (explain(f, (X, Y), torch.sum, composite=composite) for f in (fused, written))
        assert ours.ledger.closes
        for found, wanted in zip(ours.relevance, expected.relevance, strict=True):
            same(*(torch.zeros_like(X) if r is None else r for r in (found, wanted)))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True]])])
def test_a_state_that_decays(swapped: bool, mask: Tensor | None) -> None:
    """Relevance goes to the state alone: exp(-b) is a coefficient (MambaLRP)."""

    def model(a: Tensor, b: Tensor) -> Tensor:
        decay = torch.exp(-b)[:, :]
        decay = decay if mask is None else decay * mask
        return a * decay if swapped else decay * a

    assert ("MulBackward0", 1 if swapped else 0) in found(model, X, Y)["transition"]
    a, b = explain(model, (X, Y), torch.sum).relevance
    same(a, X * torch.exp(-Y) * (1 if mask is None else mask))
    assert b is None or not b.any()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_state_that_decays_over_many_steps(swapped: bool) -> None:
    """Mamba-2's scan by matrix products is explained as the recurrence step by step."""

    def recurrence(x: Tensor, a: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = state * torch.exp(a[:, t, None]) + x[:, t]
            states.append(state)
        return torch.stack(states, 1)

    def scan(x: Tensor, a: Tensor) -> Tensor:
        total = a.cumsum(1)
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        decay = torch.exp((total[:, :, None] - total[:, None]).masked_fill(~mask, -torch.inf))
        return (x.mT @ decay.mT).mT if swapped else decay @ x

    x, a, m = draw(0, 2, 5, 3), -draw(1, 2, 5).abs(), draw(2, 2, 5, 3)
    expected = explain(recurrence, (x, a), lambda y: (y * m).sum())
    agrees(explain(scan, (x, a), lambda y: (y * m).sum()), expected.relevance[0])
    assert found(scan, x, a) == {**NOTHING, "transition": [("BmmBackward0", 1 if swapped else 0)]}


def test_a_decay_over_many_steps_beside_an_activation() -> None:
    """The decay is the coefficient, also where the signal comes through what could be a gate."""
    played = found(lambda a, b: F.silu(a) * torch.exp(b.cumsum(1)[:, -1:] - b.cumsum(1)), X, Y)
    assert played == {**NOTHING, "transition": [("MulBackward0", 1)]}


def test_exponentials_of_scores_are_no_transition() -> None:
    """Attention with an exponential kernel, which divides behind the product."""

    def model(q: Tensor, k: Tensor) -> Tensor:
        weights = torch.exp(q @ k.mT)
        return (weights @ k) / weights.sum(-1, keepdim=True)

    assert found(model, draw(0, 2, 4, 3), draw(1, 2, 4, 3)) == NOTHING


@pytest.mark.parametrize(
    ("model", "gate"),
    [
        (lambda x: x * torch.sigmoid(x), 1),
        (lambda x: torch.sigmoid(x) * x, 0),
        (lambda x: x * torch.sigmoid(1.702 * x), 1),
        (gelu_tanh, 1),
        (gelu_tanh_factors, 1),
        (gelu_erf, 1),
        (lambda x: x * torch.tanh(F.softplus(x)), 1),
        (lambda x: x * F.relu6(x + 3) / 6, 1),
        (lambda x: 2 * x * torch.tanh(x / 3), 1),
    ],
    ids=["silu", "silu swapped", "quick gelu", "gelu tanh", "gelu factored", "gelu erf", "mish", "hardswish", "scaled"],
)
def test_activations_that_gate_themselves(model: Callable[[Tensor], Tensor], gate: int) -> None:
    played = found(model, X)
    assert ("MulBackward0", gate) in played["self gate"]
    assert played["gate"] == []
    assert played["attention"] == []


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x * x,
        lambda x: x * (x + 1).mean(),
        lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
        lambda x: x * torch.softmax(x, -1),
        lambda x: x * torch.sigmoid(x @ x.t() @ x),
        lambda x: x * torch.sigmoid(x.flip(0)),
    ],
    ids=["square", "mean", "squeeze and excitation", "softmax", "matmul", "flip"],
)
def test_a_function_of_other_entries_is_no_self_gate(model: Callable[[Tensor], Tensor]) -> None:
    assert found(model, X)["self gate"] == []


def test_squeeze_and_excitation_is_a_gate() -> None:
    """A channel's weight comes from all channels through a sigmoid."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.mix(x.mean((2, 3))))[:, :, None, None]

    assert found(Block(), draw(0, 2, 3, 4, 4)) == {**NOTHING, "gate": [("MulBackward0", 1)]}


@pytest.mark.parametrize(
    ("model", "product"),
    [
        (lambda q, k: torch.softmax(q @ k.transpose(-1, -2), -1) @ k, "BmmBackward0"),
        (lambda q, k: torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), k), "BmmBackward0"),
        (lambda q, k: torch.einsum("bls,bsd->bld", torch.softmax(q @ k.transpose(-1, -2), -1), k), "BmmBackward0"),
        (lambda q, k: F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.0, False) @ k, "BmmBackward0"),
        (lambda q, k: torch.softmax(q @ k.transpose(-1, -2), -1).unsqueeze(1).squeeze(1) @ k, "BmmBackward0"),
        (lambda q, k: k.transpose(1, 2) @ torch.softmax(q @ k.transpose(-1, -2), -1).transpose(1, 2), "BmmBackward0"),
        (lambda q, k: (torch.softmax((q * k).sum(-1, keepdim=True), 1) * k).sum(1), "MulBackward0"),
    ],
    ids=["matmul", "bmm", "einsum", "dropout", "views", "transposed", "pooling"],
)
def test_attention(model: Callable[[Tensor, Tensor], Tensor], product: str) -> None:
    played = found(model, draw(0, 2, 4, 3), draw(1, 2, 4, 3))
    assert played["attention"] == [(product, None), ("SoftmaxBackward0", None)]
    assert played["gate"] == played["self gate"] == []


@pytest.mark.parametrize(
    "model",
    [
        lambda q, k: torch.softmax(q @ k.transpose(-1, -2), -1),
        lambda q, k: torch.softmax(q, -1) + k,
        lambda q, k: torch.softmax(q, -1).log() + k,
        lambda q, k: torch.softmax(q, -1) * 2.0 + k,
    ],
    ids=["scores", "sum", "log", "scaled"],
)
def test_a_softmax_that_weighs_nothing_has_no_role(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(model, draw(0, 2, 4, 3), draw(1, 2, 4, 3))["attention"] == []


class Scaled(nn.Module):
    """Attention or a gate times a factor, as a parameter or as a buffer."""

    def __init__(self, kind: str, factor: Tensor, parameter: bool) -> None:
        super().__init__()
        self.kind = kind
        if parameter:
            self.factor = nn.Parameter(factor)
        else:
            self.register_buffer("factor", factor)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(x @ x.mT, -1)
        written = {
            "attention": lambda: (p * self.factor) @ v,
            "divided": lambda: (p / (1 + self.factor)) @ v,
            "shifted": lambda: (p + self.factor) @ v,
            "differential": lambda: (p - self.factor * torch.softmax(2 * x @ x.mT, -1)) @ v,
            "gate": lambda: (x.sigmoid() * self.factor[:3]) * v,
            "one less": lambda: (1 - self.factor[:3] * x.sigmoid()) * v.tanh(),
            "alone": lambda: x.sigmoid() * self.factor[:3] + v,
            "matrix": lambda: p @ self.factor[:, None] + v,
            "swish": lambda: x * torch.sigmoid(self.factor[:3] * x) + v,
            "decay": lambda: v * (self.factor[:3] * torch.exp(-x)),
            "router": lambda: v * (self.factor * (q := p.topk(4, -1).values) / q.sum(-1, keepdim=True))[..., :1],
        }
        return written[self.kind]()


@pytest.mark.parametrize("composite", ["auto", "cplrp"])
@pytest.mark.parametrize(
    "kind",
    [
        "attention",
        "divided",
        "shifted",
        "differential",
        "gate",
        "one less",
        "alone",
        "matrix",
        "swish",
        "decay",
        "router",
    ],
)
def test_a_parameter_has_the_roles_of_a_buffer(kind: str, composite: str) -> None:
    """Whether autograd recorded a constant factor makes no difference to the relevance of the inputs."""
    x, v, factor = draw(0, 2, 4, 3), draw(1, 2, 4, 3), draw(2, 4).abs()
    expected = explain(Scaled(kind, factor, parameter=False), (x, v), torch.sum, composite=composite)
    trained = Scaled(kind, factor, parameter=True)
    for model in (trained, Scaled(kind, factor, parameter=True).requires_grad_(False)):
        shares = explain(model, (x, v), torch.sum, composite=composite)
        leaves = [t.clone().requires_grad_() for t in (x, v)]
        recorded = relevance(model(*leaves).sum(), leaves, composite=composite)
        for found in (shares, recorded):
            assert found.ledger.closes or found.ledger.unresolved  # a graph alone may lack a constant
            for ours, wanted in zip(found.relevance, expected.relevance, strict=True):
                assert (ours is None) == (wanted is None)
                if wanted is not None:
                    same(ours, wanted)


@pytest.mark.parametrize(
    "weights",
    [
        lambda p: p * torch.tensor([1.0, 0.5, 0.0, 1.0], dtype=p.dtype),
        lambda p: p * 0.5,
        lambda p: p / 2,
        lambda p: -p,
        lambda p: torch.where(torch.ones(4, 4).tril().bool(), p, 0.0),
        lambda p: p.masked_fill(torch.ones(4, 4).triu(1).bool(), 0.0),
        lambda p: p.clamp(min=1e-2),
        lambda p: p + 1e-2,
        lambda p: p.tril(),
        lambda p: (m := p.tril()) / m.sum(-1, keepdim=True),
        lambda p: p - 0.3 * torch.softmax(2 * p, -1),
        lambda p: torch.cat([p[..., :2], p[..., 2:]], -1),
        lambda p: torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, torch.softmax(p.topk(2, -1).values, -1)),
    ],
    ids=["head mask", "half", "divided", "negative", "where", "filled", "clamp", "epsilon", "tril", "renormalised",
         "differential", "joined", "scattered"],
)  # fmt: skip
def test_attention_weights_through_constants(weights: Callable[[Tensor], Tensor]) -> None:
    """Under CP-LRP they are coefficients, and the values take all."""
    q, v = draw(0, 2, 4, 3), draw(1, 2, 4, 3)

    def model(q: Tensor, v: Tensor) -> Tensor:
        return weights(torch.softmax(q @ q.mT, -1)) @ v

    scores, values = explain(model, (q, v), torch.sum, composite="cplrp").relevance
    assert scores is None
    same(values, v * weights(torch.softmax(q @ q.mT, -1)).sum(1)[..., None])


@pytest.mark.parametrize(
    "model",
    [
        lambda q, v: (torch.softmax(q @ q.mT, -1) + q @ q.mT) @ v,
        lambda q, v: (torch.softmax(q @ q.mT, -1) @ torch.ones(4, 4, dtype=q.dtype)) @ v,
        lambda q, v: torch.softmax(q @ q.mT, -1).log() @ v,
    ],
    ids=["sum with scores", "matrix", "log"],
)
def test_functions_of_a_softmax_are_no_weights(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(model, draw(0, 2, 4, 3), draw(1, 2, 4, 3))["attention"] == []


def test_roles_are_read_in_linear_time() -> None:
    """Long chains of rearrangements and multiples that many products begin from."""

    def work(count: int) -> int:
        x = draw(0, 1, 2).requires_grad_()
        gate = torch.sigmoid(x)
        for _ in range(count):
            gate = (gate * 1.0).view(1, 2)
        y = x
        for _ in range(count):
            y = y * gate
        graph = Graph(y.grad_fn)
        source = graph.edge(*get_gradient_edge(x)[:2])
        assert source is not None

        def read() -> None:
            assert len(roles(graph, [source])) == count

        return calls(read)

    assert work(2000) < 11 * work(200)


def test_a_softmax_times_a_constant_matrix() -> None:
    """Class probabilities times fixed ratings: a linear layer, and the softmax keeps its relevance under CP-LRP."""
    x, ratings = draw(0, 2, 5), draw(1, 5, 1)
    p = torch.softmax(x, -1)
    expected = x * p * (ratings.t() - (p @ ratings))
    for composite in ("attnlrp", "cplrp"):
        same(explain(lambda x: torch.softmax(x, -1) @ ratings, x, 0, composite=composite).relevance, expected)


def _scattered(x: Tensor) -> Tensor:
    value, place = torch.topk(x, 2, -1)
    return torch.zeros_like(x).scatter_(-1, place, torch.softmax(value, -1))


def _bounded(x: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    return 2.5 * p / (p.sum(-1, keepdim=True) + 1e-20).clamp(min=1e-3)


@pytest.mark.parametrize(
    "router",
    [
        lambda x: torch.softmax(x, -1).topk(2, -1).values,
        lambda x: (p := torch.softmax(x, -1).topk(2, -1).values) / p.sum(-1, keepdim=True),
        lambda x: F.normalize(torch.softmax(x, -1), 1.0, -1),
        lambda x: torch.softmax(x.topk(2, -1).values, -1)[:, [1, 0]],
        _scattered,
        lambda x: _scattered(x)[[0, 1]],
        lambda x: torch.sigmoid(x).gather(-1, torch.tensor([[2, 1], [0, 1]])) * 3.0,
        _bounded,
    ],
    ids=["chosen", "sum", "norm", "of the chosen", "scattered", "indexed", "sigmoid", "bounded"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_router_is_a_gate(router: Callable[[Tensor], Tensor], swapped: bool) -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        p = router(x)[:, 0:1]
        return y * p if swapped else p * y

    played = found(model, X, Y)
    assert played["gate"] == [("MulBackward0", int(swapped))]
    assert played["attention"] == []


@pytest.mark.parametrize(
    "model",
    [
        lambda x, y: (torch.softmax(x, -1) / y) * x,
        lambda x, y: (x / x.sum(-1, keepdim=True)) * y,
        lambda x, y: (torch.softmax(x, -1).topk(2, -1).values + y[:, :2]) * y[:, :2],
    ],
    ids=["divided by another", "no softmax", "a sum"],
)
def test_other_quotients_are_no_routers(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(model, X, Y.abs() + 1)["gate"] == []


@pytest.mark.parametrize("statistic", ["rsqrt", "sqrt", "norm", "sum"])
def test_statistics_carry_nothing(statistic: str) -> None:
    """What a tensor is divided by is a coefficient, also where it comes from a second tensor."""
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "rsqrt": lambda a, b: a * torch.rsqrt(b.pow(2).mean(-1, keepdim=True) + 1e-6),
        "sqrt": lambda a, b: a / b.pow(2).mean(-1, keepdim=True).sqrt(),
        "norm": lambda a, b: a / b.norm(dim=-1, keepdim=True),
        "sum": lambda a, b: a / b.exp().sum(-1, keepdim=True),
    }
    m = draw(2, 2, 3)
    explanation = explain(functions[statistic], (X, Y), lambda y: (y * m).sum())
    same(explanation.relevance[0], functions[statistic](X, Y) * m)
    assert explanation.relevance[1] is None or not explanation.relevance[1].any()
    assert explanation.ledger.closes


def test_roles_do_not_depend_on_names_or_depth() -> None:
    """A hundred gated blocks: every gate is found, and its relevance is that of blocks written with the fused silu."""
    weights = [draw(i, 4, 4) / math.sqrt(4) for i in range(100)]

    def model(x: Tensor, silu: Callable[[Tensor], Tensor]) -> Tensor:
        for w in weights:
            x = x + 0.1 * silu(x @ w)
        return x

    x = draw(200, 2, 4)
    fused = explain(lambda x: model(x, F.silu), x, torch.sum)
    written = explain(lambda x: model(x, lambda h: h * torch.sigmoid(h)), x, torch.sum)
    agrees(written, fused.relevance, fused.ledger.accounts)

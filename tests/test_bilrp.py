"""Second-order relevance against the explicit propagation of pairs, and against Hessian times both inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import Composite, InputError, bilrp, explain
from dynlrp.rules import Epsilon, Gamma, ZPlus
from tests import oracle
from tests.conftest import bias_free, close, sample

NET = bias_free(6, 5, 4, seed=3)
A, B = oracle.draw(1, 2, 6), oracle.draw(2, 2, 6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_without_biases_it_is_hessian_times_both_inputs(similarity: Any) -> None:
    """The exact rules follow the derivative, in both inputs at once (Eberle et al. 2020, section 3)."""
    found = bilrp(NET, A, B, similarity=similarity, composite="attnlrp")
    for n, (a, b) in enumerate(zip(A, B, strict=True)):
        scale = 1.0 if similarity == "dot" else (NET(a).norm() * NET(b).norm()).item()

        def score(a: Tensor, b: Tensor, scale: float = scale) -> Tensor:
            return NET(a) @ NET(b) / scale

        hessian: Any = torch.autograd.functional.hessian(score, (a, b))  # type: ignore[no-untyped-call]
        close(found.relevance[n], hessian[0][1] * a[:, None] * b[None, :])
        close(found.value[n], score(a, b).detach())
    close(found.relevance.sum((1, 2)), found.value)


def pairs(weights: list[Tensor], a: Tensor, b: Tensor, share: Any) -> Tensor:
    """Pairs of neurons from the output down: R_ij = sum_kl share_a[i, k] share_b[j, l] R_kl (their eq. 4), written as
    loops. ``share(x, weight)`` is the matrix of shares of one layer."""
    inputs = [[x] for x in (a, b)]
    for layer in inputs:
        for number, w in enumerate(weights):
            z = layer[-1] @ w
            layer.append(z if number == len(weights) - 1 else z.relu())
    r = torch.diag(inputs[0][-1] * inputs[1][-1])
    for number in range(len(weights) - 1, -1, -1):
        first, second = (share(layer[number], weights[number]) for layer in inputs)
        below = torch.zeros(len(first), len(second), dtype=torch.float64)
        for i, j in ((i, j) for i in range(len(first)) for j in range(len(second))):
            for k, m in ((k, m) for k in range(first.shape[1]) for m in range(second.shape[1])):
                below[i, j] += first[i, k] * second[j, m] * r[k, m]
        r = below
    return r


def shares(rule: Any) -> Any:
    def share(x: Tensor, w: Tensor) -> Tensor:
        layer = oracle.Dense(w, torch.zeros(w.shape[1], dtype=torch.float64), w != 0)
        return rule(layer, x, torch.ones(w.shape[1], dtype=torch.float64))[:-1]

    return share


@pytest.mark.parametrize(
    ("rule", "table"),
    [
        (Epsilon(0.1), lambda layer, x, r: oracle.epsilon(layer, x, r, epsilon=0.1)),
        (Gamma(0.5), lambda layer, x, r: oracle.gamma(layer, x, r, gamma=0.5)),
        (ZPlus(), oracle.z_plus),
    ],
    ids=["epsilon", "gamma", "zplus"],
)
def test_explicit_propagation_of_pairs(rule: Any, table: Any) -> None:
    weights = [layer.weight.detach().T for layer in NET if isinstance(layer, nn.Linear)]
    found = bilrp(NET, A, B, composite=Composite.of("test", {"dense": rule}))
    for n in range(2):
        close(found.relevance[n], pairs(weights, A[n], B[n], shares(table)), 1e-10)


@pytest.mark.parametrize("chunk", [None, 3])
def test_tokens(chunk: int | None) -> None:
    """Two sentences of different lengths: the matrix is the product of what each dimension gives."""
    model, inputs, _ = sample("minilm")

    def embed(**given: Tensor) -> Tensor:
        return model.bert(**given).last_hidden_state[:, 0, :6]  # type: ignore[no-any-return, union-attr, operator]

    short = {"input_ids": inputs["input_ids"][:, :4]}
    long = {"input_ids": inputs["input_ids"].flip(0)}
    found = bilrp(embed, short, long, chunk=chunk)
    assert found.relevance.shape == (2, 4, 7)
    expected = torch.zeros(2, 4, 7, dtype=torch.float64)
    for k in range(6):
        one, other = (explain(embed, given, k).relevance["input_ids"] for given in (short, long))
        expected += one[:, :, None] * other[:, None, :]
    close(found.relevance, expected, 1e-12)
    close(found.value, (embed(**short) * embed(**long)).sum(1).detach())


def test_positions_of_pictures() -> None:
    model, inputs, _ = sample("vgg")
    pixels = bilrp(model, inputs, inputs.flip(0))
    assert pixels.relevance.shape == (2, 256, 256)

    def patches(r: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(r.sum(1), 4).flatten(1) * 16

    found = bilrp(model, inputs, inputs.flip(0), positions=patches)
    blocks = pixels.relevance.reshape(2, 4, 4, 4, 4, 4, 4, 4, 4).sum((2, 4, 6, 8)).reshape(2, 16, 16)
    close(found.relevance, blocks, 1e-10)


def test_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="similarity"):
        bilrp(NET, A, B, similarity="euclid")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no dot product"):
        bilrp(NET, A, B[:1])
    with pytest.raises(InputError, match="must return"):
        bilrp(NET, A, B, positions=lambda r: r.sum(1))

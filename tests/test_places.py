"""Tensors inside a model by name: inputs of modules, and what attention makes, fused or written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import COMPOSITES, Explanation, InputError, Part, explain, explain_many, relevance
from tests import oracle
from tests.conftest import close, same, sample
from tests.peers import models as peers

KINDS = ("query", "key", "value", "heads")


class Heads(nn.Module):
    """Attention of three heads that keeps its tensors."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.into, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.into(x).reshape(batch, length, 3, 3, 2).permute(2, 0, 3, 1, 4)
        if self.way == "fused":
            o = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.way == "einsum":
            weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 2**-0.5).softmax(-1)
            o = torch.einsum("bhij,bhjd->bhid", weights, v)
        elif self.way == "merged":
            q, k, v = (t.reshape(batch * 3, length, 2) for t in (q, k, v))
            o = nn.Softmax(-1)(torch.bmm(q / 2**0.5, k.mT)) @ v
        elif self.way == "by hand":
            powers = ((q @ k.mT) / 2**0.5).exp()
            weights = powers / powers.sum(-1, keepdim=True)
            o = weights @ v
            self.kept["weights"] = weights
        else:
            weights = ((q @ k.mT) / 2**0.5).softmax(-1)
            self.kept["weights"] = weights
            o = weights @ v
        self.kept |= {"query": q, "key": k, "value": v, "heads": o}
        return self.out(o.reshape(batch, 3, length, 2).transpose(1, 2).reshape(batch, length, 6))


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.attention = Heads(way)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x)).mean(1))


X = oracle.draw(2, 2, 5, 6)


def net(way: str) -> Net:
    return peers.randomise(Net(way), 3).double()  # type: ignore[return-value]


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("way", ["fused", "einsum", "merged", "by hand", "plain"])
def test_attention_in_every_way_of_writing_it(way: str, composite: str) -> None:
    """The relevance is that of the tensors themselves, kept by the module."""
    model = net(way)
    kinds = (*KINDS, "weights") if way in ("by hand", "plain") else KINDS
    found = explain(model, X, 2, composite=composite, layers=[f"att*:{kind}" for kind in kinds])
    x = X.clone().requires_grad_()
    score = model(x)[:, 2]
    if composite == "cplrp":  # these are coefficients
        assert all(found.layers[f"attention:{kind}"] is None for kind in kinds if kind not in ("value", "heads"))
        kinds = ("value", "heads")
    kept = [model.attention.kept[kind] for kind in kinds]
    wanted = relevance(score, [x, *kept], composite=composite).relevance
    close(found.relevance, wanted[0])
    for kind, tensor, expected in zip(kinds, kept, wanted[1:], strict=True):
        r = found.layers[f"attention:{kind}"]
        assert r.shape == (2, 3, *tensor.shape[-2:])
        close(r, expected.reshape(r.shape))
        assert found.axes[f"attention:{kind}"] == 1
        assert found.by_channel(f"attention:{kind}").shape == (2, 3)


def test_a_fused_kernel_makes_no_weights() -> None:
    with pytest.raises(InputError, match=r"a fused kernel makes no weights.*'attention:heads'"):
        explain(net("fused"), X, 2, layers="attention:weights")
    with pytest.raises(InputError, match="no tensor of an attention is called 'head:query'"):
        explain(net("fused"), X, 2, layers="head:query")


@pytest.mark.parametrize("way", ["fused", "merged", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_conditions_on_heads(way: str, kind: str) -> None:
    """Over all heads they add up; one alone is a mask on the module's own tensor."""
    model = net(way)
    name = f"attention:{kind}"
    whole, none = explain(model, X, 1), explain(model, X, 1, condition={name: []})
    each = explain_many(model, X, [1], conditions=[{name: n} for n in range(3)])
    for one in each:
        assert one.ledger.closes
    close(sum(one.relevance - none.relevance for one in each) + none.relevance, whole.relevance, 1e-12)  # type: ignore[arg-type]
    assert float((each[0].relevance - none.relevance).abs().max()) > 1e-3
    if kind == "heads" and way == "plain":
        joined = explain(model, X, 1, condition={"attention.out:input": Part([2, 3])})
        same(joined, each[1], 1e-12)


def test_positions_of_keys_stand_where_positions_stand() -> None:
    """In the product with the queries they are columns."""
    model = net("plain")
    only = explain(model, X, 1, layers="attention:key", condition={"attention:key": Part(3, axis=2)})
    r = only.layers["attention:key"]
    assert r[:, :, 3].any()
    assert not r[:, :, [0, 1, 2, 4]].any()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_fused_and_written_out(name: str) -> None:
    model, inputs, target = sample(name)
    found: list[Explanation] = []
    for way in ("sdpa", "eager"):
        model.set_attn_implementation(way)
        found.append(explain(model, inputs, target, composite="attnlrp", layers=[f"*:{kind}" for kind in KINDS]))
    model.set_attn_implementation("sdpa")
    fused, plain = found
    assert list(fused.layers) == list(plain.layers)
    assert len(fused.layers) == 2 * len(KINDS)
    tolerance = 1e-6 if name == "llama" else 1e-10  # written out, its softmax is in float32
    for layer, r in fused.layers.items():
        written_out = plain.layers[layer]
        assert written_out.shape[:2] == (2, 4)
        close(r.sum(1), written_out.sum(1), tolerance)
        if r.shape[1] == 4:  # fused kernels may take fewer keys and values
            close(r, written_out, tolerance)


@pytest.mark.parametrize("fused", [True, False])
def test_multihead_attention(fused: bool) -> None:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=not fused)[0].sum(1)

    model = peers.randomise(Self(), 5).double()
    kinds = KINDS if fused else (*KINDS, "weights")
    found = explain(model, X, 0, layers=[f"attention:{kind}" for kind in kinds])
    assert {name: tuple(r.shape) for name, r in found.layers.items()} == {
        f"attention:{kind}": (2, 3, 5, 5 if kind == "weights" else 2) for kind in kinds
    }


class Keywords(nn.Module):
    """Given its states by keyword, behind a mask that needs no relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 6)

    def forward(self, mask: Tensor, *, states: Tensor) -> Tensor:
        return self.line(states) * mask


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), Keywords(), nn.Linear(6, 3)
        self.hidden = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x).relu()
        return self.last(self.hidden + self.inner(torch.ones(6), states=self.hidden)).sum(1)


def test_the_input_of_a_module() -> None:
    model = peers.randomise(Inputs(), 6).double()
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    found = explain(model, X, 1, layers=["inner:input", "l*:input", "first:input"])
    assert list(found.layers) == ["inner:input", "last:input", "first:input"]
    x = X.clone().requires_grad_()
    score = model(x)[:, 1]
    wanted = relevance(score, [x, model.hidden]).relevance
    close(found.layers["inner:input"], wanted[1])
    close(found.layers["first:input"], wanted[0])
    close(found.relevance, wanted[0])
    assert hooks == {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    none = explain(model, X, 1, condition={"first:input": []})
    assert not none.relevance.any()
    assert none.ledger.closes
    assert none.ledger.accounts["inputs"] == 0


def test_hooks_are_gone_after_an_error() -> None:
    model = net("plain")
    before = dict(model.head._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="shapes"):
        explain(model, torch.ones(2, 5, 7, dtype=torch.float64), 0, layers="head:input")
    assert dict(model.head._forward_pre_hooks) == before


# Tensors of a graph that exists already.


def score(h: Tensor) -> Tensor:
    return (h * torch.arange(1.0, h.shape[-1] + 1, dtype=h.dtype)).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.exp(),
        lambda x: x.exp()[:, 1:3],
        lambda x: x.exp().view(4, 3),
        lambda x: x.exp().mT.reshape(-1),
        lambda x: (x * 2).add_(1),
        lambda x: x.exp().expand(2, 3, 4),
        lambda x: x.exp().unbind(1)[2],
    ],
)
def test_tensors_that_are_no_leaves(make: Any) -> None:
    """A linear score: relevance of ``h`` is its own terms."""
    x = oracle.draw(0, 3, 4).requires_grad_()
    h = make(x)
    found = relevance(score(h), [h, x])
    close(found.relevance[0], (h * torch.arange(1.0, h.shape[-1] + 1, dtype=h.dtype)).detach())
    assert found.relevance[1] is not None


def test_a_view_and_its_base() -> None:
    """Each has the relevance of its own uses, and the base that of its views too."""
    x = oracle.draw(0, 3, 4).requires_grad_()
    base = x * 2
    view = base[:, :2]
    other = base[:, :2]
    y = view.sum() * 3 + base.sum()
    found = relevance(y, [view, base, other]).relevance
    close(found[0], 3 * view.detach())
    close(found[1], base.detach() * torch.tensor([4.0, 4.0, 1.0, 1.0], dtype=torch.float64))
    assert found[2] is None


def test_a_tensor_changed_in_place_is_the_changed_one() -> None:
    x = oracle.draw(0, 3, 4).requires_grad_()
    h = x * 2
    before = h.clone()
    h += 1
    y = (h * 3).sum() + before.sum()
    found = relevance(y, [h, before, x]).relevance
    close(found[0], 3 * h.detach())
    close(found[1], before.detach())
    close(found[2], 8 * x.detach())


def test_a_base_changed_through_a_view() -> None:
    x = oracle.draw(0, 3, 4).requires_grad_()
    h = x * 2
    h[:, 1] = 5.0
    y = (h * 3).sum()
    found = relevance(y, [h, x]).relevance
    close(found[0], 3 * h.detach())
    assert not found[1][:, 1].any()
    close(found[1][:, 0], 6 * x.detach()[:, 0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_what_is_made_of_parameters_alone(name: str, composite: str, frozen: bool) -> None:
    """Position embeddings, say, have relevance too: that of their table. To ask changes nothing."""
    model, inputs, target = sample(name)
    model.requires_grad_(not frozen)
    where = "bert.embeddings.position_embeddings" if name == "bert" else "transformer.wpe"
    options: dict[str, Any] = {"composite": composite, "parameters": f"{where}.weight"}
    plain = explain(model, inputs, target, composite=composite)
    found = explain(model, inputs, target, layers=where, **options)
    table = found.parameters[f"{where}.weight"]
    assert table is not None
    close(found.layers[where][0], table[:7], 1e-12)
    assert not table[7:].any()
    assert found.layers[where].abs().max() > 1e-6
    same(found, plain, 0.0)
    assert found.ledger.accounts == plain.ledger.accounts
    held = explain(model, inputs, target, condition={where: Part([0, 2], axis=1)}, **options)
    same(held, plain, 0.0)  # nothing of the inputs passes there
    expected = torch.zeros_like(table).index_copy_(0, torch.tensor([0, 2]), table[[0, 2]])
    close(held.parameters[f"{where}.weight"], expected, 1e-12)

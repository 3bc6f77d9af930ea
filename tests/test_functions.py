"""Custom functions: those of transformers against what they stand for written out, and what any of them may do."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ReformerConfig, ReformerModel
from transformers.models.bloom.modeling_bloom import GeLUFunction
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative
from transformers.models.sew_d.modeling_sew_d import XSoftmax
from transformers.models.yoso.modeling_yoso import YosoCumulation

from dynlrp import RuleError, UnknownOperationError, explain
from dynlrp.rules import linear_operation
from tests.conftest import close
from tests.oracle import agrees, draw


def same_explanation(ours: Any, plain: Any, *inputs: Tensor) -> None:
    """Two ways to write a function are explained alike."""
    m = draw(9, *ours(*inputs).shape)
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    found, expected = (explain(f, inputs, lambda y: (y * m).sum()) for f in (ours, plain))
    agrees(found, [r for r in expected.relevance if r is not None])


def test_gelu_of_bloom() -> None:
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    x[0, 0] = 0
    explanation = explain(GeLUFunction.apply, x, lambda y: (y * m).sum())
    agrees(explanation, m * GeLUFunction.apply(x), {"offsets": 0.0})


def test_square_root_of_recurrent_gemma() -> None:
    x, m = draw(0, 3, 4).square(), draw(1, 3, 4)
    x[0, 0] = 0
    agrees(explain(SqrtBoundDerivative.apply, x, lambda y: (y * m).sum()), m * x.sqrt())


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
def test_masked_softmax_of_deberta(composite: str) -> None:
    """Also where a whole row is masked, and as attention weights."""
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    x, v = draw(0, 3, 4), draw(1, 4, 2)

    def plain(x: Tensor, v: Tensor) -> Tensor:
        scores = x.masked_fill(mask == 0, torch.finfo(x.dtype).min)
        return torch.softmax(scores, -1).masked_fill(mask == 0, 0.0) @ v

    m = draw(9, 3, 2)
    found, expected = (
        explain(f, (x, v), lambda y: (y * m).sum(), composite=composite)
        for f in (lambda x, v: XSoftmax.apply(x, mask, -1) @ v, plain)
    )
    agrees(found, [r for r in expected.relevance if r is not None])
    assert composite != "cplrp" or found.relevance[0] is None


@pytest.mark.parametrize("constant", [None, 0, 1, 2])
def test_attention_of_yoso(constant: int | None) -> None:
    masks = torch.tensor([[1, 1, 0], [1, 1, 1]]).double(), torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]).double()
    q, k, v = (F.normalize(draw(i, 2, n, 5), dim=-1) for i, n in enumerate((3, 4, 4)))
    given = [x for i, x in enumerate((q, k, v)) if i != constant]

    def arguments(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        left = iter(inputs)
        return [x if i == constant else next(left) for i, x in enumerate((q, k, v))]

    def ours(*inputs: Tensor) -> Tensor:
        return YosoCumulation.apply(*masks, *arguments(inputs), {"hash_code_len": 9})

    def plain(*inputs: Tensor) -> Tensor:
        q, k, v = arguments(inputs)
        chance = 1 - torch.acos(q @ k.mT) / math.pi
        return (chance**9 * masks[0][:, :, None] * masks[1][:, None]) @ v

    same_explanation(ours, plain, *given)


class Reformer(torch.nn.Module):
    """As it is, or with its layers as residual ones."""

    def __init__(self, model: ReformerModel, plain: bool) -> None:
        super().__init__()
        self.model, self.plain = model, plain

    def forward(self, ids: Tensor) -> Tensor:
        if not self.plain:
            result: Tensor = self.model(ids).last_hidden_state
            return result
        encoder = self.model.encoder
        hidden = attended = self.model.embeddings(input_ids=ids)
        for layer in encoder.layers:
            attended = attended + layer.attention(hidden).hidden_states
            hidden = hidden + layer.feed_forward(attended)
        return encoder.layer_norm(torch.cat([attended, hidden], -1))


@pytest.fixture(scope="module")
def reformer() -> ReformerModel:
    torch.manual_seed(0)
    config = ReformerConfig(
        attention_head_size=4, attn_layers=["local", "lsh"], axial_pos_embds=False, feed_forward_size=16,
        hidden_size=8, local_attn_chunk_length=4, lsh_attn_chunk_length=4, num_attention_heads=2, num_buckets=4,
        num_hashes=2, hash_seed=3, max_position_embeddings=16, vocab_size=20, is_decoder=False, use_cache=False,
    )  # fmt: skip
    return ReformerModel(config).double().eval()


@pytest.mark.parametrize("frozen", [False, True])
def test_reversible_layers_of_reformer(reformer: ReformerModel, frozen: bool) -> None:
    ids, m = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0)), draw(1, 2, 8, 16)
    reformer.requires_grad_(not frozen)
    explanations = [
        explain(Reformer(reformer, plain).eval(), ids, lambda y: (y * m).sum((1, 2)), allow_training=True)
        for plain in (False, True)  # hashing sets a seed
    ]
    close(explanations[0].relevance, explanations[1].relevance, 1e-6)  # parts of it are in float32
    assert all(explanation.ledger.error < 1e-6 for explanation in explanations)
    assert all(p.grad is None for p in reformer.parameters())


def test_buckets_that_the_cache_cut(reformer: ReformerModel) -> None:
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    reformer.requires_grad_(True)
    with pytest.raises(RuleError, match="use_cache=False"):
        explain(lambda ids: reformer(ids, use_cache=True)[0], ids, lambda y: y.sum((1, 2)), allow_training=True)


def test_a_function_of_the_same_name_is_not_taken_for_another() -> None:
    class GeLUFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x + 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    with pytest.raises(UnknownOperationError, match="comes from elsewhere"):
        explain(GeLUFunction.apply, draw(0, 3, 4), 0)


BITS = "bitsandbytes.autograd._functions"


class MatMul4Bit(torch.autograd.Function):
    """What bitsandbytes has under this name: a product with a matrix that is kept in few bits."""

    __module__ = BITS

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, out: None, bias: Tensor | None, state: Any) -> Tensor:
        ctx.kept, ctx.biased = (b, state), bias is not None
        return F.linear(a, state.restore(b), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        b, state = ctx.kept
        return g @ state.restore(b), None, None, g.sum((0, 1)) if ctx.biased else None, None


class MatMul8bitLt(MatMul4Bit):
    """The same that rounds its input too, to 1/8."""

    __module__ = BITS

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, out: None, bias: Tensor | None, state: Any) -> Tensor:
        return MatMul4Bit.forward(ctx, (a * 8).round() / 8, b, out, bias, state)


@pytest.mark.parametrize("bias", ["none", "trainable", "frozen"])
@pytest.mark.parametrize("function", [MatMul4Bit, MatMul8bitLt])
def test_products_with_quantised_matrices(function: Any, bias: str) -> None:
    """As with the matrix brought back; what rounding the input changed is a constant, as is a bias that is frozen."""
    b, scale = torch.randint(-8, 8, (6, 5), generator=torch.Generator().manual_seed(0)), draw(1, 6, 1)
    state = SimpleNamespace(restore=lambda b: b * scale)
    added = None if bias == "none" else draw(2, 6).requires_grad_(bias == "trainable")
    x, m = draw(3, 2, 3, 5), draw(4, 2, 3, 6)
    found = explain(lambda x: function.apply(x, b, None, added, state), x, lambda y: (y * m).sum((1, 2)))
    through = m @ (b * scale)
    shift = 0.0 if added is None else float((m * added.detach()).sum())
    rounding = float((((x * 8).round() / 8 - x) * through).sum()) if function is MatMul8bitLt else 0.0
    trained = shift if bias == "trainable" else 0.0
    agrees(found, [x * through], {"parameters": trained, "constants": shift - trained + rounding})


def test_an_output_that_is_not_used(registry: dict[str, Any]) -> None:
    """A function's backward gets zeros for it, as from autograd."""

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.sum(1)

        @staticmethod
        def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
            return g * 2 + h.unsqueeze(1)

    linear_operation("PairBackward")
    x, m = draw(0, 3, 4), draw(1, 3, 4)
    agrees(explain(lambda x: Pair.apply(x)[0], x, lambda y: (y * m).sum()), 2 * x * m)
    agrees(explain(lambda x: Pair.apply(x)[1], x, lambda y: (y * m[:, 0]).sum()), x * m[:, :1])

"""Movement; and of operations of every family that their replay is their forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nested._internal.nested_tensor import nested_from_padded

from dynlrp import Composite, When, explain
from dynlrp.promise import Operands
from dynlrp.rules import REGISTRY, VJP, Flat, Gamma, Need, Operation, Rule, shape
from dynlrp.rules.operation import OUTPUT, Grads, Step, StepShape
from tests.examples import (
    VECTOR,
    Example,
    Table,
    cases,
    inputs,
    is_of,
    linear,
    matrices,
    names,
    on,
    passes,
    registered,
)
from tests.oracle import agrees, draw, same
from tests.test_indexing import INDEXING
from tests.test_pooling import POOLING
from tests.test_reduction import EVERYTHING, NESTED

SEEDS = st.integers(0, 2**32 - 1)


IMAGE = (2, 4, 6, 6)
ATEN = torch.ops.aten

MOVEMENT: Table = {
    "ViewBackward0": on((3, 4))(
        lambda x: x.view(2, 6), lambda x: x.view(-1), lambda x: x.flatten(), lambda x: x.unflatten(1, (2, 2))
    ),
    "UnsafeViewBackward0": on((3, 4))(
        lambda x: x.t().reshape(6, 2), lambda x: torch.ops.aten._unsafe_view(x, (2, 6))
    ),
    "ReshapeAliasBackward0": on((3, 4))(lambda x: torch.ops.aten._reshape_alias(x, (4, 3), (3, 1))),
    "ReshapeCopyBackward0": on((3, 4))(lambda x: ATEN._reshape_copy(x, (4, 3))),
    "UnsqueezeBackward0": on((3, 4))(lambda x: x.unsqueeze(1), lambda x: x.unsqueeze(-1), lambda x: x[:, None]),
    "SqueezeBackward0": on((3, 1, 4, 1))(torch.squeeze),
    "SqueezeBackward1": on((3, 1, 4))(lambda x: x.squeeze(1), lambda x: x.squeeze(-2), lambda x: x.squeeze(0)),
    "SqueezeBackward2": on((3, 1, 4, 1))(lambda x: x.squeeze((1, -1))),
    "SqueezeBackward3": on((3, 1, 4, 1))(lambda x: x.clone().squeeze_()),
    "SqueezeBackward4": on((3, 1, 4))(lambda x: x.clone().squeeze_(-2)),
    "SqueezeBackward5": on((3, 1, 4, 1))(lambda x: x.clone().squeeze_((1, -1))),
    "UnsqueezeBackward1": on((3, 4))(lambda x: x.clone().unsqueeze_(-1)),
    "CloneBackward0": on((3, 4))(torch.clone, lambda x: x.t().contiguous()),
    "LazyCloneBackward0": on((3, 4))(torch._lazy_clone),
    "AliasBackward0": on((3, 4))(torch.ops.aten.alias),
    "LiftBackward0": on((3, 4))(ATEN.lift),
    "LiftFreshBackward0": on((3, 4))(ATEN.lift_fresh),
    "ToCopyBackward0": on((3, 4))(lambda x: x.float(), lambda x: x.to(torch.bfloat16)),
    "TBackward0": on((3, 4))(torch.t),
    "TBackward1": on((3, 4))(lambda x: x.clone().t_()),
    "TransposeBackward1": on((3, 4, 2))(lambda x: x.clone().transpose_(0, -1)),
    "TransposeBackward0": on((3, 4, 2))(lambda x: x.transpose(0, 2), lambda x: x.transpose(-1, -2), lambda x: x.mT),
    "PermuteBackward0": on((3, 4, 2))(lambda x: x.permute(2, 0, 1), lambda x: x.permute(-1, 0, -2)),
    "ExpandBackward0": on((3, 1, 4))(lambda x: x.expand(3, 2, 4), lambda x: x.expand(5, -1, 2, -1)),
    "SelectBackward0": on((3, 4))(lambda x: x[1], lambda x: x[:, -1], lambda x: x.select(-1, -2)),
    "RepeatBackward0": on((3, 4))(lambda x: x.repeat(2, 3), lambda x: x.repeat(2, 1, 2)),
    "FlipBackward0": on((3, 4))(lambda x: x.flip(1), lambda x: x.flip(0, -1), lambda x: x.flip(-2)),
    "RollBackward0": on((3, 4))(lambda x: x.roll(1), lambda x: x.roll(-1, 1), lambda x: x.roll((1, -2), (0, -1))),
    "Rot90Backward0": on((3, 4, 2))(lambda x: x.rot90(), lambda x: x.rot90(-1, (0, -1)), lambda x: x.rot90(2, (1, 2))),
    "PixelShuffleBackward0": on((2, 8, 3, 3))(lambda x: torch.pixel_shuffle(x, 2)),
    "PixelUnshuffleBackward0": on((2, 2, 4, 4))(lambda x: torch.pixel_unshuffle(x, 2)),
    "ChannelShuffleBackward0": on((2, 6, 2))(*(lambda x, n=n: torch.channel_shuffle(x, n) for n in (2, 3))),
    "SplitBackward0": on((3, 4))(lambda x: x.split(3, 1)[0], lambda x: x.chunk(2)[1], lambda x: x.split(3, -1)[1]),
    "UnsafeSplitBackward0": on((3, 4))(
        lambda x: torch.unsafe_split(x, 3, -1)[1], lambda x: torch.unsafe_chunk(x, 2)[0]
    ),
    "SplitWithSizesBackward0": on((3, 4))(lambda x: x.split([1, 2], 0)[1], lambda x: x.split([3, 1], -1)[1]),
    "UnsafeSplitWithSizesBackward0": on((3, 4))(lambda x: torch.unsafe_split_with_sizes(x, [3, 1], -1)[1]),
    "UnbindBackward0": on((3, 4))(lambda x: x.unbind(1)[2], lambda x: x.unbind(-2)[0]),
    "UnfoldBackward0": on((3, 4))(lambda x: x.unfold(1, 3, 1), lambda x: x.unfold(-1, 2, 2)),
    "AsStridedBackward0": on((3, 4))(lambda x: x.as_strided((2, 2), (4, 2), 1), lambda x: x.as_strided((3, 4), (1, 2))),
    "AsStridedBackward1": on((3, 4))(lambda x: x.clone().as_strided_((2, 2), (4, 2), 1)),
    "NarrowCopyBackward0": on((3, 4))(lambda x: torch.narrow_copy(x, -1, -3, 2)),
    "DiagonalBackward0": on((3, 4, 2))(
        torch.diagonal, lambda x: x.diagonal(-1), lambda x: x.diagonal(1, -1, 0), lambda x: x.diagonal(0, 1, -1)
    ),
    "SliceBackward0": on((3, 4))(
        lambda x: x[1:], lambda x: x[:-1], lambda x: x[:, -3:-1], lambda x: x[:, ::2], lambda x: x.narrow(-1, 1, 2),
        lambda x: torch.ops.aten.slice(x, -1, -3, None, 2), lambda x: x[:, 1:100],
    ),
    "CatBackward0": [
        *on((3, 4), (3, 2))(lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([b, a, b], -1)),
        *on((3, 4))(lambda a: torch.cat([a, a.new_zeros(0, 4)])),
    ],
    "StackBackward0": on((3, 4), (3, 4))(
        lambda a, b: torch.stack([a, b]), lambda a, b: torch.stack([a, b, a], 1), lambda a, b: torch.stack([a, b], -1)
    ),
    "SelectScatterBackward0": on((3, 4), (3,))(
        lambda x, v: x.select_scatter(v, 1, 2), lambda x, v: x.select_scatter(v, -1, -1)
    ),
    "SliceScatterBackward0": on((3, 4), (3, 2))(
        lambda x, v: x.slice_scatter(v, 1, 1, 3), lambda x, v: x.slice_scatter(v, -1, None, None, 2),
        lambda x, v: x.slice_scatter(v, 1, -2),
    ),
    "SliceInverseBackward0": on((3, 4))(lambda x: ATEN.slice_inverse(x[:, 1:3], x, 1, 1, 3)),
    "DiagonalScatterBackward0": on((3, 4), (3,))(
        lambda x, v: x.diagonal_scatter(v), lambda x, v: x.diagonal_scatter(v[:2], -1),
        lambda x, v: x.diagonal_scatter(v, 1, -2, 1),
    ),
    "AsStridedScatterBackward0": on((3, 4), (2, 2))(lambda x, v: x.as_strided_scatter(v, (2, 2), (4, 2), 1)),
    "PackPaddedSequenceBackward0": [
        *on((4, 3, 2))(lambda x: _packed(x, [4, 2, 1], False), lambda x: _packed(x, [3, 3, 1], False)),
        *on((3, 4, 2))(lambda x: _packed(x, [4, 4, 2], True)),
    ],
}  # fmt: skip
COPIES: Table = {
    "AliasBackward0_copy": on((3, 4))(ATEN.alias_copy),
    "LiftFreshBackward0_copy": on((3, 4))(ATEN.lift_fresh_copy),
    "ViewBackward0_copy": on((3, 4))(lambda x: ATEN.view_copy(x, (4, 3))),
    "ReshapeAliasBackward0_copy": on((3, 4))(lambda x: ATEN._reshape_alias_copy(x, (4, 3), (3, 1))),
    "UnsqueezeBackward0_copy": on((3, 4))(lambda x: ATEN.unsqueeze_copy(x, -1)),
    "SqueezeBackward0_copy": on((3, 1, 4, 1))(ATEN.squeeze_copy),
    "SqueezeBackward1_copy": on((3, 1, 4, 1))(lambda x: ATEN.squeeze_copy(x, -3)),
    "SqueezeBackward2_copy": on((3, 1, 4, 1))(lambda x: ATEN.squeeze_copy(x, [1, -1])),
    "TBackward0_copy": on((3, 4))(ATEN.t_copy),
    "TransposeBackward0_copy": on((3, 4, 2))(lambda x: ATEN.transpose_copy(x, 0, -1)),
    "PermuteBackward0_copy": on((3, 4, 2))(lambda x: ATEN.permute_copy(x, [2, 0, -2])),
    "ExpandBackward0_copy": on((3, 1, 4))(lambda x: ATEN.expand_copy(x, [5, -1, 2, -1])),
    "SelectBackward0_copy": on((3, 4))(lambda x: ATEN.select_copy(x, -1, -2)),
    "SliceBackward0_copy": on((3, 4))(lambda x: ATEN.slice_copy(x, -1, -3, None, 2)),
    "DiagonalBackward0_copy": on((3, 4))(lambda x: ATEN.diagonal_copy(x, -1)),
    "UnfoldBackward0_copy": on((3, 4))(lambda x: ATEN.unfold_copy(x, -1, 3, 1)),
    "AsStridedBackward0_copy": on((3, 4))(lambda x: ATEN.as_strided_copy(x, (2, 2), (4, 2), 1)),
    "SplitBackward0_copy": on((3, 4))(lambda x: torch.split_copy(x, 3, -1)[1]),
    "SplitWithSizesBackward0_copy": on((3, 4))(lambda x: torch.split_with_sizes_copy(x, [3, 1], -1)[1]),
    "UnbindBackward0_copy": on((3, 4))(lambda x: torch.unbind_copy(x, -1)[2]),
}
ZEROS: Table = {
    "TrilBackward0": on((3, 4))(torch.tril, lambda x: x.tril(-1)),
    "TriuBackward0": on((3, 4))(torch.triu, lambda x: x.triu(-1)),
    "DiagEmbedBackward0": on((3, 4))(torch.diag_embed, lambda x: torch.diag_embed(x, -1, 0, -1)),
    "BlockDiagBackward0": on((3, 4), (2, 2))(torch.block_diag),
    "NegBackward0": on((3, 4))(torch.neg),
    "NegViewBackward0": on((3, 4))(torch._neg_view),
    "NegViewBackward0_copy": on((3, 4))(ATEN._neg_view_copy),
}
"""Not every output is an input: other zeros stand beside them, or the sign is another."""


def _packed(x: Tensor, lengths: list[int], first: bool) -> Tensor:
    packed: Tensor = torch._VF._pack_padded_sequence(x, torch.tensor(lengths), first)[0]
    return packed


SCALING: Table = {
    "MulBackward1": on((3, 4))(lambda x: torch.ops.aten.mul.Scalar(x, -3.0)),
    "DivBackward1": on((3, 4))(lambda x: torch.ops.aten.div.Scalar(x, 0.7)),
}
OTHERS: Table = {
    "MulBackward0": [
        *on((3, 4), (4,))(torch.mul), *on((3, 4))(lambda x: x * VECTOR, lambda x: VECTOR * x, lambda x: x * 3),
    ],
    "DivBackward0": [*on((3, 4), (4,))(torch.div), *on((3, 4))(lambda x: x / VECTOR, lambda x: x / 3)],
    "MmBackward0": [*on((3, 4), (4, 2))(torch.mm), *on((3, 4))(lambda x: x @ VECTOR.view(4, 1))],
    "BmmBackward0": [
        *on((2, 3, 4), (2, 4, 2))(torch.bmm),
        *on((2, 3, 4))(lambda x: torch.bmm(x, VECTOR.view(2, 2, 1).expand(2, 2, 4).mT)),
    ],
    "AddmmBackward0": on((2,), (3, 4), (4, 2))(
        torch.addmm, lambda c, a, b: torch.addmm(c, a, b, beta=-2.0, alpha=0.5),
        lambda c, a, b: torch.addmm(c, a, VECTOR.view(4, 1).expand(4, 2)),
    ),
    "BaddbmmBackward0": on((2, 3, 2), (2, 3, 4), (2, 4, 2))(
        torch.baddbmm, lambda c, a, b: torch.baddbmm(c, a, b, beta=3.0, alpha=-0.5)
    ),
    "ConvolutionBackward0": [
        *on((2, 3, 5), (4, 3, 2), (4,))(
            F.conv1d, lambda x, w, b: F.conv1d(x, w, b, 2, 1), lambda x, w, b: F.conv1d(x, w, None, 1, 1, 2)
        ),
        *on((2, 4, 5, 5), (4, 2, 3, 3))(
            lambda x, w: F.conv2d(x, w, groups=2), lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1)
        ),
    ],
    "AddBackward0": on((3, 4), (4,))(torch.add, lambda a, b: torch.add(a, b, alpha=0.3)),
    "SubBackward0": on((3, 4), (3, 1))(torch.sub, lambda a, b: torch.sub(a, b, alpha=0.3)),
    "RsubBackward0": on((3, 4), (3, 4))(torch.rsub, lambda a, b: torch.rsub(a, b, alpha=0.3)),
    "NativeLayerNormBackward0": [
        *on((3, 4), (4,), (4,))(lambda x, w, b: F.layer_norm(x, (4,), w, b)),
        *on((3, 4))(lambda x: F.layer_norm(x, (4,)), lambda x: F.layer_norm(x, (3, 4))),
    ],
    "NativeBatchNormBackward0": on((3, 4), (4,), (4,))(
        lambda x, w, b: F.batch_norm(x, VECTOR, VECTOR.abs(), w, b),
        lambda x, w, b: F.batch_norm(x, VECTOR, VECTOR.abs(), None, b),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: F.batch_norm(x, VECTOR, VECTOR.abs()),
    ),
    "NativeGroupNormBackward0": [
        *on((3, 4, 2), (4,), (4,))(lambda x, w, b: F.group_norm(x, 2, w, b)),
        *on((3, 4, 2))(lambda x: F.group_norm(x, 4)),
    ],
    "SiluBackward0": on((3, 4))(F.silu),
}  # fmt: skip
MOVING = {**MOVEMENT, **COPIES, **ZEROS}
EXAMPLES = {**MOVING, **SCALING, **OTHERS, **INDEXING, **EVERYTHING, **POOLING}
PADDING = {"ConstantPadNdBackward0": POOLING["ConstantPadNdBackward0"]}
ELSEWHERE = {
    "ContiguousBackward0": "contiguous() is recorded as clone",
    "PinMemoryBackward0": "only with a GPU",
    "torch::autograd::CopyBackwards": "only between devices",
    "BackwardHookFunctionBackward": "only of modules with backward hooks, see test_explain",
    "ModuleOutputBackward": "only of modules that return views or what they were given, see test_layers",
    **{
        name + "_copy": "PyTorch has no kernel for it"
        for name in (
            "NestedViewFromJaggedBackward0", "NestedGetValuesBackward0", "ValuesBackwardAutogradNestedTensor0",
            "ViewBackwardAutogradNestedTensor0", "SqueezeBackwardAutogradNestedTensor0",
            "SqueezeBackwardAutogradNestedTensor1", "SelectBackwardAutogradNestedTensor0",
            "UnbindBackwardAutogradNestedTensor0", "SplitWithSizesBackwardAutogradNestedTensor0",
        )
    },
}  # fmt: skip
"""Nodes that no function on a CPU makes."""


def test_no_operation_is_forgotten() -> None:
    """A new movement needs an example."""
    blocked = {name for name, operation in REGISTRY.items() if operation.blocked}
    assert registered(shape) - blocked - set(ELSEWHERE) == names([MOVING]) | (NESTED_NODES - NESTED) | MKLDNN_NODES
    assert set(EXAMPLES) - set(REGISTRY) == set()


@pytest.mark.parametrize(("name", "example"), cases({**MOVING, **SCALING, **OTHERS}))
def test_the_example_is_of_this_operation(name: str, example: Example) -> None:
    is_of(name, example)


EXACT = {name: many for name, many in EXAMPLES.items() if name in REGISTRY and REGISTRY[name].exact}


def test_exact_operations_have_examples() -> None:
    exact = {name for name, operation in REGISTRY.items() if operation.exact}
    elsewhere = {*ELSEWHERE, "ReluBackward0", "LeakyReluBackward0", "LeakyReluBackward1"}  # see test_elementwise
    assert exact - elsewhere == set(EXACT)


@pytest.mark.parametrize(("name", "example"), cases(EXACT))
def test_what_exact_operations_return_fits_as_it_is(name: str, example: Example) -> None:
    """One output; where one operand is recorded, its multiplier has the operand's shape and dtype."""
    y = example.function(inputs(example)[0].requires_grad_(), *inputs(example)[1:])
    node = y.grad_fn
    assert node is not None
    assert len(node._input_metadata) == 1  # type: ignore[attr-defined]
    if len(node.next_functions) == 1:
        with torch.no_grad():
            found = node(torch.ones_like(y))
        ((below, _),) = node.next_functions
        (expected,) = below._input_metadata
        assert (list(found.shape), found.dtype) == (list(expected.shape), expected.dtype)


# Replay -----------------------------------------------------------------------------------------------------

REPLAYED = {name: many for name, many in EXAMPLES.items() if name in REGISTRY and REGISTRY[name].replay is not None}


def _equal(ours: Tensor, forward: Tensor, name: str) -> None:
    assert ours.dtype == forward.dtype
    assert ours.shape == forward.shape
    if REGISTRY[name].family in ("normalization", "dense", "convolution"):
        same(ours, forward, 1e-14)  # fused kernels round in another order
    else:
        assert torch.equal(ours, forward)


@pytest.mark.parametrize(("name", "example"), cases(REPLAYED))
def test_replay_is_the_forward(name: str, example: Example) -> None:
    """From the values of the operands, and for factors that are no node's result from what the node saved."""
    y = example.function(*(x.requires_grad_() for x in inputs(example)))
    nodes = [node for node, _ in y.grad_fn.next_functions]
    if any(node is not None and not hasattr(node, "variable") for node in nodes):
        pytest.skip("an operand is made on the way, which the next test covers")
    values = [None if node is None else node.variable.detach() for node in nodes]
    replay = REGISTRY[name].replay
    assert replay is not None
    with torch.no_grad():
        made = replay(Operands(y.grad_fn), *values)
        _equal(made[y.output_nr] if isinstance(made, tuple | list) else made, y.detach(), name)


class Probe(Rule):
    """Asks for the output of an operation and passes the VJP."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def operands(self, operation: Operation, gate: int | None) -> str:
        return operation.operands.replace("-", "+")

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        self.outputs.append(step.output())
        return VJP()(step, grads)


@pytest.mark.parametrize(("name", "example"), cases(REPLAYED))
def test_a_promise_through_it_is_kept(name: str, example: Example) -> None:
    """A rule needs the output, the operation's operands come from another operation, and nobody saved either."""
    forward: list[Tensor] = []
    copy = torch.clone if name == "NegBackward0" else torch.neg

    def model(*inputs: Tensor) -> Tensor:
        y = example.function(*(copy(copy(x)) for x in inputs))
        forward.append(y.detach())
        return copy(y)

    if example.function(*(x.requires_grad_() for x in inputs(example))).output_nr:
        pytest.skip("a rule asks for the first output")
    probe = Probe()
    target = torch.mean if name == "SumBackward0" else torch.sum
    composite = Composite.of("probe", {When(name=name): probe})
    explanation = explain(model, tuple(inputs(example)), target, composite=composite)
    assert len(probe.outputs) == 1
    _equal(probe.outputs[0], forward[0], name)
    assert explanation.promises.count >= 1 or REGISTRY[name].result is not None


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("SumBackward1", lambda x: x.sum(1, dtype=torch.float64)),
        ("SumBackward0", lambda x: x.sum(dtype=torch.float64)),
        ("MeanBackward1", lambda x: x.mean(1, dtype=torch.float64)),
        ("CumsumBackward0", lambda x: x.cumsum(1, dtype=torch.float64)),
    ],
)
def test_replay_in_another_dtype(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Operations that change the type of their argument as they go."""
    y = function(draw(0, 3, 4).float().requires_grad_())
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    replay = REGISTRY[name].replay
    assert replay is not None
    _equal(replay(Operands(y.grad_fn), draw(0, 3, 4).float()), y.detach(), name)


@given(seed=SEEDS, steps=st.lists(st.sampled_from(range(12)), min_size=1, max_size=8))
def test_promises_through_random_chains(seed: int, steps: list[int]) -> None:
    """Frozen weights save no input, so that gamma has it replayed through whatever stands before; trainable ones do."""
    chain: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.flip(1), lambda x: x.roll(2, 1), lambda x: x.view(2, 3, 4).transpose(1, 2).reshape(2, 12),
        lambda x: torch.cat([x[:, 5:], x[:, :5]], 1), lambda x: -x, lambda x: x + x.mean(1, keepdim=True),
        lambda x: F.silu(x), lambda x: x[:, torch.arange(11, -1, -1)],
        lambda x: torch.stack(x.view(2, 2, 6).unbind(1), 2).flatten(1),
        lambda x: F.layer_norm(x, (12,)), lambda x: x * 1.5, lambda x: x.cumsum(1),
    ]  # fmt: skip
    first, second = torch.nn.Linear(12, 12).double(), torch.nn.Linear(12, 3).double()
    with torch.no_grad():
        for i, p in enumerate([*first.parameters(), *second.parameters()]):
            p.copy_(draw(seed + i, *p.shape))

    def model(x: Tensor) -> Tensor:
        h = first(x)
        for step in steps:
            h = chain[step](h)
        return second(h)

    net = torch.nn.Module()
    net.first, net.second, net.forward = first, second, model
    x = draw(seed + 5, 2, 12)
    composite = Composite.of("gamma", {"dense": Gamma()})
    trainable = explain(net, x, 0, composite=composite)
    frozen = explain(net.requires_grad_(False), x, 0, composite=composite)
    agrees(frozen, trainable.relevance, trainable.ledger.accounts)


# The vector-Jacobian product --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "example"), cases({**MOVING, **SCALING}))
def test_linear_operations(name: str, example: Example) -> None:
    """The map is linear and each input gets x times its matrix."""
    linear(example)
    passes(example, [draw(1 + i, *size) for i, size in enumerate(example.shapes)], matrices(example))


@pytest.mark.parametrize(("name", "example"), cases({**MOVING, **INDEXING, **PADDING}))
def test_movements_conserve_in_the_other_gauge(name: str, example: Example) -> None:
    """Behind a rule that hands on relevance they move relevance itself; none is divided by an activation. What writes
    zeros or adds goes by multipliers, which zeros do not have, and the ledger tells what they lost."""
    if example.function(*inputs(example)).dtype != torch.float64:
        pytest.skip("a change of type")
    given = [x * (draw(3, *x.shape) > -0.5) for x in inputs(example)]  # some exact zeros
    maps = matrices(example)
    y = example.function(*given)
    weight = draw(10, 2, y.numel())
    # Flat gives every input of the layer the same relevance, r, and every element its count of copies of it; what
    # padding wrote is no input.
    inputs_there = y.numel() if REGISTRY[name].writes is None else int(sum(maps).any(0).sum())
    r = float((y.reshape(1, -1) @ weight.t()).sum()) / (inputs_there + 1e-6)
    composite = Composite.of("flat", {"dense": Flat()})
    explanation = explain(
        lambda *xs: F.linear(example.function(*xs).reshape(1, -1), weight), tuple(given), torch.sum, composite=composite
    )
    node, operation = example.function(*(x.clone().requires_grad_() for x in given)).grad_fn, REGISTRY[name]
    moves = operation.copied(operation.facts(node) if operation.facts else None)
    m = torch.full((y.numel(),), r, dtype=torch.float64)
    if not moves:
        m = torch.where(y.flatten() == 0, 0.0, m / torch.where(y.flatten() == 0, 1.0, y.flatten()))
    for ours, j, x in zip(explanation.relevance, maps, given, strict=True):
        theirs = (j @ m).reshape(x.shape) * (1 if moves else x)
        assert ours is not None or not theirs.any()
        same(torch.zeros_like(theirs) if ours is None else ours, theirs)
    if moves:
        assert all(bool(((j == 0) | (j == 1)).all()) for j in maps)
        assert ("absorbed", name) not in explanation.ledger.by_operation()
    assert explanation.ledger.closes


@pytest.mark.parametrize(("name", "example"), cases({**MOVING, **INDEXING, **EVERYTHING}))
def test_a_signal_keeps_its_sign(name: str, example: Example) -> None:
    """Where the operation says so; rules that treat signs apart rely on it."""
    sign = REGISTRY[name].sign
    if sign:
        x = inputs(example)
        assert bool((example.function(*(x if sign == "nonnegative" else [a.abs() for a in x])) >= 0).all())


# Several outputs --------------------------------------------------------------------------------------------


SPLITS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "split": lambda x: x.split(2, 1),
    "split with sizes": lambda x: x.split([1, 3, 2], 1),
    "chunk": lambda x: x.chunk(3, 1),
    "unbind": lambda x: x.unbind(1),
    "max": lambda x: [x.max(1).values, x.max(1).values * 2],
}


@pytest.mark.parametrize("used", ["all", "first", "last"])
@pytest.mark.parametrize("name", SPLITS)
def test_several_outputs(name: str, used: str) -> None:
    x = draw(0, 3, 6)
    parts = SPLITS[name](x)
    chosen = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[used]
    factors = [float(i + 1) for i in range(len(parts))]

    def model(x: Tensor) -> Tensor:
        return sum((f * p.reshape(3, -1).sum(1) for f, p in zip(factors[chosen], SPLITS[name](x)[chosen], strict=True)))  # type: ignore[return-value]

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
    agrees(explain(model, x, torch.sum), x * gradient)


@pytest.mark.parametrize("name", ["split", "split with sizes", "chunk", "unbind"])
def test_several_outputs_in_both_gauges(name: str) -> None:
    """One part feeds a rule on relevance, another one on multipliers."""
    x, weight = draw(0, 3, 6), draw(1, 2, 6)
    parts = SPLITS[name](x)
    width = parts[0].reshape(3, -1).shape[1]
    w = weight[:, :width]

    def model(x: Tensor) -> Tensor:
        first, *rest = SPLITS[name](x)
        return F.linear(first.reshape(3, -1), w).sum(1) + rest[-1].reshape(3, -1).sum(1)

    with torch.no_grad():
        r = F.linear(parts[0].reshape(3, -1), w)
    flat = (r / (width + 1e-6)).sum(1, keepdim=True).expand(3, width)
    expected = torch.zeros_like(x)
    expected[:, :width] = flat
    last = parts[-1].reshape(3, -1).shape[1]
    expected[:, 6 - last :] = x[:, 6 - last :]
    agrees(explain(model, x, torch.sum, composite=Composite.of("flat", {"dense": Flat()})), expected)


def test_padding_with_zeros_takes_nothing() -> None:
    x = draw(0, 2, 3)
    agrees(explain(lambda x: F.pad(x, (2, 1)), x, torch.sum), x, {"constants": 0.0})
    assert math.isclose(explain(lambda x: F.pad(x, (2, 1), value=0.5), x, torch.sum).ledger.output, float(x.sum()) + 3)


# Nested tensors and other layouts ---------------------------------------------------------------------------

SHORT, LONG = (2, 3), (4, 3)
FACTOR = draw(5, 6, 3)

JAGGED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[list[Tensor]], Tensor]]] = {
    "NestedGetValuesBackward0": (lambda n: (n.values() * FACTOR).sum(), lambda xs: (torch.cat(xs) * FACTOR).sum()),
    "ToPaddedTensorBackward0": (
        lambda n: (n.to_padded_tensor(0.5) * FACTOR[:4]).sum(),
        lambda xs: (torch.stack([F.pad(x, (0, 0, 0, 4 - len(x)), value=0.5) for x in xs]) * FACTOR[:4]).sum(),
    ),
    "UnbindBackwardAutogradNestedTensor0": (
        lambda n: (n.unbind()[1] * FACTOR[:4]).sum() + n.unbind()[0].sum(),
        lambda xs: (xs[1] * FACTOR[:4]).sum() + xs[0].sum(),
    ),
    "SelectBackwardAutogradNestedTensor0": (
        lambda n: (n.select(0, 0) * FACTOR[:2]).sum() + n.select(0, -1).sum(),
        lambda xs: (xs[0] * FACTOR[:2]).sum() + xs[1].sum(),
    ),
    "SumBackwardAutogradNestedTensor0": (lambda n: n.sum(), lambda xs: torch.cat(xs).sum()),
    "SumBackwardAutogradNestedTensor1": (
        lambda n: (n.sum(-1).values() * FACTOR[:, 0]).sum() + (n.sum(2, keepdim=True).values() * FACTOR[:, 1:2]).sum()
        + (n.sum(1) * FACTOR[:2]).sum() + (n.sum(1, keepdim=True) * FACTOR[:2, None]).sum(),
        lambda xs: (torch.cat(xs).sum(-1) * (FACTOR[:, 0] + FACTOR[:, 1])).sum()
        + 2 * sum((x.sum(0) * FACTOR[i]).sum() for i, x in enumerate(xs)),
    ),
    "MeanBackwardAutogradNestedTensor0": (lambda n: n.mean(), lambda xs: torch.cat(xs).mean()),
    "ViewBackwardAutogradNestedTensor0": (
        lambda n: (n.view(2, -1, 3, 1).values()[..., 0] * FACTOR).sum(), lambda xs: (torch.cat(xs) * FACTOR).sum()
    ),
    "SqueezeBackwardAutogradNestedTensor0": (
        lambda n: (n.unsqueeze(-1).squeeze(-1).values() * FACTOR).sum(), lambda xs: (torch.cat(xs) * FACTOR).sum()
    ),
    "ChunkBackwardAutogradNestedTensor0": (
        lambda n: (n.chunk(3, -1)[1].values() * FACTOR[:, :1]).sum() + n.chunk(3, -1)[2].values().sum(),
        lambda xs: (torch.cat(xs)[:, 1:2] * FACTOR[:, :1]).sum() + torch.cat(xs)[:, 2].sum(),
    ),
    "SplitWithSizesBackwardAutogradNestedTensor0": (
        lambda n: (n.split_with_sizes([1, 2], -1)[1].values() * FACTOR[:, :2]).sum(),
        lambda xs: (torch.cat(xs)[:, 1:] * FACTOR[:, :2]).sum(),
    ),
}  # fmt: skip
"""A function of a nested tensor, and the same of a list."""
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "NestedTensorFromTensorListBackward0": lambda x: torch.nested.as_nested_tensor([x[0, :2], x[1]]),
    "NestedTensorFromMaskBackward0": lambda x: torch._nested_tensor_from_mask(x, FILLED),
    "NestedFromPaddedBackward0": lambda x: torch._nested_from_padded(x, torch.tensor([SHORT, LONG])),
    "NestedViewFromBufferBackward0": lambda x: torch._nested_view_from_buffer(*_buffer(x)),
    "NestedViewFromBufferBackward0_copy": lambda x: ATEN._nested_view_from_buffer_copy(*_buffer(x)),
    "ValuesBackwardAutogradNestedTensor0": lambda x: torch._nested_tensor_from_mask(x, FILLED).values().view(6, 3),
    "SqueezeBackwardAutogradNestedTensor1": lambda x: (
        torch._nested_tensor_from_mask(x, FILLED).unsqueeze(-1).squeeze((-1,))
    ),
    "NestedViewFromJaggedBackward0": lambda x: torch.nested.nested_tensor_from_jagged(x[FILLED], OFFSETS),
    "NestedFromPaddedTensorBackward0": lambda x: nested_from_padded(x, OFFSETS),
}  # fmt: skip
"""From a padded tensor; the last three of them in the jagged layout."""
FILLED = torch.tensor([[True, True, False, False], [True] * 4])
OFFSETS = torch.tensor([0, 2, 6])
NESTED_NODES = {*JAGGED, *MADE}
MKLDNN_NODES = {"ToMkldnnBackward0", "MkldnnReshapeBackward0"}


def _buffer(x: Tensor) -> tuple[Tensor, ...]:
    return x[FILLED].view(-1), torch.tensor([SHORT, LONG]), torch.tensor([[3, 1], [3, 1]]), torch.tensor([0, 6])


@pytest.mark.parametrize("name", MADE)
def test_nested_tensors_are_made(name: str) -> None:
    x, m = draw(0, 2, 4, 3), draw(1, 6, 3)

    def function(x: Tensor) -> Tensor:
        made = MADE[name](x)
        assert name in behind(made)
        return ((torch.cat(made.unbind()) if made.is_nested else made).view(6, 3) * m).sum().reshape(1)

    expected = torch.zeros_like(x)
    expected[FILLED] = x[FILLED] * m
    agrees(explain(function, x, torch.sum), expected)


@pytest.mark.parametrize("name", JAGGED)
def test_nested_tensors(name: str) -> None:
    """As the tensors that they hold."""
    nested, plain = JAGGED[name]
    x = (draw(0, 1, *SHORT), draw(1, 1, *LONG))

    def jagged(*xs: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor([x[0] for x in xs], layout=torch.jagged)

    def function(*xs: Tensor) -> Tensor:
        y = nested(jagged(*xs) * 2)
        assert name in behind(y)
        return y.reshape(1)

    expected = explain(lambda *xs: plain([x[0] * 2 for x in xs]).reshape(1), x, torch.sum)
    agrees(explain(function, x, torch.sum), expected.relevance, expected.ledger.accounts)


def behind(y: Tensor) -> set[str]:
    """Names of all nodes behind a tensor."""
    found, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            found.add(node.name())
            stack += [child for child, _ in node.next_functions]
    return found


def test_tensors_in_the_layout_of_mkldnn() -> None:
    x = draw(0, 3, 4).float()
    explanation = explain(lambda x: x.to_mkldnn().reshape(4, 3).to_dense() * 2, x, torch.sum)
    agrees(explanation, 2 * x, tolerance=1e-6)


def test_packed_sequences() -> None:
    """Into one tensor and out again; what is padded has no relevance."""
    x, m = draw(0, 3, 4, 2), draw(1, 3, 4, 2)
    lengths = [4, 2, 1]

    def function(x: Tensor) -> Tensor:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]

    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    explanation = explain(function, x, lambda y: (y * m).sum())
    agrees(explanation, x * m * mask[..., None], {"constants": 0.0})


def test_what_autograd_cannot_derive_is_blocked() -> None:
    assert REGISTRY["ChunkBackward0"].blocked

"""Movement, indexing, reduction, choice and pooling; and of every operation that its replay is its forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynlrp import Composite, When, explain
from dynlrp.promise import Operands
from dynlrp.rules import REGISTRY, VJP, Flat, Gamma, Need, Operation, Rule
from dynlrp.rules.operation import OUTPUT, Grads, Step, StepShape
from tests.oracle import agrees, draw, number, same
from tests.test_elementwise import COEFFICIENTS, FUNCTIONS, PIECEWISE

SEEDS = st.integers(0, 2**32 - 1)


class Example(NamedTuple):
    """A function whose last operation is of the node in question, and the shapes of its arguments."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((3, 4),)
    positive: bool = False


def _on(*shapes: tuple[int, ...]) -> Callable[..., list[Example]]:
    return lambda *functions: [Example(function, shapes) for function in functions]


IMAGE = (2, 4, 6, 6)
INDEX = torch.tensor([2, 0, 2])
MASK = torch.tensor([[True, False, True, False], [False, False, True, True], [True, True, True, False]])

MOVEMENT: dict[str, list[Example]] = {
    "ViewBackward0": _on((3, 4))(
        lambda x: x.view(2, 6), lambda x: x.view(-1), lambda x: x.flatten(), lambda x: x.unflatten(1, (2, 2))
    ),
    "UnsafeViewBackward0": _on((3, 4))(
        lambda x: x.t().reshape(6, 2), lambda x: torch.ops.aten._unsafe_view(x, (2, 6))
    ),
    "ReshapeAliasBackward0": _on((3, 4))(lambda x: torch.ops.aten._reshape_alias(x, (4, 3), (3, 1))),
    "UnsqueezeBackward0": _on((3, 4))(lambda x: x.unsqueeze(1), lambda x: x.unsqueeze(-1), lambda x: x[:, None]),
    "SqueezeBackward0": _on((3, 1, 4, 1))(torch.squeeze),
    "SqueezeBackward1": _on((3, 1, 4))(lambda x: x.squeeze(1), lambda x: x.squeeze(-2), lambda x: x.squeeze(0)),
    "SqueezeBackward2": _on((3, 1, 4, 1))(lambda x: x.squeeze((1, -1))),
    "CloneBackward0": _on((3, 4))(torch.clone, lambda x: x.t().contiguous()),
    "AliasBackward0": _on((3, 4))(torch.ops.aten.alias),
    "ToCopyBackward0": _on((3, 4))(lambda x: x.float(), lambda x: x.to(torch.bfloat16)),
    "TBackward0": _on((3, 4))(torch.t),
    "TransposeBackward0": _on((3, 4, 2))(lambda x: x.transpose(0, 2), lambda x: x.transpose(-1, -2), lambda x: x.mT),
    "PermuteBackward0": _on((3, 4, 2))(lambda x: x.permute(2, 0, 1), lambda x: x.permute(-1, 0, -2)),
    "ExpandBackward0": _on((3, 1, 4))(lambda x: x.expand(3, 2, 4), lambda x: x.expand(5, -1, 2, -1)),
    "SelectBackward0": _on((3, 4))(lambda x: x[1], lambda x: x[:, -1], lambda x: x.select(-1, -2)),
    "RepeatBackward0": _on((3, 4))(lambda x: x.repeat(2, 3), lambda x: x.repeat(2, 1, 2)),
    "FlipBackward0": _on((3, 4))(lambda x: x.flip(1), lambda x: x.flip(0, -1), lambda x: x.flip(-2)),
    "RollBackward0": _on((3, 4))(lambda x: x.roll(1), lambda x: x.roll(-1, 1), lambda x: x.roll((1, -2), (0, -1))),
    "PixelShuffleBackward0": _on((2, 8, 3, 3))(lambda x: torch.pixel_shuffle(x, 2)),
    "PixelUnshuffleBackward0": _on((2, 2, 4, 4))(lambda x: torch.pixel_unshuffle(x, 2)),
    "SplitBackward0": _on((3, 4))(lambda x: x.split(3, 1)[0], lambda x: x.chunk(2)[1]),
    "SplitWithSizesBackward0": _on((3, 4))(lambda x: x.split([1, 2], 0)[1], lambda x: x.split([3, 1], -1)[1]),
    "UnbindBackward0": _on((3, 4))(lambda x: x.unbind(1)[2], lambda x: x.unbind(-2)[0]),
    "UnfoldBackward0": _on((3, 4))(lambda x: x.unfold(1, 3, 1), lambda x: x.unfold(-1, 2, 2)),
    "AsStridedBackward0": _on((3, 4))(lambda x: x.as_strided((2, 2), (4, 2), 1)),
    "SliceBackward0": _on((3, 4))(
        lambda x: x[1:], lambda x: x[:-1], lambda x: x[:, -3:-1], lambda x: x[:, ::2], lambda x: x.narrow(-1, 1, 2),
        lambda x: torch.ops.aten.slice(x, -1, -3, None, 2), lambda x: x[:, 1:100],
    ),
    "CatBackward0": [
        *_on((3, 4), (3, 2))(lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([b, a, b], -1)),
        *_on((3, 4))(lambda a: torch.cat([a, a.new_zeros(0, 4)])),
    ],
    "StackBackward0": _on((3, 4), (3, 4))(
        lambda a, b: torch.stack([a, b]), lambda a, b: torch.stack([a, b, a], 1), lambda a, b: torch.stack([a, b], -1)
    ),
    "ConstantPadNdBackward0": _on((3, 4))(lambda x: F.pad(x, (1, 2)), lambda x: F.pad(x, (-1, 2, 0, 1))),
    "NegBackward0": _on((3, 4))(torch.neg),
}  # fmt: skip
INDEXING: dict[str, list[Example]] = {
    "EmbeddingBackward0": _on((5, 3))(
        lambda x: F.embedding(INDEX, x), lambda x: F.embedding(INDEX.view(1, 3), x)
    ),
    "IndexBackward0": [
        *_on((3, 4))(
            lambda x: x[INDEX], lambda x: x[:, INDEX], lambda x: x[INDEX, INDEX], lambda x: x[MASK],
            lambda x: x[[0, 2], [-1, 1]],
        ),
        *_on((3, 4, 3))(
            lambda x: x[:, INDEX], lambda x: x[INDEX, :, INDEX], lambda x: x[..., INDEX],
            lambda x: x[INDEX[:, None], :, INDEX],
        ),
    ],
    "IndexSelectBackward0": _on((3, 4))(lambda x: x.index_select(1, INDEX), lambda x: x.index_select(-2, INDEX)),
    "GatherBackward0": _on((3, 4))(
        lambda x: x.gather(1, torch.tensor([[0, 3], [1, 1], [2, 0]])),
        lambda x: x.gather(-2, torch.tensor([[2, 0, 0, 1]])),
    ),
    "WhereBackward0": _on((3, 4), (3, 4))(
        lambda a, b: torch.where(MASK, a, b), lambda a, b: torch.where(MASK[:, :1], a, b)
    ),
    "MaskedFillBackward0": _on((3, 4))(lambda x: x.masked_fill(MASK, 0.0)),
    "MaskedFillBackward1": _on((3, 4), ())(lambda x, v: x.masked_fill(MASK, v)),
    "IndexPutBackward0": _on((3, 4), (2, 4))(
        lambda x, v: x.index_put((INDEX[:2],), v), lambda x, v: x.index_put((INDEX[:2],), v, accumulate=True)
    ),
}  # fmt: skip
SCALING: dict[str, list[Example]] = {
    "MulBackward1": _on((3, 4))(lambda x: torch.ops.aten.mul.Scalar(x, -3.0)),
    "DivBackward1": _on((3, 4))(lambda x: torch.ops.aten.div.Scalar(x, 0.7)),
}
REDUCTION: dict[str, list[Example]] = {
    "SumBackward0": _on((3, 4))(torch.sum),
    "MeanBackward0": _on((3, 4))(torch.mean),
    "SumBackward1": _on((3, 4, 2))(
        lambda x: x.sum(1), lambda x: x.sum(-1, keepdim=True), lambda x: x.sum((0, -1)), lambda x: x.sum((0, 1, 2))
    ),
    "MeanBackward1": _on((3, 4, 2))(
        lambda x: x.mean(1), lambda x: x.mean(-1, keepdim=True), lambda x: x.mean((0, -1), True)
    ),
    "CumsumBackward0": _on((3, 4))(lambda x: x.cumsum(0), lambda x: x.cumsum(-1)),
}
POOLING: dict[str, list[Example]] = {
    "AvgPool2DBackward0": _on(IMAGE)(
        lambda x: F.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, (2, 3), 2, (1, 0)),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), lambda x: F.avg_pool2d(x, 4, 3, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    ),
    "AvgPool3DBackward0": _on((1, 2, 4, 4, 4))(lambda x: F.avg_pool3d(x, 2), lambda x: F.avg_pool3d(x, 3, 1, 1)),
    "AdaptiveAvgPool2DBackward0": _on(IMAGE)(
        lambda x: F.adaptive_avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, (4, 1)),
        lambda x: F.adaptive_avg_pool2d(x, 7),
    ),
    "AdaptiveAvgPool3DBackward0": _on((1, 2, 4, 5, 3))(
        lambda x: F.adaptive_avg_pool3d(x, 2), lambda x: F.adaptive_avg_pool3d(x, (3, 1, 2))
    ),
    "UpsampleNearest1DBackward0": _on((2, 2, 4))(
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=7)
    ),
    "UpsampleNearest2DBackward0": _on(IMAGE)(
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=(9, 4))
    ),
    "UpsampleNearest3DBackward0": _on((1, 2, 2, 3, 2))(lambda x: F.interpolate(x, scale_factor=2)),
    "UpsampleLinear1DBackward0": _on((2, 2, 4))(lambda x: F.interpolate(x, size=7, mode="linear")),
    "UpsampleBilinear2DBackward0": _on(IMAGE)(
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
    ),
    "UpsampleBilinear2DAaBackward0": _on(IMAGE)(
        lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True)
    ),
    "UpsampleTrilinear3DBackward0": _on((1, 2, 2, 3, 2))(lambda x: F.interpolate(x, size=(3, 4, 5), mode="trilinear")),
    "UpsampleBicubic2DBackward0": _on(IMAGE)(lambda x: F.interpolate(x, size=(9, 8), mode="bicubic")),
}  # fmt: skip
CHOICE: dict[str, list[Example]] = {
    "MaxPool2DWithIndicesBackward0": _on(IMAGE)(
        lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 2, 1, 0, 2),
        lambda x: F.max_pool2d(x, 4, 3, ceil_mode=True), lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    ),
    "MaxPool3DWithIndicesBackward0": _on((1, 2, 4, 4, 4))(lambda x: F.max_pool3d(x, 2)),
    "MaxBackward0": _on((3, 4))(lambda x: x.max(1).values, lambda x: x.max(-2, keepdim=True).values),
    "MinBackward0": _on((3, 4))(lambda x: x.min(1).values),
    "TopkBackward0": _on((3, 4))(lambda x: x.topk(2).values, lambda x: x.topk(2, 0, largest=False).values),
    "SortBackward0": _on((3, 4))(lambda x: x.sort(1).values, lambda x: x.sort(0, descending=True).values),
    "KthvalueBackward0": _on((3, 4))(lambda x: x.kthvalue(2).values),
    "MaxBackward1": _on((3, 4))(lambda x: x.max()),
    "MinBackward1": _on((3, 4))(lambda x: x.min()),
    "AmaxBackward0": _on((3, 4))(lambda x: x.amax(1), lambda x: x.amax((0, 1), True)),
    "AminBackward0": _on((3, 4))(lambda x: x.amin(-1)),
    "MaximumBackward0": _on((3, 4), (3, 4))(torch.maximum),
    "MinimumBackward0": _on((3, 4), (4,))(torch.minimum),
}  # fmt: skip
STATISTIC: dict[str, list[Example]] = {
    "LinalgVectorNormBackward0": _on((3, 4))(
        lambda x: x.norm(dim=-1), lambda x: torch.linalg.vector_norm(x, 1, -1), lambda x: torch.linalg.vector_norm(x, 3)
    ),
    "StdBackward0": _on((3, 4))(lambda x: x.std(-1), lambda x: x.std(unbiased=False)),
    "VarBackward0": _on((3, 4))(lambda x: x.var(-1), lambda x: x.var(0, unbiased=False, keepdim=True)),
}
VECTOR = draw(77, 4)
OTHERS: dict[str, list[Example]] = {
    "MulBackward0": [
        *_on((3, 4), (4,))(torch.mul), *_on((3, 4))(lambda x: x * VECTOR, lambda x: VECTOR * x, lambda x: x * 3),
    ],
    "DivBackward0": [*_on((3, 4), (4,))(torch.div), *_on((3, 4))(lambda x: x / VECTOR, lambda x: x / 3)],
    "MmBackward0": [*_on((3, 4), (4, 2))(torch.mm), *_on((3, 4))(lambda x: x @ VECTOR.view(4, 1))],
    "BmmBackward0": [
        *_on((2, 3, 4), (2, 4, 2))(torch.bmm),
        *_on((2, 3, 4))(lambda x: torch.bmm(x, VECTOR.view(2, 2, 1).expand(2, 2, 4).mT)),
    ],
    "AddmmBackward0": _on((2,), (3, 4), (4, 2))(
        torch.addmm, lambda c, a, b: torch.addmm(c, a, b, beta=-2.0, alpha=0.5),
        lambda c, a, b: torch.addmm(c, a, VECTOR.view(4, 1).expand(4, 2)),
    ),
    "BaddbmmBackward0": _on((2, 3, 2), (2, 3, 4), (2, 4, 2))(
        torch.baddbmm, lambda c, a, b: torch.baddbmm(c, a, b, beta=3.0, alpha=-0.5)
    ),
    "ConvolutionBackward0": [
        *_on((2, 3, 5), (4, 3, 2), (4,))(
            F.conv1d, lambda x, w, b: F.conv1d(x, w, b, 2, 1), lambda x, w, b: F.conv1d(x, w, None, 1, 1, 2)
        ),
        *_on((2, 4, 5, 5), (4, 2, 3, 3))(
            lambda x, w: F.conv2d(x, w, groups=2), lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1)
        ),
    ],
    "AddBackward0": _on((3, 4), (4,))(torch.add, lambda a, b: torch.add(a, b, alpha=0.3)),
    "SubBackward0": _on((3, 4), (3, 1))(torch.sub, lambda a, b: torch.sub(a, b, alpha=0.3)),
    "RsubBackward0": _on((3, 4), (3, 4))(torch.rsub, lambda a, b: torch.rsub(a, b, alpha=0.3)),
    "NativeLayerNormBackward0": [
        *_on((3, 4), (4,), (4,))(lambda x, w, b: F.layer_norm(x, (4,), w, b)),
        *_on((3, 4))(lambda x: F.layer_norm(x, (4,)), lambda x: F.layer_norm(x, (3, 4))),
    ],
    "NativeBatchNormBackward0": _on((3, 4), (4,), (4,))(
        lambda x, w, b: F.batch_norm(x, VECTOR, VECTOR.abs(), w, b),
        lambda x, w, b: F.batch_norm(x, VECTOR, VECTOR.abs(), None, b),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: F.batch_norm(x, VECTOR, VECTOR.abs()),
    ),
    "NativeGroupNormBackward0": [
        *_on((3, 4, 2), (4,), (4,))(lambda x, w, b: F.group_norm(x, 2, w, b)),
        *_on((3, 4, 2))(lambda x: F.group_norm(x, 4)),
    ],
    **{name: [Example(f.torch, positive=f.low > -2) for f in many] for name, many in FUNCTIONS.items()},
    **{name: [Example(f, positive=True)] for name, f in COEFFICIENTS.items()},
    **{name: [Example(f)] for name, f in PIECEWISE.items()},
}  # fmt: skip
FAMILIES: dict[str, dict[str, list[Example]]] = {
    "movement": MOVEMENT, "scaling": SCALING, "indexing": INDEXING, "reduction": REDUCTION, "pooling": POOLING,
    "choice": CHOICE, "statistic": STATISTIC,
}  # fmt: skip
EXAMPLES = {name: many for family in [*FAMILIES.values(), OTHERS] for name, many in family.items()}
ELSEWHERE = {
    "SqueezeBackward3": "only of nested tensors",
    "ContiguousBackward0": "contiguous() is recorded as clone",
    "LiftFreshBackward0": "only while tracing",
    "torch::autograd::CopyBackwards": "only between devices",
    "CudnnBatchNormBackward0": "only on GPUs",
    "MiopenBatchNormBackward0": "only on GPUs",
    "BackwardHookFunctionBackward": "only of modules with backward hooks",
}
"""Nodes that no function on a CPU makes."""


def _cases(table: dict[str, list[Example]]) -> list[Any]:
    return [pytest.param(name, e, id=f"{name}-{i}") for name, many in table.items() for i, e in enumerate(many)]


def _inputs(example: Example, seed: int = 0) -> list[Tensor]:
    found = [draw(seed + i, *shape) for i, shape in enumerate(example.shapes)]
    return [x.abs() + 0.1 for x in found] if example.positive else found


def test_no_operation_is_forgotten() -> None:
    """A new operation of these families, or with a replay, needs an example."""
    families = {*FAMILIES, "embedding"}
    wanted = {n for n, o in REGISTRY.items() if o.family in families or o.replay is not None} - set(ELSEWHERE)
    assert wanted - set(EXAMPLES) == set()
    assert set(EXAMPLES) - set(REGISTRY) == set()


@pytest.mark.parametrize(("name", "example"), _cases(EXAMPLES))
def test_the_example_is_of_this_operation(name: str, example: Example) -> None:
    y = example.function(*(x.requires_grad_() for x in _inputs(example)))
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name


# Replay -----------------------------------------------------------------------------------------------------

REPLAYED = {name: many for name, many in EXAMPLES.items() if name in REGISTRY and REGISTRY[name].replay is not None}


def _equal(ours: Tensor, forward: Tensor, name: str) -> None:
    assert ours.dtype == forward.dtype
    assert ours.shape == forward.shape
    if REGISTRY[name].family in ("normalization", "dense", "convolution"):
        same(ours, forward, 1e-14)  # fused kernels round in another order
    else:
        assert torch.equal(ours, forward)


@pytest.mark.parametrize(("name", "example"), _cases(REPLAYED))
def test_replay_is_the_forward(name: str, example: Example) -> None:
    """From the values of the operands, and for factors that are no node's result from what the node saved."""
    y = example.function(*(x.requires_grad_() for x in _inputs(example)))
    nodes = [node for node, _ in y.grad_fn.next_functions]
    if any(node is not None and not hasattr(node, "variable") for node in nodes):
        pytest.skip("an operand is made on the way, which the next test covers")
    values = [None if node is None else node.variable.detach() for node in nodes]
    replay = REGISTRY[name].replay
    assert replay is not None
    with torch.no_grad():
        _equal(replay(Operands(y.grad_fn), *values), y.detach(), name)


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


@pytest.mark.parametrize(("name", "example"), _cases(REPLAYED))
def test_a_promise_through_it_is_kept(name: str, example: Example) -> None:
    """A rule needs the output, the operation's operands come from another operation, and nobody saved either."""
    forward: list[Tensor] = []
    copy = torch.clone if name == "NegBackward0" else torch.neg

    def model(*inputs: Tensor) -> Tensor:
        y = example.function(*(copy(copy(x)) for x in inputs))
        forward.append(y.detach())
        return copy(y)

    probe = Probe()
    target = torch.mean if name == "SumBackward0" else torch.sum
    composite = Composite.of("probe", {When(name=name): probe})
    explanation = explain(model, tuple(_inputs(example)), target, composite=composite)
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

LINEAR = {
    name: many
    for family in (MOVEMENT, INDEXING, SCALING, REDUCTION, POOLING, CHOICE)
    for name, many in family.items()
}  # fmt: skip


@pytest.mark.parametrize(("name", "example"), _cases(LINEAR))
def test_linear_operations_conserve(name: str, example: Example) -> None:
    """The VJP hands on exactly the relevance that arrives, and each input gets x times its gradient."""
    inputs = _inputs(example)
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = example.function(*leaves)
    m = draw(9, *y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, m, allow_unused=True)
    wanted = [x * (torch.zeros_like(x) if g is None else g) for x, g in zip(inputs, grads, strict=True)]
    explanation = explain(example.function, tuple(inputs), lambda y: (y * m).sum())
    for ours, theirs in zip(explanation.relevance, wanted, strict=True):
        assert ours is not None or not theirs.any()
        same(torch.zeros_like(theirs) if ours is None else ours, theirs)
    rough = 1e-2 if y.dtype == torch.bfloat16 else 1e-5 if y.dtype == torch.float32 else 1e-10
    terms = y.detach().double() * m.double()
    number(explanation.ledger.output, terms.sum(), rough)
    assert abs(explanation.ledger.accounts["inputs"] - explanation.ledger.output) <= rough * float(terms.abs().sum())


@pytest.mark.parametrize(("name", "example"), _cases({**MOVEMENT, **INDEXING}))
def test_movements_conserve_in_the_other_gauge(name: str, example: Example) -> None:
    """Behind a rule that hands on relevance they move relevance itself; none is divided by an activation."""
    if example.function(*_inputs(example)).dtype != torch.float64:
        pytest.skip("a change of type")
    inputs = [x * (draw(3, *x.shape) > -0.5) for x in _inputs(example)]  # some exact zeros
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = example.function(*leaves)
    weight = draw(10, 2, y.numel())
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    # Flat gives every input of the layer the same relevance, r, and every element its count of copies of it.
    r = float(((y.detach().reshape(1, -1) @ weight.t()) / (y.numel() + 1e-6)).sum())
    sign = -1.0 if name == "NegBackward0" else 1.0
    wanted = [r * (torch.zeros_like(x) if g is None else sign * g) for x, g in zip(inputs, grads, strict=True)]
    composite = Composite.of("flat", {"dense": Flat()})
    explanation = explain(
        lambda *xs: F.linear(example.function(*xs).reshape(1, -1), weight),
        tuple(inputs),
        torch.sum,
        composite=composite,
    )
    for ours, theirs, x in zip(explanation.relevance, wanted, inputs, strict=True):
        if name in ("NegBackward0", "EmbeddingBackward0"):  # by multipliers, which zeros do not have
            theirs = torch.where(x == 0, 0.0, theirs)
        assert ours is not None or not theirs.any()
        same(torch.zeros_like(theirs) if ours is None else ours, theirs)


def test_the_padding_row_of_an_embedding_has_relevance() -> None:
    """Training leaves it alone and autograd gives it no gradient; its value takes part all the same."""
    x, m = draw(0, 5, 3), draw(1, 3, 3)
    padded = explain(lambda x: F.embedding(INDEX, x, 0), x, lambda y: (y * m).sum())
    plain = explain(lambda x: F.embedding(INDEX, x), x, lambda y: (y * m).sum())
    agrees(padded, plain.relevance, {"inputs": plain.ledger.output})


def _tied() -> Tensor:
    return torch.tensor([[1.0, 3.0, 3.0, -2.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, -1.0, 0.0]]).double()


TIES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "max_pool1d overlapping": lambda x: F.max_pool1d(x, 3, 1),
    "max_pool2d": lambda x: F.max_pool2d(x[None, None], 2, 1),
    "max": lambda x: x.max(1).values,
    "max of all": lambda x: x.max(),
    "amax": lambda x: x.amax(1),
    "min": lambda x: x.min(1).values,
    "amin": lambda x: x.amin(0),
    "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort(1).values,
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_go_where_autograd_sends_them(name: str) -> None:
    """To one element, or shared among equals: either way relevance is conserved."""
    x = _tied()
    leaf = x.clone().requires_grad_()
    y = TIES[name](leaf)
    m = draw(3, *y.shape)
    (gradient,) = torch.autograd.grad(y, leaf, m)
    explanation = explain(TIES[name], x, lambda y: (y * m).sum())
    agrees(explanation, x * gradient, {"inputs": (y.detach() * m).sum()})


# Sums over dimensions, several outputs ----------------------------------------------------------------------


@pytest.mark.parametrize("function", ["norm", "std", "var"])
def test_statistics_as_signals(function: str) -> None:
    """Read as signals, norm and deviation have degree 1 and the variance degree 2, so that relevance is conserved."""
    x, m = draw(0, 3, 5), draw(1, 3)
    functions = {"norm": lambda x: x.norm(dim=1), "std": lambda x: x.std(1), "var": lambda x: x.var(1)}
    explanation = explain(functions[function], x, lambda y: (y * m).sum())
    same(explanation.relevance.sum(1), functions[function](x) * m)
    agrees(explanation, explanation.relevance, {"held back": 0.0})


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


def test_resampling_conserves_whatever_its_size() -> None:
    x = draw(0, 1, 2, 5, 5)
    for mode, size in itertools.product(("nearest", "bilinear", "bicubic"), (3, 7, 11)):
        y = F.interpolate(x, size=(size, size), mode=mode)
        explanation = explain(lambda x, m=mode, s=size: F.interpolate(x, size=(s, s), mode=m), x, torch.sum)
        number(float(explanation.relevance.sum()), y.sum())
        assert explanation.ledger.closes


def test_padding_with_zeros_takes_nothing() -> None:
    x = draw(0, 2, 3)
    agrees(explain(lambda x: F.pad(x, (2, 1)), x, torch.sum), x, {"constants": 0.0})
    assert math.isclose(explain(lambda x: F.pad(x, (2, 1), value=0.5), x, torch.sum).ledger.output, float(x.sum()) + 3)

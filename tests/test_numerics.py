"""Numbers at their edges: exact zeros, no division where none is due, half precision, masks, ties, nothing at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dynlrp import COMPOSITES, Composite, Explanation, InputError, NonFiniteError, explain, relevance
from dynlrp.precision import Wide
from dynlrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Operation, Rule, WSquare, ZBox, ZPlus
from dynlrp.rules.operation import divide
from tests.conftest import Apply, close, gradient_x_input, sample
from tests.oracle import draw, same

# The stabiliser ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_the_sign_of_zero_is_plus(relative: bool) -> None:
    """A zero of either sign is pushed up, and never divided by."""
    z = torch.tensor([[0.0, -0.0, 1.0, -1.0, 1e-9, -1e-9]], dtype=torch.float64)
    unit = 0.5 * (float(z.square().mean()) ** 0.5 if relative else 1.0)
    expected = [1 / unit, 1 / unit, 1 / (1 + unit), 1 / (-1 - unit), 1 / (1e-9 + unit), 1 / (-1e-9 - unit)]
    same(divide(torch.ones_like(z), z, 0.5, relative), torch.tensor([expected], dtype=torch.float64), 1e-15)


EXACT: dict[str, tuple[Rule, float, float]] = {
    # Inputs 1 and 1, weights 1 and -1: the sum is an exact zero, and relevance 1 arrives there.
    "epsilon": (Epsilon(0.5), 2.0, -2.0),
    "epsilon, relative": (Epsilon(0.5, relative=True), 0.0, 0.0),  # no scale either
    "zplus": (ZPlus(epsilon=0.5), 1 / 1.5, 0.0),
    "alpha_beta": (AlphaBeta(epsilon=0.5), 2 / 1.5, -1 / 1.5),
    "gamma": (Gamma(epsilon=0.5), 0.0, 0.0),  # neither sign
    "gamma, unsigned": (Gamma(1.0, signed=False, epsilon=0.5), 2 / 1.5, -1 / 1.5),
    "wsquare": (WSquare(epsilon=0.5), 1 / 2.5, 1 / 2.5),
    "flat": (Flat(epsilon=0.5), 1 / 2.5, 1 / 2.5),
    "zbox": (ZBox(1.0, 1.0, epsilon=0.5), 0.0, 0.0),  # both bounds are the inputs: 0 over + epsilon
}


@pytest.mark.parametrize("zero", [1.0, -1.0])
@pytest.mark.parametrize("name", EXACT)
def test_relevance_that_meets_an_exact_zero(name: str, zero: float) -> None:
    """``zero``: the sum is +0 or -0, by the order of its terms."""
    rule, first, second = EXACT[name]
    weight = torch.tensor([[1.0, -1.0]]).double() * zero
    x = torch.ones(1, 2).double()
    explanation = explain(
        lambda x: F.linear(x, weight), x, torch.ones(1, 1).double(), composite=Composite.of("one", {"dense": rule})
    )
    expected = [first, second] if zero > 0 or name in ("wsquare", "flat") else [second, first]
    same(explanation.relevance, torch.tensor([expected], dtype=torch.float64), 1e-12)
    assert explanation.ledger.closes


def test_an_epsilon_that_half_precision_cannot_hold() -> None:
    """It would be a division by zero: an error, and right in float32."""
    weight, x = torch.tensor([[1.0, -1.0]]).half(), torch.ones(1, 2).half()
    composite, target = Composite.of("one", {"dense": Epsilon(1e-9)}), torch.ones(1, 1).half() * 1e-3
    with pytest.raises(NonFiniteError):
        explain(lambda x: F.linear(x, weight), x, target, composite=composite)
    found = explain(lambda x: F.linear(x, weight), x, target, composite=composite, precision=torch.float32)
    same(found.relevance.double(), target.double() * torch.tensor([[1e9, -1e9]], dtype=torch.float64), 1e-6)


# Divisions --------------------------------------------------------------------------------------------------


class Divisions(TorchDispatchMode):
    """Operations that divide by a tensor, with the shape of what they divide by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0].strip("_")
        if any(part in name for part in ("div", "reciprocal", "rsqrt", "remainder")):
            by = args[-1] if "div" in name else args[0]
            if isinstance(by, Tensor) and by.ndim:  # counts of elements are numbers
                self.found.append((name, tuple(by.shape)))
        return func(*args, **(kwargs or {}))


def walked(name: str, composite: str) -> list[tuple[str, tuple[int, ...]]]:
    """The divisions on the way of relevance through a model."""
    model, inputs, _ = sample(name)
    if isinstance(inputs, dict):
        x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        output = model(inputs_embeds=x).logits
    else:
        x = inputs.clone().requires_grad_()
        output = model(x)
        output = getattr(output, "logits", output)
    with Divisions() as divisions:
        relevance(output.flatten(1)[:, 3], x, composite=composite)
    return divisions.found


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "gpt2", "llama", "bert"])
def test_multipliers_are_never_divided_by_activations(name: str) -> None:
    """Batch norm scales by its running variance, and the secant of tanh, as the rules document it, by its argument."""
    allowed = {"resnet": {"rsqrt"}, "bert": {"div"}}.get(name, set())
    found = walked(name, "attnlrp")
    assert {operation for operation, _ in found} == allowed
    if name == "resnet":
        assert {len(shape) for _, shape in found} == {1}  # channels
    if name == "bert":
        assert len(found) == 1  # the pooler's


def test_a_division_would_be_seen() -> None:
    for name in ("vgg", "vit"):
        assert walked(name, "epsilon_plus")


# Half precision ---------------------------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]
MODELS = ["resnet", "conv_bn", "vit", "gpt2", "llama", "bert"]


def in_half(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    model, inputs, target = sample(name)
    model = copy.deepcopy(model).to(dtype)
    return model, inputs if isinstance(inputs, dict) else inputs.to(dtype), target


def distance(found: Explanation, expected: Explanation) -> float:
    """Of all relevance, relative to the size of what is expected."""
    ours, theirs = (torch.cat([t.double().flatten() for t in e.tensors()]) for e in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("composite", ["attnlrp", "auto", "epsilon_plus"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_relevance_of_half_precision_models_in_float32(name: str, dtype: torch.dtype, composite: str) -> None:
    """With the activations that the model made, nothing more is rounded: as exact as in float64 with those."""
    model, inputs, target = in_half(name, dtype)
    wide = explain(model, inputs, target, composite=composite, precision=torch.float32)
    exact = explain(model, inputs, target, composite=composite, precision=torch.float64)
    coarse = explain(model, inputs, target, composite=composite)
    assert all(t.dtype is torch.float32 for t in wide.tensors())
    assert all(t.dtype is torch.float64 for t in exact.tensors())
    # Multipliers of float32 through a few layers. A rule that divides amplifies what it is given.
    assert distance(wide, exact) < (1e-5 if composite == "attnlrp" else 1e-3)
    assert distance(coarse, exact) > 5e-4
    # What is left is the rounding of the forward pass: 8 or 11 digits of every activation, the output's among them.
    assert wide.ledger.error < {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert torch.equal(wide.value, coarse.value)


@pytest.mark.parametrize("dtype", HALVES)
def test_precision_against_a_net_by_hand(dtype: torch.dtype) -> None:
    """Two layers: the multipliers are products of the weights as they are, the activations those of the model."""
    first, second = nn.Linear(6, 8).to(dtype), nn.Linear(8, 3, bias=False).to(dtype)
    model, x = nn.Sequential(first, nn.ReLU(), second), draw(0, 4, 6).to(dtype)
    alive = (first(x) > 0).double()
    m = (alive * second.weight.double()[1]) @ first.weight.double()
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        found = explain(model, x, 1, precision=torch.float64, layers="1")
        same(found.relevance, m.detach() * x.double(), 1e-14)
        same(found.layers["1"], (first(x).relu().double() * second.weight.double()[1]).detach(), 1e-14)
        single = explain(model, x, 1, precision=torch.float32, parameters="0.weight")
        same(single.relevance.double(), m.detach() * x.double(), 1e-6)
        assert single.parameters["0.weight"].dtype is torch.float32


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_the_model_runs_as_it_is_whatever_the_precision(name: str) -> None:
    model, inputs, target = in_half(name, torch.bfloat16)
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(getattr(output, "logits", output)))
    try:
        explain(model, inputs, target)
        explain(model, inputs, target, precision=torch.float32)
    finally:
        handle.remove()
    assert torch.equal(seen[0], seen[1])


def test_precision_of_a_wider_model_changes_nothing() -> None:
    model, inputs, target = sample("gpt2")
    plain, wide = (explain(model, inputs, target, precision=p) for p in (None, torch.float32))
    assert torch.equal(plain.relevance["input_ids"], wide.relevance["input_ids"])


def test_multipliers_that_half_precision_cannot_hold() -> None:
    """Activations stay in the range of float16, from 1e4 down to 1e-4 and up again; the multiplier of 1e-4 is 2^24."""

    def model(x: Tensor) -> Tensor:
        for factor in (2.0**-12, 2.0**-12, 2.0**12, 2.0**12):
            x = x * factor
        return x

    x = draw(0, 2, 8).half() * 8000
    with pytest.raises(NonFiniteError, match="relevance is not finite"):
        explain(model, x, 1)
    found = explain(model, x, 1, precision=torch.float32)
    same(found.relevance[:, 1].double(), x[:, 1].double(), 1e-6)
    assert found.ledger.closes  # powers of two round nothing


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_autocast_in_wide_precision(precision: torch.dtype) -> None:
    """Where a model is cast on the way, relevance is not."""
    model, inputs, target = sample("llama")
    model = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        wide = explain(model, inputs, target, precision=precision)
        exact = explain(model, inputs, target, precision=torch.float64)
        coarse = explain(model, inputs, target)
    assert wide.tensors()[0].dtype is precision
    assert distance(wide, exact) < 1e-5
    assert distance(coarse, exact) > 1e-3


# Nodes that compute in their own dtype alone


class Own(torch.autograd.Function):
    """Holds its factor beyond the reach of saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.w = w
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.w.t(), None


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_custom_function_is_called_in_its_own_dtype(dtype: torch.dtype) -> None:
    from dynlrp.rules import linear_operation

    linear_operation("OwnBackward")
    w = draw(1, 6, 8).to(dtype)
    back = draw(2, 8, 1).to(dtype) * 2.0**-20  # multipliers below the range of float16
    x = draw(0, 4, 6).to(dtype)

    def model(x: Tensor) -> Tensor:
        return (Own.apply(x, w).float() @ back.float()) * 2.0**10

    found = explain(model, x, 0, precision=torch.float32).relevance
    expected = x.double() * (w.double() @ back.double()).t() * 2.0**10
    assert found.dtype is torch.float32
    same(found.double(), expected, 4 * torch.finfo(dtype).eps)  # rounded once on the way in, once on the way out


@pytest.mark.parametrize("dtype", HALVES)
def test_operations_whose_buffers_are_of_their_dtype(dtype: torch.dtype, registry: dict[str, Operation]) -> None:
    """As the recurrent kernels of cuDNN have them: the node gets multipliers in its own dtype, scaled."""
    x, w, m = draw(0, 4, 6).to(dtype), draw(1, 6).to(dtype), draw(2, 6).float() * 2.0**-20

    def model(x: Tensor) -> Tensor:
        return (torch.tril(x * w).float() * m).sum(1)

    x = x[:, :4]
    w, m = w[:4], m[:4]
    expected = explain(model, x, precision=torch.float32).relevance
    registry["TrilBackward0"] = replace(registry["TrilBackward0"], own_dtype=True)
    found = explain(model, x, precision=torch.float32).relevance
    assert found.dtype is torch.float32
    same(found.double(), expected.double(), 4 * torch.finfo(dtype).eps)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_derivatives_that_return_to_their_own_dtype(dtype: torch.dtype) -> None:
    """That of a cumulative sum casts what it is given: the multipliers are scaled into its range before."""
    x, m = draw(0, 4, 6).to(dtype), draw(2, 6).float() * 2.0**-30
    found = explain(lambda x: (x.cumsum(1).float() * m).sum(1), x, precision=torch.float32).relevance
    expected = x.double() * m.double().flip(0).cumsum(0).flip(0)
    assert found.dtype is torch.float32
    same(found.double(), expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALVES)
def test_checkpointed_blocks_in_wide_precision(dtype: torch.dtype) -> None:
    """Their saved tensors come from hooks of their own, in half precision: coarser, and neither zero nor infinite."""
    block = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)).to(dtype)
    head = nn.Linear(6, 3).to(dtype)
    x = draw(0, 4, 6).to(dtype)
    plain = explain(lambda x: head(block(x)), x, 1, precision=torch.float32)
    found = explain(lambda x: head(checkpoint(block, x, use_reentrant=False)), x, 1, precision=torch.float32)
    assert found.relevance.dtype is torch.float32
    same(found.relevance.double(), plain.relevance.double(), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALVES)
def test_copies_in_their_own_dtype_are_exact(dtype: torch.dtype) -> None:
    """Indexing cannot mix dtypes; as it computes nothing, multipliers go through in pieces, with all their digits."""
    x, rows = draw(0, 5, 4).to(dtype), torch.tensor([3, 0, 4])
    m = draw(1, 3, 4).float()
    leaf = x.clone().requires_grad_()
    with Wide(torch.float32).saving():
        y = (leaf * 1.0)[rows]
    (found,) = (g for g in Wide(torch.float32).vjp(y.grad_fn, [m]) if g is not None)
    expected = torch.zeros(5, 4).index_put((rows,), m)
    same(found.double(), expected.double(), 2.0**-22)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.int64, "float32"])
def test_precisions_that_are_none(precision: Any) -> None:
    with pytest.raises(InputError, match=r"torch\.float32 or torch\.float64"):
        explain(nn.Linear(3, 2), torch.randn(2, 3), 1, precision=precision)


def test_hooks_that_are_set_around_keep_their_part() -> None:
    """Saved tensors lie on the CPU in numpy arrays meanwhile, and come back wide."""
    model, inputs, target = in_half("gpt2", torch.float16)
    calls: list[str] = []

    def pack(tensor: Tensor) -> Any:
        calls.append("pack")
        return tensor.detach().numpy().copy()

    def unpack(array: Any) -> Tensor:
        calls.append("unpack")
        return torch.from_numpy(array.copy())

    expected = explain(model, inputs, target, precision=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = explain(model, inputs, target, precision=torch.float32)
    assert {"pack", "unpack"} == set(calls)
    assert torch.equal(found.relevance["input_ids"], expected.relevance["input_ids"])


def test_what_is_changed_in_place_is_seen_in_wide_precision_too() -> None:
    """Autograd does not look at the versions of tensors under hooks."""
    from dynlrp import BrokenPromiseError

    def model(x: Tensor) -> Tensor:
        factor = torch.ones(3, dtype=x.dtype)
        y = x * factor
        factor.mul_(2.0)
        return y

    for precision in (None, torch.float32):
        with pytest.raises(BrokenPromiseError, match="changed in place"):
            explain(model, torch.randn(2, 3).half(), 1, precision=precision)


# Masks ------------------------------------------------------------------------------------------------------


def attention(kind: str, mask: Tensor) -> Callable[[Tensor], Tensor]:
    def written_out(x: Tensor) -> Tensor:
        return ((x @ x.mT * 0.5 + mask).softmax(-1) @ x).flatten(1)

    def fused(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).flatten(1)

    return written_out if kind == "written out" else fused


@pytest.mark.parametrize("fill", ["-inf", "lowest", -1e9])
@pytest.mark.parametrize("kind", ["written out", "fused"])
@pytest.mark.parametrize("composite", ["attnlrp", "cplrp", "epsilon_plus", "dynamiclrp"])
def test_whatever_a_mask_is_filled_with(composite: str, kind: str, fill: str | float) -> None:
    """Queries that see themselves and what was before: the same as attention over those alone."""
    x = draw(0, 1, 1, 4, 4)
    value = {"-inf": -math.inf, "lowest": torch.finfo(torch.float64).min}.get(str(fill), fill)
    mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4).triu(1).bool(), float(value))
    # Entry 5 of the output is of position 1, which sees positions 0 and 1.
    found = explain(attention(kind, mask), x, 5, composite=composite)
    alone = explain(attention(kind, mask[:2, :2]), x[:, :, :2].contiguous(), 5, composite=composite)
    close(found.relevance[:, :, :2], alone.relevance, 1e-10)
    assert found.relevance[:, :, 2:].count_nonzero() == 0
    assert found.ledger.closes


def test_a_row_that_sees_nothing() -> None:
    x = draw(0, 2, 1, 3, 4)
    nothing = torch.full((3, 3), -torch.inf, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="SoftmaxBackward0"):
        explain(attention("written out", nothing), x, 5)
    blind = torch.zeros(3, 3, dtype=torch.bool)  # the fused kernel gives zeros
    explanation = explain(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=blind).flatten(1), x, 5)
    assert explanation.relevance.count_nonzero() == 0
    assert explanation.ledger.closes


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fill", ["-inf", "lowest"])
def test_masks_in_half_precision(fill: str, dtype: torch.dtype) -> None:
    x = draw(0, 2, 1, 4, 4).to(dtype)
    value = -math.inf if fill == "-inf" else torch.finfo(dtype).min
    mask = torch.zeros(4, 4, dtype=dtype).masked_fill(torch.ones(4, 4).triu(1).bool(), value)
    for kind in ("written out", "fused"):
        for precision in (None, torch.float32):
            found = explain(attention(kind, mask), x, 5, precision=precision)
            assert found.finite()
            expected = explain(attention(kind, mask.double()), x.double(), 5)
            close(found.relevance.double(), expected.relevance, {torch.float16: 0.01, torch.bfloat16: 0.08}[dtype])


# Zeros and constants ----------------------------------------------------------------------------------------

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda x: F.layer_norm(x, (6,)),
    "group": lambda x: F.group_norm(x, 2),
    "instance": lambda x: F.instance_norm(x.view(2, 2, 3)).flatten(1),
    "rms": lambda x: F.rms_norm(x, (6,)),
    "unit length": lambda x: F.normalize(x, dim=1),
    "written out": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt(),
}


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus", "dynamiclrp"])
@pytest.mark.parametrize("constant", [0.0, 1.5])
@pytest.mark.parametrize("name", NORMS)
def test_no_variance(name: str, constant: float, composite: str) -> None:
    """A sample that is the same everywhere: what is normalised is zero, or as large as it was, and all is finite."""
    x = torch.full((2, 6), constant, dtype=torch.float64)
    x[1] = draw(0, 6)
    both = explain(lambda x: NORMS[name](x) @ W, x, 1, composite=composite)
    assert both.finite()
    assert both.ledger.closes
    # The sample beside it is as it is alone.
    alone = explain(lambda x: NORMS[name](x) @ W, x.flip(0).expand(2, 6).clone(), 1, composite=composite)
    close(both.relevance[1], alone.relevance[0], 1e-12)
    rest = sum(amount for account, amount in both.ledger.accounts.items() if account != "inputs")
    assert float(both.relevance.sum()) == pytest.approx(float(both.value.sum()) - rest, abs=1e-9)


W = draw(9, 6, 3)


def test_no_variance_and_nothing_added_to_it() -> None:
    with pytest.raises(NonFiniteError, match="NativeLayerNormBackward0"):
        explain(lambda x: F.layer_norm(x, (6,), eps=0.0) @ W, torch.ones(2, 6).double(), 1)


def test_a_standard_deviation_of_zero_in_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double().eval()
    model[0].running_var.zero_()
    for composite in ("attnlrp", "epsilon_plus", "auto"):
        explanation = explain(model, draw(0, 2, 6), 1, composite=composite)
        assert explanation.finite()
        assert explanation.ledger.closes


@pytest.mark.parametrize("composite", [name for name in COMPOSITES if name != "gradient_x_input"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "vit"])
def test_inputs_that_are_zero(name: str, composite: str) -> None:
    """All of the output belongs to what was added on the way, unless a rule gives pixels a share whatever they are."""
    model, inputs, _ = sample(name)
    explanation = explain(model, torch.zeros_like(inputs), 1, composite=composite)
    assert explanation.finite()
    assert explanation.ledger.closes
    if "flat" not in composite and "box" not in composite:
        assert explanation.relevance.count_nonzero() == 0


# Ties -------------------------------------------------------------------------------------------------------

TIES: dict[str, Callable[[Tensor], Tensor]] = {
    "max pooling": lambda x: F.max_pool1d(x[:, None], 2).flatten(1),
    "max": lambda x: x.view(2, 2, 2).max(2).values,
    "amax": lambda x: x.view(2, 2, 2).amax(2),
    "maximum": lambda x: torch.maximum(x[:, :2], x[:, 2:]),
    "sort": lambda x: x.sort(dim=1, stable=True).values[:, :2],
    "topk": lambda x: x.topk(2, 1).values,
    "relu at zero": lambda x: (x - 1.0).relu()[:, :2],
    "median": lambda x: x.median(1, keepdim=True).values.expand(2, 2),
    "clamp at its bound": lambda x: x.clamp(0.0, 1.0)[:, :2],
}


@pytest.mark.parametrize("name", TIES)
def test_ties_go_as_autograd_sends_them(name: str) -> None:
    """To the first, or in equal parts: as the derivative of PyTorch does it, and nothing is lost or counted twice."""
    x = torch.ones(2, 4, dtype=torch.float64)
    explanation = explain(TIES[name], x, 1, composite="attnlrp")
    if name != "clamp at its bound":
        (expected,) = gradient_x_input(lambda x: TIES[name](x)[:, 1], x)
        close(explanation.relevance, expected) if expected.any() else None
    assert explanation.ledger.closes
    close(explanation.relevance.sum(1), explanation.value) if explanation.value.any() else None


# Nothing at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("target", [None, 1, []])
def test_a_batch_of_nothing(target: Any, composite: str) -> None:
    model, inputs, _ = sample("resnet")
    with pytest.raises(InputError, match="the batch is empty"):
        explain(model, inputs[:0], target, composite=composite)
    total = explain(model, inputs[:0], torch.sum, composite=composite)  # a number all the same, zero
    assert total.relevance.shape == inputs[:0].shape
    assert total.value.tolist() == [0.0]
    assert total.ledger.closes


@pytest.mark.parametrize("composite", COMPOSITES)
def test_inputs_without_elements(composite: str) -> None:
    """No features and no positions: all of the output belongs to the biases."""
    model = nn.Sequential(nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    explanation = explain(model, torch.zeros(3, 0).double(), 1, composite=composite)
    assert explanation.relevance.shape == (3, 0)
    assert explanation.ledger.closes or composite == "gradient_x_input"
    empty = explain(lambda x: x.sum(1), torch.zeros(3, 0, 5).double(), 1, composite=composite)
    assert empty.relevance.shape == (3, 0, 5)
    assert empty.value.tolist() == [0.0] * 3
    with pytest.raises(InputError, match="no entry"):
        explain(nn.Linear(3, 0).double(), torch.zeros(2, 3).double(), composite=composite)
    with pytest.raises(NonFiniteError, match="MeanBackward1"):
        explain(lambda x: x.mean(1), torch.zeros(3, 0, 5).double(), 1, composite=composite)


@pytest.mark.parametrize("composite", ["attnlrp", "dynamiclrp", "epsilon_plus"])
def test_parts_without_elements(composite: str) -> None:
    """An empty cache beside a full tensor."""
    x = draw(0, 3, 4)
    found = explain(lambda x: torch.cat([x[:, :0], x * 2.0, x[:, 4:]], 1), x, 1, composite=composite)
    same(found.relevance, torch.zeros(3, 4).double().index_copy(1, torch.tensor([1]), 2 * x[:, 1:2]))


@pytest.mark.parametrize("composite", COMPOSITES)
def test_numbers_without_dimension(composite: str) -> None:
    x = torch.tensor(2.0, dtype=torch.float64)
    found = explain(Apply(lambda x: x * 3.0 + x.relu()), x, composite=composite)
    assert found.relevance.shape == ()
    assert float(found.relevance) == pytest.approx(8.0)
    assert found.value.tolist() == [8.0]
    assert found.ledger.closes
    pair = explain(lambda x, s: (x * s).sum(), (draw(0, 3), x), composite=composite)
    assert pair.relevance[1].shape == ()
    leaf = x.clone().requires_grad_()
    assert float(relevance(leaf * 3.0, leaf, composite=composite).relevance) == pytest.approx(6.0)

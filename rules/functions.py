"""Custom ``torch.autograd.Function``s of PyTorch, transformers and bitsandbytes, by what they stand for.

Nodes are known by the name of their class alone, so the module that the class comes from is looked at too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.elementwise import Function, elementwise
from dynlrp.rules.expansion import expand
from dynlrp.rules.linear import lost_bias
from dynlrp.rules.operation import VJP, Grads, Step, blocked, linear_operation
from dynlrp.rules.shape import always


def comes_from(module: str) -> dict[str, Any]:
    """Traits that let a class of this module pass, and none of the same name."""

    def facts(node: Any) -> bool:
        return bool(node._forward_cls.__module__ == module)

    def blocked(ours: Any) -> str:
        return "" if ours else f"it has the name of a function of {module} but comes from elsewhere"

    return {"facts": facts, "blocked": blocked}


# What is put around a module: by PyTorch, and by the capture of a module's output.


@dataclass(frozen=True)
class Untouched(VJP):
    """m_x = m: what goes in comes out (exact: the function is the identity). Its own backward does other things, and
    is not called."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return list(grads)


for _name, _module in (
    ("BackwardHookFunctionBackward", "torch.nn.modules._functions"),  # full backward hooks
    ("_DDPSinkBackward", "torch.nn.parallel.distributed"),  # DistributedDataParallel, where it looks for unused weights
    ("ModuleOutputBackward", "dynlrp.capture"),
):
    linear_operation(
        _name,
        family="movement",
        rule=Untouched(),
        copies=True,
        identity=True,
        sign="same",
        replay=lambda step, *xs: xs,
        **comes_from(_module),
    )

blocked(
    "a reentrant checkpoint records nothing of what runs in it: call torch.utils.checkpoint.checkpoint with "
    "use_reentrant=False, or switch checkpointing off (model.gradient_checkpointing_disable())",
    "CheckpointFunctionBackward",
)

# Bloom's gelu, with its digits.


def _tanh_gelu(step: Any, x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


elementwise(
    "GeLUFunctionBackward",
    Function(lambda s, x: x * _tanh_gelu(s, x), slope=0.5, secant=_tanh_gelu),
    saved={0: 0},
    gate=True,
    **comes_from("transformers.models.bloom.modeling_bloom"),
)

# RecurrentGemma's square root, whose derivative alone is bounded.
elementwise(
    "SqrtBoundDerivativeBackward",
    Function(lambda s, x: torch.sqrt(x), slope=0.0, smooth=False),
    saved={0: 0},
    sign="nonnegative",
    **comes_from("transformers.models.recurrent_gemma.modeling_recurrent_gemma"),
)

# BitNet's quantised weights and activations: up to a rounding error, through which the derivative goes straight.
for _name in ("WeightQuantBackward", "ActQuantBackward"):
    linear_operation(_name, family="rounding", hides=always, **comes_from("transformers.integrations.bitnet"))


def _masked_softmax(step: Any, x: Tensor, *_: Any) -> Tensor:
    """DeBERTa's: 0 where masked, also where a whole row is."""
    masked = step.saved(0) == 0
    scores = x.masked_fill(masked, torch.finfo(x.dtype).min)
    return torch.softmax(scores, step.saved("dim")).masked_fill(masked, 0.0)


expand("XSoftmaxBackward", _masked_softmax, "softmax", **comes_from("transformers.models.sew_d.modeling_sew_d"))


def _expected_collisions(step: Any, *operands: Tensor | None) -> Tensor:
    """YOSO's attention: the probability that the hashes of a query and a key are equal."""
    query_mask, key_mask = step.saved(0), step.saved(1)
    query, key, value = (step.saved(3 + i) if x is None else x for i, x in enumerate(operands[2:5]))
    weights = (1 - torch.acos(query @ key.mT) / math.pi) ** step.saved("config")["hash_code_len"]
    result: Tensor = (weights * query_mask[:, :, None] * key_mask[:, None, :]) @ value
    return result


expand("YosoCumulationBackward", _expected_collisions, **comes_from("transformers.models.yoso.modeling_yoso"))


def _reversible(step: Any, x: Tensor, *_: Any) -> Tensor:
    """Reformer's layers: y1 = x1 + f(x2), y2 = x2 + g(y1), with the buckets that f hashed into."""
    hidden, attended = torch.chunk(x, 2, dim=-1)
    mask, length = step.saved("attention_mask"), hidden.shape[1]
    for layer, buckets in zip(step.saved("layers"), step.saved("all_buckets"), strict=True):
        hashes = None
        if buckets is not None and buckets.ndim == 4:  # of local attention the cache keeps something else
            hashes = buckets.shape[2]
            if buckets.shape[3] != length:
                raise ValueError(
                    "the cache cut the buckets where it cut the padding: call the model with use_cache=False"
                )
        attention: Callable[..., Any] = layer.attention
        attended = attended + attention(hidden, attention_mask=mask, num_hashes=hashes, buckets=buckets).hidden_states
        hidden = hidden + layer.feed_forward(attended)
    return torch.cat([attended, hidden], dim=-1)


_reformer = comes_from("transformers.models.reformer.modeling_reformer")
expand("_ReversibleFunctionBackward", _reversible, **_reformer)
linear_operation("ReverseSortBackward", family="indexing", copies=True, **_reformer)

# Products of bitsandbytes with a matrix that is brought back from 4 or 8 bits, linear in the input. With 8 bits the
# input is rounded too, and the derivative goes straight through that.
_bits = comes_from("bitsandbytes.autograd._functions")
linear_operation("MatMul4BitBackward", hides=lost_bias, **_bits)
for _name in ("MatMul8bitLtBackward", "MatMul8bitFpBackward"):
    linear_operation(_name, family="rounding", hides=always, **_bits)

"""The activations that a model multiplies: what its layers are given, and both sides of every product of attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynlrp.allocation.layers import Layer
from dynlrp.errors import InputError

Change = Callable[[str, Tensor], Tensor]
"""Is told the name of an activation and its value; what it returns takes its place in the product."""
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
HIDDEN = (
    F.multi_head_attention_forward, torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd,
    torch.einsum, torch.baddbmm, Tensor.baddbmm,
)  # fmt: skip
"""Operations that may hold products of activations inside, which cannot be reached there."""


@dataclass(frozen=True)
class Product:
    """A product with one activation (a layer's with its weight) or two (those of attention)."""

    name: str
    """Of the layer, or the first activation."""
    activations: tuple[str, ...]
    multiplications: int
    """Multiply-accumulates of the whole batch."""


@contextmanager
def multiplied(model: nn.Module, layers: Mapping[str, Layer], change: Change) -> Iterator[list[Product]]:
    """Change activations where they are multiplied, while the model runs inside; gives the products that ran.

    ``name:input`` is what a layer is given. In the module that attention runs in, ``query`` and ``key``, ``weights``
    and ``value`` are the operands of ``scaled_dot_product_attention``, which is computed in two products here, and
    ``left`` and ``right`` those of a matrix product of two activations. A second one of a name has a number,
    ``name:query:1``. Products with a parameter that no layer makes stay as they are.

    Raises:
        InputError: activations are multiplied inside an operation that cannot be opened, as in
            ``nn.MultiheadAttention``.
    """
    mode = _Products(model, change)
    holders = {id(module): (name, layer) for name, layer in layers.items() for module in layer.modules.values()}
    with ExitStack() as stack:
        for path, module in model.named_modules():

            def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> Any:
                if not mode.path:
                    mode.counts.clear()  # another run
                mode.path.append(path)
                if id(module) not in holders:
                    return None
                name, key = mode.name("input", holders[id(module)][0]), next(iter(kwargs), "")
                if args:
                    return (change(name, args[0]), *args[1:]), kwargs
                return args, {**kwargs, key: change(name, kwargs[key])}

            def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                mode.path.pop()
                if id(module) in holders and isinstance(output, Tensor):
                    name, layer = holders[id(module)]
                    count = output.numel() * layer.fan_in
                    mode.found.append(Product(name, (mode.last("input", name),), count))

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(mode)
        yield mode.found


class _Products(TorchFunctionMode):
    """Sees every function of PyTorch that the model calls."""

    def __init__(self, model: nn.Module, change: Change) -> None:
        super().__init__()
        self.change = change
        self.path: list[str] = []
        self.found: list[Product] = []
        self.counts: Counter[str] = Counter()
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def name(self, kind: str, path: str | None = None) -> str:
        """The name of the next activation of a kind in a module, by default the one that runs."""
        plain = f"{self.path[-1] if path is None else path}:{kind}"
        self.counts[plain] += 1
        return _numbered(plain, self.counts[plain] - 1)

    def last(self, kind: str, path: str) -> str:
        """The name that was given last."""
        return _numbered(f"{path}:{kind}", self.counts[f"{path}:{kind}"] - 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.path:
            return func(*args, **kwargs)  # no part of the model
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        operands = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in MATMULS and not any(self._is_weight(operand) for operand in operands):
            return self._product(operands[0], operands[1], "left", "right", func)
        if func in HIDDEN and (func in HIDDEN[:3] or not any(self._is_weight(operand) for operand in operands)):
            raise InputError(
                f"module {self.path[-1]!r} multiplies activations inside {func.__name__}, where they "
                f"have no bits of their own: write its products with matmul or scaled_dot_product_attention"
            )
        return func(*args, **kwargs)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._weights

    def _product(self, a: Tensor, b: Tensor, left: str, right: str, multiply: Any = torch.matmul) -> Tensor:
        names = self.name(left), self.name(right)
        made: Tensor = multiply(self.change(names[0], a), self.change(names[1], b))
        self.found.append(Product(names[0], names, made.numel() * a.shape[-1]))
        return made

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """As PyTorch's documentation writes ``scaled_dot_product_attention`` out."""
        if dropout_p:
            raise InputError("attention drops out weights: put the model in eval mode")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = self._product(query, key.mT, "query", "key") * (
            1 / math.sqrt(query.shape[-1]) if scale is None else scale
        )
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._product(_softmax(scores), value, "weights", "value")


def _softmax(scores: Tensor) -> Tensor:
    """Rows without anything to attend to are 0, as they are in the fused kernels."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _numbered(name: str, number: int) -> str:
    return f"{name}:{number}" if number else name

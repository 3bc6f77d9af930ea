"""The activations that a model multiplies: what its layers are given, and both sides of every product of attention."""

from __future__ import annotations

import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dynlrp.allocation.layers import Layer
from dynlrp.errors import InputError

Change = Callable[[str, Tensor], Tensor]
"""Is told the name of an activation and its value; what it returns takes its place in the product."""
LINEAR = (F.linear, F.conv1d, F.conv2d, F.conv3d)
"""An activation, and a weight whose first axis is that of outputs."""
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
ADDED = (torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm)
"""Matrix products of the second and third operand, added to the first."""
HIDDEN = (
    torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd, torch.einsum, torch.tensordot,
    torch.inner, torch.addbmm, torch.linalg.multi_dot, F.bilinear,
)  # fmt: skip
"""Operations that hold products which cannot be reached; einsum does with three operands."""


@dataclass(frozen=True)
class Product:
    """A product with one activation (a layer's with its weight) or two (those of attention)."""

    name: str
    """Of the layer, or the first activation."""
    activations: tuple[str, ...]
    multiplications: float
    """Multiply-accumulates of the whole batch."""


@contextmanager
def multiplied(model: nn.Module, layers: Mapping[str, Layer], change: Change) -> Iterator[list[Product]]:
    """Change activations where they are multiplied, while the model runs inside; gives the products that ran.

    ``name:input`` is what a layer is given, or what a module multiplies by a weight on its own, as
    ``nn.MultiheadAttention`` does. In the module that attention runs in, ``query`` and ``key``, ``weights`` and
    ``value`` are the operands of ``scaled_dot_product_attention``, which is computed in two products here, and ``left``
    and ``right`` those of a matrix product or ``einsum`` of two activations. A second one of a name has a number,
    ``name:query:1``.

    Raises:
        InputError: activations are multiplied inside an operation that cannot be opened.
    """
    mode = _Products(model, layers, change)
    with ExitStack() as stack:
        for path, module in model.named_modules():

            def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> Any:
                if not mode.path:
                    mode.counts.clear()  # another run
                mode.path.append(path)
                if id(module) not in mode.holders:
                    return None
                name, key = mode.name("input", mode.holders[id(module)].name), next(iter(kwargs), "")
                if args:
                    return (change(name, args[0]), *args[1:]), kwargs
                return args, {**kwargs, key: change(name, kwargs[key])}

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                mode.path.pop()
                if id(module) in mode.holders and isinstance(output, Tensor):
                    layer = mode.holders[id(module)]
                    name = mode.last("input", layer.name)
                    mode.found.append(Product(layer.name, (name,), output.numel() * layer.fan_in))

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(mode)
        yield mode.found


class _Products(TorchFunctionMode):
    """Sees every function of PyTorch that the model calls."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], change: Change) -> None:
        super().__init__()
        self.change = change
        self.holders = {id(module): layer for layer in layers.values() for module in layer.modules.values()}
        self.path: list[str] = []
        self.found: list[Product] = []
        self.counts: Counter[str] = Counter()
        self.batch: int | None = None
        """Samples inside of ``multi_head_attention_forward``, which projects tokens first, samples second."""
        self._inside = {name for layer in layers.values() for name in layer.modules}
        self._weights = set(map(_memory, model.parameters()))

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
        if not self.path or self.path[-1] in self._inside:
            return func(*args, **kwargs)  # no part of the model, or in a layer, whose input is changed already
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            self.batch = query.shape[1] if query.ndim > 2 else 1
            try:
                with self:
                    return _opened(func)(*args, **kwargs)
            finally:
                self.batch = None
        first = 0 if func in LINEAR or func in MATMULS else 1 if func in ADDED else None
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sizes: dict[Any, int] | None = None
        if func is torch.einsum and len(given) == 2 and isinstance(args[0], str):
            first, sizes = 0, _sizes(args[0], given)
        if first is not None:
            return self._product(func, args, kwargs, first, "left", "right", sizes)
        if func in HIDDEN and sum(leaf.is_floating_point() and not self._is_weight(leaf) for leaf in given) > 1:
            raise InputError(
                f"module {self.path[-1]!r} multiplies activations inside {func.__name__}, where they "
                f"have no bits of their own: write its products with matmul or scaled_dot_product_attention"
            )
        return func(*args, **kwargs)

    def _is_weight(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._weights

    def _product(
        self, multiply: Any, args: Any, kwargs: Any, first: int, left: str, right: str,
        sizes: dict[Any, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """``multiply`` with both factors changed, the operand ``first`` and the one behind it; ``sizes`` are those of
        the indices of einsum."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)][first : first + 2]
        a, b = (leaves[place] for place in places)
        names: list[str] = []
        if a.is_floating_point():
            weights = multiply in LINEAR or self._is_weight(b), self._is_weight(a)
            kinds = {places[0]: left, places[1]: right}
            for place, is_weight in zip(places, weights[::-1], strict=True):
                if not is_weight:
                    names.append(self.name("input" if any(weights) else kinds[place]))
                    turned = self.batch is not None and multiply is F.linear
                    change = self._turned if turned else self.change
                    leaves[place] = change(names[-1], leaves[place])
        args, kwargs = pytree.tree_unflatten(leaves, form)
        made: Tensor = multiply(*args, **kwargs)
        if names:
            fan_in = b[0].numel() if multiply in LINEAR else a.shape[-1]
            count = math.prod(sizes.values()) if sizes is not None else made.numel() * fan_in
            self.found.append(Product(names[0], tuple(names), count))
        return made

    def _turned(self, name: str, x: Tensor) -> Tensor:
        """Changed with samples first."""
        assert self.batch is not None
        tokens = x.reshape(-1, self.batch, x.shape[-1])
        return self.change(name, tokens.transpose(0, 1)).transpose(0, 1).reshape(x.shape)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """As PyTorch's documentation writes ``scaled_dot_product_attention`` out."""
        if dropout_p:
            raise InputError("attention drops out weights: put the model in eval mode")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = self._product(torch.matmul, (query, key.mT), {}, 0, "query", "key") * (
            1 / math.sqrt(query.shape[-1]) if scale is None else scale
        )
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._product(torch.matmul, (_softmax(scores), value), {}, 0, "weights", "value")


def _opened(function: Any) -> Any:
    """A Python function of PyTorch that does not ask modes what to do, which would be this one again, but runs, so that
    modes see what it calls."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def _sizes(equation: str, operands: list[Tensor]) -> dict[Any, int]:
    """The size of every index of einsum; those of an ellipsis are numbered from the right."""
    sizes: dict[Any, int] = {}
    for term, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        more = operand.ndim - len(before) - len(after) if dots else 0
        for index, size in zip([*before, *range(-more, 0), *after], operand.shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return sizes


def _memory(tensor: Tensor) -> tuple[bool, int]:
    """Where its numbers are; quantized weights that are made of other tensors have no place of their own."""
    wrapped = is_traceable_wrapper_subclass(tensor)
    return wrapped, id(tensor) if wrapped else tensor.untyped_storage().data_ptr()


def _softmax(scores: Tensor) -> Tensor:
    """Rows without anything to attend to are 0, as they are in the fused kernels."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _numbered(name: str, number: int) -> str:
    return f"{name}:{number}" if number else name

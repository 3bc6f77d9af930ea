"""Frozen parameters that take part in the graph all the same."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynlrp.errors import InputError
from dynlrp.graph import hooks_around

CHECKPOINT = "torch.utils.checkpoint"
"""Where the saved-tensor hooks of checkpoints are from."""


CONVOLUTIONS = frozenset(
    {
        nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d, nn.functional.conv_transpose1d,
        nn.functional.conv_transpose2d, nn.functional.conv_transpose3d,
    }
)  # fmt: skip
PRODUCTS = CONVOLUTIONS | {
    nn.functional.linear, torch.addmm, Tensor.addmm, torch.addmv, torch.baddbmm, torch.matmul, Tensor.matmul,
    Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.einsum, torch.mul,
    Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
}  # fmt: skip
"""Functions that multiply their arguments, but for those in :data:`SUMMANDS`."""
SUMMANDS: Mapping[Any, tuple[int | str, ...]] = {
    **dict.fromkeys((*CONVOLUTIONS, nn.functional.linear), (2, "bias")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.addmv, torch.baddbmm), (0, "input")),
    **dict.fromkeys(
        (
            torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, torch.sub, Tensor.sub,
            Tensor.__sub__, Tensor.__rsub__, torch.cat, torch.stack,
        ),
        (0, 1, "other", "tensors"),
    ),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), (0,)),  # what is written to
    # What these save does not depend on it.
    **dict.fromkeys((nn.functional.layer_norm, nn.functional.group_norm), (2, 3, "weight", "bias")),
    **dict.fromkeys((nn.functional.batch_norm, nn.functional.instance_norm), (3, 4, "weight", "bias")),
    nn.functional.embedding: (1, "weight"),
}  # fmt: skip
"""Arguments that may require grad without that autograd saves more for it."""

VIEWS = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))
"""Attributes that are functions of the tensor."""


class Aliases(TorchFunctionMode):
    """Lets frozen parameters take part in the graph through stand-ins that share their memory.

    Biases, embeddings and class tokens must be seen to be booked and explained, whatever ``requires_grad`` says, and
    the parameters themselves are not touched. What a signal is multiplied by stays frozen, so that autograd need not
    save the signal, unless the parameter's own relevance is wanted.

    A checkpoint runs its block again for whoever needs what it saved, and must then save as much. Where a graph is
    ``attached``, that is the caller's own ``backward()``, which knows no stand-ins: there they are summands alone, for
    which autograd saves nothing.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], wanted: Mapping[str, nn.Parameter], attached: bool = False
    ) -> None:
        super().__init__()
        self._stand_ins = {id(p): p.detach().requires_grad_() for p in parameters}
        self._wanted = {id(p): name for name, p in wanted.items()}
        self._views = {id(value) for number, value in self._stand_ins.items() if number not in self._wanted}
        self._attached = attached
        self._hooks: Any = None
        self.reruns = False
        """Saved-tensor hooks were set inside: they may run parts of the model again, which needs the stand-ins too."""

    def __enter__(self) -> Aliases:
        self._hooks = hooks_around()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def stand_in(self, parameter: nn.Parameter) -> Tensor:
        """What takes part in the graph for a parameter."""
        return self._stand_ins.get(id(parameter), parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks, multiplies = hooks_around(), func in PRODUCTS
        if hooks != self._hooks:
            self.reruns = True
        if kwargs is None:
            kwargs = {}
        if not self._meets(args, multiplies) and not (kwargs and self._meets(kwargs.values(), multiplies)):
            return func(*args, **kwargs)
        attribute = getattr(func, "__name__", "") in ("__get__", "__set__") and func not in VIEWS
        if attribute or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        frozen = multiplies and self._signal((*args, *kwargs.values()))
        inside = self._attached and hooks is not None and hooks[0].__module__ == CHECKPOINT
        summands = SUMMANDS.get(func, ())
        args = [self._swap(value, place in summands, frozen, inside) for place, value in enumerate(args)]
        return func(*args, **{key: self._swap(value, key in summands, frozen, inside) for key, value in kwargs.items()})

    def _swap(self, value: Any, summed: bool, frozen: bool, checkpointed: bool) -> Any:
        """What a function gets for an argument. ``frozen``: factors stay so."""
        if isinstance(value, tuple | list):
            swapped = [self._swap(v, summed, frozen, checkpointed) for v in value]
            return value if all(map(operator.is_, swapped, value)) else type(value)(swapped)
        number = id(value)
        stand_in = self._stand_ins.get(number)
        if frozen and not summed and number not in self._wanted:
            return value.detach() if stand_in is None and self._is_view(value) else value
        if stand_in is None or not checkpointed or summed:
            return value if stand_in is None else stand_in
        if number not in self._wanted:
            return value
        raise InputError(
            f"parameter {self._wanted[number]!r} is frozen and used inside a checkpoint, which your backward() runs "
            f"again: with create_graph=True it has no relevance of its own. Let it require grad, leave it out of "
            f"parameters=, or switch checkpointing off (model.gradient_checkpointing_disable())."
        )

    def _meets(self, values: Iterable[Any], multiplies: bool) -> bool:
        """Whether something has to be replaced."""
        stand_ins = self._stand_ins
        for value in values:
            if id(value) in stand_ins or (multiplies and self._is_view(value)):
                return True
            if isinstance(value, tuple | list) and self._meets(value, multiplies):
                return True
        return False

    def _is_view(self, value: Any) -> bool:
        """Whether it is a view of an unwanted parameter's stand-in."""
        return isinstance(value, Tensor) and id(value._base) in self._views

    def _signal(self, values: Iterable[Any]) -> bool:
        """Whether there is more among them than parameters."""
        for value in values:
            if isinstance(value, Tensor):
                if value.requires_grad and not self._is_view(value):
                    return True
            elif isinstance(value, tuple | list) and self._signal(value):
                return True
        return False

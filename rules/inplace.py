"""Writes into views of a tensor (``x[:, 0] = y``), which autograd records as one node of unknown content."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynlrp.errors import RuleError
from dynlrp.rules.operation import Operation, register

COPIES = frozenset(
    {
        "_to_copy", "alias", "as_strided", "clone", "copy_", "detach", "device", "empty_strided", "expand", "fill_",
        "masked_fill", "masked_fill_", "neg", "new_empty_strided", "new_zeros", "ones", "permute", "reshape", "select",
        "slice", "squeeze", "sum", "t", "threshold_backward", "transpose", "unsqueeze", "view", "zero_", "zeros",
        "zeros_like",
    }
)  # fmt: skip
"""What derivatives of copies, sums and fills are made of."""
MANY = 8
"""Fewer elements may have the same derivative by chance."""


class _Traces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what a derivative does with its tensors, by the memory they lie in: ``scaled`` by a number, or
    ``changed`` by more than copies, fills and sums."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: dict[int, frozenset[str]] = {}
        self._seen: list[Tensor] = []  # so that no memory is used twice

    def marks(self, tensor: Tensor) -> frozenset[str]:
        return self._marks.get(tensor.untyped_storage()._cdata, frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        found = frozenset[str]().union(*(self.marks(a) for a in args if isinstance(a, Tensor)))
        if name in ("mul", "mul_", "div", "div_") and not (isinstance(args[1], Tensor) and args[1].ndim):
            found |= {"scaled"}
        elif name not in COPIES:
            found |= {"changed"}
        if isinstance(made, Tensor):
            self._marks[made.untyped_storage()._cdata] = found
            self._seen.append(made)
        return made


def _passes(node: Any) -> bool:
    """Whether every element of the tensor is passed on, dropped or scaled by one number.

    The node does not tell which operation wrote. If its derivative is 0 or 1 it was a copy, a sum or a fill, or acts
    like one: linear up to a constant. One other number, for many elements and with no second operand, is a scaling
    (a function of equal numbers would look the same). Anything else may be linear, or may not be. Fake tensors have no
    numbers: there the operations that the derivative is made of tell, or an error.
    """
    metadata = node._input_metadata[0]
    ones = torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)
    traces = _Traces()
    with traces if isinstance(ones, FakeTensor) else nullcontext():
        result = node(ones)
    passed, *others = result if isinstance(result, tuple) else (result,)
    if passed is None:
        return True
    if isinstance(passed, FakeTensor):  # no numbers to look at
        found = traces.marks(passed)
        if "changed" in found or ("scaled" in found and any(o is not None for o in others)):
            raise RuleError(
                "the numbers must tell what wrote into a part of a tensor here, and fake tensors have none: give the "
                "model weights"
            )
        return True
    scaled = passed[(passed != 0) & (passed != 1)]
    if not len(scaled):
        return True
    return len(scaled) >= MANY and all(o is None for o in others) and bool((scaled == scaled[0]).all())


register(
    Operation(
        "torch::autograd::CopySlices",
        "movement",
        operands="+",
        facts=_passes,
        hides=lambda facts, present: True,
        blocked=lambda passes: (
            ""
            if passes
            else "an operation that is no copy, sum, fill or scaling by a number wrote into a view in place, and "
            "autograd does not tell which: write it out of place, x = torch.cat([f(x[:1]), x[1:]]) instead of f_(x[:1])"
        ),
    )
)

"""One operator of an ONNX graph, and the table of what operators do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dynlrp.errors import InputError

Function = Callable[..., Any]
"""What an operator does: takes the :class:`Node` and its inputs (None for those left out), and returns its outputs."""

OPERATORS: dict[tuple[str, str], Function] = {}
"""By domain ("" is ONNX's own) and name."""

MICROSOFT = "com.microsoft"
"""The domain of what ONNX Runtime fuses operators to."""


def operator(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Enter a function of a node and its inputs."""

    def enter(function: Function) -> Function:
        OPERATORS.update({(domain, name): function for name in names})
        return function

    return enter


def plain(*names: str, function: Function) -> None:
    """Enter a function of inputs alone."""
    operator(*names)(lambda node, *inputs: function(*inputs))


class Node(nn.Module):
    """An operator with its attributes. It is a module, so that what it does has a path."""

    def __init__(self, kind: str, domain: str, opset: int, attributes: dict[str, Any], names: Sequence[str]) -> None:
        """``names`` are those of its outputs, "" for one that nobody wants."""
        super().__init__()
        self.kind, self.domain, self.opset = kind, domain, opset
        self.attributes, self.names = attributes, tuple(names)
        self.function = OPERATORS[domain, kind]
        self._read: set[str] | None = set()
        """Attributes that were asked for, until all are seen to have been."""
        self.floats = torch.float32
        """What stands for float32, as the model may have been moved to another precision."""

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        if self._read is not None:
            self._read.add(name)
        return self.attributes.get(name, default)

    def given(self, inputs: Sequence[Any], place: int, name: str) -> Any:
        """What was an attribute of this name in old versions, and is an input at this place now: a list of numbers."""
        found = self.get(name)
        if place >= len(inputs) or inputs[place] is None:
            return found
        numbers = inputs[place].tolist()
        return numbers if isinstance(numbers, list) else [numbers]

    def dtype(self, number: int) -> torch.dtype:
        """PyTorch's type for one of ONNX."""
        if number not in DTYPES:
            raise InputError(f"{self.kind} to numbers of ONNX's type {number}, which PyTorch has not, is not read")
        return self.floats if number == 1 else DTYPES[number]

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        result = self.function(self, *inputs)
        if self._read is not None:  # an attribute that nobody knows would be passed over without a word
            unknown = self.attributes.keys() - self._read - HARMLESS.get(self.kind, set())
            if unknown:
                raise InputError(f"{self.kind} with {', '.join(sorted(unknown))} is not read")
            self._read = None
        return result if isinstance(result, tuple) else (result,)

    def extra_repr(self) -> str:
        return self.kind if not self.domain else f"{self.domain}.{self.kind}"


_RESIZE = {
    "antialias", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "extrapolation_value",
    "keep_aspect_ratio_policy", "mode", "nearest_mode",
}  # fmt: skip
_CONV, _RNN, _NORM = {"kernel_shape", "pads", "output_shape"}, {"direction", "hidden_size"}, {"stash_type"}
HARMLESS: dict[str, set[str]] = {
    "Attention": {"kv_num_heads", "q_num_heads", "softmax_precision"},
    "AveragePool": {"pads"},
    "BatchNormalization": {"is_test", "momentum", "spatial"},
    "Cast": {"round_mode", "saturate"},
    "CastLike": {"round_mode", "saturate"},
    "Clip": {"max", "min"},
    "Constant": {"value_float", "value_floats", "value_int", "value_ints"},
    "Conv": _CONV,
    "ConvTranspose": _CONV,
    "DequantizeLinear": {"axis"},
    "Dropout": {"is_test", "ratio", "seed"},
    "FakeQuantize": {"axis", "saturate"},
    "FusedConv": _CONV,
    "GRU": _RNN,
    "Gemm": {"broadcast"},
    "GroupNormalization": _NORM,
    "If": {"else_branch", "then_branch"},
    "LSTM": _RNN,
    "LayerNormalization": _NORM,
    "Loop": {"body"},
    "LpPool": {"pads"},
    "MaxPool": {"pads", "storage_order"},
    "Pad": {"pads", "value"},
    "QuantizeLinear": {"axis", "precision", "saturate"},
    "RMSNormalization": _NORM,
    "RNN": _RNN,
    "Reshape": {"allowzero", "shape"},
    "Resize": _RESIZE,
    "RotaryEmbedding": {"num_heads"},
    "SimplifiedLayerNormalization": _NORM,
    "Split": {"num_outputs"},
    "TopK": {"k", "sorted"},
    "Upsample": {"mode"},
}
"""Attributes that change nothing in PyTorch, or apply in some cases alone."""

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 14: torch.complex64,
    15: torch.complex128, 16: torch.bfloat16,
}  # fmt: skip
"""By the number of ``onnx.TensorProto``."""


def axis_of(axis: int, ndim: int) -> int:
    """Counted from the front."""
    return axis % ndim if ndim else 0


def last_first(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Padding at both ends of every dimension, as PyTorch takes it: from the last dimension on."""
    return [width for pair in reversed(pads) for width in pair]

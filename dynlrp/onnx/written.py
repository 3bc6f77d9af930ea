"""What an ONNX file has written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.onnx.node import DTYPES

try:
    import onnx
    from onnx import inliner, numpy_helper
except ModuleNotFoundError as error:
    raise ImportError("reading ONNX files needs onnx: pip install dynlrp[onnx]") from error

__all__ = ["Written", "domain_of", "graphs_of", "inliner", "joined", "kind_of", "onnx", "tensor"]


@dataclass
class Written:
    """A node as the file has it, or several that are one operation."""

    kind: str
    domain: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, node: Any) -> Written:
        attributes = {a.name: attribute_of(a) for a in node.attribute}
        return cls(node.op_type, domain_of(node), node.name, list(node.input), list(node.output), attributes)


def domain_of(entry: Any) -> str:
    """The domain of a node or of an operator set; that of ONNX itself, which has two names, is empty."""
    return "" if entry.domain == "ai.onnx" else str(entry.domain)


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and all that are inside of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def kind_of(value: Any) -> tuple[torch.dtype, tuple[int | str, ...]]:
    """Dtype and sizes of an input; a size that is left open is a name, or "" without one."""
    if not value.type.HasField("tensor_type"):
        raise InputError(f"input {value.name!r} is no tensor")
    kind = value.type.tensor_type
    if kind.elem_type not in DTYPES:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise InputError(f"input {value.name!r} has numbers of type {name}, which is not read")
    return DTYPES[kind.elem_type], tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim
    )


def attribute_of(given: Any) -> Any:
    value = onnx.helper.get_attribute_value(given)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return tensor(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], bytes):
        return [entry.decode() for entry in value]
    return (
        list(value)
        if not isinstance(value, int | float | str | onnx.GraphProto) and hasattr(value, "__iter__")
        else value
    )


def joined(graph: Any) -> list[Written]:
    """The nodes of a graph. A matrix product with a weight and the sum with its bias, which exporters write apart, are
    one operation, as are quantisation and dequantisation."""
    nodes = [Written.of(node) for node in graph.node]
    shapes = {initializer.name: tuple(initializer.dims) for initializer in graph.initializer}
    users: Counter[str] = Counter()
    for part in graphs_of(graph):
        users.update(name for node in part.node for name in node.input)
        users.update(value.name for value in part.output)
    makers = {name: node for node in nodes for name in node.outputs}
    gone: set[int] = set()
    for node in nodes:
        if (node.domain, node.kind) == ("", "Add"):
            maker = _with_bias(node, makers, shapes)
        elif (node.domain, node.kind) == ("", "DequantizeLinear"):
            maker = _with_quantisation(node, makers)
        else:
            continue
        if maker is not None and users[maker.outputs[0]] == 1:
            gone.add(id(maker))
    return [node for node in nodes if id(node) not in gone]


def _with_bias(node: Written, makers: Mapping[str, Written], shapes: Mapping[str, tuple[int, ...]]) -> Written | None:
    """Make a sum a dense layer if it can be; returns the product that is in it now."""
    for first, second in (node.inputs, node.inputs[::-1]):
        product = makers.get(first)
        if product is None or (product.domain, product.kind) != ("", "MatMul"):
            continue
        weight = shapes.get(product.inputs[1], ())
        if len(weight) == 2 and shapes.get(second) == (weight[1],):
            node.kind, node.name, node.inputs = "Linear", product.name, [*product.inputs, second]
            return product
    return None


def _with_quantisation(node: Written, makers: Mapping[str, Written]) -> Written | None:
    """Make a dequantisation one operation with the quantisation before it; returns that."""
    maker = makers.get(node.inputs[0])
    if maker is None or (maker.domain, maker.kind) != ("", "QuantizeLinear") or maker.inputs[1:] != node.inputs[1:]:
        return None
    if node.attributes.get("block_size") or maker.attributes.get("output_dtype"):
        return None
    node.kind, node.inputs = "FakeQuantize", list(maker.inputs)
    return maker


def tensor(proto: Any) -> Tensor:
    """The numbers of a ``TensorProto``."""
    if proto.data_type not in DTYPES:
        kind = onnx.TensorProto.DataType.Name(proto.data_type)
        raise InputError(f"{proto.name or 'a constant'} has numbers of type {kind}, which is not read")
    array = numpy_helper.to_array(proto)
    dtype = DTYPES[proto.data_type]
    if dtype is torch.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(dtype)
    return torch.from_numpy(np.array(array)).to(dtype)

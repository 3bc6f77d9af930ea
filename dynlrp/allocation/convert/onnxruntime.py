"""ONNX Runtime: the nodes of an exported file that stand for layers, and the options of its two quantizers."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynlrp.allocation.convert.check import Width, by_width, check, not_in
from dynlrp.allocation.extras import needs
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.quantizer import Quantizer
from dynlrp.errors import ConversionError, InputError

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter of PyTorch writes the modules that a node ran in."""


@dataclass(frozen=True)
class WeightNode:
    """A node that multiplies by a constant of the graph."""

    name: str
    operation: str
    weight: str
    """What it is given."""
    constant: str
    """Where that comes from: another name where ``Identity`` is between them, as for weights that are used twice."""
    shape: tuple[int, ...]
    axis: int
    """Of the weight, that counts output channels."""


def weight_nodes(graph: Any, layers: Iterable[Layer]) -> dict[str, list[WeightNode]]:
    """The nodes of an ONNX graph that apply each layer's weight.

    Weights are renamed where an exporter transposes them or merges a batch norm into them. So a node is known by the
    module it ran in as well, which PyTorch's exporter notes (that of TorchScript in the node's name), or by sharing its
    weight with such a node.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    owner = {module: layer.name for layer in layers for module in layer.modules}
    candidates: list[tuple[WeightNode, str | None]] = []
    by_constant: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weight = constant = node.input[1]
        while constant in source:
            constant = source[constant]
        if constant in shapes:
            name = next((owner[module] for module in _modules(node, weight) if module in owner), None)
            if name is not None:
                by_constant.setdefault(constant, name)
            transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
            axis = 0 if node.op_type == "Conv" or transposed else 1
            found = WeightNode(node.name, node.op_type, weight, constant, shapes[constant], axis)
            candidates.append((found, name))
    nodes: dict[str, list[WeightNode]] = {name: [] for name in owner.values()}
    for found, name in candidates:
        name = name or by_constant.get(found.constant)
        if name is not None:
            nodes[name].append(found)
    return nodes


def _modules(node: Any, weight: str) -> Iterator[str]:
    """Names of the module that a node may stand for, the surest first."""
    if weight.endswith(".weight"):
        yield weight.removesuffix(".weight")
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES, "[]")
    yield from ast.literal_eval(scopes)[-2:-1]  # the last is the operation
    yield node.name.strip("/").rpartition("/")[0].replace("/", ".")


def quantize_static_options(
    model: nn.Module, bits: Mapping[str, int], onnx_model: Any, quantizer: Quantizer | None = None
) -> dict[str, Any]:
    """Keyword arguments of ``onnxruntime.quantization.quantize_static`` beside its files and calibration data: the
    nodes, and ``TensorQuantOverrides`` with the type of each weight.

    What goes into these nodes and comes out of them has 16 bits; all else stays float. Each channel has a scale.

    Args:
        model: what was exported.
        bits: by layer, 4, 8 or 16.
        onnx_model: the ``ModelProto``, of opset 21 at least, which is the first with 4 and 16 bits.
        quantizer: what the bits were chosen with; by default ``Quantizer()``.

    Raises:
        ConversionError: ONNX Runtime cannot take a layer.
    """
    quantizer = quantizer or Quantizer()
    opset = max(entry.version for entry in onnx_model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < 21:
        raise InputError(f"opset {opset} has no 4 and 16 bits: torch.onnx.export(..., opset_version=21)")

    def refuse(layer: Layer, number: int) -> str | None:
        if quantizer.group_size is not None:
            return "groups, where overrides have a scale for each channel: allocate with Quantizer(group_size=None)"
        if quantizer.per_tap and layer.weight.ndim > 2:
            return "a convolution, with a scale for each filter: allocate with Quantizer(per_tap=False)"
        return not_in((4, 8, 16), number)

    layers = check("ONNX Runtime", model, bits, refuse)
    nodes = _nodes("ONNX Runtime", layers, onnx_model)
    _are_alone(layers, nodes, onnx_model)
    with needs("onnxruntime"):
        from onnxruntime.quantization import QuantFormat, QuantType
    overrides: dict[str, list[dict[str, Any]]] = {}
    for layer, number in layers:
        for node in nodes[layer.name]:
            kind = QuantType[f"QInt{number}"]
            entry = {"quant_type": kind, "axis": node.axis, "symmetric": quantizer.symmetric}
            overrides[node.weight] = [entry]
    return {
        "nodes_to_quantize": [node.name for found in nodes.values() for node in found],
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt16,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "extra_options": {"TensorQuantOverrides": overrides, "QuantizeBias": False},
    }


def matmul_nbits_passes(
    model: nn.Module, bits: Mapping[str, int], onnx_model: Any, quantizer: Quantizer
) -> list[dict[str, Any]]:
    """Options of ONNX Runtime's ``MatMulNBitsQuantizer``, one pass for each number of bits.

    To be run one after the other, each on what the one before made. Each pass excludes all other nodes by name, as
    ``nodes_to_include`` adds nodes and restricts none.

    Args:
        model: what was exported.
        bits: by layer, 2, 4 or 8. A layer must be a ``MatMul`` in the file; one whose input has two dimensions
            becomes a ``Gemm``.
        onnx_model: the ``ModelProto``.
        quantizer: with a ``group_size`` that is a power of two and 16 at least.

    Raises:
        ConversionError: ``MatMulNBits`` cannot take a layer.
    """
    size = quantizer.group_size
    if size is None or size < 16 or size & (size - 1):
        raise InputError(f"MatMulNBits has groups of 16, 32, 64 ... weights, not {size}: Quantizer(group_size=32)")
    layers = check("MatMulNBits", model, bits, lambda layer, number: not_in((2, 4, 8), number))
    nodes = _nodes("MatMulNBits", layers, onnx_model)
    other = {
        name: f"{node.operation} in the file, where MatMulNBits takes MatMul alone"
        for name, found in nodes.items()
        for node in found
        if node.operation != "MatMul"
    }
    if other:
        raise ConversionError("MatMulNBits", len(layers), other)
    every = {node.name for node in onnx_model.graph.node if node.op_type == "MatMul"}
    return [
        {
            "bits": width,
            "block_size": size,
            "is_symmetric": quantizer.symmetric,
            "op_types_to_quantize": ("MatMul",),
            "nodes_to_exclude": sorted(every - {node.name for layer in found for node in nodes[layer.name]}),
        }
        for width, found in by_width(layers).items()
    ]


def _nodes(tool: str, layers: Sequence[Width], onnx_model: Any) -> dict[str, list[WeightNode]]:
    nodes = weight_nodes(onnx_model.graph, [layer for layer, _ in layers])
    reasons: dict[str, str] = {}
    for layer, _ in layers:
        found, shape = nodes[layer.name], sorted(layer.weight.shape)
        if not found:
            why = "no node of the file multiplies by its weight: export this model, with weights as constants"
            reasons[layer.name] = why
        elif wrong := [node.name for node in found if sorted(node.shape) != shape]:
            why = f"the weights of {wrong} have another shape than its own: export this very model"
            reasons[layer.name] = why
        elif copies := [node.name for node in found if node.weight != node.constant]:
            why = f"its weight is used more than once, by {copies} through an Identity: export with dynamo=True"
            reasons[layer.name] = why
    if reasons:
        raise ConversionError(tool, len(layers), reasons)
    return nodes


def _are_alone(layers: Sequence[Width], nodes: Mapping[str, list[WeightNode]], onnx_model: Any) -> None:
    """No other node may use the weights of the layers, as the override of a weight is for all that use it."""
    users: dict[str, set[str]] = {}
    for node in onnx_model.graph.node:
        for given in node.input:
            users.setdefault(given, set()).add(node.name)
    reasons: dict[str, str] = {}
    for layer, _ in layers:
        own = {node.name for node in nodes[layer.name]}
        others = sorted(set().union(*(users[node.weight] for node in nodes[layer.name])) - own)
        if others:
            reasons[layer.name] = f"its weight is also used by {others} in the file, which would change with it"
    if reasons:
        raise ConversionError("ONNX Runtime", len(layers), reasons)

"""Files quantized by ONNX Runtime itself, from both exporters of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynlrp.allocation.convert import matmul_nbits_passes, quantize_static_options
from dynlrp.allocation.convert.onnxruntime import weight_nodes
from dynlrp.allocation.layers import find_layers
from dynlrp.allocation.quantizer import Quantizer
from dynlrp.errors import ConversionError, InputError
from tests.converting import agree, convolutions, images, is_rounded, network, with_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

from onnxruntime import quantization as tool  # noqa: E402
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: E402

BITS = {"patches": 8, "mix": 4, "depthwise": 8, "blocks.0.up": 4, "blocks.1.down": 16, "hidden": 4, "head": 8}


@pytest.fixture(scope="module", params=[True, False], ids=["export", "torchscript"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network(), (images(),), str(path), dynamo=request.param, opset_version=21, verbose=False)
    return path


class Calibration(tool.CalibrationDataReader):  # type: ignore[misc]
    """Inputs of a wider range than those that are compared, so that no activation is clipped."""

    def __init__(self, file: Path, x: Tensor) -> None:
        name = onnx.load(file).graph.input[0].name
        self.batches: Iterator[dict[str, Any]] = iter([{name: factor * x.numpy()} for factor in (-2, 2)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def run(model: Any, x: Tensor) -> Tensor:
    options = runtime.SessionOptions()  # as written: fused kernels round activations again
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def array(model: Any, name: str) -> Tensor:
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return torch.from_numpy(onnx.numpy_helper.to_array(found).astype(np.float32))


def rows(weight: Tensor, axis: int) -> Tensor:
    """As in PyTorch, ``(outputs, ...)``."""
    return weight.movedim(axis, 0)


def multiplies(model: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The constants that nodes use, by name."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {n.name: (n.op_type, tuple(i for i in n.input if i in constants)) for n in model.graph.node}


def test_nodes_of_layers(file: Path) -> None:
    model, graph = network(), onnx.load(file).graph
    layers = find_layers(model)
    nodes = weight_nodes(graph, layers.values())
    assert sorted(nodes) == sorted(layers)
    for name, found in nodes.items():
        (node,) = found
        if name != "patches":  # whose batch norm is merged into it
            weight = rows(array(onnx.load(file), node.weight), node.axis)
            assert torch.equal(weight, model.get_submodule(name).weight), name
    operations = {name: found[0].operation for name, found in nodes.items()}
    assert operations["mix"] == "Conv"
    assert operations["blocks.0.up"] == "MatMul"
    assert operations["head"] == "Gemm"


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_quantization_with_overrides(file: Path, tmp_path: Path, symmetric: bool) -> None:
    model, before = network(), onnx.load(file)
    options = quantize_static_options(model, BITS, before, Quantizer(symmetric=symmetric))
    tool.quantize_static(str(file), str(tmp_path / "q.onnx"), Calibration(file, images()), **options)
    after = onnx.load(tmp_path / "q.onnx")
    nodes = weight_nodes(before.graph, find_layers(model).values())
    weights: dict[str, Tensor] = {}
    for name, bits in BITS.items():
        (node,) = nodes[name]
        kinds = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
        assert kinds[f"{node.weight}_quantized"] == getattr(onnx.TensorProto, f"INT{bits}")
        numbers, scale, zero = (array(after, f"{node.weight}_{part}") for part in ("quantized", "scale", "zero_point"))
        assert bool(zero.any()) != symmetric
        shape = [-1 if axis == node.axis else 1 for axis in range(numbers.ndim)]
        rounded = (numbers - zero.reshape(shape)) * scale.reshape(shape)
        is_rounded(rows(rounded, node.axis), rows(array(before, node.weight), node.axis), bits)
        weights[node.weight] = rounded
    was, now = multiplies(before), multiplies(after)
    touched = {node.name for name in BITS for node in nodes[name]}
    assert {name: now[name] for name in was if name not in touched} == {
        name: entry for name, entry in was.items() if name not in touched
    }
    for tensor in before.graph.initializer:  # every other constant is as it was
        if tensor.name not in weights:
            assert torch.equal(array(after, tensor.name), array(before, tensor.name)), tensor.name
        else:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name].numpy(), tensor.name))
    agree(run(after, images()), run(before, images()), 3e-4)  # what these layers take and give has 16 bits


def test_other_convolutions(tmp_path: Path) -> None:
    model, x = convolutions()
    bits = {"one": 4, "three": 8}
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), opset_version=21, verbose=False)
    before = onnx.load(tmp_path / "m.onnx")
    options = quantize_static_options(model, bits, before)
    tool.quantize_static(
        str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx"), Calibration(tmp_path / "m.onnx", x), **options
    )
    after = onnx.load(tmp_path / "q.onnx")
    weights = {}
    for name, b in bits.items():
        weight = model.get_submodule(name).weight
        numbers, scale = (array(after, f"{name}.weight_{part}") for part in ("quantized", "scale"))
        weights[name] = numbers * scale.reshape(-1, *[1] * (weight.ndim - 1))
        is_rounded(weights[name], weight, b)
    agree(run(after, x), with_weights(model, weights)(x), 3e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits(file: Path, symmetric: bool) -> None:
    model, made = network(), onnx.load(file)
    bits = {"blocks.0.up": 2, "blocks.0.down": 4, "blocks.1.down": 8}
    was = multiplies(made)
    for options in matmul_nbits_passes(model, bits, made, Quantizer(group_size=16, symmetric=symmetric)):
        one = MatMulNBitsQuantizer(made, **options)
        one.process()
        made = one.model.model
    weights = {}
    for name, b in bits.items():
        (node,) = weight_nodes(onnx.load(file).graph, find_layers(model).values())[name]
        (found,) = (n for n in made.graph.node if n.name == f"{node.name}_Q{b}")
        attributes = {entry.name: entry.i for entry in found.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (b, 16)
        weights[name] = dequantized(made, found, attributes)
        is_rounded(weights[name], model.get_submodule(name).weight, b, 16)
    now = multiplies(made)
    assert sum(operation == "MatMulNBits" for operation, _ in now.values()) == len(bits)
    same = [name for name in was if name in now]
    assert len(same) == len(was) - len(bits)
    assert all(now[name] == was[name] for name in same)
    agree(run(made, images()), with_weights(model, weights)(images()).detach())


def dequantized(model: Any, node: Any, attributes: dict[str, int]) -> Tensor:
    """The weight of a MatMulNBits node, ``(outputs, inputs)``, from the description of the operation."""
    k, n, b, size = (attributes[name] for name in ("K", "N", "bits", "block_size"))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def unpacked(packed: Any) -> Tensor:
        """The lowest bits first."""
        numbers = torch.from_numpy(packed.copy()).to(torch.int64).reshape(n, -1)
        return torch.stack([(numbers >> shift) & (2**b - 1) for shift in range(0, 8, b)], -1).flatten(1)

    numbers = unpacked(constants[node.input[1]]).reshape(n, k // size, size).float()
    scales = torch.from_numpy(constants[node.input[2]].copy()).reshape(n, -1, 1)
    zero = 2.0 ** (b - 1)
    if len(node.input) > 3:
        zero = unpacked(constants[node.input[3]])[:, : k // size, None].float()
    return ((numbers - zero) * scales).reshape(n, k)


def test_refusals(file: Path) -> None:
    model, before = network(), onnx.load(file)
    with pytest.raises(ConversionError) as caught:
        quantize_static_options(model, {"head": 5, "mix": 4}, before, Quantizer(per_tap=True))
    assert caught.value.reasons == {
        "head": "5 bits, where the tool has 4, 8, 16: allocate with these candidates",
        "mix": "a convolution, with a scale for each filter: allocate with Quantizer(per_tap=False)",
    }
    with pytest.raises(ConversionError, match="groups, where overrides have a scale for each channel"):
        quantize_static_options(model, {"head": 4}, before, Quantizer(group_size=8))
    with pytest.raises(ConversionError) as caught:
        matmul_nbits_passes(model, {"head": 4, "mix": 4, "blocks.0.up": 4}, before, Quantizer(group_size=32))
    assert caught.value.reasons == {
        "head": "Gemm in the file, where MatMulNBits takes MatMul alone",
        "mix": "Conv in the file, where MatMulNBits takes MatMul alone",
    }
    with pytest.raises(ConversionError, match="3 bits, where the tool has 2, 4, 8"):
        matmul_nbits_passes(model, {"blocks.0.up": 3}, before, Quantizer(group_size=32))
    for size in (None, 8, 24):
        with pytest.raises(InputError, match="MatMulNBits has groups"):
            matmul_nbits_passes(model, {"blocks.0.up": 4}, before, Quantizer(group_size=size))


class Tied(nn.Module):
    """Two linear maps that share a weight and run twice, and one that shares an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 20, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).mean(1)
        return self.head(torch.relu(self.a(torch.relu(self.b(torch.relu(self.a(x)))))))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_used_more_than_once(tmp_path: Path, dynamo: bool) -> None:
    model = Tied().eval()
    torch.onnx.export(
        model, (torch.tensor([[1, 2]]),), str(tmp_path / "m.onnx"), dynamo=dynamo, opset_version=21, verbose=False
    )
    before = onnx.load(tmp_path / "m.onnx")
    nodes = weight_nodes(before.graph, find_layers(model).values())
    assert {name: len(found) for name, found in nodes.items()} == {"a": 3, "head": 1}
    if dynamo:
        assert len(quantize_static_options(model, {"a": 4, "b": 4}, before)["nodes_to_quantize"]) == 3
        with pytest.raises(ConversionError, match=r"also used by \['node_embedding'\] in the file"):
            quantize_static_options(model, {"head": 4}, before)
    else:
        with pytest.raises(ConversionError, match="through an Identity"):
            quantize_static_options(model, {"a": 4}, before)


def test_another_file(file: Path) -> None:
    before = onnx.load(file)
    other = nn.ModuleDict({"head": nn.Linear(3, 4), "tail": nn.Linear(3, 4)})
    with pytest.raises(ConversionError) as caught:
        quantize_static_options(other, {"head": 4, "tail": 4}, before)
    assert "have another shape than its own" in caught.value.reasons["head"]
    assert "no node of the file multiplies by its weight" in caught.value.reasons["tail"]
    before.opset_import[0].version = 20
    with pytest.raises(InputError, match="opset_version=21"):
        quantize_static_options(network(), BITS, before)


def test_why_nodes_are_excluded(file: Path) -> None:
    """If this fails, ``nodes_to_include`` restricts."""
    model = onnx.load(file)
    (node,) = weight_nodes(model.graph, find_layers(network()).values())["blocks.0.up"]
    one = MatMulNBitsQuantizer(model, block_size=16, nodes_to_include=[node.name])
    one.process()
    assert sum(node.op_type == "MatMulNBits" for node in one.model.model.graph.node) > 1

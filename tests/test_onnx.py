"""ONNX files: what operators compute, by the standard's own cases, and relevance as of the models they are from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynlrp import InputError, UnsupportedOperatorError, explain, load_onnx, trace
from dynlrp.onnx import operator
from dynlrp.onnx.node import OPERATORS
from tests.oracle import draw

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402

from dynlrp.onnx.written import tensor  # noqa: E402

# The standard's cases ---------------------------------------------------------------------------------------------

UNREAD = {
    "texts": {
        "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer",
        "ai.onnx.ml.LabelEncoder",
    },
    "sequences and optional values": {
        "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct",
        "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence",
    },
    "training": {
        "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "ai.onnx.preview.training.Adagrad",
        "ai.onnx.preview.training.Adam", "ai.onnx.preview.training.Gradient", "ai.onnx.preview.training.Momentum",
    },
    "random draws": {"Bernoulli", "RandomUniformLike"},
    "integers, which have no gradient": {"BitCast", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"},
    "trees and tables": {
        "Unique", "ai.onnx.ml.ArrayFeatureExtractor", "ai.onnx.ml.Binarizer", "ai.onnx.ml.TreeEnsemble",
    },
    "signals": {"BlackmanWindow", "DFT", "HammingWindow", "HannWindow", "MelWeightMatrix", "STFT"},
    "rare": {
        "AffineGrid", "CausalConvWithState", "CenterCropPad", "Col2Im", "CumProd", "DeformConv", "ImageDecoder",
        "LinearAttention", "MaxUnpool", "NonMaxSuppression", "RoiAlign", "Scan", "SwiGLU", "TensorScatter",
        "ai.onnx.preview.FlexAttention",
    },
}  # fmt: skip
"""Operators of the standard's cases that are not read, and why."""

TYPE = "of type|ONNX's type"
PARTLY = {
    "Add": "Add with (axis, )?broadcast", "Attention": "soft cap|window_size", "BatchNormalization": "training mode",
    "Cast": TYPE, "CastLike": TYPE, "DequantizeLinear": TYPE, "Dropout": "training mode", "Equal": TYPE,
    "Identity": "no tensor", "If": "no tensor|SequenceConstruct", "LSTM": "peepholes", "Loop": "no tensor",
    "QuantizeLinear": f"{TYPE}|output_dtype", "ReduceMax": "non-zero size", "ReduceMin": "non-zero size",
    "Reshape": TYPE, "Transpose": TYPE,
}  # fmt: skip
"""Operators that are read in part, and how the rest is refused."""
UNSIGNED = r"not implemented for 'UInt(16|32|64)'"
"""PyTorch has few operations of these types."""

ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Two units in the last place: attention adds up in another order than the standard's reference."""


def given(value: Any) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, TensorProto):
        return tensor(value)
    if isinstance(value, list) or np.asarray(value).dtype.kind in "OUS":
        raise InputError("an input that is no tensor is not read")
    return tensor(numpy_helper.from_array(np.asarray(value)))


def of_files(case: Any) -> tuple[Any, list[tuple[list[Any], list[Any]]]]:
    """The model of a case and its data, which some have in a folder."""
    if case.model is not None:
        return case.model, case.data_sets
    folder = Path(case.model_dir)

    def read(data: Path, kind: str) -> list[Any]:
        files = sorted(data.glob(f"{kind}_*.pb"), key=lambda file: int(file.stem.rpartition("_")[2]))
        return [TensorProto.FromString(file.read_bytes()) for file in files]

    sets = [(read(data, "input"), read(data, "output")) for data in sorted(folder.glob("test_data_set_*"))]
    return onnx.load(folder / "model.onnx"), sets


def run(case: Any) -> None:
    proto, sets = of_files(case)
    model = load_onnx(proto)
    for inputs, outputs in sets:
        found = model(*map(given, inputs))
        found = list(found.values()) if isinstance(found, dict) else [found]
        for ours, theirs in zip(found, map(given, outputs), strict=True):
            if ours is None:  # statistics that nobody takes
                continue
            assert theirs is not None
            assert ours.dtype == theirs.dtype
            rtol = max(case.rtol, ROUNDED.get(ours.dtype, 0.0))
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=case.atol, equal_nan=True)


KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
PARTS = 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_cases_of_the_standard(part: int) -> None:
    """None gives other numbers; what is not read is refused, and listed."""
    wrong = []
    for case in [case for kind in KINDS for case in load_model_tests(kind=kind)][part::PARTS]:
        try:
            run(case)
        except UnsupportedOperatorError as error:
            if not set(error.nodes) <= set().union(*UNREAD.values()):
                wrong.append(f"{case.name}: {error}")
        except Exception as error:
            kinds = {node.op_type for node in of_files(case)[0].graph.node}
            refusals = [UNSIGNED, *(PARTLY[kind] for kind in kinds if kind in PARTLY)]
            if isinstance(error, AssertionError) or not re.search("|".join(refusals), str(error)):
                wrong.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


def test_what_is_listed_as_unread_is() -> None:
    names = {f"{domain}.{kind}" if domain else kind for domain, kind in OPERATORS}
    assert not names & set().union(*UNREAD.values())


# Files that PyTorch exports ----------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(6, 5, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x)[0][:, -1])
        return y


class Logits(nn.Module):
    """A model of transformers that takes and gives one tensor."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(**{self.name: x}).logits
        return y


def convolutions() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), nn.SiLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.GELU(),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 5),
    )  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 1.5)
    return net


def transformer(kind: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, use_cache=False, **sizes
    )
    head = {"ViT": "ForImageClassification", "Bert": "ForSequenceClassification"}.get(kind, "ForCausalLM")
    return Logits(getattr(transformers, kind + head)(config), "pixel_values" if kind == "ViT" else "input_ids")


IDS = torch.tensor([[3, 17, 5, 9, 4, 8], [7, 2, 30, 11, 6, 1]])
IMAGES = draw(1, 2, 3, 16, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Any]] = {
    "convolutions": (convolutions, IMAGES, 1),
    "lstm": (lambda: Recurrent(nn.LSTM), draw(2, 2, 4, 6), 1),
    "gru": (lambda: Recurrent(nn.GRU), draw(3, 2, 4, 6), 1),
    "vit": (lambda: transformer("ViT", image_size=16, patch_size=4, num_labels=3), IMAGES, 1),
    "bert": (lambda: transformer("Bert", vocab_size=50, num_labels=3), IDS, 1),
    "llama": (lambda: transformer("Llama", vocab_size=50, num_key_value_heads=2), IDS, (-1, 3)),
}
WRITTEN_OUT = {"vit", "bert", "llama"}
"""Exported with numbers of float32 in the graph (an epsilon, the square root of 2), whatever the model's precision."""


def exported(name: str, path: Path, dynamo: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    make, x, _ = MODELS[name]
    model = make().to(dtype).eval()
    options: dict[str, Any] = {"dynamo": True, "verbose": False} if dynamo else {"dynamo": False, "opset_version": 17}
    x = x.to(dtype) if x.is_floating_point() else x
    torch.onnx.export(model, (x,), path, input_names=["x"], output_names=["y"], **options)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dynamo"), [*((name, True) for name in MODELS), ("convolutions", False), ("vit", False), ("bert", False)]
)
def test_relevance_is_that_of_the_model(name: str, dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    model = exported(name, tmp_path / "x.onnx", dynamo)
    read, (_, x, target) = load_onnx(tmp_path / "x.onnx"), MODELS[name]
    tolerance = 1e-6 if dynamo and name in WRITTEN_OUT else 1e-12
    torch.testing.assert_close(read(x), model(x), rtol=tolerance, atol=tolerance)
    for composite in ("auto", "epsilon_plus"):
        ours, theirs = (explain(m, x, target, composite=composite) for m in (read, model))
        scale = float(theirs.relevance.abs().max())
        torch.testing.assert_close(ours.relevance, theirs.relevance, rtol=0, atol=tolerance * scale)
        assert ours.ledger.closes
        largest = max(map(abs, theirs.ledger.accounts.values()))
        for account, amount in theirs.ledger.accounts.items():
            assert ours.ledger.accounts[account] == pytest.approx(amount, abs=tolerance * largest)


@pytest.mark.filterwarnings("ignore")
def test_the_runtime_gives_the_same(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    exported("vit", tmp_path / "x.onnx", False, torch.float32)
    x = IMAGES.float()
    (theirs,) = runtime.InferenceSession(tmp_path / "x.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(load_onnx(tmp_path / "x.onnx")(x), torch.from_numpy(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "fused"),
    [("convolutions", {"FusedConv", "Gelu"}), ("bert", {"FusedGemm", "FusedMatMul", "SkipLayerNormalization"})],
)
def test_what_the_runtime_fuses_has_the_same_relevance(name: str, fused: set[str], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    exported(name, tmp_path / "x.onnx", False, torch.float32)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    runtime.InferenceSession(tmp_path / "x.onnx", options)
    kinds = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node if node.domain == "com.microsoft"}
    assert fused <= kinds
    _, x, target = MODELS[name]
    found = []
    for file in ("x.onnx", "fused.onnx"):
        model = load_onnx(tmp_path / file).double()
        found.append(explain(model, x, target, composite="epsilon_plus"))
        assert found[-1].ledger.closes
    scale = float(found[0].relevance.abs().max())
    # The runtime folds constants in float32.
    torch.testing.assert_close(found[1].relevance, found[0].relevance, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("flags", list(itertools.product((0, 1), repeat=4)))
def test_a_fused_product_turns_its_factors(flags: tuple[int, int, int, int]) -> None:
    names = ("transA", "transB", "transBatchA", "transBatchB")
    node = helper.make_node(
        "FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", alpha=0.5, **dict(zip(names, flags, strict=True))
    )
    model = proto([node], {"x": ("a", "b", "c", "d"), "w": ("a", "b", "c", "d")}, {})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.ir_version = 10

    def before(x: Tensor, last: int, batch: int) -> Tensor:
        x = x.mT if last else x
        return (x.movedim(-2, 0) if batch else x).contiguous()

    a, b = draw(6, 2, 3, 4, 5).float(), draw(7, 2, 3, 5, 6).float()
    x, w = before(a, flags[0], flags[2]), before(b, flags[1], flags[3])
    torch.testing.assert_close(load_onnx(model)(x, w), 0.5 * a @ b)
    runtime = pytest.importorskip("onnxruntime")
    (theirs,) = runtime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy(), "w": w.numpy()})
    torch.testing.assert_close(load_onnx(model)(x, w), torch.from_numpy(theirs))


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("Relu", []),
        ("Tanh", []),
        ("Sigmoid", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [-0.3, 0.4]),
        ("HardSigmoid", [0.3, 0.6]),
    ],
)
def test_a_fused_activation_is_that_of_the_runtime(kind: str, numbers: list[float]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(8)
    w = rng.normal(size=(4, 3, 1, 1)).astype(np.float32)
    settings: dict[str, Any] = {"activation_params": numbers} if numbers else {}
    node = helper.make_node("FusedConv", ["x", "w", "b"], ["y"], domain="com.microsoft", activation=kind, **settings)
    model = proto([node], {"x": ("n", 3, 2, 2)}, {"w": w, "b": rng.normal(size=4).astype(np.float32)})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.ir_version = 10
    x = draw(8, 2, 3, 2, 2).float()
    (theirs,) = runtime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(load_onnx(model)(x), torch.from_numpy(theirs))


# The module ---------------------------------------------------------------------------------------------------------


def proto(nodes: list[Any], inputs: dict[str, tuple[int | str, ...]], weights: dict[str, Any], opset: int = 17) -> Any:
    """A model with one output, ``y``."""
    return helper.make_model(
        helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )  # fmt: skip


def dense() -> Any:
    rng = np.random.default_rng(0)
    weights = {
        "net.0.weight": rng.normal(size=(4, 3)).astype(np.float32), "net.0.bias": rng.normal(size=3).astype(np.float32)
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "net.0.weight"], ["z"], "/net/0/MatMul"),
        helper.make_node("Add", ["net.0.bias", "z"], ["h"], "/net/0/Add"),
        helper.make_node("Relu", ["h"], ["y"], "/net/1/Relu"),
    ]
    return proto(nodes, {"x": ("batch", 4)}, weights)


def test_names_of_the_file_are_paths() -> None:
    model = load_onnx(dense())
    assert [name for name, _ in model.named_parameters()] == ["net.0.weight", "net.0.bias"]
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.inputs, model.outputs) == (["x"], ["y"])
    assert model.kinds == {"x": (torch.float32, ("batch", 4))}
    x = draw(4, 2, 4).float()
    explanation = explain(model, {"x": x}, 1, layers="net.1.Relu", parameters="net.0.weight")
    assert explanation.layers["net.1.Relu"].shape == (2, 3)
    assert explanation.parameters["net.0.weight"].shape == (4, 3)
    assert ("parameters", "net.0.MatMul") in explanation.ledger.by_module()  # of the bias


def test_a_product_and_its_bias_are_one_dense_layer() -> None:
    model, x = load_onnx(dense()).double(), draw(5, 2, 4)
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(model.get_parameter("net.0.weight").T)
        layer.bias.copy_(model.get_parameter("net.0.bias"))
    for composite in ("epsilon_plus", "epsilon_alpha2_beta1"):
        expected = explain(nn.Sequential(layer, nn.ReLU()), x, 1, composite=composite).relevance
        torch.testing.assert_close(
            explain(model, x, 1, composite=composite).relevance, expected, rtol=1e-12, atol=1e-14
        )


def test_shapes_may_differ_from_call_to_call_and_are_settled_in_a_program() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    weights = {"zero": np.array([0]), "rest": np.array([-1]), "w": np.ones((6, 2), np.float32)}
    model = load_onnx(proto(nodes, {"x": ("n", 2, 3)}, weights))
    for batch in (1, 3):
        x = draw(batch, batch, 2, 3).float()
        explanation = explain(model, x, 1)
        torch.testing.assert_close(explanation.relevance, x)
        assert torch.equal(trace(model, x, 1)(x).relevance, explanation.relevance)


def test_control_flow_follows_the_numbers() -> None:
    def branch(name: str, kind: str) -> Any:
        node = helper.make_node(kind, ["x", "w"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch("a", "Mul"), else_branch=branch("b", "Sub")),
    ]
    w = np.array([[2.0, 3.0]], np.float32)
    model = load_onnx(proto(nodes, {"x": (1, 2)}, {"w": w, "zero": np.float32(0)}))
    x = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(explain(model, x, 1).relevance, torch.tensor([[0.0, 6.0]]))
    torch.testing.assert_close(explain(model, -x, 1).relevance, torch.tensor([[0.0, -2.0]]))


def test_a_quantised_layer_passes_relevance() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["dw"]),
        helper.make_node("MatMul", ["d", "dw"], ["y"]),
    ]
    w, x = np.array([[3, -2], [1, 5]], np.int8), torch.tensor([[0.52, -0.27]])
    numbers = {"scale": np.float32(0.125), "zero": np.uint8(128), "w": w, "w_scale": np.float32(0.5)}
    model = load_onnx(proto(nodes, {"x": (1, 2)}, numbers))
    rounded = torch.tensor([[0.5, -0.25]])
    torch.testing.assert_close(model(x), rounded @ torch.tensor(w).float() * 0.5)
    # The rounding error is a constant: relevance is that of the input itself.
    explanation = explain(model, x, 1)
    torch.testing.assert_close(explanation.relevance, x * torch.tensor([[-1.0, 2.5]]))
    constant = float(((rounded - x) * torch.tensor([[-1.0, 2.5]])).sum())
    assert explanation.ledger.accounts["constants"] == pytest.approx(constant, rel=1e-5)


def test_a_quantised_weight_is_a_parameter() -> None:
    """So a quantised table of embeddings has relevance, which integers have not."""
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale", "zero"], ["embeddings.weight"], axis=1),
        helper.make_node("Gather", ["embeddings.weight", "x"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    table, scale = np.array([[1, -3], [4, 2], [-7, 5]], np.int8), np.array([0.5, 0.25], np.float32)
    zero, w = np.array([1, -1], np.int8), np.array([[2.0, -1.0], [3.0, 0.5]], np.float32)
    weights = {"table": table, "scale": scale, "zero": zero, "w": w}
    file = proto(nodes, {"x": ("n", 2)}, weights)
    file.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    model = load_onnx(file)
    expected = (torch.tensor(table).float() - torch.tensor(zero)) * torch.tensor(scale)
    assert torch.equal(model.get_parameter("embeddings.weight"), expected)
    x = torch.tensor([[2, 0], [1, 1]])
    explanation = explain(model, x, (0, 1), parameters="embeddings.weight")
    # The first place took rows 2 and 1.
    rows = torch.tensor([[0.0], [1.0], [1.0]]) * expected * torch.tensor(w[:, 1])
    torch.testing.assert_close(explanation.parameters["embeddings.weight"], rows)
    tokens = torch.tensor([[float(rows[2].sum()), 0.0], [float(rows[1].sum()), 0.0]])
    torch.testing.assert_close(explanation.relevance, tokens)


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_that_the_runtime_quantised_is_read(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    exported("bert", tmp_path / "x.onnx", False, torch.float32)

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left = [{"x": IDS.numpy()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    quantization.quantize_static(tmp_path / "x.onnx", tmp_path / "q.onnx", Samples(), per_channel=True)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (theirs,) = runtime.InferenceSession(tmp_path / "q.onnx", options).run(None, {"x": IDS.numpy()})
    model = load_onnx(tmp_path / "q.onnx")
    # An entry that is rounded to the other side differs by one step, far more than float32 does.
    torch.testing.assert_close(model(IDS), torch.from_numpy(theirs), rtol=0.02, atol=1e-4)
    ours, theirs = (explain(of, IDS, 2) for of in (model, load_onnx(tmp_path / "x.onnx")))
    assert ours.ledger.closes
    # Weights of 8 bits move relevance a little, in each sample.
    for sample in torch.stack([ours.relevance, theirs.relevance], 1):
        assert float(torch.corrcoef(sample)[0, 1]) > 0.99
    clipped = explain(model, IDS, 1).relevance  # the first sample's logit lies beyond the range of its calibration
    assert clipped.any(1).tolist() == [False, True]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    unknown = [
        helper.make_node("Bernoulli", ["x"], ["h"], "draw"),
        helper.make_node("Mine", ["h"], ["y"], "mine", domain="my"),
    ]
    with pytest.raises(UnsupportedOperatorError, match=r"(?s)2 operator.*Bernoulli: draw.*my.Mine: mine") as error:
        load_onnx(proto(unknown, {"x": (1, 2)}, {}))
    assert error.value.nodes == {"Bernoulli": ["draw"], "my.Mine": ["mine"]}
    file = tmp_path / "x.onnx"
    with pytest.raises(InputError, match="there is no file"):
        load_onnx(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is no ONNX file"):
        load_onnx(file)
    with pytest.raises(InputError, match="not list"):
        load_onnx([])
    model = load_onnx(dense())
    for wrong, words in (({"z": torch.ones(1, 4)}, "not there: x"), ({"x": torch.ones(1, 4), "z": 1}, "too many: z")):
        with pytest.raises(InputError, match=words):
            model(**wrong)
    windowed = helper.make_node("Elu", ["x"], ["y"], gamma=2.0)
    with pytest.raises(InputError, match="Elu with gamma is not read"):
        load_onnx(proto([windowed], {"x": (1, 2)}, {}))(torch.ones(1, 2))


def test_an_operator_can_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynlrp.onnx.node.OPERATORS", OPERATORS)
    operator("Twice", domain="my")(lambda node, x: node.get("times", 2) * x)
    try:
        model = load_onnx(proto([helper.make_node("Twice", ["x"], ["y"], domain="my", times=3)], {"x": (1, 2)}, {}))
        assert torch.equal(explain(model, torch.tensor([[1.0, 2.0]]), 1).relevance, torch.tensor([[0.0, 6.0]]))
    finally:
        del OPERATORS["my", "Twice"]


@pytest.mark.parametrize("shape", [None, (5, 4)])
def test_reports_take_a_file(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    from dynlrp.allocation.sources import load_model
    from dynlrp.zoo import examine, find

    file = tmp_path / "net.onnx"
    onnx.save(dense(), file)
    (entry,) = find(str(file), shape)
    assert entry.build().inputs["x"].shape == (shape or (1, 4))
    report = examine(entry, verify=True)
    assert report.title == "net"
    assert report.covered == report.nodes > 0
    assert report.verified == report.reached > 0
    assert not report.idle
    assert isinstance(load_model(str(file)), nn.Module)

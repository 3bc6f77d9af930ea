"""``dynlrp allocate``: models and calibration from files, a table, JSON and a chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

from dynlrp import Allocation, Budget, InputError, allocate
from dynlrp.allocation import Activations, Divergence, Quantizer, allocate_activations
from dynlrp.allocation.sources import Preparation, load_calibration, load_model
from dynlrp.cli import app
from dynlrp.zoo import ZooError
from tests.test_solver import loud

X = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.one(a) + self.other(b)


def run(*arguments: Any, command: str = "allocate") -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


NET = "tests.test_allocate_command:Net"


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "x.npy"


def test_table(array: Path, tmp_path: Path) -> None:
    result = run(NET, array, "--budget", 8, "-o", tmp_path / "bits.json", "-o", tmp_path / "bits.png")
    assert result.exit_code == 0, result.output
    expected = allocate(Net().eval(), torch.from_numpy(X), 8)
    for row in expected.table:
        line = next(line.split() for line in result.stdout.splitlines() if line.startswith(f"{row.layer} "))
        assert line[:4] == [row.layer, str(row.weights), str(row.bits), "\N{FULL BLOCK}" * row.bits]
        assert float(line[4]) == pytest.approx(row.score, rel=1e-2)
    assert f"{expected.average_bits:.3f} bits for each weight" in result.stdout
    assert "score weight_error, 6 samples; solution: exact" in result.stdout
    assert Allocation.load(tmp_path / "bits.json").bits == expected.bits
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_options(array: Path, tmp_path: Path) -> None:
    result = run(
        NET, array, "--json", "--size", 0.0006, "--bitops", 1e-3, "--candidates", "3,4,7", "--score", "weight_mse",
        "--group", "0,4", "--asymmetric", "--group-size", 1, "--samples", 4, "--batch", 2,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "cannot be kept" in result.output
    result = run(
        NET, array, "--json", "--size", 0.0006, "--bitops", 1e-3, "--candidates", "3,4,7", "--score", "weight_mse",
        "--group", "0,4", "--asymmetric", "--samples", 4, "--batch", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    budget = Budget(size=0.0006 * 2**20, bitops=1e6)
    expected = allocate(
        Net().eval(), torch.from_numpy(X), budget, (3, 4, 7), score="weight_mse", groups=[("0", "4")],
        quantizer=Quantizer(False),
    )  # fmt: skip
    assert json.loads(result.stdout) == expected.bits
    pinned = run(NET, array, "--json", "--budget", 12, "--pin", "0=keep", "--pin", "4=3")
    assert json.loads(pinned.stdout) == {"4": 3}
    assert set(json.loads(run(NET, array, "--json", "--budget", 8, "--layers", "4").stdout)) == {"4"}
    wide = run(
        NET, array, "--budget", 20, "--per-tap", "--bitops", 1e-4, "--activation-bits", 8, "-o", tmp_path / "x.json"
    )
    assert wide.exit_code == 0, wide.output
    made = Allocation.load(tmp_path / "x.json")
    assert made.quantizer == Quantizer(per_tap=True)
    assert made.provenance["budget"] == {"average_bits": 20, "size": None, "bitops": 1e5, "activation_bits": 8}


def test_activations(array: Path, tmp_path: Path) -> None:
    weights = allocate(Net().eval(), torch.from_numpy(X), 8)
    result = run(
        NET, array, "--bitops", 9e-5, "--candidates", "2,4,8", "--score", "relevance", "--composite", "epsilon",
        "--batch", 4, "--weights", weights.save(tmp_path / "weights.json"), "-o", tmp_path / "bits.json",
        "-o", tmp_path / "bits.png", command="allocate-activations",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = allocate_activations(
        Net().eval(), torch.from_numpy(X), Budget(bitops=9e4), (2, 4, 8), weights=weights, score="relevance",
        composite="epsilon",
    )  # fmt: skip
    for row in expected.table:
        line = next(line.split() for line in result.stdout.splitlines() if line.startswith(f"{row.activation} "))
        assert line[:4] == [
            row.activation, f"{row.multiplications:,.0f}", str(row.bits), "\N{FULL BLOCK}" * row.bits
        ]  # fmt: skip
        assert float(line[4]) == pytest.approx(row.cost, rel=1e-2)
    assert f"{expected.average_bits:.3f} bits over multiplications" in result.stdout
    assert "score relevance, 6 samples; solution: exact" in result.stdout
    assert Activations.load(tmp_path / "bits.json").bits == expected.bits
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    pins = ["--pin", "0:*=8", "--pin", "4:*=4", "--group", "0:input,4:input"]
    torn = run(NET, array, *pins, command="allocate-activations")
    assert torn.exit_code == 2
    assert "must share bits" in torn.output
    plain = run(NET, array, "--json", "--pin", "0:*=keep", command="allocate-activations")
    assert json.loads(plain.stdout) == {"4:input": 6}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([NET, "nothing.npy"], "there is no file nothing.npy"),
        ([NET, "x.npy", "--budget", 1], "average_bits = 1 cannot be kept"),
        ([NET, "x.npy", "--score", "nothing"], "no score is called 'nothing'"),
        ([NET, "x.npy", "--pin", "head"], "not like head=8"),
        ([NET, "x.npy", "--candidates", "3.5"], "no list of numbers"),
        ([NET, "x.npy", "-o", "bits.txt"], "neither .json nor .png"),
        (["nowhere", "x.npy"], "neither a folder with a config.json nor package.module:attribute"),
        ([f"{NET}.other", "x.npy"], "has no 'other'"),
        ([NET, "x.npy", "--divergence", "loud"], "not 'loud'"),
    ],
)
def test_what_cannot_be(arguments: list[Any], words: str, array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(array.parent)
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("\u2502", " ").split())


def test_named_arrays(tmp_path: Path) -> None:
    a, b = X.reshape(-1, 4)[:10], X.reshape(-1, 4)[10:20].astype(np.float64)
    np.savez(tmp_path / "one.npz", a=a[:6], b=b[:6])
    np.savez(tmp_path / "two.npz", a=a[6:], b=b[6:])
    found = load_calibration([tmp_path / "one.npz", tmp_path / "two.npz"])
    assert torch.equal(found["a"], torch.from_numpy(a))
    assert torch.equal(found["b"], torch.from_numpy(b).float())
    assert allocate(Two().eval(), found, 20, score="gauss_newton").scores.count == 10
    np.savez(tmp_path / "other.npz", a=a)
    with pytest.raises(InputError, match="different names"):
        load_calibration([tmp_path / "one.npz", tmp_path / "other.npz"])


def test_images(tmp_path: Path) -> None:
    from PIL import Image

    for name, size in {"b.png": (20, 10), "a.png": (10, 30)}.items():
        pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = (255, 51) if name == "a.png" else (0, 102)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no image")
    prepared = Preparation(size=16, mean=(0.5, 0, 0), std=(0.5, 1, 2))
    found = load_calibration([tmp_path], prepared)
    assert found.shape == (2, 3, 16, 16)
    assert torch.allclose(found[:, :, 8, 8], torch.tensor([[1, 0.2, 0], [-1, 0.4, 0]]))
    # A square from the middle: red left and right of it is cut away.
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32, 2] = 255
    pixels[:, :8, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    wide = load_calibration([tmp_path / "wide.png"], Preparation(16, (0, 0, 0), (1, 1, 1)))
    assert torch.equal(wide[0, 2], torch.ones(16, 16))
    assert not wide[0, :2].any()
    with pytest.raises(InputError, match="of one kind"):
        load_calibration([tmp_path / "a.png", _saved(tmp_path / "x.npy")])


def _saved(path: Path) -> Path:
    np.save(path, X)
    return path


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"a": X.reshape(-1, 4)[:3].tolist(), "b": [[1, 2]] * 3, "label": [0, 1, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    found = load_calibration([tmp_path / "x.parquet"])
    assert set(found) == {"a", "b"}
    assert torch.equal(found["a"], torch.from_numpy(X.reshape(-1, 4)[:3]))
    assert found["b"].dtype == torch.int64
    parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "labels.parquet")
    with pytest.raises(InputError, match=r"no column of lists, texts or images, but \['label'\]"):
        load_calibration([tmp_path / "labels.parquet"])


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install dynlrp\[parquet\]"):
        load_calibration([tmp_path / "x.parquet"])


def test_a_folder_of_transformers_with_texts(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "bad", "good"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    (tmp_path / "texts.txt").write_text("a good film\n\na bad film\n")
    found = load_model(str(tmp_path))
    assert isinstance(found, BertForSequenceClassification)
    assert not found.training
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    data = load_calibration([tmp_path / "texts.txt"], Preparation(tokenizer=tmp_path, length=8))
    assert data["input_ids"].tolist() == [[2, 4, 7, 5, 3, 0, 0, 0], [2, 4, 6, 5, 3, 0, 0, 0]]
    result = run(tmp_path, tmp_path / "texts.txt", "--length", 8, "--budget", 9, "--pin", "classifier=8", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["classifier"] == 8
    with pytest.raises(InputError, match="need a tokenizer"):
        load_calibration([tmp_path / "texts.txt"])


def test_padding_does_not_count(tmp_path: Path) -> None:
    """The allocation is that with the mask as weights of positions."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    ids, mask = torch.arange(24).reshape(3, 8) % 8, torch.arange(8) < torch.tensor([[3], [8], [5]])
    data = {"input_ids": ids, "attention_mask": mask.long()}
    np.savez(tmp_path / "x.npz", **data)
    result = run(tmp_path, tmp_path / "x.npz", "--budget", 9, "-o", tmp_path / "bits.json")
    assert result.exit_code == 0, result.output
    found = Allocation.load(tmp_path / "bits.json").costs
    masked = allocate(model, data, 9, divergence=Divergence("softmax", lambda inputs: inputs["attention_mask"])).costs
    assert torch.allclose(found, masked, rtol=1e-6)
    assert not torch.allclose(found, allocate(model, data, 9).costs, rtol=1e-2)


def test_what_is_no_calibration(tmp_path: Path) -> None:
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    for name, words in {"words.npy": "which is no batch", "x.wav": "is none of"}.items():
        (tmp_path / "x.wav").touch()
        with pytest.raises(InputError, match=words):
            load_calibration([tmp_path / name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="an empty folder"):
        load_calibration([tmp_path / "empty"])
    with pytest.raises(ZooError, match="is not package"):
        load_model("a b:c")


def test_json_is_alone_on_the_output(
    array: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """HiGHS prints a line on its own."""
    monkeypatch.setattr(scipy.optimize, "milp", loud(scipy.optimize.milp))
    app(["allocate", NET, str(array), "--budget", "8", "--json"], standalone_mode=False)
    assert set(json.loads(capfd.readouterr().out)) == {"0", "4"}

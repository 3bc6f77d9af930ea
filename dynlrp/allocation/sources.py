"""Models and calibration data from files, for the command line."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynlrp.allocation.extras import needs
from dynlrp.errors import InputError
from dynlrp.onnx import load_onnx

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
Named = dict[str, Tensor]
"""Inputs of the model by name; the one input of a model that takes one has the name ``ALONE``."""
ALONE = ""


@dataclass(frozen=True)
class Preparation:
    """How images and texts become inputs.

    Args:
        size: height and width of an image, of which the middle square is taken.
        mean, std: what is subtracted from colours between 0 and 1, and what they are then divided by.
        tokenizer: a folder with a tokenizer of transformers.
        length: tokens of a text, at most.
    """

    size: int = 224
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    tokenizer: Path | None = None
    length: int = 128


def load_model(source: str) -> nn.Module:
    """The model that a folder of transformers or an ``.onnx`` file holds, or that ``package.module:attribute`` is or
    makes, in eval mode."""
    if source.endswith(".onnx"):
        return load_onnx(source)
    if ":" in source:
        from dynlrp.zoo.imported import build

        return build(source)[0].eval()
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise InputError(f"{source!r} is neither a folder with a config.json nor package.module:attribute")
    transformers = _optional("transformers", "zoo")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kinds = [kind for name in config.architectures or () if (kind := getattr(transformers, name, None)) is not None]
    kind = kinds[0] if kinds else transformers.AutoModel
    model: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    return model.eval()


def load_calibration(sources: Sequence[Path], preparation: Preparation | None = None) -> Any:
    """What files hold, as calibration data: arrays of a ``.npy`` file, named ones of an ``.npz`` file, columns of a
    ``.parquet`` file, lines of a ``.txt`` file, and images, or all images of a folder."""
    preparation = preparation or Preparation()
    files = [file for source in sources for file in _files(source)]
    endings = {_kind(file) for file in files}
    if len(endings) != 1:
        raise InputError(f"calibration is of one kind, not {', '.join(sorted(endings)) or 'an empty folder'}")
    parts = [READERS[_kind(file)](file, preparation) for file in files]
    if any(set(part) != set(parts[0]) for part in parts):
        raise InputError(f"the files of the calibration have different names in them: {[*map(sorted, parts)]}")
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return joined.get(ALONE, joined)


def _files(source: Path) -> list[Path]:
    """The file itself, or all images of a folder."""
    if source.is_dir():
        return sorted(file for file in source.iterdir() if file.suffix.lower() in IMAGES)
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    return [source]


def _kind(file: Path) -> str:
    kind = "image" if file.suffix.lower() in IMAGES else file.suffix.lower()
    if kind not in READERS:
        raise InputError(f"{file} is none of .npy, .npz, .parquet, .txt and images")
    return kind


def _npy(file: Path, preparation: Preparation) -> Named:
    return {ALONE: _tensor(np.load(file, allow_pickle=False), file)}


def _npz(file: Path, preparation: Preparation) -> Named:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: _tensor(arrays[name], file) for name in arrays.files}


def _parquet(file: Path, preparation: Preparation) -> Named:
    """Columns of lists are inputs by their name; one of images or texts is prepared; single numbers are labels."""
    parquet = _optional("pyarrow.parquet", "parquet")
    columns: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    rows = {name: column[0] for name, column in columns.items() if column}
    for name, row in rows.items():
        if isinstance(row, dict) and isinstance(row.get("bytes"), bytes):
            pictures = [_picture(io.BytesIO(row["bytes"]), preparation)[ALONE] for row in columns[name]]
            return {ALONE: torch.cat(pictures)}
        if isinstance(row, str):
            return _tokens(columns[name], preparation)
    found = {name: _tensor(np.array(columns[name]), file) for name, row in rows.items() if isinstance(row, list)}
    if not found:
        raise InputError(f"{file} has no column of lists, texts or images, but {list(columns)}")
    return found


def _lines(file: Path, preparation: Preparation) -> Named:
    return _tokens([line for line in file.read_text("utf-8").splitlines() if line.strip()], preparation)


def _tokens(texts: list[str], preparation: Preparation) -> Named:
    if preparation.tokenizer is None:
        raise InputError("texts need a tokenizer: give a model's folder that has one")
    transformers = _optional("transformers", "zoo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(preparation.tokenizer, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=preparation.length, return_tensors="pt")
    return dict(made)


def _picture(file: Any, preparation: Preparation) -> Named:
    """The middle square of an image, ``(1, 3, size, size)``."""
    image = _optional("PIL.Image", "plot")
    with image.open(file) as opened:
        picture = opened.convert("RGB")
    scale, size = preparation.size / min(picture.size), preparation.size
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(numbers).reshape(-1, 1, 1) for numbers in (preparation.mean, preparation.std))
    return {ALONE: ((pixels - mean) / std)[None]}


def _tensor(array: Any, file: Path) -> Tensor:
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise InputError(f"{file} holds an array of {array.dtype} with {array.ndim} dimensions, which is no batch")
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor if array.dtype.kind == "b" else tensor.long()


def _optional(module: str, extra: str) -> Any:
    with needs(extra):
        return importlib.import_module(module)


READERS: dict[str, Callable[[Path, Preparation], Named]] = {
    ".npy": _npy, ".npz": _npz, ".parquet": _parquet, ".txt": _lines, "image": _picture,
}  # fmt: skip
"""How each kind of file is read."""

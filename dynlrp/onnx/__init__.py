"""ONNX files as modules of PyTorch operations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlrp.onnx.node import Node, operator

if TYPE_CHECKING:
    from dynlrp.onnx.model import OnnxModel

__all__ = ["Node", "load_onnx", "operator"]


def load_onnx(source: str | Path | Any) -> OnnxModel:
    """An ONNX file as a module, to explain as any other (needs ``dynlrp[onnx]``).

    It takes the file's inputs by position or by name, and returns its output, or a dict where there are several.
    Weights are frozen parameters by their names in the file. Every operator is a module whose path is its name in the
    file, with ``/`` as ``.``, so that ``layers=``, composites by path and the ledger know it. ``double()`` and
    ``half()`` change the precision of all that the file has in float32, ``to("cuda")`` the device.

    Args:
        source: a path, with external data beside the file where it has such, or an ``onnx.ModelProto``.

    Raises:
        UnsupportedOperatorError: the file has operators that are not read; all are named. :func:`dynlrp.onnx.operator`
            enters what one does.
        InputError: it is no ONNX file, or was exported in training mode.
    """
    from dynlrp.onnx.model import read  # onnx takes its time

    return read(source)

"""Makes torchvision's models importable beside a torch for which its compiled operators were not built.

zennit and LXT import torchvision for the classes of its models, which are plain Python. Its package fails to import
where its compiled part does not load, since it registers shapes for operators that are then unknown; here they get a
schema, and no kernel.
"""

from __future__ import annotations

import importlib.util

import torch

_LIBRARY: list[torch.library.Library] = []
"""Schemas live as long as their library."""


def define() -> None:
    """Import torchvision, with schemas for what it lacks; nothing where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.append(library)
        importlib.import_module("torchvision")

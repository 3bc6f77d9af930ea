"""Make lxt.npz: relevance by LXT 2.1 (lxt.efficient) for the transformers of models.py. See README.md.

Run this with transformers 4.52.4, the version LXT 2.1 was tested with: with transformers 5 lxt.efficient
cannot be imported. Nothing is patched by hand; LXT's own monkey_patch and patch maps do it:

* `attnlrp`: `lxt.efficient.monkey_patch(modeling_file)`, LXT's default map for Llama, GPT-2 and BERT.
* `cplrp`: the same with LXT's `cp_LRP` map, which exists for Llama and GPT-2.

Each patch changes classes of torch and transformers for good, so every case runs in a process of its own.
"""

import importlib
import importlib.metadata
import itertools
import multiprocessing
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from models import TRANSFORMERS, token_ids
from torch import Tensor, nn

CASES = [*itertools.product(("llama", "gpt2"), ("attnlrp", "cplrp")), ("bert", "attnlrp")]


def stub_torchvision() -> None:
    """Put an empty torchvision in sys.modules.

    lxt.efficient imports torchvision.models.vision_transformer, for a model that we do not use, only to reach
    the classes of torch.nn through it; and a torchvision that fits the torch build is not always to be had.
    To be called after `import transformers`, which would take it for a real one.
    """
    for name in ("torchvision", "torchvision.models", "torchvision.models.vision_transformer"):
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    sys.modules["torchvision.models"].vision_transformer = module
    module.nn = nn


def patch(name: str, variant: str) -> None:
    """Let LXT patch the classes of the model `name`."""
    importlib.import_module("transformers")
    stub_torchvision()
    from lxt.efficient import monkey_patch

    maps = importlib.import_module(f"lxt.efficient.models.{name}")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    monkey_patch(modeling, None if variant == "attnlrp" else maps.cp_LRP)


def logits(model: nn.Module, embeds: Tensor) -> Tensor:
    """The logits that are explained, (batch, classes): of the last position, or of the sequence."""
    out = model(inputs_embeds=embeds).logits
    return out[:, -1] if out.ndim == 3 else out


def explain(case: tuple[str, str]) -> dict[str, np.ndarray]:
    """Relevance in both dtypes, as `inputs_embeds * grad` with weights frozen, by key of the file."""
    name, variant = case
    patch(name, variant)
    model = TRANSFORMERS[name]().requires_grad_(False)
    out = {f"{name}/state/{key}": value for key, value in model.state_dict().items()}
    ids = out[f"{name}/input_ids"] = token_ids()
    for dtype, short in ((torch.float32, "f32"), (torch.float64, "f64")):
        model = model.to(dtype)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = logits(model, embeds)
        target = out[f"{name}/target"] = output.argmax(-1)
        # The gradient of the logit itself: relevance starts as the logit's value. Rows do not mix.
        output.gather(1, target[:, None]).sum().backward()
        relevance = embeds.detach() * embeds.grad
        out |= {f"{name}/{short}/logits": output, f"{name}/{short}/inputs_embeds": embeds}
        out |= {f"{name}/{short}/{variant}/relevance": relevance}
        out |= {f"{name}/{short}/{variant}/token_relevance": relevance.sum(-1)}
    return {key: value.detach().numpy() for key, value in out.items()}


if __name__ == "__main__":
    numbers: dict[str, np.ndarray] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for part in pool.map(explain, CASES, chunksize=1):
            numbers |= part
    assert all(np.isfinite(value).all() for value in numbers.values())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "lxt")]
    numbers["versions"] = np.array(versions)
    np.savez_compressed(Path(__file__).with_name("lxt.npz"), **numbers)

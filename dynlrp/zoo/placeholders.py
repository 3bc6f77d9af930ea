"""Example inputs of models that see or hear in the middle of a text: tokens that hold the place of each feature."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dynlrp.fake import faked

Makers = Mapping[str, Sequence[Callable[[PretrainedConfig], Any]]]
KINDS = {"image": 1, "video": 2, "audio": 3}
"""What may stand in a text, with the number that its tokens have among ``mm_token_type_ids``."""
TYPES = ("mm_token_type_ids", "moe_mm_token_type_ids")
BATCH = 2


class Part(NamedTuple):
    """What a model is to see or hear beside one text, and how many tokens hold its place."""

    kind: str
    token: int
    start: list[int]
    end: list[int]
    tokens: int
    inputs: dict[str, Any]


def mixed(model: nn.Module, config: PretrainedConfig, makers: Makers, ids: Tensor) -> Iterator[dict[str, Any]]:
    """Inputs with placeholders in the text: for all kinds of data that the model takes, then for each alone.

    ``makers`` make candidates for inputs by name. How many tokens a picture takes is what the model's own
    ``get_image_features`` makes of it.
    """
    parts = [part for kind in KINDS for part in [_part(model, config, kind, makers)] if part is not None]
    groups = [parts] if len(parts) < 2 else [parts, *([part] for part in parts)]
    names = inspect.signature(model.forward).parameters
    for group in groups:
        if group:
            made = {name: value for part in group for name, value in part.inputs.items() if name in names}
            yield {**_text(ids, group, [name for name in TYPES if name in names]), **made}


def _text(ids: Tensor, parts: Sequence[Part], types: Sequence[str]) -> dict[str, Tensor]:
    """The ids with placeholders behind the first two, and the kind of every token under each name in ``types``."""
    row = [token for part in parts for token in (*part.start, *[part.token] * part.tokens, *part.end)]
    kinds = [k for p in parts for k in (*[0] * len(p.start), *[KINDS[p.kind]] * p.tokens, *[0] * len(p.end))]
    held, kind = (torch.tensor(values).expand(len(ids), -1) for values in (row, kinds))
    ids = torch.where(torch.isin(ids, torch.tensor([part.token for part in parts])), ids + 1, ids)
    nothing = torch.zeros_like(ids)
    made = {"input_ids": torch.cat([ids[:, :2], held, ids[:, 2:]], 1)}
    return {**made, **{name: torch.cat([nothing[:, :2], kind, nothing[:, 2:]], 1) for name in types}}


def held(ids: Tensor, token: int, count: int) -> Tensor:
    """Ids with ``count`` tokens that hold a place behind the first two."""
    return _text(ids, [Part("image", token, [], [], count, {})], ())["input_ids"]


def _part(model: Any, config: PretrainedConfig, kind: str, makers: Makers) -> Part | None:
    token = _token(config, f"{kind}_token_id", f"{kind}_token_index")
    name = f"get_{kind}_features"
    readers = (getattr(module, name) for module in model.modules() if hasattr(module, name))
    reader = next(readers, None)
    if token is None or reader is None:
        return None
    around = [f"{prefix}_{end}_token_id" for end in ("start", "end") for prefix in (kind, "vision")]
    start, end = ([t for t in (_token(config, *around[i : i + 2]),) if t not in (None, token)] for i in (0, 2))
    for inputs in _offers(reader, config, makers):
        try:
            with torch.no_grad():
                count = _features(_read(reader, inputs))
        except Exception:  # the next candidate may fit; else the part is not exercised, and listed as such
            continue
        if count and count % BATCH == 0:
            return Part(kind, token, start, end, count // BATCH, inputs)
    return None


def _token(config: PretrainedConfig, *names: str) -> int | None:
    nested = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    found = (getattr(one, name, None) for one in (config, *nested) for name in names)
    return next((token for token in found if isinstance(token, int)), None)


def _offers(reader: Any, config: PretrainedConfig, makers: Makers) -> Iterator[dict[str, Any]]:
    """Candidates for what a reader of features takes, with all that there are candidates for and without the rest."""
    parameters = inspect.signature(reader).parameters.values()
    every = [p.name for p in parameters if p.name in makers and p.name != "input_ids"]
    first = every[:1]
    for names in dict.fromkeys((tuple(every), tuple(first))):
        for chosen in itertools.islice(itertools.product(*(makers[name] for name in names)), 48):
            yield {name: make(config) for name, make in zip(names, chosen, strict=True)}


def _read(reader: Any, inputs: dict[str, Any]) -> Any:
    """What a method of a module makes of some inputs, where the module lies on the meta device without numbers."""
    module = reader.__self__
    lies_nowhere = any(parameter.is_meta for parameter in module.parameters())
    with faked(module, inputs) if lies_nowhere else nullcontext((module, inputs)) as (runs, given):
        return getattr(runs, reader.__name__)(**given)


def _features(made: Any) -> int:
    """How many vectors there are in what a model makes of its pictures."""
    if isinstance(made, Tensor):
        return made.numel() // made.shape[-1]
    if isinstance(made, Mapping):
        pooled = made.get("pooler_output")
        return _features(made["last_hidden_state"] if pooled is None else pooled)
    return sum(_features(one) for one in made if isinstance(one, Tensor))

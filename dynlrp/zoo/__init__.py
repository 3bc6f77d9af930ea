"""Models by name: the paper's fifteen, small ones of every transformers type, timm, and the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynlrp.coverage import Coverage, coverage
from dynlrp.errors import described
from dynlrp.verification import Verification, verification
from dynlrp.zoo.entry import Entry, Example, ZooError, needs

__all__ = ["Entry", "Example", "ZooError", "entries", "examine", "find", "near", "search", "without_timm"]


@cache
def entries() -> dict[str, Entry]:
    """Every model of the zoo that can be built here, by name."""
    return {entry.name: entry for zoo in (_paper, _families, _timm) for entry in zoo()}


def find(model: str, shape: tuple[int, ...] | None = None) -> list[Entry]:
    """The models that a text means. What they are made of is not looked at before they are built.

    Args:
        model: a name of the zoo, with or without what stands before the slash, or a glob of names; a folder with a
            transformers ``config.json``; an ``.onnx`` file; ``package.module:attribute``, a model, a class or a
            function that makes one; a timm model.
        shape: of the input, where the model is not one of the zoo.

    Raises:
        ZooError: there is no such model, and the nearest names are given; or it has inputs of its own.
    """
    if model.endswith(".onnx"):
        from dynlrp.zoo import onnx_file

        return [onnx_file.entry(Path(model), shape)]
    if ":" in model:
        from dynlrp.zoo import imported

        return [imported.entry(model, shape)]
    known = _known(model)
    if known and shape is not None:
        raise ZooError(f"{known[0].name} comes with its inputs; a shape is for folders and models of yours, or of timm")
    if known:
        return known
    if Path(model).is_dir():
        with needs("transformers"):
            from dynlrp.zoo import folder
        return [folder.entry(Path(model), shape)]
    if any(character in model for character in "*?["):
        raise ZooError(f"no model of the zoo is called like {model!r}; `dynlrp zoo` lists them")
    name, from_timm = model.removeprefix("timm/"), _from_timm()
    if from_timm is not None and from_timm.exists(name):
        return [from_timm.entry(name, shape)]
    if model.startswith("timm/") and from_timm is None:
        raise ZooError(f"{model!r} is a model of timm, which {without_timm()}")
    raise ZooError(_unknown(model))


def search(text: str) -> list[Entry]:
    """The models of the zoo whose name, title or class has a text in it, or fits a glob."""
    if any(character in text for character in "*?["):
        return [entry for name, entry in entries().items() if fnmatchcase(name, text)]
    words = text.lower()
    return [e for e in entries().values() if any(words in t.lower() for t in (e.name, e.title, e.kind))]


def near(text: str) -> list[str]:
    """Names of the zoo that are like a text, the nearest first, without what stands before the slash where that is
    enough."""
    bare = {name.partition("/")[2]: name for name in reversed(entries())}
    return list(dict.fromkeys(bare.get(name, name) for name in get_close_matches(text, [*bare, *entries()], 6, 0.5)))


@cache
def without_timm() -> str:
    """Why there are no models of timm; empty where there are."""
    if find_spec("timm") is None:
        return "is not installed"
    try:
        import_module("timm")
    except Exception as error:  # as where its torchvision is not made for this torch
        return f"cannot be imported: {described(error)}"
    return ""


def examine(entry: Entry, *, composite: str = "auto", verify: bool = False) -> Coverage:
    """The report on one model."""
    example = entry.build()
    made = coverage(example.model, example.inputs, composite=composite, allow_training=example.random, name=entry.name)
    modality = made.modality or entry.modality()
    made = replace(made, title=entry.title or example.title, published=entry.published, modality=modality)
    if not verify:
        return made
    from dynlrp.zoo.target import weighted_sum

    try:
        small = example if entry.small is None else entry.small()
    except Exception as error:  # the graph is known all the same
        return replace(made, verification=Verification(error=f"no small model to explain: {described(error)}"))
    found = verification(small.model, small.inputs, weighted_sum, composite=composite, allow_training=small.random)
    return replace(made, verification=found)


def _known(model: str) -> list[Entry]:
    """The models of the zoo that are called so, or like a glob."""
    known = entries()
    for name in (model, *(f"{zoo}/{model}" for zoo in ("paper", "family", "timm"))):
        if name in known:
            return [known[name]]
    return search(model) if any(character in model for character in "*?[") else []


def _paper() -> Iterator[Entry]:
    with needs("transformers"):
        from dynlrp.zoo import paper
    yield from paper.entries()


def _families() -> Iterator[Entry]:
    from dynlrp.zoo import families, kinds

    for name in families.model_types():
        yield Entry(
            f"family/{name}",
            partial(families.build, name),
            kind=families.class_name(name),
            modality=partial(kinds.modality, name),
        )


def _timm() -> Iterator[Entry]:
    from_timm = _from_timm()
    if from_timm is not None:
        for name in from_timm.modules():
            build, small = partial(from_timm.smallest, name), partial(from_timm.smaller, name)
            yield Entry(f"timm/{name}", build, small, modality=lambda: "vision")


def _from_timm() -> Any:
    """The module for models of timm, where it can be imported."""
    if without_timm():
        return None
    from dynlrp.zoo import image_models

    return image_models


def _unknown(model: str) -> str:
    zoo, slash, _ = model.partition("/")
    names = [] if slash and zoo not in ("paper", "family", "timm") else near(model)  # else it is a path
    suggestion = f"did you mean {', '.join(names)}? " if names else ""
    return (
        f"no model is called {model!r}: {suggestion}A model is a name that `dynlrp zoo` lists, a folder with a "
        f"config.json, an .onnx file, or package.module:attribute."
    )

"""Models by name: the paper's fifteen, small ones of every transformers type, timm, and the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dynlrp.coverage import Coverage, coverage
from dynlrp.verification import verification
from dynlrp.zoo.entry import Entry, Example, ZooError, needs

__all__ = ["Entry", "Example", "ZooError", "entries", "examine", "find"]


@cache
def entries() -> dict[str, Entry]:
    """Every model of the zoo that can be built here, by name."""
    return {entry.name: entry for zoo in (_paper, _families, _timm) for entry in zoo()}


def find(model: str, shape: tuple[int, ...] | None = None) -> list[Entry]:
    """The models that a text means.

    Args:
        model: a name of the zoo, with or without what stands before the slash, or a glob of names; a folder with a
            transformers ``config.json``; ``package.module:attribute``, a model, a class or a function that makes one;
            a timm model.
        shape: of the input, where nothing else tells.

    Raises:
        ZooError: there is no such model; the nearest names are given.
    """
    if model.endswith(".onnx"):
        raise ZooError(f"{model}: ONNX files cannot be read yet. Give the PyTorch model that it was exported from.")
    if ":" in model:
        from dynlrp.zoo import imported

        return [imported.entry(model, shape)]
    known = entries()
    if model in known:
        return [known[model]]
    if any(character in model for character in "*?["):
        found = [entry for name, entry in known.items() if fnmatchcase(name, model)]
        if not found:
            raise ZooError(f"no model of the zoo is called like {model!r}; `dynlrp zoo` lists them")
        return found
    for zoo in ("paper", "family", "timm"):
        if f"{zoo}/{model}" in known:
            return [known[f"{zoo}/{model}"]]
    if Path(model).is_dir():
        with needs("transformers"):
            from dynlrp.zoo import folder
        return [folder.entry(Path(model))]
    if find_spec("timm") is not None:
        from dynlrp.zoo import image_models

        if image_models.exists(model.removeprefix("timm/")):
            return [image_models.entry(model.removeprefix("timm/"))]
    elif model.startswith("timm/"):
        raise ZooError(f"{model!r} is a model of timm, which is not installed")
    raise ZooError(_unknown(model, list(known)))


def examine(entry: Entry, *, composite: str = "auto", verify: bool = False) -> Coverage:
    """The report on one model."""
    example = entry.build()
    made = coverage(example.model, example.inputs, composite=composite, allow_training=example.random, name=entry.name)
    made = replace(made, title=entry.title, published=entry.published)
    if not verify:
        return made
    from dynlrp.zoo.target import weighted_sum

    small = example if entry.small is None else entry.small()
    found = verification(small.model, small.inputs, weighted_sum, composite=composite, allow_training=small.random)
    return replace(made, verification=found)


def _paper() -> Iterator[Entry]:
    with needs("transformers"):
        from dynlrp.zoo import paper
    yield from paper.entries()


def _families() -> Iterator[Entry]:
    from dynlrp.zoo import families

    for name in families.model_types():
        yield Entry(f"family/{name}", _later(families.build, name))


def _timm() -> Iterator[Entry]:
    if find_spec("timm") is not None:
        from dynlrp.zoo import image_models

        for name in image_models.modules():
            yield Entry(f"timm/{name}", _later(image_models.smallest, name))


def _later(build: Callable[[str], Example], name: str) -> Callable[[], Example]:
    return lambda: build(name)


def _unknown(model: str, known: list[str]) -> str:
    bare = {name.partition("/")[2]: name for name in reversed(known)}
    path = model.startswith((".", "/", "~"))
    near = [] if path else [bare.get(name, name) for name in get_close_matches(model, [*bare, *known], 6, 0.5)]
    suggestion = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    return (
        f"no model is called {model!r}: {suggestion}A model is a name that `dynlrp zoo` lists, a folder with a "
        f"config.json, or package.module:attribute."
    )

"""The inputs of a model: copies that it may change, what is asked about them, and answers in their structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dynlrp.errors import InputError, kind, told
from dynlrp.graph import Node
from dynlrp.run import Run


class Inputs:
    """The inputs of one forward pass; ``attached`` ones stay part of the graph that they come from."""

    def __init__(self, inputs: Any, attached: bool) -> None:
        self._leaves, self._spec = pytree.tree_flatten(as_dicts(inputs))
        if not any(isinstance(leaf, Tensor) for leaf in self._leaves):
            kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in self._leaves))
            raise InputError(
                f"the inputs hold no tensor{kinds and ', but ' + kinds}: give arrays and lists as torch.as_tensor(x), "
                f"and of text what its tokenizer returns with return_tensors='pt'"
            )
        self._attached = attached
        self._copies = [_copy(leaf, attached) for leaf in self._leaves]
        # Before the model can change them in place.
        self._entries = [_entry(copy) for copy in self._copies]

    def arguments(self) -> Any:
        """What the model is called with."""
        return pytree.tree_unflatten(self._copies, self._spec)

    def sizes(self) -> set[int]:
        """What may be the size of the batch."""
        return {leaf.shape[0] for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.ndim}

    def want(self, run: Run) -> None:
        """Ask for the relevance of every input that can have some."""
        places: list[int | None] = [None] * len(self._leaves)
        ids: dict[int, Tensor] = {}
        for place, (leaf, copy, entry) in enumerate(zip(self._leaves, self._copies, self._entries, strict=True)):
            if entry is not None:
                places[place] = run.want(*entry, leaf if self._attached else leaf.detach())
            elif _holds_ids(copy):
                ids[place] = copy
        for place, number in zip(ids, run.want_rows(list(ids.values())), strict=True):
            places[place] = number
        run.rebuild = Rebuild(places, self._spec)


@dataclass(frozen=True)
class Rebuild:
    """Results in the structure of the inputs; ``places`` are their numbers, None for inputs without."""

    places: Sequence[int | None]
    spec: Any

    def __call__(self, found: Sequence[Tensor | None]) -> Any:
        return pytree.tree_unflatten([None if n is None else found[n] for n in self.places], self.spec)


def as_dicts(inputs: Any) -> Any:
    """Mappings of any kind as dicts."""
    if isinstance(inputs, Mapping):
        return {key: as_dicts(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(as_dicts(value) for value in inputs)
    return inputs


def call(model: Any, arguments: Any) -> Any:
    """Run a model on a tensor, on positional or on keyword arguments."""
    with told(lambda: f"The model was called with {described(arguments)}."):
        if isinstance(arguments, dict):
            return model(**arguments)
        if isinstance(arguments, tuple | list):
            return model(*arguments)
        return model(arguments)


def described(arguments: Any) -> str:
    if isinstance(arguments, dict):
        return "keyword arguments: " + ", ".join(f"{name}, {kind(value)}" for name, value in arguments.items())
    if isinstance(arguments, tuple | list):
        return (
            f"{len(arguments)} positional argument(s): {', '.join(map(kind, arguments))} (that is what a tuple or list "
            f"holds; torch.stack makes a batch of samples)"
        )
    return kind(arguments)


def _copy(leaf: Any, attached: bool) -> Any:
    """A copy of an input that the model may do with as it likes; floating point copies are in the graph, and if
    ``attached`` in that of the input."""
    if not isinstance(leaf, Tensor):
        return leaf
    if attached and leaf.requires_grad:
        return leaf.clone()
    if leaf.is_floating_point() or leaf.is_complex():
        leaf = leaf.clone() if leaf.is_inference() else leaf.detach()
        return leaf.requires_grad_().clone()
    return leaf.detach().clone(memory_format=torch.contiguous_format)


def _entry(copy: Any) -> tuple[Node, int] | None:
    """Node and output number of a floating point input."""
    if not isinstance(copy, Tensor) or not copy.requires_grad:
        return None
    node, number = get_gradient_edge(copy)[:2]
    return node, number


def _holds_ids(copy: Any) -> bool:
    return isinstance(copy, Tensor) and not copy.is_floating_point() and copy.dtype != torch.bool

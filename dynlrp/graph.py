"""The recorded operations between an output and its sources, as plain indices that a plan can be made and kept for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlrp.errors import NotDifferentiableError
from dynlrp.rules.operation import REGISTRY, Grads, follow
from dynlrp.twice import cuts

Node = Any
"""An autograd node (``torch.autograd.graph.Node`` or a node of a custom function)."""

Children = tuple[tuple[Node | None, int], ...]
"""A node's ``next_functions``."""

LEAF = "torch::autograd::AccumulateGrad"
FREED = "after they have already been freed"
"""What torch says of saved tensors that are gone."""
CHANGED = "modified by an inplace operation"
"""What it says of those that were changed."""
next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""The number that the operation gets that this thread records next."""
hooks_around: Callable[[], Any] = partial(torch._C._autograd._top_saved_tensors_default_hooks, False)
"""The innermost saved-tensor hooks that are set, if any."""
DEEP = 10_000
"""Nodes of a graph that may be freed by recursion."""


class Trait(NamedTuple):
    """What a tensor is as the factor of a product, seen through constant multiples."""

    gate: bool = False
    """A sigmoid, silu, gelu or tanh, maybe with a constant added."""
    nonnegative: bool = False
    """That function is never negative."""
    weights: bool = False
    """Rows of a softmax or a sum of such, maybe with a constant added."""
    routed: bool = False
    """Such entries or gates, chosen or divided by their own sum."""
    decay: bool = False
    """An exponential."""
    summed: bool = False
    """An exponential of running sums or of their differences."""


NO_TRAIT = Trait()


class Edge(NamedTuple):
    """A tensor of the graph: output ``output`` of node ``node``; below 0, ``~output`` is the number of an operand that
    autograd did not record, as it is a constant."""

    node: int
    output: int


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What a graph looks like without its tensors; one object for all graphs that look alike. Nodes are numbered so
    that operands come before their consumers."""

    names: tuple[str, ...]
    operands: tuple[tuple[Edge | None, ...], ...]
    order: tuple[int, ...]
    """For every node, its place in the order in which nodes are found from the root."""
    places: tuple[int, ...]
    """The other way round: the number of every node found."""
    telling: tuple[tuple[int, Callable[[Any], Hashable]], ...]
    """Nodes that tell more of themselves than their name."""
    lookups: tuple[int, ...]
    """Nodes that look up rows of a table."""
    selections: tuple[int, ...]
    """Nodes that choose entries by indices."""


@dataclass(frozen=True)
class Structure:
    """Everything a plan depends on, hashable."""

    skeleton: Skeleton
    facts: tuple[Hashable, ...]
    """What some operations tell of themselves beyond their name (the bounds of a clamp, say)."""
    root: Edge
    sources: tuple[Edge, ...]
    kept: tuple[Edge, ...] = ()
    """Edges on the way at which somebody wants to know what arrived."""
    seeded: bool = False
    """The root is given relevance instead of a multiplier."""
    observed: tuple[int, ...] = ()
    """Nodes whose relevance is asked for although they are weights, or made of weights alone."""
    coefficients: tuple[int, ...] = ()
    """Leaf nodes that stand for coefficients of a larger graph."""
    traits: tuple[tuple[int, Trait], ...] = ()
    """Leaf nodes that stand for gates, attention weights or decays of a larger graph, and what they are."""
    modules: tuple[tuple[str, ...], ...] | None = None
    """Paths of the modules that every node ran in, innermost last; only where the composite selects by path."""
    first: bool = True
    """No linear operation lies between this graph and the inputs (False inside an operation that is re-run)."""
    last: bool = True
    """None lies between it and the output."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.skeleton.names

    @property
    def operands(self) -> tuple[tuple[Edge | None, ...], ...]:
        return self.skeleton.operands


class Graph:
    """The live autograd nodes behind a :class:`Skeleton`, in its order."""

    steps: Sequence[Any] = ()
    """Nodes that stand for calls of modules."""

    def __init__(
        self,
        root: Node,
        children: Mapping[Node, Children] | None = None,
        ends: Mapping[Node, Tensor] | None = None,
    ) -> None:
        """``children`` stand in for the nodes' own ``next_functions``. ``ends`` are nodes at which the graph stops, as
        if the tensors that they made were leaves."""
        found = [root]
        self._index: dict[Node, int] = {root: 0}
        index, links = self._index, []
        for node in found:  # which grows
            if ends is not None and node in ends:
                found[index[node]] = End(node, ends[node])
                links.append(END)
                continue
            for child, output in node.next_functions if children is None else children[node]:
                if child is None:
                    links.append(NOTHING)
                    continue
                place = index.get(child)
                if place is None:
                    place = index[child] = len(found)
                    found.append(child)
                links.append(place)
                links.append(output)
            links.append(END)
        names = tuple([node.name() for node in found])
        self.skeleton = _skeleton(names, tuple(links), REGISTRY.version)
        self.nodes: list[Node] = [found[place] for place in self.skeleton.order]
        self.names, self.operands = self.skeleton.names, self.skeleton.operands

    def edge(self, node: Node, output: int) -> Edge | None:
        """The edge of a tensor's ``(grad_fn, output_nr)``, None where it is not part of the graph."""
        place = self._index.get(node)
        return None if place is None else Edge(self.skeleton.places[place], output)

    def recorded(self) -> Iterable[Node]:
        """The nodes that autograd recorded."""
        return self.nodes

    def values(self) -> dict[Edge, tuple[Tensor, int]]:
        """Values of tensors that are known with the graph, and their versions."""
        return {}

    def forget(self) -> None:
        """Let nodes go as soon as nobody else holds them; no more edges can be asked for."""
        self._index.clear()

    def outlast(self, root: Node) -> None:
        """Let nodes go one after the other when their ``root`` does, in a deep graph that stays in other hands.

        Once Python has seen a node, PyTorch frees it with what it uses by recursion (in 2.13), which overruns the
        stack in chains of some 50,000.
        """
        if len(self.nodes) > DEEP:
            root.metadata["dynlrp"] = [node for node in self.recorded() if node is not root]  # freed from its end

    def structure(self, root: Edge, sources: Iterable[Edge], **wanted: Any) -> Structure:
        """The hashable description of this graph for an explanation of ``root`` by ``sources``; for ``wanted``, see
        the fields of :class:`Structure`."""
        facts = tuple([read(self.nodes[index]) for index, read in self.skeleton.telling])
        return Structure(self.skeleton, facts, root, tuple(sources), **wanted)


@dataclass(frozen=True, eq=False)
class End:
    """Stands for a node at which a graph stops; it looks like that of a leaf."""

    node: Node
    variable: Tensor
    next_functions: tuple[()] = ()

    def name(self) -> str:
        return LEAF

    @property
    def _input_metadata(self) -> Any:
        return self.node._input_metadata

    def _sequence_nr(self) -> int:
        number: int = self.node._sequence_nr()
        return number


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def _keeps_node() -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = _Same.apply(torch.ones((), device="cpu", requires_grad=True)).grad_fn  # type: ignore[no-untyped-call]
    try:
        return bool(node._sequence_nr() >= 0)
    except RuntimeError:
        return False


KEEPS_NODE = _keeps_node()
"""Whether what Python has of a custom function's node keeps the node, as from PyTorch 2.13 on. Before, a node was gone
with the tensor that it made and the nodes that use it."""


def saved(node: Node, name: str | int) -> Any:
    """What a node saved: an attribute of its own; of a custom function, an entry of ``ctx.saved_tensors`` by number or
    an attribute of ``ctx``."""
    if isinstance(name, int):
        return node.saved_tensors[name]
    if isinstance(node, torch._C._FunctionBase):
        return getattr(node, name)
    value = getattr(node, "_saved_" + name)
    if torch.is_grad_enabled() and isinstance(value, Tensor):
        operation = REGISTRY.get(node.name())
        if operation is not None and name in operation.statistics:
            return follow(value, operation.statistics[name](Operands(node), value))
    return value


@dataclass
class Operands:
    """The view of a node that functions of an operation get outside a pass."""

    node: Node
    wide: Any = None
    """What reads in another precision (:class:`~dynlrp.precision.Wide`)."""

    def saved(self, name: str | int) -> Any:
        return saved(self.node, name) if self.wide is None else self.wide.saved(self.node, name)


def vjp(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    """Call a node. A node of a ``torch.autograd.Function`` is given zeros where nothing arrives, as autograd does, and
    answers for every argument of its forward, tensor or not."""
    if not isinstance(node, torch._C._FunctionBase):
        result = node(*grads)
        return result if isinstance(result, tuple) else (result,)
    filled = [
        torch.zeros(made.shape, dtype=made.dtype, device=made.device) if g is None else g
        for g, made in zip(grads, node._input_metadata, strict=True)  # type: ignore[attr-defined]
    ]
    result = node.apply(*filled)  # type: ignore[attr-defined]
    result = result if isinstance(result, tuple) else (result,)
    if torch.is_grad_enabled() and cuts(filled, result):
        raise NotDifferentiableError(
            f"relevance cannot be differentiated through {type(node).__name__}: its backward pass leaves autograd. "
            "Write it in differentiable operations of tensors, without numpy, detach and no_grad."
        )
    needed = iter([value for value, needs in zip(result, node.needs_input_grad, strict=False) if needs])
    return [None if child is None else next(needed, None) for child, _ in node.next_functions]


def fit(value: Tensor, expected: Any, dtype: torch.dtype) -> Tensor:
    """Bring what a node returned to the operand's shape and a dtype, as autograd's engine would."""
    if not expected.is_nested_tensor and list(value.shape) != expected.shape:
        value = sum_to(value.values().unsqueeze(0) if value.is_nested else value, expected.shape)
    if value.dtype is not dtype:
        value = (value.real if value.is_complex() and not dtype.is_complex else value).to(dtype)
    return value


def sum_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor summed to a shape that it was broadcast from. In half precision rows are summed by a product with ones:
    it adds up in float32 and takes a GPU a third of the time. In float32 it would lose digits that a sum keeps."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    if half and value.ndim > len(shape) == 1 and value.shape[-1] == shape[0] and value.is_contiguous():
        rows = value.flatten(0, -2)
        return (rows.new_ones(1, len(rows)) @ rows)[0]
    return value.sum_to_size(tuple(shape))


NOTHING, END = -1, -2
"""In the flat description of a graph: an operand that was not recorded, and the end of a node's operands."""


# Skeletons hold no tensors and their keys are complete, so calls from anywhere may share them.
@lru_cache(maxsize=64)
def _skeleton(names: tuple[str, ...], links: tuple[int, ...], version: int) -> Skeleton:
    """The skeleton of a graph whose nodes, in the order in which they are found, have ``names`` and, as operands,
    ``links``: pairs of node and output. ``version`` is the registry's."""
    operands: list[list[tuple[int, int] | None]] = [[]]
    rest = iter(links)
    for place in rest:
        if place == END:
            operands.append([])
        else:
            operands[-1].append(None if place == NOTHING else (place, next(rest)))
    places = [-1] * len(names)
    order: list[int] = []
    opened: set[int] = set()
    stack = [0]
    while stack:
        place = stack[-1]
        if places[place] < 0 and place not in opened:
            opened.add(place)
            waiting = [link[0] for link in operands[place] if link is not None and places[link[0]] < 0]
            if waiting:
                stack.extend(waiting)
                continue
        stack.pop()
        if places[place] < 0:
            places[place] = len(order)
            order.append(place)
    ordered = tuple([names[place] for place in order])
    known = [(index, REGISTRY[name]) for index, name in enumerate(ordered) if name in REGISTRY]
    return Skeleton(
        ordered,
        tuple(
            tuple([None if link is None else Edge(places[link[0]], link[1]) for link in operands[place]])
            for place in order
        ),
        tuple(order),
        tuple(places),
        tuple([(index, operation.facts) for index, operation in known if operation.facts is not None]),
        tuple([index for index, operation in known if operation.lookup]),
        tuple([index for index, operation in known if operation.selects is not None]),
    )

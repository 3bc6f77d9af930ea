"""One forward pass under observation: which module every operation ran in, and the outputs of requested layers."""

from __future__ import annotations

import operator
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree

from dynlrp.composite import Composite, When, innermost
from dynlrp.errors import InputError
from dynlrp.graph import next_number
from dynlrp.names import matching
from dynlrp.places import ATTENTION, parse

functorch: Any = torch._C._functorch


@dataclass(frozen=True)
class Tensors:
    """The tensors that went into or came out of a module, in order: node and number of each (None where it has no
    graph), value and the version of that value."""

    edges: tuple[tuple[Any, int] | None, ...]
    values: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tree: Any, attached: bool) -> Tensors:
        """Of all tensors in nested containers; ``attached`` ones stay part of the graph."""
        tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        return cls(
            tuple(get_gradient_edge(tensor)[:2] if tensor.requires_grad else None for tensor in tensors),
            tuple(tensor if attached else tensor.detach() for tensor in tensors),
            tuple(tensor._version for tensor in tensors),
        )


@dataclass(frozen=True)
class Call:
    """One call of a module that is explained as one step, with the sequence numbers of what it recorded."""

    module: nn.Module
    modules: tuple[str, ...]
    """Paths of the modules that were running, the called one last."""
    start: int
    stop: int
    inputs: Tensors
    outputs: Tensors


class Frame(NamedTuple):
    """A running module, the one that called it, and the sequence number when it began."""

    module: nn.Module
    caller: Frame | None
    start: int


class Kept(NamedTuple):
    """A tensor of the graph, by its node and number there."""

    node: Any
    number: int
    value: Tensor
    version: int
    """That of the value when it was kept."""
    order: tuple[int, ...]
    """The value's dimensions, those of ``vmap`` first."""
    base: tuple[Any, int] | None
    """Node and number of the tensor that it is a view of."""

    @classmethod
    def of(cls, name: str, given: Tensor, attached: bool) -> Kept | None:
        """None where it is no part of the graph."""
        tensor, batched = unwrapped(given)
        if not tensor.is_floating_point() or not tensor.requires_grad:
            return None
        if functorch.is_functorch_wrapped_tensor(tensor):
            raise InputError(
                f"{name!r} is a tensor inside a derivative (torch.func.grad, jvp and the like), which no relevance "
                f"passes: ask for layers outside of it"
            )
        order = list(range(tensor.ndim))
        order = [order.pop(axis) for axis, _ in reversed(batched)] + order
        base = tensor._base
        return cls(
            *get_gradient_edge(tensor)[:2],
            tensor if attached else tensor.detach(),
            tensor._version,
            tuple(order),
            None if base is None or not base.requires_grad else get_gradient_edge(base)[:2],
        )


def unwrapped(tensor: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """A tensor without what ``vmap`` puts around it: its axis and level, the innermost ``vmap`` first."""
    batched = []
    while functorch.is_batchedtensor(tensor):
        batched.append((functorch.maybe_get_bdim(tensor), functorch.maybe_get_level(tensor)))
        tensor = functorch.get_unwrapped(tensor)
    return tensor, batched


class _Open(NamedTuple):
    """A call on its way: see :class:`Call`."""

    frame: Frame | None
    modules: tuple[str, ...]
    start: int
    inputs: Tensors


class Shared(NamedTuple):
    """What stands for the output of a module, and the tensor in whose memory it is: one that the module was given, or
    that the output is a view of."""

    name: str
    given: Tensor
    output: Tensor
    edges: tuple[tuple[Any, int], tuple[Any, int]]
    """Node and number of both when the module returned."""


class Recording:
    """What one forward pass left behind."""

    def __init__(self, model: Any, layers: Sequence[str], composite: Composite, attached: bool = False) -> None:
        """``attached``: what is kept stays part of the graph."""
        self._model = model
        self.start = 0
        """Sequence number when the forward pass began."""
        self._composite = composite
        self._attached = attached
        self._running: Frame | None = None
        self._events: list[tuple[int, Frame | None]] = []
        """Sequence number and what ran from there on, at every entry and exit of a module."""
        self._asked = frozenset(layers)
        self._outputs = self._select(layers, "output")
        self._inputs = self._select(layers, "input")
        self._names: dict[int, str] | None = None
        self._open: _Open | None = None
        """The module that runs as one step."""
        self._depth = 0
        """Modules that run inside it."""
        self._calls: list[Call] = []
        self.matched: set[When] = set()
        """Entries of the composite for whole modules that met one."""
        self.outputs: dict[str, list[list[Kept]]] = {}
        """Per requested tensor and call: the tensor, and behind it those that came with it."""
        self.shared: list[Shared] = []

    def names(self) -> dict[int, str]:
        """Module path by ``id``."""
        if self._names is None:
            modules = self._model.named_modules() if isinstance(self._model, nn.Module) else ()
            self._names = {id(module): name for name, module in modules}
        return self._names

    def modules(self, sequence: int) -> tuple[str, ...]:
        """Paths of the modules that were running when the operation with this number was recorded, innermost last."""
        position = bisect_right(self._events, sequence, key=lambda event: event[0])
        return self._paths(self._events[position - 1][1]) if position else ()

    def path(self, sequence: int) -> str:
        """Path of the innermost of them."""
        return innermost(self.modules(sequence))

    def take_calls(self) -> list[Call]:
        """Calls of modules that are one step each; given away, as they hold the graph."""
        calls, self._calls = self._calls, []
        return calls

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the modules that this thread runs."""
        thread, events, wanted = threading.get_ident(), self._events, self._outputs
        self.start = next_number()
        buried: list[tuple[str, str]] = []

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() != thread:
                return
            if self._open is not None:
                self._depth += 1
                return
            self._running = Frame(module, self._running, next_number())
            events.append((next_number(), self._running))

        def leave(module: nn.Module, _: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            _, names = wanted.get(id(module), (module, ()))
            if self._open is not None and self._depth:
                self._depth -= 1
                buried.extend((name, self._open.modules[-1]) for name in names)
                return None
            frame, returned = self._running, output
            if names and frame is not None:
                output = self._owned(output, frame.start, names[0])
            self._running = None if frame is None else frame.caller
            events.append((next_number(), self._running))
            for name in names:
                self._keep(name, output)
            return None if output is returned else output

        def given(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != thread:
                return
            for name in self._inputs[id(module)][1]:
                if self._open is not None and self._depth:
                    buried.append((name, self._open.modules[-1]))
                else:
                    self._keep(name, (args, kwargs))

        with ExitStack() as stack:
            stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
            stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
            if self._composite.modules:
                self._watch_steps(stack, thread)
            for module, _ in self._inputs.values():  # hooks for all modules are not told of keyword arguments
                stack.callback(module.register_forward_pre_hook(given, with_kwargs=True).remove)
            yield
        for layer, path in buried:
            raise InputError(
                f"layer {layer!r} runs inside {path!r}, which the composite explains as one step: ask for the "
                f"relevance of that one"
            )

    def _watch_steps(self, stack: ExitStack, thread: int) -> None:
        """Follow the modules that entries of the composite may take as one step, behind all other hooks."""
        if not isinstance(self._model, nn.Module):
            raise InputError(f"composite {self._composite.name!r} selects modules, which needs an nn.Module")

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != thread or self._open is not None:
                return
            paths = self._paths(self._running)
            _, rule = self._composite.scope(paths, self.matched)
            if rule is not None:
                inputs = Tensors.of((args, kwargs), self._attached)  # which may record views anew, outside of the step
                self._open = _Open(self._running, paths, next_number(), inputs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            opened = self._open
            if threading.get_ident() != thread or opened is None or self._running is opened.frame:
                return
            self._open = None
            outputs = Tensors.of(output, self._attached)
            self._calls.append(Call(module, opened.modules, opened.start, next_number(), opened.inputs, outputs))

        for module, name in [(module, name) for name, module in self._model.named_modules()]:
            if any(when.module is not None and fnmatchcase(name, when.module) for when in self._composite.modules):
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _paths(self, frame: Frame | None) -> tuple[str, ...]:
        names, paths = self.names(), []
        while frame is not None:
            paths.append(names.get(id(frame.module), type(frame.module).__name__))
            frame = frame.caller
        return tuple(reversed(paths))

    def requested(self) -> list[str]:
        """Names of the requested tensors, whether their modules ran or not."""
        return [name for wanted in (self._outputs, self._inputs) for _, names in wanted.values() for name in names]

    def _select(self, layers: Sequence[str], kind: str) -> dict[int, tuple[nn.Module, list[str]]]:
        """Modules of which a kind of tensor is requested, by ``id``, and its names; a shared one may have several."""
        wanted: dict[int, tuple[nn.Module, list[str]]] = {}
        if layers and not isinstance(self._model, nn.Module):
            raise InputError("layers= needs an nn.Module")
        for whole in layers:
            pattern, of = parse(whole)
            if of.startswith("input") != (kind == "input") or of in ATTENTION:
                continue
            everything = dict(self._model.named_modules(remove_duplicate=False))
            for found in matching(pattern, everything, "module"):
                module, name = everything[found], found if of == "output" else f"{found}:{of}"
                names = wanted.setdefault(id(module), (module, []))[1]
                if name not in names:
                    names.append(name)
        return wanted

    def _keep(self, name: str, given: Any) -> None:
        tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
        number = parse(name)[1].rpartition(":")[2]
        if number.isdecimal():
            if int(number) >= len(tensors):
                if name not in self._asked:  # found by a glob
                    return
                raise InputError(f"there is no {name!r}: the module has {len(tensors)} such tensors")
            tensors = [tensors[int(number)]]
        kept = [found for found in (Kept.of(name, tensor, self._attached) for tensor in tensors) if found is not None]
        if kept:
            self.outputs.setdefault(name, []).append(kept)

    def _owned(self, output: Any, start: int, name: str) -> Any:
        """What a module returned, with tensors of its own in place of those that something before ``start`` made (what
        uses them elsewhere does not use the module's output) and of views (which leave the graph once they are
        changed in place)."""
        leaves, spec = pytree.tree_flatten(output)
        owned = list(leaves)
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            owned[place] = own(leaf, start)
            if owned[place] is leaf:
                continue
            given, made = unwrapped(leaf)[0], unwrapped(owned[place])[0]
            given = given if given._base is None or not given._base.requires_grad else given._base
            self.shared.append(Shared(name, given, made, (get_gradient_edge(given)[:2], get_gradient_edge(made)[:2])))
        return output if all(map(operator.is_, owned, leaves)) else pytree.tree_unflatten(owned, spec)


def own(output: Tensor, start: int = -1) -> Tensor:
    """The output of a module that began at ``start``, as a tensor of its own: one whose node the module made, and that
    keeps it when it is changed in place."""
    tensor, _ = unwrapped(output)
    if not tensor.requires_grad:
        return output
    if tensor.grad_fn is None:
        alias: Tensor = torch.ops.aten.alias(output)  # a view, as nobody may write into a leaf
        return alias
    return module_output(output) if tensor._is_view() or tensor.grad_fn._sequence_nr() < start else output


class ModuleOutput(torch.autograd.Function):
    """The same numbers in the same memory, as another tensor of the graph; no view, so that a write in place into it
    is recorded as into any tensor."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def vmap(info: Any, axes: Any, x: Tensor) -> Any:
        return module_output(x), axes[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


module_output: Callable[[Tensor], Tensor] = ModuleOutput.apply

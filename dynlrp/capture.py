"""One forward pass under observation: which module every operation ran in, and the outputs of requested layers."""

from __future__ import annotations

import operator
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dynlrp.catalogue import operand_names
from dynlrp.composite import Composite, When, innermost
from dynlrp.errors import InputError
from dynlrp.names import matching
from dynlrp.places import ATTENTION, parse

functorch: Any = torch._C._functorch

CHECKPOINT = "torch.utils.checkpoint"
"""Where the saved-tensor hooks of checkpoints are from."""

_saving: Callable[[], Any] = partial(torch._C._autograd._top_saved_tensors_default_hooks, False)
"""The saved-tensor hooks that are set."""
_sequence: Callable[[], int] = torch._C._autograd._get_sequence_nr


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
        self.start = _sequence()
        buried: list[tuple[str, str]] = []

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() != thread:
                return
            if self._open is not None:
                self._depth += 1
                return
            self._running = Frame(module, self._running, _sequence())
            events.append((_sequence(), self._running))

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
            events.append((_sequence(), self._running))
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
                self._open = _Open(self._running, paths, _sequence(), inputs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            opened = self._open
            if threading.get_ident() != thread or opened is None or self._running is opened.frame:
                return
            self._open = None
            outputs = Tensors.of(output, self._attached)
            self._calls.append(Call(module, opened.modules, opened.start, _sequence(), opened.inputs, outputs))

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


CONVOLUTIONS = frozenset(
    {
        nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d, nn.functional.conv_transpose1d,
        nn.functional.conv_transpose2d, nn.functional.conv_transpose3d,
    }
)  # fmt: skip
PRODUCTS = CONVOLUTIONS | {
    nn.functional.linear, torch.addmm, Tensor.addmm, torch.addmv, torch.baddbmm, torch.matmul, Tensor.matmul,
    Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.einsum, torch.mul,
    Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
}  # fmt: skip
"""Functions that multiply their arguments, but for those in :data:`SUMMANDS`."""
SUMMANDS: Mapping[Any, tuple[int | str, ...]] = {
    **dict.fromkeys((*CONVOLUTIONS, nn.functional.linear), (2, "bias")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.addmv, torch.baddbmm), (0, "input")),
    **dict.fromkeys(
        (
            torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, torch.sub, Tensor.sub,
            Tensor.__sub__, Tensor.__rsub__, torch.cat, torch.stack,
        ),
        (0, 1, "other", "tensors"),
    ),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), (0,)),  # what is written to
    # What these save does not depend on it.
    **dict.fromkeys((nn.functional.layer_norm, nn.functional.group_norm), (2, 3, "weight", "bias")),
    **dict.fromkeys((nn.functional.batch_norm, nn.functional.instance_norm), (3, 4, "weight", "bias")),
    nn.functional.embedding: (1, "weight"),
}  # fmt: skip
"""Arguments that may require grad without that autograd saves more for it."""


class Aliases(TorchFunctionMode):
    """Lets frozen parameters take part in the graph through stand-ins that share their memory.

    Biases, embeddings and class tokens must be seen to be booked and explained, whatever ``requires_grad`` says, and
    the parameters themselves are not touched. What a signal is multiplied by stays frozen, so that autograd need not
    save the signal, unless the parameter's own relevance is wanted.

    A checkpoint runs its block again for whoever needs what it saved, and must then save as much. Where a graph is
    ``attached``, that is the caller's own ``backward()``, which knows no stand-ins: there they are summands alone, for
    which autograd saves nothing.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], wanted: Mapping[str, nn.Parameter], attached: bool = False
    ) -> None:
        super().__init__()
        self._stand_ins = {id(p): p.detach().requires_grad_() for p in parameters}
        self._wanted = {id(p): name for name, p in wanted.items()}
        self._views = {id(value) for number, value in self._stand_ins.items() if number not in self._wanted}
        self._attached = attached
        self._hooks: Any = None
        self.reruns = False
        """Saved-tensor hooks were set inside: they may run parts of the model again, which needs the stand-ins too."""

    def __enter__(self) -> Aliases:
        self._hooks = _saving()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def stand_in(self, parameter: nn.Parameter) -> Tensor:
        """What takes part in the graph for a parameter."""
        return self._stand_ins.get(id(parameter), parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hooks = _saving()
        if hooks != self._hooks:
            self.reruns = True
        if not self._meets(func, args) and not self._meets(func, kwargs.values()):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("__get__", "__set__") or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        summands = SUMMANDS.get(func, ())
        multiplies = func in PRODUCTS
        checkpointed = self._attached and hooks is not None and hooks[0].__module__ == CHECKPOINT

        def stand_in(place: int | str, value: Any) -> Any:
            number = id(value)
            if number not in self._stand_ins:
                if not multiplies or place in summands or not self._is_view(value) or not self._signal(args, kwargs):
                    return value
                return value.detach()
            if place not in summands:
                if number in self._wanted:
                    if checkpointed:
                        raise InputError(
                            f"parameter {self._wanted[number]!r} is frozen and used inside a checkpoint, which your "
                            f"backward() runs again: with create_graph=True it has no relevance of its own. Let it "
                            f"require grad, leave it out of parameters=, or switch checkpointing off "
                            f"(model.gradient_checkpointing_disable())."
                        )
                elif checkpointed or (multiplies and self._signal(args, kwargs)):
                    return value
            return self._stand_ins[number]

        def swap(place: int | str, value: Any) -> Any:
            if isinstance(value, tuple | list) and self._meets(func, value):
                return type(value)(stand_in(place, v) for v in value)
            return stand_in(place, value)

        args, kwargs = tuple(swap(i, a) for i, a in enumerate(args)), {k: swap(k, v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _meets(self, func: Any, values: Iterable[Any]) -> bool:
        """Whether something has to be replaced."""
        stand_ins, multiplies = self._stand_ins, func in PRODUCTS
        for value in values:
            if id(value) in stand_ins or (multiplies and self._is_view(value)):
                return True
            if isinstance(value, tuple | list) and self._meets(func, value):
                return True
        return False

    def _is_view(self, value: Any) -> bool:
        """Whether it is a view of an unwanted parameter's stand-in."""
        return isinstance(value, Tensor) and id(value._base) in self._views

    def _signal(self, args: Any, kwargs: Any) -> bool:
        """Whether arguments hold more than parameters."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if value.requires_grad and not self._is_view(value):
                    return True
            elif isinstance(value, tuple | list) and self._signal(value, {}):
                return True
        return False


class Everything:
    """Contains whatever is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


EVERYTHING = Everything()
Wanted = Everything | Set[tuple[int, int]]
"""Tensors, by the number of their node since the recording began, and the number of the output."""


class Recorder(TorchFunctionMode):
    """Keeps a copy of the ``wanted`` tensors of the graph, for promises that nobody else can keep.

    What a function makes is seen where it is called or used, and the steps inside it below autograd, where the node
    of each has just been numbered.
    """

    def __init__(self, wanted: Wanted = EVERYTHING) -> None:
        super().__init__()
        self._wanted, self._start = wanted, _sequence()
        self._inner = _Inner(wanted, self._start)
        self._kept: dict[tuple[Any, int], Tensor] = {}

    def __enter__(self) -> Recorder:
        self._inner.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._inner.__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__set__":  # custom functions call it while they hold the lock of a view
            return func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs)):  # what custom functions made is seen where it is used
            self._keep(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            self._keep(tensor)
        return result

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor._base is not None:  # a write into a view changes its base
            self._keep(tensor._base)
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            key = (tensor.grad_fn, tensor.output_nr)
            place = (tensor.grad_fn._sequence_nr() - self._start, tensor.output_nr)
            if place in self._wanted and key not in self._kept and self._inner.find(*key) is None:
                self._kept[key] = tensor.detach().clone()
                self._inner.drop(tensor.grad_fn)

    def values(self, nodes: Iterable[Any]) -> Iterator[tuple[Any, int, Tensor]]:
        """Node, output number and value, in the order of the nodes; for an operand that is a constant, ``~`` its
        number."""
        for node in nodes:
            for number in range(len(node._input_metadata)):
                value = self._kept.get((node, number), self._inner.find(node, number))
                if value is not None:
                    yield node, number, value
            for position, (child, _) in enumerate(node.next_functions):
                value = self._inner.constant(node, position) if child is None else None
                if value is not None:
                    yield node, ~position, value


class _Inner(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations make by the number of the node that autograd recorded before it ran them."""

    def __init__(self, wanted: Wanted, start: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted, self._start = wanted, start
        self._made: dict[int, tuple[str, list[Any]]] = {}
        self._given: dict[int, list[tuple[str, dict[str, tuple[Tensor, int]]]]] = {}
        """By number, operations and their arguments that do not require grad, with their versions."""
        self._constants: set[int] | None = None if isinstance(wanted, Everything) else {n for n, o in wanted if o < 0}
        """Numbers of nodes whose arguments are wanted, None for all."""
        self._written: dict[int, Tensor] = {}
        """What a tensor held after a write into a view of it, by the number of the node that stands for the write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = _sequence() - 1
        result = func(*args, **(kwargs or {}))
        base = args[0]._base if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
        if base is not None and (number + 1 - self._start, 0) in self._wanted:  # the write's own node comes first
            self._written[number + 1] = base.detach().clone()
        if number >= self._start and number not in self._made:  # later ones with this number have no node
            made = [
                t.detach().clone() if isinstance(t, Tensor) and (number - self._start, output) in self._wanted else None
                for output, t in enumerate(pytree.tree_leaves(result))
            ]
            self._made[number] = (_bare(func.__name__.partition(".")[0]), made)
        if number >= self._start and (self._constants is None or number - self._start in self._constants):
            named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
            constants = {
                name: (value, value._version)
                for name, value in [*named, *(kwargs or {}).items()]
                if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
            }
            if constants:
                self._given.setdefault(number, []).append((_bare(func.__name__.partition(".")[0]), constants))
        return result

    def drop(self, node: Any) -> None:
        """Let go of what ran inside a custom function: it is no result of the function's node."""
        number = node._sequence_nr()
        if not self._made_by(node):
            self._made[number] = ("", [])

    def constant(self, node: Any, position: int) -> Tensor | None:
        names = operand_names(node.name())
        for name, given in self._given.get(node._sequence_nr(), ()):
            if position < len(names) and names[position] in given and _ran(name, node):
                value, version = given[names[position]]
                return value if value._version == version else None
        return None

    def find(self, node: Any, number: int) -> Tensor | None:
        made = self._made_by(node)
        if number >= len(made):
            return None
        value, expected = made[number], node._input_metadata[number]
        if value is None or value.dtype is not expected.dtype or value.is_nested != expected.is_nested_tensor:
            return None
        return value if value.is_nested or list(value.shape) == expected.shape else None

    def _made_by(self, node: Any) -> Sequence[Any]:
        if node.name() == "torch::autograd::CopySlices":
            return [self._written.get(node._sequence_nr())]
        name, made = self._made.get(node._sequence_nr(), ("", []))
        return made if name and _ran(name, node) else []


def _ran(name: str, node: Any) -> bool:
    """Whether an operation of this name is a node's."""
    return _bare(node.name()).startswith(name + "backward")


def _bare(name: str) -> str:
    return name.replace("_", "").lower()

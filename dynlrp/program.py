"""An explanation as a straight line of tensor operations, for many inputs of one shape.

The forward pass and the way of relevance are traced once into one ``torch.fx`` graph, without a graph walk, hooks or
autograd at the calls that follow. What the trace cannot hold, a model that asks for numbers on its way, is an error.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.compiler
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dynlrp.buffers import Buffer
from dynlrp.composite import Composite
from dynlrp.condition import Condition
from dynlrp.errors import DynLRPError, InputError, NonFiniteError, TraceError
from dynlrp.explain import answers
from dynlrp.explanation import Explanation
from dynlrp.inputs import as_dicts, described
from dynlrp.options import Names, OnUnknown, Options
from dynlrp.request import Request
from dynlrp.shorten import shorten
from dynlrp.state import same_state, survey
from dynlrp.target import Target

aten: Any = torch.ops.aten
flags: Any = torch.compiler

CURE = "explain() takes such a model as it is"


class Like(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, tensor.stride())

    def __str__(self) -> str:
        return f"a tensor of {self.shape} {self.dtype} on {self.device}"


class Held(NamedTuple):
    """A parameter or buffer that the operations of a program read where it was at the trace."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def all(cls, model: Any) -> list[Held]:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        owners: list[dict[str, Any]] = [kind for m in modules for kind in (m._parameters, m._buffers)]
        return [cls(o, name, t, t.dtype, t.device) for o in owners for name, t in o.items() if t is not None]

    def moved(self) -> bool:
        tensor = self.tensor
        return self.owner.get(self.name) is not tensor or tensor.dtype != self.dtype or tensor.device != self.device


class Program:
    """Explains inputs of the shapes that it was traced with; made by :func:`trace`."""

    def __init__(
        self,
        module: fx.GraphModule,
        template: Explanation,
        inputs: Any,
        again: Callable[[Any], Explanation],
        held: Sequence[Held],
        written: Sequence[Buffer],
    ) -> None:
        self.module = module
        """All of it: takes the tensors of the inputs in their order, returns the explained output, all relevance and
        the amounts of the ledger."""
        self._function: Callable[..., Sequence[Tensor]] = module
        self._template = template.filled([torch.empty(0)] * len(template.everything()))
        self._described = described(as_dicts(inputs))
        leaves, self._spec = pytree.tree_flatten(as_dicts(inputs))
        self._leaves = [Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._explain = again
        self._held, self._written = held, written
        self._compiled = False

    def __call__(self, inputs: Any) -> Explanation:
        """What :func:`dynlrp.explain` gives for these inputs.

        Raises:
            InputError: the inputs differ from those of the trace in shape, dtype, device or structure.
            TraceError: a parameter or buffer was replaced, or has another dtype or device, since the trace.
            NonFiniteError: NaN or infinity on the way.
        """
        for held in self._held:
            if held.moved():
                raise TraceError(f"{held.name} of the model was replaced or moved since the trace: trace another")
        tensors = self._tensors(inputs)
        state = same_state(self._written, False) if self._written else nullcontext()
        with state, torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            found = self._function(*tensors)
            if self._compiled:  # which may use its memory again
                found = [tensor.clone() for tensor in found]
        explanation = self._template.filled(found[1:])
        explanation.complete(found[0])
        if not explanation.finite():
            self._explain(inputs)  # which says where
            raise NonFiniteError("relevance is not finite")
        return explanation

    def compile(self, **options: Any) -> Program:
        """Give the program to ``torch.compile``, with its options: ``backend="cudagraphs"`` runs it on a CUDA device
        without Python in between, ``backend="inductor"`` makes kernels of its own, ``mode="reduce-overhead"`` does
        both. Relevance then agrees up to rounding. The next call compiles; returns the program."""
        # Not the module, whose own handling of errors would be traced too, and hide them.
        self._function = torch.compile(self.module.forward, fullgraph=True, dynamic=False, **options)
        self._compiled = True
        return self

    def _unfit(self, place: int, given: Any) -> InputError:
        traced, found = ("nothing (None)" if one is None else one for one in (self._leaves[place], given))
        return InputError(
            f"the program was traced for {traced} as input {place} and was given {found}: trace another for that"
        )

    def _tensors(self, inputs: Any) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(as_dicts(inputs))
        if spec != self._spec:
            raise InputError(
                f"the program was traced for other inputs, {self._described}. It was given "
                f"{described(as_dicts(inputs))}"
            )
        tensors = []
        for place, (leaf, like) in enumerate(zip(leaves, self._leaves, strict=True)):
            given = Like.of(leaf) if isinstance(leaf, Tensor) else leaf
            if not isinstance(like, Like) or not isinstance(given, Like):
                if given is not like and given != like:
                    raise self._unfit(place, given)
                continue
            if given[:3] != like[:3]:
                raise self._unfit(place, given)
            if given.stride != like.stride:
                leaf = leaf.new_empty_strided(like.shape, like.stride).copy_(leaf)
            tensors.append(leaf.detach())
        return tensors


def trace(
    model: Callable[..., Any],
    inputs: Any,
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    layers: Names = (),
    parameters: Names = (),
    condition: Condition | None = None,
    output: str | int | None = None,
    precision: torch.dtype | None = None,
    on_unknown: OnUnknown = "error",
    others: Any = None,
) -> Program:
    """A program that explains inputs of the same shapes as :func:`dynlrp.explain` does, at a fraction of the price
    where operations are small. What the model computes in Python, without tensors, is done once and for all.

    Parameters and buffers that are changed in place (an optimiser's step, ``load_state_dict``) count at the next call;
    one that was replaced, or moved to another dtype or device, is an error then. After other changes of the model (its
    hooks, its mode, numbers of Python), trace again.

    Args:
        model, inputs, target, composite, layers, parameters, condition, output, precision, on_unknown: as in
            :func:`dynlrp.explain`.
        others: inputs of the same shapes. On these too the program must agree with :func:`dynlrp.explain`, as one that
            a model made depend on the numbers of ``inputs`` does not. By default ``inputs``, flipped.

    Raises:
        TraceError: what the model computes depends on numbers in a way that no straight line has: branches, loops and
            shapes by value, a detour by numpy.
        DynLRPError: as in :func:`dynlrp.explain`.
    """
    options = Options(
        composite, layers=layers, parameters=parameters, output=output, precision=precision, on_unknown=on_unknown
    )
    frozen, buffers = survey(model, False)
    request = Request(model, inputs, [target], [condition or {}], options, frozen)
    while True:
        program, compared = _program(request, others, buffers)
        if compared.record == request.record:
            return program
        request.record = compared.record  # constants that add up to nothing for some inputs do not for others


def _program(request: Request, others: Any, buffers: Sequence[Buffer]) -> tuple[Program, Request]:
    """A program, and the request for the other inputs that it was compared with, unless they have more recorded."""
    model, inputs = request.model, request.inputs

    def explained(request: Request) -> Explanation:
        ((_, explanation),) = answers(request, buffers)
        return explanation

    expected = explained(request)  # settles what forward passes have to record
    leaves, spec = pytree.tree_flatten(as_dicts(inputs))
    template: list[Explanation] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        given = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        again = replace(request, inputs=pytree.tree_unflatten(given, spec))
        ((found, _),) = again.forward()
        value, explanation = found.bare()
        template[:] = [explanation]
        return [value, *explanation.everything()]

    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    held, versions = Held.all(model), [buffer._version for _, _, buffer in buffers]
    with same_state(buffers, False):
        module, told = recorded(run, tensors)
    _straighten(module)
    written = [entry for entry, version in zip(buffers, versions, strict=True) if entry[2]._version != version]
    program = Program(
        module, template.pop(), inputs, lambda inputs: explained(replace(request, inputs=inputs)), held, written
    )
    flipped = others is None
    compared = replace(request, inputs=pytree.tree_map(_flipped, as_dicts(inputs)) if flipped else others)
    with _compiling() if told else nullcontext():
        if told and _is_half(expected):  # other kernels round in another way, which deep models multiply
            expected = explained(replace(request))
        _compare(program(inputs), expected)
        try:
            expected = explained(compared)
        except Exception as error:
            if not flipped:
                raise
            advice = "flipped inputs are none for this model, pass others= to compare with"
            raise InputError(f"{advice}: {error}") from error
    if compared.record == request.record:
        _compare(program(compared.inputs), expected)
    return program, compared


def recorded(run: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[fx.GraphModule, bool]:
    """The operations of a run; if that asks for numbers, those of one in which models are told not to, and whether they
    were."""
    try:
        return make_fx(run)(*tensors), False
    except (RuntimeError, DynLRPError):
        pass
    try:
        with _compiling():
            return make_fx(run)(*tensors), True
    except (RuntimeError, DynLRPError) as error:
        raise TraceError(f"the model asks for the numbers of a tensor{_place(error)}; {CURE}") from error


@contextmanager
def _compiling() -> Iterator[None]:
    """Models are told that they are compiled, so that they do not ask for numbers to take a shorter way."""
    before = flags._is_compiling_flag
    flags._is_compiling_flag = True
    try:
        yield
    finally:
        flags._is_compiling_flag = before


def _place(error: Exception) -> str:
    """Where the model's own code stood."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not {"torch", "dynlrp"} & set(Path(frame.filename).parts):
            return f" ({Path(frame.filename).name}:{frame.lineno}: {frame.line})"
    return ""


def _straighten(module: fx.GraphModule) -> None:
    """Leave out what does nothing without autograd; refuse shapes that depend on numbers."""
    for node in module.graph.nodes:
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags:
            indices = node.args[1] if node.target is aten.index.Tensor else [node]
            if any(_is_mask(index) or index is node for index in indices):
                raise TraceError(f"the shape of what {node.target} returns depends on numbers; {CURE}")
    shorten(module)


def _is_half(explanation: Explanation) -> bool:
    return any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in explanation.everything())


def _is_mask(index: fx.Node | None) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _compare(found: Explanation, expected: Explanation) -> None:
    """A program that holds what depends on numbers gives other relevance for other inputs."""
    pairs = list(zip(found.everything(), expected.everything(), strict=True))
    scale = max(float(theirs.abs().max()) for _, theirs in pairs if theirs.numel())
    for ours, theirs in pairs:
        if ours.shape == theirs.shape and not theirs.numel():
            continue
        difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
        if not difference <= math.sqrt(torch.finfo(theirs.dtype).eps) * scale:
            raise TraceError(
                f"for other inputs of the same shapes the model computes something else: relevance is {scale:.2g} at "
                f"most and differs by {difference:.2g}; {CURE}"
            )


def _flipped(leaf: Any) -> Any:
    """Other numbers of the same kind, of which an embedding has rows."""
    if not isinstance(leaf, Tensor):
        return leaf
    flipped = leaf.detach().flip(tuple(range(leaf.ndim)))
    return flipped * 0.875 if leaf.is_floating_point() or leaf.is_complex() else flipped

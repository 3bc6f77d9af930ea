"""What an operation is, what a rule is, and the one registry that joins them by exact node name."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Grads = Sequence[Tensor | None]
Gauge = Literal["multiplier", "relevance"]
Sign = Literal["", "nonnegative", "same"]
Account = Literal["inputs", "parameters", "constants", "offsets", "absorbed", "held back"]


class Need(NamedTuple):
    """An activation a rule asks for: the value of an operand, or of an output (``operand=None``), the first by default.

    An *optional* need serves the ledger alone: where it cannot be met, the ledger names the operation instead.
    """

    operand: int | None
    optional: bool = False
    output: int = 0


OUTPUT = Need(None)


class Step(Protocol):
    """What a rule sees of one graph node while relevance passes through it."""

    operation: Operation
    wants: tuple[bool, ...]
    """For each operand: does anything need what the rule returns for it."""
    signals: tuple[bool, ...]
    """For each operand: does relevance travel on through it towards the inputs."""
    present: tuple[bool, ...]
    """For each operand: is there an edge at all (False: a constant that autograd did not record)."""

    @property
    def nonnegative(self) -> bool:
        """The carried operand is known to have no negative entries (after relu, softmax, sigmoid ...)."""

    @property
    def gated(self) -> bool:
        """Every consumer is a relu, so relevance is zero wherever the output is not positive."""

    @property
    def hidden(self) -> bool:
        """Autograd did not record a constant that adds to the output."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """Outputs through which relevance arrives."""

    @property
    def name(self) -> str:
        """The node's name."""

    @property
    def merged(self) -> Step | None:
        """The batch norm that a linear operation absorbed."""

    def saved(self, name: str | int) -> Any:
        """What autograd saved under ``name``. Of a custom ``torch.autograd.Function``: an entry of
        ``ctx.saved_tensors`` by number, or an attribute of ``ctx`` by name."""

    def operand(self, index: int) -> Tensor:
        """The promised value of an operand."""

    def there(self, index: int) -> Tensor | None:
        """1 for the entries of an operand and 0 for those that padding wrote into it; None where there are no such."""

    def output(self, number: int = 0) -> Tensor:
        """The promised value of an output, exact wherever its relevance is not zero."""

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros in the shape of a tensor, which all operations of a pass share."""

    def book(self, account: Account, amount: Tensor) -> None:
        """Enter relevance (a 0-d tensor) that leaves the graph here into the ledger."""

    def vjp(self, grads: Grads) -> Sequence[Tensor | None]:
        """The operation's own vector-Jacobian product, one entry per operand."""

    def expand(self, function: Replay, values: Sequence[Tensor | None], grads: Grads) -> Sequence[Tensor | None]:
        """What walking through ``function(step, *values)`` gives, which does the operation in plain operations."""


class Rule:
    """How relevance passes one operation. Subclasses are frozen dataclasses, so that a composite is plain data.

    With ``create_graph=True`` rules run while autograd records, and what they are given is part of its graph.
    """

    @property
    def families(self) -> frozenset[str]:
        """The operation families the rule is for; empty for a rule that fits any."""
        return frozenset()

    @property
    def consumes(self) -> Gauge:
        """Gauge of what the rule is given for each output."""
        return "multiplier"

    @property
    def emits(self) -> Gauge:
        """Gauge of what it returns for each operand."""
        return "multiplier"

    @property
    def merges_norm(self) -> bool:
        """Take a batch norm that follows into the weights (linear rules that are not linear in the weights)."""
        return False

    @property
    def whole_output(self) -> bool:
        """It reads its output also where no relevance arrives, so that the result of a relu behind will not do."""
        return False

    @property
    def recorded_only(self) -> bool:
        """A summand that autograd did not record takes no share; the ledger lists the operation."""
        return False

    @property
    def books(self) -> bool:
        """The rule enters the relevance of parameters and coefficients into the ledger itself."""
        return False

    def operands(self, operation: Operation, gate: int | None) -> str:
        """The operand letters under this rule; see :class:`Operation`. ``gate`` is the operand that gates a product."""
        return operation.operands

    def needs(self, step: StepShape) -> Sequence[Need]:
        """The activations the rule will ask for."""
        return ()

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        """Relevance of the operands (one entry each, None for nothing) from that of the outputs."""
        raise NotImplementedError


class StepShape(Protocol):
    """What is known of a node before any tensor is looked at; see :class:`Step`."""

    operation: Operation
    wants: tuple[bool, ...]
    signals: tuple[bool, ...]
    present: tuple[bool, ...]

    @property
    def nonnegative(self) -> bool: ...

    @property
    def gated(self) -> bool: ...

    @property
    def hidden(self) -> bool: ...

    @property
    def outputs(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class VJP(Rule):
    """m_x = J^T m: linear and piecewise linear operations, whose vector-Jacobian product *is* the rule (exact: y = J
    x)."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return step.vjp(grads)


@dataclass(frozen=True)
class Gradient(Rule):
    """m_x = J^T m, also where that conserves nothing: gradient x input (Shrikumar et al. 2016), and the caller's
    fallback."""

    def operands(self, operation: Operation, gate: int | None) -> str:
        return operation.operands.replace("-", "*")

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return step.vjp(grads)


@dataclass(frozen=True)
class Taylor(Rule):
    """m_x = J^T m, the first-order expansion at the input; what it leaves over, m (f(x) - J x), is an offset (Montavon
    et al. 2017).

    For smooth functions of many operands that have no origin to take a secant from (logsumexp, matrix_exp).
    """

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [OUTPUT, *(Need(i) for i, wanted in enumerate(step.wants) if wanted)]

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        if g is None:
            return [None] * len(step.wants)
        results = step.vjp(grads)
        offset = inner(g, step.output())
        for position, (m, wanted) in enumerate(zip(results, step.wants, strict=True)):
            if m is not None and wanted:
                offset = offset - inner(m, step.operand(position))
        step.book("offsets", offset)
        return results


@dataclass(frozen=True)
class Hold(Rule):
    """m_x = 0: the operation's output is a coefficient, as attention weights and statistics are in CP-LRP (Ali et al.
    2022)."""

    def operands(self, operation: Operation, gate: int | None) -> str:
        return "-" * len(operation.operands) if operation.operands else "-"

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return [None] * len(step.wants)


Replay = Callable[..., Any]
"""``replay(step, *operand values)`` recomputes the output, or a tuple of the outputs. Operands that autograd did not
record are None."""


Writes = Callable[[Any, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Operation:
    """One autograd node type.

    ``operands`` has a letter per operand: ``+`` the operation is additive in it (its relevance is followed, or
    booked where it ends in a parameter), ``*`` a factor of a product (followed where it carries the signal, else a
    coefficient), ``-`` always a coefficient. An empty string means ``+`` for all. The last letter repeats.
    """

    name: str
    family: str
    rule: Rule = VJP()
    operands: str = ""
    result: str | None = None
    """Saved attribute that holds output 0."""
    saved: Mapping[int, str | int] = field(default_factory=lambda: MappingProxyType({}))
    """Saved attributes that hold operands; of a custom function, their numbers in ``ctx.saved_tensors``."""
    replay: Replay | None = None
    copies: bool | Callable[[Any], bool] = False
    """Every output element is one input element (views, slices, concatenation), so both gauges pass by the VJP; or
    ``copies(facts)``, where that depends on the node."""
    exact: bool = False
    """One output, and the VJP gives exactly the operand's shape and dtype, with nothing left to reduce or to cast."""
    statistics: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=lambda: MappingProxyType({}))
    """Saved attributes that depend on operands although autograd keeps them as constants: ``compute(step, value)``
    is the same number as a differentiable function of the operands, for relevance that is differentiated."""
    facts: Callable[[Any], Hashable] | None = None
    """Reads from a node what a plan must know beyond its name; passed to the callables below."""
    variants: Mapping[Hashable, Operation] = field(default_factory=lambda: MappingProxyType({}))
    """By facts, the operation that stands for this one in a plan, where another rule is needed."""
    sign: Sign | Callable[[Any], Sign] = ""
    """Whether the output is never negative, or only where an operand is."""
    gates: bool | Callable[[Any], bool] = False
    """Nothing passes where the operand is not positive (relu); a saved result may then stand for the operand."""
    hides: Callable[[Any, tuple[bool, ...]], bool] | None = None
    """``hides(facts, present operands)``: does a constant that autograd did not record add to the output."""
    writes: Writes | None = None
    """``writes(step, tensor)``: of a tensor of the output's shape, the entries that are such a constant, one number, as
    views. They belong to no tensor, as the padding of a convolution does. Its replay leaves zeros there."""
    holds: Callable[[Any], bool] | None = None
    """``holds(facts)``: nothing passes, the output is a coefficient."""
    bilinear: Rule | None = None
    """The rule where both factors depend on the inputs (the family is then ``product``)."""
    lookup: str = ""
    """Saved attribute with the indices of a table look-up: integer inputs are explained there."""
    rows: Callable[..., Tensor] | None = None
    """``rows(step, relevance, table)``: relevance of each index, where an output is more than one row of the table."""
    selects: Callable[[Any], tuple[Tensor, tuple[int, ...]] | None] | None = None
    """``selects(step)``: the indices by which entries are chosen, and the output's dimensions beside theirs; None where
    they are no integers. Where the operand is made of parameters alone, it is a table too."""
    gate: bool = False
    """A product with this function's value is gated."""
    softmax: Rule | None = None
    """The rule where it is a part of a softmax that is written out."""
    identity: bool = False
    """Its outputs are its operands, one by one."""
    bounds: bool = False
    """Its value is that of its operand, kept within bounds."""
    decay: bool = False
    """A signal times this function's value is a state that decays."""
    running: bool = False
    """A running sum over steps."""
    own_dtype: bool = False
    """Its derivative is of use in the dtype of its forward alone, as it reads buffers that it filled there."""
    apart: bool = False
    """``torch.vmap`` computes its derivative wrongly: one multiplier at a time."""
    absorbs: int | None = None
    """Operand that must be the input for the operation to take a batch norm behind it into its weights."""
    affine: Callable[[Any], bool] | None = None
    """``affine(facts)``: a norm with fixed statistics, which a linear operation before it can absorb."""
    blocked: str | Callable[[Any], str] = ""
    """Why relevance must not pass, or ``blocked(facts)``: a clear error where it arrives (a loss, a random draw)."""
    leftover: Account | Literal[""] = ""
    """Where the ledger puts what goes in by the outputs and neither comes out by the operands nor is booked."""
    math: Any = None
    """What the rules of this family need to know (a linear map, a function with its value at zero ...)."""

    def obstacle(self, facts: Any) -> str:
        """Why relevance must not pass a node with these facts."""
        return self.blocked(facts) if callable(self.blocked) else self.blocked

    def copied(self, facts: Any) -> bool:
        return self.copies(facts) if callable(self.copies) else self.copies

    def letter(self, index: int) -> str:
        return letter(self.operands, index)


def letter(operands: str, index: int) -> str:
    """The letter of one operand; see :class:`Operation`."""
    return operands[min(index, len(operands) - 1)] if operands else "+"


class Registry(UserDict[str, Operation]):
    """Operations by exact node name. ``version`` changes with every entry, so that plans know when they are old."""

    version = 0

    def __setitem__(self, name: str, operation: Operation) -> None:
        super().__setitem__(name, operation)
        self.version += 1

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.version += 1


REGISTRY = Registry()


def register(operation: Operation) -> Operation:
    """Enter an operation; a later entry of the same name replaces the earlier one."""
    REGISTRY[operation.name] = operation
    return operation


def missing(facts: Any, present: tuple[bool, ...]) -> bool:
    """For ``hides``: an operand that autograd did not record is a constant."""
    return not all(present)


def product(m: Tensor, x: Tensor) -> Tensor:
    """``R = m x``. A complex multiplier is ``m_re + i m_im``, as autograd's gradients are, and ``R`` the real number
    ``m_re x_re + m_im x_im``."""
    return (m.conj() * x).real if m.is_complex() or x.is_complex() else m * x


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors of one shape, at least in float32."""
    if a.is_complex() or b.is_complex() or a.layout is not torch.strided or b.layout is not torch.strided:
        return product(a, b).sum()
    if a.dtype == b.dtype == torch.bfloat16:  # products cannot overflow, and their rounding evens out
        return (a * b).sum(dtype=torch.float32)
    if a.dtype != b.dtype or a.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
    if a.ndim == 1:
        return torch.dot(a, b)
    alike = all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))
    if alike and not a.is_contiguous():  # in the order of memory, which spares two copies
        order = sorted(range(a.ndim), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def masked_product(m: Tensor, x: Tensor) -> Tensor:
    """:func:`product`, and 0 where a mask of ``-inf`` meets a multiplier of 0."""
    nothing = (m == 0) & (x == -torch.inf)
    if torch.is_grad_enabled():  # of the infinite product, the derivative is not a number
        return product(m, torch.where(nothing, 0.0, x))
    return torch.where(nothing, 0.0, product(m, x))


def inner(m: Tensor, x: Tensor) -> Tensor:
    """Sum of products, which may broadcast; no multiplier, no relevance, whatever the number."""
    if m.layout is not torch.strided or x.layout is not torch.strided:
        return product(m, x).sum()
    if m.dtype in (torch.float16, torch.bfloat16):
        m = m.float()
    return torch.where(m == 0, 0.0, product(m, x)).sum()


def channel_sum(x: Tensor) -> Tensor:
    """Sum over batch and space, in two steps, which takes a GPU half as long."""
    return (x.sum(tuple(range(2, x.ndim))) if x.ndim > 2 else x).sum(0)


def divide(relevance: Tensor, z: Tensor, epsilon: float, relative: bool = False) -> Tensor:
    """``relevance / (z + epsilon * sign(z))`` with ``sign(0) = 1``; without stabiliser, 0 where z is 0.

    ``relative``: epsilon is in units of the root mean square of z, of each entry of the first dimension. The sign of a
    complex number is its direction.
    """
    if z.is_complex():
        size = z.abs()
        direction = torch.where(size == 0, 1.0, z / torch.where(size == 0, 1.0, size))
        return divide(relevance, size, epsilon, relative) / direction
    if epsilon and not relative:
        plus = torch.full((), epsilon, dtype=z.dtype, device=z.device)
        return relevance / torch.where(z < 0, -plus, plus).add_(z)
    if epsilon:
        wide = torch.promote_types(z.dtype, torch.float32)
        norm = torch.linalg.vector_norm(z, dim=tuple(range(1, z.ndim)) or None, keepdim=True, dtype=wide)
        plus = norm * (epsilon * (norm.numel() / max(1, z.numel())) ** 0.5)
        z = z + torch.where(z < 0, -plus, plus)
    empty = z == 0
    return torch.where(empty, 0.0, relevance / torch.where(empty, 1.0, z)).to(relevance.dtype)


def follow(value: Tensor, formula: Tensor) -> Tensor:
    """``value``, digit by digit, with the derivative of ``formula``, which is the same up to rounding."""
    return value.detach() + (formula - formula.detach()).to(value.dtype)


def blocked(reason: str, *names: str) -> None:
    """Declare node types that no relevance may pass, with the reason that the error gives."""
    for name in names:
        register(Operation(name, "blocked", rule=Gradient(), operands="*", blocked=reason))


def linear_operation(*names: str, family: str = "linear map", **traits: Any) -> None:
    """Declare node types whose VJP is their rule: linear (or piecewise linear through zero) in every operand."""
    for name in names:
        register(Operation(name, family, **traits))


def rule(
    *names: str, family: str = "custom", needs: Sequence[Need] = (), **traits: Any
) -> Callable[[Callable[[Step, Grads], Sequence[Tensor | None]]], Callable[[Step, Grads], Sequence[Tensor | None]]]:
    """Decorator: use ``function(step, multipliers)`` for these node types (also ``torch.autograd.Function`` nodes).

    It gets one multiplier per output and returns one per operand.
    """

    def enter(
        function: Callable[[Step, Grads], Sequence[Tensor | None]],
    ) -> Callable[[Step, Grads], Sequence[Tensor | None]]:
        for name in names:
            register(Operation(name, family, rule=FunctionRule(function, tuple(needs)), **traits))
        return function

    return enter


@dataclass(frozen=True)
class FunctionRule(Rule):
    """A plain function as a rule."""

    function: Callable[[Step, Grads], Sequence[Tensor | None]]
    wanted: tuple[Need, ...] = ()

    def needs(self, step: StepShape) -> Sequence[Need]:
        return self.wanted

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return self.function(step, grads)


__all__ = [
    "OUTPUT",
    "REGISTRY",
    "VJP",
    "Account",
    "Gauge",
    "Gradient",
    "Grads",
    "Hold",
    "Need",
    "Operation",
    "Rule",
    "Step",
    "StepShape",
    "Taylor",
    "blocked",
    "linear_operation",
    "register",
    "rule",
]  # fmt: skip

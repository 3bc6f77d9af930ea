"""PyTorch's own database of operators with sample inputs, explained one sample at a time and checked against numbers
that only need the operator's forward and its gradient."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynlrp import Explanation, NoPathError, UnknownOperationError, explain
from dynlrp.errors import NonFiniteError
from dynlrp.rules import REGISTRY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

LEAF = "torch::autograd::AccumulateGrad"


LARGE = 20_000
"""Elements of a tensor, more than which only cost time."""


def identity(op: Any) -> str:
    """Name of an operator in the database."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


OPERATORS = {identity(op): op for op in op_db if op.supports_autograd and torch.float64 in op.dtypes}
"""Every operator that has a derivative in float64."""


class Way(NamedTuple):
    """What the tensors of a sample are: which are explained, and whether the others are parameters or constants."""

    explained: tuple[int, ...]
    parameters: bool = False

    def __str__(self) -> str:
        others = "parameters" if self.parameters else "constants"
        return f"wrt {','.join(map(str, self.explained))} (others {others})"


@dataclass
class Case:
    """A function of tensors, one number as its result."""

    call: Callable[..., Any]
    """The operator, as a function of all its tensors that may require grad."""
    tensors: tuple[Tensor, ...]
    way: Way
    label: str
    others: bool
    """There are other tensors among the arguments."""

    def outputs(self, *tensors: Tensor) -> list[Tensor]:
        """The differentiable outputs."""
        torch.default_generator.manual_seed(0)
        leaves = pytree.tree_leaves(self.call(*tensors))
        found = [y for y in leaves if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex())]
        return [y.to_dense() if y.layout is not torch.strided else y for y in found]

    def arguments(self, explained: Sequence[Tensor]) -> list[Tensor]:
        """All tensors, with those that are explained replaced."""
        others = [t.detach().requires_grad_() if self.way.parameters else t.detach() for t in self.tensors]
        for place, tensor in zip(self.way.explained, explained, strict=True):
            others[place] = tensor
        return others

    def vector(self, *explained: Tensor) -> Tensor:
        """All outputs as one real vector."""
        parts = [part for y in self.outputs(*self.arguments(explained)) if y.requires_grad for part in _real(y)]
        return torch.cat([part.detach().reshape(-1).double() for part in parts]) if parts else torch.zeros(0)

    def __call__(self, *explained: Tensor) -> Tensor:
        """A fixed random sum of the outputs, over those that are finite."""
        parts = [
            (torch.where(part.isfinite(), part, 0.0) * _draw(part, seed)).sum()
            for seed, y in enumerate(self.outputs(*self.arguments(explained)))
            if y.requires_grad
            for part in _real(y)
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros(())

    @cached_property
    def given(self) -> list[Tensor]:
        return [self.tensors[i].detach().clone() for i in self.way.explained]

    @cached_property
    def nodes(self) -> list[Any]:
        """The nodes of the operator, without leaves."""
        leaves = [x.clone().requires_grad_() for x in self.given]
        arguments = self.arguments([leaf.clone() for leaf in leaves])
        ends = {arguments[i].grad_fn for i in self.way.explained}
        outputs = [y for y in self.outputs(*arguments) if y.requires_grad]
        seen, stack = set(), [y.grad_fn for y in outputs]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen and node not in ends and node.name() != LEAF:
                seen.add(node)
                stack += [child for child, _ in node.next_functions]
        return list(seen)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(node.name() for node in self.nodes))

    @cached_property
    def gradient(self) -> list[Tensor] | None:
        """Gradient of the number, None where the operator gives none."""
        leaves = [x.clone().requires_grad_() for x in self.given]
        result = self(*[leaf.clone() for leaf in leaves])
        if not result.requires_grad:
            return None
        found = torch.autograd.grad(result, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    @cached_property
    def rounding(self) -> float:
        """The coarsest precision on the way."""
        metadata = [m for node in self.nodes for m in node._input_metadata]
        types = [m.dtype for m in metadata if m.dtype.is_floating_point or m.dtype.is_complex]
        return max((torch.finfo(dtype).eps for dtype in types), default=0.0)

    def finite(self, *explained: Tensor) -> bool:
        """Whether all outputs are finite there."""
        try:
            return bool(self.vector(*[x.clone().requires_grad_() for x in explained]).isfinite().all())
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return False

    def value(self, *explained: Tensor) -> float:
        """The number at other arguments; NaN where there is none."""
        try:
            return float(self(*[x.clone().requires_grad_() for x in explained]).detach())
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return math.nan


def _real(y: Tensor) -> list[Tensor]:
    return [y.real, y.imag] if y.is_complex() else [y]


def _draw(like: Tensor, seed: int) -> Tensor:
    return _drawn(like.shape, like.dtype, seed)


@lru_cache(maxsize=4096)
def _drawn(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cases(op: Any, dtype: torch.dtype, limit: int, ways: int = 0) -> Iterator[Case]:
    """Samples of an operator with everything explained: of those that record the same kinds of nodes for as many
    tensors, the first ``limit``; and of the first ``ways`` samples also every tensor alone."""
    met: Counter[tuple[frozenset[str], int]] = Counter()
    for number, sample in enumerate(_samples(op, dtype)):
        everything = _case(op, sample, f"sample {number}")
        if everything is None:
            continue
        kind = (frozenset(everything.names), len(everything.tensors))
        met[kind] += 1
        if met[kind] > limit:
            continue
        yield everything
        if met.total() <= ways and len(everything.tensors) > 1:
            for place in range(min(len(everything.tensors), 4)):
                for parameters in (False, True):
                    way = Way((place,), parameters)
                    label = f"sample {number} {way}"
                    yield Case(everything.call, everything.tensors, way, label, others=True)


def in_half(op: Any, dtype: torch.dtype, limit: int) -> Iterator[tuple[Case, Callable[[], Case | None]]]:
    """Of the first samples in half precision one for each kind of nodes, each with what makes the same in float32."""
    met: set[frozenset[str]] = set()
    for number, sample in enumerate(_samples(op, dtype, limit)):
        case = _case(op, sample, f"sample {number}")
        if case is not None and frozenset(case.names) not in met:
            met.add(frozenset(case.names))
            yield case, partial(_case, op, sample, f"sample {number}", widened=True)


def in_place(op: Any, dtype: torch.dtype, limit: int) -> Iterator[tuple[Case, Case]]:
    """The first samples of an operator that can write over its input, each with the same in place."""
    variant = op.inplace_variant
    if variant is None or not op.supports_inplace_autograd:
        return
    for number, sample in enumerate(_samples(op, dtype, limit)):
        case = _case(op, sample, f"sample {number}")
        written = _case(lambda x, *args, **kwargs: variant(x.clone(), *args, **kwargs), sample, f"sample {number}")
        if case is not None and written is not None and not sample.broadcasts_input:
            yield case, written


def _samples(op: Any, dtype: torch.dtype, limit: int = 60) -> list[Any]:
    random.seed(0)  # they are drawn from both
    torch.default_generator.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not ``op.sample_inputs``, which spends its time on finding out which test it is called from.
        return list(itertools.islice(op.sample_inputs_func(op, "cpu", dtype, requires_grad=True), limit))


def _case(op: Any, sample: Any, label: str, widened: bool = False) -> Case | None:
    """The operator on one sample with everything explained; None where that says nothing."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    if widened:
        half = (torch.float16, torch.bfloat16)
        leaves = [t.float() if isinstance(t, Tensor) and t.dtype in half else t for t in leaves]
    everywhere = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    places = [i for i in everywhere if leaves[i].requires_grad]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return sample.output_process_fn_grad(op(first, *args, **kwargs))

    tensors = tuple(leaves[i].detach() for i in places)
    if not tensors or any(t.layout is not torch.strided or t.numel() > LARGE for t in tensors):
        return None
    case = Case(call, tensors, Way(tuple(range(len(tensors)))), label, len(places) < len(everywhere))
    try:
        return case if case.names is not None else None
    except RuntimeError:  # the sample depends on memory that its copy has not
        return None


# What an explanation must be --------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """``kind`` is ``closes``, ``blocked``, ``no path``, ``no gradient`` or ``not finite``."""

    kind: str
    detail: str = ""
    explanation: Explanation | None = None


CLOSES = 1e-8
SMALL = 1e-3
"""Amounts below are what rounding leaves of larger ones."""


def attempt(case: Case, composite: str = "attnlrp") -> tuple[Explanation | None, Exception | None]:
    """The explanation, or the error that says why there is none."""
    torch.default_generator.manual_seed(0)
    try:
        return explain(case, tuple(case.given), composite=composite, allow_training=True), None
    except (UnknownOperationError, NoPathError, NonFiniteError) as error:
        return None, error


def outcome(case: Case, composite: str = "attnlrp") -> Outcome:
    """Explain a case and hold it against everything that is known of it; raises AssertionError."""
    gradient = case.gradient
    if gradient is None:
        return Outcome("no gradient")
    finite = all(bool(t.isfinite().all()) for t in (*gradient, *case.given)) and case.finite(*case.given)
    explanation, error = attempt(case, composite)
    if isinstance(error, UnknownOperationError):
        unknown = sorted({name for name, _ in error.operations if not error.reasons.get(name)})
        assert not unknown, f"no rule for {', '.join(unknown)}"
        assert all(reason in str(error) for reason in error.reasons.values())
        return Outcome("blocked", "; ".join(sorted(set(error.reasons.values()))))
    if isinstance(error, NoPathError):
        reached = reachable(case)
        assert not reached, f"no path, although {', '.join(reached)} carries relevance"
        assert coefficient(case), "no path, although there is an origin to explain from"
        return Outcome("no path", ", ".join(sorted(set(case.names))))
    if explanation is None:
        assert not finite, f"not finite: {error}"
        return Outcome("not finite")
    ledger = explanation.ledger
    assert not ledger.unresolved, f"constants not kept: {ledger.unresolved}"
    assert not ledger.fallbacks, f"explained by gradient: {ledger.fallbacks}"
    largest = max([SMALL, abs(ledger.output), *(abs(amount) for amount in ledger.accounts.values())])
    error = abs(ledger.residual) / largest
    assert error <= max(CLOSES, 4 * case.rounding), f"the ledger does not close: {error:.1e}\n{ledger}"
    for place, (r, x) in enumerate(zip(explanation.relevance, case.given, strict=True)):
        if r is None:
            reached = reachable(case, place)
            assert not reached, f"no relevance of tensor {place}, although {', '.join(reached)} carries it"
            continue
        assert r.shape == x.shape, f"relevance of shape {tuple(r.shape)} for {tuple(x.shape)}"
        assert r.dtype == (x.real.dtype if x.is_complex() else x.dtype), f"relevance of {r.dtype} for {x.dtype}"
        assert not finite or bool(r.isfinite().all()), "relevance is not finite, the gradient is"
    return Outcome("closes", explanation=explanation)


def reachable(case: Case, place: int | None = None) -> list[str]:
    """Nodes next to an explained tensor that a path of operands that carry relevance leads to."""
    copies = [x.clone().requires_grad_().clone() for x in case.given]
    ends = {copy.grad_fn for copy in (copies if place is None else copies[place : place + 1])}
    root = case(*copies).grad_fn
    seen, stack, found = set(), [root], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        operation = REGISTRY.get(node.name())
        facts = operation.facts(node) if operation is not None and operation.facts is not None else None
        if operation is not None and operation.holds is not None and operation.holds(facts):
            continue
        for position, (child, _) in enumerate(node.next_functions):
            if operation is None or operation.letter(position) != "-":
                if child in ends:
                    found.append(node.name())
                stack.append(child)
    return found


def coefficient(case: Case) -> bool:
    """Whether a tensor alone has no origin to be explained from: the function is a step, is not finite at zero, or
    knows no size."""
    if case.others or len(case.tensors) > 1:
        return True
    gradient, number = case.gradient, case.value(*case.given)
    assert gradient is not None
    zeros = [torch.zeros_like(x) for x in case.given]
    if not any(bool(g.any()) for g in gradient) or not case.finite(*zeros):
        return True
    if zeros[0].is_complex() and not case.finite(*[x.real for x in zeros]):  # acosh
        return True
    return _sizeless(case, number)


def _sizeless(case: Case, number: float) -> bool:
    return _near(case.value(*[2.0 * x for x in case.given]), number, 0.0)


def other_gauge(case: Case) -> None:
    """Relevance that starts as relevance, divided by the output or passed on as it is, ends up the same."""
    outputs = case.outputs(*case.arguments([x.clone().requires_grad_() for x in case.given]))
    if len(outputs) != 1 or not outputs[0].requires_grad or outputs[0].is_complex() or case.gradient is None:
        return
    y = outputs[0].detach()
    weight = torch.where((y.abs() > SMALL) & y.isfinite(), _draw(y, 0), 0.0)
    inputs = tuple(case.given)

    def function(*explained: Tensor) -> Tensor:
        return case.outputs(*case.arguments(explained))[0]

    def score(output: Tensor) -> Tensor:
        return (output * weight).sum()

    try:
        ours = explain(function, inputs, torch.nan_to_num(y * weight), composite="attnlrp", allow_training=True)
        expected = explain(function, inputs, score, composite="attnlrp", allow_training=True)
    except (UnknownOperationError, NoPathError, NonFiniteError):
        return
    found = [torch.zeros(x.shape) if r is None else r for r, x in zip(expected.relevance, inputs, strict=True)]
    _same(ours, found, "in the other gauge", 4 * case.rounding)


def by_gradient(case: Case) -> None:
    """Explained by its gradient, relevance is gradient times input, and what that does not conserve is booked."""
    explanation, _ = attempt(case, "gradient_x_input")
    if explanation is None or case.gradient is None:
        return
    expected = [_product(g, x) for g, x in zip(case.gradient, case.given, strict=True)]
    if all(bool(e.isfinite().all()) for e in expected):
        _same(explanation, expected, "by its gradient", 4 * case.rounding)
        ledger = explanation.ledger
        largest = max([SMALL, abs(ledger.output), *map(abs, ledger.accounts.values())])
        error = abs(ledger.residual) / largest
        assert error <= max(10 * CLOSES, 4 * case.rounding), f"by its gradient the ledger does not close: {error:.1e}"


# Oracles: what the numbers say of the function --------------------------------------------------------------

OWN_SHARES = {
    "masked.cumprod", "masked.prod",  # of the ones that stand where the mask is
    "nn.functional.batch_norm", "native_batch_norm", "_native_batch_norm_legit",  # of the mean in the weight's product
}  # fmt: skip
"""Operators with constants that take a share of a product, which the numbers alone do not tell from other constants."""


def oracle(name: str, case: Case, explanation: Explanation) -> str:
    """Hold the relevance against the class of function that the operator is by its numbers; returns that class."""
    gradient = case.gradient
    assert gradient is not None
    x = case.given
    everywhere = [_product(g, value) for g, value in zip(gradient, x, strict=True)]
    if not all(bool(e.isfinite().all()) for e in everywhere):
        return ""
    zero = case.value(*[torch.zeros_like(value) for value in x])
    number = case.value(*x)
    if name in OWN_SHARES and len(x) == len(case.tensors):
        return ""
    if affine(case, zero, number):
        if not _near(sum(float(e.sum()) for e in everywhere), number - zero, 1e-300 + abs(zero)):
            return "no gradient"  # two writes to one place, of which autograd takes both for seen
        _same(explanation, everywhere, "affine: relevance is x times the gradient")
        if not case.way.parameters:
            accounts, scale = explanation.ledger.accounts, max(abs(zero), abs(number), 1e-30)
            assert abs(accounts["offsets"] + accounts["constants"] - zero) <= CLOSES * scale, f"f(0) is {zero}"
            assert abs(accounts["held back"]) + abs(accounts["absorbed"]) <= CLOSES * scale, "nothing is held back"
        return "affine"
    if len(x) > 1 and products(case, zero):
        _same(explanation, halves(case, gradient), "products of two: either factor gets half")
        return "products"
    if len(case.nodes) == 1:
        expected = secant(case)
        if expected is not None and not _sizeless(case, number):
            if not _selects(case, gradient[0]) or not _agrees(explanation, everywhere):
                _same(explanation, [expected], "elementwise: relevance is m (f(x) - f(0))", 4 * case.rounding)
            return "elementwise"
        degree = homogeneous(case, number)
        if degree is not None:
            _same(explanation, [e / degree for e in everywhere], f"homogeneous of degree {degree:g}")
            return "homogeneous"
    return ""


def _product(m: Tensor, x: Tensor) -> Tensor:
    return (m.conj() * x).real if x.is_complex() else m * x


def _selects(case: Case, gradient: Tensor) -> bool:
    """Whether every element passes as it is, or not at all."""
    slope = (gradient / _draw(gradient, 0)).abs()
    return not gradient.is_complex() and bool(((slope - 1).abs().minimum(slope) < 1e-12).all())


def _agrees(explanation: Explanation, expected: Sequence[Tensor]) -> bool:
    return max(_differences(explanation, expected)) <= CLOSES


def _differences(explanation: Explanation, expected: Sequence[Tensor]) -> list[float]:
    """Largest difference per tensor, relative to the largest value of all."""
    scale = max([SMALL, *(float(e.abs().max()) for e in expected if e.numel())])
    return [
        float((e if r is None else r - e).abs().max()) / scale if e.numel() else 0.0
        for r, e in zip(explanation.relevance, expected, strict=True)
    ]


def _same(explanation: Explanation, expected: Sequence[Tensor], message: str, tolerance: float = 0.0) -> None:
    for place, worst in enumerate(_differences(explanation, expected)):
        assert worst <= max(CLOSES, tolerance), f"{message}; tensor {place} is off by {worst:.1e} of the largest"


def _near(a: float, b: float, scale: float) -> bool:
    return abs(a - b) <= 1e-10 * max(abs(a), abs(b), scale)


def _other(x: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in x]


def affine(case: Case, zero: float, number: float) -> bool:
    """Whether ``f(x + y) + f(0) = f(x) + f(y)``, and the same with a sign and a factor."""
    other = _other(case.given, 1)
    there = case.value(*other)
    if not math.isfinite(zero + there + number):
        return False
    scale = abs(zero) + abs(there) + abs(number)
    for a, b in ((1.0, 1.0), (-1.7, 0.6)):
        both = case.value(*[a * x + b * y for x, y in zip(case.given, other, strict=True)])
        if not _near(both - zero, a * (number - zero) + b * (there - zero), scale):
            return False
    return True


def products(case: Case, zero: float) -> bool:
    """Whether the function is a sum of parts that are linear in one tensor, or in either of two."""
    x, y = case.given, _other(case.given, 1)
    nothing = [torch.zeros_like(value) for value in x]
    everywhere = range(len(x))

    def at(**changed: Tensor) -> float:
        return case.value(*[changed.get(f"x{i}", nothing[i]) for i in everywhere]) - zero

    scale = abs(zero)
    alone = []
    for i in everywhere:
        one, other, both = (at(**{f"x{i}": value}) for value in (x[i], y[i], x[i] - 0.6 * y[i]))
        scale = max(scale, abs(one), abs(other))
        if not _near(both, one - 0.6 * other, scale):
            return False
        alone.append(one)
    total = sum(alone)
    for i, j in itertools.combinations(everywhere, 2):

        def pair(a: Tensor, b: Tensor, i: int = i, j: int = j) -> float:
            return at(**{f"x{i}": a, f"x{j}": b}) - at(**{f"x{i}": a}) - at(**{f"x{j}": b})

        one = pair(x[i], x[j])
        scale = max(scale, abs(one))
        for other, both in (
            (pair(y[i], x[j]), pair(x[i] - 0.6 * y[i], x[j])),
            (pair(x[i], y[j]), pair(x[i], x[j] - 0.6 * y[j])),
        ):
            scale = max(scale, abs(other))
            if not _near(both, one - 0.6 * other, scale):
                return False
        total += one
    return math.isfinite(total) and _near(case.value(*x), zero + total, scale)


def halves(case: Case, gradient: Sequence[Tensor]) -> list[Tensor]:
    """What is linear in one tensor passes whole, the rest in two halves."""
    shares = []
    for i, (x, g) in enumerate(zip(case.given, gradient, strict=True)):
        leaves = [value.clone() if n == i else torch.zeros_like(value) for n, value in enumerate(case.given)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        (alone,) = torch.autograd.grad(case(*leaves), leaves[i], allow_unused=True)
        shares.append(_product((g if alone is None else g + alone) / 2, x))
    return shares


def secant(case: Case) -> Tensor | None:
    """``m (f(x) - f(0))`` where ``f`` acts on every element alone and is finite at zero."""
    if case.others or len(case.given) != 1:
        return None
    (x,) = case.given
    with torch.no_grad():
        try:
            y, zero = (case.outputs(*case.arguments([at])) for at in (x.clone(), torch.zeros_like(x)))
        except RuntimeError:
            return None
        if len(y) != 1 or y[0].shape != x.shape or x.numel() < 2 or not bool(zero[0].isfinite().all()):
            return None
        for seed in range(3):
            mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
            mixed = case.outputs(*case.arguments([torch.where(mask, x, 0.0)]))
            if not torch.allclose(mixed[0], torch.where(mask, y[0], zero[0]), 1e-12, 1e-14, equal_nan=True):
                return None
    parts = zip(_real(y[0]), _real(zero[0]), strict=True)
    return sum((torch.where(p.isfinite(), p - z, 0.0) * _draw(p, 0) for p, z in parts), torch.zeros(()))


def homogeneous(case: Case, number: float) -> float | None:
    """The degree, where ``f(t x) = t ** degree * f(x)`` with a positive degree."""
    if not math.isfinite(number) or not number:
        return None
    twice, more = (case.value(*[t * x for x in case.given]) / number for t in (2.0, 3.7))
    if not (math.isfinite(twice) and math.isfinite(more)) or twice <= 0 or more <= 0:
        return None
    degree = math.log2(twice)
    if degree < 0.01 or abs(math.log(more) - degree * math.log(3.7)) > 1e-10 * max(1.0, degree):
        return None
    return degree

"""Linear layers: matrix products and convolutions with one factor that carries the signal.

All rules but :class:`Epsilon` with ``epsilon=0`` are sums of terms: a part of the input times modified weights, over a
stabilised sum of those terms. With ``s = R / stabilise(sum_t x_t W_t + b_t)`` the input gets ``sum_t x_t * (W_t^T s)``
and the bias ``sum_t b_t * s``. By default the bias is part of the sum and keeps its share (booked in the ledger);
``bias=False`` leaves it out, which zennit calls ``zero_params="bias"``.

The stabiliser is ``z + epsilon * sign(z)`` with ``sign(0) = 1``. With ``relative=True`` it is ``z + epsilon * rms(z) *
sign(z)``, where ``rms`` is the square root of the mean of ``z^2`` over everything but the first dimension of the
operation's output: over a sample of a batch of images, over a token where the product has a row per token. An epsilon
so given means the same on every scale of the activations; 0.1 to 0.25 is usual (Montavon et al. 2019, section 10.3,
whose code takes it over the whole batch; zennit's ``norm_scale``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.rules.operation import (
    OUTPUT,
    Gauge,
    Grads,
    Need,
    Operation,
    Rule,
    Step,
    StepShape,
    channel_sum,
    divide,
    dot,
    product,
    register,
)
from dynlrp.rules.product import Shares

aten: Any = torch.ops.aten


class LinearMap(Protocol):
    """What the rules need of an operation that is linear in its input ``x`` for a fixed weight ``w``."""

    bias: int | None
    """Operand number of the bias."""

    def input(self, step: StepShape) -> int:
        """Operand number of the input."""

    def weight(self, step: StepShape) -> int:
        """Operand number of the weight."""

    def weight_value(self, step: Step) -> Tensor:
        """The weight as recorded."""

    def factor(self, step: Step) -> float:
        """What the weight is multiplied by (``alpha``)."""

    def forward(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The output, with the bias ``b`` as it acts."""

    def backward(self, step: Step, g: Tensor, w: Tensor) -> Tensor:
        """The VJP with respect to the input."""

    def weight_backward(self, step: Step, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The VJP with respect to the weight times ``alpha``."""

    def bias_factor(self, step: Step) -> float:
        """What the bias is multiplied by (``beta``)."""

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        """The VJP with respect to the bias, up to broadcasting."""

    def bias_sum(self, step: Step, r: Tensor) -> Tensor:
        """The sum over all that one entry of the bias is added to, up to broadcasting."""

    def scaled(self, step: Step, w: Tensor, scale: Tensor) -> Tensor:
        """The weight with every output channel times ``scale``."""


class Term(NamedTuple):
    """``x`` times ``weight`` plus ``bias``; ``mask`` is ``x`` over the layer's input, None where they are the same."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor
    bias: Tensor | None


class Group(NamedTuple):
    """Terms that share a denominator, their sum if it is not given, with the part of the relevance they distribute."""

    terms: tuple[Term, ...]
    relevance: Tensor
    denominator: Tensor | None = None


class Share(NamedTuple):
    """Terms with the multiplier of their sum, relevance over the stabilised denominator, which is also given summed to
    the bias (:meth:`LinearMap.bias_sum`)."""

    terms: tuple[Term, ...]
    multiplier: Tensor
    total: Tensor


@dataclass(frozen=True)
class TermRule(Rule):
    """Base of the rules that are sums of terms."""

    families = frozenset({"dense", "convolution"})

    epsilon: float = field(default=1e-6, kw_only=True)
    relative: bool = field(default=False, kw_only=True)
    bias: bool = field(default=True, kw_only=True)

    @property
    def consumes(self) -> Gauge:
        return "relevance"

    @property
    def merges_norm(self) -> bool:
        return True

    @property
    def whole_output(self) -> bool:
        return self.relative

    positive: ClassVar[bool] = False
    """No term is negative, so that the stabiliser is one more bias."""
    real: ClassVar[bool] = True
    """It tells positive numbers from negative ones."""

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        """The groups of terms for input, weight, bias and the relevance of the output."""
        raise NotImplementedError

    def shares(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> tuple[list[Share], Tensor]:
        """All terms with their multipliers, and what the stabiliser absorbs."""
        if self.positive and self.epsilon and not self.relative:
            ((terms, relevance, _),) = self.groups(step, x, w, b, g)
            size = sum_terms(step, terms, self.epsilon).clamp_min_(self.epsilon)  # where rounding left less
            whole = _share(step, terms, (relevance / size).to(w.dtype))
            return [whole], whole.total.sum() * self.epsilon
        found = []
        passed = torch.zeros((), dtype=torch.float32, device=g.device)
        for terms, relevance, z in self.groups(step, x, w, b, g):
            z = sum_terms(step, terms) if z is None else z
            s = divide(relevance, z.conj(), self.epsilon, self.relative).to(w.dtype)  # under autocast z may be wider
            passed = passed + dot(s, z)
            found.append(_share(step, terms, s))
        return found, g.sum() - passed

    def needs(self, step: StepShape) -> Sequence[Need]:
        math = step.operation.math
        needs = [Need(math.input(step))]
        if math.bias is not None and self.bias and (step.present[math.bias] or step.hidden):
            needs.append(Need(math.bias))
        return needs

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        g = grads[0]
        math: LinearMap = step.operation.math
        results: list[Tensor | None] = [None] * len(step.wants)
        if g is None:
            return results
        x = step.operand(math.input(step))
        w, b = self._parameters(step)
        if self.real and w.is_complex():
            raise TypeError("complex numbers are neither positive nor negative: give this operation Epsilon() or VJP()")
        shares, absorbed = self.shares(step, x, w, b, g)
        step.book("absorbed", absorbed)
        for terms, s, total in shares:
            for term in terms:
                if step.wants[math.input(step)]:
                    share = math.backward(step, s, term.weight)
                    if self.emits == "relevance":
                        share = product(share, term.x)
                    elif term.mask is not None:
                        share = share * term.mask
                    _add(results, math.input(step), share)
                if step.wants[math.weight(step)]:
                    part = term.weight if self.emits == "relevance" else _ratio(term.weight, math.weight_value(step))
                    _add(results, math.weight(step), part * math.weight_backward(step, s, term.x, term.weight))
                if term.bias is not None and b is not None:
                    self._pass_bias(step, results, term.bias, b, total)
        return results

    def _pass_bias(self, step: Step, results: list[Tensor | None], part: Tensor, b: Tensor, total: Tensor) -> None:
        """The share of a bias. Of a merged one, ``b0 * scale + shift``, b0 gets its own and the shift's is booked."""
        math: LinearMap = step.operation.math
        wanted = math.bias is not None and step.wants[math.bias]
        if not wanted and (step.merged is not None or step.hidden):
            step.book("constants" if step.merged is None else "parameters", (part * total).sum())
        if math.bias is None or not wanted:
            return
        m = _ratio(part, b) * total
        if step.merged is not None:
            scale, shift = step.merged.operation.math.affine(step.merged)
            step.book("parameters", (shift * m).sum())
            m = m * scale
        factor = math.bias_factor(step)
        if self.emits == "relevance":
            m = m * step.operand(math.bias)
        _add(results, math.bias, m if factor == 1 else m * factor.conjugate())

    def _parameters(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they act, with a following batch norm merged in."""
        math = step.operation.math
        w, b = _weight(step), None
        if self.bias and math.bias is not None and (step.present[math.bias] or step.hidden):
            b, factor = step.operand(math.bias), math.bias_factor(step)
            b = b if factor == 1 else b * factor
        if step.merged is not None:
            scale, shift = step.merged.operation.math.affine(step.merged)
            w = math.scaled(step, w, scale).to(w.dtype)
            if self.bias:
                b = shift if b is None else b * scale + shift
        return w, b


def _weight(step: Step) -> Tensor:
    w: Tensor = step.operation.math.weight_value(step)
    factor = step.operation.math.factor(step)
    return w if factor == 1 else w * factor


def sum_terms(step: Step, terms: Sequence[Term], epsilon: float = 0.0) -> Tensor:
    """The denominator: all terms with their biases, and maybe a stabiliser."""
    z: Tensor | None = None
    for x, _, w, bias in terms:
        if epsilon and z is None:
            bias = torch.full((), epsilon, dtype=w.dtype, device=w.device) if bias is None else bias + epsilon
        part = step.operation.math.forward(step, x, w, bias)
        z = part if z is None else z.add_(part)
    assert z is not None
    return z


def _share(step: Step, terms: tuple[Term, ...], multiplier: Tensor) -> Share:
    """Terms with the multiplier of their sum."""
    return Share(terms, multiplier, step.operation.math.bias_sum(step, multiplier))


def _add(results: list[Tensor | None], position: int, value: Tensor) -> None:
    present = results[position]
    results[position] = value if present is None else present.add_(value)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The multiplier form of a modified parameter: part / whole, 0 where the parameter is 0."""
    return divide(part, whole, 0.0)


def each(w: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of every weight; of those that are there, if the weights are sparse."""
    if w.layout is torch.strided:
        return function(w)
    w = w.coalesce().clone() if w.layout is torch.sparse_coo else w.clone()
    w.values().copy_(function(w.values()))
    return w


def _signed(step: Step, x: Tensor, favoured: Tensor, other: Tensor, bias: Tensor | None) -> tuple[Term, ...]:
    """Positive inputs meet the ``favoured`` weights and negative inputs the ``other`` ones."""
    if step.nonnegative:
        return (Term(x, None, favoured, bias),)
    positive = x > 0
    return (
        Term(x.clamp(min=0), positive, favoured, bias),
        Term(x.clamp(max=0), ~positive, other, None),
    )


@dataclass(frozen=True)
class Epsilon(TermRule):
    """R_i = sum_j x_i w_ij / (z_j + epsilon sign(z_j)) R_j  (Bach et al. 2015, eq. 58).

    With ``epsilon=0``, the limit, no activation and no division is needed: the multiplier passes by the VJP.
    """

    real = False

    epsilon: float = 0.0

    @property
    def consumes(self) -> Gauge:
        return "multiplier" if self._limit else "relevance"

    @property
    def merges_norm(self) -> bool:
        return not self._limit

    @property
    def _limit(self) -> bool:
        return not self.epsilon and self.bias

    def needs(self, step: StepShape) -> Sequence[Need]:
        if not self._limit:
            return [*super().needs(step), *([OUTPUT] if self.bias else [])]
        math = step.operation.math
        return [Need(math.input(step))] if step.wants[math.weight(step)] else []

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        if not self._limit:
            return super().__call__(step, grads)
        g = grads[0]
        math: LinearMap = step.operation.math
        results: list[Tensor | None] = [None] * len(step.wants)
        if g is None:
            return results
        w = _weight(step)
        if step.wants[math.input(step)]:
            results[math.input(step)] = math.backward(step, g, w)
        if step.wants[math.weight(step)]:
            m = math.weight_backward(step, g, step.operand(math.input(step)), w)
            factor = math.factor(step)
            results[math.weight(step)] = m if factor == 1 else m * factor.conjugate()
        if math.bias is not None and step.wants[math.bias]:
            results[math.bias] = math.bias_backward(step, g)
        return results

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        return [Group((Term(x, None, w, b),), r, step.output() if self.bias else None)]


@dataclass(frozen=True)
class Gamma(TermRule):
    """Contributions of the output's own sign count (1 + gamma) times.

    Generalised form (Anders et al. 2021, zennit): for z_j > 0, R_i = sum_j (c_ij + gamma c_ij^+) / sum_i(...) R_j with
    c_ij = x_i w_ij, and the mirror image for z_j < 0. As c^+ and c^- are (c +- |c|) / 2, both are
    R_i = sum_j (a c_ij + b |c_ij| sign(z_j)) / (a z_j + b sum_i |c_ij| sign(z_j)) R_j with a = 1 + gamma / 2 and
    b = gamma / 2. ``signed=False`` is the original form for nonnegative inputs,
    R_i = sum_j x_i (w_ij + gamma w_ij^+) / sum_i(...) R_j (Montavon et al. 2019, section 10.2.3).
    """

    gamma: float = 0.25
    signed: bool = True

    @property
    def consumes(self) -> Gauge:
        return "multiplier" if self.signed else "relevance"

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [*super().needs(step), *([OUTPUT] if self.signed else [])]

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        def raised(v: Tensor) -> Tensor:
            return torch.add(v, v.clamp(min=0), alpha=self.gamma)

        return [Group((Term(x, None, each(w, raised), None if b is None else raised(b)),), r)]

    def shares(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> tuple[list[Share], Tensor]:
        if not self.signed:
            return super().shares(step, x, w, b, g)
        z = step.output()
        if self.relative or not (self.epsilon and self.gamma and self.bias):
            return self._divided(step, x, w, b, g, z)
        if step.nonnegative and step.gated:  # all that matters is positive
            # w + gamma w^+ over 1 + gamma, in one pass: a common factor of all terms cancels.
            slope, epsilon = 1 / (1 + self.gamma), self.epsilon / (1 + self.gamma)
            raised = partial(torch.nn.functional.leaky_relu, negative_slope=slope)
            term = Term(x, None, each(w, raised), None if b is None else raised(b))
            size = sum_terms(step, (term,), epsilon).clamp_min_(epsilon)
            share = _share(step, (term,), (g * z).div_(size).to(w.dtype))
            return [share], share.total.sum() * epsilon
        # (|z| + scale sum_i |c|) in the denominator: a common factor of all terms cancels.
        scale, epsilon = self.gamma / (2 + self.gamma), self.epsilon / (1 + self.gamma / 2)
        positive, mask = (x, None) if step.nonnegative else (x.abs(), x.sign())
        sizes = Term(positive, mask, each(w, lambda v: v.abs().mul_(scale)), None if b is None else b.abs() * scale)
        size = z.abs()
        part = g / sum_terms(step, (sizes,), epsilon).add_(size)
        whole = _share(step, (sizes,), (part * z).to(w.dtype))
        plain = _share(step, (Term(x, None, w, b),), (part * size).to(w.dtype))
        return [plain, whole], whole.total.sum() * epsilon

    def _divided(
        self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, z: Tensor
    ) -> tuple[list[Share], Tensor]:
        """The same by a quotient of any sign: without its bias, what was added up may have another sign than ``z``."""
        half = self.gamma / 2
        sign = z.sign()
        plain = Term(x, None, w * (1 + half), None if b is None else b * (1 + half))
        size, mask = (x, None) if step.nonnegative else (x.abs(), x.sign())
        sizes = Term(size, mask, each(w, torch.abs) * half, None if b is None else b.abs() * half)
        whole = z * (1 + half) if self.bias else sum_terms(step, (plain,))
        whole = whole.add_(sum_terms(step, (sizes,)).mul_(sign))
        r = g * z
        s = divide(r, whole, self.epsilon, self.relative).to(w.dtype)
        return [_share(step, (plain,), s), _share(step, (sizes,), s * sign)], r.sum() - dot(s, whole)


@dataclass(frozen=True)
class AlphaBeta(TermRule):
    """R_i = sum_j (alpha c_ij^+ / sum_i c_ij^+ - beta c_ij^- / sum_i c_ij^-) R_j  (Bach et al. 2015, eq. 60),
    with alpha - beta = 1."""

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-12:
            raise InputError(f"alpha - beta must be 1 and both nonnegative, not {self.alpha} and {self.beta}")

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        plus, minus = each(w, lambda v: v.clamp(min=0)), each(w, lambda v: v.clamp(max=0))
        groups = [Group(_signed(step, x, plus, minus, None if b is None else b.clamp(min=0)), self.alpha * r)]
        if self.beta:
            groups.append(Group(_signed(step, x, minus, plus, None if b is None else b.clamp(max=0)), -self.beta * r))
        return groups


@dataclass(frozen=True)
class ZPlus(TermRule):
    """R_i = sum_j c_ij^+ / sum_i c_ij^+ R_j  (Montavon et al. 2017): alpha-beta with alpha 1, beta 0."""

    positive = True

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        bias = None if b is None else b.clamp(min=0)
        minus = w if step.nonnegative else each(w, lambda v: v.clamp(max=0))
        return [Group(_signed(step, x, each(w, lambda v: v.clamp(min=0)), minus, bias), r)]


@dataclass(frozen=True)
class ZBox(TermRule):
    """R_i = sum_j (x_i w_ij - l_i w_ij^+ - h_i w_ij^-) / sum_i(...) R_j for inputs in [l, h]  (Montavon et al. 2017).

    ``low`` and ``high`` are numbers, or one for each channel (dimension 1), as images have that were normalised per
    channel; None takes each sample's own minimum and maximum. The bias cancels, and padding takes no part: it is what
    it is, so that its bounds are its own value.
    """

    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None

    emits = "relevance"

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if isinstance(bound, Sequence | Tensor | np.ndarray):
                object.__setattr__(self, name, tuple(map(float, bound)))  # plain data, as all of a rule

    def needs(self, step: StepShape) -> Sequence[Need]:
        return [Need(step.operation.math.input(step))]

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        axes, there = tuple(range(1, x.ndim)), _there(step, x)
        low = x.masked_fill(there == 0, torch.inf).amin(axes, keepdim=True) if self.low is None else self.low
        high = x.masked_fill(there == 0, -torch.inf).amax(axes, keepdim=True) if self.high is None else self.high
        return [
            Group(
                (
                    Term(x * there, None, w, None),
                    Term(-_bound(x, low) * there, None, each(w, lambda v: v.clamp(min=0)), None),
                    Term(-_bound(x, high) * there, None, each(w, lambda v: v.clamp(max=0)), None),
                ),
                r,
            )
        ]

    def _parameters(self, step: Step) -> tuple[Tensor, Tensor | None]:
        merged, w = step.merged, _weight(step)
        if merged is not None:
            w = step.operation.math.scaled(step, w, merged.operation.math.affine(merged)[0])
        return w, None


def _bound(x: Tensor, bound: Any) -> Any:
    """A bound, as a number or as a tensor that fits ``x``."""
    if not isinstance(bound, Sequence):
        return bound
    return torch.tensor(bound, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2))


def _there(step: Step, x: Tensor) -> Tensor:
    """1 for every entry of the input; 0 where padding wrote it, be it by an operation before: also a layer that pads by
    itself sees nothing there."""
    there = step.there(step.operation.math.input(step))
    return torch.ones_like(x) if there is None else there.to(x.dtype).expand_as(x)


@dataclass(frozen=True)
class WSquare(TermRule):
    """R_i = sum_j w_ij^2 / sum_i w_ij^2 R_j  (Montavon et al. 2017); the squared bias takes part as in zennit,
    padding does not."""

    emits = "relevance"
    positive = True

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        bias = None if b is None else b.square()
        return [Group((Term(_there(step, x), None, each(w, torch.square), bias),), r)]


@dataclass(frozen=True)
class Flat(TermRule):
    """R_i = sum_j 1 / n_j R_j over the n_j inputs of output j, whatever their values  (Lapuschkin et al. 2019).

    Padding is no input. The bias never takes part, unless ``bias=True`` counts it as one more input.
    """

    bias: bool = field(default=False, kw_only=True)

    emits = "relevance"
    positive = True

    def groups(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Sequence[Group]:
        bias = None if b is None else torch.ones_like(b)
        return [Group((Term(_there(step, x), None, each(w, torch.ones_like), bias),), r)]


@dataclass(frozen=True)
class Pass(Rule):
    """R_x = R_y: relevance goes on unchanged through an operation that keeps the shape (the identity rule, Achtibat et
    al. 2024)."""

    consumes = "relevance"
    emits = "relevance"

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        return [grads[0] if signal else None for signal in step.signals]


class MatrixProduct:
    """Products of matrices and vectors: operands ``first`` and ``first + 1`` are the factors ``a @ b``."""

    first = 0

    def __init__(self, names: tuple[str, str], bias: int | None = None) -> None:
        self.names = names
        self.bias = bias
        if bias == 0:
            self.first = 1

    def product(self, step: Any, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def left(self, step: Step, g: Tensor, b: Tensor) -> Tensor:
        """The VJP with respect to ``a``."""
        return g @ b.mH if b.ndim > 1 else g.unsqueeze(-1) * b.conj()

    def right(self, step: Step, a: Tensor, g: Tensor) -> Tensor:
        """The VJP with respect to ``b``."""
        return a.mH @ g if a.ndim > 1 else a.conj() * g

    def input(self, step: StepShape) -> int:
        return self.first if step.signals[self.first] else self.first + 1

    def weight(self, step: StepShape) -> int:
        return self.first + 1 if step.signals[self.first] else self.first

    def weight_value(self, step: Step) -> Tensor:
        w: Tensor = step.saved(self.names[self.weight(step) - self.first])
        return w

    def factor(self, step: Step) -> float:
        return 1.0 if self.bias is None else step.saved("alpha")

    def forward(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = self.product(step, x, w) if self.input(step) == self.first else self.product(step, w, x)
        return z if b is None else z.add_(b)

    def backward(self, step: Step, g: Tensor, w: Tensor) -> Tensor:
        return self.left(step, g, w) if self.input(step) == self.first else self.right(step, w, g)

    def weight_backward(self, step: Step, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self.right(step, x, g) if self.input(step) == self.first else self.left(step, g, x)

    def bias_factor(self, step: Step) -> float:
        factor: float = step.saved("beta")
        return factor

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        factor = self.bias_factor(step)
        return g if factor == 1 else g * factor.conjugate()

    def bias_sum(self, step: Step, r: Tensor) -> Tensor:
        return r

    def scaled(self, step: Step, w: Tensor, scale: Tensor) -> Tensor:
        return w * scale

    def partial(self, step: Step, g: Tensor, position: int) -> Tensor:
        """The VJP with respect to one of the two factors."""
        factor = self.factor(step)
        g = g if factor == 1 else g * factor.conjugate()
        if position == self.first:
            return self.left(step, g, step.operand(self.first + 1))
        return self.right(step, step.operand(self.first), g)

    def replay(self, step: Any, *values: Tensor | None) -> Tensor:
        factors = [
            step.saved(name) if value is None else value
            for name, value in zip(self.names, values[self.first :], strict=False)
        ]
        z = self.product(step, factors[0], factors[1])
        if self.bias is None:
            return z
        added = values[self.bias]
        z = z * self.factor(step)
        return z if added is None else added * self.bias_factor(step) + z


class NestedProduct(MatrixProduct):
    """``matmul`` of nested tensors, whose samples all meet the same matrix."""

    def right(self, step: Step, a: Tensor, g: Tensor) -> Tensor:
        return _rows(a).mH @ _rows(g)


class SummedProduct(MatrixProduct):
    """``addbmm``: the products of a batch are summed."""

    def product(self, step: Any, a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).sum(0)


class ConjugateDot(MatrixProduct):
    """``vdot``: the first vector is conjugated."""

    def product(self, step: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.vdot(a, b)

    def left(self, step: Step, g: Tensor, b: Tensor) -> Tensor:
        return g.conj() * b

    def right(self, step: Step, a: Tensor, g: Tensor) -> Tensor:
        return a * g


class OuterProduct(MatrixProduct):
    """``addr``: every entry of one vector with every entry of the other."""

    def product(self, step: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.outer(a, b)

    def left(self, step: Step, g: Tensor, b: Tensor) -> Tensor:
        return g @ b.conj()

    def right(self, step: Step, a: Tensor, g: Tensor) -> Tensor:
        return a.conj() @ g


class GroupedProduct(MatrixProduct):
    """``grouped_mm``, the experts of a mixture: groups end at the numbers ``offs`` along a dimension of matrices that
    stand side by side, and are numbered by the first dimension of three."""

    def product(self, step: Any, a: Tensor, b: Tensor) -> Tensor:
        ends = step.saved("offs")
        z: Tensor = aten._grouped_mm(_aligned(a), _aligned(b), ends)
        if ends is None or a.ndim == b.ndim:
            return z
        # The kernel leaves what lies behind the last group as it was.
        rows = a.ndim == 2
        outside = torch.arange(z.shape[0 if rows else 1], device=z.device) >= ends[-1]
        return z.masked_fill_(outside.unsqueeze(1) if rows else outside, 0.0)

    def left(self, step: Step, g: Tensor, b: Tensor) -> Tensor:
        return self.product(step, g, b.mT)

    def right(self, step: Step, a: Tensor, g: Tensor) -> Tensor:
        return self.product(step, a.mT, g)


def _aligned(x: Tensor) -> Tensor:
    """A matrix as the grouped kernel takes it: rows, or columns, start at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    for along, across in ((-1, -2), (-2, -1)):
        if x.stride(along) == 1 and x.stride(across) >= max(1, x.shape[along]) and x.stride(across) % unit == 0:
            return x
    padded = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // unit) * unit)
    return padded[..., : x.shape[-1]].copy_(x)


class Linear(MatrixProduct):
    """``linear``, where it is an operation of its own: ``a @ b.T`` with the bias behind."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__(names, bias=2)

    def product(self, step: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(a, b)

    def left(self, step: Step, g: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(g, b.mH)

    def right(self, step: Step, a: Tensor, g: Tensor) -> Tensor:
        return _rows(g).mH @ _rows(a)

    def factor(self, step: Step) -> float:
        return 1.0

    def bias_factor(self, step: Step) -> float:
        return 1.0

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        return self.bias_sum(step, g)

    def bias_sum(self, step: Step, r: Tensor) -> Tensor:
        return _rows(r).sum(0)


def _rows(x: Tensor) -> Tensor:
    """All vectors of a batch, of a nested tensor too."""
    return x.values() if x.is_nested else x.reshape(-1, x.shape[-1])


class Convolution:
    """Convolutions of any dimension, transposed or not. ``fixed`` settings are those that a node does not save."""

    def __init__(self, input: str = "input", bias: int | None = 2, **fixed: Any) -> None:
        self.names = (input, "weight")
        self.bias = bias
        self.fixed = fixed

    def input(self, step: StepShape) -> int:
        return 0 if step.signals[0] else 1

    def weight(self, step: StepShape) -> int:
        return 1 if step.signals[0] else 0

    def weight_value(self, step: Step) -> Tensor:
        w: Tensor = step.saved(self.names[self.weight(step)])
        return w

    def _setting(self, step: Any, name: str) -> Any:
        return self.fixed[name] if name in self.fixed else step.saved(name)

    def _settings(self, step: Any, x: Tensor, w: Tensor) -> tuple[Any, ...]:
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        stride, padding, dilation, transposed, output_padding, groups = (self._setting(step, name) for name in names)
        return stride, padding, dilation, transposed, output_padding, groups or x.shape[1] // w.shape[1]

    def convolve(self, step: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z: Tensor = aten.convolution(x, w, b, *self._settings(step, x, w))
        return z

    def vjp(self, step: Step, g: Tensor, x: Tensor, w: Tensor, position: int) -> Tensor:
        """The VJP with respect to input (0) or kernel (1)."""
        mask = [position == 0, position == 1, False]
        m: Tensor = aten.convolution_backward(g, x, w, None, *self._settings(step, x, w), mask)[position]
        return m

    def forward(self, step: Step, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if not step.signals[0]:
            x, w = w, x
        if b is not None:
            b = b.expand(self._channels(step, x, w)).to(x.dtype)
        return self.convolve(step, x, w, b)

    def _channels(self, step: Step, x: Tensor, w: Tensor) -> int:
        """How many channels the output has."""
        _, _, _, transposed, _, groups = self._settings(step, x, w)
        channels: int = w.shape[1] * groups if transposed else w.shape[0]
        return channels

    def backward(self, step: Step, g: Tensor, w: Tensor) -> Tensor:
        if step.signals[0]:
            return self.vjp(step, g, step.saved(self.names[0]), w, 0)
        return self.vjp(step, g, w, step.saved("weight"), 1)

    def weight_backward(self, step: Step, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self.vjp(step, g, *((x, w, 1) if step.signals[0] else (w, x, 0)))

    def factor(self, step: Step) -> float:
        return 1.0

    def bias_factor(self, step: Step) -> float:
        return 1.0

    def bias_backward(self, step: Step, g: Tensor) -> Tensor:
        return self.bias_sum(step, g)

    def bias_sum(self, step: Step, r: Tensor) -> Tensor:
        return channel_sum(r)

    def scaled(self, step: Step, w: Tensor, scale: Tensor) -> Tensor:
        if not self._setting(step, "transposed"):
            return w * scale.reshape(-1, *[1] * (w.ndim - 1))
        groups = self._setting(step, "groups")
        split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        return (split * scale.reshape(groups, 1, w.shape[1], *[1] * (w.ndim - 2))).reshape(w.shape)

    def partial(self, step: Step, g: Tensor, position: int) -> Tensor:
        """The VJP with respect to input or weight, where both carry the signal."""
        return self.vjp(step, g, step.saved(self.names[0]), step.saved("weight"), position)

    def replay(self, step: Any, x: Tensor | None, w: Tensor | None, b: Tensor | None = None) -> Tensor:
        x = step.saved(self.names[0]) if x is None else x
        w = step.saved("weight") if w is None else w
        return self.convolve(step, x, w, b)


class TimeBatchChannel(Convolution):
    """``conv_tbc``: inputs of shape (time, batch, channels), kernels of shape (width, inputs, outputs)."""

    def convolve(self, step: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z: Tensor = aten.conv_tbc(x, w, x.new_zeros(w.shape[-1]) if b is None else b, step.saved("pad"))
        return z

    def vjp(self, step: Step, g: Tensor, x: Tensor, w: Tensor, position: int) -> Tensor:
        m: Tensor = aten.conv_tbc_backward(g, x, w, g.new_zeros(w.shape[-1]), step.saved("pad"))[position]
        return m

    def bias_sum(self, step: Step, r: Tensor) -> Tensor:
        return r.sum((0, 1))

    def _channels(self, step: Step, x: Tensor, w: Tensor) -> int:
        return w.shape[-1]


def _dense(name: str, math: MatrixProduct, operands: str, **traits: Any) -> None:
    first = math.first
    saved = {first: math.names[0], first + 1: math.names[1]}
    traits = {"saved": saved, "replay": math.replay, "bilinear": Shares(), "math": math, **traits}
    register(Operation(name, "dense", rule=Epsilon(), operands=operands, **traits))


def _product(name: str, names: tuple[str, str], math: type[MatrixProduct] = MatrixProduct, **traits: Any) -> None:
    _dense(name, math(names), "**", **traits)


def adds(node: Any) -> bool:
    """Whether a product with something added does add it."""
    return bool(node._saved_beta)


def lost_summand(adds: Any, present: tuple[bool, ...]) -> bool:
    """What is added, or the whole product, is a constant that autograd did not record."""
    return (adds and not present[0]) or not (present[1] or present[2])


def _added_product(name: str, names: tuple[str, str], math: type[MatrixProduct] = MatrixProduct, **traits: Any) -> None:
    """With a tensor times ``beta`` added to the product times ``alpha``."""
    _dense(name, math(names, bias=0), "+**", facts=adds, hides=lost_summand, **traits)


def lost_bias(facts: Any, present: tuple[bool, ...]) -> bool:
    """Nodes that do not tell whether there is a bias: one that belongs to a recorded weight would be recorded too."""
    return len(present) > 2 and not present[2] and not (present[0] and present[1])


_product("MmBackward0", ("self", "mat2"), absorbs=0)
_product("BmmBackward0", ("self", "mat2"))
_product("MvBackward0", ("self", "vec"))
_product("DotBackward0", ("self", "tensor"))
_product("VdotBackward0", ("self", "other"), ConjugateDot)
_product("GroupedMmBackward0", ("self", "mat2"), GroupedProduct)
_product("SparseSparseMatmulBackward0", ("self", "other"))
_product("MatmulBackward0", ("self", "other"), NestedProduct)
_added_product("AddmmBackward0", ("mat1", "mat2"), absorbs=1)
_added_product("BaddbmmBackward0", ("batch1", "batch2"))
_added_product("AddbmmBackward0", ("batch1", "batch2"), SummedProduct)
_added_product("AddmvBackward0", ("mat", "vec"))
_added_product("AddrBackward0", ("vec1", "vec2"), OuterProduct)
_added_product("SparseAddmmBackward0", ("mat1", "mat2"))
_dense("LinearBackward0", Linear(("input", "weight")), "**+", hides=lost_bias)  # on MPS, and for nested tensors


def _convolution(name: str, math: Convolution, **traits: Any) -> None:
    saved = {0: math.names[0], 1: "weight"}
    traits = {"saved": saved, "replay": math.replay, "bilinear": Shares(), "absorbs": 0, "math": math, **traits}
    register(Operation(name, "convolution", rule=Epsilon(), operands="**+", **traits))


_told = {  # nodes that tell whether there is a bias
    "facts": lambda node: bool(node._saved_bias_sym_sizes_opt) and node._saved_bias_sym_sizes_opt[0] > 0,
    "hides": lambda biased, present: bool(biased) and not present[2],
}
_plain: dict[str, Any] = {"transposed": False, "output_padding": [0]}
_single: dict[str, Any] = {**_plain, "dilation": [1], "groups": 1}
_transposed: dict[str, Any] = {"transposed": True}

for _name in ("ConvolutionBackward0", "ConvolutionBackward1"):
    _convolution(_name, Convolution(), **_told)
_convolution("ConvolutionOverrideableBackward0", Convolution(), hides=lost_bias)
# The names of single devices and kernels.
_convolution("SlowConv2DBackward0", Convolution("self", **_single), hides=lost_bias)
_convolution("SlowConv3DBackward0", Convolution("self", **_single), **_told)
_convolution("NnpackSpatialConvolutionBackward0", Convolution(**_single), **_told)
for _name in ("SlowConvDilated2DBackward0", "SlowConvDilated3DBackward0"):
    _convolution(_name, Convolution("self", **_plain, groups=1), **_told)
for _name in ("SlowConvTranspose2DBackward0", "SlowConvTranspose3DBackward0"):
    _convolution(_name, Convolution("self", **_transposed, groups=1), **_told)
for _name in ("ConvDepthwise2DBackward0", "ConvDepthwise3DBackward0"):
    _convolution(_name, Convolution("self", **_plain, groups=None), **_told)
for _name in ("MkldnnConvolutionBackward0", "MiopenConvolutionBackward0", "MiopenDepthwiseConvolutionBackward0"):
    _convolution(_name, Convolution("self", **_plain), **_told)
_convolution("MiopenConvolutionTransposeBackward0", Convolution("self", **_transposed), **_told)
_convolution("MpsConvolutionBackward0", Convolution("self", **_plain), hides=lost_bias)
_convolution("MpsConvolutionTransposeBackward0", Convolution("self", None, **_transposed))
_convolution("CudnnConvolutionBackward0", Convolution("self", None, **_plain))
_convolution("CudnnConvolutionTransposeBackward0", Convolution("self", None, **_transposed))
_convolution(
    "ConvTbcBackward0",
    TimeBatchChannel("self"),
    absorbs=None,
    hides=lambda facts, present: not present[2],
)

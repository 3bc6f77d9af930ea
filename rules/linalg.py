"""Linear algebra beside the dense layers' products: bilinear layers, linear systems, functions of a matrix.

A matrix that is inverted, or divided by, is a coefficient as other denominators are: the solution of ``A x = b`` is
linear in ``b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlrp.rules.elementwise import coefficient
from dynlrp.rules.expansion import expand
from dynlrp.rules.linear import lost_bias
from dynlrp.rules.operation import Grads, Operation, Rule, Step, Taylor, linear_operation, register
from dynlrp.rules.reduction import OF_NOTHING, Homogeneous
from dynlrp.rules.shape import number


@dataclass(frozen=True)
class EqualShares(Rule):
    """A product of n signals passes each m_i = J_i^T m / n; what is added to the product takes its VJP (Achtibat et al.
    2024)."""

    def __call__(self, step: Step, grads: Grads) -> Sequence[Tensor | None]:
        factors = [i for i, signal in enumerate(step.signals) if signal and step.operation.letter(i) == "*"]
        results = list(step.vjp(grads))
        if len(factors) > 1:
            for position in factors:
                m = results[position]
                results[position] = None if m is None else m * (1 / len(factors))  # sparse ones cannot be divided
        return results


def multilinear(name: str, operands: str, saved: Sequence[str | None] = (), **traits: Any) -> None:
    """Enter an operation that is linear in each of several factors (``*``)."""
    names = {position: attribute for position, attribute in enumerate(saved) if attribute}
    register(Operation(name, "multilinear", **{"rule": EqualShares(), "operands": operands, "saved": names, **traits}))


def _cross(step: Any, a: Tensor | None, b: Tensor | None) -> Tensor:
    a, b = step.saved("self") if a is None else a, step.saved("other") if b is None else b
    y: Tensor = torch.linalg.cross(a, b, dim=number(step))
    return y


# Of one constant vector and its negative: no matrix of weights whose signs the rules of dense layers could tell apart.
multilinear("LinalgCrossBackward0", "**", ("self", "other"), replay=_cross)


def _trilinear(step: Any, *factors: Tensor | None) -> Tensor:
    """What bilinear layers are made of."""
    values = [step.saved(f"i{number}") if x is None else x for number, x in enumerate(factors, 1)]
    lists = [[int(d) for d in step.saved(name)] for name in ("expand1", "expand2", "expand3", "sumdim")]
    y: Tensor = torch.ops.aten._trilinear(*values, *lists)
    return y


multilinear("TrilinearBackward0", "***", ("i1", "i2", "i3"), replay=_trilinear)

# The kernel's own layout knows no denominators.
multilinear("MkldnnLinearBackward0", "**+", ("self", "weight"), hides=lost_bias)

# Solutions of linear systems.


def _solution(name: str, operands: str, matrix: str, **traits: Any) -> None:
    """``matrix`` is where the coefficient is saved."""
    linear_operation(name, operands=operands, saved={operands.index("-"): matrix}, **traits)


def _lu_solve(step: Any, lu: Tensor | None, b: Tensor | None) -> Tensor:
    x: Tensor
    if b is None:  # a constant; where the matrix is not, the node keeps the solution
        x = step.saved("result")
        return x
    lu = step.saved("LU") if lu is None else lu
    x = torch.linalg.lu_solve(lu, step.saved("pivots"), b, left=step.saved("left"), adjoint=step.saved("adjoint"))
    return x


_solution("LinalgSolveExBackward0", "-*", "A", result="result")
_solution("LinalgSolveTriangularBackward0", "-*", "self", result="result")
_solution("LinalgLuSolveBackward0", "-*", "LU", replay=_lu_solve)
_solution("CholeskySolveBackward0", "*-", "input2", result="result")


def _triangular_solve(step: Any, b: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
    """The solution, and a copy of the matrix."""
    b, a = step.saved("self") if b is None else b, step.saved("A") if a is None else a
    turned = step.saved("transpose")
    upper = step.saved("upper") != turned
    x = torch.linalg.solve_triangular(a.mT if turned else a, b, upper=upper, unitriangular=step.saved("unitriangular"))
    return x, a.clone()


expand("TriangularSolveBackward0", _triangular_solve, saved={0: "self", 1: "A"}, result="solution")

# Functions of one matrix. The determinant of n rows has degree n.
register(
    Operation(
        "LinalgDetBackward0",
        "reduction",
        rule=Homogeneous((lambda step: max(step.saved("A").shape[-1], 1),)),
        operands="+",
        saved={0: "A"},
        result="result",
        **OF_NOTHING,
    )
)
register(
    Operation(
        "LinalgMatrixExpBackward0",
        "reduction",
        rule=Taylor(),
        operands="+",
        saved={0: "self"},
        replay=lambda step, a: torch.linalg.matrix_exp(a),
    )
)
coefficient("LinalgInvExBackward0", result="inverse")
coefficient("CholeskyInverseBackward0", result="result")
coefficient("LinalgSlogdetBackward0", lambda step, a: tuple(torch.linalg.slogdet(a)), saved={0: "A"})

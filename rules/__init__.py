"""The operations and their rules, one file per family, in one registry by exact node name."""

from dynlrp.rules import (  # noqa: F401  the imports fill the registry
    addition,
    attention,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    product,
    reduction,
    shape,
)
from dynlrp.rules.addition import EpsilonSum, Magnitude
from dynlrp.rules.attention import Attention, SoftmaxVJP
from dynlrp.rules.elementwise import Secant
from dynlrp.rules.linear import AlphaBeta, Epsilon, Flat, Gamma, Pass, WSquare, ZBox, ZPlus
from dynlrp.rules.normalization import Statistic
from dynlrp.rules.operation import (
    REGISTRY,
    VJP,
    Gradient,
    Hold,
    Need,
    Operation,
    Rule,
    Step,
    linear_operation,
    register,
    rule,
)
from dynlrp.rules.product import Shares, Ungated

__all__ = [
    "REGISTRY",
    "VJP",
    "AlphaBeta",
    "Attention",
    "Epsilon",
    "EpsilonSum",
    "Flat",
    "Gamma",
    "Gradient",
    "Hold",
    "Magnitude",
    "Need",
    "Operation",
    "Pass",
    "Rule",
    "Secant",
    "Shares",
    "SoftmaxVJP",
    "Statistic",
    "Step",
    "Ungated",
    "WSquare",
    "ZBox",
    "ZPlus",
    "linear_operation",
    "register",
    "rule",
]

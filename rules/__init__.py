"""The operations and their rules, one file per family, in one registry by exact node name."""

from dynlrp.rules import (  # noqa: F401  the imports fill the registry
    addition,
    attention,
    binary,
    blocked,
    complex,
    elementwise,
    functions,
    indexing,
    inplace,
    linalg,
    linear,
    normalization,
    padding,
    pooling,
    product,
    recurrent,
    reduction,
    sampling,
    shape,
    sparse,
    submodule,
)
from dynlrp.rules.addition import EpsilonSum, Magnitude
from dynlrp.rules.attention import Attention, SoftmaxVJP
from dynlrp.rules.elementwise import Secant
from dynlrp.rules.expansion import Expand, expand
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
    Taylor,
    linear_operation,
    register,
    rule,
)
from dynlrp.rules.product import Shares, Ungated
from dynlrp.rules.submodule import Whole

__all__ = [
    "REGISTRY",
    "VJP",
    "AlphaBeta",
    "Attention",
    "Epsilon",
    "EpsilonSum",
    "Expand",
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
    "Taylor",
    "Ungated",
    "WSquare",
    "Whole",
    "ZBox",
    "ZPlus",
    "expand",
    "linear_operation",
    "register",
    "rule",
]

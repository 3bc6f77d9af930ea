"""Layer-wise Relevance Propagation for any PyTorch model, operation by operation."""

from dynlrp import rules
from dynlrp._version import __version__
from dynlrp.composite import COMPOSITES, Composite, When, epsilon_gamma_box
from dynlrp.coverage import Coverage, coverage
from dynlrp.errors import (
    BrokenPromiseError,
    CompiledModuleError,
    DynLRPError,
    FreedGraphError,
    InputError,
    NonFiniteError,
    NoPathError,
    RuleError,
    TargetError,
    TrainingModeError,
    UnknownOperationError,
)
from dynlrp.explain import explain, relevance
from dynlrp.explanation import Explanation
from dynlrp.ledger import Ledger

__all__ = [
    "COMPOSITES",
    "BrokenPromiseError",
    "CompiledModuleError",
    "Composite",
    "Coverage",
    "DynLRPError",
    "Explanation",
    "FreedGraphError",
    "InputError",
    "Ledger",
    "NoPathError",
    "NonFiniteError",
    "RuleError",
    "TargetError",
    "TrainingModeError",
    "UnknownOperationError",
    "When",
    "__version__",
    "coverage",
    "epsilon_gamma_box",
    "explain",
    "relevance",
    "rules",
]

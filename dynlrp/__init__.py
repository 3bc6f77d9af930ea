"""Layer-wise Relevance Propagation for any PyTorch model, operation by operation."""

from dynlrp import rules
from dynlrp._version import __version__
from dynlrp.allocation import Allocation, Budget, allocate
from dynlrp.attribution import LRP
from dynlrp.bilrp import Interaction, bilrp
from dynlrp.composite import COMPOSITES, Composite, When, epsilon_gamma_box
from dynlrp.condition import Part
from dynlrp.coverage import Coverage, coverage
from dynlrp.errors import (
    BrokenPromiseError,
    BudgetError,
    CompiledModuleError,
    ConversionError,
    DynLRPError,
    FreedGraphError,
    InputError,
    NonFiniteError,
    NoPathError,
    NotDifferentiableError,
    RuleError,
    TargetError,
    TraceError,
    TrainingModeError,
    UnknownOperationError,
    UnsupportedOperatorError,
)
from dynlrp.explain import explain, explain_many, relevance
from dynlrp.explanation import Explanation
from dynlrp.generation import Generation, explain_generation
from dynlrp.ledger import Ledger
from dynlrp.onnx import load_onnx
from dynlrp.program import Program, trace
from dynlrp.target import Contrast

__all__ = [
    "COMPOSITES",
    "LRP",
    "Allocation",
    "BrokenPromiseError",
    "Budget",
    "BudgetError",
    "CompiledModuleError",
    "Composite",
    "Contrast",
    "ConversionError",
    "Coverage",
    "DynLRPError",
    "Explanation",
    "FreedGraphError",
    "Generation",
    "InputError",
    "Interaction",
    "Ledger",
    "NoPathError",
    "NonFiniteError",
    "NotDifferentiableError",
    "Part",
    "Program",
    "RuleError",
    "TargetError",
    "TraceError",
    "TrainingModeError",
    "UnknownOperationError",
    "UnsupportedOperatorError",
    "When",
    "__version__",
    "allocate",
    "bilrp",
    "coverage",
    "epsilon_gamma_box",
    "explain",
    "explain_generation",
    "explain_many",
    "load_onnx",
    "relevance",
    "rules",
    "trace",
]

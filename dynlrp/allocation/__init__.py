"""Mixed-precision quantization: how many bits every layer gets."""

import dynlrp.allocation.activations
import dynlrp.allocation.gradients
import dynlrp.allocation.measured
import dynlrp.allocation.relevance
import dynlrp.allocation.weights  # noqa: F401  (they enter their scores)
from dynlrp.allocation.allocation import Allocation, Row, allocate
from dynlrp.allocation.budget import Budget
from dynlrp.allocation.calibration import Calibration
from dynlrp.allocation.divergence import Divergence
from dynlrp.allocation.layers import Layer, find_layers, left_out
from dynlrp.allocation.operand_scores import OPERAND_SCORES
from dynlrp.allocation.operands import Activations, Operand, allocate_activations
from dynlrp.allocation.quantizer import Quantizer, quantized
from dynlrp.allocation.scores import SCORES, Score, Scores, Task, measure, score

__all__ = [
    "OPERAND_SCORES",
    "SCORES",
    "Activations",
    "Allocation",
    "Budget",
    "Calibration",
    "Divergence",
    "Layer",
    "Operand",
    "Quantizer",
    "Row",
    "Score",
    "Scores",
    "Task",
    "allocate",
    "allocate_activations",
    "find_layers",
    "left_out",
    "measure",
    "quantized",
    "score",
]

"""Which entries of a tensor are there, and which were written by padding."""

from __future__ import annotations

import torch
from torch import Tensor

from dynlrp.graph import Edge, Graph, Operands
from dynlrp.rules.operation import REGISTRY


def there(graph: Graph, edge: Edge | None) -> Tensor | None:
    """1 for the entries of a tensor and 0 for those that an operation before it wrote itself, where nothing but
    movements of entries lies in between; None where there are no such."""
    movements = []
    while edge is not None and edge.output == 0:
        operation, operands = REGISTRY.get(graph.names[edge.node]), graph.operands[edge.node]
        if operation is None or operation.replay is None or operation.copies is not True or len(operands) != 1:
            break
        movements.append((graph.nodes[edge.node], operation))
        edge = operands[0]
    while movements and movements[-1][1].writes is None:
        movements.pop()
    if not movements:
        return None
    below, output = movements[-1][0].next_functions[0]
    given = below._input_metadata[output]
    mask = torch.ones(given.shape, dtype=given.dtype, device=given.device)
    for node, operation in reversed(movements):
        assert operation.replay is not None
        mask = operation.replay(Operands(node), mask)
        if not isinstance(mask, Tensor):  # the first of several outputs
            mask = mask[0]
    return mask

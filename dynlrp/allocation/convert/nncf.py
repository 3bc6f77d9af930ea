"""NNCF: weights of 4 and 8 bits in a PyTorch model, for OpenVINO."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from dynlrp.allocation.convert.check import by_width, check, not_in
from dynlrp.allocation.extras import needs
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.quantizer import Quantizer
from dynlrp.errors import InputError


def nncf_passes(
    model: nn.Module, bits: Mapping[str, int], example: Any, quantizer: Quantizer | None = None
) -> list[dict[str, Any]]:
    """Options of ``nncf.compress_weights``, one pass for each number of bits.

    To be run one after the other, ``model = nncf.compress_weights(model, **options)``. NNCF names what the model
    computes, not its modules, so a copy of the model runs once to tell them apart. Scales are float16. Layers of 8 bits
    have a scale for each channel, whatever the group size.

    Args:
        model: as it is before quantization.
        bits: by layer, 4 or 8; convolutions 8.
        example: inputs of the model: a tensor, a tuple of them, or a mapping of keyword arguments.
        quantizer: what the bits were chosen with; by default ``Quantizer()``.

    Raises:
        ConversionError: NNCF cannot take a layer.
    """
    quantizer = quantizer or Quantizer()

    def refuse(layer: Layer, number: int) -> str | None:
        if layer.elsewhere:
            return f"its weight is also {', '.join(layer.elsewhere)}, which NNCF would change with it"
        if isinstance(layer.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if quantizer.per_tap:
                return "a convolution, with a scale for each filter: allocate with Quantizer(per_tap=False)"
            return not_in((8,), number)
        if not isinstance(layer.module, nn.Linear):
            return f"a {type(layer.module).__name__}, where NNCF has Linear and Conv1d to Conv3d"
        return not_in((4, 8), number)

    layers = check("NNCF", model, bits, refuse)
    if isinstance(model, nn.Sequential):
        raise InputError("NNCF adds a child to the model, which nn.Sequential would run: put it inside a module")
    with needs("nncf"):
        import nncf
        from nncf.torch import wrap_model
    graph = wrap_model(copy.deepcopy(model), example_input=example, trace_parameters=True).get_graph()
    users = {
        node.node_name: {user.node_name for user in graph.get_next_nodes(node)}
        for node in graph.get_all_nodes()
        if node.node_type == "nncf_model_const"
    }
    operations: dict[str, set[str]] = {
        layer.name: {user for module in layer.modules for user in users.get(f"{module}.weight", ())}
        for layer, _ in layers
    }
    idle = [name for name, operation in operations.items() if not operation]
    if idle:
        raise InputError(f"the example does not run {idle}")
    kind = "SYM" if quantizer.symmetric else "ASYM"
    passes = []
    for width, found in by_width(layers).items():
        keep: set[str] = set().union(*(operations[layer.name] for layer in found))
        others = sorted(set().union(*users.values()) - keep)
        options = {
            "mode": nncf.CompressWeightsMode[f"INT{width}_{kind}"],
            "dataset": nncf.Dataset([example]),
            "ignored_scope": nncf.IgnoredScope(names=others),
        }
        if width == 4:
            size = -1 if quantizer.group_size is None else quantizer.group_size
            options |= {"group_size": size, "all_layers": True, "ratio": 1.0, "backup_mode": nncf.BackupMode.NONE}
        passes.append(options)
    return passes

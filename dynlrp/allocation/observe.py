"""What layers are given and give while the model runs, and gradients of what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dynlrp.allocation.layers import Layer
from dynlrp.capture import module_output, own
from dynlrp.errors import InputError, NoPathError


@dataclass
class Call:
    """One run of a layer's module."""

    layer: Layer
    module: nn.Module
    input: Tensor
    version: int
    edge: GradientEdge | None
    """Where the gradient of the output arrives."""

    def given(self) -> Tensor:
        """The input, as it was."""
        if self.input._version != self.version:
            raise InputError(
                f"the input of layer {self.layer.name!r} was changed in place behind it: write that out of place"
            )
        return self.input


Watch = Callable[[Layer, nn.Module, Tensor, Tensor], Tensor | None]
"""Is told of a layer's module, its input and output; what it returns takes the output's place."""


@contextmanager
def watching(layers: Mapping[str, Layer], watch: Watch) -> Iterator[None]:
    """Call ``watch`` whenever a layer runs."""
    with ExitStack() as stack:
        for layer in layers.values():

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: Layer = layer) -> Tensor | None:
                given = args[0] if args else next(iter(kwargs.values()))
                if not isinstance(given, Tensor) or not isinstance(output, Tensor):
                    raise InputError(f"layer {layer.name!r} does not go from one tensor to one")
                layer.check_linear(module, given, output)
                return watch(layer, module, given, output)

            for module in layer.modules.values():
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def calls(layers: Mapping[str, Layer]) -> Iterator[list[Call]]:
    """Every run of a layer inside, with a graph behind its output whether or not the model is frozen."""
    found: list[Call] = []

    def watch(layer: Layer, module: nn.Module, given: Tensor, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            found.append(Call(layer, module, given.detach(), given._version, None))
            return None
        made = own(output) if output.requires_grad else module_output(output.detach().requires_grad_())
        found.append(Call(layer, module, given.detach(), given._version, get_gradient_edge(made)))
        return made

    with watching(layers, watch):
        yield found


def gradients(output: Tensor, start: Tensor, found: list[Call], keep: bool = False) -> list[Tensor | None]:
    """The gradient of ``(output * start).sum()`` with respect to the output of every call; None for one that does not
    matter."""
    edges = [call.edge for call in found if call.edge is not None]
    if not output.requires_grad or not edges:
        raise NoPathError("the output does not depend on any of the layers through differentiable operations")
    made = iter(torch.autograd.grad(output, edges, start, retain_graph=keep, allow_unused=True))
    return [None if call.edge is None else next(made) for call in found]


def by_layer(layers: Mapping[str, Layer], found: list[Call], grads: list[Tensor | None]) -> Iterator[
    tuple[Layer, list[tuple[Call, Tensor]]]
]:  # fmt: skip
    """The calls of each layer, in order of the layers, with their gradients."""
    graded: dict[str, list[tuple[Call, Tensor]]] = {name: [] for name in layers}
    for call, grad in zip(found, grads, strict=True):
        if grad is not None:
            graded[call.layer.name].append((call, grad))
    for name, layer in layers.items():
        yield layer, graded[name]

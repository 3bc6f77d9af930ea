"""Scores by gradients: how much the divergence from the model's output grows, to second order.

All start from a random probe ``v`` of the output with ``E[v v^T]`` the Hessian of the divergence there, so that one
backward pass per batch samples the curvature: ``g`` is the gradient of ``v . z`` with respect to a layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dynlrp.allocation.calibration import batch_size
from dynlrp.allocation.layers import Layer
from dynlrp.allocation.observe import Call, by_layer, calls, gradients
from dynlrp.allocation.samples import by_sample, samples_first
from dynlrp.allocation.scores import Task, score

Graded = list[tuple[Call, Tensor]]
"""The calls of a layer with the gradients of their outputs."""
NUMBERS = 2**26
"""How many numbers gradients of single samples may take at once."""


@score("gauss_newton", noise="none", normalise=False)
def gauss_newton(task: Task) -> Iterator[Tensor]:
    """``(sum g dy)^2`` with ``dy = (Q_b(W) - W) x``: twice the divergence that b bits in this layer make, in the
    Gauss-Newton approximation."""
    for layers, size in _backward(task):
        yield torch.stack([_changes(task, layer, graded, size).square() for layer, graded in layers], 1)


@score("modelopt", noise="none", normalise=False)
def modelopt(task: Task) -> Iterator[Tensor]:
    """``sum g^2 dy^2``, as the ``auto_quantize`` of NVIDIA's Model Optimizer has it: Gauss-Newton without what the
    elements of a layer's output do together."""
    for layers, size in _backward(task):
        yield torch.stack([_changes(task, layer, graded, size, 2) for layer, graded in layers], 1)


@score("fisher", noise="absolute", normalise=False)
def fisher(task: Task) -> Iterator[Tensor]:
    """``||dL/dW||^2 / n``, the mean trace of a layer's Fisher information, in place of the Hessian's as in HAWQ-V2
    (Dong et al. 2020)."""
    for layers, size in _backward(task):
        traces = [
            squared_gradients(layer, graded, size, torch.ones(1, *layer.weight.shape)) / layer.weights
            for layer, graded in layers
        ]
        yield torch.cat(traces, 1)


@score("weight_error", noise="none", normalise=False)
def weight_error(task: Task) -> Iterator[Tensor]:
    """``sum_ij (dL/dw_ij dw_ij)^2`` with ``dW = Q_b(W) - W``: gradient times error of every weight, squared.

    This is Gauss-Newton for errors of which no two have to do with each other. Those of one layer alone do; but when
    all layers are rounded together, what cancelled in one no longer does.
    """
    for layers, size in _backward(task):
        yield torch.stack(
            [squared_gradients(layer, graded, size, squared_errors(task, layer)) for layer, graded in layers], 1
        )


@torch.no_grad()
def squared_errors(task: Task, layer: Layer) -> Tensor:
    """``dW^2`` of every candidate, ``(candidates, *weight)``."""
    return torch.stack([task.error(layer, bits) for bits in task.candidates]).square()


def _backward(task: Task) -> Iterator[tuple[list[tuple[Layer, Graded]], int]]:
    """The layers with their graded calls and the number of samples, for each batch and probe."""
    generator = torch.Generator().manual_seed(task.seed)
    for batch in task.batches():
        with torch.enable_grad(), calls(task.layers) as found:
            output = task.run(batch)
        probe = task.divergence.probe(output, generator, batch)
        yield list(by_layer(task.layers, found, gradients(output, probe, found))), batch_size(batch)


@torch.no_grad()
def _changes(task: Task, layer: Layer, graded: Graded, size: int, power: int = 1) -> Tensor:
    """``sum (g dy)^power`` of each sample and candidate, ``(samples, candidates)``."""
    columns = []
    for bits in task.candidates:
        error = task.error(layer, bits)
        total = torch.zeros(size, dtype=torch.float64)
        for call, grad in graded:
            product = (grad * layer.linear(call.module, call.given(), error)) ** power
            total += by_sample(product, size, layer.name).sum(1, dtype=torch.float64).cpu()
        columns.append(total)
    return torch.stack(columns, 1)


@torch.no_grad()
def squared_gradients(layer: Layer, graded: Graded, size: int, factors: Tensor) -> Tensor:
    """``sum (dL/dW)^2 f`` of each sample and factor ``f``, ``(samples, factors)``; ``factors`` are ``(factors,
    *weight)``."""
    if not graded:
        return torch.zeros(size, len(factors), dtype=torch.float64)
    weight = layer.weight.detach()
    columns = factors.to(weight).flatten(1).mT

    def gradient(inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
        def outputs(weight: Tensor) -> list[Tensor]:
            return [layer.linear(call.module, x, weight) for (call, _), x in zip(graded, inputs, strict=True)]

        (found,) = torch.func.vjp(outputs, weight)[1](grads)
        squares: Tensor = found.square().flatten() @ columns
        return squares

    inputs = [samples_first(call.given(), size, layer.name) for call, _ in graded]
    grads = [samples_first(grad, size, layer.name) for _, grad in graded]
    chunk = max(1, NUMBERS // layer.weights)
    found: Tensor = torch.func.vmap(gradient, chunk_size=chunk)(inputs, grads)
    return found.to("cpu", torch.float64)

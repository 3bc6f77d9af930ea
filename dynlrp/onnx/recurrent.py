"""Recurrent operators, by PyTorch's kernels where they compute the same, else step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynlrp.errors import InputError
from dynlrp.onnx.node import Node, operator


def _run(
    node: Node,
    gates: int,
    order: Sequence[int],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``order`` are the gates as PyTorch has them, by their places in ONNX."""
    if lengths is not None and bool((lengths != x.shape[1 if node.get("layout", 0) else 0]).any()):
        raise InputError(f"{node.kind} with samples of several lengths is not read")
    if "clip" in node.attributes or node.get("input_forget", 0):
        raise InputError(f"{node.kind} with clip or input_forget is not read")
    batch_first = bool(node.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    directions, size = w.shape[0], r.shape[-1]
    start = [None if s is None else s.transpose(0, 1) if batch_first else s for s in (h, c)]
    h, c = (x.new_zeros(directions, x.shape[1], size) if s is None else s for s in start)

    def sorted_(v: Tensor) -> Tensor:
        parts = v.chunk(gates, 0)
        return torch.cat([parts[place] for place in order]) if list(order) != list(range(gates)) else v

    reverse = node.get("direction", "forward") == "reverse"
    outputs, ends, cells = [], [], []
    for number in range(directions):
        backwards = reverse or number == 1
        given = x.flip(0) if backwards else x
        weights = [sorted_(w[number]), sorted_(r[number])]
        if b is not None:
            weights += [sorted_(part) for part in b[number].chunk(2)]
        y, end, cell = _one(node, given, weights, h[number : number + 1], c[number : number + 1])
        outputs.append(y.flip(0) if backwards else y)
        ends.append(end)
        cells.append(cell)
    y, h, c = torch.stack(outputs, 1), torch.cat(ends), torch.cat(cells)
    if batch_first:
        return y.permute(2, 0, 1, 3), h.transpose(0, 1), c.transpose(0, 1)
    return y, h, c


def _one(node: Node, x: Tensor, weights: list[Tensor], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One direction."""
    biased = len(weights) == 4
    settings: tuple[Any, ...] = (weights, biased, 1, 0.0, False, False, False)
    if node.kind == "LSTM":
        y, h, c = torch.lstm(x, [h, c], *settings)
        return y, h, c
    if node.kind == "RNN":
        kernel = {"Tanh": torch.rnn_tanh, "Relu": torch.rnn_relu}[node.get("activations", ["Tanh"])[0]]
        y, h = kernel(x, h, *settings)
        return y, h, c
    if node.get("linear_before_reset", 0):
        y, h = torch.gru(x, h, *settings)
        return y, h, c
    return (*_reset_before(x, weights, h), c)


def _reset_before(x: Tensor, weights: list[Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    """A GRU that resets the state before its matrix product."""
    w, r, *biases = weights
    size = r.shape[-1]
    given, state, found = x @ w.T + sum(biases), h[0], []
    for step in given:
        gates = torch.sigmoid(step[:, : 2 * size] + state @ r[: 2 * size].T)
        reset, update = gates[:, :size], gates[:, size:]
        new = torch.tanh(step[:, 2 * size :] + (reset * state) @ r[2 * size :].T)
        state = new + update * (state - new)
        found.append(state)
    return torch.stack(found), state.unsqueeze(0)


DEFAULT = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}


def _check(node: Node) -> None:
    given = node.get("activations")
    default = DEFAULT.get(node.kind)
    fits = given is None or (default is None and set(given) in ({"Tanh"}, {"Relu"}))
    if not fits and given != (default or []) * (len(given) // len(default or [1])):
        raise InputError(f"{node.kind} with the activations {', '.join(given)} is not read")


@operator("LSTM")
def _lstm(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(node)
    if peepholes is not None:
        raise InputError("LSTM with peepholes is not read")
    return _run(node, 4, (0, 2, 3, 1), x, w, r, b, lengths, h, c)  # ONNX has them as i, o, f, c


@operator("GRU")
def _gru(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(node)
    return _run(node, 3, (1, 0, 2), x, w, r, b, lengths, h, None)[:2]  # ONNX has them as z, r, h


@operator("RNN")
def _rnn(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(node)
    return _run(node, 1, (0,), x, w, r, b, lengths, h, None)[:2]

"""Recurrent layers and cells, re-run step by step in plain operations.

Inside, every operation has its own rule: products of a gate and a signal share equally, or give the signal all where
the composite says so for gates (Arras et al. 2017 and 2019: ``cplrp``). Saved values of the fused kernels are not
needed, so that layers which cannot be differentiated in eval mode (cuDNN's) are explained there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlrp.rules.expansion import expand

State = tuple[Tensor, ...]
"""The hidden state, and the cell state of an LSTM."""
Weights = Sequence[Tensor]
"""Of input and hidden state, their biases if there are any, and the projection if there is one."""

RELU, TANH, LSTM, GRU = range(4)
"""How the kernels number their modes."""


def _gates(x: Tensor, h: Tensor, weights: Weights, biased: bool) -> tuple[Tensor, Tensor]:
    biases = weights[2:4] if biased else (None, None)
    return F.linear(x, weights[0], biases[0]), F.linear(h, weights[1], biases[1])


def _simple(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def cell(x: Tensor, state: State, weights: Weights, biased: bool) -> State:
        a, b = _gates(x, state[0], weights, biased)
        return (activation(a + b),)

    return cell


def _lstm(x: Tensor, state: State, weights: Weights, biased: bool) -> State:
    a, b = _gates(x, state[0], weights, biased)
    h, c = lstm_state(a + b, state[1])
    projected = len(weights) in (3, 5)
    return (F.linear(h, weights[-1]) if projected else h), c


def lstm_state(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state from the sums of all four gates (input, forget, cell, output)."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, state: State, weights: Weights, biased: bool) -> State:
    return (gru_state(*_gates(x, state[0], weights, biased), state[0]),)


def gru_state(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Hidden state from the gates (reset, update, new) of input and hidden state."""
    (r, z, n), (r_h, z_h, n_h) = a.chunk(3, -1), b.chunk(3, -1)
    new = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (z + z_h).sigmoid() * (h - new) + new


CELLS: dict[int, Callable[..., State]] = {RELU: _simple(torch.relu), TANH: _simple(torch.tanh), LSTM: _lstm, GRU: _gru}


def _over_time(
    x: Tensor, state: State, cell: Callable[[Tensor, State], State], sizes: Sequence[int], reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction. ``sizes`` has the number of sequences that still run at each time of packed ones."""
    if not sizes:
        outputs: list[Tensor] = []
        for step in _times(len(x), reverse):
            state = cell(x[step], state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if reverse else outputs), state
    parts, ended = torch.split(x, list(sizes)), []
    running = tuple(s[: sizes[-1] if reverse else sizes[0]] for s in state)
    results: dict[int, Tensor] = {}
    for step in _times(len(sizes), reverse):
        size, before = sizes[step], len(running[0])
        if size < before:  # sequences end
            ended.append(tuple(s[size:] for s in running))
            running = tuple(s[:size] for s in running)
        elif size > before:  # backwards, sequences begin
            running = tuple(torch.cat([s, first[before:size]]) for s, first in zip(running, state, strict=True))
        running = cell(parts[step], running)
        results[step] = running[0]
    ended.append(running)
    last = tuple(torch.cat(parts) for parts in zip(*ended[::-1], strict=True))
    return torch.cat([results[step] for step in range(len(sizes))]), last


def _times(count: int, reverse: bool) -> Iterator[int]:
    return iter(range(count)[::-1] if reverse else range(count))


def _layers(
    x: Tensor,
    weights: Sequence[Tensor],
    states: State,
    *,
    mode: int,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    sizes: Sequence[int],
    projected: bool,
) -> tuple[Tensor, ...]:
    """All layers and directions; output and last states, which are stacked as the kernels do."""
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    biased = each - projected == 4
    if batch_first and not sizes:
        x = x.transpose(0, 1)
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : (number + 1) * each]

            def cell(x: Tensor, state: State, own: Weights = own) -> State:
                return CELLS[mode](x, state, own, biased)

            y, state = _over_time(x, tuple(s[number] for s in states), cell, sizes, direction == 1)
            outputs.append(y)
            last.append(state)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    if batch_first and not sizes:
        x = x.transpose(0, 1)
    return (x, *(torch.stack(list(s)) for s in zip(*last, strict=True)))


def _random(step: Any) -> None:
    if step.saved("train") and step.saved("dropout") > 0:
        raise ValueError("dropout between recurrent layers draws anew each time: call model.eval()")


def _at_hand(value: Tensor | None, kept: Any) -> Any:
    return kept if value is None else value


def _cudnn(step: Any, x: Tensor | None, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """``_cudnn_rnn`` and ``miopen_rnn``: operands are the input, the weights, hidden and cell state."""
    _random(step)
    kept = list(step.saved("weight"))
    weights = [_at_hand(w, k) for w, k in zip(operands, kept, strict=False)]
    mode = step.saved("mode")
    states = [_at_hand(operands[len(kept)], step.saved("hx"))]
    if mode == LSTM:
        states.append(_at_hand(operands[len(kept) + 1], step.saved("cx")))
    layers = step.saved("num_layers")
    directions = 2 if step.saved("bidirectional") else 1
    outputs = _layers(
        _at_hand(x, step.saved("input")), weights, tuple(states), mode=mode, layers=layers,
        bidirectional=directions == 2, batch_first=step.saved("batch_first"), sizes=list(step.saved("batch_sizes")),
        projected=len(kept) // (layers * directions) in (3, 5),
    )  # fmt: skip
    return (*outputs, None)


def _mps(step: Any, x: Tensor | None, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """``_lstm_mps``: operands are the input, hidden and cell state, the weights."""
    _random(step)
    states = [_at_hand(s, k) for s, k in zip(operands, step.saved("hx"), strict=False)]
    weights = [_at_hand(w, k) for w, k in zip(operands[2:], step.saved("params"), strict=True)]
    return _layers(
        _at_hand(x, step.saved("input")), weights, tuple(states), mode=LSTM, layers=step.saved("num_layers"),
        bidirectional=step.saved("bidirectional"), batch_first=step.saved("batch_first"), sizes=(), projected=False,
    )  # fmt: skip


def _mkldnn(step: Any, x: Tensor | None, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """``mkldnn_rnn_layer``: one layer in one direction; operands are the input, four weights, both states."""
    weights = [_at_hand(w, step.saved(f"weight{i}")) for i, w in enumerate(operands[:4])]
    weights = weights if step.saved("has_biases") else weights[:2]
    x = _at_hand(x, step.saved("input"))
    state = (_at_hand(operands[4], step.saved("hx_")), _at_hand(operands[5], step.saved("cx_")))

    def cell(x: Tensor, state: State) -> State:
        return _lstm(x, state, weights, bool(step.saved("has_biases")))

    assert x is not None
    y, (h, c) = _over_time(x, state, cell, list(step.saved("batch_sizes")), step.saved("reverse"))
    return y, h, c


def _cell_operands(step: Any, operands: Sequence[Tensor | None], state: str) -> list[Any]:
    names = ("input_gates", "hidden_gates", state, "input_bias", "hidden_bias")
    return [_at_hand(value, step.saved(name)) for value, name in zip(operands, names, strict=True)]


def _lstm_cell(step: Any, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, c, *biases = _cell_operands(step, operands, "cx")
    gates = a + b
    for bias in biases:
        gates = gates if bias is None else gates + bias
    return (*lstm_state(gates, c), None)


def _gru_cell(step: Any, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, h, *biases = _cell_operands(step, operands, "hx")
    a, b = (gates if bias is None else gates + bias for gates, bias in zip((a, b), biases, strict=True))
    return gru_state(a, b, h), None


for _name in ("CudnnRnnBackward0", "MiopenRnnBackward0"):
    expand(_name, _cudnn, "recurrent", saved={0: "input"}, own_dtype=True)
expand("LstmMpsBackward0", _mps, "recurrent", saved={0: "input"}, own_dtype=True)
expand("MkldnnRnnLayerBackward0", _mkldnn, "recurrent", saved={0: "input", 5: "hx_", 6: "cx_"}, own_dtype=True)
expand("ThnnFusedLstmCellBackward0", _lstm_cell, "recurrent", saved={0: "input_gates", 1: "hidden_gates", 2: "cx"})
expand("ThnnFusedGruCellBackward0", _gru_cell, "recurrent", saved={0: "input_gates", 1: "hidden_gates", 2: "hx"})

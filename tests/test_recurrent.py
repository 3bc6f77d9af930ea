"""Recurrent layers: the fused kernels against the layers written out, and Arras' rules against loops over time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlrp import explain
from dynlrp.rules import REGISTRY
from dynlrp.rules.recurrent import GRU, LSTM, RELU, TANH
from tests.conftest import close
from tests.oracle import draw

KERNEL = 2e-4
"""Relative to the largest value: the fused kernel computes in float32, through a dozen steps that each round."""


class Head(nn.Module):
    """A number per sample and direction from all times and the last state."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        last = state[0] if isinstance(state, tuple) else state
        batch = 0 if self.rnn.batch_first else 1
        return sum(s.movedim(d, 0).flatten(1).sum(1, keepdim=True) for s, d in ((y.tanh(), batch), (last, 1)))


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp", "epsilon_plus"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}],
    ids=["plain", "two layers, both ways", "no bias, batch first"],
)
def test_the_fused_lstm_equals_the_layer_written_out(options: dict[str, Any], frozen: bool, composite: str) -> None:
    """In float64 torch writes the layer out itself; in float32 it is one fused node per layer and direction."""
    model = Head(nn.LSTM(4, 5, **options)).double().eval().requires_grad_(not frozen)
    x = draw(1, 3, 3, 4)
    expected = explain(model, x, 0, composite=composite)
    model.float()
    fused = explain(model, x.float(), 0, composite=composite)
    close(fused.relevance.double(), expected.relevance, KERNEL)
    assert fused.ledger.closes
    for account, amount in expected.ledger.accounts.items():
        assert fused.ledger.accounts[account] == pytest.approx(amount, abs=KERNEL * abs(expected.ledger.output) + 1e-5)


def test_the_fused_kernel_was_met() -> None:
    x = torch.randn(3, 2, 4, requires_grad=True)
    y, _ = nn.LSTM(4, 5)(x)
    names, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        names.add(node.name())
        stack += [child for child, _ in node.next_functions if child is not None]
    assert "MkldnnRnnLayerBackward0" in names


@pytest.mark.parametrize(
    ("kind", "composite"),
    # A GRU's first product has a state of zeros: alone it is a constant and the gate takes all, as whether a
    # factor is a signal is known of whole tensors. So only "signal takes all" is the same for a GRU, and that only
    # where there is no bias, which a gate multiplies too.
    [(nn.LSTM, "attnlrp"), (nn.LSTM, "cplrp"), (nn.RNN, "attnlrp"), (nn.GRU, "cplrp")],
)
def test_packed_sequences_equal_each_on_its_own(kind: type[nn.RNNBase], composite: str) -> None:
    model = kind(4, 5, bidirectional=True, bias=kind is not nn.GRU).double().eval()
    x = draw(2, 4, 3, 4)
    lengths = [4, 2, 1]

    def packed(x: Tensor) -> Tensor:
        y, _ = model(nn.utils.rnn.pack_padded_sequence(x, lengths))
        padded, _ = nn.utils.rnn.pad_packed_sequence(y)
        return padded.tanh().sum((0, 2)).unsqueeze(1)

    together = explain(lambda x: packed(x.transpose(0, 1)), x.transpose(0, 1), 0, composite=composite)
    assert together.ledger.closes
    for number, length in enumerate(lengths):
        alone = explain(
            lambda x: model(x.transpose(0, 1))[0].tanh().sum((0, 2)).unsqueeze(1),
            x[:length, number].unsqueeze(0), 0, composite=composite,
        )  # fmt: skip
        close(together.relevance[number, :length], alone.relevance[0])
        assert not together.relevance[number, length:].any()


def test_signal_takes_all_and_half() -> None:
    """One LSTM step by hand: c = i g and h = o tanh(c), with gates i and o."""
    model = nn.LSTM(3, 2).double().eval()
    x = draw(3, 1, 1, 3)
    w, b = model.weight_ih_l0.detach(), (model.bias_ih_l0 + model.bias_hh_l0).detach()
    z = (w @ x.flatten() + b).chunk(4)
    i, g, o = z[0].sigmoid(), z[2].tanh(), z[3].sigmoid()
    w_i, w_g, w_o = w[0:2], w[4:6], w[6:8]
    c = i * g
    secant = {name: f / a for name, f, a in (("g", g, z[2]), ("c", c.tanh(), c))}
    all_ = (o * secant["c"] * i * secant["g"]) @ w_g
    found = explain(lambda x: model(x)[0].sum((0, 2)).unsqueeze(1), x, 0, composite="cplrp")
    close(found.relevance.flatten(), all_ * x.flatten())
    slope = {n: (f - 0.5) / a for n, f, a in (("i", i, z[0]), ("o", o, z[3]))}
    down = o * secant["c"] / 2
    half = (down * i * secant["g"] / 2) @ w_g + (down * g * slope["i"] / 2) @ w_i + (c.tanh() * slope["o"] / 2) @ w_o
    found = explain(lambda x: model(x)[0].sum((0, 2)).unsqueeze(1), x, 0, composite="attnlrp")
    close(found.relevance.flatten(), half * x.flatten())


# Kernels of other devices: their re-run equals the layer's own forward. -------------------------------------


def kernel(**saved: Any) -> Any:
    return SimpleNamespace(saved=lambda name: saved[name])


@pytest.mark.parametrize("mode", [RELU, TANH, LSTM, GRU])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
)
@pytest.mark.parametrize("lengths", [(), (4, 2, 2)], ids=["padded", "packed"])
@torch.no_grad()
def test_cudnn_layers_rerun(mode: int, options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    kinds: dict[int, Any] = {LSTM: nn.LSTM, GRU: nn.GRU}
    options = {**options, **({} if mode in kinds else {"nonlinearity": "relu" if mode == RELU else "tanh"})}
    model: nn.RNNBase = kinds.get(mode, nn.RNN)(4, 5, **options).double()
    directions = 2 if model.bidirectional else 1
    first = model.batch_first and not lengths
    x = draw(4, 3, 4, 4) if first else draw(4, 4, 3, 4)
    given: Any = x
    sizes: list[int] = []
    if lengths:
        given = nn.utils.rnn.pack_padded_sequence(x, list(lengths), batch_first=False)
        sizes, x = given.batch_sizes.tolist(), given.data
    h = draw(5, model.num_layers * directions, 3, 5)
    c = draw(6, model.num_layers * directions, 3, 5)
    output, state = model(given, (h, c) if mode == LSTM else h)
    step = kernel(
        input=x, weight=list(model._flat_weights), hx=h, cx=c, mode=mode, num_layers=model.num_layers,
        bidirectional=model.bidirectional, batch_first=model.batch_first, batch_sizes=sizes, train=False, dropout=0.0,
    )  # fmt: skip
    replay = REGISTRY["CudnnRnnBackward0"].replay
    assert replay is not None
    found = replay(step, None, *[None] * (len(model._flat_weights) + 2))
    close(found[0], output.data if lengths else output)
    for ours, expected in zip(found[1:], state if mode == LSTM else (state,), strict=False):
        close(ours, expected)


@torch.no_grad()
def test_cells_rerun() -> None:
    x, h, c = draw(7, 3, 4), draw(8, 3, 5), draw(9, 3, 5)
    cell = nn.LSTMCell(4, 5).double()
    step = kernel(
        input_gates=x @ cell.weight_ih.T, hidden_gates=h @ cell.weight_hh.T, cx=c, input_bias=cell.bias_ih,
        hidden_bias=cell.bias_hh,
    )  # fmt: skip
    replay = REGISTRY["ThnnFusedLstmCellBackward0"].replay
    assert replay is not None
    for ours, expected in zip(replay(step, *[None] * 5), cell(x, (h, c)), strict=False):
        close(ours, expected)
    gru = nn.GRUCell(4, 5).double()
    step = kernel(
        input_gates=x @ gru.weight_ih.T, hidden_gates=h @ gru.weight_hh.T, hx=h, input_bias=gru.bias_ih,
        hidden_bias=gru.bias_hh,
    )  # fmt: skip
    replay = REGISTRY["ThnnFusedGruCellBackward0"].replay
    assert replay is not None
    close(replay(step, *[None] * 5)[0], gru(x, h))

"""On an accelerator: the same relevance as on the CPU in float64, and the node names that exist only there."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynlrp import explain, explain_many, trace
from dynlrp.walk import Walk
from tests.conftest import SAMPLES, sample
from tests.peers import models as peers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SINGLE = 2e-3
"""Relative to the largest value: float32 through a dozen layers, whose sums are added up in another order there."""
HALF = {torch.float16: 0.02, torch.bfloat16: 0.1}
"""Rounding of activations and multipliers to 11 or 8 bits, a few layers deep. A wrong formula is off by its factors."""


@pytest.fixture(autouse=True)
def _all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions have the ten binary digits of TF32 there by default, and each kernel rounds in another way."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(inputs: Any, dtype: torch.dtype, device: str = "cuda") -> Any:
    if isinstance(inputs, dict):
        return {name: moved(value, dtype, device) for name, value in inputs.items()}
    return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    ours = ours.double().cpu()
    assert bool(torch.isfinite(ours).all())
    assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max())


def names(output: Tensor) -> set[str]:
    """Node names behind an output."""
    found, stack, seen = set(), [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(node.name())
        stack += [child for child, _ in node.next_functions]
    return found


@pytest.mark.parametrize("composite", ["auto", "attnlrp", "epsilon_plus"])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "efficientnet"])
def test_models_equal_the_cpu(name: str, composite: str) -> None:
    model, inputs, target = sample(name)
    expected = explain(model, inputs, target, composite=composite)
    try:
        model.to("cuda", torch.float32)
        found = explain(model, moved(inputs, torch.float32), target, composite=composite)
        close(found.tensors()[0], expected.tensors()[0], SINGLE)
        assert found.ledger.closes
    finally:
        model.to("cpu", torch.float64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"backend": "cudagraphs"}) for name in ("vgg", "resnet", "vit", "bert", "gpt2", "llama")),
        *((name, {"mode": "reduce-overhead"}) for name in ("vgg", "bert", "llama")),
    ],
)
def test_programs_in_one_launch_equal_the_cpu(name: str, options: dict[str, str]) -> None:
    model, inputs, target = sample(name)
    other = {**inputs, "input_ids": inputs["input_ids"].roll(1)} if isinstance(inputs, dict) else inputs.flip(0) * 0.9
    try:
        expected = [explain(model, given, target) for given in (inputs, other)]
        model.to("cuda", torch.float32)
        program = trace(model, moved(inputs, torch.float32), target).compile(**options)
        found = [program(moved(given, torch.float32)) for given in (inputs, other, inputs, other)]
        for ours, theirs in zip(found, expected * 2, strict=True):
            close(ours.tensors()[0], theirs.tensors()[0], SINGLE)
            assert ours.ledger.closes
    finally:
        model.to("cpu", torch.float64)


@pytest.mark.parametrize("name", ["vgg", "resnet", "bert", "llama"])
def test_many_targets_and_conditions_equal_the_cpu(name: str) -> None:
    model, inputs, target = sample(name)
    layer = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    targets = [(-1, 0), (-1, 3)] if isinstance(target, tuple) else [0, 2]
    pairs: dict[str, Any] = {"targets": targets, "conditions": [{}, {layer: [0, 2, 3]}]}
    expected = explain_many(model, inputs, **pairs)
    try:
        model.to("cuda", torch.float32)
        for found, wanted in zip(explain_many(model, moved(inputs, torch.float32), **pairs), expected, strict=True):
            close(found.tensors()[0], wanted.tensors()[0], SINGLE)
            assert found.ledger.closes
    finally:
        model.to("cpu", torch.float64)


BACKENDS: dict[str, tuple[SDPBackend, torch.dtype]] = {
    "ScaledDotProductFlashAttentionBackward0": (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    "ScaledDotProductEfficientAttentionBackward0": (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    "ScaledDotProductCudnnAttentionBackward0": (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
    "BmmBackward0": (SDPBackend.MATH, torch.float32),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_kernels(name: str, composite: str, causal: bool) -> None:
    backend, dtype = BACKENDS[name]
    q, k, v = (torch.randn(2, 4, 32, 16, dtype=dtype, device="cuda") for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).float().double().flatten(1)

    expected = explain(attend, tuple(x.cpu().double() for x in (q, k, v)), 3, composite=composite)
    with sdpa_kernel(backend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        assert name in names(attend(*leaves))
        found = explain(attend, (q, k, v), 3, composite=composite)
    for ours, theirs in zip(found.relevance, expected.relevance, strict=True):
        if theirs is None or not theirs.any():
            assert ours is None or not ours.any()
        else:
            close(ours, theirs, HALF.get(dtype, 1e-4))


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "BmmBackward0"])
def test_fused_attention_takes_memory_linear_in_the_length(name: str, composite: str) -> None:
    backend, dtype = BACKENDS[name]

    def peak(length: int) -> int:
        given = tuple(torch.randn(1, 4, length, 64, dtype=dtype, device="cuda") for _ in range(3))
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        explain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).flatten(1), given, 3, composite=composite)
        return torch.cuda.max_memory_allocated() - before

    with sdpa_kernel(backend):
        peak(1024)  # which makes the workspaces of libraries
        # Eight times; the weights themselves would take 64 times.
        assert peak(16384) < 9 * peak(2048)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], train: bool) -> None:
    """CuDNN's layers cannot be differentiated in eval mode; they are explained there all the same."""
    model = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return model(x)[0].flatten(1)

    expected = explain(score, x, 7).relevance
    model.to("cuda", torch.float32).train(train)
    assert "CudnnRnnBackward0" in names(score(x.cuda().float().requires_grad_()))
    close(explain(score, x.cuda().float(), 7).relevance, expected, SINGLE)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(kind: Any) -> None:
    model = kind(4, 5).double()
    x = torch.randn(3, 4, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        state = model(x)
        state = model(x * 2, state)
        return state[0] if isinstance(state, tuple) else state

    expected = explain(score, x, 1).relevance
    model.to("cuda", torch.float32)
    assert any(name.startswith("ThnnFused") for name in names(score(x.cuda().float().requires_grad_())))
    close(explain(score, x.cuda().float(), 1).relevance, expected, SINGLE)


@pytest.mark.parametrize("composite", ["auto", "epsilon_plus"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("cudnn", [False, True])
def test_batch_norm(cudnn: bool, composite: str, train: bool) -> None:
    model = peers.randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)), 3
    ).double()
    model.train(train)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = explain(model, x, 1, composite=composite, allow_training=train).relevance
    model.to("cuda", torch.float32)
    with torch.backends.cudnn.flags(enabled=cudnn):
        y = model(x.cuda().float().requires_grad_())
        assert ("CudnnBatchNormBackward0" if cudnn else "NativeBatchNormBackward0") in names(y)
        found = explain(model, x.cuda().float(), 1, composite=composite, allow_training=train)
    close(found.relevance, expected, SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "gpt2", "llama"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As the CPU in float64 has it for the same rounded weights and inputs."""
    model, inputs, target = sample(name)
    rounded, given = copy.deepcopy(model).to("cuda", dtype), moved(inputs, dtype)
    found = explain(rounded, given, target, composite="attnlrp")
    expected = explain(
        rounded.to("cpu", torch.float64), moved(given, torch.float64, "cpu"), target, composite="attnlrp"
    )
    close(found.tensors()[0], expected.tensors()[0], HALF[dtype])


def waits(model: nn.Module, given: Any, composite: str = "auto") -> list[str]:
    """Places at which an explanation makes the host wait for the device, beside those of the model itself."""
    call: Callable[[], Any] = lambda: explain(model, given, composite=composite)  # noqa: E731
    call()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**given) if isinstance(given, dict) else model(given)
            forward = len(caught)
            call()  # which runs the model too
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught[forward:] if "dynlrp" in w.filename]


@contextmanager
def during_the_pass(
    monkeypatch: pytest.MonkeyPatch, enter: Callable[[], Any], leave: Callable[[], Any]
) -> Iterator[None]:
    """Do something just before relevance moves and just after."""
    run = Walk.run

    def watched(*given: Any) -> Any:
        enter()
        try:
            return run(*given)
        finally:
            leave()

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "run", watched)
        yield


@pytest.mark.parametrize("composite", ["auto", "attnlrp", "epsilon_plus"])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "efficientnet"])
def test_the_host_waits_for_nothing_while_relevance_moves(
    name: str, composite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, target = sample(name)
    profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))
    try:
        model, given = model.to("cuda", torch.float32), moved(inputs, torch.float32)
        explain(model, given, target, composite=composite)
        mode = torch.cuda.set_sync_debug_mode
        with during_the_pass(monkeypatch, lambda: mode("error"), lambda: mode("default")):
            explain(model, given, target, composite=composite)
        torch.cuda.synchronize()
        with during_the_pass(monkeypatch, profiler.start, profiler.stop):
            explain(model, given, target, composite=composite)
    finally:
        model.to("cpu", torch.float64)
    seen = {event.key for event in profiler.key_averages()}
    assert "cudaLaunchKernel" in seen
    assert not {key for key in seen if "DtoH" in key or key in ("cudaStreamSynchronize", "cudaEventSynchronize")}


@pytest.mark.parametrize("composite", ["auto", "attnlrp"])
@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "gpt2", "llama"])
def test_the_host_waits_in_the_end_alone(name: str, composite: str) -> None:
    """The host waits in the end alone, to see that everything is finite, and that constants nobody kept are zero."""
    model, inputs, _ = sample(name)
    try:
        places = waits(model.to("cuda", torch.float32), moved(inputs, torch.float32), composite)
    finally:
        model.to("cpu", torch.float64)
    # Which embedding an input with copied ids belongs to is seen before the pass.
    assert len([place for place in places if "explain.py" not in place]) <= 2, places


def test_large_buffers_that_hold_the_same_are_not_compared_there() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).cuda()
    for name in ("mask", "other"):
        model.register_buffer(name, torch.ones(300, 300, device="cuda"))
    alone = waits(nn.Sequential(nn.Linear(4, 3)).cuda(), torch.rand(2, 4).cuda())
    assert waits(model, torch.rand(2, 4).cuda()) == alone

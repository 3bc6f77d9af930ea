"""All the ways graphs are made: whatever PyTorch lets a model do, it is explained like the plain model, or refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from dynlrp import BrokenPromiseError, Explanation, NoPathError, UnknownOperationError, explain, relevance
from tests.conftest import Apply, Opaque, close, same, sample
from tests.oracle import draw
from tests.peers import models as peers

COMPOSITES = ["attnlrp", "epsilon_plus", "dynamiclrp"]
X = draw(0, 4, 6)

Block = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A residual net; ``run(block, x)`` is how its blocks are called."""

    def __init__(self, run: Callable[[Block, Tensor], Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.first, self.last, self.run = nn.Linear(6, 6), nn.Linear(6, 3), run
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU()) for _ in range(2)]
        )
        peers.randomise(self, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.last(x)


@pytest.fixture(params=COMPOSITES)
def composite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[False, True], ids=["trainable", "frozen"])
def frozen(request: pytest.FixtureRequest) -> bool:
    flag: bool = request.param
    return flag


def plain(composite: str, frozen: bool = False, **options: Any) -> Explanation:
    return explain(Net().requires_grad_(not frozen), X, 1, composite=composite, **options)


# Checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"determinism_check": "none"}, {"preserve_rng_state": False}], ids=str)
def test_checkpoints_that_are_not_reentrant(composite: str, frozen: bool, options: dict[str, Any]) -> None:
    """What they save is recomputed where relevance needs it."""
    model = Net(lambda block, x: checkpoint(block, x, use_reentrant=False, **options)).requires_grad_(not frozen)
    found = explain(model, X, 1, composite=composite, layers=["blocks.0", "first"], parameters="blocks.1.*")
    expected = plain(composite, frozen, layers=["blocks.0", "first"], parameters="blocks.1.*")
    same(found, expected)
    for name in expected.layers:
        close(found.layers[name], expected.layers[name])
    for name, value in expected.parameters.items():
        close(found.parameters[name], value)


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_embedding_inside_a_checkpoint(by_hand: bool, composite: str, frozen: bool) -> None:
    """Its indices are read from what the checkpoint saves."""

    class Model(nn.Module):
        def __init__(self, checkpoints: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head, self.checkpoints = nn.Embedding(6, 4), nn.Linear(4, 3), checkpoints

        def embed(self, ids: Tensor) -> Tensor:
            return (self.words.weight[ids] if by_hand else self.words(ids)).sigmoid()

        def forward(self, ids: Tensor) -> Tensor:
            h = checkpoint(self.embed, ids, use_reentrant=False) if self.checkpoints else self.embed(ids)
            return self.head(h.mean(1))

    ids = torch.tensor([[1, 2, 0], [3, 1, 4]])
    models = [Model(checkpoints).double().requires_grad_(not frozen) for checkpoints in (True, False)]
    same(*(explain(model, ids, 1, composite=composite) for model in models))


def test_a_checkpointed_transformer(frozen: bool) -> None:
    model, inputs, target = sample("gpt2")
    expected = explain(model, inputs, target)
    model = copy.deepcopy(model).requires_grad_(not frozen).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ran = 0
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda *_: counted())

    def counted() -> None:
        nonlocal ran
        ran += 1

    same(explain(model, {**inputs, "use_cache": False}, target, allow_training=True), expected)
    assert ran > 2 * len(model.transformer.h)  # it was recomputed


def test_a_reentrant_checkpoint_is_refused_with_its_cure(composite: str, frozen: bool) -> None:
    model = Net(lambda block, x: checkpoint(block, x, use_reentrant=True)).requires_grad_(not frozen)
    with pytest.raises(UnknownOperationError, match="use_reentrant=False") as caught:
        explain(model, X, 1, composite=composite)
    assert "CheckpointFunctionBackward" in str(caught.value)
    same(
        explain(Net(lambda block, x: checkpoint(block, x, use_reentrant=False)), X, 1, composite=composite),
        plain(composite),
    )


# Functions of modules ---------------------------------------------------------------------------------------


def test_functional_call(composite: str) -> None:
    model, parameters = Net(), dict(Net().named_parameters())
    same(explain(lambda x: functional_call(model, parameters, (x,)), X, 1, composite=composite), plain(composite))


def test_functional_call_with_other_weights(composite: str) -> None:
    """The weights that count are those that are given."""
    other = peers.randomise(Net().float(), 5).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    model = Net()
    found = explain(lambda x: functional_call(model, weights, (x,)), X, 1, composite=composite)
    same(found, explain(other, X, 1, composite=composite))


def test_functional_call_with_weights_that_are_constants() -> None:
    """Nothing tells that they are parameters: their biases are constants, which a second run records."""
    model = Net()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def function(x: Tensor) -> Tensor:
        return functional_call(model, weights, (x,))  # type: ignore[no-any-return]

    for composite in ("attnlrp", "auto", "epsilon_plus", "epsilon_alpha2_beta1"):
        found, expected = explain(function, X, 1, composite=composite), plain(composite)
        close(found.relevance, expected.relevance)
        assert found.ledger.closes
        assert found.ledger.accounts["constants"] == pytest.approx(expected.ledger.accounts["parameters"])
    x = X.clone().requires_grad_()
    with pytest.raises(BrokenPromiseError, match=r"give buffers and other constants as copies that do"):
        relevance(function(x)[:, 1], x, composite="epsilon_plus")


def test_vmap() -> None:
    """Inside it a linear layer is a product and a sum, so that rules by multiplier give the same."""
    model = Net()
    expected = plain("attnlrp")
    same(explain(lambda x: vmap(model)(x), X, 1, composite="attnlrp"), expected)
    chunks = nn.Module()
    chunks.inner, chunks.forward = model, lambda x: vmap(model, chunk_size=2)(x)  # type: ignore[method-assign]
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        same(explain(chunks, X, 1, composite="attnlrp"), expected)
    for composite in ("epsilon_plus", "dynamiclrp"):
        assert explain(chunks, X, 1, composite=composite).ledger.closes


def test_vmap_over_models() -> None:
    """An ensemble, whose mean is explained."""
    models = [peers.randomise(Net().float(), seed).double() for seed in range(3)]
    parameters, _ = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0])

    def single(weights: Any, x: Tensor) -> Tensor:
        return functional_call(base, weights, (x,))  # type: ignore[no-any-return]

    found = explain(lambda x: vmap(single, (0, None))(parameters, x).mean(0), X, 1, composite="attnlrp")
    expected = [explain(model, X, 1, composite="attnlrp") for model in models]
    close(found.relevance, sum(e.relevance for e in expected) / 3)
    assert found.ledger.closes


def test_vmap_over_pictures() -> None:
    model, inputs, _ = sample("vgg")
    found = explain(lambda x: vmap(lambda one: model(one[None])[0])(x), inputs, 1, composite="attnlrp")
    same(found, explain(model, inputs, 1, composite="attnlrp"))


@pytest.mark.parametrize("kind", ["grad", "jvp"])
def test_derivatives_inside_a_model_are_refused(kind: str) -> None:
    def model(x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.tanh(x).sum()

        if kind == "grad":
            return torch.func.grad(inner)(x)
        return torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1]

    with pytest.raises((UnknownOperationError, NoPathError)):
        explain(model, X, 1)


# Weights that are made on the way ---------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2.0

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2.0


def old_weight_norm(model: Net) -> None:
    torch.nn.utils.weight_norm(model.first)


def old_spectral_norm(model: Net) -> None:
    torch.nn.utils.spectral_norm(model.first)


def pruned(model: Net) -> None:
    prune.l1_unstructured(model.first, "weight", 0.3)


MADE: dict[str, Callable[[Net], Any]] = {
    "parametrization": lambda model: parametrize.register_parametrization(model.first, "weight", Doubled()),
    "two of them": lambda model: [
        parametrize.register_parametrization(model.first, "weight", Doubled()),
        parametrize.register_parametrization(model.first, "bias", Doubled()),
    ],
    "weight norm": lambda model: parametrizations.weight_norm(model.first),
    "spectral norm": lambda model: parametrizations.spectral_norm(model.first),
    "orthogonal": lambda model: parametrizations.orthogonal(model.first),
    "weight norm, old": old_weight_norm,
    "spectral norm, old": old_spectral_norm,
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
def test_weights_that_are_made_on_the_way(name: str, composite: str, frozen: bool) -> None:
    """As a layer that has the finished weight."""
    model, finished = Net(), Net()
    MADE[name](model)
    model.double().eval()(X)
    with torch.no_grad():
        finished.first.weight.copy_(model.first.weight)
        finished.first.bias.copy_(model.first.bias)
    found = explain(model.requires_grad_(not frozen), X, 1, composite=composite)
    same(found, explain(finished, X, 1, composite=composite), 1e-9)


@pytest.mark.parametrize("kind", ["modules", "weights"])
def test_what_is_shared_counts_as_its_copies_do(kind: str, composite: str, frozen: bool) -> None:
    """Relevance, accounts and layers are those of a model with a copy of its own for every use."""

    class Uses(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.one = peers.randomise(nn.Linear(6, 6), 2).double()
            self.two = self.one if shared and kind == "modules" else copy.deepcopy(self.one)
            if shared and kind == "weights":
                self.two.weight, self.two.bias = self.one.weight, self.one.bias
            self.last = peers.randomise(nn.Linear(6, 3), 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + torch.relu(self.two(torch.tanh(self.one(x)))))

    shared, untied = (Uses(flag).requires_grad_(not frozen) for flag in (True, False))
    found = explain(shared, X, 1, composite=composite, parameters=["one.weight", "one.bias"])
    expected = explain(untied, X, 1, composite=composite, parameters=["one.*", "two.*"])
    same(found, expected)
    for name in ("weight", "bias"):  # a parameter's relevance is that of all its uses
        both = expected.parameters[f"one.{name}"] + expected.parameters[f"two.{name}"]
        close(found.parameters[f"one.{name}"], both)


# Hooks ------------------------------------------------------------------------------------------------------


class Fired:
    """Counts how often hooks fire."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def on_forward(self, *_: Any) -> None:
        self.forward += 1

    def on_backward(self, *_: Any) -> None:
        self.backward += 1

    def on_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self.on_backward)


def each_parameter(model: Net, register: Callable[[Tensor], Any]) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            register(parameter)


HOOKS: dict[str, Callable[[Net, Fired], Any]] = {
    "forward pre": lambda model, fired: model.blocks[0].register_forward_pre_hook(fired.on_forward),
    "forward": lambda model, fired: model.blocks[0].register_forward_hook(fired.on_forward),
    "full backward": lambda model, fired: model.blocks[0].register_full_backward_hook(fired.on_backward),
    "full backward pre": lambda model, fired: model.blocks[0].register_full_backward_pre_hook(fired.on_backward),
    "backward": lambda model, fired: model.first.register_backward_hook(fired.on_backward),
    "tensor": lambda model, fired: model.blocks[0].register_forward_hook(fired.on_output),
    "parameter": lambda model, fired: each_parameter(model, lambda p: p.register_hook(fired.on_backward)),
    "accumulated": lambda model, fired: each_parameter(
        model, lambda p: p.register_post_accumulate_grad_hook(fired.on_backward)
    ),
    "retained": lambda model, fired: model.blocks[0].register_forward_hook(
        lambda module, args, output: output.retain_grad() if output.requires_grad else None
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_user(name: str, composite: str, frozen: bool) -> None:
    """Those of the forward pass run in it. Those of gradients do not fire, as no gradient is computed, and are left
    as they were: in a backward pass afterwards they fire as ever."""
    model, fired = Net().requires_grad_(not frozen), Fired()
    HOOKS[name](model, fired)
    same(explain(model, X, 1, composite=composite), plain(composite, frozen))
    assert fired.backward == 0
    assert (fired.forward > 0) == name.startswith("forward")
    if not frozen:
        model(X).sum().backward()
        assert (fired.backward > 0) == (not name.startswith(("forward", "retained")))
        assert all(p.grad is not None for p in model.parameters())


def test_hooks_that_change_what_a_module_takes_and_gives(composite: str) -> None:
    """They are a part of the model."""
    model = Net()
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    model.blocks[1].register_forward_hook(lambda module, args, output: torch.tanh(output))

    def function(x: Tensor) -> Tensor:
        x = model.first(x)
        x = x + nn.Sequential(*model.blocks[0])(x * 2.0)
        return model.last(x + torch.tanh(nn.Sequential(*model.blocks[1])(x)))

    same(explain(model, X, 1, composite=composite), explain(function, X, 1, composite=composite))


def test_tensor_hooks_do_not_fire_where_a_graph_exists_already() -> None:
    x, fired = X.clone().requires_grad_(), Fired()
    hidden = torch.tanh(x * 2.0)
    hidden.register_hook(lambda g: g * 100.0)
    x.register_hook(fired.on_backward)
    hidden.grad_fn.register_hook(fired.on_backward)
    output = (hidden * 3.0).sum(1)
    close(relevance(output, x).relevance, 3.0 * hidden.detach())
    assert fired.backward == 0
    output.sum().backward()
    assert fired.backward == 2


# Saved tensors elsewhere ------------------------------------------------------------------------------------


def numpy_arrays() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().numpy().copy(), lambda array: torch.from_numpy(array.copy())
    )


def files(folder: Path) -> AbstractContextManager[Any]:
    def pack(tensor: Tensor) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.npy"
        np.save(path, tensor.detach().numpy())
        return path

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda path: torch.from_numpy(np.load(path)))


PLACES: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "CPU": lambda folder: torch.autograd.graph.save_on_cpu(),
    "numpy": lambda folder: numpy_arrays(),
    "files": files,
    "mutable": lambda folder: torch.autograd.graph.allow_mutation_on_saved_tensors(),
    "none allowed": lambda folder: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
}


@pytest.mark.parametrize(
    ("place", "inside"), [(p, i) for p in PLACES for i in (False, True) if (p, i) != ("mutable", True)]
)
def test_saved_tensors_that_are_kept_elsewhere(
    place: str, inside: bool, composite: str, frozen: bool, tmp_path: Path
) -> None:
    def run(block: Block, x: Tensor) -> Tensor:
        with PLACES[place](tmp_path) if inside else nullcontext():
            return block(x)

    model = Net(run).requires_grad_(not frozen)
    with nullcontext() if inside else PLACES[place](tmp_path):
        found = explain(model, X, 1, composite=composite)
    same(found, plain(composite, frozen))


# Casts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["around", "inside", "inside a part"])
def test_autocast(where: str, dtype: torch.dtype, composite: str, frozen: bool) -> None:
    def run(block: Block, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=where == "inside a part"):
            return block(x).float()

    model = Net(run if where == "inside a part" else lambda block, x: block(x)).float().requires_grad_(not frozen)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)  # type: ignore[no-any-return]

    x = X.float()
    expected = explain(Net().float().requires_grad_(not frozen), x, 1, composite=composite)
    if where == "inside":
        wrapper = nn.Module()
        wrapper.inner, wrapper.forward = model, inside  # type: ignore[method-assign]
        found = explain(wrapper, x, 1, composite=composite)
    else:
        with torch.autocast("cpu", dtype, enabled=where == "around"):
            found = explain(model, x, 1, composite=composite)
    assert found.relevance.dtype is torch.float32
    # 8 or 11 binary digits of every activation; sums by magnitude divide by activations that may be near zero.
    tolerance = {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype] * (20 if composite == "dynamiclrp" else 1)
    assert float((found.relevance - expected.relevance).norm() / expected.relevance.norm()) < tolerance


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to("cpu", copy=True),
    "to a dtype and back": lambda x: x.float().double() - (x.float().double() - x).detach(),
    "copied into": lambda x: torch.empty_like(x).copy_(x),
    "copied over": lambda x: (x * 7.0).copy_(x),
    "copied into a part": lambda x: _into(torch.zeros(4, 6, dtype=torch.float64), x),
    "contiguous": lambda x: x.t().contiguous().t(),
    "as_strided": lambda x: x.contiguous().as_strided((4, 6), (6, 1)),
    "views": lambda x: x.view(2, 2, 6).transpose(0, 1)[:, None].squeeze(1).transpose(0, 1).reshape(4, 6),
    "detached half": lambda x: x * 0.5 + x * 0.5,
}


def _into(board: Tensor, x: Tensor) -> Tensor:
    board[:2] = x[:2]
    board[2:].copy_(x[2:])
    return board


@pytest.mark.parametrize("name", [n for n in COPIES if n not in ("to a dtype and back", "detached half")])
def test_copies_and_views(name: str, composite: str, frozen: bool) -> None:
    """The nodes that moves between devices make too: promises and relevance pass them."""
    model = Net(lambda block, x: COPIES[name](block(COPIES[name](x)))).requires_grad_(not frozen)
    same(explain(model, X, 1, composite=composite), plain(composite, frozen))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_spread_over_devices(composite: str, frozen: bool) -> None:
    model = Net(lambda block, x: block(x.to("cuda:1")).to("cuda:0")).requires_grad_(not frozen).to("cuda:0")
    model.blocks.to("cuda:1")
    found = explain(model, X.to("cuda:0"), 1, composite=composite)
    close(found.relevance.cpu(), plain(composite, frozen).relevance, 1e-9)
    assert found.ledger.closes


# Wrapped modules --------------------------------------------------------------------------------------------


def test_data_parallel(composite: str, frozen: bool) -> None:
    model = nn.DataParallel(Net().requires_grad_(not frozen))
    found = explain(model, X, 1, composite=composite, layers="module.blocks.0")
    expected = plain(composite, frozen, layers="blocks.0")
    same(found, expected)
    close(found.layers["module.blocks.0"], expected.layers["blocks.0"])


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(composite: str, options: dict[str, bool]) -> None:
    """Before a training step and after one, which is what it is without the explanations."""
    inner = Net()
    model = nn.parallel.DistributedDataParallel(inner, **options)  # type: ignore[arg-type]
    expected = plain(composite)
    same(explain(model, X, 1, composite=composite), expected)
    for _ in range(2):
        model.zero_grad()
        model(X).sum().backward()
        same(explain(model, X, 1, composite=composite), expected)
        same(explain(model.requires_grad_(False), X, 1, composite=composite), expected)
        model.requires_grad_(True)
    reference = Net()
    reference(X).sum().backward()
    for ours, theirs in zip(inner.parameters(), reference.parameters(), strict=True):
        close(ours.grad, theirs.grad)


# Quantized weights ------------------------------------------------------------------------------------------


class Integers(nn.Module):
    """Weights as int8 with a scale per row, dequantised before the product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("integers", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def weight(self) -> Tensor:
        return self.integers.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


def test_weights_in_integers(composite: str, frozen: bool) -> None:
    model, finished = Net(), Net()
    for name in ("first", "last"):
        layer = Integers(getattr(model, name))
        setattr(model, name, layer)
        with torch.no_grad():
            getattr(finished, name).weight.copy_(layer.weight())
    found = explain(model.requires_grad_(not frozen), X, 1, composite=composite)
    same(found, explain(finished.requires_grad_(not frozen), X, 1, composite=composite))


@pytest.mark.parametrize("channels", [False, True])
def test_fake_quantised_weights(channels: bool, composite: str, frozen: bool) -> None:
    """As in training for quantisation: the product is with the rounded weight."""

    class Fake(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            w = w.float()
            if channels:
                scale, zero = torch.full((len(w),), 0.02), torch.zeros(len(w), dtype=torch.int32)
                return torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -128, 127).double()
            return torch.fake_quantize_per_tensor_affine(w, 0.02, 0, -128, 127).double()

    model, finished = Net(), Net()
    parametrize.register_parametrization(model.first, "weight", Fake(), unsafe=True)
    with torch.no_grad():
        finished.first.weight.copy_(model.first.weight)
    found = explain(model.requires_grad_(not frozen), X, 1, composite=composite)
    same(found, explain(finished.requires_grad_(not frozen), X, 1, composite=composite))


@pytest.mark.filterwarnings("ignore")
def test_kernels_for_quantised_weights_are_refused() -> None:
    """PyTorch's own quantised layers have no derivative: an error with its cure, and not a map of what is around."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    with pytest.raises(UnknownOperationError, match="dequantise the weights"):
        explain(quantised, X.float(), 1)


# Threads ----------------------------------------------------------------------------------------------------


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns every few instructions."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.usefixtures("registry")
def test_two_threads_explain_one_model() -> None:
    """With different composites, inputs and options, a second run among them, for many rounds."""
    from dynlrp.rules import linear_operation

    linear_operation("OpaqueBackward")  # which no promise passes
    model = nn.Sequential(Net(), Apply(Opaque.apply), peers.randomise(nn.Linear(3, 3), 4).double())
    model.requires_grad_(False)
    jobs: list[dict[str, Any]] = [
        {"composite": "epsilon_plus", "layers": "0.first"},
        {"composite": "attnlrp", "layers": "*", "parameters": "*"},
        {"composite": "dynamiclrp", "precision": torch.float64},
    ]
    inputs = [draw(seed, 4, 6) for seed in range(len(jobs))]
    expected = [explain(model, x, 1, **options) for x, options in zip(inputs, jobs, strict=True)]
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        try:
            barrier.wait(30)
            for _ in range(25):
                found = explain(model, inputs[number], 1, **jobs[number])
                same(found, expected[number], 1e-13)
                for part in ("layers", "parameters"):
                    for name, value in getattr(expected[number], part).items():
                        close(getattr(found, part)[name], value, 1e-13) if value is not None else None
                assert found.ledger.by_module().keys() == expected[number].ledger.by_module().keys()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    with switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []

"""Every score against a slow and obvious one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import InputError, NoPathError, allocate, explain
from dynlrp.allocation import SCORES, Calibration, Divergence, Layer, Quantizer, Task, find_layers, measure
from dynlrp.allocation.noise import costs, noise
from tests.conftest import bias_free, close
from tests.peers import models as peers

BITS = (2, 4, 8)


class Padded(nn.Conv2d):
    """Pads what it is given itself, as TensorFlow's "same" does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 2)))


class Net(nn.Module):
    """Convolutions in groups, one that pads in its own forward, a layer that runs twice, tied weights, a Conv1D,
    changes in place."""

    inplace = True

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")
        self.deep = Padded(4, 4, 3, groups=2)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.twice = Conv1D(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(F.relu(self.stem(x), self.inplace)).flatten(2).mT.contiguous()
        x = x + self.two(F.relu(self.one(x), self.inplace))  # a view, whose node leaves the graph when it is changed
        x = x + self.twice(F.relu(self.twice(x), self.inplace))
        return self.head(x.mean(1))


class Words(nn.Module):
    """Positions, so that a mask may count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.outer = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 9)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.outer(self.inner(self.embedding(ids) * mask[..., None]).relu())


IDS = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def task(kind: str = "net", **options: Any) -> Task:
    torch.manual_seed(0)
    if kind == "net":
        model, data = peers.randomise(Net(), 1).double().eval(), peers.inputs((5, 3, 9, 9), 3)
        options.setdefault("divergence", Divergence("softmax"))
    else:
        model, data = peers.randomise(Words(), 1).double().eval(), (IDS, MASK)  # type: ignore[assignment]
        options.setdefault("divergence", Divergence("softmax", positions=lambda inputs: inputs[1]))
    calibration = Calibration(data, batch_size=2)
    return Task(model, find_layers(model), calibration, BITS, Quantizer(), **options)


def singles(of: Task) -> list[Any]:
    """The samples one by one."""
    one_by_one = replace(of.calibration, batch_size=1)
    return list(one_by_one.batches(of.model))


def call(model: nn.Module, inputs: Any) -> Tensor:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def raw(of: Task, name: str) -> Tensor:
    """What a score gives of every sample."""
    return torch.cat([rows.detach().double() for rows in SCORES[name].function(of)])


def probes(of: Task) -> list[Tensor]:
    """The probes that scores by gradients start from, sample by sample."""
    generator = torch.Generator().manual_seed(of.seed)
    found: list[Tensor] = []
    for batch in of.batches():
        output = call(of.model, batch)
        found += of.divergence.probe(output, generator, batch).split(1)
    return found


def each(of: Task, number: Callable[[Layer, int], float]) -> Tensor:
    return torch.tensor([[number(layer, bits) for bits in of.candidates] for layer in of.layers.values()])


# Gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["net", "words"])
def test_gauss_newton_is_the_derivative_along_the_error(kind: str) -> None:
    of = task(kind)
    expected = []
    for inputs, probe in zip(singles(of), probes(of), strict=True):
        rows = []
        for layer in of.layers.values():
            names = [f"{name}.weight" for name in layer.modules]

            def score(weight: Tensor, names: Any = names, inputs: Any = inputs, probe: Tensor = probe) -> Tensor:
                output = torch.func.functional_call(of.model, dict.fromkeys(names, weight), inputs)
                return (output * probe).sum()

            weight = layer.weight.detach()
            of.model.requires_grad_(False)
            errors = [of.quantizer.round(layer, bits) - weight for bits in BITS]
            rows.append([float(torch.func.jvp(score, (weight,), (error,))[1].square()) for error in errors])
        expected.append(torch.tensor(rows, dtype=torch.float64))
    close(raw(of, "gauss_newton"), torch.stack(expected))


@pytest.mark.parametrize("kind", ["net", "words"])
def test_fisher_is_the_squared_gradient_of_each_sample(kind: str) -> None:
    of = task(kind)
    expected = []
    for inputs, probe in zip(singles(of), probes(of), strict=True):
        weights = [layer.weight for layer in of.layers.values()]
        grads = torch.autograd.grad((call(of.model, inputs) * probe).sum(), weights)
        expected.append(torch.stack([grad.square().mean() for grad in grads]))
    close(raw(of, "fisher"), torch.stack(expected))


def test_error_relevance_by_multipliers_that_are_gradients_is_weight_error() -> None:
    """The benchmark's score on a piecewise linear net with changes in place, where ``R / y`` is the gradient."""
    from benchmarks.allocation import error_relevance

    SCORES.pop("error_relevance", None)  # it is the benchmark's alone
    of = task(composite="attnlrp")
    pairs = zip(error_relevance(of), SCORES["weight_error"].function(of), strict=True)
    for found, expected in pairs:
        assert expected.abs().max() > 0
        close(found, expected, 1e-9)  # a quotient and a product for every number


@pytest.mark.parametrize("kind", ["net", "words"])
def test_weight_error_squares_gradient_times_error_of_every_weight(kind: str) -> None:
    of = task(kind)
    expected = []
    for inputs, probe in zip(singles(of), probes(of), strict=True):
        rows = []
        for layer in of.layers.values():
            (grad,) = torch.autograd.grad((call(of.model, inputs) * probe).sum(), layer.weight)
            errors = [of.quantizer.round(layer, bits) - layer.weight.detach() for bits in BITS]
            rows.append([sum(float(g * e) ** 2 for g, e in zip(grad.flatten(), error.flatten(), strict=True))
                         for error in errors])  # fmt: skip
        expected.append(torch.tensor(rows, dtype=torch.float64))
    close(raw(of, "weight_error"), torch.stack(expected))


@pytest.mark.parametrize("kind", ["net", "words"])
def test_modelopt_squares_every_element(kind: str) -> None:
    of = task(kind)
    expected = []
    for inputs, probe in zip(singles(of), probes(of), strict=True):
        kept: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        names = {module: name for name, layer in of.layers.items() for module in layer.modules.values()}

        def hook(module: nn.Module, args: Any, output: Tensor, names: Any = names, kept: Any = kept) -> Tensor:
            output.retain_grad()
            kept.append((names[module], module, args[0].detach(), output))
            return output * 1.0  # which may be changed in place

        handles = [module.register_forward_hook(hook) for module in names]
        (call(of.model, inputs) * probe).sum().backward()
        for handle in handles:
            handle.remove()
        scores = torch.zeros(len(of.layers), len(BITS), dtype=torch.float64)
        for name, module, x, output in kept:
            layer = of.layers[name]
            for place, bits in enumerate(BITS):
                other = copy.deepcopy(module)
                other.weight = nn.Parameter(of.quantizer.round(layer, bits))
                change = other(x) - output
                assert output.grad is not None
                scores[list(of.layers).index(name), place] += (output.grad * change).square().sum().detach()
        expected.append(scores)
        of.model.zero_grad()
    close(raw(of, "modelopt"), torch.stack(expected))


@pytest.mark.parametrize("name", ["gauss_newton", "fisher", "modelopt", "weight_error"])
def test_frozen_models_score_alike(name: str) -> None:
    of = task("words")
    expected = raw(of, name)
    of.model.requires_grad_(False)
    close(raw(of, name), expected)
    with torch.no_grad():
        close(raw(of, name), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_may_be_changed_in_place(frozen: bool) -> None:
    """That of Conv1D is a view, whose own node leaves the graph then."""
    from transformers.pytorch_utils import Conv1D

    class Model(nn.Sequential):
        inplace = False

        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
                x = x.sigmoid_() if self.inplace else x.sigmoid()
            return x

    model = Model(Conv1D(4, 3), nn.Linear(4, 4), Conv1D(3, 4)).double().eval().requires_grad_(not frozen)
    of = Task(model, find_layers(model), Calibration(torch.randn(3, 2, 3, dtype=torch.float64)), BITS)
    expected = [raw(of, name) for name in ("gauss_newton", "fisher", "modelopt")]
    assert all(bool((rows > 0).all()) for rows in expected)
    model.inplace = True
    for name, rows in zip(("gauss_newton", "fisher", "modelopt"), expected, strict=True):
        close(raw(of, name), rows)


def test_an_input_that_is_changed_behind_the_layer_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            x += self.layer(x)
            return x

    model = Changing().eval().requires_grad_(False)
    with pytest.raises(InputError, match="'layer' was changed in place"):
        allocate(model, torch.randn(2, 3), 20, score="gauss_newton")


def test_an_output_without_a_graph_is_refused() -> None:
    class Cut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(NoPathError):
        allocate(Cut(nn.Linear(3, 3)).eval(), torch.randn(2, 3), 20, score="gauss_newton")


class Standardised(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight / self.weight.norm(), self.bias)


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("layer", [Standardised(3, 3, 1), Adapted(3, 3), Adapted(3, 3, bias=False)])
@pytest.mark.parametrize("score", ["weight_error", "gauss_newton", "owl"])
def test_layers_that_are_not_linear_in_their_weight_are_refused(layer: nn.Module, score: str) -> None:
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 3)).eval()
    with pytest.raises(InputError, match=r"'0': the forward of \w+ is not linear in its weight"):
        allocate(model, torch.randn(4, 3, 3), 20, score=score)
    assert "0" not in allocate(model, torch.randn(4, 3, 3), 20, score=score, pinned={"0": None}).bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_lack_of_linearity(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Padded(3, 64, 3), nn.ReLU(), Padded(64, 5, 3), nn.Flatten()).eval().to(dtype)
    assert allocate(model, torch.randn(2, 3, 6, 6).to(dtype), 25).bits


@pytest.mark.parametrize("name", ["weight_error", "gauss_newton", "modelopt", "fisher"])
def test_batches_draw_the_same_probes(name: str) -> None:
    """Whether samples come one by one, in twos or all at once, each has the probe of its place."""
    of = task("words", seed=3)
    found = [raw(replace(of, calibration=replace(of.calibration, batch_size=size)), name) for size in (1, 2, len(IDS))]
    assert float(found[0].std(0).max()) > 0
    close(found[1], found[0], 1e-10)
    close(found[2], found[0], 1e-10)


# What it means for the output to change ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "cosine", "squared"])
@pytest.mark.parametrize("positions", [False, True])
def test_probes_sample_the_hessian(kind: Any, positions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``v`` is linear in what is drawn, so unit vectors give the matrix A of ``v = A u``, and ``A A^T`` is E[v v^T]."""
    shape = (3, 4) if positions else (4,)
    z = torch.randn(shape, dtype=torch.float64)
    weights = torch.tensor([[1.0, 1, 0]], dtype=torch.float64)
    divergence = Divergence(kind, (lambda inputs: weights.expand(inputs, -1)) if positions else None)
    size = z.numel()
    units = iter(torch.eye(size, dtype=torch.float64).reshape(size, *shape))
    monkeypatch.setattr(torch, "randn", lambda *args, **options: next(units))
    a = divergence.probe(z.expand(size, *shape), torch.Generator(), size).flatten(1).T

    def between(changed: Tensor) -> Tensor:
        return divergence.between(changed.reshape(1, *shape), z[None], 1)[0]

    assert float(between(z.flatten())) == pytest.approx(0, abs=1e-15)
    close(a @ a.T, torch.func.hessian(between)(z.flatten()))


def test_divergences() -> None:
    z, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    expected = F.kl_div(z.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1).mean(-1)
    close(Divergence("softmax").between(z, y), expected)
    bernoulli = [torch.distributions.Bernoulli(logits=t) for t in (y, z)]
    close(Divergence("sigmoid").between(z, y), torch.distributions.kl_divergence(*bernoulli).sum(-1).mean(-1))
    close(Divergence("cosine").between(z[:, 0], y[:, 0]), 1 - (F.normalize(z[:, 0]) * F.normalize(y[:, 0])).sum(1))
    close(Divergence("squared").between(z[:, 0], y[:, 0]), (z - y)[:, 0].square().sum(1) / 2)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    masked = Divergence("softmax", lambda inputs: inputs["mask"]).between(z, y, {"mask": mask})
    close(masked[1], expected[1])
    close(masked[0], F.kl_div(z.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1)[0, :2].mean())
    with pytest.raises(InputError, match="weights of shape"):
        Divergence("softmax", lambda inputs: mask[:, :3]).between(z, y)
    with pytest.raises(InputError, match="not 'entropy'"):
        Divergence("entropy")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["net", "words"])
def test_measured_is_the_divergence_of_a_quantized_copy(kind: str) -> None:
    of = task(kind)
    expected = []
    of.model.requires_grad_(False)
    for inputs in singles(of):
        reference = call(of.model, inputs)

        def change(layer: Layer, bits: int, inputs: Any = inputs, reference: Tensor = reference) -> float:
            other = copy.deepcopy(of.model)
            for name in layer.modules:
                other.get_submodule(name).weight.data = of.quantizer.round(layer, bits)
            return float(of.divergence.between(call(other, inputs), reference, inputs))

        expected.append(each(of, change))
    close(raw(of, "measured"), torch.stack(expected).double(), 1e-6)  # collected as float32


def test_gauss_newton_predicts_what_is_measured() -> None:
    """At 8 bits errors are small, so half of it, on average over probes, is the measured divergence."""
    of = task(divergence=Divergence("softmax"))
    of = replace(of, candidates=(8,))
    predicted = torch.stack([raw(replace(of, seed=seed), "gauss_newton").mean(0) / 2 for seed in range(150)]).mean(0)
    measured = raw(of, "measured").mean(0)
    # 750 draws of chi^2 have a standard error of 0.05; the rest is what the second order leaves out.
    assert torch.allclose(predicted, measured, rtol=0.2)


# Relevance ---------------------------------------------------------------------------------------------------


def test_relevance_without_biases_is_gradient_times_output() -> None:
    model = bias_free(6, 5, 4, 3)
    x = torch.randn(5, 6, dtype=torch.float64)
    of = Task(model, find_layers(model), Calibration(x, batch_size=2), BITS)
    absolute, whole, parameters = [], [], []
    for one in x.split(1):
        inner = one
        kept = []
        for module in model:
            before, inner = inner, module(inner)
            if isinstance(module, nn.Linear):
                inner.retain_grad()
                kept.append((module.weight.detach(), before.detach(), inner))
        inner.max().backward()
        absolute.append([float((y.grad * y).detach().abs().sum()) for _, _, y in kept])
        whole.append([abs(float((y.grad * y).detach().sum())) for _, _, y in kept])
        parameters.append([float((w * (y.grad.T @ b)).abs().sum()) for w, b, y in kept])
        model.zero_grad()
    close(raw(of, "absolute_relevance"), torch.tensor(absolute, dtype=torch.float64))
    close(raw(of, "gradient_x_input"), torch.tensor(absolute, dtype=torch.float64))
    close(raw(of, "relevance"), torch.tensor(whole, dtype=torch.float64))
    close(raw(of, "parameter_relevance"), torch.tensor(parameters, dtype=torch.float64))


@pytest.mark.parametrize("composite", ["auto", "attnlrp"])
@pytest.mark.parametrize("kind", ["net", "words"])
def test_relevance_of_every_sample_alone(kind: str, composite: str) -> None:
    target: Any = 1 if kind == "net" else (0, 1)
    of = task(kind, target=target, composite=composite)
    absolute, whole, parameters = [], [], []
    of.model.inplace = False  # type: ignore[assignment]
    for inputs in singles(of):
        rows: tuple[list[float], ...] = ([], [], [])
        for layer in of.layers.values():
            found = explain(
                of.model, inputs, target, composite=composite, layers=list(layer.modules),
                parameters=f"{layer.name}.weight",
            )  # fmt: skip
            calls = [r for calls in found.layers.values() for r in (calls if isinstance(calls, list) else [calls])]
            rows[0].append(float(sum(r.abs().sum() for r in calls)))
            rows[1].append(abs(float(sum(r.sum() for r in calls))))
            (r,) = found.parameters.values()
            assert r is not None
            rows[2].append(float(r.abs().sum()))
        for kept, row in zip((absolute, whole, parameters), rows, strict=True):
            kept.append(row)
    for name, kept in zip(
        ("absolute_relevance", "relevance", "parameter_relevance"), (absolute, whole, parameters), strict=True
    ):
        close(raw(of, name), torch.tensor(kept, dtype=torch.float64), 1e-9)  # sums that cancel


def test_gradient_times_output_with_biases() -> None:
    of = task("words", target=(0, 1))
    expected = []
    for ids, mask in singles(of):
        inner = of.model.inner(of.model.embedding(ids) * mask[..., None])
        outer = of.model.outer(inner.relu())
        grads = torch.autograd.grad(outer[0, 0, 1], [inner, outer])
        expected.append([float((g * y).detach().abs().sum()) for g, y in zip(grads, (inner, outer), strict=True)])
    close(raw(of, "gradient_x_input"), torch.tensor(expected, dtype=torch.float64))


# Weights and activations -------------------------------------------------------------------------------------


def test_weight_scores_by_hand() -> None:
    of = task()
    (found,) = raw(of, "weight_mse")
    close(
        found,
        each(of, lambda layer, bits: (Quantizer().round(layer, bits) - layer.weight).square().mean()).double(),
        1e-6,
    )
    (shares,) = raw(of, "zd")
    for share, layer in zip(shares.tolist(), of.layers.values(), strict=True):
        numbers = layer.weight.flatten().tolist()
        mean = sum(numbers) / len(numbers)
        deviation = (sum((w - mean) ** 2 for w in numbers) / len(numbers)) ** 0.5
        assert share == pytest.approx(sum((w - mean) / deviation > 1 for w in numbers) / len(numbers))
    (same,) = raw(of, "uniform")
    close(same, each(of, lambda layer, bits: layer.weights / 4**bits).double(), 1e-6)


@pytest.mark.parametrize("kind", ["net", "words"])
def test_output_noise_by_hand(kind: str) -> None:
    of = task(kind)
    given: dict[str, list[tuple[nn.Module, Tensor]]] = {name: [] for name in of.layers}
    for name, layer in of.layers.items():
        for module in layer.modules.values():
            module.register_forward_hook(lambda m, args, out, kept=given[name]: kept.append((m, args[0].clone())))
    for inputs in singles(of):
        call(of.model, inputs)

    def relative(layer: Layer, bits: int) -> float:
        noise = size = 0.0
        for module, x in given[layer.name]:
            plain, rounded = copy.deepcopy(module), copy.deepcopy(module)
            plain._forward_hooks.clear()
            rounded._forward_hooks.clear()
            rounded.weight.data = of.quantizer.round(layer, bits)
            y = plain(x)
            noise += float((rounded(x) - y).detach().square().sum())
            plain.bias.data.zero_()
            size += float(plain(x).detach().square().sum())
        return noise / size

    close(noise("output", of), each(of, relative).double(), 1e-6)  # collected as float32


@pytest.mark.parametrize("name", ["gauss_newton", "modelopt", "weight_mse"])
def test_errors_may_be_kept_or_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = task("words")
    expected = raw(kept, name)
    assert len(kept._errors) == 6
    monkeypatch.setattr("dynlrp.allocation.scores.KEPT", 0)
    bare = task("words")
    assert torch.equal(raw(bare, name), expected)
    assert not bare._errors


def test_noise_can_be_chosen() -> None:
    of = task("words")
    for kind in ("relative", "absolute", "output"):
        scores = measure(of, "random", noise=kind)  # type: ignore[arg-type]
        close(costs(scores, of), scores.mean[:, None] * noise(kind, of))  # type: ignore[arg-type]
    ratio = noise("absolute", of)[0] / noise("relative", of)[0]
    close(ratio, of.layers["inner"].weight.detach().square().sum().expand(3))
    with pytest.raises(InputError, match="a cost of b bits already"):
        measure(of, "weight_mse", noise="relative")
    with pytest.raises(InputError, match="'random' is no cost"):
        measure(of, "random", noise="none")
    with pytest.raises(InputError, match="noise is one of relative"):
        measure(of, "random", noise="loud")  # type: ignore[arg-type]
    zero = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    zero[0].weight.data.zero_()
    for kind in ("relative", "output"):
        assert allocate(zero, torch.randn(4, 3), 15, score="random", noise=kind).costs[0].tolist() == [0] * 6


def test_random_depends_on_the_seed_alone() -> None:
    of = task()
    a, b, c = raw(of, "random"), raw(of, "random"), raw(replace(of, seed=1), "random")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_uniform_allocates_alike() -> None:
    model = peers.randomise(nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))), 1).eval()
    found = allocate(model, torch.randn(2, 16), 4 + 32 / 16, score="uniform")
    assert set(found.bits.values()) == {4}


def test_lim_is_the_cosine_across_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x + self.down(self.up(x).relu()), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks, self.square = nn.Linear(4, 6), nn.ModuleList([Block(), Block()]), nn.Linear(6, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x)[0]
            return self.last(self.square(x))

    model = Model().double().eval()
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    of = Task(model, find_layers(model), Calibration(x, batch_size=2), BITS)
    found = raw(of, "lim")
    for row, one in zip(found, x, strict=True):
        a = model.first(one)
        b = model.blocks[0](a)[0]
        c = model.blocks[1](b)[0]
        pairs = [(a, b), (a, b), (b, c), (b, c), (c, model.square(c))]
        cosines = [float(F.cosine_similarity(p.flatten(), q.flatten(), dim=0)) for p, q in pairs]
        assert row.tolist() == pytest.approx([1, *(1 - cosine for cosine in cosines), 1])


def test_owl_counts_outliers() -> None:
    of = task()
    for layer in of.layers.values():
        layer.weight.data.flatten()[1] = 30.0  # so that there are some
    found = raw(of, "owl")
    assert bool((found > 0).any())
    for row, inputs in zip(found, singles(of), strict=True):
        given: dict[str, list[Tensor]] = {name: [] for name in of.layers}
        handles = [
            module.register_forward_hook(lambda m, args, out, kept=given[name]: kept.append(args[0].detach()))
            for name, layer in of.layers.items()
            for module in layer.modules.values()
        ]
        call(of.model, inputs)
        for handle in handles:
            handle.remove()
        for share, (name, layer) in zip(row.tolist(), of.layers.items(), strict=True):
            conv = isinstance(layer.module, nn.Conv2d)
            squares = sum(x.square().sum((0, 2, 3) if conv else tuple(range(x.ndim - 1))) for x in given[name])
            assert isinstance(squares, Tensor)
            norms, weight = squares.sqrt().tolist(), layer.weight
            sizes = []
            for index in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist():
                channel = index[0] if layer.output_axis else index[1]
                if conv:
                    channel += index[0] // (weight.shape[0] // layer.module.groups) * weight.shape[1]
                sizes.append(abs(float(weight[tuple(index)])) * norms[channel])
            mean = sum(sizes) / len(sizes)
            assert share == pytest.approx(sum(size > 5 * mean for size in sizes) / len(sizes)), name


# Samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"gauss_newton", "modelopt", "fisher", "weight_error"}))
def test_batches_of_any_size_score_alike(name: str) -> None:
    of = task()
    whole = replace(of, calibration=replace(of.calibration, batch_size=5))
    close(measure(of, name).mean, measure(whole, name).mean, 1e-6)


def test_layers_that_see_samples_in_windows() -> None:
    """Four windows for each sample, along the first dimension, as in Swin."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x.reshape(-1, 5, 4)).relu().reshape(len(x), -1, 4).mean(1))

    class Plain(Windows):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x).relu().mean(1))

    x = torch.randn(3, 20, 4, dtype=torch.float64)
    models = [Windows().double().eval(), Plain().double().eval()]
    models[1].load_state_dict(models[0].state_dict())
    for name in ("gauss_newton", "fisher", "modelopt", "absolute_relevance", "owl"):
        found = [raw(Task(m, find_layers(m), Calibration(x), BITS), name) for m in models]
        close(found[0], found[1])


def test_samples_that_are_not_first_are_refused() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).sum(0)

    model = Flipped().eval()
    for name in ("absolute_relevance", "fisher", "owl"):
        with pytest.raises(InputError, match="batches of one sample"):
            allocate(model, torch.randn(2, 5, 4), 20, score=name)
        allocate(model, torch.randn(2, 5, 4), 20, score=name, batch_size=1)


def _gpt2() -> tuple[nn.Module, Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(40, (4, 6))}, (-1, 3)


def _swin() -> tuple[nn.Module, Any, Any]:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return SwinForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16)}, 1


def _encoder() -> tuple[nn.Module, Any, Any]:
    """In eval mode it has a fused way that runs no layer, unless somebody watches."""
    return (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1),
        torch.randn(4, 5, 16),
        None,
    )


@pytest.mark.parametrize("build", [_gpt2, _swin, _encoder])
def test_architectures(build: Callable[[], tuple[nn.Module, Any, Any]]) -> None:
    """Every layer matters, frozen or not, and samples score alike in a batch and alone."""
    model, inputs, target = build()
    model = peers.randomise(model, 3, std=0.2).double().eval()
    if isinstance(inputs, dict):
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    else:
        inputs = inputs.double()
    of = Task(model, find_layers(model), Calibration(inputs, batch_size=4), BITS, target=target)
    alone = replace(of, calibration=Calibration(inputs, batch_size=1))
    for name in ("absolute_relevance", "lim", "owl", "measured"):
        close(raw(of, name), raw(alone, name), 1e-8)  # convolutions and products in other orders
    for name in ("gauss_newton", "fisher", "modelopt", "absolute_relevance"):
        model.requires_grad_(True)
        trainable = raw(of, name)
        assert bool((trainable.mean(0) > 0).all())
        close(raw(replace(of, model=model.requires_grad_(False)), name), trainable, 1e-10)


def test_kept_scores_serve_fewer_layers_and_their_own_quantizer_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).numpy()  # arrays will do
    scores = allocate(model, x, 12.0).scores
    alone = allocate(model, x, 12.0, pinned={"0": None}, score=scores)
    assert alone.scores.layers == ("2",)
    torch.testing.assert_close(alone.costs, scores.mean[1:])
    with pytest.raises(InputError, match="the scores are of Quantizer"):
        allocate(model, x, 14.0, quantizer=Quantizer(symmetric=False), score=scores)
    with pytest.raises(InputError, match="tool is one of torchao, float, not 'onnx'"):
        alone.apply(tool="onnx")
    with pytest.raises(InputError, match="limits are positive numbers"):
        allocate(model, x, float("nan"))
    with pytest.raises(InputError, match="gap not negative"):
        allocate(model, x, 12.0, gap=-1)

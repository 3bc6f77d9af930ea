"""Pooling, resampling, padding and folding against dense matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlrp import Composite, explain
from dynlrp.errors import NoPathError
from dynlrp.promise import Operands
from dynlrp.rules import REGISTRY, Flat, Gamma
from tests.examples import Example, Table, cases, inputs, is_of, linear, matrices, on, passes
from tests.oracle import agrees, draw, matrix, number, same

aten: Any = torch.ops.aten
Function = Callable[[Tensor], Tensor]
LINE, IMAGE, VOLUME = (2, 2, 7), (2, 2, 6, 6), (1, 2, 4, 4, 4)
SAMPLES = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""Where the windows of fractional pooling begin."""
PLACES = torch.tensor([[[0, 5], [5, 14]], [[3, 8], [8, 8]]]).expand(2, 2, 2, 2)
"""Of four elements in their 4 by 4 planes; windows overlapped, so that some have the same."""
GRID = draw(90, 2, 3, 4, 2).tanh() * 1.2
GRID_3D = draw(91, 1, 2, 3, 2, 3).tanh() * 1.2


def _resized(mode: str, **settings: Any) -> Function:
    return lambda x: F.interpolate(x, mode=mode, **settings)


def _padded(mode: str, *widths: int) -> Function:
    return lambda x: F.pad(x, widths, mode=mode)


def _sampled(mode: str = "bilinear", padding: str = "zeros", aligned: bool = False) -> Function:
    return lambda x: F.grid_sample(x, GRID if x.ndim == 4 else GRID_3D, mode, padding, aligned)


LINEAR: Table = {
    "AvgPool2DBackward0": on(IMAGE)(
        lambda x: F.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, (2, 3), 2, (1, 0)),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), lambda x: F.avg_pool2d(x, 4, 3, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    ),
    "AvgPool3DBackward0": on(VOLUME)(
        lambda x: F.avg_pool3d(x, 2), lambda x: F.avg_pool3d(x, 3, 1, 1, True, False),
    ),
    "AdaptiveAvgPool2DBackward0": on(IMAGE)(
        lambda x: F.adaptive_avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, (4, 1)),
        lambda x: F.adaptive_avg_pool2d(x, 7), _resized("area", size=4),
    ),
    "AdaptiveAvgPool3DBackward0": on(VOLUME)(
        lambda x: F.adaptive_avg_pool3d(x, 2), lambda x: F.adaptive_avg_pool3d(x, (3, 1, 2)),
    ),
    "MaxUnpool2DBackward0": on((2, 2, 2, 2))(
        lambda x: F.max_unpool2d(x, PLACES, 2), lambda x: F.max_unpool2d(x, PLACES, 2, output_size=(5, 4)),
    ),
    "MaxUnpool3DBackward0": on((1, 2, 2, 2, 2))(
        lambda x: F.max_unpool3d(x, torch.cat([PLACES, PLACES * 2 + 1])[None, :2], 2),
        lambda x: F.max_unpool3d(x, PLACES.reshape(1, 2, 2, 2, 2) * 4 + 3, 2, output_size=(4, 4, 5)),
    ),
    "UpsampleNearest1DBackward0": on(LINE)(_resized("nearest", scale_factor=2), _resized("nearest", size=5)),
    "UpsampleNearest2DBackward0": on(IMAGE)(_resized("nearest", scale_factor=2), _resized("nearest", size=(9, 4))),
    "UpsampleNearest3DBackward0": on(VOLUME)(_resized("nearest", size=(5, 3, 4))),
    "UpsampleNearestExact1DBackward0": on(LINE)(_resized("nearest-exact", scale_factor=1.5)),
    "UpsampleNearestExact2DBackward0": on(IMAGE)(_resized("nearest-exact", size=(9, 4))),
    "UpsampleNearestExact3DBackward0": on(VOLUME)(_resized("nearest-exact", size=(5, 3, 4))),
    "UpsampleLinear1DBackward0": on(LINE)(
        _resized("linear", size=9), _resized("linear", scale_factor=1.5, align_corners=True),
    ),
    "UpsampleBilinear2DBackward0": on(IMAGE)(
        _resized("bilinear", scale_factor=1.5), _resized("bilinear", size=(9, 4), align_corners=True),
    ),
    "UpsampleTrilinear3DBackward0": on(VOLUME)(_resized("trilinear", size=(3, 4, 5))),
    "UpsampleBicubic2DBackward0": on(IMAGE)(_resized("bicubic", size=(9, 8)), _resized("bicubic", scale_factor=0.7)),
    "UpsampleBilinear2DAaBackward0": on(IMAGE)(_resized("bilinear", size=(3, 4), antialias=True)),
    "UpsampleBicubic2DAaBackward0": on(IMAGE)(_resized("bicubic", size=(3, 4), antialias=True)),
    "UpsampleLanczos2DAaBackward0": on(IMAGE)(lambda x: aten._upsample_lanczos2d_aa(x, [3, 4], False)),
    "GridSampler2DBackward0": on(IMAGE)(
        *(
            _sampled(*modes)
            for modes in itertools.product(("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"))
        )
    ),
    "GridSampler3DBackward0": on(VOLUME)(_sampled(), _sampled("nearest", "border", True)),
    "AffineGridGeneratorBackward0": on((2, 2, 3))(
        lambda theta: F.affine_grid(theta, (2, 1, 3, 4), False), lambda theta: F.affine_grid(theta, (2, 1, 3, 4), True),
    ),
    "Im2ColBackward0": on(IMAGE)(
        lambda x: F.unfold(x, 2), lambda x: F.unfold(x, (2, 3), dilation=2, padding=(1, 2), stride=(3, 1)),
    ),
    "Col2ImBackward0": on((2, 8, 25))(lambda x: F.fold(x, 6, 2), lambda x: F.fold(x, 10, 2, 2, 1, 2)),
    "UnfoldBackwardBackward0": on((2, 4, 3))(
        lambda x: aten.unfold_backward(x, (2, 6), 1, 3, 1), lambda x: aten.unfold_backward(x, (2, 9), -1, 3, 2),
    ),
    "ConstantPadNdBackward0": on((3, 4))(lambda x: F.pad(x, (1, 2)), lambda x: F.pad(x, (-1, 2, 0, 1))),
    "ReflectionPad1DBackward0": on(LINE)(_padded("reflect", 1, 3), _padded("reflect", 0, 6)),
    "ReflectionPad2DBackward0": on(IMAGE)(_padded("reflect", 1, 3, 2, 0)),
    "ReflectionPad3DBackward0": on(VOLUME)(_padded("reflect", 1, 3, 2, 0, 0, 1)),
    "ReplicationPad1DBackward0": on(LINE)(_padded("replicate", 1, 3), _padded("replicate", 2, -1)),
    "ReplicationPad2DBackward0": on(IMAGE)(_padded("replicate", 1, 8, 2, 0)),
    "ReplicationPad3DBackward0": on(VOLUME)(_padded("replicate", 1, 3, 2, 0, 0, 1)),
}  # fmt: skip

CHOICE: Table = {
    "MaxPool2DWithIndicesBackward0": on(IMAGE)(
        lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 2, 1, 0, 2),
        lambda x: F.max_pool2d(x, 4, 3, ceil_mode=True), lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    ),
    "MaxPool3DWithIndicesBackward0": on(VOLUME)(lambda x: F.max_pool3d(x, 2), lambda x: F.max_pool3d(x, 3, 2, 1)),
    "AdaptiveMaxPool2DBackward0": on(IMAGE)(
        lambda x: F.adaptive_max_pool2d(x, (2, 1)), lambda x: F.adaptive_max_pool2d(x, 4),
        lambda x: F.adaptive_max_pool2d(x[0], 4),
    ),
    "AdaptiveMaxPool3DBackward0": on(VOLUME)(lambda x: F.adaptive_max_pool3d(x, (3, 1, 2))),
    "FractionalMaxPool2DBackward0": on(IMAGE)(
        lambda x: F.fractional_max_pool2d(x, 2, 3, _random_samples=SAMPLES[..., :2]),
    ),
    "FractionalMaxPool3DBackward0": on(VOLUME)(
        lambda x: F.fractional_max_pool3d(x, 2, 2, _random_samples=SAMPLES[:1]),
    ),
}  # fmt: skip

COMPOSED: Table = {
    "average in one dimension": on(LINE)(lambda x: F.avg_pool1d(x, 3, 2, 1)),
    "adaptive average in one dimension": on(LINE)(lambda x: F.adaptive_avg_pool1d(x, 3)),
    "global average": on(IMAGE)(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "unpooling in one dimension": on((2, 2, 2))(lambda x: F.max_unpool1d(x, PLACES[:, :, 0] % 4, 2)),
    "circular in one dimension": on(LINE)(_padded("circular", 1, 3)),
    "circular in two dimensions": on(IMAGE)(_padded("circular", 1, 3, 2, 0)),
    "circular in three dimensions": on(VOLUME)(_padded("circular", 1, 3, 2, 0, 0, 1)),
}
"""Linear functions that are recorded as several nodes."""


POOLING = {**LINEAR, **CHOICE}


@pytest.mark.parametrize(("name", "example"), cases(LINEAR))
def test_linear_operations(name: str, example: Example) -> None:
    """Each input has its value times its weights in the forward pass, and nothing is left over."""
    is_of(name, example)
    linear(example)
    passes(example, inputs(example), matrices(example))


@pytest.mark.parametrize(("name", "example"), cases(COMPOSED))
def test_linear_operations_of_several_nodes(name: str, example: Example) -> None:
    linear(example)
    passes(example, inputs(example), matrices(example))


def _chosen(example: Example, x: Tensor) -> Tensor:
    """Where all values are different, an output belongs to the input that equals it."""
    weight = (x.flatten()[:, None] == example.function(x).flatten()).double()
    assert bool((weight.sum(0) == 1).all())
    return weight


@pytest.mark.parametrize(("name", "example"), cases(CHOICE))
def test_the_maximum_takes_all(name: str, example: Example) -> None:
    is_of(name, example)
    (x,) = inputs(example)
    passes(example, [x], [_chosen(example, x)])


@pytest.mark.parametrize("function", [lambda x: F.max_pool1d(x, 3, 2, 1), lambda x: F.adaptive_max_pool1d(x, 3)])
def test_maxima_in_one_dimension(function: Function) -> None:
    example = Example(function, (LINE,))
    (x,) = inputs(example)
    passes(example, [x], [_chosen(example, x)])


@pytest.mark.parametrize(("name", "example"), cases(POOLING))
def test_a_signal_keeps_its_sign(name: str, example: Example) -> None:
    """What gamma may rely on: where the registry says so, nonnegative inputs make nonnegative outputs."""
    if REGISTRY[name].sign == "same":
        assert bool((example.function(*(x.abs() for x in inputs(example))) >= 0).all())


@pytest.mark.parametrize(("name", "example"), cases(POOLING))
def test_relevance_itself_passes_copies(name: str, example: Example) -> None:
    """Flat behind them emits relevance. A zero keeps its share where it is copied; otherwise the share is absorbed."""
    (x,) = inputs(example)
    x[..., ::2] = 0.0
    head = nn.Linear(example.function(x).numel(), 1, bias=False).double()
    composite = Composite.of("flat", {"dense": Flat(epsilon=0.0)})
    explanation = explain(lambda x: head(example.function(x).reshape(1, -1)), x, torch.sum, composite=composite)
    assert explanation.ledger.error < 1e-10
    if name in CHOICE or "Pad" in name or "Nearest" in name:
        number(float(explanation.relevance.sum()), explanation.ledger.output)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_power_average_pooling(dimensions: int, order: int) -> None:
    """For y = (sum x^p)^(1/p) the relevance of y goes by x^p."""
    shape = {1: LINE, 2: IMAGE, 3: VOLUME}[dimensions]
    pool = {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}[dimensions]
    x = draw(0, *shape) if order == 2 else draw(0, *shape).abs()
    powers = matrix(lambda u: pool(u.abs(), 1, 2), shape)  # who is in which window
    y = pool(x, order, 2)
    m = draw(1, *y.shape)
    expected = x.flatten() ** order * (powers @ (m.flatten() * y.flatten() / y.flatten() ** order))
    agrees(explain(lambda x: pool(x, order, 2), x, lambda y: (y * m).sum()), expected.reshape(shape), {"offsets": 0.0})


def test_unpooling_after_overlapping_windows() -> None:
    """A maximum of several windows is written once; the derivative would count it for each of them."""
    x = draw(0, 1, 1, 5, 5)
    x[..., 2, 2] = 9.0

    def model(x: Tensor) -> Tensor:
        y, places = F.max_pool2d(x, 3, 1, return_indices=True)
        return F.max_unpool2d(y, places, 3, 1)

    assert int((F.max_pool2d(x, 3, 1) == 9).sum()) > 1
    agrees(explain(model, x, torch.sum), model(x))
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    assert float((gradient * x).sum().detach()) > float(model(x).sum().detach()) + 9


def test_an_encoder_and_decoder() -> None:
    """Gamma has the inputs of frozen convolutions replayed through pooling, unpooling, padding and resampling."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList([nn.Conv2d(2, 2, 3, bias=False, padding=1) for _ in range(7)])

        def forward(self, x: Tensor) -> Tensor:
            first, second, *_ = (*self.convolutions,)
            y, places = F.max_pool2d(first(x), 2, return_indices=True)
            y = F.max_unpool2d(second(y), places, 2)
            steps: list[Function] = [
                _padded("reflect", 1, 1, 1, 1), _padded("replicate", 1, 0, 0, 1), lambda x: F.interpolate(x, size=5),
                lambda x: F.adaptive_max_pool2d(x, 4), _resized("bicubic", size=6),
            ]  # fmt: skip
            for convolution, step in zip(self.convolutions[2:], steps, strict=True):
                y = convolution(step(y))
            return y.flatten(1).sum(1, keepdim=True)

    net, x = Net().double(), draw(0, 2, 2, 6, 6)
    composite = Composite.of("gamma", {"convolution": Gamma(0.5, epsilon=1e-12)})
    trainable = explain(net, x, 0, composite=composite)
    frozen = explain(net.requires_grad_(False), x, 0, composite=composite)
    agrees(frozen, trainable.relevance)
    assert trainable.ledger.closes


# Places that a network computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_places_are_coefficients(learned: bool) -> None:
    """The grid may be an input or follow from one: all relevance is the picture's."""
    x, grid = draw(0, *IMAGE), GRID
    expected = explain(_sampled(), x, torch.sum)
    function = lambda x, grid: F.grid_sample(x, grid, align_corners=False)  # noqa: E731
    if learned:
        scale = nn.Parameter(torch.ones(1).double())
        agrees(explain(lambda x: function(x, grid * scale), x, torch.sum), expected.relevance)
        return
    explanation = explain(function, (x, grid), torch.sum)
    assert explanation.relevance[1] is None
    agrees(explanation, expected.relevance, {"held back": 0.0})


def test_a_learned_picture_is_a_parameter() -> None:
    """A plane of features that is looked up and added to the signal."""
    picture = nn.Parameter(draw(0, 2, 2, 6, 6))
    x = draw(1, 2, 2, 3, 4)
    looked_up = F.grid_sample(picture, GRID, align_corners=False)
    explanation = explain(lambda x: x + F.grid_sample(picture, GRID, align_corners=False), x, torch.sum)
    agrees(explanation, x, {"parameters": looked_up.detach().sum()})


def test_only_places_depend_on_the_input() -> None:
    picture = nn.Parameter(draw(0, *IMAGE))
    with pytest.raises(NoPathError):
        explain(lambda grid: F.grid_sample(picture, grid, align_corners=False), GRID, torch.sum)


def test_spatial_transformer() -> None:
    """Jaderberg et al. 2015: a small network turns the picture; the answer is a sum over the turned pixels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.locate = nn.Linear(72, 6)
            self.head = nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            theta = self.locate(x.flatten(1)).view(-1, 2, 3).tanh()
            return self.head(F.grid_sample(x, F.affine_grid(theta, x.shape, False), align_corners=False).flatten(1))

    net, x = Net().double(), draw(0, *IMAGE)
    with torch.no_grad():
        grid = F.affine_grid(net.locate(x.flatten(1)).view(-1, 2, 3).tanh(), x.shape, False)
        weight = matrix(lambda u: F.grid_sample(u, grid, align_corners=False), IMAGE)
        m = net.head.weight[1].repeat(2)
        accounts = {"parameters": 2 * net.head.bias[1], "offsets": 0.0}
    agrees(explain(net, x, 1), x * (weight @ m).reshape(IMAGE), accounts)


def deformable(values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention (Zhu et al. 2021, eq. 2), one head: ``values (N, C, H, W)`` at ``places (N, Q, P, 2)`` times
    ``weights (N, Q, P)``."""
    sampled = F.grid_sample(values, 2 * places - 1, align_corners=False)  # (N, C, Q, P)
    return (sampled * weights[:, None]).sum(-1).transpose(1, 2)


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
def test_deformable_attention(composite: str) -> None:
    """Queries choose places and weights. Values take all of a place, and half of the weights' product."""
    n, q, p, c = 2, 3, 4, 2
    query, values = draw(0, n, q, c), draw(1, n, c, 5, 5)
    offset, attend = draw(2, c, 2 * p) * 0.3, draw(3, c, p)
    m = draw(4, n, q, c)

    def model(query: Tensor, values: Tensor) -> Tensor:
        places = torch.sigmoid((query @ offset).view(n, q, p, 2))
        return deformable(values, places, torch.softmax(query @ attend, -1))

    explanation = explain(model, (query, values), lambda y: (y * m).sum(), composite=composite)
    # One query and place at a time. Only the softmax passes anything to the queries.
    weights, places = torch.softmax(query @ attend, -1), torch.sigmoid((query @ offset).view(n, q, p, 2))
    share = 0.5 if composite == "attnlrp" else 0.0
    to_values, to_query = torch.zeros_like(values), torch.zeros_like(query)
    for b, i in itertools.product(range(n), range(q)):
        passed = torch.zeros(p).double()
        for k in range(p):
            column, row = places[b, i, k] * 5 - 0.5
            for y, x in itertools.product(range(5), range(5)):
                near = max(0.0, 1 - abs(float(row) - y)) * max(0.0, 1 - abs(float(column) - x))
                for channel in range(c):
                    part = m[b, i, channel] * near
                    to_values[b, channel, y, x] += (1 - share) * weights[b, i, k] * part * values[b, channel, y, x]
                    passed[k] += share * part * values[b, channel, y, x]
        scores = weights[b, i] * (passed - (passed * weights[b, i]).sum())
        to_query[b, i] = query[b, i] * (attend @ scores)
    agrees(explanation, [to_query, to_values] if share else to_values)


# Layouts and precisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: aten.mkldnn_adaptive_avg_pool2d(x, [1, 1]) if x.is_mkldnn else F.adaptive_avg_pool2d(x, 1),
    ],
)
def test_tensors_in_the_layout_of_mkldnn(function: Function) -> None:
    x = draw(0, *IMAGE).float()
    plain = explain(function, x, torch.sum)
    agrees(explain(lambda x: function(x.to_mkldnn()).to_dense(), x, torch.sum), plain.relevance, tolerance=1e-6)
    y = function(x.requires_grad_().to_mkldnn())
    replay = REGISTRY[y.grad_fn.name()].replay
    assert replay is not None
    assert torch.equal(replay(Operands(y.grad_fn), x.detach().to_mkldnn()).to_dense(), y.detach().to_dense())


def test_volumes_in_the_layout_of_mkldnn() -> None:
    x = draw(0, *VOLUME).float()
    plain = explain(lambda x: F.max_pool3d(x, 2, 2), x, torch.sum)
    agrees(explain(lambda x: F.max_pool3d(x.to_mkldnn(), 2, 2).to_dense(), x, torch.sum), plain.relevance, None, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = (draw(0, *IMAGE) * 1000).to(dtype)

    def model(x: Tensor) -> Tensor:
        y, places = F.max_pool2d(F.pad(x, (1, 1, 1, 1), "reflect"), 2, return_indices=True)
        return F.interpolate(F.max_unpool2d(y, places, 2), size=5, mode="bilinear").mean((1, 2, 3))

    explanation = explain(model, x, torch.sum)
    assert explanation.finite()
    assert math.isclose(float(explanation.relevance.sum()), float(model(x).sum()), rel_tol=0.05)


def test_sampling_in_single_precision_on_a_cpu() -> None:
    """The kernel that stands in for another has a name of its own."""
    x, grid = draw(0, *IMAGE).float(), GRID.float()
    y = aten._grid_sampler_2d_cpu_fallback(x.requires_grad_(), grid, 0, 0, False)
    assert y.grad_fn.name() == "GridSampler2DCpuFallbackBackward0"
    ours = explain(lambda x: aten._grid_sampler_2d_cpu_fallback(x, grid, 0, 0, False), x.detach(), torch.sum)
    agrees(
        ours,
        explain(lambda x: F.grid_sample(x, grid, align_corners=False), x.detach(), torch.sum).relevance,
        None,
        1e-5,
    )
    replay = REGISTRY[y.grad_fn.name()].replay
    assert replay is not None
    same(replay(Operands(y.grad_fn), x.detach(), None), y.detach())


def test_sound_from_its_spectrum() -> None:
    """Frames that overlap are added up; the window's envelope divides them."""
    window, shape = torch.hann_window(8, dtype=torch.float64), (2, 5, 5)
    w = draw(1, 16, 3)

    def model(re: Tensor, im: Tensor) -> Tensor:
        return torch.istft(torch.complex(re, im), 8, 4, window=window) @ w

    given = [draw(seed, *shape) for seed in (2, 3)]
    found = explain(model, tuple(given), 1)
    leaves = [x.clone().requires_grad_() for x in given]
    for ours, x, g in zip(found.relevance, given, torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves), strict=True):
        same(ours, x * g)  # it is linear
    assert found.ledger.closes


KERNELS = {
    "MaxPool2DBackward0", "CudnnGridSamplerBackward0", "CudnnAffineGridGeneratorBackward0",
    "MkldnnMaxPool2DBackward0", "MkldnnMaxPool3DBackward0", "MkldnnAdaptiveAvgPool2DBackward0",
    "GridSampler2DCpuFallbackBackward0",
}  # fmt: skip
"""Other backends' names of operations that are tested above."""


def test_nothing_is_forgotten() -> None:
    """PyTorch's nodes of pooling, resampling, padding and folding, but for their second derivatives."""
    words = ("Pool", "Unpool", "Upsample", "GridSampler", "AffineGrid", "PadNd", "ionPad", "Im2Col", "Col2Im")
    known = {
        name
        for name in dir(torch._C._functions)
        if any(word in name for word in words) and not name.endswith("BackwardBackward0")
    } | {"UnfoldBackwardBackward0"}  # which istft calls in its forward
    assert known == set(LINEAR) | set(CHOICE) | KERNELS
    assert known <= set(REGISTRY)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_other_backends_save_what_the_rules_read(name: str) -> None:
    """Their nodes cannot be made here, but their classes tell what they save."""
    saved = {field[7:] for field in dir(getattr(torch._C._functions, name)) if field.startswith("_saved_")}
    assert set(REGISTRY[name].saved.values()) <= saved

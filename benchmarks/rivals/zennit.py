"""zennit: rules on modules, by hooks.

Each model is given the canonizers that its residual sums and batch norms need: zennit's own for torchvision's ResNets,
written here for other nets, since zennit takes a sum only where it is a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method, convolutional
from dynlrp import Composite
from dynlrp.rules import Epsilon


def canonizers(model: nn.Module) -> list[Any]:
    """What puts batch norms into convolutions and makes residual sums modules."""
    from zennit import types
    from zennit.canonizers import AttributeCanonizer, NamedMergeBatchNorm, SequentialMergeBatchNorm
    from zennit.layer import Sum
    from zennit.torchvision import ResNetBasicBlockCanonizer, ResNetBottleneckCanonizer

    def block(name: str, module: nn.Module) -> dict[str, Any] | None:
        forward = {"MBConvBlock": _mbconv, "Bottleneck": _bottleneck}.get(type(module).__name__)
        if forward is None or type(module).__module__.startswith("torchvision."):
            return None
        return {"canonizer_sum": Sum(), "forward": forward.__get__(module)}

    sums = [ResNetBottleneckCanonizer(), ResNetBasicBlockCanonizer(), AttributeCanonizer(block)]
    if next(model.parameters()).is_cuda:  # merged batch norms have an epsilon of 0, which cuDNN refuses
        return sums
    weighted = [(n, m) for n, m in model.named_modules() if isinstance(m, (types.Linear, types.BatchNorm))]
    # EfficientNet-Lite's convolutions have a child that pads; zennit's search for neighbours passes them over.
    padded = [
        ([before], name)
        for (before, layer), (name, norm) in pairwise(weighted)
        if isinstance(norm, types.BatchNorm) and any(True for _ in layer.children())
    ]
    return [_merging(SequentialMergeBatchNorm)(), _merging(NamedMergeBatchNorm)(padded), *sums]


def _merging(canonizer: Any) -> Any:
    """Merged batch norms have an epsilon of 0 in zennit, which PyTorch 2.11 refuses. This one is lost beside their
    variance of 1, so that the numbers are the same."""

    class Merging(canonizer):  # type: ignore[misc]
        def register(self, linears: list[nn.Module], batch_norm: nn.Module) -> None:
            super().register(linears, batch_norm)
            object.__setattr__(batch_norm, "eps", torch.finfo(torch.float32).tiny)

    return Merging


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    """The forward pass of :class:`dynlrp.zoo.nets.Bottleneck`, with a module as its sum."""
    return torch.relu(self.canonizer_sum(torch.stack([self.body(x), self.skip(x)], dim=-1)))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Takes back what merging batch norms leaves behind: attributes in front of parameters, biases that were none."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)
            for name in (*parameters, *module._buffers):
                vars(module).pop(name, None)


def _mbconv(self: Any, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
    """The forward pass of EfficientNet-Lite's block, which has no squeeze and excitation, with a module as its sum."""
    x = inputs
    if self._block_args.expand_ratio != 1:
        x = self._swish(self._bn0(self._expand_conv(x)))
    x = self._bn2(self._project_conv(self._swish(self._bn1(self._depthwise_conv(x)))))
    if self.id_skip and self._block_args.stride == 1 and self._block_args.input_filters == x.shape[1]:
        total: Tensor = self.canonizer_sum(torch.stack([x, inputs], dim=-1))
        return total
    return x


def composite(name: str, model: nn.Module, sums: float = 1e-6, **options: Any) -> Any:
    """A composite of zennit, or ``Epsilon``: the epsilon rule, 1e-6, on every layer with weights.

    ``sums`` is the stabiliser of residual sums and average pooling.
    """
    from zennit import composites, rules, types

    layers = composites.layer_map_base(sums)
    if name == "Epsilon":
        layers.append((types.Linear, rules.Epsilon(1e-6)))
        return composites.LayerMapComposite(layers, canonizers=canonizers(model))
    return getattr(composites, name)(**options, layer_map=layers, canonizers=canonizers(model))


def relevance(case: Case, target: Tensor | None, name: str, sums: float = 1e-6) -> Tensor:
    """As users call it: hooks are registered for this explanation and removed again."""
    from zennit.attribution import Gradient

    x = case.x
    options: dict[str, Any] = {}
    if name == "EpsilonGammaBox":  # bounds as in dynlrp's: of each sample
        options = {"low": x.amin((1, 2, 3), keepdim=True), "high": x.amax((1, 2, 3), keepdim=True)}

    def seed(output: Tensor) -> Tensor:
        places = output.argmax(1) if target is None else target
        return torch.where(torch.arange(output.shape[1], device=output.device) == places[:, None], output.detach(), 0.0)

    with restored(case.model), Gradient(case.model, composite(name, case.model, sums, **options)) as attributor:
        found: Tensor = attributor(x, seed)[1]
    return found


_COMPOSITES: dict[str, str | Composite] = {
    "Epsilon": Composite.of("epsilon 1e-6", {"dense": Epsilon(1e-6), "convolution": Epsilon(1e-6)}),
    "EpsilonPlus": "epsilon_plus",
    "EpsilonAlpha2Beta1": "epsilon_alpha2_beta1",
    "EpsilonPlusFlat": "epsilon_plus_flat",
    "EpsilonAlpha2Beta1Flat": "epsilon_alpha2_beta1_flat",
    "EpsilonGammaBox": "epsilon_gamma_box",
}

METHODS = [
    Method(
        f"zennit {name}",
        partial(relevance, name=name),
        convolutional,
        same,
        "zennit",
        partial(relevance, name=name, sums=1e-12),
    )
    for name, same in _COMPOSITES.items()
]

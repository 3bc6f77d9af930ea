"""Make zennit.npz: relevance by zennit 1.0 for the models and layers of models.py. See README.md."""

import importlib.metadata
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from models import LAYERS, NETWORKS, PLAIN_LAYERS, Block, build, inputs
from torch import Tensor, nn


def stub_torchvision() -> None:
    """Put an empty torchvision in sys.modules.

    zennit imports torchvision only to name a few of its classes for isinstance checks. None of our models has
    one, and a torchvision that fits the torch build is not always to be had.
    """
    names = {"ops": ["FrozenBatchNorm2d"], "models.resnet": ["Bottleneck", "BasicBlock"]}
    for path in ["", "models", *names]:
        name = f"torchvision.{path}".rstrip(".")
        module = sys.modules[name] = ModuleType(name)
        for cls in names.get(path, []):
            setattr(module, cls, type(cls, (nn.Module,), {}))
        if path:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)


stub_torchvision()
from zennit import composites, rules  # noqa: E402
from zennit.attribution import Gradient  # noqa: E402
from zennit.canonizers import SequentialMergeBatchNorm  # noqa: E402
from zennit.composites import LayerMapComposite, layer_map_base  # noqa: E402
from zennit.core import Composite, Hook, Stabilizer  # noqa: E402
from zennit.layer import Sum  # noqa: E402
from zennit.types import BatchNorm, Linear  # noqa: E402


class Add(nn.Module):
    """A residual add as zennit has it: stack both operands, sum them with a module it has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = Sum()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.sum(torch.stack([a, b], dim=-1))


def weighted_rules(zero: str | None) -> dict[str, Hook]:
    """The rules for layers with a weight, by name; what a name gives as `=number` is the rule's parameter."""
    kwargs = {"zero_params": zero}
    return {
        "epsilon=1e-6": rules.Epsilon(1e-6, **kwargs),
        "epsilon=0.1": rules.Epsilon(0.1, **kwargs),
        "epsilon_clip=0.1": rules.Epsilon(Stabilizer(0.1, clip=True), **kwargs),
        "epsilon_norm=0.1": rules.Epsilon(Stabilizer(0.1, norm_scale=True), **kwargs),
        "gamma=0.25": rules.Gamma(0.25, **kwargs),
        "gamma=0.25,stabilizer=0.1": rules.Gamma(0.25, stabilizer=0.1, **kwargs),
        "gamma=100": rules.Gamma(100.0, **kwargs),
        "zplus": rules.ZPlus(**kwargs),
        "zplus,stabilizer=0.1": rules.ZPlus(stabilizer=0.1, **kwargs),
        "alpha_beta=2,1": rules.AlphaBeta(2.0, 1.0, **kwargs),
        "alpha_beta=1,0": rules.AlphaBeta(1.0, 0.0, **kwargs),
        "zbox=-3,3": rules.ZBox(-3.0, 3.0, **kwargs),
        "wsquare": rules.WSquare(**kwargs),
        "flat": rules.Flat(**kwargs),
    }


def plain_rules(name: str) -> dict[str, Hook]:
    """The rules for a layer without a weight, or that acts on each element."""
    if "pool" in name:
        return {"norm": rules.Norm(), "norm,stabilizer=0.1": rules.Norm(0.1), "flat": rules.Flat()}
    return {"pass": rules.Pass()}


def network_composites(zero: str | None) -> dict[str, LayerMapComposite]:
    """Composites by name; those of zennit, and two that use one rule for every layer with a weight."""
    merge = {"canonizers": [SequentialMergeBatchNorm()]}
    kwargs = {"zero_params": zero, **merge}

    def everywhere(rule: Hook) -> LayerMapComposite:
        return LayerMapComposite([*layer_map_base(), (Linear, rule)], **merge)

    return {
        "epsilon_plus": composites.EpsilonPlus(**kwargs),
        "epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1(**kwargs),
        "epsilon_plus_flat": composites.EpsilonPlusFlat(**kwargs),
        "epsilon_alpha2_beta1_flat": composites.EpsilonAlpha2Beta1Flat(**kwargs),
        "epsilon_gamma_box=-3,3": composites.EpsilonGammaBox(-3.0, 3.0, **kwargs),
        "excitation_backprop": composites.ExcitationBackprop(**kwargs),
        "epsilon=1e-6": everywhere(rules.Epsilon(1e-6, zero_params=zero)),
        "epsilon=0.1": everywhere(rules.Epsilon(0.1, zero_params=zero)),
        "gamma=0.25": everywhere(rules.Gamma(0.25, zero_params=zero)),
    }


def relevance(model: nn.Module, composite: Composite, x: Tensor, seed: Tensor) -> Tensor:
    """Relevance of `x` when that of the output is `seed * output`.

    zennit sends relevance where the gradient goes: a hooked layer takes relevance from `output.grad` and
    returns relevance as the gradient of its input. In every model here the layer next to the input has a
    rule, so what arrives at `x` is relevance already and is not to be multiplied by `x`. Layers without one
    (max pooling, flatten; activations under excitation_backprop) pass it by their plain gradient.
    """
    # A copy, because removing a canonizer does not restore the state dict in full.
    model = deepcopy(model)
    with Gradient(model=model, composite=composite) as attributor:
        _, result = attributor(x, lambda output: seed * output.detach())
    return result


def layers() -> dict[str, Tensor]:
    """Single rules on single layers."""
    out: dict[str, Tensor] = {}
    for index, (name, (_, shape)) in enumerate((LAYERS | PLAIN_LAYERS).items()):
        model = build(name, LAYERS | PLAIN_LAYERS, seed=index)
        out |= {f"layer/{name}/state/{key}": value for key, value in model.state_dict().items()}
        for sign in ("mixed", "nonnegative"):
            at = f"layer/{name}/{sign}"
            x = inputs(shape, 100 + index, sign)
            output = model(x).detach()
            # Relevance of either sign and any size relative to the output.
            seed = inputs(tuple(output.shape), 200 + index)
            out |= {f"{at}/input": x, f"{at}/output": output, f"{at}/seed": seed}
            if name in LAYERS:
                hooks = weighted_rules(None)
                if getattr(model, "bias", None) is not None:
                    hooks |= {f"{key};zero=bias": rule for key, rule in weighted_rules("bias").items()}
            else:
                hooks = plain_rules(name)
            for key, rule in hooks.items():
                composite = Composite(lambda ctx, name, module, rule=rule: rule)
                out[f"{at}/relevance/{key}"] = relevance(model, composite, x, seed)
    return out


def networks() -> dict[str, Tensor]:
    """Composites on whole networks, batch norm merged into the layer before it."""
    out: dict[str, Tensor] = {}
    for index, (name, (_, shape)) in enumerate(NETWORKS.items()):
        at = f"network/{name}"
        model = build(name, NETWORKS, seed=40 + index)
        x = inputs(shape, 300 + index)
        output = model(x).detach()
        seed = torch.nn.functional.one_hot(output.argmax(1), output.shape[1]).to(output)
        out |= {f"{at}/state/{key}": value for key, value in model.state_dict().items()}
        out |= {f"{at}/input": x, f"{at}/output": output, f"{at}/seed": seed}
        for block in model.modules():
            if isinstance(block, Block):
                block.add = Add()
        todo = network_composites(None)
        todo |= {f"{key};zero=bias": composite for key, composite in network_composites("bias").items()}
        if any(isinstance(module, BatchNorm) for module in model.modules()):
            # Batch norm left alone: relevance passes it unchanged.
            todo["epsilon_plus;unmerged"] = composites.EpsilonPlus()
        for key, composite in todo.items():
            out[f"{at}/relevance/{key}"] = relevance(model, composite, x, seed)
    return out


if __name__ == "__main__":
    numbers = {key: value.numpy() for key, value in (layers() | networks()).items()}
    bad = [key for key, value in numbers.items() if not np.isfinite(value).all()]
    assert not bad, bad
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "zennit")]
    numbers["versions"] = np.array(versions)
    np.savez_compressed(Path(__file__).with_name("zennit.npz"), **numbers)

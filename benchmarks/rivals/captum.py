"""captum's LRP: rules on modules. Every layer needs a type that it knows, and activations that do not act in place."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from benchmarks.architectures import Case
from benchmarks.rivals.method import Method, convolutional
from benchmarks.rivals.plain import at_target
from dynlrp import Composite, When
from dynlrp.rules import Epsilon, Gamma


def fits(case: Case) -> bool:
    """Convolutional nets of its types; types it does not know are an error of captum's."""
    known = {
        nn.MaxPool2d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.Dropout,
        nn.Tanh, nn.Flatten, nn.Identity,
    }  # fmt: skip
    leaves = {type(module) for module in case.model.modules() if not any(True for _ in module.children())}
    return convolutional(case) and leaves <= known


def relevance(case: Case, target: Tensor | None, gamma: float | None = None, pooling: float = 1e-9) -> Tensor:
    """The epsilon rule, 1e-9, on every layer; or the gamma rule on all convolutions but the first.

    ``pooling`` is the stabiliser of pooling, and of flattening and nothing, which have no rule in captum.
    """
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule

    convolutions = [module for module in case.model.modules() if isinstance(module, nn.Conv2d)]
    activations = [module for module in case.model.modules() if isinstance(module, nn.ReLU) and module.inplace]
    for module in activations:
        module.inplace = False
    if gamma is not None:
        for layer in convolutions[1:]:
            layer.rule = GammaRule(gamma, set_bias_to_zero=True)  # captum takes the rules away itself
    for layer in case.model.modules():
        if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity)):
            layer.rule = EpsilonRule(pooling)
    try:
        found: Tensor = LRP(case.model).attribute(case.x.detach().requires_grad_(), target=at_target(case, target))
    finally:
        for module in activations:
            module.inplace = True
    return found


EPSILON = Composite.of("captum epsilon", {"dense": Epsilon(1e-9), "convolution": Epsilon(1e-9)})
GAMMA = Composite.of(
    "captum gamma",
    {
        When("convolution", first=True): Epsilon(1e-9),
        "convolution": Gamma(0.25, epsilon=1e-9, bias=False),
        "dense": Epsilon(1e-9),
    },
)

METHODS = [
    Method("captum LRP", relevance, fits, EPSILON, "captum", partial(relevance, pooling=1e-15)),
    Method(
        "captum LRP gamma",
        partial(relevance, gamma=0.25),
        fits,
        GAMMA,
        "captum",
        partial(relevance, gamma=0.25, pooling=1e-15),
    ),
]

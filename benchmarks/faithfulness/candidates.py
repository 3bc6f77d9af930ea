"""The composites that are compared, for each family of networks."""

from __future__ import annotations

from dynlrp import COMPOSITES, Composite, When
from dynlrp.rules import Attention, Epsilon, Flat, Gamma, Hold, Magnitude, Rule, WSquare

Rules = dict[str | When, Rule]
FIRST = When("convolution", first=True)
COEFFICIENTS: Rules = {When("softmax", role="attention"): Hold(), "attention": Attention(scores=0.0)}
"""Attention weights as coefficients, as in CP-LRP; gates in equal shares."""
AUTO: Rules = {"convolution": Gamma(1.0)}


def _all(built_in: tuple[str, ...], rules: dict[str, Rules]) -> dict[str, Composite]:
    return {name: COMPOSITES[name] for name in built_in} | {
        name: Composite.of(name, entries) for name, entries in rules.items()
    }


CONVOLUTIONAL = _all(
    (
        "auto", "epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box",
        "dynamiclrp",
    ),
    {
        f"gamma {gamma:g}": {"convolution": Gamma(gamma)}
        for gamma in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
        if Gamma(gamma) != AUTO["convolution"]
    }
    | {
        "auto, gamma on dense layers too": {**AUTO, "dense": AUTO["convolution"]},
        "auto, flat first": {FIRST: Flat(), **AUTO},
        "auto, w-square first": {FIRST: WSquare(), **AUTO},
        "auto, sums by magnitude": {**AUTO, "addition": Magnitude()},
        "epsilon 0.1 of the rms": {family: Epsilon(0.1, relative=True) for family in ("convolution", "dense")},
    },
)  # fmt: skip
TRANSFORMER = _all(
    ("auto", "attnlrp", "cplrp"),
    {f"auto, gamma {gamma:g} on dense layers": {**AUTO, "dense": Gamma(gamma)} for gamma in (0.02, 0.1, 0.5)}
    | {
        f"cplrp, gamma {gamma:g} on dense layers": {**AUTO, "dense": Gamma(gamma), **COEFFICIENTS}
        for gamma in (0.02, 0.1, 0.5)
    }
    | {
        "auto, epsilon 0.1 of the rms on dense layers": {**AUTO, "dense": Epsilon(0.1, relative=True)},
        "auto, sums by magnitude": {**AUTO, "addition": Magnitude()},
    },
)
FAMILIES = {"convolutional": CONVOLUTIONAL, "transformer": TRANSFORMER}

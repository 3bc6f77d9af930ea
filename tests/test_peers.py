"""The same rules give the same numbers as zennit and LXT. See ``tests/peers`` for how theirs were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynlrp import Composite, explain
from dynlrp.composite import COMPOSITES, FLAT_FIRST, epsilon_gamma_box
from dynlrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Rule, WSquare, ZBox, ZPlus
from tests.peers import models

ZENNIT = np.load(Path(__file__).parent / "peers" / "zennit.npz")
LXT = np.load(Path(__file__).parent / "peers" / "lxt.npz")


def stored(archive: Any, key: str) -> Tensor:
    return torch.from_numpy(archive[key])


def load(module: nn.Module, archive: Any, prefix: str) -> nn.Module:
    state = {key.removeprefix(prefix): stored(archive, key) for key in archive.files if key.startswith(prefix)}
    module.load_state_dict(state, strict=False)
    return module.eval()


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest value."""
    scale = max(float(theirs.abs().max()), 1e-300)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) / scale < tolerance


RULES: dict[str, Rule] = {
    "epsilon=1e-6": Epsilon(1e-6),
    "epsilon=0.1": Epsilon(0.1),
    "gamma=0.25": Gamma(0.25),
    "gamma=0.25,stabilizer=0.1": Gamma(0.25, epsilon=0.1),
    "gamma=100": Gamma(100.0),
    "zplus": ZPlus(),
    "zplus,stabilizer=0.1": ZPlus(epsilon=0.1),
    "alpha_beta=2,1": AlphaBeta(2.0, 1.0),
    "alpha_beta=1,0": AlphaBeta(1.0, 0.0),
    "zbox=-3,3": ZBox(-3.0, 3.0),
    "wsquare": WSquare(),
    "flat": Flat(),
}


def layer_cases() -> list[tuple[str, str, str]]:
    keys = [key.split("/") for key in ZENNIT.files if key.startswith("layer/") and "/relevance/" in key]
    return [(k[1], k[2], k[4]) for k in keys if k[1] in models.LAYERS and k[4].split(";")[0] in RULES]


@pytest.mark.parametrize(("name", "sign", "case"), layer_cases())
def test_single_layers_equal_zennit(name: str, sign: str, case: str) -> None:
    layer = load(models.build(name, models.LAYERS), ZENNIT, f"layer/{name}/state/")
    prefix = f"layer/{name}/{sign}/"
    rule_name, _, option = case.partition(";")
    rule = RULES[rule_name]
    if option == "zero=bias":
        rule = type(rule)(**{**vars(rule), "bias": False})
    composite = Composite.of("one rule", {"dense": rule, "convolution": rule})
    seed = stored(ZENNIT, prefix + "seed")
    explanation = explain(
        layer, stored(ZENNIT, prefix + "input"), lambda y: (y * seed).flatten(1).sum(1), composite=composite
    )
    # float64 on both sides; sums of a few dozen terms in another order.
    close(explanation.relevance, stored(ZENNIT, prefix + "relevance/" + case), 1e-12)
    assert explanation.ledger.closes


SMALL = {"dense": Epsilon(1e-6), "convolution": Epsilon(1e-6)}
NETWORK_COMPOSITES: dict[str, Composite] = {
    "epsilon_plus": COMPOSITES["epsilon_plus"],
    "epsilon_alpha2_beta1": COMPOSITES["epsilon_alpha2_beta1"],
    "epsilon_plus_flat": COMPOSITES["epsilon_plus_flat"],
    "epsilon_alpha2_beta1_flat": COMPOSITES["epsilon_alpha2_beta1_flat"],
    "epsilon_gamma_box=-3,3": epsilon_gamma_box(-3.0, 3.0),
    "epsilon=1e-6": Composite.of("epsilon", {"dense": Epsilon(1e-6), "convolution": Epsilon(1e-6)}),
    "epsilon=0.1": Composite.of("epsilon", {"dense": Epsilon(0.1), "convolution": Epsilon(0.1)}),
    "gamma=0.25": Composite.of("gamma", {"dense": Gamma(0.25), "convolution": Gamma(0.25)}),
}


def network_cases() -> list[tuple[str, str]]:
    keys = [key.split("/") for key in ZENNIT.files if key.startswith("network/") and "/relevance/" in key]
    return [(k[1], k[3]) for k in keys if k[3] in NETWORK_COMPOSITES]


@pytest.mark.parametrize(("name", "case"), network_cases())
def test_composites_equal_zennit(name: str, case: str) -> None:
    network = load(models.build(name, models.NETWORKS), ZENNIT, f"network/{name}/state/")
    explanation = explain(network, stored(ZENNIT, f"network/{name}/input"), None, composite=NETWORK_COMPOSITES[case])
    # zennit stabilises average pooling and residual sums with 1e-6 too, where we are exact; that moves relevance by
    # 1e-6 over the size of the activations there, which are of order 0.1 to 1.
    close(explanation.relevance, stored(ZENNIT, f"network/{name}/relevance/{case}"), 1e-4)
    assert explanation.ledger.closes


@pytest.mark.parametrize("composite", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_transformers_equal_lxt(name: str, composite: str) -> None:
    if f"{name}/f32/{composite}/relevance" not in LXT.files:
        pytest.skip("LXT has no such variant")
    model = load(models.TRANSFORMERS[name](), LXT, f"{name}/state/").float()
    targets = stored(LXT, f"{name}/target")
    last = name != "bert"
    target = [(6, int(t)) for t in targets] if last else targets
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        explanation = explain(model, {"input_ids": stored(LXT, f"{name}/input_ids")}, target, composite=composite)
        theirs = stored(LXT, f"{name}/f32/{composite}/token_relevance")
        close(explanation.relevance["input_ids"], theirs, 1e-5)
        assert explanation.ledger.closes


_ = FLAT_FIRST, SMALL

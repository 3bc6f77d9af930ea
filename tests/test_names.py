"""Names by glob, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynlrp import InputError, allocate, explain
from dynlrp.names import matching

NAMES = ["", "block.0.query", "block.0.key", "block.1.query", "head"]


def test_names_that_a_glob_fits() -> None:
    assert matching("*", NAMES, "module") == NAMES
    assert matching("block.?.query", iter(NAMES), "module") == ["block.0.query", "block.1.query"]
    assert matching("block.[!0].*", [*NAMES, *NAMES], "module") == ["block.1.query"]


@pytest.mark.parametrize(
    ("pattern", "names", "says"),
    [
        ("heat", NAMES, "no module is called 'heat'; did you mean 'head'?"),
        ("zzz*", NAMES, "no module is called 'zzz*'; there are block.0.query, block.0.key, block.1.query, head"),
        ("zzz*", [f"{n}" for n in range(9)], "no module is called 'zzz*'; there are 0, 1, 2, 3, 4, 5, 6, 7 ..."),
        ("zzz*", [""], "no module is called 'zzz*'; there is none"),
    ],
)
def test_a_glob_that_fits_none(pattern: str, names: list[str], says: str) -> None:
    with pytest.raises(InputError) as raised:
        matching(pattern, names, "module")
    assert str(raised.value) == says
    with pytest.raises(InputError, match=r"'.*': because; "):
        matching(pattern, names, "module", "because")


MODEL, X = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda: explain(MODEL, X, layers="nothing"), "module"),
        (lambda: explain(MODEL, X, condition={"nothing": [0]}), "module"),
        (lambda: explain(MODEL, X, layers="nothing:heads"), "tensor of an attention"),
        (lambda: explain(MODEL, X, parameters=["0.*", "nothing"]), "parameter"),
        (lambda: allocate(MODEL, X, budget=4, layers="nothing"), "linear map or convolution"),
        (lambda: allocate(MODEL, X, budget=4, groups=[["0", "nothing"]]), "layer"),
        (lambda: allocate(MODEL, X, budget=4, pinned={"nothing": 8}), "layer"),
    ],
)
def test_wherever_names_are_given(ask: Callable[[], object], kind: str) -> None:
    with pytest.raises(InputError, match=f"no {kind} is called 'nothing"):
        ask()

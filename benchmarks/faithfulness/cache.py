"""Small models that are trained here: once, then kept outside of the repository."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dynlrp" / "faithfulness"


def kept(name: str, recipe: str, make: Callable[[], dict[str, Any]], folder: Path = FOLDER) -> dict[str, Any]:
    """What ``make()`` gives, from the folder if it was made from the same ``recipe`` before."""
    path = folder / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.pt"
    if not path.exists():
        start = time.perf_counter()
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(made, path)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def trained(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    steps: int,
    rate: float,
    data: str,
) -> nn.Module:
    """``model``, trained by AdamW on ``loss(model, generator)``; ``data`` changes with what the loss draws."""

    def train() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        model.train()
        for step in range(steps):
            value = loss(model, generator)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99:
                print(f"{name}: step {step + 1} of {steps}, loss {value.item():.4f}", file=sys.stderr, flush=True)
        return model.state_dict()

    model.load_state_dict(kept(name, f"{model}{steps}{rate}{data}", train))
    return model.eval().requires_grad_(False)

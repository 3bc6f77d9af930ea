"""Libraries that take explanation methods, with ours: `make test-tools` installs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dynlrp import LRP, explain
from tests.test_readme import ROOT, run_blocks

for _name in ("captum", "inseq", "quantus"):
    pytest.importorskip(_name)


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = run_blocks(ROOT / "docs" / "pages" / "howto" / "interop.md")
    # inseq's last step sees all tokens but the last; its relevance of their embeddings is that of the ids.
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    expected = explain(namespace["language"], {"input_ids": ids}, (-1, 7)).relevance["input_ids"][0]
    torch.testing.assert_close(namespace["steps"][:5, -1], expected, rtol=1e-4, atol=1e-6)  # float32, other kernels


def test_noise_tunnel_averages_maps_of_noisy_inputs() -> None:
    from captum.attr import NoiseTunnel

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval(), torch.rand(2, 6).double()
    noisy: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        noisy.append(x.detach().clone())
        return model(x)

    found = NoiseTunnel(LRP(forward)).attribute(x, nt_type="smoothgrad", nt_samples=5, stdevs=0.3, target=1)
    assert noisy[-1].shape == (10, 6)
    maps = explain(model, noisy[-1], 1).relevance.reshape(2, 5, 6)
    torch.testing.assert_close(found, maps.mean(1), rtol=1e-9, atol=1e-12)

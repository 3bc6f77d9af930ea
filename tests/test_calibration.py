"""Calibration data of every kind comes out as batches of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynlrp import InputError, allocate
from dynlrp.allocation import Calibration

X = torch.arange(20.0).reshape(10, 2)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids * mask


def batches(data: Any, model: nn.Module | None = None, **options: Any) -> list[Any]:
    return list(Calibration(data, **options).batches(model or One()))


def test_a_tensor_is_cut() -> None:
    found = batches(X, batch_size=4)
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), X)
    assert len(Calibration(X)) == 10


def test_a_mapping_is_cut() -> None:
    from transformers import BatchEncoding

    words = BatchEncoding({"ids": X, "mask": X > 3, "flag": True, "table": torch.ones(3)})
    found = batches(words, batch_size=6)
    assert [set(batch) for batch in found] == [{"ids", "mask", "flag", "table"}] * 2
    assert torch.equal(found[1]["ids"], X[6:])
    assert torch.equal(found[1]["mask"], X[6:] > 3)
    assert found[1]["flag"] is True
    assert len(found[1]["table"]) == 3


def test_positional_arguments_are_cut() -> None:
    found = batches((X, X + 1), Two(), batch_size=8)
    assert [tuple(map(len, batch)) for batch in found] == [(8, 8), (2, 2)]


def test_batches_come_as_they_are() -> None:
    assert [len(b) for b in batches([X, X[:3]])] == [10, 3]
    assert len(Calibration([X, X[:3]])) == 13
    assert [b["ids"].shape for b in batches([{"ids": X}, {"ids": X[:1]}])] == [(10, 2), (1, 2)]


def test_labels_of_a_loader_are_left_out() -> None:
    loader = DataLoader(TensorDataset(X, torch.arange(10)), batch_size=3)
    found = batches(loader)
    assert [len(batch) for batch in found] == [1] * 4
    assert torch.equal(torch.cat([batch[0] for batch in found]), X)
    assert [len(batch) for batch in batches(loader, Two())] == [2] * 4
    assert len(Calibration(loader)) == 10


def test_a_generator_serves_more_than_once() -> None:
    calibration = Calibration(X[i : i + 2] for i in range(0, 10, 2))
    assert torch.equal(torch.cat(list(calibration.batches(One()))), torch.cat(list(calibration.batches(One()))))


def test_no_more_than_asked_for() -> None:
    assert [len(b) for b in batches(X, batch_size=4, samples=6)] == [4, 2]
    assert [len(b) for b in batches([X, X], samples=13)] == [10, 3]
    assert len(Calibration(X, samples=6)) == 6
    assert len(Calibration(X, samples=60)) == 10


def test_what_is_no_calibration() -> None:
    with pytest.raises(InputError, match="calibration is int"):
        batches(3)
    with pytest.raises(InputError, match="holds no tensor"):
        batches({"text": "words"})
    with pytest.raises(InputError, match="positive"):
        Calibration(X, batch_size=0)
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with pytest.raises(InputError, match="holds no batch"):
        allocate(model, [], 20)


def test_kinds_agree() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    loader = DataLoader(TensorDataset(X), batch_size=3)
    kinds: list[Any] = [X, (X,), [X[:7], X[7:]], loader, {"input": X}]
    means = [allocate(model, kind, 20, score="relevance").scores.mean for kind in kinds]
    for mean in means[1:]:
        assert torch.allclose(mean, means[0], rtol=1e-5)  # float32, summed in other orders

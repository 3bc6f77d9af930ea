"""Buffers that a forward pass writes are put back, bit by bit, and others are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynlrp import explain
from dynlrp.buffers import SMALL, Kept

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


class Failure(Exception):
    """Raised half-way."""


class Writes(nn.Module):
    """Two layers with a buffer each, which the forward pass of the second writes."""

    def __init__(self, write: Callable[[nn.Module], object], make: Callable[[], Tensor], fails: bool = False) -> None:
        super().__init__()
        self.write, self.fails = write, fails
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.first.register_buffer("table", make())
        self.second.register_buffer("table", make())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.write(self.second)
        if self.fails:
            raise Failure
        return self.second(x)


def bits(x: Tensor) -> bytes:
    return x.detach().resolve_conj().contiguous().view(torch.uint8).numpy().tobytes()


def other(x: Tensor) -> Tensor:
    """Other numbers of the same type."""
    return ~x if x.dtype is torch.bool else x + 1


def _write_view(layer: nn.Module) -> None:
    view = layer.table[..., :1]
    view.copy_(other(view))


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda layer: layer.table.copy_(other(layer.table)),
    "by a view": _write_view,
    "through data": lambda layer: layer.table.data.copy_(other(layer.table)),
    "one entry through data": lambda layer: layer.table.data[-1, -1:].copy_(other(layer.table[-1, -1:])),
    "as out": lambda layer: torch.where(torch.tensor(True), other(layer.table), layer.table, out=layer.table),
    "replaced": lambda layer: setattr(layer, "table", other(layer.table)),
    "removed": lambda layer: delattr(layer, "table"),
    "None": lambda layer: setattr(layer, "table", None),
    "other memory": lambda layer: setattr(layer.table, "data", other(layer.table)),
    "other memory of another shape": lambda layer: setattr(layer.table, "data", layer.table.new_zeros(3)),
    "set": lambda layer: layer.table.set_(other(layer.table)),
    "resized": lambda layer: layer.table.resize_(2, 2),
    "resized and written": lambda layer: layer.table.resize_(2, 2).zero_(),
    "written, then replaced": lambda layer: (layer.table.zero_(), setattr(layer, "table", other(layer.table))),
    "moved, then written": lambda layer: (layer.table.transpose_(0, 1), layer.table.zero_()),
    "in and out of inference": lambda layer: torch.inference_mode()(layer.table.data.zero_)(),
}
SIZES = {"small": (6, 5), "large": (3, SMALL), "odd and large": (3, SMALL // 2 + 1)}
DTYPES = [torch.float32, torch.float64, torch.bool, torch.int64, torch.bfloat16, torch.complex64, torch.complex128]


def made(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numbers = torch.arange(shape[0] * shape[1]).reshape(shape) % 7 - 3
    return (numbers > 0) if dtype is torch.bool else numbers.to(dtype)


def comes_back(write: Callable[[nn.Module], object], make: Callable[[], Tensor], fails: bool = False) -> None:
    model = Writes(write, make, fails).eval()
    tables = [layer.table for layer in (model.first, model.second)]
    aliases = [table[:] for table in tables]
    before = [(bits(t), t.data_ptr(), t.shape, t.stride()) for t in tables]
    version = tables[0]._version
    if fails:
        with pytest.raises(Failure):
            explain(model, X, 0)
    else:
        explain(model, X, 0)
    for layer, table, alias, then in zip((model.first, model.second), tables, aliases, before, strict=True):
        assert layer.table is table
        assert "table" in layer._buffers
        assert (bits(table), table.data_ptr(), table.shape, table.stride()) == then
        assert bits(alias) == then[0]
    assert tables[0]._version == version  # nobody wrote it


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_what_was_written_comes_back(way: str, size: str, fails: bool) -> None:
    comes_back(WAYS[way], lambda: made(SIZES[size], torch.float32), fails)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["in place", "one entry through data", "replaced", "other memory"])
def test_of_every_type(way: str, dtype: torch.dtype, size: str) -> None:
    comes_back(WAYS[way], lambda: made(SIZES[size], dtype))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": torch.t,
    "every other column": lambda x: x[:, ::2],
    "a part": lambda x: x[1:, 1:],
    "conjugate": torch.conj,
}


@pytest.mark.parametrize("way", ["in place", "by a view", "through data", "one entry through data", "replaced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_every_layout(layout: str, way: str) -> None:
    if layout == "conjugate" and "data" in way:
        pytest.skip("of lazily conjugated tensors, versions tell")
    for shape in ((4, 7), (4, SMALL)):
        comes_back(WAYS[way], lambda shape=shape: LAYOUTS[layout](made(shape, torch.complex64)))


@pytest.mark.parametrize("size", SIZES)
def test_signs_of_zeros_and_what_is_not_a_number(size: str) -> None:
    """They are put back where they were changed, and count as unchanged where they were not."""
    zeros = torch.zeros(SIZES[size])
    zeros[0, 0] = torch.nan
    comes_back(lambda layer: layer.table.data.neg_(), zeros.clone)


def test_large_buffers_that_hold_the_same_are_copied_once() -> None:
    equal = [made((3, SMALL), torch.float32) for _ in range(4)]
    different = equal[0].clone()
    different[equal[0] == 0] = -0.0  # the same number
    buffers = [*equal, different, different.clone(), equal[0].view(torch.int32).clone()]
    layer = nn.Module()
    kept = Kept([(layer, str(number), buffer) for number, buffer in enumerate(buffers)])
    copies = [one.copy for one in kept._apart]
    assert [copy.data_ptr() == copies[0].data_ptr() for copy in copies] == [True] * 4 + [False] * 3
    assert copies[4].data_ptr() == copies[5].data_ptr() != copies[6].data_ptr()
    assert not {copy.data_ptr() for copy in copies} & {buffer.data_ptr() for buffer in buffers}
    before = [bits(buffer) for buffer in buffers]
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    kept.put_back(False)
    assert [bits(buffer) for buffer in buffers] == before


def test_buffers_of_other_kinds() -> None:
    """Sparse ones and those of subclasses are copied as they are."""

    class Special(Tensor):
        pass

    sparse = made((4, 3), torch.float32).to_sparse()
    special = made((4, 3), torch.float32).as_subclass(Special)
    meta = torch.empty(3, device="meta")
    layer = nn.Module()
    kept = Kept([(layer, "sparse", sparse), (layer, "special", special), (layer, "meta", meta)])
    before = sparse.to_dense(), bits(special.as_subclass(Tensor))
    sparse.mul_(2)
    special.mul_(2)
    kept.put_back(False)
    assert torch.equal(sparse.to_dense(), before[0])
    assert bits(special.as_subclass(Tensor)) == before[1]
    assert layer._buffers["meta"] is meta

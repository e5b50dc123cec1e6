"""Mapped tensors are read a piece at a time, and pages go back only where the file has them."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stabilitykit.checkpoints.huggingface import tensors_of
from stabilitykit.checkpoints.mapped import equal, give_back, pieces, read_once

SIZE = 1 << 24  # elements, 64 MiB
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    save_file({"w": torch.arange(SIZE, dtype=torch.float32).view(4096, -1)}, tmp_path / "w.safetensors")
    return tensors_of(tmp_path / "w.safetensors")["w"]


def resident_files() -> int:
    """Bytes of mapped files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@linux
def test_pages_that_were_read_go_back_and_come_again(mapped: Tensor) -> None:
    before = resident_files()
    total = mapped.double().sum()
    assert resident_files() - before > 0.9 * mapped.nbytes
    give_back(mapped)
    assert resident_files() - before < 0.1 * mapped.nbytes
    assert mapped.double().sum() == total


@linux
def test_no_more_than_a_piece_is_resident(mapped: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabilitykit.checkpoints.mapped.PIECE", SIZE // 8)
    before = resident_files()
    most = 0
    for piece in pieces(mapped, SIZE // 8):
        piece.sum()
        most = max(most, resident_files() - before)
        give_back(piece)
    assert 0.1 * mapped.nbytes < most < 0.2 * mapped.nbytes


@linux
def test_what_was_written_stays(mapped: Tensor) -> None:
    """The mapping is private: a page that was written to is the process's own, and the file has other values."""
    mapped[7, 5] = -1.0
    give_back(mapped)
    assert mapped[7, 5] == -1.0
    assert mapped[7, 6] == 7 * mapped.shape[1] + 6


def test_memory_that_is_no_file_is_left_alone() -> None:
    own = torch.arange(SIZE, dtype=torch.float32)
    give_back(own)
    assert own[-1] == SIZE - 1
    for small in (torch.ones(()), torch.ones(0), torch.ones(3), own[:100:2], torch.ones(2, device="meta")):
        give_back(small)


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 3), (1, 40), (3, 2, 4)])
def test_pieces_make_up_the_tensor(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    parts = pieces(tensor, 6)
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), tensor.reshape(-1))
    assert all(part.numel() <= 6 or len(part) == 1 for part in parts)
    assert torch.equal(torch.cat([part.reshape(-1) for part in read_once(tensor)]), tensor.reshape(-1))


def test_equal_is_torchs() -> None:
    one = torch.randn(4, 5)
    other = one.clone()
    assert equal(one, other)
    other[3, 4] += 1
    assert not equal(one, other)
    assert not equal(one, one.T)

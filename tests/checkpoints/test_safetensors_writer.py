"""Files written piece by piece are what the safetensors library reads, to the byte, in every dtype."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stabilitykit.checkpoints.mapped import pieces
from stabilitykit.checkpoints.safetensors_writer import _NAMES, Written, write_safetensors
from stabilitykit.errors import MisuseError


def written(name: str, tensor: Tensor, elements: int = 8) -> Written:
    return Written(name=name, dtype=tensor.dtype, shape=tensor.shape, pieces=lambda: pieces(tensor, elements))


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits there are, but for bool, which has two."""
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def parts(file: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end], file[end:]


@pytest.mark.parametrize("dtype", _NAMES, ids=str)
def test_every_dtype_reads_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {"a": some(dtype, 5, 3), "b": some(dtype, 1), "empty": some(dtype, 0, 4), "c": some(dtype, 7, 2, 3)}
    write_safetensors(tmp_path / "a", [written(name, one) for name, one in tensors.items()], {"format": "pt"})
    read = load_file(tmp_path / "a")
    for name, one in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), one.reshape(-1).view(torch.uint8))


def test_scalars_names_and_metadata_come_through_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    tensors = {"flag": torch.tensor([True]), "x.ü": torch.tensor(2.5), "y": torch.arange(3), "h": torch.ones(5).half()}
    seen: list[int] = []
    digest = write_safetensors(
        tmp_path / "a", [written(name, one) for name, one in tensors.items()], {"of": "ä"}, progress=seen.append
    )
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"of": "ä"}
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118  no mapping
            name: one.tolist() for name, one in tensors.items()
        }
        assert all(one.data_ptr() % one.element_size() == 0 for one in map(file.get_tensor, tensors))
    assert digest == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert sum(seen) == sum(one.nbytes for one in tensors.values())


def test_a_file_is_the_one_that_the_library_writes_but_for_the_space_that_aligns_it(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(3)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", [written(name, one) for name, one in tensors.items()], {"format": "pt"})
    (header, data), (theirs, their_data) = (parts((tmp_path / name).read_bytes()) for name in ("ours", "theirs"))
    assert (header.rstrip(), data) == (theirs.rstrip(), their_data)
    assert (8 + len(header)) % 64 == 0


def test_pieces_that_do_not_make_up_the_tensor_and_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    short = Written(name="a", dtype=torch.float32, shape=[4], pieces=lambda: [torch.ones(3)])
    long = Written(name="a", dtype=torch.float32, shape=[4], pieces=lambda: [torch.ones(3), torch.ones(2)])
    other = Written(name="a", dtype=torch.float32, shape=[4], pieces=lambda: [torch.ones(4).double()])
    for number, wrong in enumerate((short, long, other)):
        with pytest.raises(ValueError, match="a must be made of"):
            write_safetensors(tmp_path / str(number), [wrong], {})
    wide = Written(name="w", dtype=torch.complex128, shape=[1], pieces=lambda: [torch.ones(1, dtype=torch.complex128)])
    with pytest.raises(MisuseError, match=r"w is torch.complex128"):
        write_safetensors(tmp_path / "b", [wide], {})

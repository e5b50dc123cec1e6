"""A safetensors file written piece by piece: the library's own writer needs all of its tensors in memory.

The format: eight bytes with the length of the header, little-endian; the header, a JSON object that gives each tensor's
dtype, shape and place; the tensors' bytes, one after the other without gaps.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stabilitykit.errors import MisuseError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):
    _NAMES[torch.float8_e8m0fnu] = "F8_E8M0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A tensor to be written: `pieces` gives it as consecutive rows, or whole, when its turn has come.

    All of them together have `shape`, and each of them has `dtype`.
    """

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Iterable[Written],
    metadata: Mapping[str, str],
    *,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Writes the new file `path` and returns its SHA-256. `progress` is called with the bytes of each piece.

    Tensors are laid out by the size of their elements, the largest first, so that each is aligned; those of one size
    stay in the order given. Raises MisuseError for a dtype that the format has no name for, and ValueError for pieces
    that do not make up the tensor.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = json.dumps(_header(ordered, metadata), ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)  # so that tensors are aligned as torch aligns them
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (len(header).to_bytes(8, "little"), header):
            file.write(part)
            digest.update(part)
        for tensor in ordered:
            left = tensor.nbytes
            for piece in tensor.pieces():
                if piece.dtype != tensor.dtype or piece.nbytes > left:
                    raise ValueError(
                        f"{tensor.name} must be made of pieces of {tensor.dtype} and of {tensor.nbytes} bytes in all, "
                        f"got one of {piece.dtype} and {piece.nbytes} bytes, where {left} were left"
                    )
                raw = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(raw)
                digest.update(raw)
                left -= piece.nbytes
                if progress is not None:
                    progress(piece.nbytes)
            if left:
                raise ValueError(f"{tensor.name} must be made of {tensor.nbytes} bytes, and {left} of them are missing")
    return digest.hexdigest()


def _header(tensors: Sequence[Written], metadata: Mapping[str, str]) -> dict[str, object]:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise MisuseError(f"{tensor.name} is {tensor.dtype}, which a safetensors file cannot hold.")
        end = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    return header

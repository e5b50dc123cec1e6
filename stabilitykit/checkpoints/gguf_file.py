"""The GGUF container: typed metadata, then named tensors, in one file that is memory-mapped.

A parser of our own because the `gguf` package's reader makes several objects per vocabulary entry and
takes 14 s where this one takes a quarter of a second. Every length is checked against the rest of the file before
it is used, so that a damaged file ends in one sentence and allocates no memory. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from stabilitykit.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # equal for little-endian files; version 1 had 32-bit lengths
_MOST_DIMENSIONS = 4

# Scalars by value type, as struct and numpy both write them; a bool is a byte.
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}

Value = int | float | str | list[str] | NDArray[Any]
"""A metadata value. A float32 becomes the shortest decimal that rounds to it: 1e-06, not 9.99999997e-07."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor as stored: `rows` is (rows, bytes per row), uint8, a view of the file. `shape` is torch's, (out, in)."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    rows: NDArray[np.uint8]

    @property
    def block(self) -> int:
        """Elements of a row that are quantised together; 1 where each is stored by itself."""
        return int(GGML_QUANT_SIZES[self.type][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """The contents of a GGUF file, whatever the model."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_gguf_file(path: Path) -> GgufFile:
    """Parses the header and maps the tensors; no weight is read yet.

    Raises CheckpointError for a path that cannot be read, a file that is not little-endian GGUF of version 2 or 3, and
    one that is damaged or truncated anywhere.
    """
    cursor = _Cursor(path, _map(path))
    version, tensor_count, value_count = cursor.unpack(_HEADER)
    if version not in _VERSIONS:
        what = "it is big-endian" if version & 0xFFFF == 0 else f"its version is {version}"
        raise CheckpointError(
            f"{path} is not a little-endian GGUF file of version 2 or 3: {what}. Convert the checkpoint again, on a "
            "little-endian machine."
        )

    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the key {key!r} appears twice")
        metadata[key] = cursor.value(key)

    cursor.region = "the list of tensors"
    described = [cursor.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    cursor.region = "the tensors"
    tensors: dict[str, GgufTensor] = {}
    for name, dimensions, type_code, offset in described:
        if name in tensors:
            raise cursor.damaged(f"the tensor {name!r} appears twice")
        tensors[name] = cursor.stored(name, dimensions, type_code, start + offset)
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _map(path: Path) -> mmap.mmap:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; pass the .gguf file in it.")
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
            if magic == MAGIC:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"Cannot read the checkpoint {path}: {reason}.") from error
    raise CheckpointError(
        f"{path} is not a GGUF file: it begins with {magic!r} instead of the letters GGUF. Pass a checkpoint that was "
        "converted to GGUF."
    )


_HEADER = struct.Struct("<IQQ")
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_ARRAY = struct.Struct("<IQ")
_TYPE_AND_OFFSET = struct.Struct("<IQ")

_Described = tuple[str, tuple[int, ...], int, int]


class _Cursor:
    """A position in the file that never moves past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self.offset = len(MAGIC)
        self.region = "its header"

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is a damaged GGUF file: {what}. Download or convert it again.")

    def truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is a damaged or truncated GGUF file: it ends inside {self.region}, after "
            f"{self._size:,} bytes. Download it again."
        )

    def advance(self, size: int) -> int:
        """The current offset, moved on by `size` bytes that are checked to be there."""
        offset = self.offset
        if size > self._size - offset:
            raise self.truncated()
        self.offset = offset + size
        return offset

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self._data, self.advance(layout.size))

    def string(self) -> str:
        (size,) = self.unpack(_LENGTH)
        offset = self.advance(size)
        try:
            return self._data[offset : offset + size].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"a string in {self.region} is not UTF-8") from None

    def value(self, key: str) -> Value:
        self.region = f"the metadata, at {key!r}"
        (code,) = self.unpack(_TYPE)
        if code == GGUFValueType.STRING:
            return self.string()
        if code == GGUFValueType.ARRAY:
            code, count = self.unpack(_ARRAY)
            return self._strings(count) if code == GGUFValueType.STRING else self._numbers(code, count)
        if code not in _SCALARS:
            raise self.damaged(f"the value of {key!r} has the unknown type {code}")
        (number,) = self.unpack(struct.Struct(_SCALARS[code]))
        return float(str(np.float32(number))) if code == GGUFValueType.FLOAT32 else number

    def _numbers(self, code: int, count: int) -> NDArray[Any]:
        if code not in _SCALARS:  # arrays of arrays exist, but no Gemma has one
            raise self.damaged(f"{self.region} is an array of the unsupported type {code}")
        dtype = np.dtype(_SCALARS[GGUFValueType(code)])
        return np.frombuffer(self._data, dtype, count, self.advance(count * dtype.itemsize))

    def _strings(self, count: int) -> list[str]:
        if count * _LENGTH.size > self._size - self.offset:
            raise self.truncated()
        data, read, at, found = self._data, _LENGTH.unpack_from, self.offset, []
        last = self._size - _LENGTH.size
        for _ in range(count):  # a quarter of a million of them: `string` would take three times as long
            size = read(data, at)[0] if at <= last else self._size
            begin = at + _LENGTH.size
            at = begin + size
            if at > self._size:
                raise self.truncated()
            found.append(data[begin:at])
        self.offset = at
        try:
            return [string.decode() for string in found]
        except UnicodeDecodeError:
            raise self.damaged(f"a string in {self.region} is not UTF-8") from None

    def tensor(self) -> _Described:
        """A tensor's name, shape in torch's order, type and offset from the first tensor."""
        name = self.string()
        (count,) = self.unpack(_COUNT)
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self.damaged(f"the tensor {name!r} has {count} dimensions")
        dimensions = self.unpack(struct.Struct(f"<{count}Q"))
        return name, dimensions[::-1], *self.unpack(_TYPE_AND_OFFSET)

    def stored(self, name: str, shape: tuple[int, ...], code: int, offset: int) -> GgufTensor:
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(code)]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{self._path}: the gguf package does not know type {code} of the tensor {name!r}. The file is "
                "damaged, or needs a newer gguf package."
            ) from None
        if shape[-1] % block or 0 in shape:
            raise self.damaged(f"the tensor {name!r} of shape {list(shape)} does not fill blocks of {block}")
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
        if offset + rows * row_bytes > self._size:
            raise self.truncated()
        stored = np.frombuffer(self._data, np.uint8, rows * row_bytes, offset)
        return GgufTensor(shape=shape, type=GGMLQuantizationType(code), rows=stored.reshape(rows, row_bytes))

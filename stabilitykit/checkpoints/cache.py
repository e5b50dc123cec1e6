"""The cache folder for what is slow to recompute: dequantised tensors, digests of large files.

Everything in it can be deleted at any time. A file gets its name, by a rename, only when it is complete, so processes
may share the folder; a damaged entry is rebuilt.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.files import written_beside

VARIABLE = "STABILITYKIT_CACHE"

Progress = Callable[[int, int], None]
"""Called with the bytes done and the total number of bytes."""

# Part of every entry's name: increment it whenever the same file would be read into other tensors.
_LAYOUT = "1"
_READ_AT_ONCE = 1 << 24  # bytes
_ALIGNMENT = 64  # bytes; mapped tensors start on a cache line


def cache_folder() -> Path:
    """`$STABILITYKIT_CACHE`, by default the platform's cache folder of this user. It need not exist yet."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_cache_path("stabilitykit", appauthor=False)


@contextmanager
def cached_file(path: Path, needed: int) -> Iterator[Path]:
    """A temporary path beside `path`; it is renamed to `path` after the block, or removed if the block raises.

    Raises MisuseError where fewer than `needed` bytes are free, or the folder cannot be written to.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise MisuseError(
                f"The cache needs {needed:,} bytes in {folder}, but only {free:,} are free. Free some disk space, or "
                f"set {VARIABLE} to a folder on a larger disk."
            )
        with written_beside(path) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or error
        raise MisuseError(
            f"Cannot write to the cache folder {folder}: {reason}. Set {VARIABLE} to another folder."
        ) from error


def file_sha256(path: Path, cache: Path, progress: Progress | None = None) -> str:
    """The file's SHA-256 in hexadecimal, cached for as long as the file's size and modification time stay the same.

    `progress` is called with bytes, and only if the file has to be read.
    """
    path = path.resolve()
    state = path.stat()
    memo = cache / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    known = {"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    with suppress(OSError, ValueError):
        match json.loads(memo.read_text()):
            case {"sha256": str(digest), **rest} if rest == known and re.fullmatch("[0-9a-f]{64}", digest):
                return digest
    read = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_AT_ONCE):
            read.update(piece)
            if progress is not None:
                progress(file.tell(), state.st_size)
    digest = read.hexdigest()
    with suppress(MisuseError), cached_file(memo, 0) as partial:  # without it the next call hashes the file again
        partial.write_text(json.dumps({**known, "sha256": digest}))
    return digest


def cached_tensors(
    cache: Path,
    sha256: str,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Iterable[NDArray[np.float32]]],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The float32 tensors of the file with this digest, memory-mapped; they are made and cached on first use.

    `make(name)` yields a tensor's consecutive pieces, so that no tensor is ever held in memory as a whole. They are
    kept in float32: the product of a quantised block's scale and its integers is exact in no 16-bit format.

    Raises MisuseError where they do not fit on the disk.
    """
    path = cache / "tensors" / f"{sha256}-{_LAYOUT}.safetensors"
    tensors = _mapped(path, shapes)
    if tensors is None:
        _write(path, shapes, make, progress)
        tensors = _mapped(path, shapes)
    if tensors is None:
        raise MisuseError(
            f"Cannot read back {path}, which was just written to the cache. Check the disk, or set {VARIABLE} to a "
            "folder on another one."
        )
    return tensors


def _mapped(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The tensors, or None where the entry is missing, truncated or not of these shapes."""
    try:
        with safe_open(path, framework="pt") as entry:
            if entry.keys() ^ shapes.keys():
                return None
            tensors = {name: entry.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError):
        return None
    if any(tensor.dtype != torch.float32 or tensor.shape != shapes[name] for name, tensor in tensors.items()):
        return None
    return tensors


def _write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Iterable[NDArray[np.float32]]],
    progress: Progress | None,
) -> None:
    """Writes a safetensors file piece by piece; the library's own writer needs every tensor in memory."""
    header: dict[str, object] = {}
    total = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (total, total + size)}
        total += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with cached_file(path, 8 + len(text) + total) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for name in shapes:
            for piece in make(name):
                np.asarray(piece, dtype="<f4").tofile(file)
                done += 4 * piece.size
                if progress is not None:
                    progress(done, total)
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before the bytes

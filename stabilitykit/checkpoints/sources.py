"""How a checkpoint is named, whatever its format."""

from dataclasses import replace
from pathlib import Path

from stabilitykit.checkpoints.bundled import BUNDLED, bundled_gguf
from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.config import ALIASES, RELEASED
from stabilitykit.checkpoints.gemma_pytorch import INDEX, read_gemma_pytorch
from stabilitykit.checkpoints.gguf import read_gguf
from stabilitykit.checkpoints.huggingface import CONFIG, read_huggingface
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.words import listed

_TORCH = (".ckpt", ".pt", ".pth")


def open_checkpoint(source: str | Path, *, cache: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that `source` names: `gemma3-270m`, `random:gemma2-2b?layers=2&seed=0` or a path.

    A path leads to a GGUF file, to gemma_pytorch's `.ckpt`, or to a folder of Hugging Face's or gemma_pytorch's format.

    `cache` is `cache_folder()` by default; a Path is never a name. `progress` is called with bytes the first time a
    file is opened: while the cache is filled, and for folders and `.ckpt` files while their digest is computed.

    Raises MisuseError for a source that names nothing, CheckpointError for a checkpoint that cannot be read.
    """
    cache = cache_folder() if cache is None else cache
    if isinstance(source, str):
        if source.startswith("hf:"):
            raise MisuseError(
                "hf: runs a model with transformers, as `stabilitykit profile` does; this runs the kit's own model, so "
                f"pass a Gemma's folder: {source.removeprefix('hf:')!r:.60}."
            )
        if source.startswith("random:"):
            return random_checkpoint(source)
        if source in RELEASED or source in ALIASES:
            opened = read_gguf(bundled_gguf(source, cache), cache=cache, progress=progress)
            return replace(opened, source=ALIASES.get(source, source))  # its path would name only this machine's cache
        is_name = Path(source).name == source and Path(source).suffix not in (".gguf", *_TORCH)
        if not source or (is_name and not _exists(source)):
            raise MisuseError(
                f"Unknown checkpoint {source!r:.60}; pass {BUNDLED}, a Hugging Face folder, a .gguf or .ckpt file, or "
                "random: and a released size, such as random:gemma2-2b?layers=2."
            )
    path = Path(source)
    if path.suffix in _TORCH:
        return read_gemma_pytorch(path, cache=cache, progress=progress)
    if path.is_dir():
        return _read_folder(path, cache, progress)
    return read_gguf(source, cache=cache, progress=progress)


def _read_folder(folder: Path, cache: Path, progress: Progress | None) -> Checkpoint:
    if (folder / CONFIG).is_file():
        return read_huggingface(folder, cache=cache, progress=progress)
    if (folder / INDEX).is_file():
        return read_gemma_pytorch(folder, cache=cache, progress=progress)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".gguf", *_TORCH))
    if len(files) == 1:
        return open_checkpoint(files[0], cache=cache, progress=progress)
    several = f" It holds {listed([path.name for path in files], 3)}; pass one of them." if files else ""
    raise CheckpointError(
        f"{folder} is not a checkpoint: it has neither {CONFIG} (Hugging Face) nor {INDEX} (gemma_pytorch).{several}"
    )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name, for instance
        return False

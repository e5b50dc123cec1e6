"""The one way to name a checkpoint, whatever it is stored in."""

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

_TORCH = (".ckpt", ".pt", ".pth")


def open_checkpoint(source: str | Path, *, cache: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that `source` names: `gemma3-270m`, `random:gemma2-2b?layers=2&seed=0` or a path.

    A path is that of a GGUF file, of gemma_pytorch's `.ckpt`, or of a folder, Hugging Face's or gemma_pytorch's.

    `cache` is `cache_folder()` unless given; a Path is always a path. `progress` is called with bytes, the first time a
    file is opened: while the cache is filled, and of folders and `.ckpt` files while their digest is computed.

    Raises MisuseError for a source that cannot be meant, CheckpointError for a checkpoint that cannot be read.
    """
    cache = cache_folder() if cache is None else cache
    if isinstance(source, str):
        if not source:
            raise MisuseError("A checkpoint is a name or a path; this one is empty.")
        if source.startswith("hf:"):
            raise MisuseError(
                "With hf: a model is run by transformers, which `stabilitykit profile` does; here the kit's own model "
                f"is run, so give a Gemma's folder: {source.removeprefix('hf:')!r:.60}."
            )
        if source.startswith("random:"):
            return random_checkpoint(source)
        if source in RELEASED or source in ALIASES:
            opened = read_gguf(bundled_gguf(source, cache), cache=cache, progress=progress)
            return replace(opened, source=ALIASES.get(source, source))  # its path would name only this machine's cache
        if Path(source).name == source and Path(source).suffix not in (".gguf", *_TORCH) and not _exists(source):
            raise MisuseError(
                f"A checkpoint is {BUNDLED}, a Hugging Face folder, a .gguf or .ckpt file, or random: and a released "
                f"size such as random:gemma2-2b?layers=2; {source!r:.60} is none of them."
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
    several = (
        f"it holds {', '.join(path.name for path in files[:3])}; give one of them" if files else "it holds neither"
    )
    raise CheckpointError(
        f"A folder is a checkpoint by its {CONFIG} (Hugging Face) or {INDEX} (gemma_pytorch); {folder} is "
        f"none: {several}."
    )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name, for instance
        return False

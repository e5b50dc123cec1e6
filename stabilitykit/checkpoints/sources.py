"""The one way to name a checkpoint, whatever it is stored in."""

from dataclasses import replace
from pathlib import Path

from stabilitykit.checkpoints.bundled import BUNDLED, bundled_gguf
from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.config import ALIASES, RELEASED
from stabilitykit.checkpoints.gguf import read_gguf
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import MisuseError


def open_checkpoint(source: str | Path, *, cache: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that `source` names: `gemma3-270m`, `random:gemma2-2b?layers=2&seed=0` or a GGUF file's path.

    `cache` is `cache_folder()` unless given; a Path is always a path. `progress` is called with bytes while the
    cache is filled, the first time a file is opened.

    Raises MisuseError for a source that cannot be meant, CheckpointError for a checkpoint that cannot be read.
    """
    cache = cache_folder() if cache is None else cache
    if isinstance(source, str):
        if source.startswith("random:"):
            return random_checkpoint(source)
        if source in RELEASED or source in ALIASES:
            opened = read_gguf(bundled_gguf(source, cache), cache=cache, progress=progress)
            return replace(opened, source=ALIASES.get(source, source))  # its path would name only this machine's cache
        if Path(source).name == source and Path(source).suffix != ".gguf" and not _exists(source):
            raise MisuseError(
                f"A checkpoint is {BUNDLED}, the path of a .gguf file, or random: and a released size such as "
                f"random:gemma2-2b?layers=2; {source!r:.60} is none of them."
            )
    return read_gguf(source, cache=cache, progress=progress)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name, for instance
        return False

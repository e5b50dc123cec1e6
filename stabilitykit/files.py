"""Writes files and folders completely or not at all.

A file gets its name only at the end, by a rename, so a process that is killed leaves nothing under that name.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stabilitykit.errors import MisuseError


def check_new(folder: Path) -> None:
    """Raises MisuseError unless nothing would be overwritten: unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MisuseError(f"{folder} exists already and is not empty; choose a new or an empty folder.")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which is created if missing; it is renamed to `path` after the block.

    Whatever the block raises is passed on, an OSError too, and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)  # mkstemp creates files that only their owner can read
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; it is renamed to `folder` after the block.

    Raises MisuseError where it cannot be written. Whatever else the block raises is passed on, and nothing is left
    behind.
    """
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        aside.chmod(0o755)  # mkdtemp creates folders that only their owner can open
        yield aside
        aside.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces an existing file. Raises MisuseError where it cannot be written."""
    try:
        with written_beside(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, one JSON document. Raises ValueError for NaN and infinities, which JSON cannot represent."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def cannot_write(path: Path, error: OSError) -> MisuseError:
    return MisuseError(f"Cannot write {path}: {error.strerror or error}. Choose another folder.")

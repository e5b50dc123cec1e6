"""What a check runs: the kit's own texts, or a user's texts, chats and files of tensors."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.run.batch import Asked, of_object, read_batch
from stabilitykit.run.prompts import read_text

TEXTS = (".txt", ".md")
CHATS = (".json", ".jsonl")
TENSORS = (".npz", ".safetensors", ".pt")
_KNOWN = (*TEXTS, *CHATS, *TENSORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to continue, or a chat; `name` is the file's, with the number of the line where it has several."""

    name: str
    asked: Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What one forward pass is given, by the names of its arguments."""

    name: str
    given: Mapping[str, Tensor]


def read_prompts(places: Sequence[Path]) -> list[Text | Tensors]:
    """What the files hold, those in a folder in the order of their names; other files in a folder are passed over.

    Each has the name of its file, or its whole path where two files have the same name.

    A chat is a JSON list of messages, {"messages": [...]} or {"prompt": "..."}; of .jsonl each line is one of the last
    two. Pickled tensors are read with `weights_only=True`. Raises MisuseError, with the file, for what is none of
    these.
    """
    files = list(dict.fromkeys(file for place in places for file in _files(place)))
    several = {name for name, times in Counter(path.name for path in files).items() if times > 1}
    return [one for path in files for one in _read(path, str(path) if path.name in several else path.name)]


def _read(path: Path, name: str) -> Sequence[Text | Tensors]:
    if path.suffix == ".jsonl":
        return _numbered(name, read_batch(path))
    if path.suffix == ".json":
        return [Text(name=name, asked=_chat(path))]
    if path.suffix in TENSORS:
        return [Tensors(name=name, given=_tensors(path))]
    text = read_text(path, "--prompts")
    if path.suffix not in TEXTS:
        raise MisuseError(f"{path} is no file of prompts: their names end in {', '.join(_KNOWN)}. Rename a text .txt.")
    if not text:
        raise MisuseError(f"{path} is empty; a prompt has at least one character.")
    return [Text(name=name, asked=Asked(text=text))]


def _numbered(name: str, prompts: Sequence[Asked]) -> list[Text | Tensors]:
    return [Text(name=f"{name}:{number}", asked=one) for number, one in enumerate(prompts, start=1)]


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    files = sorted(path for path in place.iterdir() if path.suffix in _KNOWN and path.is_file())
    if not files:
        raise MisuseError(f"{place} holds no prompt: a file that ends in {', '.join(_KNOWN)}.")
    return files


def _chat(path: Path) -> Asked:
    try:
        said = json.loads(read_text(path, "--prompts"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, MisuseError):
            raise
        raise MisuseError(f"{path} is not JSON: {error}.") from None
    return of_object(str(path), {"messages": said} if isinstance(said, list) else said)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        read: Any
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                read = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        elif path.suffix == ".pt":
            read = torch.load(path, weights_only=True, map_location="cpu")
        else:
            read = load_file(path)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        raise MisuseError(f"{path} cannot be read as a file of tensors: {str(error).splitlines()[0]}.") from None
    except Exception as error:  # pickle and zipfile have errors of their own
        raise MisuseError(f"{path} cannot be read as a file of tensors: {type(error).__name__}: {error}.") from None
    named = isinstance(read, Mapping) and bool(read)
    if not named or not all(isinstance(name, str) and isinstance(one, Tensor) for name, one in read.items()):
        raise MisuseError(
            f"{path} must hold tensors by the names of the model's arguments, such as input_ids; it holds "
            f"{type(read).__name__}. Save a dict of tensors."
        )
    return dict(read)


def sha256_of(given: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, one in sorted(given.items()):
        digest.update(f"{name} {one.dtype} {tuple(one.shape)} ".encode())
        digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Weights in torch's own files, opened without running anything that is in them."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabilitykit.errors import CheckpointError


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, by name; memory-mapped unless it has torch's oldest format.

    A file that holds one dictionary of tensors under `model_state_dict` gives that. Raises CheckpointError for a file
    that is missing or damaged, that holds anything but tensors in dictionaries, or whose pickle asks for code: it is
    opened with `weights_only=True`, so no such code runs.
    """
    if not path.is_file():
        raise CheckpointError(f"A file of weights exists; {path} does not. Fetch the checkpoint again.")
    try:
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"A file of weights holds tensors and nothing that runs; {path.name} asks for more and was refused: "
            f"{_reason(error)}. Do not open it by other means unless you know who made it."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"A file of weights is one that torch.save wrote; {path.name} cannot be read as one: {_reason(error)}. "
            "Cut short? Fetch it again."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model_state_dict"), Mapping):
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(
            f"A file of weights holds tensors by name, at the top or under model_state_dict; {path.name} holds "
            f"{type(loaded).__name__}. Is it the state of an optimiser?"
        )
    return {str(name): tensor for name, tensor in loaded.items()}


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # read or refused, whatever it is
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    told = told.partition(" Please use")[0]  # torch's advice is to let the code run
    return (told or type(error).__name__).rstrip(".")[:200]

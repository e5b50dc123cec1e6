"""Weights in torch's own format, loaded without running any code in the file."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabilitykit.errors import CheckpointError


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a file that `torch.save` wrote; memory-mapped unless it has torch's oldest format.

    A dictionary of tensors under `model_state_dict` is unpacked. Raises CheckpointError for a file that is missing or
    damaged, that holds anything but tensors in dictionaries, or whose pickle would run code: it is loaded with
    `weights_only=True`, so no such code runs.
    """
    if not path.is_file():
        raise CheckpointError(f"The weight file {path} does not exist. Download the checkpoint again.")
    try:
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} was refused, because it holds more than tensors and could run code: {_reason(error)}. Do not "
            "load it by other means unless you trust its author."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path.name} cannot be read as a file of torch.save: {_reason(error)}. It may be truncated; download it "
            "again."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model_state_dict"), Mapping):
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(
            f"{path.name} must hold a dictionary of tensors, at the top level or under model_state_dict, got a "
            f"{type(loaded).__name__}. Is it an optimiser's state?"
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
    told = told.partition(" Please use")[0]  # here torch advises to let the code run
    return (told or type(error).__name__).rstrip(".")[:200]

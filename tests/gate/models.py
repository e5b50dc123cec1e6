"""Tiny checkpoints that hold in float16, and some that do not."""

from pathlib import Path

import torch
from remedied import breaking, small
from safetensors.torch import load_file, save_file

from stabilitykit.checkpoints.export import write_folder

TINY = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"


def gemma(folder: Path, gamma: float = 1.0) -> Path:
    """A folder of Hugging Face's, its residual stream times γ."""
    folder.mkdir()
    write_folder(small(3, gamma), folder, "float32")
    return folder


def breaking_gemma(folder: Path) -> Path:
    """The same with a γ at which float16 breaks."""
    return gemma(folder, breaking(3))


def spoilt(folder: Path, name: str, value: float) -> Path:
    """The folder with one element of a weight replaced."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].clone()
    weights[name].view(-1)[5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor([list(tokens)])

"""Tensors wherever they are: in lists and dictionaries, and in the attributes of a cache."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def tensors_inside(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """The tensors that a value holds; those of modules in it are not its own."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, nn.Module | type | str | bytes):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_inside(item, depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_inside(item, depth - 1)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_inside(item, depth - 1)

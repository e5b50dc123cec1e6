"""An attribute of one object, changed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attribute(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of this very object for the time of the block, in front of its class's."""
    had, before = name in vars(owner), vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = before
        else:
            del vars(owner)[name]

"""Which models are being recorded: two recordings of one model at once would mix."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from stabilitykit.errors import MisuseError

_lock = threading.Lock()
_recorded: dict[int, nn.Module] = {}  # by address, for modules may define equality


@contextmanager
def claim(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` belongs to one recording. Raises MisuseError where it belongs to another, or where it
    holds, or is held by, a model that does.
    """
    held = {id(module) for module in model.modules()}
    with _lock:
        for key, other in _recorded.items():
            if key in held or any(module is model for module in other.modules()):
                raise MisuseError(
                    "record() is already recording this model, or one that shares it. Two recordings of one model at "
                    "once would mix: end the first block before the next one begins, or give each its own copy of the "
                    "model (copy.deepcopy)."
                )
        _recorded[id(model)] = model
    try:
        yield
    finally:
        with _lock:
            del _recorded[id(model)]

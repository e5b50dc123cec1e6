"""Which models have a guard: one each."""

import threading

from torch import nn

from stabilitykit.errors import MisuseError

_lock = threading.Lock()
_guarded: dict[int, nn.Module] = {}  # by address, for modules may define equality


def claim(model: nn.Module) -> None:
    """Until `release`. Raises MisuseError where it has a guard, or holds, or is held by, a model that has one."""
    held = {id(module) for module in model.modules()}
    with _lock:
        for key, other in _guarded.items():
            if key in held or any(module is model for module in other.modules()):
                raise MisuseError(
                    f"This {type(model).__name__}, or one that shares it, has a guard already: a model has one. Remove "
                    "that one first (guard.remove(), or the end of its block)."
                )
        _guarded[id(model)] = model


def release(model: nn.Module) -> None:
    with _lock:
        _guarded.pop(id(model), None)

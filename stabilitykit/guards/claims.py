"""Which models have a guard: one each."""

import threading
import weakref

from torch import nn

from stabilitykit.errors import MisuseError

_lock = threading.Lock()
_guarded: dict[int, weakref.ref[nn.Module]] = {}  # by address, for modules may define equality


def claim(model: nn.Module) -> None:
    """Until `release`. Raises MisuseError where it has a guard, or holds, or is held by, a model that has one."""
    held = {id(module) for module in model.modules()}
    with _lock:
        for key, reference in list(_guarded.items()):
            other = reference()
            if other is None:  # it is gone, with its guard
                del _guarded[key]
            elif key in held or any(module is model for module in other.modules()):
                raise MisuseError(
                    f"This {type(model).__name__}, or one that shares it, has a guard already: a model has one. Remove "
                    "that one first (guard.remove(), or the end of its block)."
                )
        _guarded[id(model)] = weakref.ref(model)


def release(model: nn.Module) -> None:
    with _lock:
        _guarded.pop(id(model), None)

"""What torch notes for the whole process while a dispatch mode is on, kept right where modes of threads overlap.

Each mode puts back what it found when it began. Where one thread's begins inside another's and ends after it, that
leaves "on" behind for good: `is_in_torch_dispatch_mode()` is true with nothing on the stack, and `torch.compile` leaves
code alone where it is set to ask that. So the first of the kit's modes to begin keeps what it found, and the last one
to end puts that back.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import _python_dispatch as torchs

_FLAGS = [name for name, value in vars(torchs).items() if name.startswith("_is_in_") and isinstance(value, bool)]
_lock = threading.RLock()
_on = 0
_found: dict[str, bool] = {}


@contextmanager
def beginning() -> Iterator[None]:
    """Around the line with which a mode of the kit's begins."""
    global _on, _found
    with _lock:
        found = {name: getattr(torchs, name) for name in _FLAGS}
        yield
        if _on == 0:
            _found = found
        _on += 1


@contextmanager
def ending() -> Iterator[None]:
    """Around the line with which it ends, for whatever reason."""
    global _on
    with _lock:
        try:
            yield
        finally:
            _on -= 1
            for name in _FLAGS:
                setattr(torchs, name, True if _on else _found[name])
            tell: Any = getattr(torchs, "set_is_in_mode_without_ignore_compile_internals", None)
            if tell is not None:  # the same in C++, of newer versions
                tell(torchs._is_in_any_mode_without_ignore_compile_internals)

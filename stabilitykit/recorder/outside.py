"""Which code runs outside the model: a logits processor, the user's own line."""

import linecache
import sys
from pathlib import Path
from types import FrameType

_OWN = str(Path(__file__).resolve().parent.parent)


def code_outside() -> str | None:
    """Who called the operator that runs now: `TopPLogitsWarper`, or `train.py:12: loss = x / y`; None if unknown.

    Frames of torch and of this package are passed over. Within transformers' `generate` it is the logits processor, if
    one runs, that is of interest, else the user's line.
    """
    processor = getattr(sys.modules.get("transformers.generation.logits_process"), "LogitsProcessor", None)
    frame: FrameType | None = sys._getframe(1)
    line: str | None = None
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        owner = frame.f_locals.get("self")
        if processor is not None and isinstance(owner, processor):
            return type(owner).__name__
        if line is None and not _is_library(name, frame.f_code.co_filename):
            line = _line(frame)
        frame = frame.f_back
    return line


def _is_library(module: str, file: str) -> bool:
    return module.partition(".")[0] in ("torch", "transformers", "contextlib", "functools") or file.startswith(_OWN)


def _line(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    source = linecache.getline(file, frame.f_lineno).strip()
    where = f"{Path(file).name}:{frame.f_lineno}"
    return f"{where}: {source}" if source else where

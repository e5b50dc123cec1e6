"""Faults in the processes that run cases, at a chosen moment of writing a record.

Python imports this by itself where this folder is on PYTHONPATH. The file that $FAULTS names holds a fault a line,
`MOMENT COUNT`: the first one strikes at the COUNT-th record that a process writes, and is struck out.

    begun      the file written aside is there, and empty          \
    half       it is written by half                                | the process is killed; `all-MOMENT` kills its
    written    it is whole, and not yet renamed                     | whole process group, and the sweep with it
    renamed    the record is there, and nobody has been told yet   /
    full-disk  the disk is full

$DATA_LIMIT is the most bytes of memory that any Python process may take for itself.
"""

import errno
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

_mkstemp, _replace = tempfile.mkstemp, Path.replace
_writes = 0


def _strike(*moments: str) -> str | None:
    """The fault that is due now, if it is one of these; it is struck out."""
    path = Path(os.environ["FAULTS"])
    first, *rest = path.read_text().splitlines() or [""]
    fault, _, count = first.partition(" ")
    if not fault or fault.removeprefix("all-") not in moments or int(count) != _writes:
        return None
    path.write_text("\n".join(rest))
    return fault


def _kill(fault: str) -> None:
    if fault.startswith("all-"):
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_record(folder: Any, name: str) -> bool:
    return folder is not None and Path(folder).name == "records" and ".failed.json" not in name


def _write_aside(suffix: Any = None, prefix: Any = None, dir: Any = None, text: bool = False) -> tuple[int, str]:  # noqa: A002
    global _writes
    counted = _is_record(dir, prefix or "")
    if counted:
        _writes += 1
        if _strike("full-disk"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    found = _mkstemp(suffix, prefix, dir, text)
    if counted and (fault := _strike("begun")):
        _kill(fault)
    return found


def _rename(self: Path, target: Any) -> Path:
    if not _is_record(self.parent, self.name):
        return _replace(self, target)
    if fault := _strike("half", "written"):
        if fault.endswith("half"):
            os.truncate(self, self.stat().st_size // 2)
        _kill(fault)
    renamed = _replace(self, target)
    if fault := _strike("renamed"):
        _kill(fault)
    return renamed


if "FAULTS" in os.environ:
    tempfile.mkstemp = _write_aside  # type: ignore[assignment]
    Path.replace = _rename  # type: ignore[assignment, method-assign]

if "DATA_LIMIT" in os.environ:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(os.environ["DATA_LIMIT"]),) * 2)

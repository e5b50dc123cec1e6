"""How much memory there is for a model: what is free now, within what this process may take."""

import os
import sys
from pathlib import Path

import torch

_SPARE = 0.1  # of what is free, for libraries, for whatever else runs, and for the system's own cache of files

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# Of each version of control groups: where its hierarchy is, the files of the limit and of what is in use, and the
# name that pages of files which can be dropped at once have in memory.stat.
_VERSIONS = (
    ("", _CGROUPS, "memory.max", "memory.current", "inactive_file"),
    ("memory", _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def must_stream(asked: bool | None, needed: int, device: torch.device) -> bool:
    """Whether weights are read as they are needed: as was asked for, or else where `needed` bytes do not fit.

    They fit where the device has them free, with a tenth of that to spare, and where nobody can say what is free.
    """
    free = available_memory(device)
    return asked if asked is not None else free is not None and needed > free * (1 - _SPARE)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be had there now, None where the system does not say.

    On a CPU that is what Linux estimates as available, or less where a control group, such as a container's, sets a
    limit; on macOS all the memory that there is.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform == "linux":
        return min([_available(), *_left_in_groups()], default=None)
    if sys.platform == "darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _available() -> int:
    lines = _MEMINFO.read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _left_in_groups() -> list[int]:
    """What the limits of this process's control groups, and of those around them, leave."""
    try:
        groups = [line.split(":", 2) for line in _MEMBERSHIP.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for controllers, root, limit, used, droppable in _VERSIONS:
        for _, held, path in groups:
            if controllers not in held.split(","):
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(root):
                    break
                try:
                    bound, taken = (folder / limit).read_text(), int((folder / used).read_text())
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # the root has no limit, and a container may not see all of its path
                    continue
                if bound.strip() != "max":
                    left.append(int(bound) - taken + int(stat.get(droppable, 0)))
    return left

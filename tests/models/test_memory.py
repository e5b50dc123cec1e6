"""Free memory is the least of what the system and each control group leave."""

from pathlib import Path

import pytest
import torch

from stabilitykit.models.gemma import room

CPU = torch.device("cpu")
GIB = 1 << 30


def group(folder: Path, limit: str, used: int, *, old: bool = False) -> None:
    """A control group's files, 1 GiB of what is used being files that can be dropped."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' if old else ''}inactive_file {GIB}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def moved(version: tuple[str, Path, str, str, str]) -> tuple[str, Path, str, str, str]:
        held, root, *names = version
        limit, used, droppable = names
        return held, tmp_path / root.relative_to("/sys/fs/cgroup"), limit, used, droppable

    monkeypatch.setattr(room, "_VERSIONS", tuple(map(moved, room._VERSIONS)))
    monkeypatch.setattr(room, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(room, "_available", lambda: 64 * GIB)
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def test_a_group_or_one_around_it_sets_the_limit(groups: Path) -> None:
    (groups / "membership").write_text("0::/outer/inner\n")
    assert room.available_memory(CPU) == 64 * GIB  # no such folders
    group(groups / "outer" / "inner", "max", 3 * GIB)
    assert room.available_memory(CPU) == 64 * GIB
    group(groups / "outer", str(8 * GIB), 5 * GIB)
    assert room.available_memory(CPU) == 4 * GIB
    group(groups / "outer" / "inner", str(3 * GIB), 3 * GIB)
    assert room.available_memory(CPU) == GIB


def test_the_older_files_are_read_too(groups: Path) -> None:
    (groups / "membership").write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    group(groups / "memory" / "a", str(8 * GIB), 5 * GIB, old=True)
    assert room.available_memory(CPU) == 4 * GIB


def test_a_tenth_is_spared_and_what_nobody_can_tell_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, needed, expected in ((100, 90, True), (100, 91, False), (None, 10**18, True)):
        monkeypatch.setattr(room, "available_memory", lambda device, free=free: free)
        assert room.fits(needed, CPU) == expected


def test_this_machine_has_some_memory() -> None:
    free = room.available_memory(CPU)
    assert free is None or GIB // 8 < free < 1 << 50

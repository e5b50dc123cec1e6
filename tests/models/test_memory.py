"""Free memory is the least of what the system and each control group leave."""

from pathlib import Path

import pytest
import torch

from stabilitykit.models import memory

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

    monkeypatch.setattr(memory, "_VERSIONS", tuple(map(moved, memory._VERSIONS)))
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_available", lambda: 64 * GIB)
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def test_a_group_or_one_around_it_sets_the_limit(groups: Path) -> None:
    (groups / "membership").write_text("0::/outer/inner\n")
    assert memory.available_memory(CPU) == 64 * GIB  # no such folders
    group(groups / "outer" / "inner", "max", 3 * GIB)
    assert memory.available_memory(CPU) == 64 * GIB
    group(groups / "outer", str(8 * GIB), 5 * GIB)
    assert memory.available_memory(CPU) == 4 * GIB
    group(groups / "outer" / "inner", str(3 * GIB), 3 * GIB)
    assert memory.available_memory(CPU) == GIB


def test_the_older_files_are_read_too(groups: Path) -> None:
    (groups / "membership").write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    group(groups / "memory" / "a", str(8 * GIB), 5 * GIB, old=True)
    assert memory.available_memory(CPU) == 4 * GIB


@pytest.mark.parametrize(("free", "needed", "streamed"), [(100, 90, False), (100, 91, True), (None, 10**18, False)])
def test_what_does_not_fit_with_a_tenth_to_spare_is_streamed_unless_told(
    monkeypatch: pytest.MonkeyPatch, free: int | None, needed: int, streamed: bool
) -> None:
    """Where nobody can say what is free, it fits."""
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    assert memory.must_stream(None, needed, CPU) is streamed
    assert memory.must_stream(True, needed, CPU) is True
    assert memory.must_stream(False, needed, CPU) is False


def test_without_a_group_it_is_what_the_kernel_estimates_as_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all memory nor that which is unused: files in the kernel's cache can be dropped."""
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:    700 kB\nSwapFree: 50 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr("sys.platform", "linux")
    assert memory.available_memory(CPU) == 700 * 1024

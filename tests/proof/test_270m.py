"""Gemma 3 270M with the factors that `repair --proved` chooses: proved by the checker, the same function to the bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from remedied import rescale

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.proof.check import check
from stabilitykit.proof.write import write_proof

GAMMA = 2.0**-3
INNER = tuple(2.0**-n for n in (1, 4, 5, 5, 3, 2, 3, 3, 1, 0, 3, 2, 1, 1, 1, 0, 0, 0))
IDS = torch.tensor([[2, 818, 5279, 529, 7001, 563, 236743, 108, 107]])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of half a gigabyte or one, which is not kept."""
    yield tmp_path / "gemma"
    shutil.rmtree(tmp_path / "gemma", ignore_errors=True)


def written(checkpoint: Checkpoint, folder: Path, dtype: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_folder(checkpoint, folder, dtype)  # type: ignore[arg-type]
    return folder


def test_no_prompt_can_break_the_repaired_one(checkpoint_270m: Checkpoint, folder: Path) -> None:
    written(rescale(checkpoint_270m, GAMMA, INNER), folder, "float16")
    write_proof(folder, {"residual": 56_390.0})
    found = check(folder)
    assert found.problems == ()
    assert max(found.bounds.values()) <= 65504
    assert found.bounds["gate · up"] > 60_000  # β are the largest that will do
    assert found.bounds["norm"] > 60_000  # and so is γ


def test_float32_logits_keep_every_bit_in_plain_transformers(checkpoint_270m: Checkpoint, folder: Path) -> None:
    after = rescale(checkpoint_270m, GAMMA, INNER)
    logits = []
    for checkpoint in (checkpoint_270m, after):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            written(checkpoint, folder, "float32"), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.inference_mode():
            logits.append(model(IDS).logits)
        del model
    assert torch.equal(*logits)

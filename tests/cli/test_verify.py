"""A proved repair on disk: accepted from its weights alone, rejected once anything is changed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remedied import breaking, small
from safetensors.torch import load_file, save_file

from stabilitykit.checkpoints.export import write_folder

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proved")


@pytest.fixture
def proved(root: Path, stabilitykit: Run) -> Path:
    """Made once, and the original is gone."""
    if not (root / "repaired").exists():
        (root / "gemma").mkdir()
        write_folder(small(3, breaking(3)), root / "gemma", "float32")
        made = stabilitykit("repair", str(root / "gemma"), "--proved", "--out", str(root / "repaired"))
        assert (made.code, made.err) == (0, "")
        assert "No prompt of any length can make it overflow in float16" in " ".join(made.out.split())
        shutil.rmtree(root / "gemma")
    return root / "repaired"


@pytest.mark.slow
def test_it_is_proved_without_the_original(stabilitykit: Run, proved: Path) -> None:
    found = stabilitykit("verify", str(proved), "--proof")
    assert (found.code, found.err) == (0, "")
    assert "Proved: no prompt makes a tensor overflow in float16." in found.out
    assert "gate · up" in found.out
    document = json.loads(stabilitykit("verify", str(proved), "--proof", "--json").out)
    assert document["proved"] is True
    assert 0 < document["bounds"]["residual"] < 65504
    assumed = document["assumptions"]
    assert len(assumed) > 5
    assert all(one in " ".join(found.out.split()) for one in assumed)
    assert "`proof.json` holds the bounds" in " ".join((proved / "README.md").read_text().split())
    assert "stabilitykit verify THIS_FOLDER --proof" in (proved / "README.md").read_text()


def weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def gain(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.post_feedforward_layernorm.weight"] += torch.tensor(0.5, dtype=torch.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def eps(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2 * config["rms_norm_eps"]}))


def claim(folder: Path) -> None:
    proof = json.loads((folder / "proof.json").read_text())
    proof["bounds"]["norm"] /= 2
    (folder / "proof.json").write_text(json.dumps(proof))


@pytest.mark.parametrize("change", [weight, gain, eps, claim])
def test_it_is_rejected_once_something_is_changed(
    stabilitykit: Run, proved: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(proved, tmp_path / "changed")
    change(folder)
    found = stabilitykit("verify", str(folder), "--proof")
    assert found.code == 1
    assert "has changed since the proof was written" in found.out or "its digest does not match" in found.out
    assert "Proved: " not in found.out


def test_where_there_is_no_proof_it_says_how_to_make_one(stabilitykit: Run, proved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(proved, tmp_path / "without")
    (folder / "proof.json").unlink()
    found = stabilitykit("verify", str(folder), "--proof")
    assert found.code == 2
    assert re.search(rf"`stabilitykit repair \S.* --proved --out {folder}-proved`", found.err)
    gone = stabilitykit("verify", str(tmp_path))
    assert gone.code == 2
    assert f"`stabilitykit repair {tmp_path} --out {tmp_path.name}-float16`" in gone.err

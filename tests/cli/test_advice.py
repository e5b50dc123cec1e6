"""What a command advises is a command that runs: with the user's own arguments, whatever a shell makes of them."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from written import write_huggingface

from stabilitykit.checkpoints import random_checkpoint
from stabilitykit.cli import screen

Run = Callable[..., Any]
RANDOM = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"
PROMPT = "it's `here`"


def advised(text: str, command: str) -> list[str]:
    """The arguments of the first such command between backticks, or alone on its line."""
    found = re.search(rf"(?:`|^)(?:To [^:`]+: )?(stabilitykit {command} .+?)(?:`[.)]|$)", text, re.MULTILINE)
    assert found, text
    return shlex.split(found[1])[1:]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal on which no line breaks."""
    monkeypatch.setattr(screen.output, "_width", 10_000)


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """The folder of a model whose <bos> leaves float16's range where the embedding is scaled, and nowhere else."""
    made = random_checkpoint(RANDOM)
    embedding = made.tensors["embed_tokens.weight"].clone()
    embedding[2] *= 12_000 / embedding[2].abs().max()  # times the square root of 32: 67,882
    norm = torch.full_like(made.tensors["norm.weight"], -0.9)  # a gain of 0.1, which keeps the logits small
    return write_huggingface(
        replace(made, tensors={**made.tensors, "embed_tokens.weight": embedding, "norm.weight": norm}),
        tmp_path / "my model's",
    )


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """The folder of a model whose gated product leaves float16's range in layer 0."""
    made = random_checkpoint(RANDOM)
    large = {name: made.tensors[f"layers.0.mlp.{name}.weight"] * 2**12 for name in ("gate_proj", "up_proj")}
    tensors = {**made.tensors, **{f"layers.0.mlp.{name}.weight": one for name, one in large.items()}}
    return write_huggingface(replace(made, tensors=tensors), tmp_path / "pro duct")


@pytest.mark.usefixtures("wide")
def test_a_profile_names_the_diagnosis_of_the_same_run_and_it_breaks_alike(stabilitykit: Run, product: Path) -> None:
    typed = (str(product), "--prompt", PROMPT, "--no-bos")
    said = stabilitykit("profile", *typed).out
    command = advised(said, "diagnose")
    assert command == ["diagnose", *typed]
    assert advised(said, "repair") == ["repair", str(product), "--out", "pro duct-float16"]
    again = json.loads(stabilitykit(*command, "--json").out)
    first = json.loads(stabilitykit("profile", *typed, "--json").out)["first_break"]
    assert again["findings"]["first_break"]["site"] == first["site"]
    assert again["findings"]["first_break"]["value"] == first["value"]
    in_float32 = next(one["command"] for one in again["trials"] if one["name"] == "float32")
    assert shlex.split(in_float32)[3:] == ["--dtype", "float32", "--prompt", PROMPT, "--no-bos"]
    assert json.loads(stabilitykit(*shlex.split(in_float32)[1:], "--json").out)["finite"]


@pytest.mark.usefixtures("wide")
def test_a_redacted_prompt_is_in_no_advice(stabilitykit: Run, product: Path) -> None:
    said = stabilitykit("profile", str(product), "--prompt", "secret", "--redact").out
    assert advised(said, "diagnose")[-2:] == ["--prompt", "..."]
    assert "secret" not in said


@pytest.mark.usefixtures("wide")
def test_of_a_model_that_was_stressed_no_repair_is_advised(stabilitykit: Run) -> None:
    assert "stabilitykit repair" not in stabilitykit("profile", RANDOM, "--prompt", "Hi", "--stress", "65536").out


@pytest.mark.slow
@pytest.mark.usefixtures("wide")
def test_what_is_advised_against_an_overflow_writes_a_model_that_is_finite(
    stabilitykit: Run, overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = stabilitykit("profile", str(overflowing), "--prompt", PROMPT).out
    command = advised(said, "repair")
    assert command == ["repair", str(overflowing), "--out", "my model's-float16"]
    refused = stabilitykit("check", str(overflowing), "--prompts", str(overflowing / "config.json"))
    assert refused.code == 2
    (tmp_path / "a.txt").write_text(PROMPT)
    checked = stabilitykit("check", str(overflowing), "--prompts", "a.txt")
    assert checked.code == 1
    assert advised(checked.out, "repair") == command
    assert advised(checked.out, "profile") == ["profile", str(overflowing), "--prompt", "@a.txt"]
    written = stabilitykit(*command, "--no-ranking")
    assert written.code == 0
    assert advised(written.out, "verify") == ["verify", "my model's-float16"]
    assert json.loads(stabilitykit("profile", "my model's-float16", "--prompt", PROMPT, "--json").out)["finite"]


@pytest.mark.usefixtures("wide")
def test_a_repair_that_only_ranked_says_what_writes_it(stabilitykit: Run, overflowing: Path) -> None:
    ranked = stabilitykit("repair", str(overflowing), "--no-ranking")
    assert ranked.code == 0
    expected = ["repair", str(overflowing), "--no-ranking", "--out", "my model's-float16"]
    assert advised(ranked.out, "repair") == expected

"""`diagnose` from the command line: on real models, folders and batches, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from truth.decoders import product
from truth.models import VOCABULARY

from stabilitykit.checkpoints import Checkpoint

PROMPT = "The capital of France is"
RANDOM = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"
Run = Callable[..., Any]


def diagnosed(stabilitykit: Run, *arguments: str) -> Any:
    result = stabilitykit("diagnose", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def folder_with_a_large_product(place: Path) -> Path:
    """A Llama whose gate · up overflows float16 at one position of one prompt."""
    folder = save(product("llama").model.float(), place / "llama")
    names = {"<pad>": 0, "<bos>": 1} | {f"t{i}": i for i in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(names, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", unk_token="t2")
    made.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_on_the_270m_five_changes_are_tried_and_rescale_comes_first(
    checkpoint_270m: Checkpoint, stabilitykit: Run
) -> None:
    found = diagnosed(stabilitykit, "gemma3-270m", "--prompt", PROMPT)
    first = found["findings"]["first_break"]
    assert (first["site"], first["token"], first["kind"]) == ("layers.7", "<bos>", "overflow")
    assert found["trials"][0]["name"] == "rescale"
    assert found["trials"][0]["cured"]
    assert found["trials"][0]["carried"]
    assert found["trials"][0]["distance"]["kl_mean"] < 1e-4
    assert len(found["trials"]) >= 5
    by_name = {one["name"]: one for one in found["trials"]}
    assert by_name["bfloat16"]["cured"]
    assert by_name["bfloat16"]["distance"]["kl_mean"] > 10 * found["trials"][0]["distance"]["kl_mean"]
    assert not by_name["clamp"]["cured"]
    assert "stabilitykit repair gemma3-270m" in found["trials"][0]["command"]


@pytest.mark.slow
def test_on_smollm_under_stress_it_is_the_same(smollm: Path, stabilitykit: Run) -> None:
    found = diagnosed(stabilitykit, f"hf:{smollm}", "--prompt", PROMPT, "--stress", "64")
    assert not found["finite"]
    assert found["trials"][0]["name"] == "rescale"
    assert found["trials"][0]["cured"]
    assert len(found["trials"]) >= 5


def test_a_folder_is_diagnosed_and_the_command_names_it(stabilitykit: Run, tmp_path: Path) -> None:
    folder = folder_with_a_large_product(tmp_path)
    result = stabilitykit("diagnose", f"hf:{folder}", "--prompt", "t10 t11 t12 t13 t14 t15", "--no-bos")
    assert (result.code, result.err) == (0, "")
    for told in ("gate · up", "Tried on this input", "up and down factors", f"hf:{folder}", "cures it"):
        assert told in result.out.replace("\n", " ") or told in "".join(result.out.split("\n")), told


def test_rows_of_a_batch_are_run_together(stabilitykit: Run, tmp_path: Path) -> None:
    folder = folder_with_a_large_product(tmp_path)
    batch = tmp_path / "batch.jsonl"
    batch.write_text('{"prompt": "t10 t11 t12 t13 t14 t15"}\n{"prompt": "t20 t21"}\n')
    found = diagnosed(stabilitykit, f"hf:{folder}", "--batch", str(batch), "--no-bos")
    first = found["findings"]["first_break"]
    assert (first["row"], first["position"], first["token_id"]) == (0, 3, 13)
    assert found["plain"]["rows"] == 12  # of two rows of six positions


def test_a_model_that_is_finite_has_nothing_to_cure(stabilitykit: Run) -> None:
    found = diagnosed(stabilitykit, RANDOM, "--prompt", PROMPT)
    assert found["finite"]
    assert {one["name"] for one in found["trials"]} == {"bfloat16", "float32"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((RANDOM,), "either --prompt TEXT or --batch FILE"),
        ((RANDOM, "--prompt", "a", "--batch", "b"), "either --prompt TEXT or --batch FILE"),
        ((RANDOM, "--batch", "nowhere.jsonl"), "nowhere.jsonl"),
        ((RANDOM, "--prompt", "a", "--dtype", "float17"), "float17"),
        ((RANDOM, "--prompt", "a", "--backward"), "FILE.py:make"),
        ((RANDOM, "--prompt", "a", "--temperature", "-1"), "temperature"),
        (("nowhere.py:make",), "nowhere.py"),
        (("nowhere.py:make", "--prompt", "a"), "brings its own input"),
    ],
)
def test_misuse_is_told_in_a_sentence(stabilitykit: Run, arguments: tuple[str, ...], told: str) -> None:
    result = stabilitykit("diagnose", *arguments)
    assert result.code == 2
    assert told in result.err
    assert "Traceback" not in result.err

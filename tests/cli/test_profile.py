"""`profile` on the real Gemma 3 270M and on random ones: what it finds, and how it refuses."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from written import write_huggingface

from stabilitykit.checkpoints import Checkpoint, random_checkpoint
from stabilitykit.records import Recording

PROMPT = "The capital of France is"
RANDOM = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"
Run = Callable[..., Any]


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def profile_270m(stabilitykit: Run, *arguments: str, prompt: str = PROMPT) -> Any:
    result = stabilitykit("profile", "gemma3-270m", "--prompt", prompt, "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    return strict_json(result.out)


def test_float16_on_the_270m_breaks_in_layer_7_at_bos(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    found = profile_270m(stabilitykit, "--dtype", "float16", "--dtype", "float32", "--dtype", "bfloat16")
    assert [one["dtype"] for one in found] == ["float16", "float32", "bfloat16"]
    broken, float32, bfloat16 = found
    first = broken["first_break"]
    assert first["layer"] == 7
    assert first["site"] == "layers.7"
    assert first["label"] == "residual after MLP"
    assert first["operator"] == "add"
    assert (first["kind"], first["row"], first["position"], first["token"]) == ("overflow", 0, 0, "<bos>")
    assert first["count"] == 1
    assert first["value"] == pytest.approx(68384, abs=64)  # the last float16 bits of the operands are the processor's
    assert first["value"] == sum(first["operands"])
    assert first["reference_value"] == pytest.approx(68398, abs=2)
    assert first["limit"] == 65504
    assert not broken["finite"]
    assert broken["tokens"] == [2, 818, 5279, 529, 7001, 563]
    assert broken["error"] == "probability tensor contains either `inf`, `nan` or element < 0"
    events = [link["event"] for link in broken["chain"]]
    assert events == ["break", "first NaN", *["layer"] * 10, "logits", "probabilities", "error", "greedy"]
    assert broken["chain"][1]["site"] == "layers.8.input_layernorm/mul.0"
    assert broken["chain"][1]["text"].startswith("inf · 0")
    assert "<pad>" in broken["chain"][-1]["text"]
    for clean in (float32, bfloat16):
        assert clean["finite"]
        assert (clean["first_break"], clean["chain"], clean["error"]) == (None, [], None)


def test_one_dtype_is_one_document_without_a_reference(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    found = profile_270m(stabilitykit, "--dtype", "float16", "--level", "layers")
    assert (found["first_break"]["site"], found["first_break"]["kind"]) == ("layers.7", "unresolved")
    assert found["first_break"]["reference_value"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-bos",),
        ("--rescale", "0.25"),
        ("--rescale", "0.25", "--left-padding", "5"),
        ("--rescale", "0.25", "--top-k", "3", "--temperature", "0.7"),
        ("--rescale", "0.25", "--rounding", "gemma_pytorch", "--left-padding", "2"),
    ],
)
def test_healthy_float16_runs_report_no_break(
    checkpoint_270m: Checkpoint, stabilitykit: Run, arguments: tuple[str, ...]
) -> None:
    found = profile_270m(stabilitykit, "--dtype", "float16", *arguments)
    assert found["finite"]
    assert (found["first_break"], found["cause"], found["chain"], found["error"]) == (None, None, [], None)


def test_the_single_token_bos_breaks(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    found = profile_270m(stabilitykit, "--no-bos", "--special-tokens", prompt="<bos>")
    assert found["tokens"] == [2]
    assert found["first_break"]["layer"] == 7


def test_one_token_is_counted_as_one(stabilitykit: Run) -> None:
    common = ("profile", RANDOM, "--no-bos", "--prompt")
    assert "1 token: 'a'" in stabilitykit(*common, "a").out
    assert "1 token, redacted." in stabilitykit(*common, "a", "--redact").out
    assert "2 tokens: 'a' 'b'" in stabilitykit(*common, "ab").out


def test_special_tokens_are_text_unless_asked(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    assert 2 not in profile_270m(stabilitykit, "--no-bos", "--rescale", "0.25", prompt="<bos>")["tokens"]


def test_what_people_see(stabilitykit: Run) -> None:
    result = stabilitykit("profile", RANDOM, "--prompt", "Hello", "--dtype", "float16", "--rescale", "65536")
    assert result.code == 0
    assert "float16 overflows in embedding, scaled (embed_tokens, operator mul)" in result.out.replace("\n", " ")
    for heading in ("float16, by layer", "headroom", "subnormal", "entropy", "How it spread"):
        assert heading in result.out
    assert "Traceback" not in result.out + result.err


def test_out_holds_records_and_findings_and_is_never_overwritten(stabilitykit: Run, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    arguments = (
        "profile",
        RANDOM,
        "--prompt",
        "Hello",
        "--dtype",
        "float16",
        "--dtype",
        "float32",
        "--out",
        str(folder),
    )
    assert stabilitykit(*arguments).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["findings.json", "float16.parquet", "float32.parquet"]
    recording = Recording.load(folder / "float16.parquet")
    assert recording.header.dtype == "float16"
    assert recording.at("layers.1").label == "residual after MLP"
    assert [one["dtype"] for one in strict_json((folder / "findings.json").read_text())] == ["float16", "float32"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = stabilitykit(*arguments)
    assert again.code == 2
    assert "a new or an empty folder" in again.err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_redact_keeps_prompt_and_tokens_out_of_everything(stabilitykit: Run, tmp_path: Path) -> None:
    secret = "Xyzzy"
    common = ("profile", RANDOM, "--prompt", secret, "--rescale", "65536", "--redact")
    shown = stabilitykit(*common, "--out", str(tmp_path / "run"))
    assert shown.code == 0
    document = stabilitykit(*common, "--json")
    found = strict_json(document.out)
    assert (found["tokens"], found["first_break"]["token"], found["first_break"]["token_id"]) == (None, None, None)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir())
    ids = str([2, *(ord(letter) + 4 for letter in secret)])[1:-1]
    for text in (shown.out, document.out, written.decode("latin-1")):
        assert secret not in text
        assert ids not in text
        assert "<bos>" not in text


def test_a_prompt_can_come_from_a_file(stabilitykit: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Hé", encoding="utf-8")
    found = strict_json(stabilitykit("profile", RANDOM, "--prompt", f"@{path}", "--json").out)
    assert len(found["tokens"]) == 1 + len("Hé".encode())


def test_chat_wraps_the_prompt_in_turns(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    found = profile_270m(stabilitykit, "--chat", "--system", "Be brief.", "--rescale", "0.25")
    assert found["tokens"][:3] == [2, 105, 2364]  # <bos><start_of_turn>user
    assert found["finite"]


BAD = {
    "unknown dtype": (("--dtype", "float12"), "Unknown dtype 'float12'; choose one of: float32, bfloat16, "),
    "unknown device": (("--device", "tpu9"), "'tpu9' cannot be used here"),
    "empty prompt": (("--prompt", ""), "at least one character"),
    "too long": (("--prompt", "a" * 64), "context of 64 tokens: it has 65. Shorten it."),
    "too long with padding": (("--left-padding", "60"), "context of 64 tokens: it has 66. Shorten it."),
    "no such prompt file": (("--prompt", "@/nowhere/at/all"), "names a file to read"),
    "rescale no power of two": (("--rescale", "3"), "power of two"),
    "system without chat": (("--system", "x"), "add --chat"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(stabilitykit: Run, case: str) -> None:
    arguments, expected = BAD[case]
    result = stabilitykit("profile", RANDOM, "--prompt", "Hello", *arguments)
    assert result.code == 2
    assert expected in result.err
    assert result.err.startswith("stabilitykit: ")
    assert result.err.count("\n") == 1
    assert result.out == ""


BAD_CHECKPOINTS = {
    "nowhere.gguf": "nowhere.gguf",
    "gemma9-1b": "gemma9-1b",
    "gemma2-2b": "only",
    "random:gemma5": "choose one of: gemma-2b",
    "random:gemma-2b?colour=3": "colour",
}


@pytest.mark.parametrize("source", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_sentence_and_exit_code_2(stabilitykit: Run, source: str) -> None:
    result = stabilitykit("profile", source, "--prompt", "Hello")
    assert result.code == 2
    assert BAD_CHECKPOINTS[source] in result.err
    assert result.err.count("\n") == 1


def test_a_file_that_is_no_gguf(stabilitykit: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 not at all")
    result = stabilitykit("profile", str(path), "--prompt", "Hello")
    assert result.code == 2
    assert "GGUF" in result.err


def test_an_unreadable_prompt_file(stabilitykit: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"ab\xff")
    result = stabilitykit("profile", RANDOM, "--prompt", f"@{path}")
    assert result.code == 2
    assert "byte 2" in result.err


def write_harmed(folder: Path, name: str, value: float) -> Path:
    """The random checkpoint as a Hugging Face folder, with one element of one tensor replaced."""
    checkpoint = random_checkpoint(RANDOM)
    harmed = checkpoint.tensors[name].clone()
    harmed[1, 1] = value
    return write_huggingface(replace(checkpoint, tensors=dict(checkpoint.tensors) | {name: harmed}), folder)


def test_weights_that_are_not_finite_are_named_before_and_after_the_run(stabilitykit: Run, tmp_path: Path) -> None:
    name = "layers.1.mlp.down_proj.weight"
    folder = write_harmed(tmp_path / "hf", name, float("nan"))
    shown = " ".join(stabilitykit("profile", str(folder), "--prompt", "Hello").out.split())
    assert "1 is NaN or infinite in the checkpoint itself (" in shown
    assert f"1 of them is NaN or infinite in the checkpoint itself ({name}" in shown
    found = strict_json(stabilitykit("profile", str(folder), "--prompt", "Hello", "--json").out)
    assert (found["cause"], found["weights"]["nonfinite"]) == ("weights", 1)
    assert found["weights"]["worst"][0]["name"] == name


@pytest.mark.parametrize("level", ["modules", "layers"])
def test_weights_that_are_not_finite_are_the_cause_where_only_modules_were_seen(
    level: str, stabilitykit: Run, tmp_path: Path
) -> None:
    name = "layers.1.mlp.down_proj.weight"
    folder = write_harmed(tmp_path / "hf", name, float("nan"))
    found = strict_json(stabilitykit("profile", str(folder), "--prompt", "Hello", "--level", level, "--json").out)
    assert (found["first_break"]["kind"], found["cause"]) == ("weight", "weights")
    assert f"1 of them is NaN or infinite in the checkpoint itself ({name}[" in found["verdict"]


def test_weights_past_float16_are_told_from_weights_that_were_never_finite(stabilitykit: Run, tmp_path: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    folder = write_harmed(tmp_path / "hf", name, 1e6)
    shown = " ".join(stabilitykit("profile", str(folder), "--prompt", "Hello").out.split())
    assert "1 becomes infinite (" in shown
    assert "Stored in float16, 1 weight overflows" in shown
    assert f"{name}" in shown.partition("1 weight overflows")[2].partition("; the checkpoint itself is finite")[0]
    assert strict_json(stabilitykit("profile", str(folder), "--prompt", "Hello", "--json").out)["cause"] == "range"


def test_what_a_plain_profile_does_not_need_is_not_imported() -> None:
    """torch's compiler, the solver of scalings and data frames: seconds of an answer that takes few."""
    heavy = ["torch._dynamo", "torch.fx.experimental.symbolic_shapes", "scipy.optimize", "pandas", "transformers"]
    code = (
        "import sys\n"
        "from stabilitykit.cli import app\n"
        f"app(['profile', {RANDOM!r}, '--prompt', 'Hi'], standalone_mode=False)\n"
        f"print('imported:', [name for name in {heavy} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("imported: []\n")


def test_a_broken_run_exits_with_0_and_names_the_command_that_exits_with_1(stabilitykit: Run) -> None:
    broken = stabilitykit("profile", RANDOM, "--prompt", "Hi", "--stress", "65536")
    assert broken.code == 0
    arguments = ["check", RANDOM, "--dtype", "float16", "--stress", "65536"]
    named = f"To fail a pipeline: {shlex.join(['stabilitykit', *arguments])}"
    assert "".join(broken.out.split()).endswith("".join(named.split()))  # a long line is wrapped anywhere
    assert stabilitykit(*arguments).code == 1

    sound = stabilitykit("profile", RANDOM, "--prompt", "Hi")
    assert sound.code == 0
    assert "To fail a pipeline" not in sound.out

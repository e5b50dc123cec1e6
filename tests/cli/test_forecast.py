"""`forecast` on the real Gemma 3 270M: that what it says comes true, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stabilitykit.checkpoints import Checkpoint

PROMPT = "The capital of France is"
RANDOM = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"
Run = Callable[..., Any]


def forecast_270m(stabilitykit: Run, *arguments: str) -> dict[str, Any]:
    result = stabilitykit("forecast", "gemma3-270m", "--prompt", PROMPT, "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_the_270m_breaks_in_float16_and_in_both_of_eight_bits(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    found = forecast_270m(stabilitykit)
    assert found["dtype"] == "float32"
    assert found["tokens"] == [2, 818, 5279, 529, 7001, 563]
    by_name = {one["format"]: one for one in found["formats"]}
    assert list(by_name) == ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    float16 = by_name["float16"]
    assert (float16["breaks"], float16["first"], float16["layer"], float16["overflow"]) == (True, "layers.7", 7, 1)
    assert "68,398, at token 0 '<bos>'" in float16["forecast"]
    assert float16["amax"] == pytest.approx(104061, abs=2)
    assert not by_name["bfloat16"]["breaks"]
    assert by_name["bfloat16"]["headroom"] > 111
    assert by_name["float8_e4m3fn"]["past"] > 1000
    assert by_name["float8_e4m3fn"]["weights"]["zero"] > 1e6
    assert by_name["float8_e5m2"]["first"] == "layers.7"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_eighth_of_the_residual_fits_float16(checkpoint_270m: Checkpoint, stabilitykit: Run, dtype: str) -> None:
    found = forecast_270m(stabilitykit, "--rescale", "0.125", "--format", "float16", "--dtype", dtype)
    (float16,) = found["formats"]
    assert not float16["breaks"]
    assert float16["headroom"] == pytest.approx(2.33, abs=0.05)
    assert float16["weights"]["subnormal"] > 63_842  # more than unscaled


def test_what_people_read(stabilitykit: Run) -> None:
    result = stabilitykit("forecast", RANDOM, "--prompt", "hi", "--rescale", "65536")
    assert result.code == 0
    assert "float16 would overflow first in" in result.out
    assert "bfloat16 would hold every value" in result.out
    assert "What each format would make of" in result.out
    cut = stabilitykit("forecast", RANDOM, "--prompt", "hi", "--rescale", "65536", "--saturating")
    assert "float8_e4m3fn would overflow first" in result.out
    assert "float8_e4m3fn would saturate first" in cut.out
    assert ("±448" in cut.out, "±448" in result.out) == (True, False)


def test_a_prompt_can_be_kept_out(stabilitykit: Run) -> None:
    result = stabilitykit("forecast", RANDOM, "--prompt", "secret", "--redact")
    assert result.code == 0
    assert "secret" not in result.out
    assert "redacted" in result.out


def test_misuse_is_one_sentence(stabilitykit: Run, tmp_path: Path) -> None:
    for arguments, said in (
        (("--prompt", "hi", "--format", "float4"), "Unknown number format 'float4'; choose one of: "),
        (("--prompt", ""), "The prompt is empty"),
        (
            ("--prompt", "hi", "--attention", "eager"),
            "attention, adapter and trust_remote_code apply to transformers' models only",
        ),
        (("--prompt", "hi", "--device", "tpu"), "The device 'tpu' cannot be used here"),
    ):
        result = stabilitykit("forecast", RANDOM, *arguments)
        assert result.code == 2
        assert said in result.err
        assert "Traceback" not in result.err

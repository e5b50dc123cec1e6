"""Too little memory on the real model: an error that says so, never a number that changed."""

import sys
from pathlib import Path

import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.run.prefill import starve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux heeds RLIMIT_DATA")


def test_a_prompt_with_too_little_memory_is_refused_it(gguf_270m: Path) -> None:
    found = starve("gemma3-270m", "float32", 512, "cpu", 0.25)
    assert found.outcome == "raised"
    assert "can't allocate memory" in str(found.reason)
    assert found.room == found.needed // 4


def test_a_prompt_with_memory_to_spare_is_finite(gguf_270m: Path) -> None:
    found = starve("gemma3-270m", "float32", 512, "cpu", 2.0)
    assert (found.outcome, found.reason) == ("finite", None)


def test_a_device_without_a_limit_is_refused() -> None:
    with pytest.raises(MisuseError, match="CPU or with CUDA"):
        starve("random:gemma3-270m?layers=1&vocabulary=512", "float32", 8, "meta", 0.5)

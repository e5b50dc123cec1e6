"""The bytes of a prefill that are computed are those that a process of the real model takes."""

from pathlib import Path

import pytest

from stabilitykit.run.prefill import measure


@pytest.mark.parametrize(("dtype", "length"), [("float32", 1024), ("bfloat16", 512)])
def test_a_process_of_the_real_model_takes_what_is_computed(gguf_270m: Path, dtype: str, length: int) -> None:
    found = measure("gemma3-270m", dtype, length, "cpu")
    assert (found.dtype, found.length, found.device) == (dtype, length, "cpu")
    assert abs(found.error) < 0.1, found
    # The weights must not hide an error in the rest, to which kernels add some buffers of their own.
    beside_weights = found.peak - found.libraries - found.weights
    assert found.cache + found.activations == pytest.approx(beside_weights, rel=0.15, abs=16 << 20), found

"""The bytes of a prefill: those computed are those of tensors that are made, and those that a process takes."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stabilitykit.checkpoints import GemmaConfig
from stabilitykit.checkpoints.config import RELEASED
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.models import matmul as products
from stabilitykit.models.gemma import Gemma, KVCache, build, query_blocks
from stabilitykit.models.matmul import BUFFER, matmul
from stabilitykit.run import footprint as experiment_footprint
from stabilitykit.run.footprint import footprint
from stabilitykit.run.prefill import measure

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&head_dim=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}&kv_heads=1",
    2: f"random:gemma2-2b?{SHAPE}&kv_heads=2&window=4",
    3: f"random:gemma3-270m?{SHAPE}&kv_heads=2&window=4&global_every=2",
}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("generation", SPECS)
def test_weights_and_cache_are_those_of_the_tensors_that_hold_them(generation: int, dtype: str) -> None:
    model = build(random_checkpoint(SPECS[generation]), dtype=dtype)
    for length in (1, 7, 40):
        found = footprint(model.config, dtype, length)
        assert found.weights == sum(parameter.nbytes for parameter in model.parameters())  # a tied head counts once
        cache = KVCache(model.config, batch=1, length=length, dtype=model.dtype)
        assert found.cache == sum(tensor.nbytes for tensor in [*cache._keys, *cache._values])
        assert (found.dtype, found.length) == (dtype, length)
        assert found.computed == found.weights + found.cache + found.activations


def test_by_hand() -> None:
    config = GemmaConfig(
        generation=3, layers=2, hidden_size=8, feed_forward=16, heads=2, kv_heads=1, head_dim=4, vocabulary=100
    )
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, o
    norms = 4 * 8 + 2 * 4  # two before, two after; of queries and keys
    layer = attention + 3 * 8 * 16 + norms
    found = footprint(config, "float16", 10)
    assert found.weights == 2 * (100 * 8 + 2 * layer + 8)
    assert found.cache == 2 * 2 * 2 * 10 * 4  # bytes, layers, keys and values, tokens, channels


def test_the_real_models_weights_are_as_many_as_its_parameters() -> None:
    """268,098,176, of which two thirds are the embedding's."""
    assert footprint(RELEASED["gemma3-270m"], "bfloat16", 1).weights == 2 * 268_098_176


def most_allocated(model: Gemma, length: int, kind: str) -> int:
    """The most bytes that torch's allocator had handed out at one time during a prefill, by its own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        ids = torch.arange(length)[None]
        cache = KVCache(model.config, batch=1, length=length, dtype=model.dtype)
        with torch.inference_mode(), matmul(kind):
            logits = model(ids, cache=cache, last_only=True)
    assert logits.shape == (1, 1, model.config.vocabulary)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 100
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float32", "native"),
        ("float16", "native"),
        ("bfloat16", "float32-accumulate"),
        ("float64", "float32-accumulate"),
    ],
)
@pytest.mark.parametrize("generation", SPECS)
def test_cache_and_activations_are_what_the_allocator_hands_out_to_the_byte(
    generation: int, dtype: str, kind: str
) -> None:
    """At lengths where the head, the MLP or the attention scores take most."""
    model = build(random_checkpoint(SPECS[generation]), dtype=dtype)
    for length in (1, 40, 300):
        found = footprint(model.config, dtype, length, matmul=kind)
        taken = most_allocated(model, length, kind)
        # Operators make a tensor of a plain number: with a soft-cap two or three of them are alive at the peak.
        assert 0 <= taken - (found.cache + found.activations) <= 24, length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("generation", SPECS)
def test_so_are_those_of_attention_by_blocks_and_of_products_made_in_many_pieces(
    monkeypatch: pytest.MonkeyPatch, generation: int, dtype: str
) -> None:
    for module, name, value in (
        (query_blocks, "WHOLE", 4000), (query_blocks, "BLOCK", 4000),
        (products, "_COLUMNS", 16), (products, "_LEFT", 1024), (products, "BUFFER", 512),
        (experiment_footprint, "BUFFER", 512),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    test_cache_and_activations_are_what_the_allocator_hands_out_to_the_byte(generation, dtype, "float32-accumulate")


def test_only_16_bit_products_are_widened_and_only_a_part_of_them() -> None:
    """One token: of the head, whose float32 copy would be all there is, a buffer's worth."""
    config = RELEASED["gemma3-270m"]
    for dtype in ("float16", "bfloat16"):
        native = footprint(config, dtype, 1).activations
        assert (
            4 * BUFFER < footprint(config, dtype, 1, matmul="float32-accumulate").activations < 4 * BUFFER + 2 * native
        )
    for dtype in ("float32", "float64"):
        assert footprint(config, dtype, 1) == footprint(config, dtype, 1, matmul="float32-accumulate")


def test_what_cannot_be_meant_is_refused() -> None:
    config = RELEASED["gemma3-270m"]
    with pytest.raises(MisuseError, match="at least 1 token; 0 is not"):
        footprint(config, "float16", 0)
    with pytest.raises(MisuseError, match="float8"):
        footprint(config, "float12", 8)


@pytest.mark.parametrize(("dtype", "length"), [("float32", 1024), ("bfloat16", 512)])
def test_a_process_of_the_real_model_takes_what_is_computed(gguf_270m: Path, dtype: str, length: int) -> None:
    found = measure("gemma3-270m", dtype, length, "cpu")
    assert (found.dtype, found.length, found.device) == (dtype, length, "cpu")
    assert abs(found.error) < 0.1, found
    # The weights must not hide an error in the rest, to which kernels add some buffers of their own.
    beside_weights = found.peak - found.libraries - found.weights
    assert found.cache + found.activations == pytest.approx(beside_weights, rel=0.15, abs=16 << 20), found

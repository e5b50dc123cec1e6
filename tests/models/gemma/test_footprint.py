"""The bytes of a prefill that are computed are those of the tensors that one makes."""

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stabilitykit.checkpoints import GemmaConfig
from stabilitykit.checkpoints.config import RELEASED
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.models import matmul as products
from stabilitykit.models.gemma import Gemma, KVCache, build, query_blocks
from stabilitykit.models.gemma.footprint import at_most, beside_weights, footprint
from stabilitykit.models.matmul import BUFFER, matmul

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


def test_weights_and_cache_are_those_counted_by_hand() -> None:
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


def check_against_the_allocator(spec: str, dtype: str, kind: str) -> None:
    """At lengths where the head, the MLP or the attention scores take most."""
    model = build(random_checkpoint(spec), dtype=dtype)
    for length in (1, 40, 300):
        found = footprint(model.config, dtype, length, matmul=kind)
        taken = most_allocated(model, length, kind)
        # Operators make a tensor of a plain number: with a soft-cap two or three of them are alive at the peak.
        assert 0 <= taken - (found.cache + found.activations) <= 24, length


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
    check_against_the_allocator(SPECS[generation], dtype, kind)


@pytest.mark.parametrize("more", ["window=4&global_every=6&layers=13", "layers=5"])
def test_further_layers_take_no_more_than_the_first_of_their_kind(more: str) -> None:
    check_against_the_allocator(
        SPECS[3].replace("layers=3&", "").replace("window=4&global_every=2", more), "bfloat16", "float32-accumulate"
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention by blocks, and products in many pieces, of matrices as small as these; footprints are kept."""
    for module, name, value in (
        (query_blocks, "WHOLE", 4000), (query_blocks, "BLOCK", 4000),
        (products, "_COLUMNS", 16), (products, "_LEFT", 1024), (products, "BUFFER", 512),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    footprint.cache_clear()
    yield
    footprint.cache_clear()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("generation", SPECS)
def test_attention_by_blocks_and_products_in_many_pieces_take_what_is_computed(generation: int, dtype: str) -> None:
    check_against_the_allocator(SPECS[generation], dtype, "float32-accumulate")


def test_cuda_reads_float16_scores_where_a_cpu_casts_them_first() -> None:
    """One layer whose scores are all there is: 4 heads, 300 by 300, of 4 bytes."""
    config = random_checkpoint(SPECS[1]).config
    peaks = {
        (dtype, device): footprint(config, dtype, 300, device=device).activations
        for dtype in ("float16", "bfloat16")
        for device in ("cpu", "cuda")
    }
    assert peaks["bfloat16", "cuda"] == peaks["bfloat16", "cpu"] == peaks["float16", "cpu"]
    assert 0 < peaks["float16", "cpu"] - peaks["float16", "cuda"] <= 4 * 4 * 300 * 300


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


@pytest.mark.parametrize("name", RELEASED)
def test_a_prefill_takes_less_than_the_bound_that_is_computed_without_a_run(name: str) -> None:
    """Short ones, where the head takes most; long ones, where the scores do; and those by blocks."""
    config = RELEASED[name]
    for length in (1, 6, 700, min(config.context, 5000)):
        for dtype, kind in (("float16", "float32-accumulate"), ("bfloat16", "native"), ("float64", "native")):
            found = footprint(config, dtype, length, matmul=kind)
            assert found.cache + found.activations < at_most(config, length), (length, dtype, kind)


def test_what_a_prompt_needs_is_counted_exactly_only_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RELEASED["gemma3-270m"]
    exact = footprint(config, "float16", 6)
    needed = {"matmul": "native", "device": "cpu"}
    for free, counted in ((1 << 40, False), (exact.computed, True)):
        monkeypatch.setattr("stabilitykit.models.memory.available_memory", lambda device, free=free: free)
        found = beside_weights(config, "float16", 6, **needed)
        assert found == (exact.cache + exact.activations if counted else at_most(config, 6))


def test_what_cannot_be_meant_is_refused() -> None:
    config = RELEASED["gemma3-270m"]
    with pytest.raises(MisuseError, match="at least 1 token; 0 is not"):
        footprint(config, "float16", 0)
    with pytest.raises(MisuseError, match="'float12'"):
        footprint(config, "float12", 8)

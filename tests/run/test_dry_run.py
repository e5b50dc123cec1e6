"""A pass without values tells which tensors a 16-bit run stores in 16 bits, in our models and in transformers'."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import family_model

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.model import blank
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.recorder import record
from stabilitykit.records import Recording
from stabilitykit.run.case import run_case
from stabilitykit.run.dry_run import find_stored_dtypes, with_stored_dtypes
from stabilitykit.run.every_length import every_length

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}",
    2: f"random:gemma2-2b?{SHAPE}&window=4",
    3: f"random:gemma3-270m?{SHAPE}&window=4&global_every=2",
}
TOKENS = [2, 70, 71, 72, 73, 74, 75]


def recorded(model: Any, device: str = "cpu", **options: Any) -> Recording:
    with torch.inference_mode(), record(model, **options) as recording:
        model(torch.tensor([TOKENS], device=device))
    return recording


def places(recording: Recording) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(r.site, r.dtype, r.shape) for r in recording]


def small(generation: int, dtype: str = "float32", rounding: str = "transformers") -> Gemma:
    return build(random_checkpoint(SPECS[generation]), dtype=dtype, rounding=rounding)  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["transformers", "gemma_pytorch"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_pass_without_values_goes_through_the_tensors_of_a_real_one(
    generation: int, dtype: str, rounding: str
) -> None:
    model = small(generation, dtype, rounding)
    dry = recorded(GemmaSubject(model).blank(model.dtype), "meta")
    assert places(dry) == places(recorded(model))
    assert all((r.amax, r.masked, r.lost, r.softmax) == (None, r.elements, 0, None) for r in dry)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("gemma", "eager"), ("gemma", "sdpa"), ("gemma2", "eager"), ("gemma3", "eager"), ("gemma3", "sdpa")],
)
def test_transformers_models_are_told_too(family: str, attention: str) -> None:
    model, low = (family_model(family, dtype, attention) for dtype in (torch.float32, torch.float16))
    with torch.device("meta"):
        bare = type(model)(model.config).to(torch.float16).eval()
    dry, real = recorded(bare, "meta"), recorded(low)
    if attention == "eager":
        assert places(dry) == places(real)
    told = {r.site: r.stored_dtype for r in with_stored_dtypes(recorded(model), dry)}
    stored = {r.site: r.dtype for r in real} | {site: "float16" for site in told if site.endswith("softmax.0")}
    assert {site: dtype for site, dtype in told.items() if not site.startswith("rotary_emb")} == {
        site: stored[site] for site in told if not site.startswith("rotary_emb")
    }


@pytest.mark.parametrize("level", ["operators", "modules", "layers"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_float32_run_says_what_a_float16_run_stores(generation: int, level: str) -> None:
    run = run_case(small(generation), TOKENS, level=level).recording  # type: ignore[arg-type]
    low = run_case(small(generation, "float16"), TOKENS, level=level).recording  # type: ignore[arg-type]
    stored = {r.site: r.dtype for r in low}
    told = {r.site: r.stored_dtype for r in run}
    for site, dtype in told.items():
        if site.startswith("sampler"):
            assert dtype is None
        elif site.endswith("softmax.0"):  # float32 in itself, and then rounded in an operator of its own
            assert dtype == "float16"
        elif not site.startswith("rotary_emb"):
            assert dtype == stored[site], site
    insides = [dtype for site, dtype in told.items() if "norm/" in site]
    assert set(insides) <= {"float32"}
    assert (level == "operators") == bool(insides)


def test_every_step_of_a_generation_is_told() -> None:
    run = run_case(small(3), TOKENS, new_tokens=3).recording
    assert {r.step for r in run} == {0, 1, 2}
    judged = [{r.site for r in run if r.step == step and r.stored_dtype == "float16"} for step in range(3)]
    assert judged[0]
    assert judged[0] == judged[1] == judged[2]


def test_what_cannot_be_run_without_values_is_left_untold() -> None:
    @dataclass(frozen=True, slots=True)
    class Wrapped(GemmaSubject):
        def blank(self, dtype: torch.dtype) -> None:  # type: ignore[override]
            return None

    recording = recorded(small(3))
    assert find_stored_dtypes(recording, Wrapped(small(3)), 1, 7) is recording


def test_what_a_float16_run_stores_is_what_it_has() -> None:
    run = run_case(small(3, "float16"), TOKENS).recording
    assert {r.dtype for r in run} == {"float16", "float32"}
    assert all(r.stored_dtype == r.dtype for r in run)


def test_a_pass_without_values_is_made_once_for_each_shape_and_level() -> None:
    made = []

    @dataclass(frozen=True, slots=True)
    class Counting(GemmaSubject):
        def blank(self, dtype: torch.dtype) -> Any:
            made.append(dtype)
            return blank(self.module.config, dtype)

    model = small(3)
    for length, level in ((7, "operators"), (7, "operators"), (6, "operators"), (7, "modules"), (7, "modules")):
        run_case(Counting(model), TOKENS[:length], level=level)  # type: ignore[arg-type]
    assert made == 3 * [torch.float16]
    run_case(Counting(small(3)), TOKENS)
    assert len(made) == 4  # of another model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_passes_over_every_length_are_told_too(dtype: str) -> None:
    """Peaks are those of what a 16-bit run stores: no squares in a norm, which are far larger than what they are of."""
    found = every_length(small(3, dtype), TOKENS)
    sites = {peak.site for peak in found.peaks}
    assert {"layers.0", "layers.2/add.0", "norm"} <= sites
    assert not {site for site in sites if "norm/" in site and not site.endswith("/cast.0")}


def test_sites_are_matched_in_their_order() -> None:
    """Where a site comes twice in a step, the first is told by the first."""
    wide, low = recorded(small(3)), recorded(small(3, "float16"))
    twice = [r for r in low if r.site == "rotary_emb"]
    assert [r.dtype for r in twice] == ["float16", "float16"]
    low.records[low.records.index(twice[0])] = replace(twice[0], dtype="float32")
    found = [r for r in with_stored_dtypes(wide, low) if r.site == "rotary_emb"]
    assert [r.stored_dtype for r in found] == ["float32", "float16"]

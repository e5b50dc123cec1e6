"""A rescaled checkpoint computes what it did, bit for bit in float32, in our model and in plain transformers."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from remedied import BREAKING, TOKENS, small

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import build
from stabilitykit.recorder import record
from stabilitykit.remedies.rescale import choose_gamma, gain_factor, rescale, rescaling, stored_gains


def logits(checkpoint: Checkpoint, dtype: str = "float32") -> torch.Tensor:
    with torch.inference_mode():
        return build(checkpoint, dtype=dtype)(TOKENS)


def plain(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """transformers' logits of the checkpoint, by way of a folder in float32."""
    folder.mkdir()
    write_folder(checkpoint, folder, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("gamma", [0.125, 0.5, 8.0, 2.0**-24])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_float32_logits_keep_every_bit(generation: int, gamma: float) -> None:
    before, after = small(generation), rescale(small(generation), gamma)
    assert (sum(after.rounded.values()) == 0) == torch.equal(logits(before), logits(after.checkpoint))
    if gamma >= 0.125:
        assert not after.rounded


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_float32_logits_keep_every_bit_in_plain_transformers(tmp_path: Path, generation: int) -> None:
    before = small(generation)
    after = rescale(before, 0.125).checkpoint
    assert torch.equal(plain(before, tmp_path / "before"), plain(after, tmp_path / "after"))


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_what_broke_in_float16_is_finite_afterwards(tmp_path: Path, generation: int) -> None:
    """Everything that a norm reads was 2^15 times too large, and is brought back."""
    broken = small(generation, BREAKING)
    repaired = rescale(broken, 1 / BREAKING).checkpoint
    assert not logits(broken, "float16").isfinite().all()
    assert logits(repaired, "float16").isfinite().all()
    assert not plain(broken, tmp_path / "broken", torch.float16).isfinite().all()
    assert plain(repaired, tmp_path / "repaired", torch.float16).isfinite().all()
    assert torch.equal(logits(broken), logits(repaired))


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_each_tensor_is_scaled_by_the_factor_its_reader_ignores(generation: int) -> None:
    """Site by site: what a norm reads, or adds to what one reads, is γ times what it was, and nothing else is."""
    gamma = 0.125
    runs = {}
    for name, checkpoint in (("before", small(generation)), ("after", rescale(small(generation), gamma).checkpoint)):
        model = build(checkpoint)
        with torch.inference_mode(), record(model) as recording:
            model(TOKENS)
        runs[name] = {r.site: r.amax for r in recording}
    ratios = {site: runs["after"][site] / amax for site, amax in runs["before"].items() if amax}
    read = [site for site in ratios if site.endswith(("/add.0", ".o_proj", ".down_proj", "embed_tokens"))
            and "norm" not in site and "self_attn/" not in site]  # fmt: skip
    assert read
    assert {ratios[site] for site in read} == {gamma}
    scores = [site for site in ratios if "self_attn/matmul" in site or "gate_proj" in site or site == "lm_head"]
    assert {ratios[site] for site in scores} == {1.0}
    assert ratios["norm"] == 1 / gamma
    queries = [ratios[site] for site in ratios if site.endswith(("q_proj", "k_proj"))]
    assert set(queries) == {gamma if generation == 3 else 1.0}


def test_gains_that_need_every_bit_are_rounded_and_counted() -> None:
    """numpy in float32 as the reference: a gain is lost where fl(1 + fl(γ fl(1 + w) - 1)) is not γ fl(1 + w)."""
    opened = small(3)
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.rand(t.shape, generator=generator) if t.ndim == 1 else t for name, t in opened.tensors.items()}
    opened = replace(opened, tensors=full)
    found = rescale(opened, 0.25)
    expected: dict[str, int] = {}
    for name, tensor in full.items():
        factor = np.float32(gain_factor(opened.config, name, 0.25))
        if tensor.ndim == 1 and factor != 1:
            wanted = (np.float32(1) + tensor.numpy()) * factor
            lost = int((np.float32(1) + (wanted - np.float32(1)) != wanted).sum())
            expected |= {name: lost} if lost else {}
    assert found.rounded == expected
    assert sum(expected.values()) > 20
    assert torch.allclose(logits(opened), logits(found.checkpoint), rtol=1e-5, atol=1e-5)


def test_gains_that_storage_rounds_are_counted() -> None:
    opened = small(3)
    stored = stored_gains(rescale(opened, 0.125).checkpoint, torch.float16)
    expected = {
        name: int((tensor.numpy() != tensor.numpy().astype(np.float16).astype(np.float32)).sum())
        for name, tensor in rescale(opened, 0.125).checkpoint.tensors.items()
        if tensor.ndim == 1
    }
    assert stored == {name: lost for name, lost in expected.items() if lost}


def test_eps_and_notes_say_what_was_done() -> None:
    after = rescale(small(3), 0.25).checkpoint
    assert after.config.rms_eps == small(3).config.rms_eps / 16
    assert after.notes[-1] == "rescaled by 2^-2"
    assert rescaling(0.25).name == "rescale 2^-2"
    assert rescaling(0.25).exportable


@pytest.mark.parametrize("gamma", [0.1875, 0.0, -0.5, 2.0**25, math.nan])
def test_a_rescale_is_by_a_power_of_two(gamma: float) -> None:
    with pytest.raises(MisuseError, match="power of two"):
        rescale(small(3), gamma)


@pytest.mark.parametrize(
    ("headroom", "final", "margin", "gamma"),
    [
        (5.0, 8.0, 1.0, 1.0),
        (1.0, 8.0, 1.0, 1.0),
        (0.99, 8.0, 1.0, 0.5),
        (-0.67, 10.0, 1.0, 0.25),
        (-3.0, 4.0, 0.0, 0.125),
    ],
)
def test_gamma_is_the_largest_that_leaves_the_margin(
    headroom: float, final: float, margin: float, gamma: float
) -> None:
    assert choose_gamma(headroom, final, margin) == gamma


def test_where_the_final_norm_would_overflow_there_is_no_gamma() -> None:
    with pytest.raises(
        MisuseError,
        match=r"No power-of-two rescale leaves .* the final norm, which grows as the residual stream shrinks",
    ):
        choose_gamma(-4.0, 3.0, 1.0)

"""A proved repair: every bound within float16's range, the same function to the last bit, or what stands in the way."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from remedied import TOKENS, breaking, rescale, small

from stabilitykit.bounds import bound_sites
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import build
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.original import scaled_checkpoint
from stabilitykit.remedies.proved import by_norms, choose_factors, prove, reach


def planted(checkpoint: Checkpoint, factors: Mapping[str, float]) -> Checkpoint:
    """With some weights times a power of two."""
    tensors = {name: tensor * factors.get(name, 1.0) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def loud(generation: int) -> Checkpoint:
    """The residual stream leaves float16's range, and gate · up of one layer does for some prompt."""
    big = {f"layers.1.mlp.{name}_proj.weight": 2.0**9 for name in ("gate", "up")}
    return planted(small(generation, breaking(generation)), big)


def logits(checkpoint: Checkpoint, dtype: str = "float32") -> torch.Tensor:
    with torch.inference_mode():
        return build(checkpoint, dtype=dtype)(TOKENS)


@pytest.mark.parametrize("generation", [2, 3])
def test_every_bound_lies_within_the_range_and_no_bit_changes(tmp_path: Path, generation: int) -> None:
    before = loud(generation)
    over = {one.kind for one in bound_sites(before, "float16") if one.bound > 65504}
    assert over >= {"layers.*", "layers.*.mlp/mul.0"}
    found = prove(before)
    assert max(one.bound for one in found.bounds) <= 0.95 * 65504
    assert found.scaling.settings["rms_eps"] < 0
    moved = [f"layers.{layer}.mlp.up_proj.weight" in found.scaling.parameters for layer in range(3)]
    assert moved == [False, True, False]
    after = scaled_checkpoint(before, found.scaling)
    assert torch.equal(logits(before), logits(after))
    assert not logits(before, "float16").isfinite().all()
    assert logits(after, "float16").isfinite().all()

    def plain(checkpoint: Checkpoint, folder: Path) -> torch.Tensor:
        folder.mkdir()
        write_folder(checkpoint, folder, "float32")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.inference_mode():
            found: torch.Tensor = model(TOKENS).logits
        return found

    assert torch.equal(plain(before, tmp_path / "before"), plain(after, tmp_path / "after"))


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_factors_are_the_largest_that_will_do(generation: int) -> None:
    before = small(generation, breaking(generation))
    gamma, inner = choose_factors(bound_sites(before, "float16"), before.config)
    assert prove(before).scaling == by_norms(before, gamma, inner)
    twice = bound_sites(rescale(before, 2 * gamma, inner), "float16")
    assert max(one.bound for one in twice) > 0.95 * 65504
    assert prove(small(generation)).scaling == Scaling()


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_every_bound_moves_as_it_is_said_to(generation: int) -> None:
    """By γ, its inverse, β, or not at all, up to what rounding adds."""
    before = small(generation, 2.0**6)
    gamma, inner = 2.0**-3, (0.5, 1.0, 0.25)
    moved = {one.site: one.bound for one in bound_sites(rescale(before, gamma, inner), "float16")}
    for one in bound_sites(before, "float16"):
        if one.site.startswith("rotary_emb"):
            continue
        beta = inner[one.layer] if one.layer is not None else 1.0
        factor = {"gamma": gamma, "inverse": 1 / gamma, "inner": beta, "none": 1.0}[reach(one.kind, before.config)]
        assert moved[one.site] == pytest.approx(one.bound * factor, rel=5e-3), one.site


def test_what_stands_in_the_way_is_named() -> None:
    values = planted(small(3), {"layers.2.self_attn.v_proj.weight": 2.0**16})
    with pytest.raises(
        MisuseError, match=r"layers\.2\.self_attn\.v_proj \(value projection\), which neither γ nor β scales"
    ):
        prove(values)
    opened = small(3, breaking(3))
    gain, rows = (opened.tensors[f"{name}.weight"].clone() for name in ("norm", "embed_tokens"))
    gain[0], rows[:, 0] = 4000.0, 0.0  # a channel that no logit hears
    final = replace(opened, tensors={**opened.tensors, "norm.weight": gain, "embed_tokens.weight": rows})
    with pytest.raises(MisuseError, match=r"the final norm grows by 1 / γ, from .* A separate head would avoid that"):
        prove(final)

"""Each remedy on our model and on transformers': finite where plain float16 is not, and nothing is left behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from remedied import SPECS, TOKENS, breaking, small
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.recorder import record
from stabilitykit.records import Recording
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.clamp import CLAMP
from stabilitykit.remedies.float32_islands import Islands, float32_islands, overflowing
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.rescale import rescaling
from stabilitykit.run.case import run_case
from stabilitykit.run.dry_run import dry_run


def ours(checkpoint: Checkpoint, dtype: str, tmp_path: Path) -> nn.Module:
    return build(checkpoint, dtype=dtype)


def theirs(checkpoint: Checkpoint, dtype: str, tmp_path: Path) -> nn.Module:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(checkpoint, folder, "float32")
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    return model


def run(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def islands(checkpoint: Checkpoint) -> Islands:
    """From one float32 run's records."""
    return overflowing(run_case(build(checkpoint), TOKENS[0].tolist()).recording, "float16")


def dry(checkpoint: Checkpoint) -> Recording:
    found = dry_run(GemmaSubject(build(checkpoint)), 1, TOKENS.shape[1])
    assert found is not None
    return found


@pytest.mark.parametrize("implementation", [ours, theirs])
@pytest.mark.parametrize(
    "remedy", [*REMEDIES, rescaling(0.25), rescaling(0.5) + CLAMP, "islands"], ids=lambda r: getattr(r, "name", r)
)
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_remedied_model_is_finite_and_as_before_afterwards(
    tmp_path: Path, generation: int, remedy: Remedy | str, implementation: Callable[..., nn.Module]
) -> None:
    broken = small(generation, breaking(generation))
    if isinstance(remedy, str):
        remedy = float32_islands(islands(broken), dry(broken))
    model = implementation(remedy.change(broken), remedy.dtype, tmp_path)
    before = hooks(model)
    plain = run(model)
    with remedy.around(model):
        assert run(model).isfinite().all()
    assert hooks(model) == before
    assert _get_current_dispatch_mode_stack() == []
    assert torch.equal(run(model).nan_to_num(), plain.nan_to_num())


@pytest.mark.parametrize("implementation", [ours, theirs])
@pytest.mark.parametrize(
    "remedy",
    [CLAMP, FLOAT32_RESIDUAL, float32_islands(Islands("float16", frozenset(), 1), dry(small(3)))],
    ids=lambda r: r.name,
)
def test_an_exception_leaves_nothing_behind(
    tmp_path: Path, remedy: Remedy, implementation: Callable[..., nn.Module]
) -> None:
    model = implementation(small(3), "float16", tmp_path)
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), remedy.around(model):
        raise ZeroDivisionError
    assert hooks(model) == before
    assert _get_current_dispatch_mode_stack() == []


def test_the_residual_stream_is_float32_and_nothing_else() -> None:
    model = build(small(3), dtype="float16")
    with torch.inference_mode(), record(model) as plain:
        model(TOKENS)
    with torch.inference_mode(), FLOAT32_RESIDUAL.around(model), record(model) as recording:
        model(TOKENS)
    before, after = ({r.site: r.dtype for r in run_} for run_ in (plain, recording))
    layers = [f"layers.{index}{ending}" for index in range(3) for ending in ("", "/add.0")]
    assert {after[site] for site in layers} == {"float32"}
    modules = [site for site in before if "/" not in site and site not in layers and site != "rotary_emb"]
    assert {site: after[site] for site in modules} == {site: before[site] for site in modules}


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_each_island_is_necessary_and_all_are_enough(generation: int, times: int) -> None:
    """Sums of the residual stream at first; with more rescale what is added to them too."""
    broken = small(generation, times * breaking(generation))
    found, plain = islands(broken), dry(broken)
    model = build(broken, dtype="float16")

    def first_break(kept: Islands) -> str | None:
        remedy = float32_islands(kept, plain)
        with torch.inference_mode(), remedy.around(model), record(model) as recording:
            model(TOKENS)
        broke = recording.first_break()
        return None if broke is None else broke.site

    assert len(found.sites) >= 3
    assert first_break(found) is None
    for site in found.sites:
        assert first_break(replace(found, sites=found.sites - {site})) == site


def test_islands_are_float32_and_nothing_else() -> None:
    broken = small(3, breaking(3))
    found = islands(broken)
    model = build(broken, dtype="float16")
    with torch.inference_mode(), record(model) as plain:
        model(TOKENS)
    with torch.inference_mode(), float32_islands(found, dry(broken)).around(model), record(model) as recording:
        model(TOKENS)
    before, after = ({r.site: r.dtype for r in run_} for run_ in (plain, recording))
    assert {after[site] for site in found.sites} == {"float32"}
    others = before.keys() & after.keys() - found.sites
    assert {site: after[site] for site in others} == {site: before[site] for site in others}
    assert {"layers.2.mlp.down_proj", "layers.2.input_layernorm", "lm_head"} <= others


@pytest.mark.parametrize("generation", [1, 3])
def test_islands_around_fused_attention(tmp_path: Path, generation: int) -> None:
    """A dry run knows its parts and the kernel is one operator; what it is given may be an island."""
    broken = small(generation, breaking(generation))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(broken, folder, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, attn_implementation="sdpa"
    ).eval()
    values = Islands("float16", islands(broken).sites | {f"layers.{n}.self_attn.v_proj" for n in range(3)}, 64)
    remedy = float32_islands(values, dry(broken))
    with torch.inference_mode(), record(model) as recording, remedy.around(model):
        logits = model(TOKENS).logits
    assert logits.isfinite().all()
    dtypes = {r.site: r.dtype for r in recording}
    assert dtypes["layers.1.self_attn.v_proj"] == "float32"
    assert dtypes["layers.1.self_attn/scaled_dot_product_attention.0"] == "float32"  # what the kernel was asked for
    assert dtypes["layers.1.self_attn.o_proj"] == "float16"
    assert dtypes["lm_head"] == "float16"


def test_no_island_changes_no_bit() -> None:
    for generation in SPECS:
        model = build(small(generation), dtype="float16")
        plain = run(model)
        with float32_islands(Islands("float16", frozenset(), 0), dry(small(generation))).around(model):
            assert torch.equal(run(model), plain)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_the_sum_that_overflows_is_clamped_to_the_maximum(generation: int) -> None:
    model = build(small(generation, breaking(generation)), dtype="float16")
    with torch.inference_mode(), record(model) as plain:
        model(TOKENS)
    with torch.inference_mode(), CLAMP.around(model), record(model) as recording:
        model(TOKENS)
    broken = plain.first_break()
    assert broken is not None
    assert broken.operator == "add"
    (clamped,) = (r for r in recording if r.site == broken.site)
    assert (clamped.amax, clamped.lost) == (65504.0, 0)
    assert recording.first_break() is None


def test_two_remedies_together_are_in_force_at_once() -> None:
    """The rescale halves the residual stream, and its sums are float32."""
    both = rescaling(0.5) + FLOAT32_RESIDUAL
    assert both.name == "rescale 2^-1 + float32 residual"
    assert both.change(small(3)).notes[-1] == "rescaled by 2^-1"
    assert not both.exportable
    assert both.extra(small(3).config, 100) == 100 * 32 * 2

    def residual_sums(remedy: Remedy) -> dict[str, tuple[str, float | None]]:
        changed = remedy.change(small(3))
        model = build(changed, dtype="float16")
        with torch.inference_mode(), remedy.around(model), record(model) as recording:
            model(TOKENS)
        sites = [f"layers.{index}{ending}" for index in range(3) for ending in ("/add.0", "")]
        return {r.site: (r.dtype, r.amax) for r in recording if r.site in sites}

    found, plain = residual_sums(both), residual_sums(FLOAT32_RESIDUAL)
    assert found.keys() == plain.keys()
    assert len(found) == 6
    for site, (dtype, amax) in found.items():
        assert dtype == "float32"
        assert amax == pytest.approx((plain[site][1] or 0.0) / 2, rel=2.0**-9), site


def test_what_has_no_layers_is_refused() -> None:
    with pytest.raises(MisuseError, match="ModuleList named `layers`; Linear has none"), CLAMP.around(nn.Linear(2, 2)):
        pass

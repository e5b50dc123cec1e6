"""Each remedy on our model and on transformers': finite where plain float16 is not, and nothing is left behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from remedied import SPECS, TOKENS, breaking, looked, rescaling, small
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.models.gemma import build
from stabilitykit.recorder import record
from stabilitykit.remedies import REMEDIES, LeftOut, Remedy
from stabilitykit.remedies.clamp import CLAMP
from stabilitykit.remedies.float32_islands import keeping_in_float32
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL, float32_residual
from stabilitykit.remedies.original import GemmaOriginal, HuggingFaceOriginal, Original
from stabilitykit.remedies.samples import answer
from stabilitykit.remedies.seen import Seen, look

INPUTS = {"input_ids": TOKENS}


def ours(checkpoint: Checkpoint, tmp_path: Path) -> Original:
    return GemmaOriginal(checkpoint)


def theirs(checkpoint: Checkpoint, tmp_path: Path, attention: str = "eager") -> Original:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(checkpoint, folder, "float32")
    return HuggingFaceOriginal.of(str(folder), attention=attention)


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return answer(model, INPUTS).values


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def islands(seen: Seen, sites: frozenset[str] | None = None) -> Remedy:
    """For what overflows, or for these sites."""
    if sites is not None:
        (some,) = list(seen.overflowing.values())[:1] or list(seen.low)[:1]
        seen = replace(seen, overflowing=dict.fromkeys(sites, some))
    return keeping_in_float32(seen)


@pytest.mark.parametrize("implementation", [ours, theirs])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_remedied_model_is_finite_and_as_before_afterwards(
    tmp_path: Path, generation: int, implementation: Callable[..., Original]
) -> None:
    original = implementation(small(generation, breaking(generation)), tmp_path)
    seen = look(original, original.open(), [INPUTS])
    offers = [offer(seen) for offer in REMEDIES]
    remedies = [one for one in offers if isinstance(one, Remedy)]
    assert [one.name for one in remedies] == ["bfloat16", "clamp", "float32 residual", "float32 islands"]
    models = {dtype: original.open(dtype).module for dtype in ("float16", "bfloat16")}
    assert not run(models["float16"]).isfinite().all()
    for remedy in remedies:
        model = models[remedy.dtype]
        before, plain = hooks(model), run(model)
        with remedy.around(model):
            assert run(model).isfinite().all(), remedy.name
        assert hooks(model) == before
        assert _get_current_dispatch_mode_stack() == []
        assert torch.equal(run(model).nan_to_num(), plain.nan_to_num())
        with pytest.raises(ZeroDivisionError), remedy.around(model):
            raise ZeroDivisionError
        assert hooks(model) == before
        assert _get_current_dispatch_mode_stack() == []


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_scaled_model_is_finite_alone_and_with_a_clamp(generation: int) -> None:
    broken = small(generation, breaking(generation))
    for remedy in (rescaling(broken, 0.25), rescaling(broken, 0.5) + CLAMP):
        model = GemmaOriginal(broken).open("float16", remedy.scaling).module
        with remedy.around(model):
            assert run(model).isfinite().all()


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
    seen = looked(broken)
    found = frozenset(seen.overflowing)
    model = build(broken, dtype="float16")

    def first_break(kept: frozenset[str]) -> str | None:
        remedy = islands(seen, kept)
        with torch.inference_mode(), remedy.around(model), record(model) as recording:
            model(TOKENS)
        broke = recording.first_break()
        return None if broke is None else broke.site

    assert len(found) >= 3
    assert first_break(found) is None
    for site in found:
        assert first_break(found - {site}) == site


def test_islands_are_float32_and_nothing_else() -> None:
    broken = small(3, breaking(3))
    seen = looked(broken)
    found = frozenset(seen.overflowing)
    model = build(broken, dtype="float16")
    with torch.inference_mode(), record(model) as plain:
        model(TOKENS)
    with torch.inference_mode(), islands(seen).around(model), record(model) as recording:
        model(TOKENS)
    before, after = ({r.site: r.dtype for r in run_} for run_ in (plain, recording))
    assert {after[site] for site in found} == {"float32"}
    others = before.keys() & after.keys() - found
    assert {site: after[site] for site in others} == {site: before[site] for site in others}
    assert {"layers.2.mlp.down_proj", "layers.2.input_layernorm", "lm_head"} <= others


@pytest.mark.parametrize("generation", [1, 3])
def test_islands_around_fused_attention(tmp_path: Path, generation: int) -> None:
    """A dry run knows its parts and the kernel is one operator; what it is given may be an island."""
    broken = small(generation, breaking(generation))
    model = theirs(broken, tmp_path, "sdpa").open("float16").module
    seen = looked(broken)
    remedy = islands(seen, frozenset(seen.overflowing) | {f"layers.{n}.self_attn.v_proj" for n in range(3)})
    with torch.inference_mode(), record(model) as recording, remedy.around(model):
        logits = answer(model, INPUTS).values
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
        with islands(looked(small(generation)), frozenset()).around(model):
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
    """The scaling halves the residual stream, and its sums are float32."""
    residual = float32_residual(looked(small(3)))
    assert isinstance(residual, Remedy)
    both = rescaling(small(3), 0.5) + residual
    assert both.name == "scaling + float32 residual"
    assert not both.exportable
    assert both.extra(100) == 100 * 32 * 2

    def residual_sums(remedy: Remedy) -> dict[str, tuple[str, float | None]]:
        model = GemmaOriginal(small(3)).open("float16", remedy.scaling).module
        with torch.inference_mode(), remedy.around(model), record(model) as recording:
            model(TOKENS)
        sites = [f"layers.{index}{ending}" for index in range(3) for ending in ("/add.0", "")]
        return {r.site: (r.dtype, r.amax) for r in recording if r.site in sites}

    found, plain = residual_sums(both), residual_sums(residual)
    assert found.keys() == plain.keys()
    assert len(found) == 6
    for site, (dtype, amax) in found.items():
        assert dtype == "float32"
        assert amax == pytest.approx((plain[site][1] or 0.0) / 2, rel=2.0**-9), site


def test_what_does_not_apply_says_why() -> None:
    """A model without layers in which nothing overflows."""
    seen = replace(looked(small(3)), model=nn.Linear(2, 2))
    told = {one.name: one.why for offer in REMEDIES if isinstance(one := offer(seen), LeftOut)}
    assert told == {
        "clamp": "The model has no list of layers, so nothing says where its residual stream is.",
        "float32 residual": "The model has no list of layers, so nothing says where its residual stream is.",
        "float32 islands": "No tensor overflows float16, so none has to be float32.",
        "scale on queries": "No attention stores scores that overflow before a scale of its own is applied.",
        "routing weights in experts": "No expert's output overflows before its routing weight is applied.",
        "float32 norms": "No norm overflows inside: they square in float32, or what they square is small enough.",
    }

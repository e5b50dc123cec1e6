"""Decoders of other families: no tensor that transformers makes exceeds its bound, and bounds are not far above."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bounds.decoders import (
    DECODERS,
    chosen_states,
    largest_of_prompts,
    largest_of_states,
    opened,
    with_tokenizer,
    written,
)
from safetensors.torch import load_file, save_file

from stabilitykit import bound
from stabilitykit.bounds import bound_sites
from stabilitykit.bounds.families import open_decoder
from stabilitykit.errors import CheckpointError
from stabilitykit.records.bounds import SiteBound

Largest = dict[str, float]


@pytest.fixture(scope="module", params=DECODERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(name, tmp_path_factory.mktemp("decoder"))


def bounds_of(folder: Path, dtype: str) -> dict[str, SiteBound]:
    return {one.site: one for one in bound_sites(open_decoder(folder), dtype)}


def seen_in(folder: Path, dtype: str) -> Largest:
    """What prompts and states make in `dtype`; nothing behind an infinity."""
    states = chosen_states(opened(folder, dtype).float())
    model = opened(folder, dtype)
    made = largest_of_prompts(model)
    if any(value == float("inf") for value in made.values()):
        made = {}
    for site, value in largest_of_states(model, states).items():
        made[site] = max(made.get(site, 0.0), value)
    return made


def exceeding(bounds: dict[str, SiteBound], seen: Largest) -> dict[str, tuple[float, float]]:
    """The sites at which a bound was exceeded: bound and value."""
    known = {site: bounds[site].bound for site in seen if site in bounds}
    return {site: (most, seen[site]) for site, most in known.items() if seen[site] > most}


def test_every_tensor_stored_in_16_bits_has_a_bound_or_a_reason(folder: Path) -> None:
    bounds = bounds_of(folder, "float16")
    model = opened(folder, "float16")
    seen = largest_of_prompts(model)
    inside = ("norm/", "norm_1/", "norm_2/", "softmax", ".experts/", ".experts.", ".router/", "router")
    assert [site for site in seen if site not in bounds and not any(part in site for part in inside)] == []
    reasons = {site for site, one in bounds.items() if one.unbounded}
    assert reasons == {site for site in bounds if site.endswith(".experts")}
    assert all(one.bound < float("inf") for site, one in bounds.items() if site not in reasons)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_prompt_and_no_hidden_state_exceeds_a_bound(folder: Path, dtype: str) -> None:
    assert exceeding(bounds_of(folder, dtype), seen_in(folder, dtype)) == {}


# Bound ÷ largest found, in the layer where it is least.
TIGHT = {
    "_layernorm": 1.01, "q_proj": 1.03, "k_proj": 1.03, "v_proj": 1.03, "gate_proj": 1.03, "up_proj": 1.03,
    "mlp/mul.0": 1.15, "down_proj": 2.8, "o_proj": 3.0, "matmul.0": 3.0, "lm_head": 1.3,
}  # fmt: skip


@pytest.mark.slow
def test_bounds_are_close_to_what_states_make(name: str, folder: Path) -> None:
    bounds, seen = bounds_of(folder, "float32"), seen_in(folder, "float32")
    for kind, factor in TIGHT.items():
        ratios = [one.bound / seen[site] for site, one in bounds.items() if site in seen and site.endswith(kind)]
        assert min(ratios) < factor, (kind, min(ratios))


# A recipe that leaves out one thing, and a tensor that then exceeds its bound.
LEFT_OUT: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"biases": ()}, "layers.1.self_attn.q_proj"),
    ("llama, biases", {"biases": ("q_proj", "k_proj", "v_proj", "o_proj")}, "layers.1.mlp.gate_proj"),
    ("gemma4", {"embedding_scale": None}, "embed_tokens"),
    ("gemma4", {"layer_scalar": False}, "layers.2"),
    ("gemma4", {"added": -0.9}, "layers.1.input_layernorm"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes", "site"), LEFT_OUT)
def test_what_a_recipe_leaves_out_is_found_out(name: str, changes: dict[str, Any], site: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path, spread=0.05, bias=60.0, scalar=8.0)
    decoder = open_decoder(folder)
    model = opened(folder, "float16")
    seen = largest_of_states(model, chosen_states(opened(folder, "float16").float())) | largest_of_prompts(model)
    wrong = {one.site: one for one in bound_sites(replace(decoder, recipe=replace(decoder.recipe, **changes)))}
    assert exceeding({one.site: one for one in bound_sites(decoder)}, seen) == {}
    assert site in exceeding(wrong, seen)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(written("llama", tmp_path_factory.mktemp("llama")))


def changed(folder: Path, to: Path, **keys: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | keys))
    return to


def test_bounds_stand_beside_what_texts_made(llama: Path) -> None:
    found = bound(f"hf:{llama}")
    sites = {one.site: one for one in found.sites}
    observed = [one for one in found.sites if one.observed is not None and "norm/" not in one.site]
    assert len(observed) > 55
    assert all(one.observed <= one.bound for one in observed if one.observed is not None)
    assert all(one.found is None for one in found.sites)
    assert sites["layers.1/add.0"].label == "residual after attention"
    assert found.notes == ()
    assert {one.site: one.bound for one in bound(open_decoder(llama)).sites} == {
        site: one.bound for site, one in sites.items()
    }


def test_without_a_tokenizer_there_are_bounds_alone(llama: Path, tmp_path: Path) -> None:
    bare = changed(llama, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    found = bound(f"hf:{bare}")
    assert all(one.observed is None for one in found.sites)
    assert found.notes[0].startswith("no text was run: ")


@pytest.mark.slow
def test_the_command_says_what_is_bounded_and_what_is_not(
    stabilitykit: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    made = stabilitykit("bound", f"hf:{llama}", "--report", str(tmp_path / "report"))
    assert (made.code, made.err) == (0, "")
    assert "No prompt makes any of this checkpoint's 64 tensors overflow in float16." in " ".join(made.out.split())
    assert "gate · up" in made.out
    assert "rounds_before_gain" in (tmp_path / "report" / "experiment.json").read_text()
    experts = written("gemma4, experts", tmp_path / "experts")
    said = " ".join(stabilitykit("bound", f"hf:{experts}").out.split())
    assert "layers.*.experts is not bounded: no inequality is known for what experts make of a token" in said
    assert "No prompt makes any" not in said


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model_type": "gpt2"}, "no inequality is known for model_type 'gpt2'"),
        ({"model_type": "phi3"}, "not for LayerNorm"),
        ({"hidden_act": "relu2"}, "no inequality is known for the activation 'relu2'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "RoPE of the type 'yarn'"),
        ({"rope_scaling": {"type": "longrope"}}, "RoPE of the type 'longrope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        ({"num_attention_heads": 2}, "layers.0.self_attn.q_proj.weight must be of shape (32, 32)"),
        ({"hidden_size": None}, "config.json does not say how large the model is"),
        (
            {"attention_bias": True},
            "layers.0.self_attn.q_proj.bias must be of shape (64,), by config.json, and is missing",
        ),
    ],
)
def test_what_has_no_inequality_is_refused_by_name(
    llama: Path, tmp_path: Path, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        bound(f"hf:{changed(llama, tmp_path / 'changed', **keys)}")
    assert reason in str(refused.value)


def test_a_missing_weight_is_named(llama: Path, tmp_path: Path) -> None:
    damaged = changed(llama, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight must be .*is missing"):
        bound(f"hf:{damaged}")

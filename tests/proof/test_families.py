"""The checker on Llama and Qwen3: proves what holds, no state exceeds it, and no setting is believed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bounds.decoders import chosen_states, largest_of_prompts, largest_of_states, opened, written
from safetensors.torch import load_file, save_file

from stabilitykit.bounds import bound_sites
from stabilitykit.bounds.families import open_decoder
from stabilitykit.proof.check import LIMIT, check
from stabilitykit.proof.write import write_proof
from stabilitykit.records.bounds import SiteBound

KINDS = {
    "embed_tokens": "embed_tokens", "input_layernorm": "input_layernorm", "q_proj": "q_proj", "k_proj": "k_proj",
    "v_proj": "v_proj", "q_norm": "q_norm", "k_norm": "k_norm", "matmul.0": "scores", "mul.4": "scores",
    "matmul.1": "attention", "o_proj": "o_proj", "post_attention_layernorm": "post_attention_layernorm",
    "gate_proj": "gate_proj", "up_proj": "up_proj", "mlp/mul.0": "gate · up", "down_proj": "down_proj",
    "layers.0": "residual", "layers.1": "residual", "layers.0/add.0": "residual", "layers.1/add.0": "residual",
    "norm": "norm", "lm_head": "lm_head", "act_fn": "gate_proj",
}  # fmt: skip


def kind_of(site: str) -> str | None:
    found = [kind for ending, kind in KINDS.items() if site == ending or site.endswith((f".{ending}", f"/{ending}"))]
    return found[0] if found else KINDS.get("/".join(site.rpartition(".")[2:])) or _product(site)


def _product(site: str) -> str | None:
    return "gate · up" if site.endswith("mlp/mul.0") else None


@pytest.fixture(scope="module", params=["llama", "qwen3", "llama, tied"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float16, as transformers saves it, with a proof of the checker's own bounds."""
    folder = tmp_path_factory.mktemp("proved")
    family, _, tied = name.partition(", ")
    written(family, folder, spread=0.1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    write_proof(folder, {"residual": 1.0})
    write_proof(folder, check(folder).bounds)
    return folder


def test_what_transformers_saves_is_proved(name: str, folder: Path) -> None:
    checked = check(folder)
    assert checked.problems == ()
    assert all(0 < bound <= LIMIT for bound in checked.bounds.values())
    assert {"gate · up", "residual", "lm_head"} < set(checked.bounds)
    assert ("q_norm" in checked.bounds) == (name == "qwen3")
    names = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in names) == ("tied" not in name)


def test_no_state_exceeds_a_bound_and_both_ways_to_bounds_agree(folder: Path) -> None:
    bounds = check(folder).bounds
    model = opened(folder, "float16")
    seen = largest_of_states(model, chosen_states(opened(folder, "float16").float()))
    for site, value in largest_of_prompts(model).items():
        seen[site] = max(seen.get(site, 0.0), value)
    known = {site: kind for site in seen if (kind := kind_of(site)) is not None}
    assert set(known.values()) == set(bounds)
    assert {site: value for site, value in seen.items() if site in known and value > bounds[known[site]]} == {}
    largest: dict[str, SiteBound] = {}
    for one in bound_sites(open_decoder(folder)):
        kind = kind_of(one.site)
        if kind is not None and (kind not in largest or largest[kind].bound < one.bound):
            largest[kind] = one
    for kind, one in largest.items():
        assert one.bound <= bounds[kind] <= 1.7 * one.bound + 2, kind


@pytest.mark.parametrize("weight", ["layers.1.input_layernorm", "layers.0.mlp.up_proj", "norm"])
def test_a_folder_that_can_break_is_not_proved(folder: Path, weight: str, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    weights = load_file(broken / "model.safetensors")
    weights[f"model.{weight}.weight"][3] = 12_000.0
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_proof(broken, {"residual": 1.0})
    problems = check(broken).problems
    assert problems
    assert all(" may reach " in problem for problem in problems)


def copied(folder: Path, to: Path, **keys: Any) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | keys))
    write_proof(to, {"residual": 1.0})
    return to


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"query_pre_attn_scalar": 1e-9}, "query_pre_attn_scalar"),
        ({"final_logit_softcapping": 1e-40}, "final_logit_softcapping"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_settings_are_refused_by_name(folder: Path, tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    (problem,) = check(copied(folder, tmp_path, **keys)).problems
    assert problem.startswith(f"{named} in config.json is ")


def test_windows_are_only_of_those_that_have_them(name: str, folder: Path, tmp_path: Path) -> None:
    problems = check(copied(folder, tmp_path, use_sliding_window=True)).problems
    assert any(problem.startswith("use_sliding_window in config.json is true") for problem in problems)
    assert "must be false" in problems[0] if name == "qwen3" else "must be left out" in problems[0]

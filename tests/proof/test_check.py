"""The checker: proves what holds, refuses what was changed, and no hidden state exceeds what it proves."""

import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from remedied import SPECS, small
from safetensors.numpy import load_file, save_file
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.checkpoints import export as exporting
from stabilitykit.checkpoints.export import write_folder
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma import model as gemma_model
from stabilitykit.proof import check as checking
from stabilitykit.proof.check import LIMIT, check, largest_eigenvalue, spectral_norm
from stabilitykit.proof.write import write_proof

GENERATIONS = list(SPECS)
KINDS = {
    1: set("embed_tokens input_layernorm q_proj k_proj scores v_proj attention o_proj post_attention_layernorm residual"
           " gate_proj up_proj down_proj norm lm_head".split()) | {"gate · up"},
}  # fmt: skip
KINDS[2] = KINDS[1] | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
KINDS[3] = KINDS[2] | {"q_norm", "k_norm"}


def exported(checkpoint: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    write_folder(checkpoint, folder, "float16")
    write_proof(folder, {"residual": 1.0})
    write_proof(folder, check(folder).bounds)
    return folder


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def folder(generation: int, tmp_path: Path) -> Path:
    return exported(small(generation), tmp_path / "gemma")


def test_a_small_gemma_is_proved(generation: int, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checked = check(folder, progress=lambda *done: seen.append(done))
    assert checked.problems == ()
    assert set(checked.bounds) == KINDS[generation]
    assert all(0 < bound <= LIMIT for bound in checked.bounds.values())
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_shards_are_read_by_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = check(exported(small(3), tmp_path / "whole"))
    monkeypatch.setattr(exporting, "_SHARD", 40_000)
    sharded = exported(small(3), tmp_path / "sharded")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert check(sharded) == whole
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("-00001-", "-00002-"))
    write_proof(sharded, whole.bounds)
    assert check(sharded).problems == ("model.safetensors.index.json does not say in which file each tensor is.",)
    index.unlink()
    write_proof(sharded, whole.bounds)
    (problem,) = check(sharded).problems
    assert problem.startswith("model.safetensors.index.json cannot be read")


def change(folder: Path, name: str, value: float, where: Any = 0) -> None:
    weights = {key: tensor.copy() for key, tensor in load_file(folder / "model.safetensors").items()}
    weights[f"model.{name}.weight"][where] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj", "layers.2.input_layernorm"])
def test_one_changed_weight_or_gain_is_noticed(folder: Path, name: str) -> None:
    change(folder, name, 0.0625)
    assert check(folder).problems == (
        "model.safetensors has changed since the proof was written: its SHA-256 does not match.",
    )


def test_a_changed_config_is_noticed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert check(folder).problems == (
        "config.json has changed since the proof was written: its SHA-256 does not match.",
    )


# A weight or gain of this size breaks the tensor named, and with it whatever reads it without a norm in between.
PLANTED = {
    "layers.0.input_layernorm": (12_000.0, {"input_layernorm"}),
    "layers.1.post_attention_layernorm": (60_000.0, {"post_attention_layernorm"}),
    "layers.1.self_attn.q_proj": (12_000.0, {"q_proj"}),
    "layers.1.self_attn.v_proj": (12_000.0, {"v_proj", "attention"}),
    "layers.1.self_attn.o_proj": (40_000.0, {"o_proj"}),
    "layers.2.mlp.gate_proj": (12_000.0, {"gate_proj", "gate · up"}),
    "layers.2.mlp.up_proj": (12_000.0, {"up_proj", "gate · up"}),
    "layers.2.mlp.down_proj": (40_000.0, {"down_proj"}),
    "embed_tokens": (12_000.0, {"embed_tokens", "residual", "lm_head"}),
    "norm": (12_000.0, {"norm"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_folder_that_can_break_is_not_proved_whatever_it_claims(folder: Path, name: str) -> None:
    """All hashes are those of the folder as it is; only the mathematics can tell."""
    value, kinds = PLANTED[name]
    change(folder, name, value)
    write_proof(folder, {"residual": 1.0})
    checked = check(folder)
    assert {kind for kind, bound in checked.bounds.items() if bound > LIMIT} >= kinds
    for kind in kinds:
        assert any(problem.startswith(f"{kind} may reach ") for problem in checked.problems)


NAN, INF = float("nan"), float("inf")
# Of a Gemma 3: what to write into config.json, the key that is named, and what is allowed.
TAMPERED: list[tuple[dict[str, Any], str, str]] = [
    *(
        ({name: value}, name, "must be a number from 1 to 1.1e+12")
        for name in ("rope_theta", "rope_local_base_freq")
        for value in (0, -1e4, 0.5, NAN, INF, 1e-45, "10000", True, None, [1e4], 10**400)
    ),
    *(
        ({"rope_scaling": {"rope_type": "linear", "factor": value}}, "rope_scaling.factor", "must be a number from 1")
        for value in (0, -8.0, 0.5, NAN, INF, "8", True, None)
    ),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "is missing"),
    *(
        ({"rope_scaling": {key: value, "factor": 8.0}}, f"rope_scaling.{key}", 'must be "default" or "linear"')
        for key in ("rope_type", "type")
        for value in ("yarn", "dynamic", "longrope", "llama3", "proportional", "su", "", 1, None)
    ),
    *(
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, key: value}}, f"rope_scaling.{key}", "left out")
        for key, value in (("attention_factor", 2.0), ("partial_rotary_factor", 0.5), ("mscale", 1.0), ("rope_dim", 2))
    ),
    ({"rope_scaling": {"rope_theta": 0}}, "rope_scaling.rope_theta", "must be a number from 1"),
    ({"rope_scaling": [8.0]}, "rope_scaling", "must be an object or null"),
    ({"rope_parameters": 1e4}, "rope_parameters", "must be an object or null"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type", "left out"),
    *(
        ({"rope_parameters": {kind: {"rope_theta": value}}}, f"rope_parameters.{kind}.rope_theta", "must be a number")
        for kind in ("full_attention", "sliding_attention")
        for value in (0, NAN, -INF, "1e4", False)
    ),
    ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
     "rope_parameters.full_attention.rope_type", "must be"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}},
     "rope_parameters.full_attention.factor", "must be a number from 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "left out"),
    ({"text_config": {"rope_theta": 0}}, "text_config", "left out"),
    *(({"sliding_window": value}, "sliding_window", "must be a whole number from 1 to") for value in
      (0, -4, 4.0, NAN, INF, "4", True, None, [4], 2**40)),
    *(({"layer_types": value}, "layer_types", 'must be a list of 3, each "full_attention" or "sliding_attention"')
      for value in ([], ["full_attention"] * 2, ["full_attention"] * 4, ["chunked_attention"] * 3, ["linear_attention",
                    "full_attention", "full_attention"], "full_attention", [None] * 3, {"0": "full_attention"})),
    *(({"sliding_window_pattern": value}, "sliding_window_pattern", "must be a whole number") for value in (0, 1.5)),
    *(
        ({key: value}, key, "must be a number from 0.0009766 to 6.55e+04, or null")
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
        for value in (0, -50.0, 1e-40, NAN, INF, "50", True, [50.0])
    ),
    *(({"rms_norm_eps": value}, "rms_norm_eps", "must be a number from 8.272e-25 to 4.295e+09") for value in
      (0.0, -1e-6, 1e-40, 1e30, NAN, INF, "1e-6", True, None, [1e-6])),
    *(({"query_pre_attn_scalar": value}, "query_pre_attn_scalar", "must be a number from") for value in
      (0, -256, NAN, INF, "256", True, None)),
    *(({"max_position_embeddings": value}, "max_position_embeddings", "must be a whole number") for value in
      (0, -1, 2**30, NAN, "32768", True)),
    ({"attention_dropout": 0.1}, "attention_dropout", "must be 0.0 or 0"),
    ({"dtype": "bfloat16"}, "dtype", 'must be "float16"'),
    ({"torch_dtype": "float32"}, "torch_dtype", 'must be "float16"'),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures", 'each "Gemma3ForCausalLM"'),
    ({"model_type": "gemma4"}, "model_type", "must be one of gemma, gemma2, gemma3_text"),
    ({"model_type": ["gemma"]}, "model_type", "must be one of gemma, gemma2, gemma3_text"),
    ({"hidden_activation": "relu"}, "hidden_activation", 'must be "gelu_pytorch_tanh"'),
    ({"hidden_act": "silu"}, "hidden_act", 'must be "gelu_pytorch_tanh"'),
    ({"attention_bias": True}, "attention_bias", "must be false"),
    ({"attention_bias": 0}, "attention_bias", "must be false"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings", "must be true"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention", "left out"),
    ({"quantization_config": {}}, "quantization_config", "left out"),
    ({"auto_map": {"AutoModel": "a.B"}}, "auto_map", "left out"),
    ({"pad_token_id": "0"}, "pad_token_id", "must be a whole number"),
    ({"eos_token_id": [1, 1.5]}, "eos_token_id", "must be a whole number"),
    *(({"hidden_size": value}, "hidden_size", "must be a whole number from 1 to 8192") for value in
      ("32", True, 32.0, 0, NAN, 2**14)),
]  # fmt: skip


def tampered(folder: Path, changed: dict[str, Any], name: str = "config.json") -> tuple[str, ...]:
    """What is said of a folder whose hashes are those of the changed file."""
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | changed))
    write_proof(folder, {"residual": 1.0})
    problems = check(folder).problems
    (folder / name).write_text(json.dumps(settings))
    return problems


def test_settings_out_of_range_are_refused_by_name(tmp_path: Path) -> None:
    folder = exported(small(3), tmp_path / "gemma")
    for changed, key, allowed in TAMPERED:
        (problem,) = tampered(folder, changed)
        assert problem.startswith(f"{key} in config.json is "), changed
        assert allowed in problem
        assert problem.endswith(".")
        assert "\n" not in problem


@pytest.mark.parametrize("generation", [1, 2])
def test_earlier_generations_know_only_their_own_settings(tmp_path: Path, generation: int) -> None:
    folder = exported(small(generation), tmp_path / "gemma")
    for changed, key in (
        ({"rope_theta": NAN}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * (2 if generation > 1 else 3)}, "layer_types"),
        ({"attn_logit_softcapping": INF}, "attn_logit_softcapping"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ):
        (problem,) = tampered(folder, changed)
        assert problem.startswith(f"{key} in config.json is ")
    assert tampered(folder, {}) == ()


def test_several_settings_out_of_range_are_all_named(tmp_path: Path) -> None:
    problems = tampered(
        exported(small(3), tmp_path / "gemma"), {"rope_theta": 0, "rms_norm_eps": NAN, "new": "x" * 999}
    )
    assert [problem.split(" ")[0] for problem in problems] == ["new", "rms_norm_eps", "rope_theta"]
    assert max(map(len, problems)) < 1000


@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
        {"layer_types": None},
        {"rope_scaling": {"type": "linear", "factor": 8}},
        {"rope_parameters": None},
        {"attn_logit_softcapping": 50.0},
        {"transformers_version": "5.0.0", "use_cache": True, "initializer_range": 0.02},
    ],
)
def test_settings_that_change_no_bound_are_allowed(tmp_path: Path, changed: dict[str, Any]) -> None:
    folder = exported(small(3), tmp_path / "gemma")
    assert tampered(folder, changed) == ()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"intermediate_size": 32},
            "model.layers.0.mlp.gate_proj.weight must be in float16 and of shape (32, 32), by the config.",
        ),
        (
            {"num_hidden_layers": 2, "layer_types": None},
            "The config does not account for model.layers.2.input_layernorm.weight and 12 others.",
        ),
        (
            {"num_attention_heads": 3},
            "head_dim, num_attention_heads and num_key_value_heads in config.json are 16, 3 and 2: the first must be "
            "even, the second a multiple of the third, and the product of the first two at most 8192.",
        ),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, changed: dict[str, Any], problem: str) -> None:
    assert tampered(exported(small(3), tmp_path / "gemma"), changed) == (problem,)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": INF}, "repetition_penalty"),
        ({"custom_generate": "run"}, "custom_generate"),
    ],
)
def test_settings_of_generation_are_examined_too(tmp_path: Path, changed: dict[str, Any], key: str) -> None:
    (problem,) = tampered(exported(small(3), tmp_path / "gemma"), changed, "generation_config.json")
    assert problem.startswith(f"{key} in generation_config.json is ")


def test_every_file_that_decides_what_runs_is_hashed(folder: Path) -> None:
    hashed = set(json.loads((folder / "proof.json").read_text())["sha256"])
    written = {path.name for path in folder.iterdir()} - {"proof.json"}
    assert hashed == written >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    for name in sorted(written - {"model.safetensors", "config.json"}):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept.replace(b"\n", b"\n ", 1) if name.endswith("json") else kept + b"\0")
        assert check(folder).problems == (
            f"{name} has changed since the proof was written: its SHA-256 does not match.",
        )
        (folder / name).unlink()
        assert check(folder).problems == (f"proof.json has a SHA-256 of {name}, which the folder lacks.",)
        (folder / name).write_bytes(kept)
    (folder / "additional_chat_templates").mkdir()
    for name in ("special_tokens_map.json", "additional_chat_templates/tool.jinja"):
        (folder / name).write_text("{}")
        assert check(folder).problems == (f"{name} is in the folder, and proof.json has no SHA-256 of it.",)
        (folder / name).unlink()


def test_what_decides_nothing_may_change(folder: Path) -> None:
    (folder / ".cache").mkdir()
    for name in ("README.md", "repair.json", ".gitattributes", ".cache/lock"):
        (folder / name).write_text("anything")
    assert check(folder).problems == ()


@pytest.mark.parametrize("name", ["adapter_config.json", "modeling_gemma.py", "custom_generate/generate.py"])
def test_what_would_change_the_model_must_not_be_there(tmp_path: Path, name: str) -> None:
    folder = exported(small(3), tmp_path / "gemma")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    write_proof(folder, {"residual": 1.0})
    assert check(folder).problems == (f"{name} would change the model, and must not be in the folder.",)


def test_assumptions_are_sentences(folder: Path) -> None:
    assumed = check(folder).assumptions
    assert len(assumed) > 5
    assert all(one[0].isupper() and one.endswith(".") for one in assumed)
    assert any("float32" in one for one in assumed)
    assert any("padding" in one for one in assumed)


def test_a_small_query_scale_counts(tmp_path: Path) -> None:
    """Scores are scaled after q · k, or q before it: a scale above 1 makes both larger."""
    folder = exported(small(2), tmp_path / "gemma")
    before = check(folder).bounds
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 2.0**-16}))
    write_proof(folder, before)
    after = check(folder)
    assert after.bounds["q_proj"] - 1 == pytest.approx(256 * (before["q_proj"] - 1))
    assert after.bounds["scores"] > 100 * before["scores"]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], *, sign: bool) -> None:
    proof = json.loads((folder / "proof.json").read_text())
    change(proof)
    if sign:
        rest = {key: value for key, value in proof.items() if key != "digest"}
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        proof["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "proof.json").write_text(json.dumps(proof))


@pytest.mark.parametrize(
    ("change", "sign", "problem"),
    [
        (lambda proof: proof["bounds"].update(residual=2.0), False, "its digest does not match"),
        (lambda proof: proof["bounds"].update(residual=65_505.0), True, "claims 65505.0 for residual"),
        (lambda proof: proof["bounds"].update(residual=float("nan")), True, "claims nan for residual"),
        (lambda proof: proof["bounds"].update(residual="small"), True, "claims small for residual"),
        (lambda proof: proof.update(bounds={}), True, "must have schema 1"),
        (lambda proof: proof.update(schema=2), True, "must have schema 1"),
        (lambda proof: proof.update(limit=1e9), True, "must have schema 1"),
        (lambda proof: proof["sha256"].pop("config.json"), True, "config.json is in the folder, and proof.json has no"),
        (lambda proof: proof["sha256"].update(a="b"), True, "proof.json has a SHA-256 of a, which the folder lacks"),
        (lambda proof: proof["sha256"].update({"config.json": None}), True, "config.json has changed"),
    ],
)
def test_a_changed_proof_is_noticed(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], sign: bool, problem: str
) -> None:
    folder = exported(small(3), tmp_path / "gemma")
    rewrite(folder, change, sign=sign)
    (found,) = check(folder).problems
    assert problem in found


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    assert [problem.split(" cannot be read")[0] for problem in check(tmp_path / "nowhere").problems] == [
        "proof.json",
        "config.json",
    ]
    folder = exported(small(3), tmp_path / "gemma")
    weights = (folder / "model.safetensors").read_bytes()
    for name, content, problem in (
        ("model.safetensors", weights[:5000], "model.safetensors cannot be read"),
        ("model.safetensors", b"", "model.safetensors cannot be read"),
        ("config.json", b"[]", "config.json must hold a JSON object"),
        ("config.json", b"\xff{", "config.json cannot be read"),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        write_proof(folder, {"residual": 1.0})
        (found,) = check(folder).problems
        assert found.startswith(problem)
        assert found.endswith(".")
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize("value", [INF, NAN])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    folder = exported(small(3), tmp_path / "gemma")
    change(folder, "layers.1.mlp.gate_proj", value, (3, 3))
    write_proof(folder, {"residual": 1.0})
    assert check(folder).problems == ("model.layers.1.mlp.gate_proj.weight holds weights that are not finite.",)


# What float16 modules return, for hidden states that are drawn and ones that are chosen to make a tensor large.


def hidden_states(folder: Path, layer: int, generation: int) -> Tensor:
    """[64, 64, E] in float16: normal, heavy-tailed and sparse ones, huge and tiny; toward rows of matrices."""
    generator = torch.Generator().manual_seed(layer)
    weights = {name: torch.from_numpy(tensor).double() for name, tensor in load_file(
        folder / "model.safetensors").items()}  # fmt: skip
    prefix = f"model.layers.{layer}."

    def matrix(name: str) -> Tensor:
        return weights[f"{prefix}{name}.weight"]

    gain = 1 + matrix("input_layernorm")
    before_mlp = 1 + matrix("pre_feedforward_layernorm" if generation > 1 else "post_attention_layernorm")
    a, b, w = matrix("mlp.gate_proj") * before_mlp, matrix("mlp.up_proj") * before_mlp, matrix("mlp.down_proj")
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (a, b)]
    toward = [torch.eye(32), *(matrix(f"self_attn.{name}_proj") * gain for name in "qkv"), a, b, unit[0] + unit[1],
              unit[0] - unit[1]]  # fmt: skip
    for row in torch.cat([w, -w]):  # gradient ascent on one channel of down_proj
        n = torch.randn(4, 32, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(30):
            n = (n / n.norm(dim=1, keepdim=True) * 32**0.5).detach().requires_grad_()
            out = (torch.nn.functional.gelu(n @ a.T, approximate="tanh") * (n @ b.T)) @ row
            (step,) = torch.autograd.grad(out.sum(), n)
            n = n + 3 * step / step.norm(dim=1, keepdim=True).clamp_min(1e-9)
        toward.append(n.detach())
    chosen = torch.cat([rows / rows.norm(dim=1, keepdim=True) for rows in toward])
    chosen = torch.cat([chosen, -chosen]) * 100
    drawn = torch.randn(4096 - len(chosen), 32, generator=generator, dtype=torch.float64)
    drawn[::3] = drawn[::3] ** 9
    drawn[1::3] *= torch.rand(drawn[1::3].shape, generator=generator) < 0.1
    drawn *= torch.logspace(-6, 3, len(drawn), dtype=torch.float64)[:, None]
    return torch.cat([chosen, drawn]).clamp(-60_000, 60_000).half().view(64, 64, 32)


def largest_seen(folder: Path, generation: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The largest magnitude of each kind of tensor that layers fed with hidden states, and the head, return."""
    seen: dict[str, float] = {}

    def note(kind: str, tensor: Tensor) -> None:
        assert tensor.isfinite().all()
        seen[kind] = max(seen.get(kind, 0.0), float(tensor.abs().max()))

    model = build(open_checkpoint(folder), dtype="float16")
    capped = gemma_model.soft_cap

    def soft_cap(x: Tensor, cap: float | None) -> Tensor:
        if x.ndim == 4:  # scores, already scaled; 2 in 1000 for the rounding of that
            note("scores", x / model.layers[0].self_attn.scale * 0.998)
        return capped(x, cap)

    def name_hook(kind: str) -> Callable[..., None]:
        return lambda module, arguments, output: note(kind, output)

    def input_hook(kind: str) -> Callable[..., None]:
        return lambda module, arguments: note(kind, arguments[0])

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(gemma_model, "soft_cap", soft_cap)
        for name, module in model.named_modules():
            kind = name.rpartition(".")[2]
            if kind.endswith(("_proj", "norm", "lm_head", "embed_tokens")):
                module.register_forward_hook(name_hook(kind))
            if kind == "down_proj":
                module.register_forward_pre_hook(input_hook("gate · up"))
            if kind == "o_proj":
                module.register_forward_pre_hook(input_hook("attention"))
        # residual sums are of the model's own states, one layer after the other; other states do not arise there
        stream = model.embed_tokens(torch.arange(512).view(8, 64))
        for index, layer in enumerate(model.layers):
            is_global = model.config.is_global(index)
            run = {
                "rope": model.rotary_emb(is_global, 0, 64, dtype=torch.float16, device=stream.device),
                "mask": model._mask(is_global, 1, 0, 64, None).whole(),
                "cache": None,
            }
            with torch.enable_grad():
                states = hidden_states(folder, index, generation)
            layer(states, **run)
            pre_norm = layer.pre_feedforward_layernorm if generation > 1 else layer.post_attention_layernorm
            layer.mlp(pre_norm(states))
            stream = layer(stream, **run)
            note("residual", stream)
        model.lm_head(model.norm(torch.cat([states, model.embed_tokens.weight.view(8, 64, 32) * 1000])))
    return seen


def exceeding(folder: Path, seen: dict[str, float]) -> set[str]:
    bounds = check(folder).bounds
    assert set(seen) == set(bounds)
    return {kind for kind, value in seen.items() if value > bounds[kind]}


@pytest.fixture(scope="module", params=GENERATIONS)
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder with tensors so large that the absolute part of a bound is small beside them, and what was seen in it.

    In each layer one channel of down_proj reads one other alone, so that its screen is exact.
    """
    folder = exported(small(request.param), tmp_path_factory.mktemp("seen") / "gemma")
    weights = {name: tensor.copy() for name, tensor in load_file(folder / "model.safetensors").items()}
    before_mlp = "pre_feedforward_layernorm" if request.param > 1 else "post_attention_layernorm"
    for name, tensor in weights.items():
        if before_mlp in name or "input_layernorm" in name:
            tensor[:] = 8 * (1 + tensor) - 1
        if "down_proj" in name:
            tensor[0] = 0
            tensor[0, 5] = 24 * np.abs(tensor).max()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        return folder, largest_seen(folder, request.param, patch)


def unscreened(a: Any, b: Any, w: Any) -> Any:
    return np.full((2, len(w)), np.inf)


@pytest.mark.slow
def test_no_hidden_state_exceeds_a_bound(
    observed: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exceeding(*observed) == set()
    monkeypatch.setattr(checking, "screen", unscreened)
    assert exceeding(*observed) == set()  # by Cholesky alone
    assert check(observed[0]).rows == 2 * 3 * 32


@pytest.mark.parametrize(
    ("inequality", "kinds"),
    [
        ("norms", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}),
        ("SLACK", {"input_layernorm", "v_proj", "gate · up", "down_proj"}),
        ("screen", {"down_proj"}),
        ("eigenvalue", {"down_proj"}),
    ],
)
def test_half_a_bound_is_exceeded(
    observed: tuple[Path, dict[str, float]], inequality: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above can fail."""
    if inequality == "eigenvalue":
        monkeypatch.setattr(checking, "screen", unscreened)
    right = getattr(checking, inequality)
    halved = right / 2 if isinstance(right, float) else lambda *arguments: right(*arguments) / 2
    monkeypatch.setattr(checking, inequality, halved)
    assert exceeding(*observed) >= kinds


def test_eigenvalues_are_bounded_from_above() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        for rank in (1, 3, 50):
            rows = random.standard_normal((rank, size)) * random.standard_normal((rank, 1)) ** 5
            exact = float(np.linalg.eigvalsh(rows.T @ rows)[-1])
            assert 1 - 1e-12 <= largest_eigenvalue(rows.T @ rows) / exact <= 1.1
            assert 1 - 1e-12 <= spectral_norm(rows) / exact**0.5 <= 1.05
    assert largest_eigenvalue(np.zeros((3, 3))) == 0
    # two equal eigenvalues, and one that the guess starts without
    assert 9 <= largest_eigenvalue(np.diag([9.0, 9.0, 1.0])) <= 10
    assert 3 <= largest_eigenvalue(np.array([[2.5, 0, 0], [0, 2, 1], [0, 1, 2]])) <= 5


def test_a_channel_is_bounded_by_its_eigenvalue_and_by_the_screen() -> None:
    random = np.random.default_rng(1)
    a, b, w = random.standard_normal((24, 8)), random.standard_normal((24, 8)) * 3, random.standard_normal((5, 24))
    n = random.standard_normal((20_000, 8))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    positive = np.maximum(n @ a.T, 0) * (n @ b.T)
    assert np.allclose(checking.screen(a, b, w, block=10), checking.screen(a, b, w))
    s = checking.balance(a, b)
    c = (s * a + np.sign(w[0])[:, None] * b / s) / 2
    frobenius = np.linalg.norm((c * np.abs(w[0])[:, None]).T @ c)
    assert checking.screen(a, b, w)[0, 0] == pytest.approx(frobenius)
    for sign, screened in zip((1, -1), checking.screen(a, b, w, block=10), strict=True):
        for row in range(5):
            reached = float((positive @ (sign * w[row])).max())
            first = checking.eigenvalue(a, b, sign * w[row], 1e9)
            assert reached <= checking.eigenvalue(a, b, sign * w[row], 0.0) <= first <= 1.02 * screened[row]


def test_nothing_but_numpy_and_safetensors_is_imported() -> None:
    path = Path(checking.__file__)
    parts = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or "."] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert parts - set(sys.stdlib_module_names) == {"numpy", "safetensors"}
    code = "import sys, stabilitykit.proof.check; print(*[name for name in sys.modules if name[:5] in 'stabi torch'])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(loaded) == ["stabilitykit", "stabilitykit.proof", "stabilitykit.proof.check"]


def test_the_command_prints_bounds_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(small(3), tmp_path / "gemma")
    assert checking.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\ndown_proj " in shown
    assert shown.endswith("Proved: no prompt makes any tensor overflow float16.\n")
    change(folder, "norm", 60_000.0)
    assert checking.main([str(folder)]) == 1
    first, second, third = capsys.readouterr().out.splitlines()[-3:]
    assert first.startswith("model.safetensors has changed")
    assert second.startswith("norm may reach ")
    assert third.startswith("lm_head may reach ")
    assert third.endswith(", above the float16 maximum, 65,504, in the head.")
    assert checking.main([]) == 2

"""LoRA adapters scaled with their base: together they compute, bit for bit in float32, what they did."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import family_model
from rescaled import exact_scaling
from safetensors.torch import load_file, save_file
from torch import Tensor

from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.transformers.plain import load_plain
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies.adapter import write_scaled_adapter
from stabilitykit.remedies.folder import write_scaled

# of peft, whose own code asks transformers for what it renamed
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

IDS = torch.tensor([[3, 7, 9, 30, 31, 2]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, whose projections have biases, and beside it the same one scaled, in float32."""
    folder = tmp_path_factory.mktemp("base")
    model = family_model("qwen2")
    model.save_pretrained(folder / "original")
    (folder / "scaled").mkdir()
    write_scaled(folder / "original", exact_scaling(model), folder / "scaled", "float32")
    return folder


def adapter(source: Path, folder: Path, **settings: Any) -> Path:
    """Trained, to all appearances: every number of it is random."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(load_plain(source, torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return folder


def logits(source: Path, with_adapter: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(load_plain(source, torch.float32), with_adapter)
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ALL},
        {"target_modules": [*ALL, "embed_tokens"], "use_rslora": True},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["v_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["all", "embedding", "biases", "lora bias", "dora", "dora embedding", "new tokens"],
)
def test_base_and_adapter_compute_what_they_did(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    original, scaled = base / "original", base / "scaled"
    made, out = adapter(original, tmp_path / "adapter", **settings), tmp_path / "out"
    out.mkdir()
    changed = write_scaled_adapter(made, original, exact_scaling(family_model("qwen2")), out, base=str(scaled))
    assert changed
    before, after = (
        json.loads((made / "adapter_config.json").read_text()),
        json.loads((out / "adapter_config.json").read_text()),
    )
    assert after == before | {"base_model_name_or_path": str(scaled)}
    assert (out / "README.md").read_bytes() == (made / "README.md").read_bytes()
    wanted = logits(original, made)
    assert torch.equal(logits(scaled, out), wanted)
    assert not torch.equal(logits(scaled, made), wanted)
    assert not torch.equal(load_plain(original, torch.float32)(IDS).logits, wanted)


def test_weights_that_are_kept_the_other_way_round_are_followed(tmp_path: Path) -> None:
    """GPT-2 keeps [in, out]: its v columns against the rows of the projection that reads them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 120, "n_positions": 64}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "a")
    made: dict[str, Factor] = {}
    for layer in range(2):
        attention = f"transformer.h.{layer}.attn"
        made[f"{attention}.c_attn.weight"] = Factor(exponents=(1, -1, 3), ends={1: (32, 64, 96)})
        made[f"{attention}.c_attn.bias"] = Factor(exponents=(1, -1, 3), ends={0: (32, 64, 96)})
        made[f"{attention}.c_proj.weight"] = Factor(exponents=(-3,))
    scaling = Scaling(parameters=made)
    for name in ("scaled", "out"):
        (tmp_path / name).mkdir()
    write_scaled(tmp_path / "a", scaling, tmp_path / "scaled", "float32")
    lora = adapter(tmp_path / "a", tmp_path / "lora", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    write_scaled_adapter(lora, tmp_path / "a", scaling, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "scaled", tmp_path / "out"), logits(tmp_path / "a", lora))


def test_numbers_that_their_dtype_cannot_hold_scaled_become_float32(base: Path, tmp_path: Path) -> None:
    made = adapter(base / "original", tmp_path / "lora", target_modules=["q_proj"])
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors = {key: one.half() for key, one in load_file(made / "adapter_model.safetensors").items()}
    tensors[name][0, 0] = 60_000
    save_file(tensors, made / "adapter_model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    write_scaled_adapter(made, base / "original", exact_scaling(family_model("qwen2")), out)
    written = load_file(out / "adapter_model.safetensors")
    assert written[name][0, 0] == 120_000
    assert {key for key, one in written.items() if one.dtype == torch.float32} == {name}


def test_what_cannot_follow_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    original = base / "original"
    made = adapter(original, tmp_path / "lora", target_modules=["q_proj"], use_dora=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    blocks = Factor(exponents=(1, 0, 0, 0), ends={0: (10, 64), 1: (10, 32)})
    columns = Factor(exponents=(1, 0), ends={1: (10, 32)})
    for factor, told in ((blocks, "not the product of one by rows and one by columns"), (columns, "scaled by columns")):
        with pytest.raises(CheckpointError, match=told):
            write_scaled_adapter(made, original, Scaling(parameters={name: factor}), tmp_path)
    config = json.loads((made / "adapter_config.json").read_text())
    for key, told in (("target_parameters", "LoRA with target_parameters"), ("use_qalora", "LoRA with use_qalora")):
        (made / "adapter_config.json").write_text(json.dumps(config | {key: ["x"]}))
        with pytest.raises(CheckpointError, match=told):
            write_scaled_adapter(made, original, Scaling(), tmp_path)
    (made / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    with pytest.raises(CheckpointError, match="an adapter of the kind LOHA; only LoRA is scaled"):
        write_scaled_adapter(made, original, Scaling(), tmp_path)
    (made / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(made / "adapter_model.safetensors")
    save_file({"base_model.model.other.lora_A.weight": torch.ones(2, 2)}, made / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"belongs to other.weight, which the base model does not have"):
        write_scaled_adapter(made, original, Scaling(), tmp_path)
    save_file({"base_model.model.model.norm.lora_new": torch.ones(2)} | tensors, made / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"How base_model.model.model.norm.lora_new follows a scaling"):
        write_scaled_adapter(made, original, Scaling(), tmp_path)
    with pytest.raises(MisuseError, match=r"has no adapter_config.json that can be read"):
        write_scaled_adapter(original, original, Scaling(), tmp_path)

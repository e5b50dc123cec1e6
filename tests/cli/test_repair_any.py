"""`repair hf:FOLDER` on small models of many families: written, loaded by plain transformers, verified; or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from folders import save
from safetensors.torch import save_file
from scaled.runs import noise
from scaled.table import ENTRIES

from stabilitykit.records.document import from_document
from stabilitykit.records.remedies import Ranking

Run = Callable[..., Any]

# Of the table of families, those with an exact repair.
EXACT = ("Llama", "Qwen3", "Gemma 4", "Gemma 4 MoE", "T5 gated gelu", "Mamba", "GPT-2")


def folder_of(name: str, place: Path) -> Path:
    return save(ENTRIES[name].model(), place / name.replace(" ", "_"))


def ranking_of(out: str) -> Ranking:
    document = json.loads(out)
    return from_document(Ranking, {key: value for key, value in document.items() if key not in ("out", "report")})


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=dtype).eval()


def test_a_llama_is_repaired_without_a_ranking(stabilitykit: Run, tmp_path: Path) -> None:
    folder, out = folder_of("Llama", tmp_path), tmp_path / "out"
    made = stabilitykit("repair", f"hf:{folder}", "--no-ranking", "--out", str(out))
    assert (made.code, made.err) == (0, "")
    assert "of 21 parameters by powers of two, the residual stream by 2^-" in " ".join(made.out.split())
    ids = torch.randint(4, 110, (1, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        assert not loaded(folder, torch.float16)(ids).logits.isfinite().all()
        assert loaded(out, torch.float16)(ids).logits.isfinite().all()


@pytest.mark.table
@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_repaired_ranked_and_verified(stabilitykit: Run, tmp_path: Path, name: str) -> None:
    folder, out = folder_of(name, tmp_path), tmp_path / "out"
    margin = str(min(1.0, ENTRIES[name].margin))
    options = ("--ranking-tokens", "150", "--margin", margin)
    made = stabilitykit("repair", f"hf:{folder}", "--out", str(out), *options, "--json")
    assert made.code == 0, made.err or made.out
    found = ranking_of(made.out)
    assert found.repaired is not None
    assert found.repaired.finite
    assert found.peak > 65504 > found.scaled_peak
    assert found.change.approximate is None
    assert not found["float16"].finite or name.startswith("T5")  # which transformers clamps
    assert found.repaired.kl_mean is not None
    assert found.repaired.kl_mean < (found["bfloat16"].kl_mean or 0.0)
    verified = stabilitykit("verify", str(out), "--json")
    assert verified.code == 0, verified.out
    assert json.loads(verified.out)["original_seen"]


@pytest.mark.slow
def test_a_vision_model_is_repaired_on_images_that_it_is_given(stabilitykit: Run, tmp_path: Path) -> None:
    folder = save(ENTRIES["ViT"].model(), tmp_path / "vit", tokenizer=False)
    refused = stabilitykit("repair", f"hf:{folder}")
    assert refused.code == 2
    assert "reads pixel_values, and no text" in refused.err
    assert "--inputs FILE" in refused.err
    given = []
    for seed in (3, 8):
        save_file({"pixel_values": noise(2, 3, 32, 32, seed=seed)}, tmp_path / f"{seed}.safetensors")
        given += ["--inputs", str(tmp_path / f"{seed}.safetensors")]
    out = tmp_path / "out"
    made = stabilitykit("repair", f"hf:{folder}", *given, "--out", str(out), "--json")
    assert made.code == 0, made.err or made.out
    found = ranking_of(made.out)
    assert found["scaling"].finite
    assert found["scaling"].positions == 2
    assert not found["float16"].finite
    assert stabilitykit("verify", str(out)).code == 0
    save_file({"pixels": noise(1, 3, 32, 32)}, tmp_path / "wrong.safetensors")
    refused = stabilitykit("repair", f"hf:{folder}", "--inputs", str(tmp_path / "wrong.safetensors"))
    assert refused.code == 2
    assert "cannot be called with pixels" in refused.err


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "said", "cure"),
    [
        ("Gemma 3n", "it is clamped at 1e-05", "approximate scaling"),
        ("OPT", "which no setting", "approximate scaling"),
        (
            "Gemma 4 with per-layer inputs",
            "gelu is not homogeneous",
            "bfloat16",
        ),  # on these texts its operand is 68,121
        ("BERT", "follows layer_norm_eps", "approximate scaling"),
        ("scores before a constant", "softmax is not homogeneous", "scale on queries"),
    ],
)
def test_what_stands_in_the_way_is_said_and_what_cures_it_is_ranked(
    stabilitykit: Run, tmp_path: Path, name: str, said: str, cure: str
) -> None:
    folder, out = folder_of(name, tmp_path), tmp_path / "out"
    options = ("--ranking-tokens", "150", "--margin", "0")
    made = stabilitykit("repair", f"hf:{folder}", "--out", str(out), *options, "--json")
    assert made.code == 1, made.err
    assert not out.exists()
    found = ranking_of(made.out)
    assert said in " ".join(found.obstacles)
    assert found[cure].finite


@pytest.mark.slow
def test_an_approximate_repair_is_written_where_it_is_asked_for(stabilitykit: Run, tmp_path: Path) -> None:
    folder, out = folder_of("OPT", tmp_path), tmp_path / "out"
    options = ("--no-ranking", "--margin", "0", "--approximate", "--out", str(out))
    made = stabilitykit("repair", f"hf:{folder}", *options)
    assert made.code == 0, made.err or made.out
    assert "It is approximate: what float32 returns changes by up to" in " ".join(made.out.split())
    ids = torch.randint(4, 110, (1, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        before, after = (loaded(one, torch.float32)(ids).logits for one in (folder, out))
        assert loaded(out, torch.float16)(ids).logits.isfinite().all()
    assert 0 < float((before - after).abs().max() / before.abs().max()) < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_scaled_with_its_base(stabilitykit: Run, tmp_path: Path) -> None:
    folder, own, out = folder_of("Llama", tmp_path), tmp_path / "adapter", tmp_path / "out"
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets)
    peft.get_peft_model(loaded(folder, torch.float32), config).save_pretrained(str(own))
    options = ("--adapter", str(own), "--no-ranking", "--dtype", "float32", "--out", str(out))
    made = stabilitykit("repair", f"hf:{folder}", *options)
    assert made.code == 0, made.err or made.out
    ids = torch.randint(4, 110, (1, 40), generator=torch.Generator().manual_seed(7))
    found = {}
    with torch.inference_mode():
        for name, base, adapter in (("before", folder, own), ("after", out, out / "adapter")):
            found[name] = peft.PeftModel.from_pretrained(loaded(base, torch.float32), adapter)(ids).logits
        halved = peft.PeftModel.from_pretrained(loaded(out, torch.float16), out / "adapter")(ids).logits
    assert torch.equal(found["before"], found["after"])
    assert halved.isfinite().all()


@pytest.mark.slow
def test_an_experts_output_has_a_remedy_of_its_own(stabilitykit: Run, tmp_path: Path) -> None:
    folder = folder_of("expert before its weight", tmp_path)
    made = stabilitykit("repair", f"hf:{folder}", "--ranking-tokens", "150", "--json")
    assert made.code == 0, made.err or made.out
    found = ranking_of(made.out)
    assert not found["float16"].finite
    for cure in ("scaling", "routing weights in experts", "float32 islands"):
        assert found[cure].finite, cure

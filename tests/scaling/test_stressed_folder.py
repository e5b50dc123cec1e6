"""Models of transformers under stress: float32 keeps every bit, float16 breaks, and what is not exact is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import family_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from written import write_tokenizer

from stabilitykit import forecast, open_model, profile
from stabilitykit.errors import MisuseError
from stabilitykit.models import transformers as hf
from stabilitykit.scaling.stressed import StressedFolder, _scaling

TOKENS = torch.randint(4, 500, (2, 21), generator=torch.Generator().manual_seed(0))
BREAKING = 2.0**15  # with the lively weights below
Run = Callable[..., Any]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=512, bos_token_id=2, eos_token_id=1
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def mixture() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(family_model, name) for name in ("llama", "qwen3", "gemma4")},
    "gpt2": gpt2,
    "mixture of experts": mixture,
}


def written(model: Any, folder: Path) -> Path:
    """Weights of a size that is usual, so that each matters; in float32, all of whose bits are used."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 8 if weight.ndim > 1 else 1.1
            if "norm" in name:
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 8
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else written(MODELS[name](), root / name)

    return folder


def logits(model: Any) -> Tensor:
    """Of a prompt, and of single tokens: sums of one row are made by other instructions than those of many."""
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits.flatten() for ids in (TOKENS, TOKENS[:1, :1], TOKENS[1:, 1:2])])


@pytest.mark.parametrize("name", MODELS)
def test_float32_keeps_every_bit_and_float16_breaks(folders: Callable[[str], Path], name: str) -> None:
    folder = str(folders(name))
    stressed = StressedFolder.of(folder, BREAKING)
    plain = hf.open_model(folder)
    wide = stressed.open()
    assert torch.equal(logits(wide.module), logits(plain.module))
    embedding = plain.causal.get_input_embeddings().weight
    assert torch.equal(wide.causal.get_input_embeddings().weight, embedding * BREAKING)
    assert logits(hf.open_model(folder, dtype="float16").module).isfinite().all()
    assert not logits(stressed.open("float16").module).isfinite().all()
    assert wide.notes == (*plain.notes, "scaled by 2^15")
    assert wide.facts == plain.facts | {"rescale": BREAKING}


def test_weights_lie_where_they_lay(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Where numbers begin in memory decides how a single row's sums are made, and in a file the header decides that."""
    folder = shutil.copytree(folders("llama"), tmp_path / "llama")
    tensors, places = load_file(folder / "model.safetensors"), set()
    for padding in range(4):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "padding": "-" * 8 * padding})
        plain = hf.open_model(str(folder))
        places |= {weight.data_ptr() % 16 for weight in plain.causal.parameters()}
        assert torch.equal(logits(StressedFolder.of(str(folder), 2.0).open().module), logits(plain.module))
    assert len(places) > 1


def gemma3(gains: float, folder: Path) -> Path:
    model = family_model("gemma3")
    for name, weight in model.named_parameters():
        weight.data *= 8
        if "norm" in name:
            weight.data += gains * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_gains_that_float32_rounds_are_counted(tmp_path: Path) -> None:
    """Of one that is 2^e no bit is lost. The final norm's are divided, and lose what 1 has no place for beside it."""
    exact, other = gemma3(0.0, tmp_path / "exact"), gemma3(0.1, tmp_path / "other")
    plain, wide = hf.open_model(str(exact)), StressedFolder.of(str(exact), BREAKING).open()
    assert wide.notes[-1] == "scaled by 2^15"
    assert torch.equal(logits(wide.module), logits(plain.module))

    plain, wide = hf.open_model(str(other)), StressedFolder.of(str(other), BREAKING).open()
    assert wide.notes[-1] == "scaled by 2^15, 32 gains 1 + w rounded in float32"
    assert not torch.equal(logits(wide.module), logits(plain.module))
    assert torch.allclose(logits(wide.module), logits(plain.module), rtol=0.01, atol=0.01)


def test_weights_and_settings_are_scaled_before_they_are_rounded(folders: Callable[[str], Path]) -> None:
    """float16 subnormals round once. The folder's own model stays as it is."""
    folder = str(folders("llama"))
    stressed = StressedFolder.of(folder, 2.0**-15)
    wide, low = stressed.wide.causal, stressed.open("float16").causal
    expected = (wide.get_input_embeddings().weight * 2.0**-15).half()
    assert torch.equal(low.get_input_embeddings().weight, expected)
    assert not torch.equal(expected, wide.get_input_embeddings().weight.half() * 2.0**-15)
    assert low.config.rms_norm_eps == wide.config.rms_norm_eps * 2.0**-30
    weights = dict(stressed.tensors())
    assert weights.keys() == dict(wide.named_parameters()).keys()
    assert torch.equal(weights["model.embed_tokens.weight"].half(), expected)
    assert torch.equal(wide.get_input_embeddings().weight, hf.open_model(folder).causal.get_input_embeddings().weight)


def test_an_adapter_is_scaled_with_its_base(folders: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, adapter = str(folders("llama")), str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of making one, which the kit does not
        config = peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
        peft.get_peft_model(hf.open_model(folder).module, config).save_pretrained(adapter)
    stressed = StressedFolder.of(folder, BREAKING, adapter=adapter)
    assert torch.equal(logits(stressed.open().module), logits(hf.open_model(folder, adapter=adapter).module))
    assert any("lora" in name for name in stressed.scaling.parameters)


def test_where_nothing_is_exact_the_obstacle_is_named(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    folder = written(transformers.OPTForCausalLM(config), tmp_path / "opt")
    with pytest.raises(MisuseError, match=r"No exact scaling .* 1e-05 is added to it, which no setting of the config"):
        open_model(f"hf:{folder}", rescale=2.0)


def test_what_cannot_be_scaled_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(folders("llama"))
    with pytest.raises(MisuseError, match="leave out --stream"):
        open_model(f"hf:{folder}", rescale=2.0, stream=True)
    for gamma in (3.0, 0.0, 2.0**25):
        with pytest.raises(MisuseError, match=r"power of two from 2\^-24 to 2\^24"):
            StressedFolder.of(folder, gamma)
    low = hf.open_model(folder, dtype="bfloat16")
    low.causal.tower = nn.Linear(2, 2)  # what other inputs would need
    assert _scaling(low, 2.0)
    low.causal.model.layers[0].expert = nn.Linear(2, 2)  # what other tokens might
    with pytest.raises(MisuseError, match=r"2 parameters took no part .*layers\.0\.expert\.weight"):
        _scaling(low, 2.0)
    low.causal.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(MisuseError, match=r"those of hf:.* are quantised"):
        _scaling(low, 2.0)


def test_profile_and_forecast_tell_what_became_of_it(folders: Callable[[str], Path]) -> None:
    folder = f"hf:{folders('qwen3')}"
    found = profile(folder, "Hello", dtypes=["float16", "float32"], rescale=2.0**20)
    first = found["float16"].first_break()
    assert first is not None
    assert found["float32"].first_break() is None
    assert found["float16"].header.case["rescale"] == 2.0**20
    assert "scaled by 2^20" in found["float32"].header.notes
    weights = found["float16"].header.weights
    assert weights is not None
    assert weights.overflow > 0  # those of the embedding, counted as they are when they are scaled
    told = forecast(folder, "Hello", formats=["float16", "bfloat16"], rescale=BREAKING)
    assert [(one.format, one.breaks) for one in told.formats] == [("float16", True), ("bfloat16", False)]


def test_the_commands_stress_it(folders: Callable[[str], Path], stabilitykit: Run) -> None:
    """--rescale is another spelling of --stress."""
    folder = f"hf:{folders('gpt2')}"
    shown = stabilitykit("profile", folder, "--prompt", "Hello", "--stress", "65536")
    assert (shown.code, shown.err) == (0, "")
    said = " ".join(shown.out.split())
    assert "scaled by 2^16." in said
    as_before = stabilitykit("profile", folder, "--prompt", "Hello", "--rescale", "65536")
    assert as_before.out == shown.out
    assert stabilitykit("reproduce", "--checkpoint", folder, "--json").code == 1
    made = stabilitykit("reproduce", "--checkpoint", folder, "--stress", "32768", "--json")
    assert (made.code, json.loads(made.out)["reproduced"]) == (0, True)
    refused = stabilitykit("reproduce", "top-k-zero", "--checkpoint", folder)
    assert refused.code == 2
    assert "float16-overflow is the one scenario" in " ".join(refused.err.split())

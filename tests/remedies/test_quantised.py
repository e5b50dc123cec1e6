"""Quantised folders scaled through their scales: what transformers loads here is run, the rest dequantised by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rescaled import exact_scaling
from safetensors.torch import load_file, save_file
from torch import Tensor

from stabilitykit.errors import CheckpointError
from stabilitykit.models.transformers.plain import load_plain
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies.folder import write_scaled
from stabilitykit.remedies.repaired_folder import verify_checked, write_checked

# of the libraries that quantise, and of what transformers tells their configs
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PROMPTS = ((3, 70, 71, 72, 73, 9), (5, 6, 7))
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_hidden_layers=2,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def whole() -> Scaling:
    """As `exact_scaling`, with one exponent for each matrix: what every format can hold."""
    exponents = {"q_proj": 1, "k_proj": -1, "v_proj": 2, "o_proj": -5, "up_proj": -4, "down_proj": 1}
    given = exact_scaling(llama())
    made = {
        name: Factor(exponents=(exponents.get(name.split(".")[-2], factor.exponents[0]),))
        for name, factor in given.parameters.items()
    }
    return Scaling(parameters=made, settings=given.settings)


def quantised_by(settings: Any, folder: Path) -> Path:
    """Saved plainly, loaded quantised, saved again."""
    llama().save_pretrained(folder / "plain")
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder / "plain", quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder / "quantised")
    return folder / "quantised"


def written(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], model: Any = None) -> Path:
    """`tensors` in place of those of the Llama, or of `model`, and these settings of its quantisation."""
    (llama() if model is None else model).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    bases = tuple(name.rpartition(".")[0] + "." for name in tensors)
    rest = {name: one for name, one in plain.items() if not name.startswith(bases)}
    save_file(rest | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def scaled(source: Path, scaling: Scaling, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    write_scaled(source, scaling, folder)
    return load_file(folder / "model.safetensors")


def computes_the_same(source: Path, scaling: Scaling, folder: Path) -> None:
    folder.mkdir()
    facts = write_checked(source, scaling, folder, PROMPTS)
    assert len(facts.check.comparisons) == 8
    assert facts.check.equal
    assert facts.check.float16.finite
    check, problems = verify_checked(folder, facts)
    assert problems == ()
    source.rename(source.with_name("away"))
    check, problems = verify_checked(folder, facts)
    assert (problems, check.original_seen) == ((), False)
    before, after = (load_file(path / "model.safetensors") for path in (source.with_name("away"), folder))
    small = [
        name for name, one in before.items() if one.dtype in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
    ]
    assert small
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in small)


@pytest.mark.slow
def test_bitsandbytes_4bit_takes_blocks_of_its_scales(tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    computes_the_same(quantised_by(settings, tmp_path), exact_scaling(llama()), tmp_path / "out")


@pytest.mark.slow
def test_bitsandbytes_8bit_takes_rows_where_no_threshold_singles_out_inputs(tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    source = quantised_by(settings, tmp_path)
    rows = Scaling(parameters={f"{UP}.weight": Factor(exponents=(1, -2), ends={0: (100, 384)})})
    before = load_file(source / "model.safetensors")[f"{UP}.SCB"]
    assert torch.equal(
        scaled(source, rows, tmp_path / "rows")[f"{UP}.SCB"], torch.cat([before[:100] * 2, before[100:] / 4])
    )
    computes_the_same(source, whole(), tmp_path / "out")


def test_scales_that_are_quantised_and_thresholds_are_refused_by_name(tmp_path: Path) -> None:
    nested = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    with pytest.raises(CheckpointError, match=r"_proj.weight cannot be multiplied .* scales are quantised themselves"):
        scaled(quantised_by(nested, tmp_path / "nested"), whole(), tmp_path / "a")
    with pytest.raises(CheckpointError, match="llm_int8_threshold singles out inputs above 6"):
        scaled(quantised_by(transformers.BitsAndBytesConfig(load_in_8bit=True), tmp_path), whole(), tmp_path / "b")


def in_blocks(weight: Tensor, size: int, largest: float) -> tuple[Tensor, Tensor]:
    """A weight divided by a scale for each block of `size` × `size`, and the scales."""
    high, wide = weight.shape[0] // size, weight.shape[1] // size
    blocks = weight.float().reshape(high, size, wide, size)
    scales = blocks.abs().amax((1, 3)) / largest
    return (blocks / scales[:, None, :, None]).reshape(weight.shape), scales


def float8(folder: Path, more: dict[str, Tensor] | None = None) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, one in llama().state_dict().items():
        if "_proj" in name:
            small, scales = in_blocks(one, 64, 448)
            tensors |= {name: small.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}
    return written(folder, tensors | (more or {}), settings)


def test_float8_takes_blocks_as_large_as_those_of_its_scales(tmp_path: Path) -> None:
    parts = {f"{UP}.weight": Factor(exponents=(1, -2), ends={0: (128, 384)})}
    parts[f"{DOWN}.weight"] = Factor(exponents=(-1, 2), ends={1: (128, 384)})
    given = whole()
    made = given.parameters | {name.replace(".0.", f".{i}."): one for name, one in parts.items() for i in range(2)}
    made |= {
        f"model.layers.{i}.mlp.down_proj.weight": Factor(exponents=(-4, -1), ends={1: (128, 384)}) for i in range(2)
    }
    source = float8(tmp_path / "a")
    finer = {f"{UP}.weight": Factor(exponents=(1, -2), ends={0: (100, 384)})}
    with pytest.raises(CheckpointError, match=r"up_proj.weight has one scale in .*up_proj.weight_scale_inv for elem"):
        scaled(source, Scaling(parameters=finer), tmp_path / "b")
    computes_the_same(source, Scaling(parameters=made, settings=given.settings), tmp_path / "out")


def test_scales_of_inputs_that_were_measured_beforehand_are_refused(tmp_path: Path) -> None:
    source = float8(tmp_path / "a", {f"{UP}.input_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"scales of its inputs that were measured beforehand \(.*up_proj.input_"):
        scaled(source, whole(), tmp_path / "b")


def test_experts_in_mxfp4_take_exponents(tmp_path: Path) -> None:
    """gpt-oss: bytes that are exponents, of a parameter that is kept the other way round."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=120, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.GptOssForCausalLM(config)
    model = model.to(torch.bfloat16)
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj_blocks": torch.randint(0, 256, (3, 64, 2, 16), dtype=torch.uint8),
        f"{experts}.gate_up_proj_scales": torch.randint(118, 123, (3, 64, 2), dtype=torch.uint8),
        f"{experts}.down_proj_blocks": torch.randint(0, 256, (3, 64, 1, 16), dtype=torch.uint8),
        f"{experts}.down_proj_scales": torch.randint(118, 123, (3, 64, 1), dtype=torch.uint8),
        f"{experts}.gate_up_proj_bias": torch.randn(3, 64).bfloat16(),
        f"{experts}.down_proj_bias": torch.randn(3, 64).bfloat16(),
    }
    source = written(tmp_path / "a", tensors, {"quant_method": "mxfp4"}, model)
    residual = {"model.embed_tokens.weight": -3, "model.layers.0.self_attn.o_proj.weight": -3}
    residual |= {
        "model.layers.0.self_attn.o_proj.bias": -3,
        f"{experts}.down_proj": -3,
        f"{experts}.down_proj_bias": -3,
    }
    exact = Scaling(
        parameters={name: Factor(exponents=(e,)) for name, e in residual.items()}, settings={"rms_norm_eps": -6}
    )
    after = scaled(source, exact, tmp_path / "b")
    assert torch.equal(after[f"{experts}.down_proj_scales"], tensors[f"{experts}.down_proj_scales"] - 3)
    (tmp_path / "out").mkdir()
    facts = write_checked(source, exact, tmp_path / "out", PROMPTS)
    assert facts.check.equal
    assert len(facts.check.comparisons) >= 4

    blocks = Factor(exponents=(1, 2, 3, 4, 5, 6), ends={0: (1, 2, 3), 2: (10, 64)})
    after = scaled(source, Scaling(parameters={f"{experts}.gate_up_proj": blocks}), tmp_path / "c")
    added = after[f"{experts}.gate_up_proj_scales"].int() - tensors[f"{experts}.gate_up_proj_scales"].int()
    assert added[:, 3].tolist() == [[1, 1], [3, 3], [5, 5]]
    assert added[:, 10].tolist() == [[2, 2], [4, 4], [6, 6]]
    groups = Factor(exponents=(1, 2), ends={1: (32, 64)})
    after = scaled(source, Scaling(parameters={f"{experts}.gate_up_proj": groups}), tmp_path / "e")
    added = after[f"{experts}.gate_up_proj_scales"].int() - tensors[f"{experts}.gate_up_proj_scales"].int()
    assert torch.equal(added, torch.tensor([1, 2], dtype=torch.int32).expand(3, 64, 2))
    far = {f"{experts}.down_proj": Factor(exponents=(-120,))}
    with pytest.raises(CheckpointError, match="are exponents of 8 bits, which cannot hold them"):
        scaled(source, Scaling(parameters=far), tmp_path / "d")


def grouped(scales: Tensor, layout: str) -> dict[str, Tensor]:
    """up_proj, [384, 128], in four bits, as GPTQ and AWQ lay it out."""
    rows, columns = (16, 384) if layout == "gptq" else (128, 48)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32)
    return {f"{UP}.qweight": words, f"{UP}.scales": scales, f"{UP}.qzeros": torch.zeros(4, 48, dtype=torch.int32)}


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_gptq_and_awq_take_rows_and_groups_of_columns(tmp_path: Path, layout: str) -> None:
    """Nothing here can run them: their scales are [groups, out] of a weight [out, in]."""
    scales = (torch.rand(4, 384) + 0.5).half()
    settings = {"quant_method": layout, "bits": 4, "group_size": 32}
    source = written(tmp_path / "a", grouped(scales, layout), settings)
    factor = Factor(exponents=(1, 2, 3, 4), ends={0: (100, 384), 1: (32, 128)})
    after = scaled(source, Scaling(parameters={f"{UP}.weight": factor}), tmp_path / "b")
    wanted = scales.clone()
    for (group, row), times in zip(((0, 0), (1, 0), (0, 1), (1, 1)), (2, 4, 8, 16), strict=True):
        groups, rows = (slice(1), slice(1, 4))[group], (slice(100), slice(100, 384))[row]
        wanted[groups, rows] *= times
    assert torch.equal(after[f"{UP}.scales"], wanted)
    with pytest.raises(CheckpointError, match=r"scales are scales in torch.float16, which cannot hold them"):
        scaled(source, Scaling(parameters={f"{UP}.weight": Factor(exponents=(-20,))}), tmp_path / "c")
    columns = Factor(exponents=(1, 2), ends={1: (16, 128)})
    with pytest.raises(CheckpointError, match=r"has one scale in .* for elements that need different powers"):
        scaled(source, Scaling(parameters={f"{UP}.weight": columns}), tmp_path / "d")


def test_one_scale_that_others_are_divided_by_takes_the_inverse(tmp_path: Path) -> None:
    """NVFP4 as compressed-tensors stores it: q · scale / global scale."""
    tensors = {
        f"{UP}.weight_packed": torch.randint(0, 256, (384, 64), dtype=torch.uint8),
        f"{UP}.weight_scale": torch.rand(384, 8).to(torch.float8_e4m3fn),
        f"{UP}.weight_global_scale": torch.tensor([1000.0]),
    }
    source = written(tmp_path / "a", tensors, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    after = scaled(source, Scaling(parameters={f"{UP}.weight": Factor(exponents=(-3,))}), tmp_path / "b")
    assert after[f"{UP}.weight_global_scale"] == 8000
    assert torch.equal(after[f"{UP}.weight_scale"].float(), tensors[f"{UP}.weight_scale"].float())


def test_integers_of_an_unknown_format_are_refused_by_name(tmp_path: Path) -> None:
    odd = {f"{UP}.weight": torch.ones(384, 128, dtype=torch.int8), f"{UP}.secret": torch.ones(384)}
    source = written(tmp_path / "a", odd, {"quant_method": "new"})
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight holds torch.int8, quantised by new in a way that is not"
    ):
        scaled(source, Scaling(), tmp_path / "b")


def compressed(folder: Path, form: str, weights: dict[str, Any]) -> Path:
    """By compressed-tensors itself."""
    library = pytest.importorskip("compressed_tensors.quantization")
    args = library.QuantizationArgs(**weights)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args, format=form)
    by = pytest.importorskip("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(form)
    tensors: dict[str, Tensor] = {}
    for name, one in llama().state_dict().items():
        if "_proj" in name:
            groups = one.float().reshape(len(one), -1, weights.get("group_size", one.shape[1]))
            largest = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
            given = {"weight": one.float(), "weight_scale": groups.abs().amax(-1) / largest}
            tensors |= {
                name.removesuffix("weight") + key: held.contiguous() for key, held in by.compress(given, scheme).items()
            }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    settings = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    return written(folder, tensors, settings)


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}),
    ],
)
def test_compressed_tensors_computes_the_same(tmp_path: Path, form: str, weights: dict[str, Any]) -> None:
    scaling = exact_scaling(llama()) if "group_size" in weights else whole()
    computes_the_same(compressed(tmp_path / "a", form, weights), scaling, tmp_path / "out")


def test_torchao_computes_the_same(tmp_path: Path) -> None:
    ao = pytest.importorskip("torchao.quantization")
    source = quantised_by(transformers.TorchAoConfig(ao.Int8WeightOnlyConfig()), tmp_path)
    computes_the_same(source, whole(), tmp_path / "out")
    assert type(load_plain(tmp_path / "out", torch.float16).lm_head.weight) is torch.nn.Parameter

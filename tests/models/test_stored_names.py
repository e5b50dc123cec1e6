"""Which stored tensor becomes which part of which parameter, in families that transformers renames and fuses."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.transformers.plain import load_placeholders, load_plain
from stabilitykit.models.transformers.stored_names import Stored, placeholders, stored_factors
from stabilitykit.records.scaling import Factor
from stabilitykit.scaling.apply import scaled

FAST = ["Llama", "Mixtral", "Qwen3-MoE", "GPT-NeoX", "T5", "ViT", "BERT", "HuBERT"]  # a rename or a fusion each


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def found(folder: Path, stored: dict[str, Tensor], factors: dict[str, Factor]) -> Stored:
    blank = placeholders({name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    return stored_factors(load_placeholders(folder, blank, torch.float32), stored, factors)


def drawn(parameters: dict[str, nn.Parameter], seed: int = 0) -> dict[str, Factor]:
    """Factors of most parameters, with blocks at random places of any dimension."""
    rng, made = random.Random(seed), {}
    for name, parameter in parameters.items():
        cut = [dim for dim, size in enumerate(parameter.shape) if size > 3 and rng.random() < 0.5]
        ends = {dim: (*sorted(rng.sample(range(1, parameter.shape[dim]), 2)), parameter.shape[dim]) for dim in cut}
        if rng.random() < 0.8:
            made[name] = Factor(exponents=tuple(rng.randint(-3, 3) for _ in range(3 ** len(cut))), ends=ends)
    return made


def check(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()[0]
    if not isinstance(model, transformers.PreTrainedModel):
        pytest.skip("none of transformers' own")
    stored = saved(model, folder)
    before = dict(load_plain(folder, torch.float32).named_parameters())
    factors = drawn(before)
    asked = found(folder, stored, factors)
    assert asked.unused == ()
    made = {name: scaled(one, asked.factors[name]) if name in asked.factors else one for name, one in stored.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    for name, parameter in load_plain(folder, torch.float32).named_parameters():
        wanted = scaled(before[name], factors[name]) if name in factors else before[name]
        assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize("name", FAST)
def test_blocks_of_parameters_are_carried_to_what_is_stored(tmp_path: Path, name: str) -> None:
    check(name, tmp_path)


@pytest.mark.table
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - set(FAST)))
def test_so_they_are_in_every_family(tmp_path: Path, name: str) -> None:
    check(name, tmp_path)


def test_experts_are_stored_one_by_one_and_each_gets_its_own_factor(tmp_path: Path) -> None:
    model = ARCHITECTURES["Mixtral"]()[0]
    stored = saved(model, tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts, rows, _ = dict(model.named_parameters())[name].shape
    ends = {0: tuple(range(1, experts + 1)), 1: (rows // 2, rows)}
    asked = found(tmp_path, stored, {name: Factor(exponents=tuple(range(2 * experts)), ends=ends)})
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert asked.factors == {
        f"{prefix}.{expert}.{part}.weight": Factor(exponents=(2 * expert + half,))
        for expert in range(experts)
        for half, part in enumerate(("w1", "w3"))
        if 2 * expert + half
    }


@pytest.mark.parametrize("twice", [False, True])
def test_a_tied_weight_is_scaled_wherever_it_is_stored(tmp_path: Path, twice: bool) -> None:
    model = ARCHITECTURES["Gemma"]()[0]
    stored = saved(model, tmp_path)
    embedding = stored["model.embed_tokens.weight"]
    names = {"model.embed_tokens.weight"}
    if twice:
        stored["lm_head.weight"] = embedding.clone()
        names.add("lm_head.weight")
    asked = found(tmp_path, stored, {"model.embed_tokens.weight": Factor(exponents=(-2,))})
    assert set(asked.factors) == names
    stored["lm_head.weight"] = embedding + 1  # transformers does not tie what differs
    asked = found(tmp_path, stored, {"model.embed_tokens.weight": Factor(exponents=(-2,))})
    assert set(asked.factors) == {"model.embed_tokens.weight"}


def test_what_has_no_place_is_counted_and_what_is_missing_or_unknown_refused(tmp_path: Path) -> None:
    stored = saved(ARCHITECTURES["Llama"]()[0], tmp_path)
    stored["model.layers.9.odd"] = torch.ones(2)
    assert found(tmp_path, stored, {}).unused == ("model.layers.9.odd",)
    with pytest.raises(MisuseError, match=r"layers\.9\.odd is none. Was it made for another class"):
        found(tmp_path, stored, {"model.layers.9.odd": Factor(exponents=(1,))})
    del stored["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensor that the config asks for is missing \(model.norm.weight\)"):
        found(tmp_path, stored, {})


def test_dtypes_are_those_that_transformers_keeps(tmp_path: Path) -> None:
    """T5 keeps one matrix in float32 beside float16, and rounding it would give another model."""
    stored = saved(ARCHITECTURES["T5"]()[0], tmp_path)
    blank = placeholders({name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    dtypes = stored_factors(load_placeholders(tmp_path, blank, torch.float16), stored, {}).dtypes
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {name for name in stored if name.endswith("DenseReluDense.wo.weight")}
    assert wide


class Halved(nn.Module):
    """Two parameters that transformers would make out of one stored tensor."""

    def __init__(self, whole: Tensor, computed: bool = False) -> None:
        super().__init__()
        one, two = whole.chunk(2)
        self.one = nn.Parameter(one * 2 if computed else one)
        self.two = nn.Parameter(two.transpose(0, 1))
        self.again = nn.Parameter(torch.cat([one, two])[2:])


def test_parts_of_one_tensor_get_blocks_and_contradictions_are_refused() -> None:
    stored = {"whole": torch.randn(4, 6)}
    blank = placeholders({"whole": (torch.float32, (4, 6))})["whole"]
    both = {"two": Factor(exponents=(1, 2), ends={0: (2, 6)}), "again": Factor(exponents=(1, 2), ends={1: (2, 6)})}
    asked = stored_factors(Halved(blank), stored, both)
    assert asked.factors == {"whole": Factor(exponents=(0, 0, 1, 2), ends={0: (2, 4), 1: (2, 6)})}
    with pytest.raises(CheckpointError, match="whole becomes part of again and of another parameter"):
        stored_factors(Halved(blank), stored, {"two": both["two"]})
    with pytest.raises(CheckpointError, match=r"transformers computes one from what is stored .* by aten.mul"):
        stored_factors(Halved(blank, computed=True), stored, both)


def test_large_experts_are_followed_by_one_of_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 experts of 1,536 × 2,048 are 400 million numbers; 64 KiB of marks are enough for blocks of their rows."""
    shapes = {f"{part}.{expert}": (256, 2048) for part in ("gate", "up") for expert in range(4)}
    blank = placeholders({name: (torch.bfloat16, shape) for name, shape in shapes.items()})
    gate, up = (torch.stack([blank[f"{part}.{expert}"] for expert in range(4)]) for part in ("gate", "up"))
    model = nn.Module()
    model.both = nn.Parameter(torch.cat([gate, up], dim=1).transpose(1, 2))
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    counted: list[int] = []
    arange = torch.arange

    def counting(start: int, end: int, **how: Any) -> Tensor:
        counted.append(end - start)
        return arange(start, end, **how)

    monkeypatch.setattr(torch, "arange", counting)
    factor = Factor(exponents=tuple(range(8)), ends={0: (1, 2, 3, 4), 2: (256, 512)})
    asked = stored_factors(model, stored, {"both": factor})
    assert sum(counted) == 2 * 4 * 256
    assert asked.factors == {
        f"{part}.{expert}": Factor(exponents=(2 * expert + half,))
        for half, part in enumerate(("gate", "up"))
        for expert in range(4)
        if 2 * expert + half
    }

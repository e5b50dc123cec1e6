"""Scaled folders: what is written, piece by piece, and that plain transformers computes the same with it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from families import family_model
from rescaled import exact_scaling
from safetensors.torch import load_file, save_file

from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.transformers.plain import load_plain
from stabilitykit.records.document import from_document, to_document
from stabilitykit.records.repaired_folder import Cast, RepairedFolder
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies import folder as writing
from stabilitykit.remedies.folder import write_scaled
from stabilitykit.remedies.folder_check import check_folder
from stabilitykit.remedies.repaired_folder import verify_checked, write_checked
from stabilitykit.scaling.apply import scaled

PROMPTS = ((3, 70, 71, 72, 73, 9), (5, 6, 7))


def source(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_bytes(b'{"any": "\xc3\xa4"}\r\n')
    (folder / "README.md").write_text("Theirs.")
    (folder / "more").mkdir()
    (folder / "more" / "chat_template.jinja").write_text("{{ x }}")
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return source(family_model("llama"), tmp_path / "llama", max_shard_size="40KB")


def planted(family: str) -> Any:
    """A model that overflows float16, which its exact scaling puts right: the residual stream is far too large."""
    model = family_model(family) if family != "Mixtral" else ARCHITECTURES[family]()[0].eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100_000 / model.model.embed_tokens.weight.abs().max())
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(2.0**14)
            (layer.mlp.experts.down_proj if family == "Mixtral" else layer.mlp.down_proj.weight).mul_(2.0**14)
    return model


def test_files_names_and_shards_stay_and_only_the_scaled_settings_change(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    seen: list[tuple[int, int]] = []
    scaling = exact_scaling(load_plain(llama, torch.float32))
    written = write_scaled(llama, scaling, out, progress=lambda done, total: seen.append((done, total)))
    shards = sorted(path.name for path in llama.glob("*.safetensors"))
    assert len(shards) > 2
    assert {path.relative_to(llama) for path in llama.rglob("*")} == {path.relative_to(out) for path in out.rglob("*")}
    for shard in shards:
        before, after = load_file(llama / shard), load_file(out / shard)
        assert before.keys() == after.keys()
        assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    for name in ("tokenizer.json", "README.md", "more/chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (llama, out))
    assert {key for key in old | new if old.get(key) != new.get(key)} == {"dtype", "rms_norm_eps"}
    assert new["rms_norm_eps"] == old["rms_norm_eps"] / 64
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    total = sum(tensor.nbytes for shard in shards for tensor in load_file(out / shard).values())
    assert index["metadata"]["total_size"] == total == seen[-1][0] == seen[-1][1]
    assert written.sha256.keys() == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written.scaled == len(scaling.parameters)


@pytest.mark.parametrize("family", ["llama", "qwen2", "Mixtral"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_broken_model_is_cured_in_plain_transformers(tmp_path: Path, family: str, dtype: Any) -> None:
    made = source(planted(family), tmp_path / "broken")
    out = tmp_path / "out"
    out.mkdir()
    half = load_plain(made, torch.float16)
    assert not half(torch.tensor([PROMPTS[0]])).logits.isfinite().all()
    facts = write_checked(made, exact_scaling(half), out, PROMPTS, dtype)
    assert facts.check.equal
    assert facts.check.not_run == ()
    assert facts.check.float16.finite
    assert (facts.check.float16.error or 1) < 0.01
    what = {one.what for one in facts.check.comparisons}
    ways = ("prompt 1", "prompt 2", "padded on the left", "16 new tokens with a cache")
    assert what == {"weights", *(f"{way}, {attention}" for way in ways for attention in ("eager", "sdpa"))}

    kept = from_document(RepairedFolder, json.loads(json.dumps(to_document(facts))))
    assert kept == facts
    check, problems = verify_checked(out, kept)
    assert (problems, check.original_seen) == ((), True)
    shutil.rmtree(made)
    check, problems = verify_checked(out, kept)
    assert (problems, check.original_seen, check.equal) == ((), False, True)


def wrong(change: Callable[[Scaling], Scaling], tmp_path: Path) -> str:
    made = source(family_model("llama"), tmp_path / "a")
    out = tmp_path / "b"
    out.mkdir()
    scaling = change(exact_scaling(load_plain(made, torch.float32)))
    with pytest.raises(CheckpointError) as told:
        write_checked(made, scaling, out, PROMPTS)
    return str(told.value)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.1.self_attn.v_proj.weight", "layers.0.mlp.down_proj.weight"]
)
def test_a_scaling_that_is_wrong_in_one_place_is_not_accepted(tmp_path: Path, name: str) -> None:
    def without(scaling: Scaling) -> Scaling:
        kept = {key: factor for key, factor in scaling.parameters.items() if key != f"model.{name}"}
        return replace(scaling, parameters=kept)

    assert "prompt 1, eager" in wrong(without, tmp_path)
    assert "weights" not in wrong(without, tmp_path / "again")


def test_so_is_one_whose_eps_stayed(tmp_path: Path) -> None:
    assert "numbers differ, by up to" in wrong(lambda scaling: replace(scaling, settings={}), tmp_path)


def test_what_was_changed_afterwards_is_found_with_and_without_the_original(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    facts = write_checked(llama, exact_scaling(load_plain(llama, torch.float32)), out, PROMPTS)
    name = next(path for path in sorted(out.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    tensors = load_file(name)
    tensors["model.norm.weight"][3] *= 1.5
    save_file(tensors, name, metadata={"format": "pt"})
    changed = f"{name.name} has changed since it was written: its SHA-256 differs"
    _, problems = verify_checked(out, facts)
    assert problems[0] == changed
    assert any(problem.startswith("weights (model.norm.weight): 1 of 21") for problem in problems)
    llama.rename(tmp_path / "away")
    _, problems = verify_checked(out, facts)
    assert problems[0] == changed
    assert any(problem.startswith("prompt 1, eager, against what was kept") for problem in problems)


def test_an_original_that_is_another_is_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    facts = write_checked(llama, Scaling(), out, PROMPTS)
    path = next(iter(sorted(llama.glob("*.safetensors"))))
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"whose weights have changed since. Bring the original back"):
        verify_checked(out, facts)


def test_gains_are_scaled_as_sums_and_what_rounds_is_counted(tmp_path: Path) -> None:
    made = source(family_model("gemma"), tmp_path / "a")
    norm = "model.norm.weight"
    tensors = load_file(made / "model.safetensors")
    tensors[norm] = torch.linspace(-0.9, 0.9, len(tensors[norm]))
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    factor = Factor(exponents=(-3,), added=1.0)
    out = tmp_path / "out"
    out.mkdir()
    written = write_scaled(made, Scaling(parameters={norm: factor}), out, "float32")
    assert torch.equal(load_file(out / "model.safetensors")[norm], scaled(tensors[norm], factor))
    check = check_folder(made, out, Scaling(parameters={norm: factor}), PROMPTS, "float32")
    assert check.comparisons[0].equal  # the weights; logits cannot be, of a gain alone
    assert written.casts.keys() <= {norm}
    assert check.gains_rounded > 0


def test_roundings_subnormals_and_zeros_are_counted_and_infinities_refused(tmp_path: Path) -> None:
    made = source(family_model("llama"), tmp_path / "a")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(made / "model.safetensors")
    tensors[name] = torch.zeros_like(tensors[name])
    tensors[name][0, :6] = torch.tensor([1.0, 1 + 2.0**-12, 2.0**-20, 2.0**-30, -(2.0**-30), 2.0**-14])
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    written = write_scaled(made, Scaling(parameters={name: Factor(exponents=(2,))}), out)
    assert written.casts[name] == Cast(rounded=3, subnormal=1, zero=2)
    assert load_file(out / "model.safetensors")[name][0, :4].tolist() == [4.0, 4.0, 2.0**-18, 0.0]
    (tmp_path / "more").mkdir()
    with pytest.raises(CheckpointError, match=r"up_proj.weight: a number up to 1, scaled, is past the largest"):
        write_scaled(made, Scaling(parameters={name: Factor(exponents=(16,))}), tmp_path / "more")


def test_large_tensors_are_cut_into_rows_and_blocks_still_end_where_they_should(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_plain(llama, torch.float32)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    write_scaled(llama, exact_scaling(model), whole)
    monkeypatch.setattr(writing, "read_once", lambda tensor: tensor.split(3) if tensor.ndim else (tensor,))
    write_scaled(llama, exact_scaling(model), parts)
    for path in whole.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()


def test_weights_that_torch_saved_become_safetensors_and_other_weights_are_left_out(tmp_path: Path) -> None:
    made = source(family_model("gemma"), tmp_path / "a")
    tensors = load_file(made / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in names if where[name] == file}, made / file)
    (made / "model.safetensors").unlink()
    (made / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (made / "tf_model.h5").write_bytes(b"theirs")
    out = tmp_path / "out"
    out.mkdir()
    written = write_scaled(made, Scaling(), out, "float32")
    assert written.left_out == (
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json",
        "tf_model.h5",
    )  # fmt: skip
    assert sorted(path.name for path in out.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    before, after = load_plain(made, torch.float32), load_plain(out, torch.float32)
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_settings_are_scaled_where_they_are_even_nested_or_left_out(tmp_path: Path) -> None:
    made = source(ARCHITECTURES["SigLIP"]()[0], tmp_path / "a")
    raw = json.loads((made / "config.json").read_text())
    del raw["vision_config"]["layer_norm_eps"]
    raw["vision_config"]["torch_dtype"] = "float32"
    (made / "config.json").write_text(json.dumps(raw))
    out = tmp_path / "out"
    out.mkdir()
    keys = {"vision_config.layer_norm_eps": -4, "text_config.layer_norm_eps": 2}
    write_scaled(made, Scaling(settings=keys), out)
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.vision_config.layer_norm_eps == 1e-6 / 16
    assert config.text_config.layer_norm_eps == raw["text_config"]["layer_norm_eps"] * 4
    read = json.loads((out / "config.json").read_text())
    assert (read["dtype"], read["vision_config"]["torch_dtype"]) == ("float16", "float16")
    (tmp_path / "more").mkdir()
    with pytest.raises(CheckpointError, match=r"has no settings text_config.odd that are numbers"):
        write_scaled(made, Scaling(settings={"text_config.odd": 1}), tmp_path / "more")


@pytest.mark.parametrize("name", ["T5", "ViT", "BERT", "Whisper", "CLIP", "Wav2Vec2", "Mamba"])
def test_whatever_a_model_reads_it_is_run_and_compared(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    made = source(ARCHITECTURES[name]()[0], tmp_path / "a")
    out = tmp_path / "out"
    out.mkdir()
    facts = write_checked(made, Scaling(), out, PROMPTS)
    assert len(facts.check.comparisons) >= 4
    assert facts.check.problems == ()


def test_a_class_of_another_name_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="transformers has no class Llamas"):
        write_checked(llama, Scaling(), tmp_path, PROMPTS, kind="Llamas")

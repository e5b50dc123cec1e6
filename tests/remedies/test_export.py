"""An exported repair: whole, new, verified; on the 270M what it promises, in plain transformers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from remedied import SPECS, breaking, rescale, small
from safetensors.torch import load_file, save_file

from stabilitykit.checkpoints import Checkpoint, GemmaConfig, open_checkpoint
from stabilitykit.checkpoints import export as exporting
from stabilitykit.checkpoints.config import RELEASED
from stabilitykit.checkpoints.export import huggingface_config, write_folder
from stabilitykit.checkpoints.huggingface import gemma_config
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.records.scaling import Factor
from stabilitykit.remedies import folder as folders
from stabilitykit.remedies.export import export
from stabilitykit.remedies.repair import repair
from stabilitykit.remedies.repaired import Repair
from stabilitykit.remedies.verify import read_facts, verify
from stabilitykit.run.divergence import logits_error
from stabilitykit.run.prompts import parse_prompt, tokens


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model breaks in float16."""
    folder = tmp_path_factory.mktemp("broken") / "gemma"
    folder.mkdir()
    write_folder(small(3, 2 * breaking(3)), folder, "float32")
    return folder


@pytest.fixture(scope="module")
def found(broken: Path) -> Repair:
    return repair(broken, ranking_tokens=300)


@pytest.fixture(scope="module")
def repaired(broken: Path, found: Repair) -> Path:
    return export(found, broken.parent / "repaired")


@pytest.mark.slow
def test_what_is_written_is_the_repair_and_says_so(broken: Path, found: Repair, repaired: Path) -> None:
    assert {path.name for path in repaired.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "repair.json", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    facts, ranking = read_facts(repaired)
    assert ranking == found.ranking
    config = json.loads((repaired / "config.json").read_text())
    (setting,) = ranking.change.settings.values()
    assert config["rms_norm_eps"] == setting.after == setting.before * 2.0 ** ranking.scaling.settings["rms_eps"]
    assert config["dtype"] == "float16"
    assert facts.source == ranking.checkpoint == str(broken)
    assert {tensor.dtype for tensor in load_file(repaired / "model.safetensors").values()} == {torch.float16}
    assert not ranking["float16"].finite
    assert ranking.repaired is not None
    assert ranking.repaired.finite
    assert facts.check.equal
    assert facts.check.original_seen
    readme = (repaired / "README.md").read_text()
    assert "stabilitykit verify THIS_FOLDER" in readme
    assert "| finite | no | yes | yes |" in readme
    assert "| `model.layers.*.mlp.down_proj.weight` | 2^-" in readme


@pytest.mark.slow
def test_what_the_original_says_of_itself_stays_and_what_an_earlier_repair_said_goes(
    broken: Path, tmp_path: Path
) -> None:
    theirs = shutil.copytree(broken, tmp_path / "theirs")
    for name in ("README.md", "REPAIR.md", "repair.json"):
        (theirs / name).write_text("{}")
    made = export(repair(theirs, ranking=False), tmp_path / "ours")
    assert (made / "README.md").read_text() == "{}"
    assert "stabilitykit verify THIS_FOLDER" in (made / "REPAIR.md").read_text()
    assert verify(made).problems == ()


@pytest.mark.slow
def test_a_repair_verifies_until_something_changes(repaired: Path, tmp_path: Path) -> None:
    assert verify(repaired).problems == ()
    changed = shutil.copytree(repaired, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"] *= -1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    first, second, *_ = verify(changed).problems
    assert first == "model.safetensors has changed since it was written: its SHA-256 differs"
    assert second.startswith("weights (model.layers.1.mlp.gate_proj.weight): 1 of ")
    config = json.loads((repaired / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    changed = shutil.copytree(repaired, tmp_path / "eps")
    (changed / "config.json").write_text(json.dumps(config))
    assert verify(changed).problems[0] == "config.json has changed since it was written: its SHA-256 differs"


@pytest.mark.slow
def test_without_the_original_the_folder_undone_takes_its_place(broken: Path, repaired: Path, tmp_path: Path) -> None:
    moved = tmp_path / "away"
    broken.rename(moved)
    try:
        found = verify(repaired)
    finally:
        moved.rename(broken)
    assert not found.check.original_seen
    assert found.problems == ()


@pytest.mark.slow
def test_an_original_that_is_another_is_refused(broken: Path, repaired: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(repaired, tmp_path / "moved")
    facts = json.loads((moved / "repair.json").read_text())
    facts["ranking"]["sha256"] = "0" * 64
    (moved / "repair.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="Bring it back"):
        verify(moved)
    with pytest.raises(MisuseError, match=r"has no repair\.json that can be read"):
        verify(broken)


@pytest.mark.slow
def test_nothing_is_overwritten_or_left_half_written(
    found: Repair, repaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MisuseError, match="exists already and is not empty"):
        export(found, repaired)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_safetensors", full)
    with pytest.raises(MisuseError, match="No space left on device"):
        export(found, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_not_written(found: Repair, tmp_path: Path) -> None:
    lost = replace(found, ranking=replace(found.ranking, carried="float16"))
    assert not lost.finite
    with pytest.raises(MisuseError, match="is not finite in float16 on the held-out texts"):
        export(lost, tmp_path / "new")
    unranked = replace(found, ranking=replace(found.ranking, scores=(), scaled_peak=70_000.0))
    assert not unranked.finite
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_scaling_that_changes_the_function_is_not_written(found: Repair, tmp_path: Path) -> None:
    """One factor too many, as a wrong rule of the calculus would make it."""
    more = {**found.ranking.scaling.parameters, "layers.0.mlp.gate_proj.weight": Factor(exponents=(1,))}
    wrong = replace(found.ranking, scaling=replace(found.ranking.scaling, parameters=more))
    with pytest.raises(CheckpointError, match=r"prompt 1, eager: [\d,]+ of [\d,]+ numbers differ"):
        export(replace(found, ranking=wrong), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_proof_that_its_checker_does_not_accept_is_not_written(broken: Path, tmp_path: Path) -> None:
    proved = repair(broken, proved=True, ranking=False)
    assert proved.finite
    past = replace(proved, bounds=[replace(one, bound=1e6) for one in proved.bounds])
    with pytest.raises(CheckpointError, match=r"The proof was not accepted by its checker: proof\.json claims"):
        export(past, tmp_path / "new")
    with pytest.raises(MisuseError, match="A proof holds for weights stored in float16 only"):
        export(proved, tmp_path / "new", "float32")
    assert list(tmp_path.iterdir()) == []
    assert (export(proved, tmp_path / "new") / "proof.json").is_file()


@pytest.mark.slow
def test_what_lies_in_no_folder_is_written_and_verified_too(tmp_path: Path) -> None:
    """Of random weights, as of a GGUF file, a folder is made for as long as it is needed."""
    source = open_checkpoint(f"{SPECS[2]}&seed=3").source
    repair(source, ranking=False, out=tmp_path / "new")
    facts, _ = read_facts(tmp_path / "new")
    assert facts.source == source
    found = verify(tmp_path / "new")
    assert (found.problems, found.check.original_seen) == ((), True)


def test_a_folders_own_tokenizer_is_taken_over(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 7}')
    write_folder(small(3), folder, "float16", source=source)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "generation_config.json").read_text()) == {"top_k": 7}
    assert not (folder / "tokenizer.model").exists()


def test_large_checkpoints_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_SHARD", 40_000)
    done: list[tuple[int, int]] = []
    files = write_folder(small(3), tmp_path, "float16", progress=lambda *seen: done.append(seen))
    assert len(files) > 2
    read = open_checkpoint(tmp_path)
    assert all(torch.equal(read.tensors[name], tensor.half()) for name, tensor in small(3).tensors.items())
    assert done[-1][0] == done[-1][1] == sum(tensor.numel() * 2 for tensor in small(3).tensors.values())


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_config_is_read_back(name: str) -> None:
    config: GemmaConfig = RELEASED[name]
    made = replace(open_checkpoint(SPECS[3]), config=config)
    read, multimodal = gemma_config(huggingface_config(made, "float16"), Path("folder"))
    assert read == config
    assert not multimodal


@pytest.fixture(scope="module")
def folders_270m(checkpoint_270m: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """As it was and rescaled by 1/4, in float32; rescaled in float16."""
    root = tmp_path_factory.mktemp("270m")
    after = rescale(checkpoint_270m, 0.25)
    found = {}
    for name, checkpoint, dtype in (
        ("before", checkpoint_270m, "float32"), ("after", after, "float32"), ("float16", after, "float16"),
    ):  # fmt: skip
        found[name] = root / name
        found[name].mkdir()
        write_folder(checkpoint, found[name], dtype)  # type: ignore[arg-type]
    yield found
    shutil.rmtree(root)


def test_the_270m_in_plain_transformers(checkpoint_270m: Checkpoint, folders_270m: dict[str, Path]) -> None:
    """float32 logits keep every bit; float16 samples, and is forty times as close to float32 as bfloat16."""
    prompt = parse_prompt("prose", Path())
    ids = torch.tensor([tokens(prompt, Tokenizer(checkpoint_270m.vocabulary), bos=True, length=1024)[:1] + tokens(
        prompt, Tokenizer(checkpoint_270m.vocabulary), bos=False, length=1535)[1024:]])  # fmt: skip
    assert ids.shape == (1, 512)

    def logits(folder: str, dtype: torch.dtype) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folders_270m[folder], dtype=dtype, attn_implementation="eager"
        ).eval()
        with torch.inference_mode():
            found: torch.Tensor = model(ids).logits[0]
            if dtype == torch.float16 and folder == "float16":
                drawn = model.generate(ids[:, :6], do_sample=True, max_new_tokens=4)
                assert drawn.shape[1] <= 10
        return found

    before = logits("before", torch.float32)
    assert torch.equal(before, logits("after", torch.float32))
    wide = logits_error(logits("before", torch.bfloat16), before).kl_mean or 0.0
    repaired = logits_error(logits("float16", torch.float16), before).kl_mean or 1.0
    assert repaired <= 2.5e-5
    assert repaired <= wide / 40
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders_270m["float16"])
    assert tokenizer("The capital of France is")["input_ids"] == [2, 818, 5279, 529, 7001, 563]

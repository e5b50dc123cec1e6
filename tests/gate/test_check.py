"""What a check decides: weights first, then prompts, and against each limit."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import save
from gate.models import TINY, breaking_gemma, gemma, ids, spoilt
from safetensors.torch import load_file, save_file
from scaled.runs import noise
from scaled.table import ENTRIES

import stabilitykit as sk
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.formats import FLOAT16
from stabilitykit.gate import check as module
from stabilitykit.gate.baseline import baseline_of
from stabilitykit.gate.limits import of_weights
from stabilitykit.models.gemma import build
from stabilitykit.recorder import record
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records.document import write_document

Run = Callable[..., Any]


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("The capital of France is")
    return path


def test_what_stays_in_the_range_holds_and_what_leaves_it_does_not(prompt: Path) -> None:
    assert sk.check(TINY, prompts=[prompt]).holds
    found = sk.check(TINY, prompts=[prompt], rescale=65536.0)
    (violation,) = found.violations
    assert (violation.limit, violation.site, violation.bound) == ("range", "embed_tokens", 65504.0)
    assert violation.value is not None
    assert abs(violation.value) > 65504
    assert "overflows in embedding, scaled" in violation.text
    assert sk.check(TINY, prompts=[prompt], rescale=65536.0, dtype="bfloat16").holds


def test_the_site_and_its_numbers_are_those_of_a_run(prompt: Path, tmp_path: Path) -> None:
    folder = breaking_gemma(tmp_path / "gemma")
    found = sk.check(folder, prompts=[prompt])
    ran = sk.profile(folder, prompt.read_text())["float16"]
    first = ran.first_break()
    assert first is not None
    assert first.broke is not None
    assert (found.violations[0].site, found.violations[0].value) == (first.site, first.broke.value)
    for one in found.headroom:  # sites up to the break
        made = [record.amax for record in ran if record.site == one.site]
        if one.site != first.site:
            assert one.headroom == pytest.approx(FLOAT16.headroom(max(amax or 0.0 for amax in made)), abs=1e-9)


def test_the_headroom_of_every_site_is_what_its_largest_magnitude_leaves(prompt: Path) -> None:
    opened = sk.open_checkpoint(TINY)
    model = build(opened, dtype="float16")
    tokens = model.tokenizer.encode(prompt.read_text())
    with torch.inference_mode(), record(model) as recording:
        model(torch.tensor([tokens]), last_only=True)
    expected = {one.site: FLOAT16.headroom(one.amax or 0.0) for one in recording if one.dtype == "float16"}
    found = {one.site: one.headroom for one in sk.check(TINY, prompts=[prompt]).headroom}
    assert found.keys() <= expected.keys()
    assert len(found) > 30
    for site, headroom in found.items():
        assert headroom == pytest.approx(expected[site], abs=0.02), site  # products are summed in another order


def test_a_limit_on_headroom_names_each_site_that_has_less(prompt: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], min_headroom=12.5)
    low = [one for one in found.headroom if one.headroom < 12.5]
    assert 0 < len(low) < len(found.headroom)
    assert [one.site for one in found.violations] == [one.site for one in low]
    assert all(one.limit == "headroom" and one.bound == 12.5 for one in found.violations)
    least = low[0].headroom
    assert sk.check(TINY, prompts=[prompt], min_headroom=least).holds
    assert not sk.check(TINY, prompts=[prompt], min_headroom=math.nextafter(least, 99)).holds


def test_a_limit_on_divergence_is_held_against_that_from_float32(prompt: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], max_kl=1.0)
    (ran,) = found.prompts
    opened = sk.open_checkpoint(TINY)
    logits = {}
    for dtype in ("float16", "float32"):
        model = build(opened, dtype=dtype)
        with torch.inference_mode():
            logits[dtype] = model(torch.tensor([model.tokenizer.encode(prompt.read_text())]))[0].double()
    p, q = logits["float32"].log_softmax(-1), logits["float16"].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert ran.kl_mean == pytest.approx(float(kl.mean()), rel=0.2)
    assert ran.compared == ran.positions == len(kl)
    assert found.holds
    (violation,) = sk.check(TINY, prompts=[prompt], max_kl=float(ran.kl_mean or 0) / 2).violations
    assert (violation.limit, violation.value) == ("kl", ran.kl_mean)


def test_with_a_limit_on_divergence_an_output_that_is_lost_is_named_with_what_broke(prompt: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], rescale=65536.0, max_kl=1.0)
    assert {one.limit for one in found.violations} == {"range", "output"}


@pytest.mark.parametrize("value", [math.inf, math.nan, 70000.0])
def test_a_weight_that_does_not_hold_is_named_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = spoilt(gemma(tmp_path / "gemma"), name, value)

    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("a prompt ran")

    monkeypatch.setattr(module, "measure", ran)
    for checkpoint in (str(folder), f"hf:{folder}"):
        found = sk.check(checkpoint)
        assert not found.ran
        assert not found.prompts
        (violation,) = found.violations
        assert violation.limit == "weights"
        assert violation.site is not None
        assert name.endswith(violation.site)
        assert violation.value == pytest.approx(value, nan_ok=True)
        assert "[0, 5]" in violation.text
    finite = value == 70000
    assert sk.check(str(folder), dtype="bfloat16", weights_only=True).holds is finite


def test_weights_alone_are_checked_of_any_folder(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "something new"}')
    save_file({"a.scales": torch.tensor([1.0, 2.0])}, folder / "model.safetensors")
    assert sk.check(folder, weights_only=True).holds
    save_file({"a.scales": torch.tensor([1.0, math.inf])}, folder / "model.safetensors")
    (violation,) = sk.check(folder, weights_only=True).violations
    assert violation.site == "a.scales"
    assert "scale of quantised weights" in violation.text


def test_a_break_late_in_a_text_is_found_at_the_length_that_lets_it_in(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "gemma")
    model = build(sk.open_checkpoint(folder), dtype="float16")
    plain, large = model.tokenizer.encode("ab", bos=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][large] = 12000.0  # times √32 it is past the maximum
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "late.txt"
    text.write_text("aaaaaaaaaabaaaa")
    found = sk.check(folder, prompts=[text])
    assert plain != large
    assert found.prompts[0].first_broken == 12  # <bos>, ten times "a", and "b"
    assert "from a length of 12 tokens on" in found.violations[0].text


def test_transformers_models_are_judged_at_every_length_too(tmp_path: Path) -> None:
    folder = breaking_gemma(tmp_path / "gemma")
    text = tmp_path / "a.txt"
    text.write_text("The capital of France is")
    own, theirs = sk.check(folder, prompts=[text]), sk.check(f"hf:{folder}", prompts=[text])
    assert theirs.prompts[0].every_length
    assert own.violations[0].layer == theirs.violations[0].layer
    assert own.violations[0].value == theirs.violations[0].value
    assert sk.check(f"hf:{folder}", prompts=[text], dtype="bfloat16").holds


def test_a_model_that_looks_ahead_is_judged_at_its_own_length_alone(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "gemma")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    text = tmp_path / "a.txt"
    text.write_text("The capital of France is")
    found = sk.check(f"hf:{folder}", prompts=[text])
    assert found.holds
    assert not found.prompts[0].every_length
    assert found.remarks == ("only its own length was judged of a.txt: shorter ones may differ",)


@pytest.mark.parametrize("name", ["BERT", "causal", "pooled"])
def test_a_model_without_a_head_is_checked_on_text(tmp_path: Path, name: str, prompt: Path) -> None:
    """As models that embed are: what they call the class in config.json runs, and causal ones at every length."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig if name != "causal" else transformers.LlamaConfig
    small = config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    kind = {"BERT": "BertModel", "causal": "LlamaModel", "pooled": "BertForSequenceClassification"}[name]
    torch.manual_seed(0)
    folder = save(getattr(transformers, kind)(small), tmp_path / "model")
    found = sk.check(f"hf:{folder}", prompts=[prompt])
    assert found.holds
    assert found.prompts[0].every_length == (name == "causal")
    assert sk.check(f"hf:{folder}").holds  # the kit's own texts
    with pytest.raises(MisuseError, match="leave out --stress"):
        sk.check(f"hf:{folder}", rescale=2.0)


def test_a_model_with_an_encoder_and_a_decoder_is_given_half_a_text_each(tmp_path: Path, prompt: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=512, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    folder = save(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    (ran,) = sk.check(f"hf:{folder}", prompts=[prompt]).prompts
    assert not ran.every_length
    assert ran.headroom is not None


def test_a_model_that_reads_no_text_says_so(tmp_path: Path) -> None:
    folder = save(ENTRIES["ViT"].model(), tmp_path / "vit", tokenizer=False)
    with pytest.raises(MisuseError, match=r"no text can be run.*--prompts FILE"):
        sk.check(f"hf:{folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no config\.json"):
        sk.check(f"hf:{tmp_path / 'empty'}")


def test_a_model_that_reads_no_text_is_checked_on_tensors(tmp_path: Path) -> None:
    folder = save(ENTRIES["ViT"].model(), tmp_path / "vit", tokenizer=False)
    save_file({"pixel_values": noise(1, 3, 32, 32)}, tmp_path / "image.safetensors")
    found = sk.check(f"hf:{folder}", prompts=[tmp_path / "image.safetensors"])
    assert [one.limit for one in found.violations] == ["range"]
    assert found.violations[0].layer == 0
    assert sk.check(f"hf:{folder}", prompts=[tmp_path / "image.safetensors"], dtype="bfloat16").holds


def test_a_quantised_block_whose_scale_is_not_finite_is_named() -> None:
    weight = torch.ones(4, 64)
    weight[1, 32:] = math.inf  # all that share the scale
    stored = check_weights([("up_proj.weight", weight)], ["float16"], blocks={"up_proj.weight": 32})["float16"]
    (violation,) = of_weights(stored)
    assert "up_proj.weight[1, 32] is inf, in block 3 of 32 elements that share a scale: 32 of 256" in violation.text


def test_a_repaired_folder_holds(stabilitykit: Run, tmp_path: Path) -> None:
    folder = breaking_gemma(tmp_path / "gemma")
    made = stabilitykit("repair", str(folder), "--no-ranking", "--out", str(tmp_path / "repaired"))
    assert made.code == 0, made.err
    assert stabilitykit("check", str(folder)).code == 1
    assert stabilitykit("check", str(folder), "--dtype", "bfloat16").code == 0
    for checkpoint in (str(tmp_path / "repaired"), f"hf:{tmp_path / 'repaired'}"):
        found = stabilitykit("check", checkpoint)
        assert (found.code, found.err) == (0, "")
        assert "float16 holds on 3 prompts." in found.out


# Prompts


def test_prompts_are_texts_chats_and_tensors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    (tmp_path / "b.json").write_text(json.dumps([{"role": "user", "content": "Hi"}]))
    (tmp_path / "c.jsonl").write_text('{"prompt": "Hi"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    save_file({"input_ids": ids(2, 70, 71)}, tmp_path / "d.safetensors")
    np.savez(tmp_path / "e.npz", input_ids=ids(2, 70, 71).numpy())
    torch.save({"input_ids": ids(2, 70, 71)}, tmp_path / "f.pt")
    (tmp_path / "notes.rst").write_text("passed over")
    found = sk.check(TINY, prompts=[tmp_path])
    assert [one.name for one in found.prompts] == [
        "a.txt", "b.json", "c.jsonl:1", "c.jsonl:2", "d.safetensors", "e.npz", "f.pt"
    ]  # fmt: skip
    text, chat, line, turn, *tensors = found.prompts
    assert text.sha256 == line.sha256 != chat.sha256 == turn.sha256
    assert len({one.sha256 for one in tensors}) == 1
    assert {one.tokens for one in tensors} == {3}
    assert not any(one.every_length for one in tensors)
    assert "d.safetensors, e.npz and f.pt" in found.remarks[0]


def test_a_chat_keeps_its_own_system_text(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (tmp_path / "a.json").write_text(json.dumps(turns))
    (tmp_path / "b.txt").write_text("Hi")
    plain, wrapped = (sk.check(TINY, prompts=[tmp_path], chat=chat).prompts for chat in (False, True))
    assert plain[0].sha256 == wrapped[0].sha256
    assert plain[1].sha256 != wrapped[1].sha256
    with pytest.raises(MisuseError, match="chat=True"):
        sk.check(TINY, prompts=[tmp_path], system="Be brief.")


class Code:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_files_that_hold_no_prompt_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"input_ids": Code()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"text": "Hi"}')
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    np.savez(tmp_path / "object.npz", input_ids=np.array([{}], dtype=object))
    (tmp_path / "none").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    tensors = ("code.pt", "list.pt", "cut.safetensors", "object.npz")
    for name in (*tensors, "empty.txt", "broken.json", "other.json", "none", "gone.txt", "table.csv"):
        with pytest.raises(MisuseError, match=name):
            sk.check(TINY, prompts=[tmp_path / name])
    assert "must not run" not in capsys.readouterr().out


def test_what_cannot_be_run_is_not_judged(tmp_path: Path) -> None:
    save_file({"pixel_values": torch.ones(1, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(MisuseError, match=r"wrong\.safetensors could not be judged.*input_ids"):
        sk.check(TINY, prompts=[tmp_path / "wrong.safetensors"])
    theirs = f"hf:{gemma(tmp_path / 'gemma')}"
    with pytest.raises(MisuseError, match=r"wrong\.safetensors.*pixel_values(?!.*--inputs)"):
        sk.check(theirs, prompts=[tmp_path / "wrong.safetensors"])
    save_file({"input_ids": ids(2, 5000)}, tmp_path / "other.safetensors")
    for checkpoint in (TINY, theirs):
        with pytest.raises(MisuseError, match=r"other\.safetensors: input_ids holds 5,000.*0 to \d+\."):
            sk.check(checkpoint, prompts=[tmp_path / "other.safetensors"])
    (tmp_path / "long.txt").write_text("x" * 100)
    with pytest.raises(MisuseError, match="context holds 64"):
        sk.check(TINY, prompts=[tmp_path / "long.txt"])
    for limits in ({"min_headroom": math.nan}, {"max_kl": -1.0}, {"tolerance": math.inf}, {"dtype": "float3"}):
        with pytest.raises(MisuseError):
            sk.check(TINY, **limits)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder, text in (("one", "Hi"), ("two", "Ho")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    (tmp_path / "one" / "b.txt").write_text("He")
    ran = sk.check(TINY, prompts=[tmp_path / "one", tmp_path / "two", tmp_path / "one" / "b.txt"]).prompts
    assert [one.name for one in ran] == [str(tmp_path / "one/a.txt"), "b.txt", str(tmp_path / "two/a.txt")]


def test_what_weights_alone_would_not_look_at_is_refused(tmp_path: Path, prompt: Path) -> None:
    folder = gemma(tmp_path / "gemma")
    kept = baseline_of(sk.check(folder, prompts=[prompt]))
    for more in ({"prompts": [prompt]}, {"baseline": kept}, {"max_kl": 1.0}, {"min_headroom": 1.0}):
        with pytest.raises(MisuseError, match="leave out --weights-only"):
            sk.check(folder, weights_only=True, **more)


# Redacted


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_redacted_reports_hold_no_text_of_a_prompt(stabilitykit: Run, tmp_path: Path, prefix: str) -> None:
    """Whatever is violated. Without the option tokens are in each of them."""
    folder = f"{prefix}{gemma(tmp_path / 'gemma')}"
    (tmp_path / "a.txt").write_text("zebra")
    save_file({"input_ids": ids(2, 70, 71)}, tmp_path / "b.safetensors")
    prompts = ["--prompts", str(tmp_path / "a.txt"), "--prompts", str(tmp_path / "b.safetensors")]
    kept = baseline_of(sk.check(folder, prompts=[tmp_path / "a.txt"]))
    higher = replace(kept, headroom={site: bits + 3 for site, bits in kept.headroom.items()})
    write_document(tmp_path / "higher.json", higher)
    limits = ["--min-headroom", "99", "--max-kl", "0", "--baseline", str(tmp_path / "higher.json")]
    told = re.compile(r'token \d+ \x27|"token": "')
    for redact in ([], ["--redact"]):
        files = {name: tmp_path / f"{name}{len(redact)}" for name in ("junit", "sarif", "write-baseline")}
        reports = [part for name, path in files.items() for part in (f"--{name}", str(path))]
        failed = stabilitykit("check", folder, *prompts, *limits, *reports, "--json", *redact)
        assert failed.code == 1, failed.err
        assert {one["limit"] for one in json.loads(failed.out)["violations"]} >= {"headroom", "baseline"}
        shown = [failed.out, files["junit"].read_text(), files["sarif"].read_text()]
        held = stabilitykit("check", folder, *prompts, *reports, "--overwrite", *redact)
        assert held.code == 0, held.err
        shown.append(held.out)
        assert [bool(told.search(text)) for text in shown] == [not redact] * len(shown)
        assert "zebra" not in held.out + files["write-baseline"].read_text()


def test_a_redacted_break_is_told_without_its_token(prompt: Path, tmp_path: Path) -> None:
    folder = breaking_gemma(tmp_path / "gemma")
    plain, redacted = (sk.check(folder, prompts=[prompt], redact=redact).violations[0] for redact in (False, True))
    assert (plain.site, plain.value) == (redacted.site, redacted.value)
    assert re.search(r"at tokens? \d+ '", plain.text)
    assert re.search(r"at tokens? \d+[^']*$", redacted.text)


# Baselines


def test_a_loss_of_headroom_fails_and_what_changed_is_told(tmp_path: Path, prompt: Path) -> None:
    before, after = gemma(tmp_path / "before"), gemma(tmp_path / "after", 4.0)
    kept = baseline_of(sk.check(before, prompts=[prompt]))
    same = sk.check(before, prompts=[prompt], baseline=kept)
    assert same.holds
    assert same.compared
    assert same.differences == ()
    found = sk.check(after, prompts=[prompt], baseline=kept)
    assert {one.limit for one in found.violations} == {"baseline"}
    assert [one.what for one in found.differences] == ["weights"]
    lost = {one.site: kept.headroom[one.site] - (one.value or 0.0) for one in found.violations if one.site}
    assert lost["layers.1"] == pytest.approx(2.0, abs=0.1)  # bits
    assert not sk.check(after, prompts=[prompt], baseline=kept, tolerance=1.8).holds
    assert sk.check(after, prompts=[prompt], baseline=kept, tolerance=2.2).holds
    back = sk.check(before, prompts=[prompt], baseline=baseline_of(sk.check(after, prompts=[prompt])))
    assert {one.site for one in back.violations} == {"norm"}  # whose gain γ divides


def test_a_baseline_of_another_dtype_or_model_is_refused(prompt: Path) -> None:
    kept = baseline_of(sk.check(TINY, prompts=[prompt]))
    with pytest.raises(MisuseError, match="one of float16"):
        sk.check(TINY, prompts=[prompt], dtype="bfloat16", baseline=kept)
    with pytest.raises(MisuseError, match="No site of the baseline"):
        sk.check(TINY, prompts=[prompt], baseline=replace(kept, headroom={"elsewhere": 3.0}))
    found = sk.check(TINY, prompts=[prompt], baseline=replace(kept, headroom={**kept.headroom, "elsewhere": 3.0}))
    assert found.holds
    assert "1 site of the baseline did not run (elsewhere)" in found.remarks
    with pytest.raises(MisuseError, match="does not hold"):
        baseline_of(sk.check(TINY, prompts=[prompt], rescale=65536.0))

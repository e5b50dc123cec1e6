"""transformers' own models from a folder: found, loaded, continued, and refused in a sentence."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family_model
from safetensors.torch import load_file, save_file
from written import write_huggingface, write_tokenizer

from stabilitykit.checkpoints import random_checkpoint
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models import transformers as hf
from stabilitykit.models.stream import STREAMED
from stabilitykit.models.subject import Continuation, Sampling
from stabilitykit.models.transformers.backend import explained
from stabilitykit.recorder import record
from stabilitykit.run.case import run_case

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16&vocabulary=512"
SPEC = f"random:gemma3-270m?{SHAPE}&window=4&global_every=2"

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small Gemma 3 with a tokenizer that transformers reads."""
    made = write_huggingface(random_checkpoint(SPEC), tmp_path_factory.mktemp("hf") / "gemma", new=True)
    write_tokenizer(made)
    yield made
    shutil.rmtree(made)


def copied(folder: Path, to: Path, **keys: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | keys
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_folder_is_run_and_recorded(folder: Path, dtype: str, attention: str) -> None:
    model = hf.open_model(str(folder), dtype=dtype, attention=attention)
    assert str(model.causal.dtype) == f"torch.{dtype}"
    run = run_case(model, model.tokenizer.encode("Hello"), new_tokens=3, sampling=Sampling(seed=3))
    header = run.recording.header
    assert (run.error, run.recording.first_break()) == (None, None)
    assert (header.checkpoint, header.dtype, header.starts) == (f"hf:{folder}", dtype, (0, 6, 7))
    assert (header.case["attention"], header.case["new_tokens"]) == (attention, 3)
    assert len(header.sha256 or "") == 64
    assert any("run by transformers" in note for note in header.notes)


def test_a_seed_draws_the_same_tokens_and_leaves_torchs_generator_alone(folder: Path) -> None:
    model = hf.open_model(str(folder), dtype="float32")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = [run_case(model, [2, 70], new_tokens=6, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    first, again, other = (run.recording.header.tokens for run in drawn)
    assert first == again
    assert first != other


def test_greedy_ends_at_the_first_step_that_breaks_and_sampling_raises(folder: Path) -> None:
    model = hf.open_model(str(folder), dtype="float16")
    model.causal.model.layers[1].post_feedforward_layernorm.weight.data.fill_(6e4)
    greedy = run_case(model, [2, 70], new_tokens=5, sampling=Sampling(temperature=None))
    assert greedy.error is None
    assert len(greedy.recording.header.starts) == 1
    assert "greedy_text" in greedy.recording.header.case
    sampled = run_case(model, [2, 70], new_tokens=5)
    assert "probability tensor contains either `inf`, `nan` or element < 0" in str(sampled.error)
    for run in (greedy, sampled):
        first = run.recording.first_break()
        assert first is not None
        assert first.site == "layers.1.post_feedforward_layernorm"


def test_text_and_tokens(folder: Path) -> None:
    tokenizer = hf.open_tokenizer(str(folder))
    ids = tokenizer.encode("Hi a")
    assert ids[0] == 2
    assert tokenizer.encode("Hi a", bos=False) == ids[1:]
    assert [tokenizer.piece(token) for token in ids] == ["<bos>", "H", "i", " ", "a"]
    assert tokenizer.encode("<eos>", bos=False, special_tokens=True) == [1]
    assert len(tokenizer.encode("<eos>", bos=False)) == 5
    turn = [tokenizer.piece(token) for token in tokenizer.chat("x", system="y")]
    assert turn.count("<start_of_turn>") == 2
    assert turn[0] == "<bos>"
    assert [tokenizer.piece(token) for token in tokenizer.chat("x", system="y", bos=False)] == turn[1:]
    model = hf.open_model(str(folder))
    for how, why in (
        (Continuation(mask=torch.zeros(1, 1, len(ids), len(ids))), "make their own masks"),
        (Continuation(every_logit=True, new_tokens=2), "no place for the logits of all positions"),
    ):
        with pytest.raises(MisuseError, match=why):
            model.decode(torch.tensor([ids]), how, lambda logits: False)


def test_every_logit_is_that_of_one_pass_and_the_draw_is_from_the_last(folder: Path) -> None:
    model, seen = hf.open_model(str(folder)), list[torch.Tensor]()
    ids = torch.tensor([hf.open_tokenizer(str(folder)).encode("Hi a")])
    how = Continuation(every_logit=True, sampling=Sampling(temperature=None))

    def saw(logits: torch.Tensor) -> bool:
        seen.append(logits)
        return False

    with torch.inference_mode():
        drawn = model.decode(ids, how, saw)
        expected = model.module(ids).logits
    assert torch.equal(seen[0], expected)
    assert drawn == [[int(expected[0, -1].argmax())]]


def test_control_tokens_in_a_turn_are_text_unless_they_are_meant(folder: Path) -> None:
    tokenizer = hf.open_tokenizer(str(folder))
    turns = len(tokenizer.chat("", system=""))
    for text in ("a<eos>b", "<end_of_turn>", "<bos>\U000f0000<eos>", "x"):
        plain = tokenizer.encode(text, bos=False)
        meant = tokenizer.encode(text, bos=False, special_tokens=True)
        for is_meant, ids in ((False, plain), (True, meant)):
            made = tokenizer.chat(text, system=text, special_tokens=is_meant)
            assert len(made) == turns + 2 * len(ids)
            assert (made[0], made.count(260)) == (2, 2)  # <bos>, and where each turn starts
            assert made[-len(ids) - 2 : -2] == ids  # before <end_of_turn> and a line's end


def test_control_tokens_that_cannot_be_told_from_the_templates(folder: Path, tmp_path: Path) -> None:
    greedy = copied(folder, tmp_path / "greedy")
    raw = json.loads((greedy / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["rstrip"] = True  # takes the line's end after it, which the template wrote
    (greedy / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = hf.open_tokenizer(str(greedy))
    with pytest.raises(MisuseError, match=r"Around <eos> in the prompt, .* leave it out, or add --special-tokens"):
        tokenizer.chat("a<eos>b")
    assert 1 in tokenizer.chat("a<eos>b", special_tokens=True)
    assert tokenizer.chat("ab")


def test_ids_that_have_no_row_in_the_embedding(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["H"] = 512
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = hf.open_model(str(other))
    with pytest.raises(CheckpointError, match=r"gave the id 512, but the embedding has 512 rows"):
        run_case(model, model.tokenizer.encode("Hi"))


def test_settings_that_transformers_does_not_sample_with(folder: Path) -> None:
    model = hf.open_model(str(folder))
    for top_p, top_k in ((0.0, 64), (1.5, 64), (-1.0, 64), (float("nan"), 64), (0.95, -1)):
        with pytest.raises(MisuseError, match=rf"a top_k of at least 0 .*; got {top_p} and {top_k}\."):
            run_case(model, [2, 70], sampling=Sampling(top_p=top_p, top_k=top_k))
    for sampling in (Sampling(top_p=1.0, top_k=0), Sampling(temperature=None, top_p=-1.0, top_k=-1)):
        assert run_case(model, [2, 70], sampling=sampling).error is None


def test_a_folder_without_a_tokenizer_is_told_so(folder: Path, tmp_path: Path) -> None:
    without = copied(folder, tmp_path / "without")
    for path in without.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"without has no tokenizer\.json or tokenizer\.model that holds tokens"):
        hf.open_tokenizer(str(without))


def test_a_part_of_a_character_is_named_and_a_line_ends_in_no_table(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = hf.HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=made), "made here")
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("a\n\té")]
    assert pieces == ["a", "\\n", "\\t", "Ã", "©"]


def test_the_kits_own_model_and_transformers_agree_on_a_folder(folder: Path, stabilitykit: Run) -> None:
    common = ("--prompt", "Hello", "--rescale", "1", "--json")
    ours = json.loads(stabilitykit("profile", str(folder), *common).out)
    theirs = json.loads(stabilitykit("profile", f"hf:{folder}", *common, "--attention", "eager").out)
    assert ours["tokens"] == theirs["tokens"][: len(ours["tokens"])]
    assert ours["weights"]["subnormal"] == theirs["weights"]["subnormal"]
    assert ours["finite"]
    assert theirs["finite"]
    assert ours["verdict"] == theirs["verdict"]  # the same site, to the last digit of its value


def test_generate_on_the_command_line_shows_the_steps(folder: Path, stabilitykit: Run) -> None:
    for source in (str(folder), f"hf:{folder}"):
        shown = stabilitykit("profile", source, "--prompt", "Hello", "--generate", "4", "--dtype", "float32")
        assert (shown.code, shown.err) == (0, "")
        assert "float32, by step: 4 steps" in shown.out
        found = json.loads(stabilitykit("profile", source, "--prompt", "Hello", "--generate", "4", "--json").out)
        assert [row["step"] for row in found["steps"]] == [0, 1, 2, 3]
        assert [row["position"] for row in found["steps"]] == [0, 6, 7, 8]


def test_fused_softmax_is_said_to_be_recomputed_and_can_be_left_out(folder: Path, stabilitykit: Run) -> None:
    common = ("profile", f"hf:{folder}", "--prompt", "Hello", "--attention", "sdpa")
    assert "entropies were recomputed from its queries" in " ".join(stabilitykit(*common).out.split())
    assert "recomputed" not in stabilitykit(*common, "--no-fused-softmax").out


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of making one, which the kit does not
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(hf.open_model(str(folder)).module, config).save_pretrained(path)
    return path


def test_an_adapter_is_run_with_its_model(folder: Path, adapter: Path, stabilitykit: Run) -> None:
    shown = stabilitykit("profile", f"hf:{folder}", "--prompt", "Hello", "--adapter", str(adapter))
    assert (shown.code, shown.err) == (0, "")
    assert "with an adapter of peft's" in shown.out
    with_it = hf.open_model(str(folder), adapter=adapter)
    with torch.inference_mode(), record(with_it.module) as recording:
        with_it.module(torch.tensor([[2, 70]]))
    assert any(".lora_A." in r.site for r in recording)
    logits = [model.module(torch.tensor([[2, 70]])).logits for model in (with_it, hf.open_model(str(folder)))]
    assert not torch.equal(*logits)


def test_an_adapter_that_is_none_or_another_models(folder: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"has no adapter_config\.json"):
        hf.open_model(str(folder), adapter=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0", "layers.7"): t for name, t in tensors.items()}, other / "adapter_model.safetensors"
    )
    message = r"other is not an adapter that peft can put on this model: Found missing adapter keys"
    with pytest.raises(CheckpointError, match=message):
        hf.open_model(str(folder), adapter=other)


def test_weights_that_do_not_fit_are_never_filled_up_in_silence(folder: Path, tmp_path: Path) -> None:
    more = copied(folder, tmp_path / "more", num_hidden_layers=4, layer_types=None)
    with pytest.raises(
        CheckpointError,
        match=r"13 tensors that the config asks for are missing \(model\.layers\.3.*filled with random numbers",
    ):
        hf.open_model(str(more))
    wide = copied(folder, tmp_path / "wide", intermediate_size=96)
    message = (
        r"9 tensors .* another shape \(model\.layers\.0\.mlp\.down_proj\.weight is \[32, 64\] and not \[32, 96\], "
    )
    with pytest.raises(CheckpointError, match=message):
        hf.open_model(str(wide))
    none = copied(folder, tmp_path / "none", hidden_size=0)
    with pytest.raises(
        CheckpointError, match=r"35 tensors that the config asks for are of another shape"
    ):  # and torch's remarks are not heard
        hf.open_model(str(none))
    tall = copied(folder, tmp_path / "tall", vocab_size=500)
    with pytest.raises(
        CheckpointError,
        match=r"1 tensor that the config asks for is of another shape \(model\.embed_tokens\.weight is \[512, 32\] ",
    ):
        hf.open_model(str(tall))
    extra = copied(folder, tmp_path / "extra")
    tensors = load_file(extra / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.odd.weight": torch.ones(2)}, extra / "model.safetensors", {"format": "pt"})
    notes = hf.open_model(str(extra)).notes
    assert "1 tensor in the folder has no place in the model (model.layers.0.mlp.odd.weight)" in notes


def test_a_window_that_holds_no_token(folder: Path, tmp_path: Path) -> None:
    for window in (0, -1):
        with pytest.raises(
            CheckpointError, match=rf"sliding_window in the config must be at least 1 token, got {window}\."
        ):
            hf.open_model(str(copied(folder, tmp_path / f"window{window}", sliding_window=window)))
    unused = copied(folder, tmp_path / "unused", sliding_window=0, layer_types=["full_attention"] * 3)
    assert run_case(hf.open_model(str(unused)), [2, 70]).error is None  # no layer slides


def test_a_gemma_whose_tokenizer_adds_no_bos_is_noted(folder: Path, tmp_path: Path) -> None:
    note = "the folder's tokenizer puts no <bos> before a text, where a released Gemma's does"
    assert note not in hf.open_model(str(folder)).notes
    bare = copied(folder, tmp_path / "bare")
    tokenizer = json.loads((bare / "tokenizer.json").read_text()) | {"post_processor": None}
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert note in hf.open_model(str(bare)).notes


def test_a_long_reason_ends_at_a_word() -> None:
    with pytest.raises(CheckpointError) as caught, explained("x"):
        raise ValueError("many\nwords " * 100)
    reason = str(caught.value).partition("can load: ")[2]
    assert reason.endswith(("many ...", "words ..."))
    assert 280 < len(reason) <= 300
    for error, told in ((KeyError("foo"), "KeyError('foo')."), (ValueError(), "ValueError."), (OSError("No."), "No.")):
        with pytest.raises(CheckpointError) as caught, explained("x"):
            raise error
        assert str(caught.value) == f"x is not a folder that transformers can load: {told}"


def test_folders_that_transformers_refuses_are_explained_in_one_line(folder: Path, tmp_path: Path) -> None:
    for name, keys in (("architecture", {"model_type": "nobody"}), ("sizes", {"head_dim": "x"})):
        with pytest.raises(CheckpointError, match=r"is not a folder that transformers can load: ") as caught:
            hf.open_model(str(copied(folder, tmp_path / name, **keys)))
        assert "\n" not in str(caught.value)
    short = copied(folder, tmp_path / "short")
    whole = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors: "):
        hf.open_model(str(short))
    with pytest.raises(MisuseError, match="Unknown attention 'flash'; choose one of: eager, sdpa"):
        hf.open_model(str(folder), attention="flash")


def test_a_name_is_found_in_the_local_cache_or_the_way_to_fetch_it_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "hub" / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert local_folder("owner/tiny") == snapshot
    assert local_folder(str(folder)) == folder
    with pytest.raises(
        MisuseError, match=r"owner/other is not a folder .* nothing is downloaded .*: hf download owner/other"
    ):
        local_folder("owner/other")
    for name in ("", "other", "./a/b", "a/b/c", "/nowhere/at"):
        with pytest.raises(MisuseError, match=r"is neither a folder nor a Hub name"):
            local_folder(name)
    with pytest.raises(MisuseError, match=r"is not a valid Hub name"):
        local_folder("owner/..bad--name")
    with pytest.raises(
        MisuseError, match=r"expects a folder or OWNER/NAME, and .*model\.safetensors is a file\. Without hf:"
    ):
        local_folder(str(folder / "model.safetensors"))


def test_options_that_belong_to_the_other_kind_of_model(folder: Path, stabilitykit: Run) -> None:
    for arguments, message in (
        ((f"hf:{folder}", "--rounding", "gemma_pytorch"), "rounding applies to the kit's own model only"),
        (
            (str(folder), "--attention", "sdpa"),
            "attention, adapter and trust_remote_code apply to transformers' models only",
        ),
        ((str(folder), "--trust-remote-code"), "put hf: before the folder or the name"),
        (("hf:owner/nothing",), "hf download owner/nothing"),
    ):
        refused = stabilitykit("profile", *arguments, "--prompt", "a")
        assert refused.code == 2
        assert message in " ".join(refused.err.split())
        assert "Traceback" not in refused.err


CONFIG_CODE = """
from pathlib import Path
from transformers import Gemma3TextConfig
Path({marker!r}).touch()
class OwnConfig(Gemma3TextConfig):
    model_type = "own"
"""
MODEL_CODE = """
from transformers import Gemma3ForCausalLM
from .own_config import OwnConfig
class OwnModel(Gemma3ForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code_of_its_own(folder: Path, to: Path, part: str, marker: Path) -> Path:
    """A copy whose model, or whose tokenizer, is defined by code in the folder that touches `marker` when it runs."""
    if part == "model":
        auto_map = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
        made = copied(folder, to, model_type="own", auto_map=auto_map)
        (made / "own_config.py").write_text(CONFIG_CODE.format(marker=str(marker)))
        (made / "own_model.py").write_text(MODEL_CODE)
        return made
    made = copied(folder, to)
    (made / "own_tokenizer.py").write_text(TOKENIZER_CODE.format(marker=str(marker)))
    path = made / "tokenizer_config.json"
    code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"model_type": "own"}))  # a type with a tokenizer: no code
    return made


def without_progress(stderr: str) -> str:
    """Without the lines that a slow machine gets to see: `3 s: float16: running layers`."""
    return re.sub(r"^\d+ s: .*\n", "", stderr, flags=re.MULTILINE)


@pytest.mark.parametrize(("command", "part"), [("profile", "model"), ("forecast", "tokenizer")])
def test_code_in_a_folder_runs_only_where_it_was_asked_for(
    command: str, part: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, with a "y" waiting for whoever should ask."""
    marker = tmp_path / "ran"
    made = with_code_of_its_own(folder, tmp_path / "own", part, marker)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # where transformers copies the code to
    call = [sys.executable, "-m", "stabilitykit", command, f"hf:{made}", "--prompt", "a"]
    refused = subprocess.run(call, input="y\n" * 5, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "brings Python code of its own, which was not run. If you trust its author, run it with" in refused.stderr
    assert refused.stdout == ""
    assert not marker.exists()
    trusted = subprocess.run([*call, "--trust-remote-code"], input="", capture_output=True, text=True, check=False)
    assert marker.exists()
    if part == "model":
        assert (trusted.returncode, without_progress(trusted.stderr)) == (0, "")


def test_streaming_a_model_of_its_own_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    made = with_code_of_its_own(folder, tmp_path / "own", "model", marker)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = (
        "import sys, stabilitykit.models.transformers as hf\n"
        "print(type(hf.open_model(sys.argv[1], stream=True, trust_remote_code=sys.argv[2] == 'True').module).__name__)"
    )
    for trust in (False, True):
        call = [sys.executable, "-c", code, str(made), str(trust)]
        ran = subprocess.run(call, input="y\n" * 5, capture_output=True, text=True, check=False)
        assert (ran.returncode == 0, marker.exists()) == (trust, trust)
    assert ran.stdout == "OwnModel\n"


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_special_tokens_are_read_in_a_turn_too(prefix: str, folder: Path, stabilitykit: Run) -> None:
    common = ("profile", f"{prefix}{folder}", "--chat", "--prompt", "a<eos>b", "--level", "layers", "--json")
    for arguments, there in (((), False), (("--special-tokens",), True)):
        tokens = json.loads(stabilitykit(*common, *arguments).out)["tokens"]
        assert (1 in tokens) == there
        assert tokens[0] == 2
    assert json.loads(stabilitykit(*common, "--no-bos").out)["tokens"][0] == 260


@pytest.mark.slow
def test_no_library_speaks_beside_the_findings(folder: Path, adapter: Path) -> None:
    """In a process of its own: what is said at an import is said once."""
    arguments = ("profile", f"hf:{folder}", "--prompt", "a", "--adapter", str(adapter), "--level", "layers")
    shown = subprocess.run(
        [sys.executable, "-m", "stabilitykit", *arguments], capture_output=True, text=True, check=True
    )
    assert without_progress(shown.stderr) == ""
    assert "with an adapter of peft's." in shown.stdout


def test_any_family_of_a_folder_is_profiled(tmp_path: Path, stabilitykit: Run) -> None:
    family_model("qwen3").save_pretrained(tmp_path / "qwen")
    write_tokenizer(tmp_path / "qwen")
    found = json.loads(stabilitykit("profile", f"hf:{tmp_path / 'qwen'}", "--prompt", "Hi", "--json").out)
    assert found["finite"]
    refused = stabilitykit("profile", str(tmp_path / "qwen"), "--prompt", "Hi")
    assert refused.code == 2
    assert f"Run it with transformers instead: hf:{tmp_path / 'qwen'}" in " ".join(refused.err.split())


@pytest.mark.table
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_model_makes_the_same_records(name: str, dtype: str, tmp_path: Path) -> None:
    """Over a prompt and two more steps with transformers' cache; its vectors alone are in memory between them."""
    family_model(name, torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    whole, streamed = (hf.open_model(str(tmp_path), dtype=dtype, stream=stream) for stream in (False, True))
    ids = torch.tensor([[2, 70, 71, 399]])
    assert torch.equal(whole.module(ids).logits, streamed.module(ids).logits)
    records, found = (list(run_case(model, ids[0].tolist(), new_tokens=3).recording) for model in (whole, streamed))
    assert found == records
    for parameter in streamed.module.parameters():
        assert parameter.ndim == 1 or parameter.untyped_storage().nbytes() == parameter.element_size()
    assert (STREAMED in streamed.notes, STREAMED in whole.notes) == (True, False)


def test_an_adapter_is_run_on_a_streamed_model(folder: Path, adapter: Path) -> None:
    ids = torch.tensor([[2, 70, 71]])
    whole, streamed = (hf.open_model(str(folder), adapter=adapter, stream=stream) for stream in (False, True))
    assert torch.equal(whole.module(ids).logits, streamed.module(ids).logits)
    with torch.inference_mode(), record(whole.module) as expected:
        whole.module(ids)
    with torch.inference_mode(), record(streamed.module) as found:
        streamed.module(ids)
    assert list(found) == list(expected)


def test_a_streamed_model_ends_where_its_generation_config_says(folder: Path, tmp_path: Path) -> None:
    ended = copied(folder, tmp_path / "ended")
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    for stream in (False, True):
        assert hf.open_model(str(ended), stream=stream).causal.generation_config.eos_token_id == [1, 7]


def test_what_cannot_be_streamed_is_refused(folder: Path, tmp_path: Path) -> None:
    import transformers

    quantised = copied(folder, tmp_path / "quantised", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(MisuseError, match=r"those of .*quantised are quantised.* Leave out --stream"):
        hf.open_model(str(quantised), stream=True)
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    with pytest.raises(MisuseError, match=r"makes 4 weights of experts out of several .*experts.*Leave out --stream"):
        hf.open_model(str(tmp_path / "experts"), stream=True)
    for keys, message in (({"num_hidden_layers": 4, "layer_types": None}, "13 tensors that .* are missing"), (
        {"intermediate_size": 96}, "of another shape|size mismatch|cannot"
    )):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            hf.open_model(str(copied(folder, tmp_path / str(len(message)), **keys)), stream=True)


def test_what_does_not_fit_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch, stabilitykit: Run) -> None:
    monkeypatch.setattr("stabilitykit.models.memory.available_memory", lambda device: 1 << 16)
    for source in (str(folder), f"hf:{folder}"):
        shown = stabilitykit("profile", source, "--prompt", "Hello")
        assert STREAMED in " ".join(shown.out.split())
    monkeypatch.setattr("stabilitykit.models.memory.available_memory", lambda device: 1 << 40)
    for source in (str(folder), f"hf:{folder}"):
        assert STREAMED not in " ".join(stabilitykit("profile", source, "--prompt", "Hello").out.split())
        forced = stabilitykit("profile", source, "--prompt", "Hello", "--stream")
        assert STREAMED in " ".join(forced.out.split())

"""What is wrong with a checkpoint, said in one sentence each."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from written import gemma_pytorch_state, write_gemma_pytorch, write_huggingface

from stabilitykit.checkpoints import Checkpoint, open_checkpoint, random_checkpoint
from stabilitykit.checkpoints.config import RELEASED
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.gemma import build

SHAPE = "layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16&vocabulary=512"
SPEC = f"random:gemma3-270m?{SHAPE}&window=4&global_every=2"


@pytest.fixture
def checkpoint() -> Checkpoint:
    return random_checkpoint(SPEC)


def load(path: Path, tmp_path: Path) -> None:
    build(open_checkpoint(path, cache=tmp_path / "cache"))


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | keys).items() if value != "gone"}
    path.write_text(json.dumps(config))


def _missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _short_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def _other_tokenizer(folder: Path) -> None:
    other = write_huggingface(random_checkpoint(SPEC.replace("=512", "=900")), folder / "other")
    (other / "tokenizer.model").rename(folder / "tokenizer.model")


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (_missing_shard, r"names 3 weight files, but model-00002-of-00003\.safetensors is not in"),
    "short shard": (_short_shard, r"model-00002-of-00003\.safetensors cannot be read as safetensors: .* truncated"),
    "no weights": (_no_weights, r"holds no weights: expected model\.safetensors, or .* Was only the config"),
    "no tokenizer": (_no_tokenizer, r"has neither tokenizer\.model nor tokenizer\.json\. Copy it there"),
    "other tokenizer": (_other_tokenizer, r"one piece per row .*; tokenizer\.model has 900 pieces .* 512 rows"),
    "no JSON": (_no_json, r"config\.json cannot be read as JSON: .* Download it again"),
    "a list": (_a_list, r"config\.json must hold a JSON object, got a list"),
    "other architecture": (lambda f: change(f, model_type="llama"), r"unknown model_type 'llama'; .* hf:/.*/hf$"),
    "no architecture": (lambda f: change(f, model_type="gone"), r"unknown model_type None"),
    "other width": (lambda f: change(f, intermediate_size=96), r"shapes do not match the config: layers\.0\.mlp\.gate"),
    "more layers": (
        lambda f: change(f, num_hidden_layers=3),
        r"13 missing \(layers\.2\.input_layernorm.*The config has another number of layers than the weights",
    ),
    "other generation": (
        lambda f: change(f, model_type="gemma2"),
        r"4 unexpected \(.*Only Gemma 3 normalises queries and keys: config and weights are of different",
    ),
    "other activation": (lambda f: change(f, hidden_activation="silu"), r"not support the activation 'silu'"),
    "looking ahead": (lambda f: change(f, use_bidirectional_attention=True), r"not support bidirectional attention"),
    "quantised": (lambda f: change(f, quantization_config={}), r"not support quantised weights"),
    "other rotation": (
        lambda f: change(f, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        r"this config asks for default, yarn\. Run it with transformers",
    ),
    "odd layers": (
        lambda f: change(f, layer_types=["full_attention", "sliding_attention"]),
        r"every n-th layer is global and the others slide; layer_types says otherwise",
    ),
    "a size that is none": (lambda f: change(f, num_hidden_layers="many"), r"sizes must be numbers: invalid literal"),
    "a fraction of a channel": (lambda f: change(f, head_dim=16.5), r"sizes must be numbers: 16\.5 is not an integer"),
    "true for a size": (lambda f: change(f, num_attention_heads=True), r"must be numbers: True is not an integer"),
    "a fraction of a period": (
        lambda f: change(f, sliding_window_pattern=2.5),
        r"sizes must be numbers: 2\.5 is not an integer",
    ),
    "no width": (lambda f: change(f, hidden_size=0), r"at least 1, got hidden_size = 0"),
    "no context": (lambda f: change(f, max_position_embeddings=0), r"context must be positive and finite, got 0\."),
    "no window": (lambda f: change(f, sliding_window=0), r"window must be positive and finite, got 0\."),
    "no period": (lambda f: change(f, sliding_window_pattern=0), r"global_every must be positive and finite, got 0\."),
    "no query scale": (lambda f: change(f, query_pre_attn_scalar=0), r"query_scalar must be positive .*, got 0\.0"),
    "a negative base": (lambda f: change(f, rope_theta=-1e4), r"rope_base must be positive and finite, got -10000\.0"),
    "an infinite base": (
        lambda f: change(f, rope_local_base_freq=float("inf")),
        r"rope_base_local must be positive and finite, got inf",
    ),
    "no scaling": (
        lambda f: change(f, rope_scaling={"rope_type": "linear", "factor": 0.0}),
        r"rope_scaling must be positive and finite, got 0\.0",
    ),
    "too few kinds of layer": (
        lambda f: change(f, layer_types=["sliding_attention"]),
        r"layer_types must have one entry per layer, got 1 for num_hidden_layers = 2",
    ),
    "too many kinds of layer": (
        lambda f: change(f, layer_types=["full_attention"] * 3),
        r"layer_types must have one entry per layer, got 3 for num_hidden_layers = 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_told_apart(damage: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = write_huggingface(checkpoint, tmp_path / "hf", shards=3)
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, tmp_path)
    assert "\n" not in str(caught.value)


def fast_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """A tokenizer.json of the random vocabulary, as far as it is read."""
    ids = {piece: index for index, piece in enumerate(checkpoint.vocabulary.pieces)}
    model = {"type": "BPE", "byte_fallback": True, "vocab": ids, "merges": ["a b"]}
    added = [{"id": ids[name], "content": name, "special": True} for name in ("<pad>", "<eos>", "<bos>", "<unk>")]
    return {"model": model, "added_tokens": added}


TOKENIZER_DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda made: [made],
    "no model": lambda made: made | {"model": None},
    "a list for a model": lambda made: made | {"model": []},
    "no merges": lambda made: made | {"model": made["model"] | {"merges": None}},
    "half a merge": lambda made: made | {"model": made["model"] | {"merges": ["ab"]}},
    "no pieces": lambda made: made | {"model": made["model"] | {"vocab": {}}, "added_tokens": []},
    "fewer pieces than 4": lambda made: made | {"model": made["model"] | {"vocab": {"a": 0}}, "added_tokens": []},
    "text for ids": lambda made: made | {"model": made["model"] | {"vocab": {"a": "0"}}},
    "negative ids": lambda made: made | {"model": made["model"] | {"vocab": {"a": -9}}, "added_tokens": []},
    "an added token without an id": lambda made: made | {"added_tokens": [{"content": "<bos>"}]},
    "no added tokens": lambda made: made | {"added_tokens": None},
}  # fmt: skip


@pytest.fixture
def fast_folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    folder = write_huggingface(checkpoint, tmp_path / "hf")
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer(checkpoint)))
    return folder


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGES)
def test_a_damaged_fast_tokenizer_is_told_apart(damage: str, fast_folder: Path, tmp_path: Path) -> None:
    load(fast_folder, tmp_path)
    path = fast_folder / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER_DAMAGES[damage](json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a fast tokenizer") as caught:
        load(fast_folder, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_fast_tokenizer_of_another_kind(fast_folder: Path, tmp_path: Path) -> None:
    path = fast_folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    for other in ({"byte_fallback": False}, {"type": "Unigram", "vocab": [["a", 0.0]]}):
        path.write_text(json.dumps(whole | {"model": whole["model"] | other}))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a Gemma.* expected BPE with byte fallback"):
            load(fast_folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.gate_proj.weight_scaler", "int8 weights, which cannot be dequantised without them"),
        ("model.layers.0.mlp.gate_proj.weight.absmax", "quantised by bitsandbytes, AWQ or GPTQ.* hf:FOLDER"),
        ("model.layers.0.mlp.gate_proj.qweight", "quantised by bitsandbytes, AWQ or GPTQ.* hf:FOLDER"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "This is an adapter"),
        ("model.layers.0.self_attn.qkv_proj.weight", "gemma_pytorch's names"),
        ("blk.0.attn_q.weight", "GGUF's names"),
        ("something.else", "Are the weights of another Gemma, or of another model"),
    ],
)
def test_names_that_do_not_belong_say_which_mistake_that_usually_is(
    name: str, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = dict(checkpoint.tensors) | {name.removeprefix("model."): torch.zeros(2)}
    folder = write_huggingface(checkpoint_with(checkpoint, made), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=rf"1 unexpected \({name.removeprefix('model.')}\).*{message}"):
        load(folder, tmp_path)


def checkpoint_with(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return replace(checkpoint, tensors=tensors)


def test_a_head_of_its_own_is_refused_and_a_copy_of_the_embedding_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    embedding = checkpoint.tensors["embed_tokens.weight"]
    for name, head in (("same", embedding.clone()), ("other", embedding + 1)):
        made = dict(checkpoint.tensors) | {"lm_head.weight": head}
        folder = write_huggingface(checkpoint_with(checkpoint, made), tmp_path / name, prefix="")
        if name == "same":
            load(folder, tmp_path)
        else:
            with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
                load(folder, tmp_path)


class Harm:
    """A pickle that writes a file when it is opened without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_its_code_does_not_run(zipped: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "model.ckpt"
    torch.save({"model_state_dict": Harm(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.ckpt was refused, because .* could run code: ") as caught:
        open_checkpoint(path, cache=tmp_path / "cache")
    assert "GLOBAL" in str(caught.value)
    assert "add_safe_globals" not in str(caught.value)  # torch's advice: let it run
    assert not ran.exists()
    torch.load(path, weights_only=False)  # the code is real
    assert ran.exists()


def test_files_that_are_no_checkpoint_of_gemma_pytorchs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(tmp_path / name, cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)

    refused("nothing.ckpt", r"nothing\.ckpt does not exist\. Download")
    (tmp_path / "text.ckpt").write_text("hello")
    refused("text.ckpt", r"text\.ckpt (cannot be read as|was refused)")
    whole = write_gemma_pytorch(checkpoint, tmp_path / "gp")
    (tmp_path / "short.ckpt").write_bytes(whole.read_bytes()[:5000])
    refused("short.ckpt", r"short\.ckpt cannot be read as a file of torch\.save: .* truncated; download it again")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused("list.ckpt", r"list\.ckpt must hold a dictionary of tensors, .* got a list")
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "names.ckpt")
    refused(
        "names.ckpt", r"names\.ckpt has no embedder\.weight, .* holds model\.norm\.weight\. .* Hugging Face's names"
    )
    torch.save({"model_state_dict": gemma_pytorch_state(checkpoint)}, tmp_path / "alone.ckpt")
    refused("alone.ckpt", r"needs its tokenizer\.model, and there is none in ")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    refused("plain.ckpt", r"plain\.ckpt was refused, because .* could run code: Unsupported operand 149\.")


def test_int8_weights_without_their_scalers_and_scalers_without_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_gemma_pytorch(checkpoint, tmp_path / "gp", int8=True)
    state = gemma_pytorch_state(checkpoint, int8=True)
    name = "model.layers.0.mlp.gate_proj.weight"
    torch.save({"model_state_dict": state | {name: state[name].float()}}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(layers\.0\.mlp\.gate_proj\.weight_scaler\).* int8 "):
        load(path, tmp_path)
    torch.save({"model_state_dict": {key: value for key, value in state.items() if key != f"{name}_scaler"}}, path)
    with pytest.raises(CheckpointError, match=r"int8 weight layers\.0\.mlp\.gate_proj\.weight has no scaler"):
        load(path, tmp_path)


def test_tensors_of_another_shape_than_a_matrix_or_its_scaler(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_gemma_pytorch(checkpoint, tmp_path / "gp")
    gate = "model.layers.0.mlp.gate_proj.weight"
    for name, tensor in (("embedder.weight", torch.ones(512)), (gate, torch.tensor(1.0))):
        torch.save({"model_state_dict": gemma_pytorch_state(checkpoint) | {name: tensor}}, path)
        with pytest.raises(CheckpointError, match=r"model\.ckpt: .* must be matrices, and one is not"):
            load(path, tmp_path)
    state = gemma_pytorch_state(checkpoint, int8=True)
    for scaler in (torch.ones(63), torch.ones(64, 1), torch.tensor(1.0)):
        torch.save({"model_state_dict": state | {f"{gate}_scaler": scaler}}, path)
        with pytest.raises(
            CheckpointError, match=r"one scaler per row; layers\.0\.mlp\.gate_proj\.weight is \[64, 32\]"
        ):
            load(path, tmp_path)


def test_a_released_size_without_its_last_layers(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gemma_pytorch(checkpoint, tmp_path / "gp")
    monkeypatch.setitem(RELEASED, "gemma3-tiny", replace(checkpoint.config, layers=3))
    with pytest.raises(
        CheckpointError, match=r"model\.ckpt: the sizes are those of gemma3-tiny, .* 3 layers, but only 2 are there\."
    ):
        load(path, tmp_path)
    monkeypatch.setitem(RELEASED, "gemma3-tiny", replace(checkpoint.config, layers=1))
    assert "(of no released model)" in open_checkpoint(path, cache=tmp_path / "cache").notes[0]
    monkeypatch.setitem(RELEASED, "gemma3-tiny", checkpoint.config)
    assert open_checkpoint(path, cache=tmp_path / "cache").notes == ()


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has neither config\.json .* \(gemma_pytorch\)\.$"):
        open_checkpoint(tmp_path, cache=tmp_path / "cache")
    for name in ("a.ckpt", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(MisuseError, match=r"It holds a\.ckpt and b\.gguf; pass one of them"):
        open_checkpoint(tmp_path, cache=tmp_path / "cache")

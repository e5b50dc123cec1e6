"""Checkpoints of each format, written and read back: the same weights, the same tokens, the same logits."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from written import gemma_pytorch_state, huggingface_config, write_gemma_pytorch, write_huggingface

from reference import reference_model
from stabilitykit.checkpoints import Checkpoint, open_checkpoint, random_checkpoint
from stabilitykit.checkpoints.huggingface import VISION_NOTE, gemma_config
from stabilitykit.diagnosis import verdict
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.run.case import run_case

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}",
    2: f"random:gemma2-2b?{SHAPE}&window=4",
    3: f"random:gemma3-270m?{SHAPE}&window=4&global_every=2&rope_scaling=8",
}
TOKENS = torch.tensor([[2, 70, 71, 72, 73, 74, 75, 76]])
REAL = torch.tensor([[2, 818, 5279, 529, 7001, 563]])


def logits(checkpoint: Checkpoint, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = build(checkpoint)(tokens)
    return made


@pytest.mark.parametrize("options", [{}, {"new": True}, {"shards": 3}, {"prefix": ""}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_hugging_face_folder_comes_back(generation: int, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SPECS[generation])
    opened = open_checkpoint(write_huggingface(checkpoint, tmp_path / "hf", **options), cache=tmp_path / "cache")
    assert opened.config == checkpoint.config
    assert opened.vocabulary == replace(checkpoint.vocabulary, types=opened.vocabulary.types)
    dtype = options.get("dtype", torch.float32)
    assert {tensor.dtype for tensor in opened.tensors.values()} == {dtype}
    rounded = {name: tensor.to(dtype).float() for name, tensor in checkpoint.tensors.items()}
    assert torch.equal(logits(opened), logits(replace(checkpoint, tensors=rounded)))


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_what_transformers_writes_is_read_and_computes_the_same(generation: int, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SPECS[generation])
    model = reference_model(build(checkpoint))
    model.save_pretrained(tmp_path / "hf")
    shutil.copy(write_huggingface(checkpoint, tmp_path / "ours") / "tokenizer.model", tmp_path / "hf")
    with torch.inference_mode():
        theirs = model(TOKENS).logits
    opened = open_checkpoint(tmp_path / "hf", cache=tmp_path / "cache")
    assert opened.config == checkpoint.config
    assert torch.equal(logits(opened), theirs)


@pytest.mark.filterwarnings("ignore")  # transformers' own, about images that no prompt here has
def test_the_text_part_of_a_multimodal_gemma_is_read_and_said_to_be_only_that(tmp_path: Path) -> None:
    text = huggingface_config(random_checkpoint(SPECS[3]).config, new=True) | {"query_pre_attn_scalar": 16}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text), vision_config=vision, mm_tokens_per_image=4
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    shutil.copy(write_huggingface(random_checkpoint(SPECS[3]), tmp_path / "o") / "tokenizer.model", tmp_path / "hf")
    with torch.inference_mode():
        theirs = model(TOKENS).logits
    opened = open_checkpoint(tmp_path / "hf", cache=tmp_path / "cache")
    assert opened.notes == (VISION_NOTE,)
    assert torch.equal(logits(opened), theirs)
    run = run_case(build(opened), TOKENS[0].tolist())
    assert verdict(run.recording).endswith("Only the text part was examined, not what reads images.")


def test_a_released_multimodal_config_leaves_most_out_and_means_the_defaults() -> None:
    """What google/gemma-3-4b-it's config.json says of its text part."""
    said: dict[str, Any] = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config, multimodal = gemma_config({"model_type": "gemma3", "text_config": said, "vision_config": {}}, Path("x"))
    assert multimodal
    expected = transformers.Gemma3TextConfig(**said)
    assert (config.heads, config.kv_heads, config.head_dim) == (
        expected.num_attention_heads, expected.num_key_value_heads, expected.head_dim,
    )  # fmt: skip
    assert (config.vocabulary, config.context) == (expected.vocab_size, expected.max_position_embeddings)
    assert [config.is_global(i) for i in range(34)] == [kind == "full_attention" for kind in expected.layer_types]
    assert (config.rope_base, config.rope_base_local, config.rope_scaling) == (1e6, 1e4, 8.0)
    assert (config.query_scalar, config.attention_softcap, config.logit_softcap) == (256, None, None)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_gemma_pytorch_checkpoint_comes_back(generation: int, shards: int, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SPECS[generation])
    opened = open_checkpoint(write_gemma_pytorch(checkpoint, tmp_path / "gp", shards=shards), cache=tmp_path / "cache")
    assert opened.config.generation == generation
    assert set(opened.tensors) == set(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(opened.tensors[name], tensor), name
    assert "sizes inferred from the tensors" in opened.notes[0]
    assert (opened.config.layers, opened.config.heads, opened.config.kv_heads) == (3, 4, 2)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_int8_is_dequantised_row_by_row_one_tensor_at_a_time(generation: int, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SPECS[generation])
    opened = open_checkpoint(write_gemma_pytorch(checkpoint, tmp_path, int8=True), cache=tmp_path / "cache")
    state = gemma_pytorch_state(checkpoint, int8=True)
    scaler = state["model.layers.0.self_attn.qkv_proj.weight_scaler"][64:96]  # k's rows, after 4 heads of q
    name = "layers.0.self_attn.k_proj.weight"
    step = scaler[:, None]
    assert float(((opened.tensors[name] - checkpoint.tensors[name]).abs() / step).max()) <= 0.5 + 1e-5
    assert opened.tensors[name].dtype == torch.float32
    assert "weights dequantised from int8" in opened.notes
    assert opened.blocks[name] == opened.tensors[name].shape[1]  # a row shares its scaler
    assert "norm.weight" not in opened.blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("real")
    yield made
    shutil.rmtree(made)


def test_the_270m_as_a_hugging_face_folder(checkpoint_270m: Checkpoint, folder: Path) -> None:
    opened = open_checkpoint(write_huggingface(checkpoint_270m, folder / "hf", shards=2), cache=folder / "cache")
    assert opened.config == checkpoint_270m.config
    assert torch.equal(logits(opened, REAL), logits(checkpoint_270m, REAL))
    theirs = Tokenizer(checkpoint_270m.vocabulary)
    for text in ("The capital of France is", "def f(x):\n        return x", "Größe 東京 مرحبا 🙂", "3.14159" * 5):
        assert Tokenizer(opened.vocabulary).encode(text) == theirs.encode(text)


def test_the_270m_as_a_gemma_pytorch_checkpoint(checkpoint_270m: Checkpoint, folder: Path) -> None:
    opened = open_checkpoint(write_gemma_pytorch(checkpoint_270m, folder / "gp"), cache=folder / "cache")
    assert (opened.config, opened.notes) == (checkpoint_270m.config, ())  # its sizes are a released checkpoint's
    assert torch.equal(logits(opened, REAL), logits(checkpoint_270m, REAL))


def test_the_270m_in_int8_is_within_half_a_step_of_itself(checkpoint_270m: Checkpoint, folder: Path) -> None:
    opened = open_checkpoint(write_gemma_pytorch(checkpoint_270m, folder / "int8", int8=True), cache=folder / "cache")
    worst = 0.0
    for name, tensor in checkpoint_270m.tensors.items():
        if tensor.ndim == 2:
            step = tensor.abs().amax(1, keepdim=True) / 127
            worst = max(worst, float(((opened.tensors[name] - tensor).abs() / step.clamp_min(1e-30)).max()))
        else:
            assert torch.equal(opened.tensors[name], tensor)
    assert worst <= 0.5 + 1e-4, f"the largest error is {worst} steps"
    p, q = (logits(c, REAL)[0].double().log_softmax(-1) for c in (checkpoint_270m, opened))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < 0.05, f"mean KL {kl} nats a token"  # quantisation, shown: not nothing, and not another model


@pytest.mark.parametrize("kind", ["model", "json"])
def test_both_tokenizer_files_give_the_tokens_of_the_gguf(
    kind: str, checkpoint_270m: Checkpoint, gguf_270m: Path, tmp_path: Path
) -> None:
    from stabilitykit.checkpoints.vocabulary import folder_vocabulary, serialised

    if kind == "model":
        (tmp_path / "tokenizer.model").write_bytes(serialised(checkpoint_270m.vocabulary))
    else:
        fast = transformers.AutoTokenizer.from_pretrained(gguf_270m.parent, gguf_file=gguf_270m.name)
        fast.save_pretrained(tmp_path)
    read, theirs = Tokenizer(folder_vocabulary(tmp_path, 262144)), Tokenizer(checkpoint_270m.vocabulary)
    texts = [
        "The capital of France is", "def f(x):\n\t\treturn {x: [1, 2]}  # ünïcode", "Größe 東京 مرحبا हिन्दी 🙂",
        "3.141592653589793" * 3, " " * 31 + "x", "<bos>a<start_of_turn>user\nb<end_of_turn>", "\x00\x7f",
    ]  # fmt: skip
    for text in texts:
        assert read.encode(text) == theirs.encode(text), text
    assert read.encode("<bos>a<end_of_turn>", special_tokens=True) == theirs.encode(
        "<bos>a<end_of_turn>", special_tokens=True
    )


def test_a_config_is_the_same_with_old_keys_and_new() -> None:
    for generation in (1, 2, 3):
        config = random_checkpoint(SPECS[generation]).config
        for new in (False, True):
            assert gemma_config(huggingface_config(config, new=new), Path("x"))[0] == config


def test_old_torch_files_of_hugging_face_are_read_too(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SPECS[2])
    made = write_huggingface(checkpoint, tmp_path / "hf")
    (made / "model.safetensors").unlink()
    state = {f"model.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    torch.save(state, made / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # torch's oldest format
    assert torch.equal(logits(open_checkpoint(made, cache=tmp_path / "cache")), logits(checkpoint))


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    opened = open_checkpoint(write_huggingface(random_checkpoint(SPECS[3]), tmp_path / "hf"), cache=tmp_path / "cache")
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "hf" / "model.safetensors") in maps
    assert opened.tensors

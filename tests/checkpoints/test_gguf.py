import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stabilitykit import profile
from stabilitykit.checkpoints import RELEASED, Checkpoint, GemmaConfig, random_checkpoint
from stabilitykit.checkpoints.gguf import gemma_config, read_gguf
from stabilitykit.checkpoints.gguf_file import GgufFile, GgufTensor, read_gguf_file
from stabilitykit.diagnosis import document
from stabilitykit.errors import CheckpointError

GENERATIONS = [1, 2, 3]


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Path], Checkpoint]:
    return lambda path: read_gguf(path, cache=tmp_path / "cache")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_gemma_comes_back_as_it_was_written(
    generation: int, write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint], tiny: dict[int, str]
) -> None:
    written = random_checkpoint(tiny[generation])
    checkpoint = read(write_gguf(generation))
    assert checkpoint.config == written.config
    assert checkpoint.vocabulary == replace(
        written.vocabulary, pieces=tuple(piece.replace(" ", "▁") for piece in written.vocabulary.pieces)
    )
    assert list(checkpoint.tensors) == list(written.tensors)
    for name, tensor in written.tensors.items():
        if tensor.dim() == 1:  # gains are stored as 1 + w
            assert torch.equal(checkpoint.tensors[name] + 1, tensor + 1), name
        else:
            assert torch.equal(checkpoint.tensors[name], tensor), name
    assert checkpoint.notes[0] == "weights stored in F32"
    assert "Gemma Terms of Use" in checkpoint.notes[1]


def test_every_gain_comes_back_to_the_last_bit(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint]
) -> None:
    w = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[3.0], [1e-3]])
    gains = (w + 1).numpy()
    tensors = read(write_gguf(3, tensors={"output_norm.weight": gains[0], "blk.0.ffn_norm.weight": gains[1]})).tensors
    assert np.array_equal((tensors["norm.weight"] + 1).numpy(), gains[0])
    assert np.array_equal((tensors["layers.0.pre_feedforward_layernorm.weight"] + 1).numpy(), gains[1])


@pytest.mark.parametrize("size", RELEASED)
def test_the_config_of_every_released_size_follows_from_its_metadata(
    size: str, architecture_keys: Callable[[GemmaConfig], dict[str, Any]]
) -> None:
    config = RELEASED[size]
    row = np.empty((1, 4), np.uint8)
    one = GgufTensor(shape=(config.vocabulary, 1), type=gguf.GGMLQuantizationType.F32, rows=row)
    names = ["token_embd.weight", *(f"blk.{layer}.attn_norm.weight" for layer in range(config.layers))]
    file = GgufFile(path=Path("x.gguf"), metadata=architecture_keys(config), tensors=dict.fromkeys(names, one))
    assert gemma_config(file) == config


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({"gemma3.attention.sliding_window_pattern": 2}, {"global_every": 2}),
        ({"gemma3.attention.sliding_window_pattern": [True, False]}, {"global_every": 2}),
        ({"gemma3.attention.sliding_window_pattern": [True, True]}, {"global_every": 3}),
        ({"gemma3.rope.freq_base_swa": 500.0}, {"rope_base_local": 500.0}),
        ({"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, {"rope_scaling": 8.0}),
        ({"gemma3.rope.scaling.type": "none", "gemma3.rope.scaling.factor": 8.0}, {}),
        ({"gemma3.final_logit_softcapping": 30.0}, {"logit_softcap": 30.0}),
        ({"gemma3.final_logit_softcapping": 0.0}, {}),
        ({"gemma3.attention.layer_norm_rms_epsilon": 1e-5}, {"rms_eps": 1e-5}),
        ({"gemma3.attention.key_length": None, "gemma3.attention.value_length": None}, {}),
    ],
)
def test_optional_metadata(
    write_gguf: Callable[..., Path],
    read: Callable[[Path], Checkpoint],
    tiny: dict[int, str],
    keys: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    expected = replace(random_checkpoint(tiny[3]).config, **changes)
    assert read(write_gguf(3, keys=keys)).config == expected


def test_quantised_weights_are_those_of_the_reference_implementation(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint]
) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(3, kind=kind, keys={"general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0)})
    checkpoint = read(path)
    assert checkpoint.notes[0] == "weights dequantised from Q8_0"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in {
        "embed_tokens.weight": "token_embd.weight",
        "layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        expected = gguf.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        assert stored[theirs].tensor_type == kind
        assert np.array_equal(checkpoint.tensors[ours].numpy(), expected), ours


WIDE = "random:gemma3-270m?layers=1&hidden_size=256&feed_forward=256&heads=1&kv_heads=1&vocabulary=263&window=16"
KINDS = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bits make scales that overflow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_quantisation_that_the_gguf_package_reads_is_read(
    kind: gguf.GGMLQuantizationType, write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint]
) -> None:
    path = write_gguf(3, kind=kind, spec=WIDE, noise=True)
    checkpoint = read(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    expected = gguf.dequantize(stored.data, kind)
    found = checkpoint.tensors["layers.0.mlp.up_proj.weight"].float().numpy()
    assert found.shape == (256, 256)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize(("bits", "value"), [(b"\x00\x7c", "inf"), (b"\x00\x7e", "nan")])
def test_a_block_whose_scale_is_not_finite_is_named(
    write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: bytes, value: str
) -> None:
    """Before anything runs: block 5 of rows of four is the second of the second row."""
    spec = "random:gemma3-270m?layers=1&hidden_size=128&feed_forward=128&heads=1&kv_heads=1&head_dim=32&vocabulary=263"
    path = write_gguf(3, kind=gguf.GGMLQuantizationType.Q8_0, spec=spec)
    content = bytearray(path.read_bytes())
    start = content.index(read_gguf_file(path).tensors["blk.0.ffn_up.weight"].rows.tobytes())
    content[start + 5 * 34 : start + 5 * 34 + 2] = bits  # a block is its float16 scale, then 32 bytes
    path.write_bytes(content)
    monkeypatch.setenv("STABILITYKIT_CACHE", str(tmp_path / "cache"))
    found = profile(path, "Hi", dtypes=["float16", "bfloat16"], level="layers")
    for dtype in ("float16", "bfloat16"):
        weights = found[dtype].header.weights
        assert weights is not None
        worst = weights.worst[0]
        assert (worst.name, worst.nonfinite) == ("layers.0.mlp.up_proj.weight", 32)
        assert (worst.index, worst.block, worst.block_size) == ((1, 32), 5, 32)
        assert str(worst.value).lstrip("-") in (value, "nan")  # inf times a zero is NaN
        told = json.loads(json.dumps(document(found[dtype]), allow_nan=False))["weights"]["worst"][0]
        assert (told["index"], told["block"], told["value"]) == ([1, 32], 5, str(worst.value))


def test_the_270m_is_read_as_the_gguf_package_reads_it(gguf_270m: Path, checkpoint_270m: Checkpoint) -> None:
    assert checkpoint_270m.config == RELEASED["gemma3-270m"]
    assert checkpoint_270m.source == "gemma3-270m"
    assert checkpoint_270m.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    assert checkpoint_270m.notes[0] == "weights dequantised from Q4_K_M"
    reader = gguf.GGUFReader(gguf_270m)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(stored) == len(checkpoint_270m.tensors) == 236
    for ours, theirs in {
        "layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",  # Q5_0
        "layers.17.self_attn.v_proj.weight": "blk.17.attn_v.weight",  # Q8_0
        "layers.9.self_attn.o_proj.weight": "blk.9.attn_output.weight",  # Q4_K
        "layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",  # Q6_K
    }.items():
        expected = gguf.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        assert np.array_equal(checkpoint_270m.tensors[ours].numpy(), expected), ours
    for ours, theirs in {
        "norm.weight": "output_norm.weight",
        "layers.3.input_layernorm.weight": "blk.3.attn_norm.weight",
        "layers.3.post_attention_layernorm.weight": "blk.3.post_attention_norm.weight",
        "layers.3.pre_feedforward_layernorm.weight": "blk.3.ffn_norm.weight",
        "layers.3.post_feedforward_layernorm.weight": "blk.3.post_ffw_norm.weight",
        "layers.3.self_attn.k_norm.weight": "blk.3.attn_k_norm.weight",
    }.items():
        assert np.array_equal((checkpoint_270m.tensors[ours] + 1).numpy(), stored[theirs].data), ours
    embedding, rows = stored["token_embd.weight"], checkpoint_270m.tensors["embed_tokens.weight"]
    for start in (0, 8190, 262_100):  # both sides of where one piece ends and the next begins
        expected = gguf.dequantize(embedding.data[start : start + 40], embedding.tensor_type)
        assert np.array_equal(rows[start : start + 40].numpy(), expected)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    for index in (0, 139, 5279, 262_143):
        piece = bytes(tokens.parts[tokens.data[index]]).decode()
        assert checkpoint_270m.vocabulary.pieces[index] == piece.replace(" ", "▁")


def test_a_head_equal_to_the_embedding_is_no_head(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint], tiny: dict[int, str]
) -> None:
    embedding = random_checkpoint(tiny[3]).tensors["embed_tokens.weight"].numpy()
    assert "lm_head.weight" not in read(write_gguf(3, tensors={"output.weight": embedding})).tensors
    with pytest.raises(CheckpointError, match=r"output.weight differs from token_embd.weight, but Gemma ties"):
        read(write_gguf(3, tensors={"output.weight": embedding * 2}))


def test_spaces_in_user_defined_pieces_are_written_as_sentencepiece_wants(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint], tiny: dict[int, str]
) -> None:
    vocabulary = random_checkpoint(tiny[3]).vocabulary
    pieces = [*vocabulary.pieces[:-1], "  "]
    assert read(write_gguf(3, keys={"tokenizer.ggml.tokens": pieces})).vocabulary.pieces[-1] == "▁▁"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"general.architecture": "llama"},
            "unknown architecture 'llama'; supported are gemma, gemma2 and gemma3",
        ),
        ({"gemma3.block_count": None}, "the metadata lacks gemma3.block_count"),
        ({"gemma3.block_count": 3}, "missing: blk.2.attn_norm.weight, .* and 7 more"),
        ({"gemma3.block_count": 1}, "unexpected: 'blk.1"),
        ({"gemma3.block_count": 4_000_000_000}, "announces 4000000000 layers, but the file holds only 28 tensors"),
        ({"gemma3.embedding_length": 64}, r"token_embd.weight is \[263, 32\], expected \[263, 64\]"),
        ({"gemma3.attention.head_count": 0}, "head_count must be a positive integer, got 0"),
        ({"gemma3.attention.head_count": "4"}, "head_count must be a positive integer, got '4'"),
        ({"gemma3.attention.head_count_kv": 3}, "must be a multiple of the number of key/value heads, got 4 and 3"),
        ({"gemma3.attention.value_length": 16}, "value_length must be the key length, 8, got 16"),
        ({"gemma3.attention.layer_norm_rms_epsilon": float("nan")}, "must be a positive number, got nan"),
        ({"gemma3.rope.scaling.type": "yarn"}, "rope.scaling.type must be 'none' or 'linear', got 'yarn'"),
        (
            {"gemma3.attention.sliding_window_pattern": [False, True]},
            "must be a list of 2 flags, with every n-th layer global",
        ),
        ({"tokenizer.ggml.model": "gpt2"}, r"tokenizer.ggml.model must be 'llama' \(SentencePiece\), got 'gpt2'"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "got 2 pieces for 263 rows"),
        ({"tokenizer.ggml.tokens": None}, "got 0 pieces for 263 rows"),
        ({"tokenizer.ggml.tokens": ["a"] * 263}, "must be a list of unique, non-empty pieces"),
        ({"tokenizer.ggml.scores": [1.0]}, "tokenizer.ggml.scores must be a list of 263 numbers, one per piece"),
        ({"tokenizer.ggml.scores": [float("inf")] * 263}, "tokenizer.ggml.scores must be a list of finite numbers"),
        (
            {"tokenizer.ggml.token_type": [7] * 263},
            r"tokenizer.ggml.token_type must be a list of piece types \(1, 2, 3, 4, 5, 6\)",
        ),
        ({"tokenizer.ggml.bos_token_id": 263}, "bos_token_id must be a token id below 263, got 263"),
    ],
)
def test_metadata_that_cannot_be_meant_is_said(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint], keys: dict[str, Any], sentence: str
) -> None:
    path = write_gguf(3, keys=keys)
    with pytest.raises(CheckpointError, match=sentence):
        read(path)


def test_missing_unexpected_and_misshapen_tensors_are_listed(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint]
) -> None:
    extra = np.ones((2, 32), np.float32)
    tensors = {"blk.0.attn_q.weight": None, "blk.1.ffn_gate_inp.weight": extra}
    with pytest.raises(
        CheckpointError, match=r"missing: blk.0.attn_q.weight; unexpected: 'blk.1.ffn_gate_inp.weight'. Download"
    ):
        read(write_gguf(3, tensors=tensors))
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight is \[2, 32\], expected \[32, 32\]"):
        read(write_gguf(3, tensors={"blk.0.attn_q.weight": extra}))


def test_what_is_no_gguf_file_is_said(tmp_path: Path, read: Callable[[Path], Checkpoint]) -> None:
    other = tmp_path / "other.gguf"
    for content, shown in ((b"", "b''"), (b"PK\x03\x04 zip", r"b'PK\\x03\\x04'")):
        other.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"other.gguf is not a GGUF file: it begins with {shown}"):
            read(other)
    with pytest.raises(CheckpointError, match=r"Cannot read .*absent.gguf: No such file or directory"):
        read(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match=r"is a folder; pass the .gguf file in it"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((1).to_bytes(4, "little"), "its version is 1"),
        ((4).to_bytes(4, "little"), "its version is 4"),
        ((3).to_bytes(4, "big"), "it is big-endian"),
    ],
)
def test_other_versions_are_refused(
    write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint], version: bytes, sentence: str
) -> None:
    path = write_gguf()
    content = path.read_bytes()
    path.write_bytes(content[:4] + version + content[8:])
    with pytest.raises(CheckpointError, match=sentence):
        read(path)


def test_a_file_cut_anywhere_is_incomplete(write_gguf: Callable[..., Path], read: Callable[[Path], Checkpoint]) -> None:
    path = write_gguf()
    content = path.read_bytes()
    tensors = read_gguf_file(path).tensors
    data = sum(tensor.rows.nbytes for tensor in tensors.values())
    cut = path.with_name("cut.gguf")
    places = set()
    for size in [
        *range(4, 1200),
        *range(1200, len(content) - data, 23),
        *range(len(content) - data, len(content), 997),
    ]:
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"ends inside|begins with") as caught:
            read(cut)
        places.add(str(caught.value).split("ends inside ")[1].split(",")[0])
    assert places == {"its header", "the metadata", "the list of tensors", "the tensors"}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_wrong_byte_never_raises_anything_else(damage: Callable[[float, int], Path], place: float, byte: int) -> None:
    path = damage(place, byte)
    try:
        outcome = f"{read_gguf(path, cache=path.parent / 'cache').config.layers} layers"
    except CheckpointError as error:
        outcome = str(error)
    assert outcome == "2 layers" or ("damaged.gguf" in outcome and "\n" not in outcome)


@pytest.fixture
def damage(write_gguf: Callable[..., Path]) -> Callable[[float, int], Path]:
    """Sets one byte of a tiny file's header, at a share of its length."""
    path = write_gguf()
    content = path.read_bytes()
    header = len(content) - sum(tensor.rows.nbytes for tensor in read_gguf_file(path).tensors.values())

    def damaged(place: float, byte: int) -> Path:
        changed = bytearray(content)
        changed[int(place * header)] = byte
        target = path.with_name("damaged.gguf")
        target.write_bytes(changed)
        return target

    return damaged

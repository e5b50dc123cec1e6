"""From checkpoints to models: dtypes, devices, and checkpoints that do not fit."""

from dataclasses import replace

import pytest
import torch

from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.devices import DTYPES
from stabilitykit.models.gemma.load import build, load
from stabilitykit.models.gemma.model import Gemma
from stabilitykit.scaling.stressed import stressed

SOURCE = (
    "random:gemma3-270m?layers=2&kv_heads=2&window=6&hidden_size=64&feed_forward=96&heads=4&head_dim=16"
    "&vocabulary=400&query_scalar=16"
)
TOKENS = torch.tensor([[2, 5, 6, 7]])


@pytest.fixture
def checkpoint() -> Checkpoint:
    """With its tensors drawn once, so that they can be told from copies."""
    drawn = random_checkpoint(SOURCE)
    return replace(drawn, tensors=dict(drawn.tensors), notes=("dequantised",))


@pytest.mark.parametrize("name", DTYPES)
def test_weights_are_cast(checkpoint: Checkpoint, name: str) -> None:
    dtype = DTYPES[name]
    for given in (name, f"torch.{name}", dtype):
        model = build(checkpoint, dtype=given)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == parameter_shapes(checkpoint.config).keys()
        for key, weight in parameters.items():
            assert torch.equal(weight, checkpoint.tensors[key].to(dtype)), key
            assert weight.dtype == dtype
            assert not weight.requires_grad
    assert model(TOKENS).dtype == dtype
    assert not model.training
    assert list(model.buffers()) == []  # RoPE tables are no buffers: `.to(torch.float16)` must not round them


def test_facts_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    model = build(checkpoint, rounding="gemma_pytorch")
    assert model.config is checkpoint.config
    assert (model.source, model.sha256, model.notes) == (checkpoint.source, checkpoint.sha256, ("dequantised",))
    assert (model.rounding, model.rescale, model.dtype, model.device.type) == (
        "gemma_pytorch", 1.0, torch.float32, "cpu",
    )  # fmt: skip


def test_tensors_are_shared_when_nothing_changes_them(checkpoint: Checkpoint) -> None:
    model = build(checkpoint)
    assert all(weight.data_ptr() == checkpoint.tensors[key].data_ptr() for key, weight in model.named_parameters())


def test_float16_checkpoints_are_scaled_in_float32(checkpoint: Checkpoint) -> None:
    halves = replace(checkpoint, tensors={name: tensor.half() for name, tensor in checkpoint.tensors.items()})
    model = stressed(halves, 2.0**24)
    assert torch.equal(model.embed_tokens.weight, halves.tensors["embed_tokens.weight"].float() * 2.0**24)


def test_progress(checkpoint: Checkpoint) -> None:
    calls: list[tuple[int, int]] = []
    build(checkpoint, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert len(calls) == len(checkpoint.tensors)
    assert calls == sorted(calls)
    assert calls[0] == (400 * 64 * 4, total)
    assert calls[-1] == (total, total)


def test_missing_and_unexpected_tensors(checkpoint: Checkpoint) -> None:
    tensors = dict(checkpoint.tensors)
    tensors["layers.0.self_attn.qkv_proj.weight"] = tensors.pop("layers.0.self_attn.q_proj.weight")
    message = (
        r"1 missing \(layers.0.self_attn.q_proj.weight\) and 1 unexpected \(layers.0.self_attn.qkv_proj.weight\). "
        "These are gemma_pytorch's names. Open them as a .ckpt file."
    )
    with pytest.raises(CheckpointError, match=message):
        build(replace(checkpoint, tensors=tensors))


def test_long_lists_are_cut(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"28 missing \(embed_tokens.weight, .* and 22 more\)"):
        build(replace(checkpoint, tensors={}))


def test_misshapen_tensors(checkpoint: Checkpoint) -> None:
    tensors = dict(checkpoint.tensors)
    tensors["layers.1.mlp.up_proj.weight"] = torch.zeros(96, 63)
    tensors["norm.weight"] = torch.zeros(1)  # would broadcast
    message = (
        r"layers.1.mlp.up_proj.weight is \[96, 63\] instead of \[96, 64\] and norm.weight is \[1\] instead of \[64\]"
    )
    with pytest.raises(CheckpointError, match=message):
        build(replace(checkpoint, tensors=tensors))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "half", "int8", torch.int64], ids=str)
def test_unknown_dtype(checkpoint: Checkpoint, dtype: str) -> None:
    with pytest.raises(MisuseError, match=r"Unknown dtype '.*'; choose one of: float32, bfloat16, float16, float64"):
        build(checkpoint, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_device_that_is_not_there(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(MisuseError, match=f"The device '{device}' cannot be used here: .* Try 'cpu'."):
        build(checkpoint, device=device)


def test_load_opens_and_builds() -> None:
    model = load(SOURCE, dtype="bfloat16")
    assert torch.equal(model(TOKENS), build(random_checkpoint(SOURCE), dtype="bfloat16")(TOKENS))


def test_tokenizer_is_built_once_and_when_asked_for(checkpoint: Checkpoint) -> None:
    model = build(checkpoint)
    assert "tokenizer" not in vars(model)
    assert model.tokenizer is not None
    assert model.tokenizer is model.tokenizer
    assert model.tokenizer.decode(model.tokenizer.encode("A b")) == "A b"
    assert Gemma(checkpoint.config).tokenizer is None

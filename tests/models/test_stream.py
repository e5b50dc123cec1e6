"""A streamed model computes the same bits, is recorded the same way, and takes a fraction of the memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from written import write_gemma_pytorch, write_huggingface

from stabilitykit.checkpoints import Checkpoint, open_checkpoint, random_checkpoint
from stabilitykit.models.devices import DTYPES
from stabilitykit.models.gemma import KVCache, build, load
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.models.stream import STREAMED
from stabilitykit.recorder import record
from stabilitykit.records import Record
from stabilitykit.scaling.stressed import stressed

SIZES = "layers=3&hidden_size=64&feed_forward=96&heads=4&kv_heads=2&head_dim=16&vocabulary=400"
SPECS = {
    1: f"random:gemma-2b?{SIZES}",
    2: f"random:gemma2-2b?{SIZES}&window=3",
    3: f"random:gemma3-270m?{SIZES}&window=3&global_every=2",
}
STEPS = ([2, 70, 71, 399, 70], [5], [399])


@pytest.fixture(params=SPECS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """bfloat16 shards on disk, of each generation."""
    folder = write_huggingface(random_checkpoint(SPECS[request.param]), tmp_path / "g", dtype=torch.bfloat16, shards=2)
    return open_checkpoint(folder)


def stepped(
    checkpoint: Checkpoint, stream: bool, dtype: str, *, kind: str = "native", rescale: float = 1.0
) -> tuple[list[Tensor], list[Record]]:
    """Logits of a prompt and of two more steps with a cache, and the records of all three."""
    model = stressed(checkpoint, rescale, dtype=dtype, stream=stream)
    cache = KVCache(model.config, batch=1, length=8, dtype=model.dtype)
    with torch.inference_mode(), matmul(kind), record(model) as recording:
        logits = [model(torch.tensor([ids]), cache=cache) for ids in STEPS]
    return logits, list(recording)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_same_bits_and_records_the_same(stored: Checkpoint, dtype: str) -> None:
    kind = preferred_matmul(dtype, "cpu")
    (whole, records), (streamed, found) = (stepped(stored, stream, dtype, kind=kind) for stream in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(whole, streamed, strict=True))
    assert found == records


@pytest.mark.slow
def test_a_rescaled_model_breaks_at_the_same_places(stored: Checkpoint) -> None:
    """Among them weights that overflow when they are cast: they are known by their names."""
    for rescale in (4.0, 2.0**14, 2.0**20):
        _, records = stepped(stored, False, "float16", rescale=rescale)
        _, found = stepped(stored, True, "float16", rescale=rescale)
        assert found == records
    broke = next(record for record in found if record.broke is not None)
    assert broke.broke is not None
    assert (broke.broke.kind, broke.broke.operand_sites) == ("weight", ("embed_tokens.weight",))


def test_only_vectors_are_in_memory_between_calls(stored: Checkpoint) -> None:
    model = build(stored, dtype="float16", stream=True)
    ids = torch.tensor([STEPS[0]])
    for _ in range(2):
        held = {name: weight.untyped_storage().nbytes() for name, weight in model.named_parameters()}
        assert all(size == 2 for name, size in held.items() if not name.endswith("norm.weight"))
        assert model.lm_head.weight is model.embed_tokens.weight
        assert {weight.dtype for weight in model.parameters()} == {torch.float16}
        model(ids)
    with pytest.raises(IndexError):  # a call that raises leaves nothing behind either
        model(torch.tensor([[400]]))
    assert model.embed_tokens.weight.untyped_storage().nbytes() == 2
    assert torch.equal(model(ids), build(stored, dtype="float16")(ids))


def test_of_an_embedding_only_rows_that_are_looked_up_are_filled(stored: Checkpoint) -> None:
    model = build(stored, dtype="float32", stream=True)
    seen: list[Tensor] = []
    model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(module.weight.clone()))
    model(torch.tensor([[3, 9, 3]]))
    expected = stored.tensors["embed_tokens.weight"].float()
    assert torch.equal(seen[0][[3, 9]], expected[[3, 9]])
    assert not torch.equal(seen[0], expected)


@pytest.mark.parametrize("source", ["ckpt", "int8", "random"])
def test_other_formats_are_streamed_too(source: str, tmp_path: Path) -> None:
    drawn = random_checkpoint(SPECS[3])
    made = SPECS[3] if source == "random" else write_gemma_pytorch(drawn, tmp_path, int8=source == "int8")
    ids = torch.tensor([STEPS[0]])
    for dtype in ("float16", "float32"):
        streamed = load(made, dtype=dtype, stream=True)
        assert torch.equal(streamed(ids), load(made, dtype=dtype, stream=False)(ids))
        assert streamed.notes[-1] == STREAMED


def test_the_real_weights_break_at_the_same_place(checkpoint_270m: Checkpoint) -> None:
    """Dequantised once, and mapped from the cache as float32."""
    ids = torch.tensor([[2, 818, 5279]])
    found = []
    for stream in (False, True):
        model = build(checkpoint_270m, dtype="float16", stream=stream)
        with torch.inference_mode(), matmul("float32-accumulate"), record(model) as recording:
            logits = model(ids, last_only=True)
        found.append((logits.isnan().all(), list(recording)))
    assert found[0] == found[1]
    assert recording.first_break() is not None


def test_what_does_not_fit_is_streamed_unless_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(random_checkpoint(SPECS[1]))
    needed = sum(weight.nbytes for weight in model.parameters())
    assert (model.streamed, STREAMED in model.notes) == (False, False)
    for free, stream, expected in (
        (needed * 2, None, False), (needed, None, True), (needed, False, False), (needed * 2, True, True),
    ):  # fmt: skip
        monkeypatch.setattr("stabilitykit.models.memory.available_memory", lambda device, free=free: free)
        built = build(random_checkpoint(SPECS[1]), stream=stream)
        assert (built.streamed, STREAMED in built.notes) == (expected, expected)


# Six layers of 29 million weights, of which no matrix has more than 8 million: 352 MB in bfloat16.
LARGE = "random:gemma-2b?layers=6&hidden_size=1024&feed_forward=8192&heads=4&kv_heads=4&head_dim=256&vocabulary=300"
CHILD = """
import json, sys, torch
from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.run.prefill import _in_use, _reset_peak, _resident
from stabilitykit.models.gemma import build
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.recorder import record
from stabilitykit.recorder.weights import check_weights

def run(source, dtype, stream):
    opened = open_checkpoint(source)
    check_weights(opened.tensors.items(), [dtype])
    model = build(opened, dtype=dtype, stream=stream)
    with torch.inference_mode(), matmul(preferred_matmul(dtype, "cpu")), record(model):
        model(torch.arange(16)[None])

source, dtype, stream = sys.argv[1:]
check_weights([("w", torch.ones(9, dtype=torch.bfloat16))], [dtype])
run("random:gemma3-270m?layers=1&hidden_size=64&feed_forward=64&vocabulary=300", dtype, False)
before = _in_use("cpu")
_reset_peak("cpu")
run(source, dtype, stream == "stream")
print(json.dumps(_resident("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(random_checkpoint(LARGE), tmp_path_factory.mktemp("large"), dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_streamed_model_takes_a_fraction_of_its_weights(large: Path, dtype: str) -> None:
    """From opening the file to the last record; mapped pages count."""
    weights = sum(tensor.numel() for tensor in open_checkpoint(large).tensors.values()) * DTYPES[dtype].itemsize
    took = {}
    for how in ("stream", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(large), dtype, how], capture_output=True, text=True, check=True
        )
        took[how] = json.loads(done.stdout) / weights
    assert took["whole"] > 1
    assert took["stream"] < 0.25

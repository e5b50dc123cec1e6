"""One model, every implementation, every format that can hold it: the same first break in float16."""

import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from written import write_gemma_pytorch, write_huggingface

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.models.gemma import build
from stabilitykit.recorder import record
from stabilitykit.records import Record

TOKENS = torch.tensor([[2, 818, 5279, 529, 7001, 563]])

# float16's numbers near 65,504 are 32 apart. Operands are rounded sums whose order is each kernel's own.
ROUNDING = 64


@pytest.fixture(scope="module")
def folders(checkpoint_270m: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("formats")
    yield {
        "safetensors": write_huggingface(checkpoint_270m, root / "hf"),
        "shards": write_huggingface(checkpoint_270m, root / "shards", shards=3),
        "gemma_pytorch": write_gemma_pytorch(checkpoint_270m, root / "ckpt"),
        "gemma_pytorch shards": write_gemma_pytorch(checkpoint_270m, root / "ckpt-shards", shards=2),
    }
    shutil.rmtree(root)


def ours(source: Path) -> Any:
    return build(open_checkpoint(source), dtype="float16")


@lru_cache(maxsize=1)
def _loaded(source: Path) -> Any:
    """The last one is kept: transformers takes a minute to read a GGUF."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if source.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    return transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16).eval()


def theirs(source: Path, attention: str) -> Any:
    model = _loaded(source)
    model.set_attn_implementation(attention)
    return model


def first_break(model: Any) -> Record:
    with torch.inference_mode(), record(model) as recording:
        model(TOKENS)
    found = recording.first_break()
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore")  # transformers' remarks about GGUF
@pytest.mark.parametrize(
    ("implementation", "form"),
    [
        *(("ours", form) for form in ("gguf", "safetensors", "shards", "gemma_pytorch", "gemma_pytorch shards")),
        *((attention, form) for form in ("gguf", "safetensors", "shards") for attention in ("eager", "sdpa")),
    ],
)
def test_every_implementation_breaks_at_the_same_place(
    implementation: str, form: str, folders: dict[str, Path], gguf_270m: Path
) -> None:
    source = gguf_270m if form == "gguf" else folders[form]
    found = first_break(ours(source) if implementation == "ours" else theirs(source, implementation))
    broke = found.broke
    assert broke is not None
    assert (found.site, found.label, found.operator) == ("layers.7", "residual after MLP", "add")
    assert (broke.kind, broke.row, broke.position, broke.token, broke.count) == ("overflow", 0, 0, 2, 1)
    assert broke.value == pytest.approx(68384, abs=ROUNDING)
    assert broke.value == sum(broke.operands)
    assert broke.operand_sites == ("layers.7/add.0", "layers.7.post_feedforward_layernorm")

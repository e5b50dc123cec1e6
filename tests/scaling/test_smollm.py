"""The real SmolLM2 135M, of the Llama family: made to overflow float16, repaired, written, and run by transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from smollm import smollm_gguf
from torch import Tensor

from stabilitykit.files import new_folder
from stabilitykit.remedies.folder import write_scaled
from stabilitykit.remedies.repair import repair
from stabilitykit.remedies.samples import Samples
from stabilitykit.scaling.stress import stress
from stabilitykit.scaling.subjects import blueprint_of, continued
from stabilitykit.scaling.trace import trace

PROMPT = "The capital of France is"


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def prompt(folder: Path, text: str = PROMPT) -> Tensor:
    ids: Tensor = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return ids


def test_the_folder_holds_what_transformers_reads_from_the_gguf_file(smollm: Path) -> None:
    gguf = smollm_gguf()
    assert gguf is not None
    model = read(smollm)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    expected = theirs.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    said = model.generate(prompt(smollm), max_new_tokens=2, do_sample=False)
    assert transformers.AutoTokenizer.from_pretrained(smollm).decode(said[0]) == f"{PROMPT} Paris."


@pytest.mark.slow
def test_it_is_stressed_repaired_and_generates_in_plain_float16(smollm: Path, tmp_path: Path) -> None:
    model = read(smollm)
    ids = prompt(smollm)
    expected = model(ids).logits
    low = copy.deepcopy(model).bfloat16()
    scaling = stress(trace(low, continued({"input_ids": ids}), blueprint_of(model)), 64.0)
    with new_folder(tmp_path / "stressed") as aside:
        write_scaled(smollm, scaling, aside, "float32")

    stressed = read(tmp_path / "stressed")
    assert torch.equal(stressed(ids).logits, expected)
    assert not stressed.half()(ids).logits.isfinite().any()

    samples = Samples(choosing=({"input_ids": ids},), held_out=({"input_ids": ids},))
    source, out = f"hf:{tmp_path / 'stressed'}", tmp_path / "repaired"
    found = repair(source, samples, margin=2.0, ranking=False, out=out, dtype="float32")
    assert found.finite
    assert torch.equal(read(out)(ids).logits, expected)
    half = read(out, torch.float16)
    error = (half(ids).logits.float() - expected).abs().max()
    assert error < (low(ids).logits.float() - expected).abs().max()
    assert torch.equal(
        half.generate(ids, max_new_tokens=16, do_sample=False), model.generate(ids, max_new_tokens=16, do_sample=False)
    )

"""The real SmolLM2 135M, of the Llama family."""

from pathlib import Path
from typing import Any

import torch
import transformers
from smollm import smollm_gguf


def test_the_folder_holds_what_transformers_reads_from_the_gguf_file(smollm: Path) -> None:
    gguf = smollm_gguf()
    assert gguf is not None
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris."

"""A recording says what ran: checkpoint, versions of the libraries that a model is made of, and its attention."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import stabilitykit as sk
from stabilitykit.diagnosis.untried import how_to_try

IDS = torch.tensor([[1, 5, 9]])


def llama(attention: str) -> Any:
    make: Any = transformers.LlamaConfig
    config = make(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_of_transformers_is_told_from_its_folder_to_its_attention(attention: str, tmp_path: Path) -> None:
    llama(attention).save_pretrained(tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation=attention)
    with torch.inference_mode(), sk.record(model) as recording:
        model(IDS)
    header = recording.header
    assert header.checkpoint == f"hf:{tmp_path / 'llama'}"
    assert header.sha256 is None
    assert header.versions["transformers"] == version("transformers")
    assert header.versions["torch"] == torch.__version__
    assert "peft" not in header.versions
    assert header.case["attention"] == attention
    document = sk.diagnosis.document(recording)
    assert (document["checkpoint"], document["attention"]) == (header.checkpoint, attention)
    assert document["versions"] == dict(header.versions)
    assert how_to_try(header).startswith("To try it on this input, and whatever else may help: `sk.diagnose(model")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_an_adapter_names_its_library_and_the_base(tmp_path: Path) -> None:
    import peft

    llama("eager").save_pretrained(tmp_path / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.inference_mode(), sk.record(model) as recording:
        model(IDS)
    header = recording.header
    assert header.versions["peft"] == version("peft")
    assert header.versions["transformers"] == version("transformers")
    assert (header.checkpoint, header.case["attention"]) == (f"hf:{tmp_path / 'llama'}", "eager")


def test_a_plain_module_and_a_model_made_from_a_config_have_no_checkpoint() -> None:
    made, plain = llama("eager"), nn.Linear(2, 2)
    with torch.inference_mode(), sk.record(made) as of_config:
        made(IDS)
    with torch.inference_mode(), sk.record(plain) as of_plain:
        plain(torch.ones(1, 2))
    assert of_config.header.checkpoint is None
    assert of_plain.header.checkpoint is None
    assert "attention" not in of_plain.header.case
    assert set(of_plain.header.versions) == {"stabilitykit", "torch", "python", "numpy"}
    assert sk.diagnosis.document(of_plain)["attention"] is None

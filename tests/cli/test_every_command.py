"""Every command on small folders of transformers': a Llama, a Gemma, and encoders without a head."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import save
from scaled.runs import VOCABULARY

Run = Callable[..., Any]

_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
_DECODER: dict[str, Any] = {
    **_SIZES,
    **_SPECIAL,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def gemma() -> Any:
    sizes: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_DECODER, **sizes))


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**_SIZES, **_SPECIAL, max_position_embeddings=128))


def t5_encoder() -> Any:
    sizes: dict[str, Any] = {
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, **_SPECIAL))


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gemma": gemma, "bert": bert, "t5-encoder": t5_encoder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, made = tmp_path_factory.mktemp("models"), {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        made[name] = save(build().eval(), place / name)
    return made


def said(result: Any) -> str:
    return " ".join((result.err or result.out).split())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["profile", "forecast", "diagnose", "check", "reproduce"])
def test_a_prompt_runs(stabilitykit: Run, folders: dict[str, Path], command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Hello")
    rest: Sequence[str] = {
        "check": ("--prompts", str(tmp_path / "short.txt")),
        "reproduce": ("--checkpoint", f"hf:{folders[name]}"),
    }.get(command, ("--prompt", "Hello"))
    made = stabilitykit(command, *(() if command == "reproduce" else (f"hf:{folders[name]}",)), *rest)
    assert made.code == (1 if command == "reproduce" else 0), said(made)  # nothing fails that could be reproduced
    assert made.err == ""
    assert "finite" in said(made) or "would hold every value" in said(made) or "Checked in float16" in said(made)


def test_an_encoder_is_judged_by_what_it_returns_at_the_length_that_ran(
    stabilitykit: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Hello")
    made = stabilitykit("check", f"hf:{folders['bert']}", "--prompts", str(tmp_path / "short.txt"))
    assert "Only its own length was judged of short.txt" in said(made)
    made = stabilitykit("check", f"hf:{folders['llama']}", "--prompts", str(tmp_path / "short.txt"))
    assert "every length" in said(made)
    refused = stabilitykit("profile", f"hf:{folders['bert']}", "--prompt", "Hello", "--generate", "2")
    assert refused.code == 2
    assert "BertModel reads a text and writes none" in refused.err

"""Every command on small folders of transformers': a Llama, a Gemma, and encoders without a head."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import save
from safetensors.torch import save_file
from scaled.runs import VOCABULARY

from stabilitykit.models.transformers import open_tokenizer

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


# Of the others, what each says of a model that it cannot answer for.
REFUSED = {
    ("bound", "bert"): "in the families Gemma 1 to 3, Llama, Mistral, Qwen2, Qwen3 and the text part of Gemma 4",
    ("bound", "t5-encoder"): "in the families Gemma 1 to 3, Llama, Mistral, Qwen2, Qwen3 and the text part of Gemma 4",
    ("bound", "gemma"): "is not a Gemma's tokenizer: expected BPE with byte fallback",  # it has one of characters
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["bound", "search", "repair", "sweep"])
def test_a_command_answers_or_says_why_not(
    stabilitykit: Run, folders: dict[str, Path], command: str, name: str, tmp_path: Path
) -> None:
    """And never advises what was done already."""
    folder = f"hf:{folders[name]}"
    (tmp_path / "own.toml").write_text(f'checkpoint = "{folder}"\n[[grid]]\nprompt = "text: Hello"\n')
    made = stabilitykit(
        *{
            "bound": ("bound", folder),
            "search": ("search", folder, "--limit", "12", "--length", "1"),
            "repair": ("repair", folder, "--no-ranking"),
            "sweep": ("sweep", str(tmp_path / "own.toml"), "--dry-run"),
        }[command]
    )
    refused = REFUSED.get((command, name))
    assert made.code == (0 if refused is None else 2), said(made)
    assert (refused or "") in said(made)
    assert "hf: before" not in said(made)
    assert "transformers instead" not in said(made)


def test_advice_to_write_hf_goes_to_those_who_did_not(stabilitykit: Run, folders: dict[str, Path]) -> None:
    for command in ("bound", "search"):
        made = stabilitykit(command, str(folders["llama"]))
        assert made.code == 2
        assert f"Run it with transformers instead: hf:{folders['llama']}" in made.err


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


def test_a_chat_a_batch_and_tensors_run_from_files(stabilitykit: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """One reader serves each command: a row of tensors says what its text says, and more of them is one pass."""
    llama, bert = f"hf:{folders['llama']}", f"hf:{folders['bert']}"
    ids = open_tokenizer(str(folders["llama"])).encode("Hello")
    save_file({"input_ids": torch.tensor([ids])}, tmp_path / "row.safetensors")
    rows = {"input_ids": torch.tensor([ids, ids]), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    save_file(rows, tmp_path / "rows.safetensors")
    (tmp_path / "batch.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "Hello you"}\n')
    (tmp_path / "one.jsonl").write_text('{"prompt": "Hello"}\n')
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "Hello"}]')
    text = json.loads(stabilitykit("profile", llama, "--prompt", "Hello", "--json").out)
    for name in ("row.safetensors", "one.jsonl"):
        made = json.loads(stabilitykit("profile", llama, "--prompt", f"@{tmp_path / name}", "--json").out)
        assert made == text
    for checkpoint in (llama, bert):
        for command in ("profile", "forecast", "diagnose"):
            made = stabilitykit(command, checkpoint, "--prompt", f"@{tmp_path / 'rows.safetensors'}")
            assert made.code == 0, said(made)
    made = stabilitykit("profile", bert, "--prompt", f"@{tmp_path / 'rows.safetensors'}")
    assert "attention_mask 2 × 5, input_ids 2 × 5" in said(made)
    several = stabilitykit("profile", llama, "--prompt", f"@{tmp_path / 'batch.jsonl'}")
    assert several.code == 2
    assert "holds 2 prompts, and one is run here" in several.err
    assert stabilitykit("diagnose", llama, "--prompt", f"@{tmp_path / 'batch.jsonl'}").code == 0
    for command in ("profile", "forecast", "diagnose"):
        refused = stabilitykit(command, llama, "--prompt", f"@{tmp_path / 'chat.json'}")
        assert refused.code == 2
        assert "has no chat template" in refused.err


def test_an_encoder_that_overflows_is_reproduced_though_nothing_is_raised(stabilitykit: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight.mul_(50)
        model.encoder.layer[0].output.dense.weight.mul_(4e5)  # below float16's maximum
    folder = f"hf:{save(model, tmp_path / 'loud')}"
    made = stabilitykit("reproduce", "--checkpoint", folder, "--prompt", "Hello")
    assert (made.code, made.err) == (0, ""), said(made)
    assert "Nothing was raised. Reproduced." in said(made)
    refused = stabilitykit("reproduce", "top-k-zero", "--checkpoint", folder)
    assert refused.code == 2
    assert "take a Gemma 1 to 3 without hf:, such as gemma3-270m" in refused.err

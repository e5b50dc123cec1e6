"""Models of transformers under stress: float32 keeps every bit, float16 breaks, and what is not exact is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import family_model
from torch import Tensor, nn
from written import write_tokenizer

from stabilitykit.models import transformers as hf
from stabilitykit.scaling.stressed import StressedFolder

TOKENS = torch.randint(4, 500, (2, 21), generator=torch.Generator().manual_seed(0))
BREAKING = 2.0**15  # with the lively weights below
Run = Callable[..., Any]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=512, bos_token_id=2, eos_token_id=1
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def mixture() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(family_model, name) for name in ("llama", "qwen3", "gemma4")},
    "gpt2": gpt2,
    "mixture of experts": mixture,
}


def written(model: Any, folder: Path) -> Path:
    """Weights of a size that is usual, so that each matters; in float32, all of whose bits are used."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 8 if weight.ndim > 1 else 1.1
            if "norm" in name:
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 8
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else written(MODELS[name](), root / name)

    return folder


def logits(model: Any) -> Tensor:
    """Of a prompt, and of single tokens: sums of one row are made by other instructions than those of many."""
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits.flatten() for ids in (TOKENS, TOKENS[:1, :1], TOKENS[1:, 1:2])])


@pytest.mark.parametrize("name", MODELS)
def test_float32_keeps_every_bit_and_float16_breaks(folders: Callable[[str], Path], name: str) -> None:
    folder = str(folders(name))
    stressed = StressedFolder.of(folder, BREAKING)
    plain = hf.open_model(folder)
    wide = stressed.open()
    assert torch.equal(logits(wide.module), logits(plain.module))
    embedding = plain.causal.get_input_embeddings().weight
    assert torch.equal(wide.causal.get_input_embeddings().weight, embedding * BREAKING)
    assert logits(hf.open_model(folder, dtype="float16").module).isfinite().all()
    assert not logits(stressed.open("float16").module).isfinite().all()
    assert wide.notes == (*plain.notes, "scaled by 2^15")
    assert wide.facts == plain.facts | {"rescale": BREAKING}

"""A search on models that transformers runs: what it finds is what brute force finds, of decoders and encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import save
from scaled.runs import VOCABULARY

from stabilitykit.diagnosis.search import how_measured
from stabilitykit.errors import MisuseError
from stabilitykit.models.transformers import open_model, open_tokenizer
from stabilitykit.records.search import Search
from stabilitykit.searches import search
from stabilitykit.searches.confirm import PromptRecorder

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
_TOKENS = 100  # of the tokenizer; the embedding has more rows


def llama(folder: Path, *, dangerous: str = "") -> str:
    """Of `dangerous` tokens the embedding is near float16's maximum, and the first MLP adds to it or takes away."""
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, bos_token_id=2, eos_token_id=1))
    save(model, folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] = 40_000.0
        for sign, piece in zip((1, -1), dangerous, strict=False):
            (token,) = open_tokenizer(str(folder)).encode(piece)
            model.model.embed_tokens.weight[token, 0] = sign * 65_000.0
    save(model, folder)
    return f"hf:{folder}"


def bert(folder: Path) -> str:
    torch.manual_seed(0)
    return f"hf:{save(transformers.BertModel(transformers.BertConfig(**_SIZES)), folder)}"


def breaking(name: str, kind: Any) -> set[int]:
    """Every token that overflows by itself, in plain transformers."""
    model = kind.from_pretrained(name.removeprefix("hf:"), dtype=torch.float16).eval()
    rows = torch.arange(_TOKENS)[:, None]
    with torch.inference_mode():
        output = model(rows)[0]
    return {int(row) for row in rows[~output.isfinite().flatten(1).all(1)]}


def test_tokens_that_overflow_by_themselves_are_found(tmp_path: Path) -> None:
    name = llama(tmp_path / "llama", dangerous="qQ")
    expected = breaking(name, transformers.LlamaForCausalLM)
    assert expected
    found = search(name, length=2)
    assert {find.tokens[0] for find in found.breaking if len(find.tokens) == 1} == expected
    assert found.bos is None  # the tokenizer puts nothing before a text
    alone = found.scans[0]
    assert alone.scanned == found.vocabulary == _TOKENS
    assert {peak.token for peak in alone.worst[: len(expected)]} == expected
    assert found.checkpoint == name
    assert "Logits are part of that" in how_measured(found)
    with pytest.raises(MisuseError, match="puts nothing before a text"):
        search(name, bos=True)


def test_what_comes_nearest_is_told_where_nothing_overflows(tmp_path: Path) -> None:
    found = search(llama(tmp_path / "llama"), limit=30, beam=2, length=2)
    assert found.breaking == ()
    assert found.finds
    wide: Any = open_model(str(tmp_path / "llama"))
    for find in found.finds:
        peaks = PromptRecorder(wide).peaks(find.tokens)
        assert find.value == pytest.approx(max(peak.value for peak in peaks), rel=1e-5)


def test_an_encoder_is_searched_as_a_whole(tmp_path: Path) -> None:
    name = bert(tmp_path / "bert")
    found: Search = search(name, limit=20, beam=2, length=2)
    assert found.breaking == ()
    assert breaking(name, transformers.BertModel) == set()
    by_length = {step.length: step for step in found.steps}
    assert by_length[1].tried == 20
    assert all(find.headroom is not None for find in found.finds)


def test_peaks_of_rows_are_those_of_each_by_itself(tmp_path: Path) -> None:
    """In a batch the rows of an encoder do not mix, and each has the peak of all its tokens."""
    bert(tmp_path / "bert")
    subject: Any = open_model(str(tmp_path / "bert"))
    recorder = PromptRecorder(subject)
    together = recorder.after([10, 20, 30], [7, 8])
    for token, peak in zip([10, 20, 30], together, strict=True):
        single = max(recorder.peaks([7, 8, token]), key=lambda one: one.value)
        assert peak.value == pytest.approx(single.value, rel=1e-5)
        assert peak.place == single.place


def test_given_prompts_are_shortened_to_what_overflows(tmp_path: Path) -> None:
    name = llama(tmp_path / "llama", dangerous="qQ")
    (bad,) = breaking(name, transformers.LlamaForCausalLM)
    piece = open_tokenizer(str(tmp_path / "llama")).piece(bad)
    (tmp_path / "a.txt").write_text(f"Some words, {piece} and more of them")
    (tmp_path / "b.txt").write_text("Some words")
    found = search(name, length=1, prompts=[tmp_path / "a.txt", tmp_path / "b.txt"])
    shortened, changed = found.given
    assert (shortened.tokens, shortened.text, shortened.breaks) == ((bad,), piece, True)
    assert changed.breaks  # the dangerous token has taken the place of another one
    assert bad in changed.tokens
    assert [one.file for one in found.given] == [f"{len(found.finds) + n}.txt" for n in (1, 2)]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float16)
    with torch.inference_mode():
        for one in found.given:
            assert not model(torch.tensor([one.tokens])).logits.isfinite().all()


def test_prompts_that_overflow_together_alone_are_put_together(tmp_path: Path) -> None:
    """From the seventh position on everything overflows, and each of the two ends before it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 40_000.0
        model.transformer.wpe.weight[6:, 0] = 40_000.0
    name = f"hf:{save(model, tmp_path / 'gpt2')}"
    for file, text in (("a.txt", "abcd"), ("b.txt", "efgh")):
        (tmp_path / file).write_text(text)
    found = search(name, limit=8, length=1, prompts=[tmp_path / "a.txt", tmp_path / "b.txt"])
    assert [one.breaks for one in found.given] == [False, False, True]
    assert found.given[-1].text == "abcdefg"
    assert found.given[-1].broken_position == 6


def test_where_a_weight_overflows_a_token_alone_is_the_shortest(tmp_path: Path) -> None:
    """Every prompt breaks then, however small its values are in float32."""
    name = llama(tmp_path / "llama")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] = 0.0
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 70_000.0
    save(model, tmp_path / "llama")
    found = search(name, limit=20, length=2)
    assert [len(find.tokens) for find in found.breaking] == [1, 1, 1]

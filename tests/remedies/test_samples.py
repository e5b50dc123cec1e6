"""What a repair runs: the kit's own texts, and the user's texts, chats and tensors from files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from folders import save
from remedied import small

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.transformers import open_model
from stabilitykit.remedies.samples import samples_for

OPENED = small(3)
TOKENIZER = Tokenizer(OPENED.vocabulary)
SUBJECT = GemmaSubject(build(OPENED))


def last(path: Path, **how: Any) -> list[int]:
    """The tokens of the one input that `path` adds."""
    own = samples_for(SUBJECT).choosing
    found = samples_for(SUBJECT, prompts=[path], **how).choosing
    assert len(found) == len(own) + 1
    ids: list[int] = found[-1]["input_ids"].flatten().tolist()
    return ids


def test_the_users_own_texts_choose_with_bos_or_without(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("hi", encoding="utf-8")
    ids = TOKENIZER.encode("hi", bos=False)
    assert last(tmp_path / "mine.txt") == [2, *ids]
    assert last(tmp_path / "mine.txt", bos=False) == ids
    assert last(tmp_path) == [2, *ids]  # a folder of files
    ranked = samples_for(SUBJECT, prompts=[tmp_path / "mine.txt"]).held_out
    assert len(ranked) == len(samples_for(SUBJECT).held_out)


def test_chats_and_tensors_choose_too(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "hi"}]))
    assert last(tmp_path / "chat.json") == TOKENIZER.chat("hi", generation=3)
    np.savez(tmp_path / "ids.npz", input_ids=np.array([[2, 70, 71]]))
    assert last(tmp_path / "ids.npz") == [2, 70, 71]


def test_a_text_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a b " * (2 * OPENED.config.context), encoding="utf-8")
    with pytest.raises(
        MisuseError, match=r"long\.txt has [\d,]+ tokens, and the model's context holds [\d,]+; shorten it"
    ):
        samples_for(SUBJECT, prompts=[tmp_path / "long.txt"])


def test_inputs_are_tensors_in_any_of_three_forms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    subject = open_model(str(save(transformers.ViTModel(config), tmp_path / "vit", tokenizer=False)), whole=True)
    pixels = torch.ones(1, 3, 8, 8)
    torch.save({"pixel_values": pixels}, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", pixel_values=pixels.numpy())
    found = samples_for(subject, inputs=[tmp_path / "a.pt", tmp_path / "b.npz"])
    assert [one["pixel_values"].shape for one in (*found.choosing, *found.held_out)] == [(1, 3, 8, 8)] * 2
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(MisuseError, match=r"c\.txt is no file of tensors: their names end in \.npz"):
        samples_for(subject, inputs=[tmp_path / "c.txt"])
    with pytest.raises(MisuseError, match=r"reads pixel_values, and no text.*--inputs FILE"):
        samples_for(subject)

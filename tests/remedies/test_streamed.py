"""A model that is scaled while it runs computes what one does that is scaled in memory, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from families import family_model
from rescaled import exact_scaling

from stabilitykit.models.transformers.plain import load_plain, read_settings
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies import streamed
from stabilitykit.remedies.answers import answers
from stabilitykit.remedies.repaired_folder import verify_checked, write_checked
from stabilitykit.remedies.streamed import open_scaled
from stabilitykit.scaling.apply import with_settings

PROMPTS = ((3, 70, 71, 72, 73, 9), (5, 6, 7))


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Gemma 4", "T5", "BERT", "GPT-2", "ViT"])
def test_streamed_and_in_memory_are_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = ARCHITECTURES[name]()[0]
    model.save_pretrained(tmp_path)
    loaded = load_plain(tmp_path, torch.float32)
    factors = {one: Factor(exponents=(index % 3 - 1,)) for index, (one, _) in enumerate(loaded.named_parameters())}
    settings = read_settings(tmp_path)
    scaling = exact_scaling(loaded) if name in ("Llama", "Mixtral") else Scaling(parameters=factors)
    settings = with_settings(settings, scaling.settings)
    wanted = dict(answers(open_scaled(tmp_path, scaling.parameters, settings).module, PROMPTS))
    monkeypatch.setattr(streamed, "HELD", 0)
    opened = open_scaled(tmp_path, scaling.parameters, settings)
    assert opened.weights
    found = dict(answers(opened.module, PROMPTS))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[what], wanted[what]) for what in wanted)


def test_a_folder_is_checked_and_verified_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "HELD", 0)
    model = family_model("llama")
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    facts = write_checked(tmp_path / "a", exact_scaling(model), tmp_path / "b", PROMPTS)
    assert facts.check.equal
    assert verify_checked(tmp_path / "b", facts)[1] == ()
    (tmp_path / "a").rename(tmp_path / "away")
    assert verify_checked(tmp_path / "b", facts)[1] == ()

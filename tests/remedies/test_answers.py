"""What a model is run on: prompts with padding that is masked, and whatever else it needs, the same each time."""

from typing import Any

import torch
from architectures import ARCHITECTURES
from families import family_model

from stabilitykit.remedies.answers import NEW_TOKENS, answers, inputs

PROMPTS = ((3, 70, 71, 72, 73, 9), (5, 6, 7))


def test_padding_is_on_the_left_and_masked() -> None:
    model = family_model("llama")
    given = inputs(model, PROMPTS)
    assert given["input_ids"].tolist() == [list(PROMPTS[0]), [0, 0, 0, *PROMPTS[1]]]
    assert given["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    found = dict(answers(model, PROMPTS))
    padded = found["padded on the left, eager"].reshape(2, 6, -1)
    alone = found["prompt 2, eager"].reshape(3, -1)
    torch.testing.assert_close(padded[1, 3:], alone)
    assert not torch.allclose(padded[1, :3], alone)


def test_new_tokens_are_those_of_greedy_decoding() -> None:
    model = family_model("llama")
    logits = dict(answers(model, PROMPTS))["16 new tokens with a cache, sdpa"].reshape(NEW_TOKENS, -1)
    ids = list(PROMPTS[0])
    for step in range(NEW_TOKENS):
        whole = model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits[step], whole)
        ids.append(int(logits[step].argmax()))


def test_images_and_sounds_are_drawn_by_the_first_number() -> None:
    for name in ("ViT", "Whisper", "Wav2Vec2"):
        model: Any = ARCHITECTURES[name]()[0]
        one, same, other = (inputs(model, [prompt])[model.main_input_name] for prompt in ([1], [1, 5], [2]))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

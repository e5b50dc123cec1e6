"""Generation with the cache against generation without it."""

import pytest
import torch

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.generate import generate
from stabilitykit.models.gemma.load import build
from stabilitykit.models.gemma.model import Gemma
from stabilitykit.models.subject import Sampling

SOURCES = {
    "gemma 1": "random:gemma-2b?layers=2&kv_heads=1",
    "gemma 2": "random:gemma2-2b?layers=2&kv_heads=2&window=6",
    "gemma 3": "random:gemma3-270m?layers=3&kv_heads=2&window=6&global_every=3",
}
GREEDY = Sampling(temperature=None)
PROMPT = [2, 40, 41, 299, 300, 301, 17, 18, 19, 20]


@pytest.fixture(params=list(SOURCES.values()), ids=list(SOURCES))
def model(request: pytest.FixtureRequest) -> Gemma:
    sizes = "hidden_size=64&feed_forward=96&heads=4&head_dim=16&vocabulary=400&query_scalar=16"
    return build(random_checkpoint(f"{request.param}&{sizes}"))


def without_cache(model: Gemma, prompt: list[int], new: int, seed: int | None = None) -> list[int]:
    """Every step runs the whole sequence again; greedy without a seed."""
    tokens = list(prompt)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for _ in range(new):
        logits = model(torch.tensor([tokens]))[:, -1]
        token = int(model.sampler(logits, temperature=None if seed is None else 1.0, generator=generator))
        if token == model.eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("temperature", [None, 0, 0.0])
def test_greedy_equals_uncached(model: Gemma, temperature: float | None) -> None:
    expected = without_cache(model, PROMPT, 20)
    assert generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(temperature=temperature)) == expected
    assert len(expected) == 20


def test_sampling_equals_uncached(model: Gemma) -> None:
    expected = without_cache(model, PROMPT, 20, seed=3)
    assert generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(seed=3)) == expected
    assert expected != without_cache(model, PROMPT, 20, seed=4)


def test_every_step_is_one_token(model: Gemma) -> None:
    widths = []
    handle = model.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    generate(model, PROMPT, max_new_tokens=4, sampling=GREEDY)
    handle.remove()
    assert widths == [(1, 10), (1, 1), (1, 1), (1, 1)]


def test_rows_and_left_padding(model: Gemma) -> None:
    short = PROMPT[:6]
    tokens = torch.tensor([PROMPT, [0] * 4 + short])
    padding = torch.tensor([[True] * 10, [False] * 4 + [True] * 6])
    together = generate(model, tokens, max_new_tokens=8, sampling=GREEDY, padding=padding)
    assert together == [without_cache(model, PROMPT, 8), without_cache(model, short, 8)]


def test_stops_at_eos(model: Gemma) -> None:
    """Whatever the first row says fourth is declared the end; the other row goes on, and then no pass runs."""
    rows = torch.tensor([PROMPT, PROMPT[::-1]])
    free = generate(model, rows, max_new_tokens=12, sampling=Sampling(seed=0))
    model.eos = free[0][3]
    cut = [row[: row.index(model.eos)] if model.eos in row else row for row in free]
    assert len(cut[0]) <= 3 < len(cut[1])
    assert generate(model, rows, max_new_tokens=12, sampling=Sampling(seed=0)) == cut

    model.eos = generate(model, PROMPT, max_new_tokens=1, sampling=GREEDY)[0]
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert generate(model, PROMPT, max_new_tokens=12, sampling=GREEDY) == []
    assert len(passes) == 1


def test_nothing_to_generate(model: Gemma) -> None:
    assert generate(model, PROMPT, max_new_tokens=0) == []


@pytest.mark.parametrize("tokens", [[], torch.zeros(1, 0, dtype=torch.int64), torch.tensor([2, 3])], ids=repr)
def test_prompts_of_another_shape_are_refused(model: Gemma, tokens: list[int]) -> None:
    with pytest.raises(MisuseError, match="A prompt is at least one token, in a tensor"):
        generate(model, tokens, max_new_tokens=3)

"""Every length from one run: what it says is what direct runs say."""

from pathlib import Path

import pytest
import torch

from stabilitykit.checkpoints import Checkpoint, GemmaConfig, random_checkpoint
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.matmul import matmul
from stabilitykit.recorder import record
from stabilitykit.run.every_length import every_length
from stabilitykit.run.prompts import parse_prompt
from stabilitykit.run.prompts import tokens as prompt_tokens
from stabilitykit.scaling.stressed import stressed

LENGTH = 24
CONFIG = GemmaConfig(
    generation=3,
    layers=3,
    hidden_size=32,
    feed_forward=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=64,
    window=8,
    global_every=3,
)


def model_and_tokens(seed: int, rescale: float) -> tuple[Gemma, list[int]]:
    """One token's embedding is far larger than any other's, and first comes late in the text."""
    torch.manual_seed(seed)
    model = Gemma(CONFIG).eval().requires_grad_(False)
    model.embed_tokens.weight[7] *= 64
    tokens = [int(token) for token in torch.randint(8, 64, (LENGTH,))]
    tokens[13] = 7
    tensors = {name: weight.data for name, weight in model.named_parameters()}
    vocabulary = random_checkpoint("random:gemma3-270m?layers=1&vocabulary=300").vocabulary
    opened = Checkpoint(source="", sha256="", config=CONFIG, tensors=tensors, vocabulary=vocabulary)
    return stressed(opened, rescale, dtype="float16"), tokens


def first_site(model: Gemma, tokens: list[int]) -> str | None:
    with torch.inference_mode(), record(model) as recording:
        model(torch.tensor([tokens]), last_only=True)
    first = recording.first_break()
    return None if first is None else first.site


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [1.0, 512.0, 2048.0, 8192.0, 32768.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_length_breaks_where_a_direct_run_does(seed: int, rescale: float) -> None:
    model, tokens = model_and_tokens(seed, rescale)
    found = every_length(model, tokens)
    for length in range(1, LENGTH + 1):
        assert found.span(length).site == first_site(model, tokens[:length]), length
    assert [span.last + 1 for span in found.spans[:-1]] == [span.first for span in found.spans[1:]]
    assert (found.spans[0].first, found.longest) == (1, LENGTH)
    assert all(check.site == check.direct_site for check in found.checks)


def test_a_text_that_breaks_late_breaks_at_the_length_that_bisection_finds() -> None:
    late = set()
    for rescale in (1024.0, 2048.0, 4096.0, 8192.0):
        model, tokens = model_and_tokens(0, rescale)
        found = every_length(model, tokens).first_broken
        if found is not None:
            low, high = 0, LENGTH
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if first_site(model, tokens[:middle]) else (middle, high)
            assert found == high
            late.add(found)
    assert 14 in late  # the length that lets the large token in


def test_peaks_of_every_length_are_those_of_a_direct_run() -> None:
    """In float32, in which kernels of another shape differ by some ulp: the scores' peaks would differ by far more."""
    torch.manual_seed(0)
    model = Gemma(CONFIG).eval().requires_grad_(False)
    tokens = [int(token) for token in torch.randint(8, 64, (LENGTH,))]
    found = every_length(model, tokens)
    for length in (1, 2, 7, 16, LENGTH):
        with torch.inference_mode(), record(model) as recording:
            model(torch.tensor([tokens[:length]]), last_only=True)
        peaks = {r.site: r.amax for r in recording if r.positions and r.layer is not None}
        compared = [site for site in found.sites(length) if site in peaks]
        assert len(compared) > 60
        for site in compared:
            assert found.amax(site, length) == pytest.approx(peaks[site], rel=2e-5), (site, length)


def test_the_real_model_breaks_late_at_the_length_that_bisection_finds(checkpoint_270m: Checkpoint) -> None:
    """The opening of a novel, without <bos>, in float16. The direct runs are bare ones, up to what the head reads."""
    model = build(checkpoint_270m, dtype="float16")
    prose = parse_prompt("prose", Path())
    assert model.tokenizer is not None
    tokens = prompt_tokens(prose, model.tokenizer, bos=False, length=152)
    known: dict[int, bool] = {}
    head, model.lm_head = model.lm_head, torch.nn.Identity()  # type: ignore[assignment]

    def breaks(length: int) -> bool:
        if length not in known:
            with torch.inference_mode(), matmul("float32-accumulate"):
                hidden = model(torch.tensor([tokens[:length]]))
            known[length] = not bool(hidden.isfinite().all())
        return known[length]

    low, high = 0, len(tokens)
    assert breaks(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if breaks(middle) else (middle, high)
    for length in (1, 16, 60, high + 9):  # bisection is right where every longer prompt breaks too
        breaks(length)
    assert {length for length, broken in known.items() if broken} == {n for n in known if n >= high}

    model.lm_head = head
    found = every_length(model, tokens, matmul="float32-accumulate")
    assert found.first_broken == high
    assert found.longest == len(tokens)
    assert [(span.first, span.last, span.broke is None) for span in found.spans] == [
        (1, high - 1, True),
        (high, len(tokens), False),
    ]
    first = found.span(high)
    assert first.broke is not None
    assert (first.operator, first.broke.kind) == ("add", "overflow")
    assert first.broke.position == high - 1  # of the token that this length is the first to hold
    assert first.broke.token == tokens[high - 1]
    assert all(check.site == check.direct_site for check in found.checks)
    assert {check.length for check in found.checks} == {1, high}

"""Whole generations: each step its own, absolute positions, rows told apart, caches judged by what is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import family_model
from torch import nn

from reference import reference_model
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis import by_step, cause, verdict
from stabilitykit.models.gemma import Gemma, build, generate
from stabilitykit.models.subject import Sampling
from stabilitykit.recorder import record
from stabilitykit.run.case import run_case

Small = Callable[..., Gemma]
LARGE = 77  # a token whose embedding is past float16's range once it is scaled


@pytest.fixture
def planted(small: Small) -> Gemma:
    model = small(3, "float16")
    weight = model.embed_tokens.weight.detach().clone()
    weight[LARGE, 5] = 1.2e4  # times √32 on the way in, and no more on the way out
    model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def test_the_270m_raises_transformers_own_error_and_the_break_is_named(checkpoint_270m: Checkpoint) -> None:
    model = reference_model(build(checkpoint_270m, dtype="float16"))
    tokens = torch.tensor([[2, 818, 5279, 529, 7001, 563]])
    with pytest.raises(RuntimeError, match="probability tensor contains either"), record(model) as recording:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, max_new_tokens=8)
    first = recording.first_break()
    assert first is not None
    assert (first.site, first.label, first.operator, first.step) == ("layers.7", "residual after MLP", "add", 0)
    assert first.broke is not None
    assert first.broke.position == 0
    assert cause(recording).name == "range"


@pytest.mark.parametrize("implementation", ["ours", "transformers"])
def test_each_step_is_its_own_and_positions_are_absolute(small: Small, implementation: str) -> None:
    model: Any = small(3, "float16")
    tokens = torch.tensor([[2, 70, 71, 72]])
    if implementation == "transformers":
        model = reference_model(model)
        with record(model) as recording:
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=5, min_new_tokens=5
            )
    else:
        with record(model) as recording:
            generate(model, tokens, max_new_tokens=5, sampling=Sampling(temperature=None))
    assert recording.header.starts == (0, 4, 5, 6, 7)
    for step in range(1, 5):
        record_ = recording.at("layers.2", step)
        assert (record_.amax_position, record_.positions) == (3 + step, 1)
        assert record_.shape[:2] == (1, 1)
    assert recording.header.tokens is not None
    assert len(recording.header.tokens[0]) == 8  # the last token is drawn and never run
    assert [row.position for row in by_step(recording)] == [0, 4, 5, 6, 7]


def test_the_step_and_the_token_that_broke_are_named(planted: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([70, 71, LARGE, 72])
    real = type(planted.sampler).forward

    def draw(self: nn.Module, logits: torch.Tensor, **how: Any) -> torch.Tensor:
        real(self, logits, **how)  # type: ignore[arg-type]
        return torch.tensor([next(drawn)])

    monkeypatch.setattr(type(planted.sampler), "forward", draw)
    run = run_case(planted, [2, 80, 81], new_tokens=9, sampling=Sampling(temperature=None))
    first = run.recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.step, first.broke.position, first.broke.token) == (3, 5, LARGE)
    assert first.site == "embed_tokens"
    assert max(record.step for record in run.recording) == 3  # the first step that breaks is the last
    text = verdict(run.recording)
    assert "the 3rd token generated" in text
    rows = by_step(run.recording)
    assert [row.lost > 0 for row in rows] == [False, False, False, True]
    assert rows[3].token == run.recording.header.text_of(LARGE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["ours", "eager", "sdpa"])
def test_rows_padded_on_either_side_are_told_apart(planted: Gemma, side: str, implementation: str) -> None:
    short = [0, 0, 2, 70, 71] if side == "left" else [2, 70, 71, 0, 0]
    tokens = torch.tensor([short, [2, 72, LARGE, 73, 74]])
    model: Any = planted
    if implementation != "ours":
        model = reference_model(planted)
        model.set_attn_implementation(implementation)
    with torch.inference_mode(), record(model) as recording:
        if implementation == "ours":
            model(tokens, padding=tokens != 0)
        else:
            model(tokens, attention_mask=(tokens != 0).long())
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.site, first.broke.kind) == ("embed_tokens", "overflow")
    assert (first.broke.row, first.broke.position, first.broke.token) == (1, 2, LARGE)
    assert "of row 1" in verdict(recording)


class Cached(nn.Module):
    """Keeps float32 keys in a float16 cache, of which most was never written to."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.full((1, 2, 8, 4), float("nan"), dtype=torch.float16)

    def forward(self, keys: torch.Tensor, at: int) -> torch.Tensor:
        self.cache[:, :, at : at + keys.shape[2]] = keys
        return self.cache[:, :, : at + keys.shape[2]] * 1.0


def test_a_write_into_a_cache_is_judged_by_the_slice_that_was_written() -> None:
    model = Cached()
    model.cache[:, :, :2] = 0.0
    keys = torch.ones(1, 2, 1, 4)
    with torch.inference_mode(), record(model) as recording:
        model(keys, 2)
        model(keys * 1e6, 3)
        model(keys, 4)
    writes = [r for r in recording if r.operator == "cast"]
    assert [r.shape for r in writes] == [(1, 2, 1, 4)] * 3
    assert [r.broke is not None for r in writes] == [False, True, False]
    first = recording.first_break()
    assert first is writes[1]
    assert first is not None
    assert first.broke is not None
    assert (first.broke.kind, first.broke.value, first.broke.limit) == ("overflow", 1e6, 65504)
    assert [r.broke for r in recording if r is not first] == [None] * (
        len(recording) - 1
    )  # what it spoilt is no new break


def test_gemma_4s_shared_keys_break_nothing_in_a_generation() -> None:
    model = family_model("gemma4", torch.float16)
    tokens = torch.tensor([[2, 70, 71, 72]])
    with record(model) as recording:
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, max_new_tokens=3, min_new_tokens=3
        )
    assert recording.first_break() is None
    assert {r.step for r in recording} == {0, 1, 2}


def test_operators_between_the_steps_have_the_same_names_after_each(small: Small) -> None:
    model = reference_model(small(3, "float16"))
    tokens = torch.tensor([[2, 70, 71]])
    with record(model) as recording:
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=0.7, max_new_tokens=3,
            min_new_tokens=3,
        )  # fmt: skip
    between = [[r.site for r in recording if r.module == "outside" and r.step == step] for step in range(3)]
    assert between[0]
    assert between[0] == between[1] == between[2]

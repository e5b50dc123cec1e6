"""A cache that anybody but a step has changed: what is known of its rows is not carried over to others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import LARGE
from torch import Tensor
from transformers import DynamicCache, StaticCache

import stabilitykit as sk

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def run(model: Any, ids: Tensor, **how: Any) -> Tensor:
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | how)
    return found


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_static_cache_that_is_emptied_holds_other_requests(theirs: Make, ids: Tensor, context: Any) -> None:
    model = theirs()
    with context(), sk.guard(model) as guard:
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(ids, past_key_values=cache)
        assert list(guard.stopped) == [1]
        cache.reset()
        model(ids[[0, 2, 0]], past_key_values=cache)
        assert list(guard.stopped) == []
        cache.reset()
        model(ids, past_key_values=cache)
    assert [(one.row, one.phase, one.step) for one in guard.breaks] == [(1, "prefill", 0)] * 2


def test_a_row_that_is_written_anew_is_another_request(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    sound = StaticCache(config=model.config, max_cache_len=12)
    cache = StaticCache(config=model.config, max_cache_len=12)
    token = ids[:, :1]
    with torch.no_grad(), sk.guard(model) as guard:
        model(ids[[0, 0, 2]], past_key_values=sound)
        model(ids, past_key_values=cache)
        for ours, other in zip(cache.layers, sound.layers, strict=True):
            assert ours.keys is not None
            assert ours.values is not None
            assert other.keys is not None
            assert other.values is not None
            ours.keys[1], ours.values[1] = other.keys[1], other.values[1]
        assert model(token, past_key_values=cache).logits.isfinite().all()
        assert list(guard.stopped) == []
        model(token.index_fill(0, torch.tensor([1]), LARGE), past_key_values=cache)
        assert list(guard.stopped) == [1]
    assert [(one.row, one.phase, one.step) for one in guard.breaks] == [(1, "prefill", 0), (1, "decode", 2)]


def test_rows_that_change_places_are_named_by_where_they_are(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), sk.guard(model, "retry") as guard:
        model(ids, past_key_values=cache)
        cache.reorder_cache(torch.LongTensor([1, 0, 2]))
        logits = model(ids[:, :1], past_key_values=cache).logits
    assert logits.isfinite().flatten(1).all(1).tolist() == [False, True, True]
    assert [(one.row, one.did) for one in guard.breaks] == [(1, "retried"), (0, "gave up")]
    assert "its rows moved" in (guard.breaks[1].why or "")


@pytest.mark.parametrize("how", ["stop", "retry"])
def test_beams_are_listed_once_a_prompt_and_left_as_they_are(theirs: Make, ids: Tensor, how: Any) -> None:
    model = theirs()
    bare = run(model, ids, num_beams=2)
    with sk.guard(model, how) as guard:
        assert torch.equal(run(model, ids, num_beams=2), bare)
        first = guard.take()
        assert run(model, ids)[1, 4].item() == 1 or how == "retry"  # and without beams a row ends, as ever
    assert [one.row for one in first if one.step == 0] == [2, 3]
    assert not {2, 3} & {one.row for one in first if one.step > 0}
    assert {one.did for one in first} == {"reported" if how == "stop" else "gave up"}
    assert guard.breaks[0].did == ("stopped" if how == "stop" else "retried")


def test_a_retried_row_follows_a_cache_that_assisted_generation_cuts(theirs: Make, ids: Tensor) -> None:
    model, wide, assistant = theirs(), theirs("float32"), theirs(planted=False)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    assistant.lm_head.weight = torch.nn.Parameter(assistant.lm_head.weight.roll(1, 0))  # it guesses wrong
    expected = run(wide, ids[1:2], max_new_tokens=10)
    with sk.guard(model, "retry") as guard:
        found = run(model, ids[1:2], max_new_tokens=10, assistant_model=assistant)
    assert torch.equal(found, expected)
    assert [one.did for one in guard.breaks] == ["retried"]


def test_a_mask_as_long_as_the_cache_hides_no_token(theirs: Make, ids: Tensor) -> None:
    """Its last columns are of slots that nobody has written, and not of this call's tokens."""
    model = theirs()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]] * 3)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad(), sk.guard(model) as guard:
        for _ in range(2):  # where the cache is new, and where its length is on the device
            assert not model(ids, past_key_values=cache, attention_mask=mask).logits[1, 2:].isfinite().any()
            cache.reset()
    assert [one.row for one in guard.breaks] == [1, 1]

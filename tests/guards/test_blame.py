"""What no dtype mends is named as what it is, and a retry refuses it and says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import stabilitykit as sk
from stabilitykit.models.gemma import KVCache

Make = Callable[..., Any]


def test_unwritten_slots_of_a_cache(theirs: Make, ids: Tensor) -> None:
    """A static cache of which the slots that nobody wrote hold NaN, in one row: they are masked, and 0 · NaN is NaN."""
    model = theirs(planted=False)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with sk.guard(model, "retry") as guard:
        model(ids[:, :2], past_key_values=cache)
        for layer in cache.layers:
            assert layer.values is not None
            layer.values[1, :, 3:] = torch.nan
        logits = model(ids[:, 2:3], past_key_values=cache).logits
    (broke,) = guard.breaks
    assert (broke.row, broke.step, broke.kind, broke.did) == (1, 1, "input", "gave up")
    assert "cache was not finite before the step" in (broke.why or "")
    assert guard._wide._model is None  # no weights were made for it
    assert logits[1].isnan().any()
    assert logits[[0, 2]].isfinite().all()


def test_a_cache_that_holds_nan(own: Make, ids: Tensor) -> None:
    model = own(planted=False)
    cache = KVCache(model.config, batch=3, length=8, dtype=model.dtype)
    with sk.guard(model, "retry") as guard:
        model(ids[:, :2], cache=cache)
        cache._values[1][2, 0, 1, 3] = torch.nan
        model(ids[:, 2:3], cache=cache)
        model(ids[:, 3:4], cache=cache)
    (broke,) = guard.breaks
    assert (broke.row, broke.kind, broke.layer, broke.did) == (2, "input", 1, "gave up")
    assert "the cache was not finite" in (broke.why or "")


def test_a_fully_masked_row(theirs: Make, ids: Tensor) -> None:
    model = theirs(planted=False)
    mask = torch.ones(3, 1, 4, 4, dtype=torch.bool).tril()
    mask[1] = False
    blocked = torch.zeros(3, 1, 4, 4).masked_fill(~mask, -torch.inf).half()
    with sk.guard(model, "retry") as guard:
        logits = model(ids, attention_mask={"full_attention": blocked, "sliding_attention": blocked}).logits
    (broke,) = guard.breaks
    assert (broke.row, broke.kind, broke.did) == (1, "masked-row", "gave up")
    assert "nothing to attend to in any dtype" in (broke.why or "")
    assert logits[1].isnan().any()


def test_a_weight_that_is_not_finite_but_where_another_one_is_given(own: Make, ids: Tensor) -> None:
    model, wide = own(planted=False), own("float32", planted=False)
    model.layers[1].mlp.down_proj.weight = nn.Parameter(model.layers[1].mlp.down_proj.weight.clone())
    model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.inf
    with torch.no_grad():
        with sk.guard(model, "retry") as guard:
            model(ids)
        assert {(one.kind, one.did) for one in guard.breaks} == {("weight", "gave up")}
        assert "a weight is not finite" in (guard.breaks[0].why or "")
        with sk.guard(model, "retry", wide=wide) as guard:
            assert torch.equal(model(ids), wide(ids))
    assert [one.did for one in guard.breaks] == ["retried"] * 3


def test_what_fails_in_float32_too_is_given_up_after_it_was_tried(own: Make, ids: Tensor) -> None:
    """0 / 0 of an activation: invalid in any dtype."""
    model = own(planted=False)

    class Invalid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0) / (x * 0)

    model.layers[2].mlp = Invalid()
    with torch.no_grad(), sk.guard(model, "retry") as guard:
        model(ids)
    assert {(one.row, one.kind, one.did) for one in guard.breaks} == {(row, "invalid", "gave up") for row in range(3)}
    assert "float32 fails too" in (guard.breaks[0].why or "")


@pytest.mark.parametrize("how", ["stop", "retry"])
def test_a_processor_that_leaves_no_token(theirs: Make, ids: Tensor, how: Any) -> None:
    model = theirs(planted=False)

    class Bans:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.where((input_ids[:, -1:] == 71) | (input_ids[:, 1:2] == 73), -torch.inf, scores)

    with sk.guard(model, how) as guard:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1, logits_processor=[Bans()]
        )
    assert found[2, 4] == 1  # ended before torch could raise
    (broke,) = guard.breaks
    assert (broke.row, broke.seen, broke.kind, broke.site) == (2, "scores", "no-token", "Bans")
    assert (broke.did, broke.why is not None) == (("stopped", False) if how == "stop" else ("gave up", True))


def test_raise_comes_before_a_token_is_drawn(theirs: Make, ids: Tensor) -> None:
    model = theirs(planted=False)
    bans = [lambda input_ids, scores: scores.index_fill(0, torch.tensor([1]), -torch.inf)]
    with sk.guard(model, "raise"), pytest.raises(sk.NumericalBreak) as raised:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=2, logits_processor=bans
        )
    assert (raised.value.rows, raised.value.breaks[0].kind) == ((1,), "no-token")


def held(cache: Any) -> list[Tensor]:
    if isinstance(cache, KVCache):
        return [tensor.clone() for tensor in (*cache._keys, *cache._values)]
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("kind", ["kit", "dynamic", "plain", "static"])
def test_the_repetition_uses_a_copy_of_the_cache_as_it_was(own: Make, theirs: Make, kind: str) -> None:
    """Past the window of 4: the repeated step gives the very logits of the first, and the live cache keeps its bits."""
    from stabilitykit.guards.step import Step

    model = own(planted=False) if kind == "kit" else theirs(planted=False)
    caches: dict[str, Callable[[], Any]] = {
        "kit": lambda: KVCache(model.config, batch=2, length=16, dtype=model.dtype),
        "dynamic": lambda: DynamicCache(config=model.config),
        "plain": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }
    cache, name = caches[kind](), "cache" if kind == "kit" else "past_key_values"
    tokens = torch.randint(262, 360, (2, 9), generator=torch.Generator().manual_seed(1))
    last = 3 if kind == "static" else 9  # a static window is written in place
    for at in range(last):
        new = {name: cache}
        step = Step.of("", model, (tokens[:, at : at + 1],), new)
        made = model(tokens[:, at : at + 1], **new)
        before = held(cache)
        again = step.again(model).run()
        alone = step.again(model, [1]).run()
        logits, repeated, single = (one if kind == "kit" else one.logits for one in (made, again, alone))
        assert torch.equal(logits, repeated)
        assert torch.allclose(logits[1:], single, rtol=1e-2, atol=1e-2)
        assert all(torch.equal(*pair) for pair in zip(held(cache), before, strict=True))


def test_a_cache_of_which_nothing_is_known_is_said_to_be_so(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    cache = StaticCache(config=model.config, max_cache_len=12)
    with sk.guard(model, "warn") as guard:
        for at in range(4):
            model(ids[:, :1] if at < 3 else ids[:, 2:3], past_key_values=cache)
        model(ids[:, 2:3], past_key_values=cache)  # the window of 4 has been full before
        model(torch.full((3, 1), 77), past_key_values=cache)
    assert guard.breaks[-1].site is None
    assert "its window dropped what the step had read" in (guard.breaks[-1].unexamined or "")

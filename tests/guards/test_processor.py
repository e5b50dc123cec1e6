"""The logits processor that needs no guard: it ends, names or refuses rows by their scores alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stabilitykit as sk
from stabilitykit.errors import MisuseError

Make = Callable[..., Any]


def run(model: Any, ids: Tensor, *processors: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, logits_processor=list(processors), **how
    )
    return found


def test_it_ends_the_broken_row_and_names_it_by_its_step(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    greedy = run(model, ids[[0, 2]], do_sample=False)
    guard = sk.StabilityGuard(eos=1)
    found = run(model, ids, guard, do_sample=False)
    assert torch.equal(found[[0, 2]][:, : greedy.shape[1]], greedy)
    assert found[1, 4:].tolist() == [1, 0, 0]
    broke = guard.breaks[0]
    assert (broke.row, broke.phase, broke.step, broke.position, broke.token) == (1, "prefill", 0, 3, 72)
    assert (broke.seen, broke.kind, broke.site, broke.did) == ("scores", "not-finite", None, "stopped")
    run(model, ids, guard, do_sample=True)  # another call begins anew
    assert [(one.row, one.step) for one in guard.breaks if one.step == 0] == [(1, 0), (1, 0)]


def test_a_row_without_a_token_left_is_told_from_one_that_is_nan() -> None:
    scores = torch.zeros(4, 8)
    scores[1] = -torch.inf
    scores[2, 3] = torch.nan
    scores[3, 3] = torch.inf
    guard = sk.StabilityGuard(on_break="warn")
    assert guard(torch.ones(4, 5, dtype=torch.int64), scores) is scores
    assert [(one.row, one.kind) for one in guard.breaks] == [(1, "no-token"), (2, "not-finite"), (3, "not-finite")]


def test_it_raises_without_a_token_to_end_rows_with(theirs: Make, ids: Tensor) -> None:
    with pytest.raises(sk.NumericalBreak) as raised:
        run(theirs(), ids, sk.StabilityGuard(), do_sample=True)
    assert raised.value.rows == (1,)


def test_a_callable_decides() -> None:
    scores = torch.full((1, 4), torch.nan)
    ids = torch.ones(1, 2, dtype=torch.int64)
    assert sk.StabilityGuard(eos=2, on_break=lambda breaks: None)(ids, scores) is scores
    ended = sk.StabilityGuard(eos=2, on_break=lambda breaks: "stop")(ids, scores)
    assert ended.softmax(-1).tolist() == [[0, 0, 1, 0]]
    with pytest.raises(sk.NumericalBreak):
        sk.StabilityGuard(eos=2, on_break=lambda breaks: "raise")(ids, scores)


def test_what_it_cannot_do_is_refused() -> None:
    for how, match in (("retry", "no model"), ("ignore", "choose one of"), ("stop", "has to know the token")):
        with pytest.raises(MisuseError, match=match):
            sk.StabilityGuard(on_break=how)  # type: ignore[arg-type]

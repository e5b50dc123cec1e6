"""What hides keys becomes half of the dtype's minimum: still far below any score, and finite whatever is added to it.

A row of a mask that hides every key with -inf has a softmax of 0 / 0. The minimum itself overflows once a negative
score, or a second mask, is added to it.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stabilitykit.diagnosis.outcome import decisive
from stabilitykit.models.operators import Traits
from stabilitykit.remedies.remedy import Around
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation
from stabilitykit.trials.surgery import inside

NAME = "mask at half the minimum"
_PLACES = frozenset("where masked_fill full new_full fill scalar_tensor".split())
_SUMS = frozenset("add sub mul".split())
_READS = frozenset("softmax log_softmax logsumexp exp amax max scaled_dot_product_attention".split())
_ATTENDS = ("softmax", "log_softmax", "logsumexp", "scaled_dot_product_attention")


def half_minimum(situation: Situation) -> Iterator[Candidate]:
    """Where a mask hides every key of a row, and where a sum with it overflows."""
    broke = situation.broke
    if broke is None or not _is_about_a_mask(situation):
        return
    modules = {one.module for one in situation.low if one.operator in _ATTENDS} | {broke.module}
    given = broke.broke is not None and broke.broke.origin_kind in ("input", "outside")
    around = partial(_around, frozenset(modules))
    wide = torch.float64 if situation.reproduction.dtype == "float32" else torch.float32
    yield Candidate(
        name=NAME,
        lossy=True,
        summary="Hides keys with half of the dtype's minimum instead of the minimum or minus infinity: what is added "
        "to it stays finite, and a row without any key attends to all alike.",
        command="attention_mask = attention_mask.clamp(min=torch.finfo(attention_mask.dtype).min / 2)"
        if given
        else f"# in {broke.module or 'the model'}, where the mask is made: torch.finfo(dtype).min / 2 instead of the "
        "minimum or float('-inf')",
        around=around(None),
        reference=None if decisive(situation.wide) is None else around(wide),
    )


def _is_about_a_mask(situation: Situation) -> bool:
    broke, kind = situation.broke, situation.kind
    if broke is None or broke.broke is None:
        return False
    if situation.is_outside:  # the scores of a sampler, of which -inf takes choices away
        return False
    return kind == "masked-row" or situation.part == "mask"


def _around(modules: frozenset[str], wide: torch.dtype | None) -> Around:
    """`wide`: masks in narrower dtypes, which a caller made, are widened to it, and have that one's minimum."""

    def operate(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind.name in _PLACES or kind.name in _SUMS:
            raised = _at_half
        elif kind.name in _READS:
            raised = _finite
        else:
            return kind.func(*args, **kwargs)
        written = {place for place, _ in kind.written}
        dtype = next((one.dtype for one in args if isinstance(one, Tensor) and one.is_floating_point()), None)
        dtype = kwargs.get("dtype") or wide or dtype or torch.get_default_dtype()
        args = tuple(one if place in written else raised(one, wide, dtype) for place, one in enumerate(args))
        kwargs = {name: raised(one, wide, dtype) for name, one in kwargs.items()}
        return kind.func(*args, **kwargs)

    return lambda model: inside(model, modules.__contains__, operate)


def _at_half(one: Any, wide: torch.dtype | None, dtype: torch.dtype) -> Any:
    """What is below half of its dtype's minimum, at that half; `dtype` is for numbers, which have none."""
    if isinstance(one, Tensor) and one.is_floating_point() and one.element_size() > 1:
        half = torch.finfo(one.dtype).min / 2
        if wide is None or one.element_size() >= wide.itemsize:
            return one.clamp(min=half)
        return one.to(wide).masked_fill(one < half, torch.finfo(wide).min / 2)
    if isinstance(one, float) and dtype.is_floating_point and one < 0:
        return max(one, torch.finfo(dtype).min / 2)
    return one


def _finite(one: Any, wide: torch.dtype | None, dtype: torch.dtype) -> Any:
    """Only -inf at that half: what adds up to the minimum is no larger than it was."""
    if isinstance(one, Tensor) and one.is_floating_point() and one.element_size() > 1:
        return one.masked_fill(one == -math.inf, torch.finfo(one.dtype).min / 2)
    return one

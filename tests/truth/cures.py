"""What cures each planted fault, found by making every change by hand: which of the listed remedies, and how well.

    cd tests && python -m truth.cures                  every row of the table: what it returns, and what cures it
    cd tests && python -m truth.cures llama plain      rows whose key has one of these words

A change cures a fault if the run then returns finite numbers alone and, where a float32 run does so too, is about as
close to it as a format of 16 bits can be. How close that is depends on the row, for a planted fault is a layer that
tells one token from all others, and magnifies rounding: it is measured, by runs that hold float32's range and round
every result to the format's precision, among rows that are lost without a change and among the others. Up to `NEAR`
times as far is close, beyond `FAR` times it is not, and what lies between is left undecided. Differences under `SMALL`
of the largest number always count as close.
"""

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truth.by_hand import Change
from truth.by_hand.arithmetic import (
    clamp,
    float32_islands,
    float32_logits,
    float32_norms,
    float32_operator,
    float32_residual,
    float32_scores,
    saturating_cast,
)
from truth.by_hand.dtypes import NARROW, in_dtype, low
from truth.by_hand.ran import Ran, errors, lost_rows, ran, reachable
from truth.by_hand.surroundings import (
    attention,
    float32_mask,
    half_minimum,
    plain_cache,
    rescaled_cache,
    settings,
    without_padding,
    without_processor,
    zero_filled_cache,
)
from truth.by_hand.weights import (
    POWERS,
    larger_eps,
    merged,
    query_and_key,
    rescale,
    routing_weights_in_experts,
    scale_on_queries,
    up_and_down,
    value_and_output,
    weight_replaced,
)
from truth.row import Planted, Row

NEAR, FAR, SMALL = 3.0, 10.0, 2.0**-9  # float16 rounds to 2^-11
BFLOAT16 = 8.0  # its rounding is so many times as coarse


def _both(first: Change, second: Change, planted: Planted, stack: ExitStack) -> Any:
    """Two changes of the weights, one after the other; None where the first does not apply."""
    model = first(planted, stack)
    return None if model is None else second(replace(planted, model=model), stack)


CHANGES: dict[str, tuple[Change, ...]] = {
    "float32": (in_dtype(torch.float32, NARROW),),
    "bfloat16": (in_dtype(torch.bfloat16),),
    "rescale": tuple(rescale(2.0**-k) for k in POWERS),
    "up and down factors": tuple(map(up_and_down, POWERS)),
    "query and key factors": tuple(
        query_and_key(less, more, k)
        for less, more in (("query", "key"), ("key", "query"), ("query", "scaling"))
        for k in POWERS
    ),
    "value and output factors": tuple(map(value_and_output, POWERS)),
    "scale on queries": (scale_on_queries,),
    "routing weights in experts": (routing_weights_in_experts,),
    "float32 residual": (float32_residual,),
    "float32 norms": (float32_norms,),
    "float32 scores": (float32_scores,),
    "float32 logits": (float32_logits,),
    "float32 operator": (float32_operator, partial(float32_operator, elsewhere=True)),
    "float32 islands": (float32_islands,),
    "larger eps": tuple(larger_eps(10.0**-power) for power in (6, 5, 4, 3)),
    "mask at half the minimum": (half_minimum,),
    "mask in float32": (float32_mask,),
    "saturating cast": (saturating_cast,),
    "rescaled cache": (rescaled_cache,),
    "without padding": (without_padding,),
    "sdpa attention": (attention("sdpa"),),
    "eager attention": (attention("eager"),),
    "plain cache": (plain_cache,),
    "merged in float32": (merged, *(partial(_both, merged, up_and_down(k)) for k in POWERS)),
    "zero-filled cache": (zero_filled_cache,),
    "clamp": (clamp,),
    "greedy": (settings(do_sample=False),),
    "top-k off": (settings(top_k=0),),
    "top-p off": (settings(top_p=1.0),),
    "weight replaced": (weight_replaced,),
}

SETTINGS = ("greedy", "top-k off", "top-p off")
EXACT = frozenset(name for name in CHANGES if "factors" in name) | {"rescale", "scale on queries"}
"""Changes that leave what a model computes in float32; where they do not, they do not apply to it."""
LOSSY = frozenset(("clamp", "saturating cast", "rescaled cache", "larger eps", "mask at half the minimum"))
"""Changes that put other numbers in the place of what is lost: where rounding alone may come to half of the largest
number, nothing shows that these are right.
"""
AT_ORIGIN = frozenset(
    ("weight replaced", "zero-filled cache", "plain cache", "rescaled cache", "without padding", *SETTINGS)
)
"""What can cure numbers that were not finite before any arithmetic. With other changes they may be hidden."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One remedy by hand: None where what it does is too near the edge of what counts as close."""

    cured: bool | None
    finite: bool
    far: float
    error: str | None


@dataclass(frozen=True, slots=True)
class ByHand:
    """A row without any change, in float32 (None where that is not finite either), and with each that applies."""

    finite: bool
    error: str | None
    far: float | None
    reachable: float
    wrong: bool  # not finite, or farther from float32 than rounding explains
    tried: dict[str, Tried] = field(default_factory=dict)

    @property
    def cures(self) -> tuple[str, ...]:
        return tuple(name for name, one in self.tried.items() if one.cured) if self.wrong else ()


def by_hand(row: Row, only: Iterable[str] = ()) -> ByHand:
    """Runs the row as it is, in float32, and with each change (of `only`, if any are named)."""

    def build() -> Any:
        torch.manual_seed(0)
        return row.make()

    planted = build()
    kinds = planted.expected.kinds if planted.expected else ()
    was_lost = bool({"weight", "input", "constant"} & set(kinds))
    plain = ran(planted)
    wide = ran(build(), in_dtype(torch.float32, NARROW))
    assert plain is not None
    assert wide is not None
    reference = wide if wide.finite else None
    within = (
        {bits: _alike(reachable(build, reference, bits), lost_rows(plain)) for bits in (11, 8)} if reference else {}
    )

    def judged(one: Ran, name: str = "", bits: int = 11) -> Tried:
        if not one.finite:
            return Tried(False, False, float("inf"), one.error)
        if reference is None:
            return Tried(None if was_lost and name and name not in at_origin else True, True, 0.0, None)
        away, small = errors(one, reference), SMALL * (BFLOAT16 if bits == 8 else 1.0)
        if away.shape != within[bits].shape:
            return Tried(False, True, float("inf"), "returns something else")
        if name in LOSSY and float(NEAR * within[bits].max()) > 0.5:
            return Tried(None, True, float(away.max()), None)
        worst = float((away / (NEAR * within[bits]).clamp(min=small)).max())
        return Tried(True if worst <= 1 else False if worst > FAR / NEAR else None, True, float(away.max()), None)

    tried: dict[str, Tried] = {}
    processors = {f"without {name}": (without_processor(name),) for name in plain.processors}
    at_origin = AT_ORIGIN | processors.keys()
    for name, variants in (CHANGES | processors).items():
        is_other_run = reference is not None and (name in processors or name in SETTINGS)
        if is_other_run or (only and name not in only):
            continue
        for variant in variants:
            one = ran(build(), variant)
            if one is None:
                continue
            if one.finite and reference and name in EXACT and not _computes(build(), variant, reference):
                continue
            own = judged(one, name, 8 if name == "bfloat16" else 11)
            if name not in tried or _better(own, tried[name]):
                tried[name] = own
            if own.cured:
                break
    own = judged(plain, bits=8 if low(planted) == torch.bfloat16 else 11)
    return ByHand(
        plain.finite,
        plain.error,
        own.far if reference else None,
        float(within[11].max()) if reference else 0.0,
        own.cured is not True,
        tried,
    )


def _computes(planted: Planted, change: Change, reference: Ran) -> bool:
    """Whether the changed row computes in float32 what it did; how near differs, for float32 rounds elsewhere, too."""

    def both(planted: Planted, stack: ExitStack) -> Any:
        change(planted, stack)
        return in_dtype(torch.float32, NARROW)(planted, stack)

    one = ran(planted, both)
    return one is not None and one.finite and float(errors(one, reference).max()) <= SMALL


def _alike(within: Tensor, lost: Tensor) -> Tensor:
    """For each row the most of all rows that the run as it is loses, or of all that it does not: one is too lucky."""
    if lost.shape != within.shape:
        return within.amax().expand_as(within)
    return torch.where(lost, (within * lost).amax(), (within * ~lost).amax())


def _better(one: Tried, other: Tried) -> bool:
    return (one.cured is None, one.finite, -one.far) > (other.cured is None, other.finite, -other.far) or bool(
        one.cured
    )


def main(words: list[str]) -> None:
    from truth.table import TABLE

    torch.set_num_threads(1)
    cured = wrong = 0
    for row in TABLE:
        if words and not any(word in row.key for word in words):
            continue
        one = by_hand(row)
        wrong += one.wrong
        cured += bool(one.cures)
        state = "raises" if one.error else "not finite" if not one.finite else "wrong" if one.wrong else "right"
        how = "" if one.far is None else f", {one.far:.1e} from float32, {one.reachable:.1e} by rounding"
        print(f"{row.key}: {state}{how}", flush=True)
        if not one.wrong:
            continue
        print(f"    cures: {', '.join(one.cures) or 'nothing'}")
        fails = [f"{name} ({_said(tried)})" for name, tried in one.tried.items() if not tried.cured]
        print(f"    not: {', '.join(fails)}")
    print(f"{wrong} rows are wrong, of which {cured} are cured by one of these changes.")


def _said(one: Tried) -> str:
    if one.error:
        return f"raises {one.error}"
    return f"{one.far:.1e}{'?' if one.cured is None else ''}" if one.finite else "not finite"


if __name__ == "__main__":
    main(sys.argv[1:])

"""Bounds for people: all of them in a sentence, and the sites of all layers as one row a kind."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stabilitykit.records.bounds import SiteBound, Verdict
from stabilitykit.words import number

_ORDER: tuple[Verdict, ...] = (
    "reachable by a prompt",
    "reachable by a hidden state",
    "open",
    "safe for every prompt",
)


def summary(found: Sequence[SiteBound]) -> str:
    """How many tensors are safe for every prompt, and what of the others is known."""
    dtype, limit = found[0].dtype, found[0].limit
    unsafe = unproved(found)
    if not unsafe:
        return f"No prompt makes any of this checkpoint's {len(found):,} tensors overflow in {dtype}."
    parts = [f"{count:,} {verdict}" for verdict, count in Counter(one.verdict for one in unsafe).most_common()]
    return (
        f"Of {len(found):,} tensors, {len(found) - len(unsafe):,} stay below the {dtype} maximum, {number(limit)}, for "
        f"every prompt. The others: {', '.join(parts)}."
    )


def unbounded(found: Sequence[SiteBound]) -> str:
    """Which kinds of tensors no inequality bounds, and why; empty where there are none."""
    kinds: dict[str, str] = {one.kind: one.unbounded for one in found if one.unbounded is not None}
    return " ".join(f"`{kind}` is not bounded: {why}." for kind, why in kinds.items())


def unproved(found: Sequence[SiteBound]) -> list[SiteBound]:
    return [one for one in found if one.verdict != "safe for every prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRow:
    """The sites of one kind: the one with the largest bound, the worst verdict, how many have it, of how many.

    `found` and `observed` are the largest of all layers; `ratio` is bound / found in the layer where it is least.
    """

    worst: SiteBound
    verdict: Verdict
    share: int
    sites: int
    found: float | None
    observed: float | None
    ratio: float | None


def by_kind(bounds: Sequence[SiteBound]) -> list[KindRow]:
    """One row a kind, in order of execution."""
    kinds: dict[str, list[SiteBound]] = {}
    for one in bounds:
        kinds.setdefault(one.kind, []).append(one)
    rows = []
    for sites in kinds.values():
        verdict = min((one.verdict for one in sites), key=_ORDER.index)
        ratios = [one.bound / one.found for one in sites if one.found]
        rows.append(
            KindRow(
                worst=max(sites, key=lambda one: one.bound),
                verdict=verdict,
                share=sum(one.verdict == verdict for one in sites),
                sites=len(sites),
                found=max((one.found for one in sites if one.found is not None), default=None),
                observed=max((one.observed for one in sites if one.observed is not None), default=None),
                ratio=min(ratios, default=None),
            )
        )
    return rows


def folded(rows: Sequence[KindRow], within: float = 0.02) -> list[KindRow]:
    """`rows` without those that say what one above them in the same module says.

    That is the same verdict and a bound that is at most the other's, or more by the part `within`: a query times cos
    beside the query. Sites that nobody has named are left out too: the tables of cos and sin.
    """
    kept: list[KindRow] = []
    for row in rows:
        if row.worst.label is None:
            continue
        module = _module(row.worst)
        same = (one for one in kept if _module(one.worst) == module and one.verdict == row.verdict)
        if not any(one.worst.bound / (1 + within) <= row.worst.bound <= one.worst.bound * (1 + within) for one in same):
            kept.append(row)
    return kept


def _module(one: SiteBound) -> str:
    """`layers.*.self_attn` for itself, its projections and its operators."""
    path = one.kind.partition("/")[0]
    return path.rpartition(".")[0] if path.endswith(("_proj", "_norm")) else path

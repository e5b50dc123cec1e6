"""What was tried against a failure, as prose and tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stabilitykit.records.trials import Diagnosis, Smallest, Trial
from stabilitykit.report.blocks import Block, Column, Prose
from stabilitykit.report.style import share, size
from stabilitykit.report.tables import table
from stabilitykit.words import counted, quoted


def blocks(diagnosis: Diagnosis) -> list[Block]:
    """The advice, the smallest input that fails alike, the trials in figures, and what does each of them."""
    made: list[Block] = []
    if diagnosis.advice:
        made.append(Prose(diagnosis.advice, tone="good" if diagnosis.is_well or diagnosis.cures else "bad"))
    if diagnosis.smallest is not None:
        made.append(Prose(_smallest(diagnosis.smallest, diagnosis.diagnosed == "smallest")))
    if diagnosis.trials:
        made += _trials(diagnosis.trials, "the smallest" if diagnosis.diagnosed == "smallest" else "this")
    if diagnosis.rounding:
        made.append(_rounding(diagnosis))
    return made + not_tried(diagnosis.left_out)


def not_tried(left_out: Mapping[str, str]) -> list[Block]:
    """Why changes were not tried, by their names."""
    told = " ".join(f"{name}: {why}" for name, why in left_out.items())
    return [Prose(f"Not tried. {told}", tone="note")] if left_out else []


def short(value: float) -> str:
    """1.6e-05"""
    return f"{value:.1e}"


_COLUMNS: Sequence[tuple[Column, Callable[[Trial], Any]]] = [
    (Column("change"), lambda one: one.name),
    (Column("cures it"), lambda one: one.cured),
    (Column("mean KL", format=short), lambda one: one.distance and one.distance.kl_mean),
    (Column("largest KL", format=short), lambda one: one.distance and one.distance.kl_max),
    (Column("mean error", format=short), lambda one: one.distance and one.distance.error_mean),
    (Column("largest error", format=short), lambda one: one.distance and one.distance.error_max),
    (Column("top-1", format=share), lambda one: one.distance and one.distance.top1),
    (Column("error where it was lost", format=short), lambda one: one.concerned and one.concerned.error_max),
    (Column("extra", unit="bytes", format=size), lambda one: one.memory),
    (Column("a folder can carry it"), lambda one: one.carried),
]
_WHAT: Sequence[tuple[Column, Callable[[Trial], Any]]] = [
    (Column("change"), lambda one: one.name),
    (Column("what it does"), lambda one: one.summary),
    (Column("what came of it"), lambda one: one.then or ("finite" if one.finite else "not finite")),
]


def _trials(trials: Sequence[Trial], which: str) -> list[Block]:
    known = [column for column in _COLUMNS if any(column[1](one) is not None for one in trials)]
    is_kl = any(one.distance is not None and one.distance.kl_mean is not None for one in trials)
    if is_kl:  # it says the same better
        known = [column for column in known if column[0].name != "mean error"]
    kl = "KL: from float32's next-token distribution, in nats a row. " if is_kl else ""
    measured = table(
        "trials",
        f"Tried on {which} input, what cures it first",
        trials,
        known,
        note=f"{kl}Error: the largest difference in a row, in parts of the largest magnitude that float32 returned. A "
        "dash: nothing could be compared. Extra: beyond a plain run.",
        alarming=lambda one: not one.cured,
    )
    said = table(
        "trials-explained",
        "What each change does, and what came of it",
        trials,
        _WHAT,
    )
    return [measured, said]


def _smallest(found: Smallest, is_diagnosed: bool) -> str:
    shown = found.texts or [str(list(row)) for row in found.tokens]
    what = " / ".join(quoted(text) for text in shown)
    minimal = ", and without any one of them the break is another or gone" if found.minimal else ""
    size = f"{counted(found.after, 'token')} of {found.before:,}{minimal}"
    runs = f"{counted(found.runs, 'run')} {'was' if found.runs == 1 else 'were'} made"
    if not found.minimal:
        runs += ", and with more of them it may get smaller"
    told = f"The smallest input found that fails alike has {size}: {what}. {runs}."
    if found.is_smaller and not is_diagnosed:
        told += " What breaks does it no harm, so all else here is about the whole input."
    return told


def _rounding(diagnosis: Diagnosis) -> Block:
    return table(
        "rounding",
        "The same model run in other ways, all of them finite: what differs is rounding",
        diagnosis.rounding,
        [
            (Column("way"), lambda one: one.name),
            (Column("mean KL", format=short), lambda one: one.distance.kl_mean),
            (Column("largest error", format=short), lambda one: one.distance.error_max),
            (Column("same tokens", format=share), lambda one: one.same_tokens),
        ],
        note=f"Against the plain run in {diagnosis.dtype}.",
    )

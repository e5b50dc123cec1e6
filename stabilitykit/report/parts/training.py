"""What was tried against a training step that failed, as prose and tables."""

from collections.abc import Callable, Sequence
from typing import Any

from stabilitykit.diagnosis.gradients import scale_of
from stabilitykit.records.training import TrainingDiagnosis, TrainingTrial
from stabilitykit.report.blocks import Block, Column, Prose
from stabilitykit.report.style import share
from stabilitykit.report.tables import table


def blocks(diagnosis: TrainingDiagnosis) -> list[Block]:
    """The advice, the trials in figures, what does each of them, and what was not tried."""
    well = diagnosis.plain.cured or bool(diagnosis.cures)
    made: list[Block] = [Prose(diagnosis.advice, tone="good" if well else "bad")]
    made += [Prose(note, tone="note") for note in diagnosis.notes]
    rows = (diagnosis.plain, *diagnosis.trials)
    made.append(
        table(
            "training-trials",
            "Tried on this step, what cures it first",
            rows,
            [column for column in _COLUMNS if any(column[1](one) is not None for one in rows)],
            note="Error: from float32's gradients, in parts of the largest of the same weight. Underflow: 0, and not 0 "
            "in float32. A dash: nothing could be compared.",
            alarming=lambda one: not one.cured,
        )
    )
    made.append(table("training-trials-explained", "What each change does", diagnosis.trials, _WHAT))
    if diagnosis.left_out:
        told = " ".join(f"{name}: {why}" for name, why in diagnosis.left_out.items())
        made.append(Prose(f"Not tried. {told}", tone="note"))
    return made


def _short(value: float) -> str:
    return f"{value:.1e}"


_COLUMNS: Sequence[tuple[Column, Callable[[TrainingTrial], Any]]] = [
    (Column("change"), lambda one: one.name),
    (Column("cures it"), lambda one: one.cured),
    (Column("loss scale"), lambda one: scale_of(one.loss_scale)),
    (Column("gradients finite"), lambda one: one.gradients),
    (Column("weights finite after the step"), lambda one: one.weights),
    (Column("mean error", format=_short), lambda one: one.distance and one.distance.error_mean),
    (Column("largest error", format=_short), lambda one: one.distance and one.distance.error_max),
    (Column("underflow", format=share), lambda one: one.distance and one.distance.underflow),
]
_WHAT: Sequence[tuple[Column, Callable[[TrainingTrial], Any]]] = [
    (Column("change"), lambda one: one.name),
    (Column("what it does"), lambda one: one.summary),
    (Column("what does it"), lambda one: one.command),
]

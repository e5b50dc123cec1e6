"""What was tried against a training step that failed, as prose and tables."""

from collections.abc import Callable, Sequence
from typing import Any

from stabilitykit.records.training import TrainingDiagnosis, TrainingTrial
from stabilitykit.report.blocks import Block, Column, Prose
from stabilitykit.report.parts.trials import not_tried, short
from stabilitykit.report.style import share
from stabilitykit.report.tables import table
from stabilitykit.words import number

_COLUMNS: Sequence[tuple[Column, Callable[[TrainingTrial], Any]]] = [
    (Column("change"), lambda one: one.name),
    (Column("cures it"), lambda one: one.cured),
    (Column("finite gradients"), lambda one: one.gradients),
    (Column("finite weights"), lambda one: one.weights),
    (Column("farthest move", format=number), lambda one: None if one.move is None else float(f"{one.move:.2g}")),
    (Column("loss scale", format=number), lambda one: one.loss_scale),
    (Column("mean error", format=short), lambda one: one.distance and one.distance.error_mean),
    (Column("largest error", format=short), lambda one: one.distance and one.distance.error_max),
    (Column("underflows", format=share), lambda one: one.distance and one.distance.underflow),
]
_WHAT: Sequence[tuple[Column, Callable[[TrainingTrial], Any]]] = [
    (Column("change"), lambda one: one.name),
    (Column("what it does"), lambda one: one.summary),
    (Column("what does it"), lambda one: one.command or None),
    (Column("what was raised"), lambda one: one.then or None),
]


def blocks(diagnosis: TrainingDiagnosis) -> list[Block]:
    """The advice, the trials in figures, and what each of them does."""
    is_well = diagnosis.plain.cured
    made: list[Block] = []
    if diagnosis.advice:
        made.append(Prose(diagnosis.advice, tone="good" if is_well or diagnosis.cures else "bad"))
    tried = (diagnosis.plain, *diagnosis.trials)
    made.append(
        table(
            "training-trials",
            "The step as it is, then what was tried, what cures it first",
            tried,
            _COLUMNS,
            note="Errors are those of the weights' gradients, divided by the loss scale, in parts of the largest "
            "magnitude of float32's. Underflows: elements that are 0, and not in float32. Farthest move: of a "
            "weight, in parts of float32's.",
            alarming=lambda one: not one.cured,
        )
    )
    if diagnosis.trials:
        known = [column for column in _WHAT if any(column[1](one) is not None for one in diagnosis.trials)]
        made.append(table("training-trials-explained", "What each change does", diagnosis.trials, known))
    return made + not_tried(diagnosis.left_out)

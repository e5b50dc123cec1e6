"""What a scaling does to a model's weights and settings, counted."""

from collections.abc import Iterator

from torch import Tensor

from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.models.subject import Subject
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records.remedies import Change, Setting, Small
from stabilitykit.records.scaling import UNCHANGED, Scaling
from stabilitykit.remedies.original import CALLED, Original, setting
from stabilitykit.scaling.apply import of_rows, rounded, scaled


def change_of(original: Original, subject: Subject, scaling: Scaling) -> Change:
    """What `scaling` changes of `original`, which `subject` is in float32."""
    weights = dict(original.weights(subject))
    before = small(original, subject, UNCHANGED)
    gains = {name: rounded(weights[name], factor) for name, factor in scaling.parameters.items() if factor.added}
    return Change(
        moved=sum(any(factor.exponents) for factor in scaling.parameters.values()),
        parameters=len(weights),
        settings={
            CALLED.get(key, key): Setting(before=value, after=value * 2.0**exponent)
            for key, exponent in scaling.settings.items()
            for value in [setting(original.settings, key)]
        },
        gains_rounded={name: lost for name, lost in gains.items() if lost},
        before=before,
        after=before if scaling == UNCHANGED else small(original, subject, scaling),
    )


def small(original: Original, subject: Subject, scaling: Scaling) -> Small:
    """How many weights float16 stores as subnormals, and how many as zero, once they are scaled."""

    def made() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original.weights(subject):
            factor = scaling.parameters.get(name)
            if factor is None:
                yield name, tensor
                continue
            row = 0
            for piece in read_once(tensor):  # a few rows at a time are in memory
                rows = len(piece) if piece.ndim else 0
                yield name, scaled(piece, of_rows(factor, row, row + rows) if rows else factor)
                row += rows

    found = check_weights(made(), ("float16",))["float16"]
    return Small(subnormal=found.subnormal, zero=found.zero)

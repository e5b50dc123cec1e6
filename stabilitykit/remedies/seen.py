"""What float32 runs of a model show of a run in float16: the largest value that it has to store, and what overflows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stabilitykit.diagnosis.forecast import forecast
from stabilitykit.errors import MisuseError
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records import Record, Recording
from stabilitykit.remedies.original import Original
from stabilitykit.remedies.samples import Inputs, answer
from stabilitykit.run.dry_run import with_stored_dtypes

_NO_VALUES = (RuntimeError, NotImplementedError, MisuseError)  # what a pass without values raises where code needs them


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of float32 runs of `model`: `peak` is the largest finite value that a run in float16 stores, and `site` where.

    `overflowing` are the records of what float16 would lose an element of, by site, those with the largest magnitude.
    `low` are the records of a run in 16 bits: which tensors there are, and in which dtype each is stored.
    """

    model: nn.Module
    low: Recording
    peak: float
    site: str
    overflowing: Mapping[str, Record]

    @property
    def channels(self) -> int:
        """The most elements that one overflowing tensor has for a token."""
        return max((one.elements // max(1, one.positions or 1) for one in self.overflowing.values()), default=0)


def look(
    original: Original,
    subject: Subject,
    inputs: Sequence[Inputs],
    announce: Callable[[int, int], None] = lambda done, total: None,
) -> Seen:
    """Runs `subject`, which is `original` in float32, on each of `inputs`, recorded."""
    low = run_in_16_bits(original, subject, inputs[0])
    peak, site, overflowing = 0.0, "", dict[str, Record]()
    for done, one in enumerate(inputs):
        announce(done, len(inputs))
        with torch.inference_mode(), record(subject.module, formats=("float16",), fused_softmax=False) as recording:
            answer(subject.module, one)
        stored = with_stored_dtypes(recording, low)
        closest = forecast(stored, "float16").closest
        if closest is not None and (closest.amax or 0.0) > peak:
            peak, site = closest.amax or 0.0, closest.site
        add_overflowing(overflowing, stored, "float16")
    return Seen(model=subject.module, low=low, peak=peak, site=site, overflowing=overflowing)


def add_overflowing(found: dict[str, Record], stored: Recording, dtype: str) -> None:
    """Adds to `found` what a run that stores in `dtype` would lose, by site, those with the largest magnitude."""
    for made in stored:
        if made.stored_dtype == dtype and made.formats[dtype].overflow:
            before = found.get(made.site)
            if before is None or (before.amax or 0.0) < (made.amax or 0.0):
                found[made.site] = made


def run_in_16_bits(original: Original, subject: Subject, inputs: Inputs) -> Recording:
    """The records of a pass in 16 bits, as float16 stores them: without values where that can be, else in bfloat16.

    bfloat16 stores the same tensors, and nothing overflows in it, nor does code run that is for float16 alone.
    """
    blank = subject.blank(torch.bfloat16)
    if blank is not None:
        try:
            return _recorded(blank, {name: one.to("meta") for name, one in inputs.items()})
        except _NO_VALUES:
            pass
    return _recorded(original.open("bfloat16").module, inputs)


def _recorded(model: nn.Module, inputs: Inputs) -> Recording:
    with torch.inference_mode(), record(model, formats=()) as low:
        answer(model, inputs)
    records = [replace(one, dtype="float16") if one.dtype == "bfloat16" else one for one in low]
    return Recording(replace(low.header, dtype="float16"), records)

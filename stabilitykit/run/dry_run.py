"""Which tensors a model would store in low precision, found by running it without values."""

import torch

from stabilitykit.diagnosis.forecast import with_stored_dtypes
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records import Level, Recording


def dry_run(subject: Subject, rows: int, length: int, *, level: Level = "operators") -> Recording | None:
    """A pass of `subject` in float16 on the meta device: which tensors there are, of what shape, in which dtype.

    bfloat16 stores the same ones, and a float8 inference would. None where no such pass can be made, of a model with an
    adapter for example.
    """
    blank = subject.blank(torch.float16)
    if blank is None:
        return None
    with torch.inference_mode(), record(blank, level=level, formats=()) as dry:
        blank(torch.zeros(rows, length, dtype=torch.long, device="meta"))
    return dry


def find_stored_dtypes(recording: Recording, subject: Subject, rows: int, length: int) -> Recording:
    """`recording`, of `subject` and sequences of `length` tokens, with each record's `stored_dtype`; as it is where
    there can be no dry run.
    """
    dry = dry_run(subject, rows, length, level=recording.header.level)
    return recording if dry is None else with_stored_dtypes(recording, dry)

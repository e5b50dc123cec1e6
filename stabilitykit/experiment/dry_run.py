"""Which tensors a model would store in low precision, found by running it without values."""

import torch

from stabilitykit.diagnosis.forecast import with_stored_dtypes
from stabilitykit.experiment.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records import Recording


def find_stored_dtypes(recording: Recording, subject: Subject, rows: int, length: int) -> Recording:
    """`recording`, of `subject` and sequences of `length` tokens, with each record's `stored_dtype`.

    Found by a pass in float16 on the meta device; bfloat16 stores the same tensors, and a float8 inference would. As it
    is where no such pass can be made, of a model with an adapter for example.
    """
    blank = subject.blank(torch.float16)
    if blank is None:
        return recording
    with torch.inference_mode(), record(blank, level=recording.header.level, formats=()) as dry:
        blank(torch.zeros(rows, length, dtype=torch.long, device="meta"))
    return with_stored_dtypes(recording, dry)

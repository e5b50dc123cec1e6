"""Which tensors a model would store in low precision, found by running it without values."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records import Level, Record, Recording

_FUSED = "scaled_dot_product_attention"

_Key = tuple[str, int]
_DryRuns = dict[tuple[int, int, Level], Recording | None]  # by rows, length and level
_dry_runs: WeakKeyDictionary[nn.Module, _DryRuns] = WeakKeyDictionary()


def dry_run(subject: Subject, rows: int, length: int, *, level: Level = "operators") -> Recording | None:
    """A pass of `subject` in float16 on the meta device: which tensors there are, of what shape, in which dtype.

    bfloat16 stores the same ones, and a float8 inference would. None where no such pass can be made, of a model with an
    adapter for example. The pass is made once for as long as the model is there.
    """
    kept = _dry_runs.setdefault(subject.module, {})
    if (rows, length, level) not in kept:
        kept[rows, length, level] = _dry_run(subject, rows, length, level)
    return kept[rows, length, level]


def _dry_run(subject: Subject, rows: int, length: int, level: Level) -> Recording | None:
    blank = subject.blank(torch.float16)
    if blank is None:
        return None
    with torch.inference_mode(), record(blank, level=level, formats=()) as dry:
        blank(torch.zeros(rows, length, dtype=torch.long, device="meta"))
    return dry


def find_stored_dtypes(recording: Recording, subject: Subject, rows: int, length: int) -> Recording:
    """`recording`, of `subject` and sequences of `length` tokens, with each record's `stored_dtype`.

    The recorder knows that of a float16 run; of another a dry run says it, and the recording stays as it is where there
    can be none.
    """
    if recording.header.dtype == "float16":
        return recording
    dry = dry_run(subject, rows, length, level=recording.header.level)
    return recording if dry is None else with_stored_dtypes(recording, dry)


def with_stored_dtypes(recording: Recording, low: Recording) -> Recording:
    """`recording` with the `stored_dtype` of each record, which `low`, a run of the same model in 16 bits, tells.

    Only sites, shapes and dtypes of `low` are read, so one pass without values will do for every step. Records are
    matched by site, the first of a step with the first of the same name. Where the 16-bit run rounds a result in an
    operator of its own, as after a softmax in float32, the record that was rounded counts as stored in 16 bits. Fused
    attention, which runs as its parts where there are no values, is stored as the last part of its shape is. Records
    that `low` does not have, such as those of the sampler, keep None.
    """
    known = {key for key, _ in _numbered(recording)}
    stored: dict[_Key, str] = {}
    last: dict[tuple[str, tuple[int, ...]], tuple[_Key, str]] = {}  # in each module, of each shape
    for key, made in _numbered(low):
        own = made.module, made.shape
        if key in known:
            stored[key] = made.dtype
        elif made.operator == "cast" and own in last:
            stored[last[own][0]] = made.dtype
        last[own] = key, made.dtype

    def told(key: _Key, made: Record) -> str | None:
        fused = made.operator == _FUSED and last.get((made.module, made.shape))
        return stored.get(key) or (fused[1] if fused else None)

    return Recording(
        recording.header,
        [replace(made, stored_dtype=told(key, made)) for key, made in _numbered(recording)],
        repro=recording.repro,
    )


def _numbered(recording: Recording) -> Iterator[tuple[_Key, Record]]:
    """The records of each step, with which one of its site it is there."""
    seen: Counter[tuple[int, str]] = Counter()
    for made in recording:
        yield (made.site, seen[made.step, made.site]), made
        seen[made.step, made.site] += 1

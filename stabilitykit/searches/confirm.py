"""Runs a prompt: its largest value in float32, and what happens to it in the dtype itself."""

import math
from collections.abc import Iterable, Sequence

import torch

from stabilitykit.diagnosis.verdict import verdict
from stabilitykit.formats import number_format
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.model import run_on
from stabilitykit.recorder import record
from stabilitykit.records import Record
from stabilitykit.records.search import Find
from stabilitykit.run.case import run_case
from stabilitykit.run.causal import looks_back
from stabilitykit.run.dry_run import find_stored_dtypes
from stabilitykit.searches.scan import Peak
from stabilitykit.searches.stored import Place


class PromptRecorder:
    """Runs prompts through `wide`, a model in float32, with the recorder, logits of every position included.

    `end` are the tokens that the tokenizer puts after a text, where it begins with what comes before one, `begin`.
    """

    def __init__(self, wide: Gemma | Subject, begin: Sequence[int] = (), end: Sequence[int] = ()) -> None:
        self._begin, self._end = tuple(begin), tuple(end)
        self._looks_back: bool | None = None  # not known yet
        self._wide = GemmaSubject(wide) if isinstance(wide, Gemma) else wide
        self._stored: dict[int, frozenset[str]] = {}  # by prompt length, the sites that a float16 run stores in 16 bits

    def peaks(self, tokens: Sequence[int]) -> list[Peak]:
        """The peak at each position, as a scan would find it; inf at all of them where `wide` itself is not finite."""
        (found,) = self.peaks_of([tokens])
        return found

    def peaks_of(self, prompts: Sequence[Sequence[int]]) -> list[list[Peak]]:
        """The same for each of several prompts of one length, which run as one batch."""
        rows, length = len(prompts), len(prompts[0])
        with torch.inference_mode(), record(self._wide.module, formats=(), position_peaks=True) as recording:
            run_on(self._wide.module, self._wide.arguments(torch.tensor(prompts, device=self._wide.device)))
        first = recording.first_break()
        if first is not None:
            return [[Peak(math.inf, _place(first))] * length] if rows == 1 else [self.peaks(one) for one in prompts]
        if length not in self._stored:
            told = find_stored_dtypes(recording, self._wide, rows, length)
            self._stored[length] = frozenset(made.site for made in told if made.stored_dtype == "float16")
        stored = [
            (made.position_amax or (), _place(made))
            for made in recording
            if made.site in self._stored[length] and len(made.position_amax or ()) == rows * length
        ]  # the length leaves out the cosines and sines that all rows share
        return [[_largest(stored, row * length + position) for position in range(length)] for row in range(rows)]

    def after(self, candidates: Sequence[int], context: Sequence[int]) -> list[Peak]:
        """The peak of each of `candidates` as the next token after `context`: at its own position in a causal model, in
        the whole prompt of another one, where a token changes what all others make.
        """
        prompts = [self.closed((*context, token)) for token in candidates]
        rows = self.peaks_of(prompts)
        if self._looks_back is None and len(prompts[0]) > 1:
            self._looks_back = looks_back(self._wide, prompts[0])
        if self._looks_back or len(prompts[0]) == 1:
            return [row[len(context)] for row in rows]
        return [max(row, key=lambda peak: peak.value) for row in rows]

    def closed(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """`tokens` as the tokenizer would end them."""
        begins = bool(self._begin) and tuple(tokens[: len(self._begin)]) == self._begin
        return (*tokens, *(self._end if begins else ()))


def _largest(stored: Iterable[tuple[Sequence[float], Place]], index: int) -> Peak:
    value, place = max(((amax[index], place) for amax, place in stored), key=lambda pair: pair[0])
    return Peak(value, place)


def confirm(wide: PromptRecorder, low: Subject, tokens: Sequence[int], *, bos: bool, text: str | None) -> Find:
    """The largest value of `tokens` in float32, and whether `low`, the same model in the dtype, stays finite."""
    peaks = wide.peaks(tokens)
    position, peak = max(enumerate(peaks), key=lambda pair: pair[1].value)
    dtype = dtype_of(low)
    ran = run_case(low, list(tokens), matmul=preferred_matmul(dtype, low.device.type)).recording
    first = ran.first_break()
    return Find(
        tokens=tuple(tokens),
        pieces=tuple(map(low.piece, tokens)),
        bos=bos,
        text=text,
        file=None,
        value=finite(peak.value),
        headroom=headroom(peak.value, dtype),
        site=peak.place.site,
        label=peak.place.label,
        layer=peak.place.layer,
        position=position,
        breaks=first is not None,
        broken_site=None if first is None else first.site,
        broken_layer=None if first is None else first.layer,
        broken_position=None if first is None or first.broke is None else first.broke.position,
        sentence=verdict(ran),
    )


def dtype_of(subject: Subject) -> str:
    """That of its weights."""
    weight = next(one for one in subject.module.parameters() if one.is_floating_point())
    return str(weight.dtype).removeprefix("torch.")


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def headroom(value: float, dtype: str) -> float | None:
    """In bits; None for a value that is not finite, and for zero."""
    return number_format(dtype).headroom(value) if math.isfinite(value) and value else None


def _place(made: Record) -> Place:
    return Place(site=made.site, label=made.label, layer=made.layer)

"""What each finished case of a sweep comes to, whether it is one run or a range of lengths.

Everything a verdict needs is here: where it broke, at which lengths, and how much headroom was left.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stabilitykit.diagnosis import Cause, cause, is_finite
from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.diagnosis.outcome import is_harmless
from stabilitykit.formats import number_format
from stabilitykit.records import BreakKind, Recording
from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.records.sweep import Case, Results

RANGE_KINDS: tuple[BreakKind, ...] = ("overflow", "reduction")

_NOT_PART_OF_A_NAME = ("prompt", "length", "bos", "dtype", "text_sha256", "tokens", "checks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished case. `text` names the prompt, and whatever else the sweep varies besides length and dtype.

    `spans` are the lengths it speaks of: one for a single run. `largest` is the largest magnitude that was stored or,
    where a value broke, would have been; None where nothing finite is known. `cause` is that of a run that broke,
    None for a range of lengths. `hidden`: something broke, and the logits are finite all the same. `harmless`:
    something overflowed and ended as the true value would have, so that the run counts as clean.
    """

    case: Case
    dtype: str
    text: str
    bos: bool | None
    spans: tuple[Span, ...]
    largest: float | None
    error: str | None = None
    cause: Cause | None = None
    hidden: bool = False
    harmless: bool = False

    @property
    def first(self) -> Span | None:
        """The span of the least length that broke; None where none did."""
        return next((span for span in self.spans if span.broke is not None), None)

    @property
    def headroom(self) -> float | None:
        """The least, in bits of the case's own dtype; None where nothing finite is known."""
        return None if self.largest is None else number_format(self.dtype).headroom(self.largest)

    @property
    def is_unresolved(self) -> bool:
        """Whether something broke of which it was not seen why."""
        return any(span.broke is not None and span.broke.kind == "unresolved" for span in self.spans)

    @property
    def is_of_range(self) -> bool:
        """Whether something broke, and all that did left the format's range."""
        broken = [span for span in self.spans if span.broke is not None]
        return bool(broken) and all(
            span.broke.kind in RANGE_KINDS and not (span.site or "").startswith(("sampler", "outside"))
            for span in broken
            if span.broke is not None
        )


def outcomes(results: Results) -> list[Outcome]:
    """The finished cases of kinds "run" and "lengths", in the plan's order."""
    names = Names(results.plan.cases)
    found: list[Outcome] = []
    for case in results.plan.cases:
        if not case.runs_prompt or not results.is_done(case):
            continue
        if case.kind == "run":
            found.append(_of_run(case, names(case), results.recording(case)))
        else:
            found.append(_of_lengths(case, names(case), results.length_map(case)))
    return found


class Names:
    """Names for the texts of a sweep: the prompt, and the settings that differ between cases of one kind."""

    def __init__(self, cases: Sequence[Case]) -> None:
        values: dict[tuple[str, str], set[str]] = {}
        for case in cases:
            for name, value in case.settings.items():
                values.setdefault((case.kind, name), set()).add(repr(value))
        self._varying = {key for key, seen in values.items() if len(seen) > 1 and key[1] not in _NOT_PART_OF_A_NAME}

    def __call__(self, case: Case) -> str:
        more = [f"{name} {value}" for name, value in case.settings.items() if (case.kind, name) in self._varying]
        return ", ".join([str(case.settings.get("prompt", "a prompt")), *more])


def _of_run(case: Case, text: str, recording: Recording) -> Outcome:
    harmless = is_harmless(recording)
    header, first = recording.header, None if harmless else recording.first_break()
    length = len(header.tokens[0]) if header.tokens else max((r.positions or 0 for r in recording), default=0)
    span = Span(first=length, last=length, run=length, direct=True)
    if not harmless:
        span = Span.of(recording, first=length, last=length, run=length, direct=True)
    top = peak(stored(recording))
    return Outcome(
        case=case,
        dtype=header.dtype,
        text=text,
        bos=case.settings.get("bos"),
        spans=(span,),
        largest=_largest(None if top is None else top.amax, (span,)),
        error=header.error,
        cause=None if harmless else cause(recording),
        hidden=first is not None and is_finite(recording),
        harmless=harmless,
    )


def _of_lengths(case: Case, text: str, found: LengthMap) -> Outcome:
    curve = found.curve()
    known = curve[~(curve != curve)]
    return Outcome(
        case=case,
        dtype=found.header.dtype,
        text=text,
        bos=case.settings.get("bos"),
        spans=found.spans,
        largest=_largest(float(known.max()) if known.size else None, found.spans),
        error=found.header.error,
    )


def _largest(amax: float | None, spans: Sequence[Span]) -> float | None:
    """With the values that broke by their size; those of a partial sum, an invalid operation or NaN say nothing."""
    broken = [
        abs(span.broke.value)
        for span in spans
        if span.broke is not None and span.broke.kind == "overflow" and span.broke.value is not None
    ]
    known = [value for value in (*broken, *([] if amax is None else [amax])) if not math.isnan(value)]
    return max(known, default=None)


def least_headroom(found: Sequence[Outcome]) -> float | None:
    """Of all these cases, each in bits of its own dtype; None where nothing finite is known."""
    return min((o.headroom for o in found if o.headroom is not None), default=None)


Standing = Literal["breaks", "clean", "would break", "would fit", "unknown"]


def standing(found: Sequence[Outcome], dtype: str) -> Standing:
    """How a dtype fares: by its own cases, or else by what the other dtypes stored that did not break themselves."""
    own = [outcome for outcome in found if outcome.dtype == dtype]
    if own:
        return "breaks" if any(outcome.first is not None for outcome in own) else "clean"
    largest = [o.largest for o in reference(found) if o.largest is not None]
    if not largest:
        return "unknown"
    if number_format(dtype).overflows(max(largest)):
        return "would break"
    return "would fit" if is_known(found) else "unknown"


def reference(found: Sequence[Outcome]) -> list[Outcome]:
    """Of each text the cases that did not break, in the widest dtype of these: what its values are."""
    kept: dict[tuple[str, bool | None], list[Outcome]] = {}
    for outcome in (o for o in found if o.first is None):
        known = kept.setdefault((outcome.text, outcome.bos), [])
        if known and _width(outcome) > _width(known[0]):
            known.clear()
        if not known or outcome.dtype == known[0].dtype:
            known.append(outcome)
    return [outcome for cases in kept.values() for outcome in cases]


def is_known(found: Sequence[Outcome]) -> bool:
    """Whether each text has a case that did not break: of another one, later values may be larger than any seen."""
    return len({(o.text, o.bos) for o in found}) == len({(o.text, o.bos) for o in found if o.first is None})


def _width(outcome: Outcome) -> tuple[float, int]:
    form = number_format(outcome.dtype)
    return form.largest, form.precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """All that is known of one text in one dtype: the spans of its cases, by length."""

    dtype: str
    name: str
    bos: bool | None
    spans: tuple[Span, ...]

    @property
    def broken(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.broke is not None)

    @property
    def clean(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.broke is None)

    @property
    def lengths(self) -> int:
        """How many lengths are known, each counted once."""
        known, end = 0, 0
        for span in self.spans:
            known += max(span.last - max(span.first, end + 1) + 1, 0)
            end = max(end, span.last)
        return known


def texts(found: Sequence[Outcome]) -> Iterator[Text]:
    """One a text, <bos> and dtype, in the order of the cases."""
    spans: dict[tuple[str, str, bool | None], list[Span]] = {}
    for outcome in found:
        spans.setdefault((outcome.dtype, outcome.text, outcome.bos), []).extend(outcome.spans)
    for (dtype, name, bos), own in spans.items():
        yield Text(dtype=dtype, name=name, bos=bos, spans=tuple(sorted(own, key=lambda s: (s.first, s.last))))

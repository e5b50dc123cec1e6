"""A scan of the vocabulary: the worst tokens, confirmed in float32, and the distribution of all of them."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from stabilitykit.checkpoints.checkpoint import Vocabulary
from stabilitykit.formats import number_format
from stabilitykit.records.search import KINDS, KindPeaks, Scan, TokenPeak
from stabilitykit.run.case import Progress, stage
from stabilitykit.searches.confirm import PromptRecorder, finite, headroom
from stabilitykit.searches.kinds import kind_of
from stabilitykit.searches.scan import Peak
from stabilitykit.searches.searched import Scans
from stabilitykit.searches.text import ReadsBack, text_of

CHECKED = 512  # tokens of each scan that are computed in float32 too
SHOWN = 20  # tokens that are text, and as many that are not, each confirmed by a recorded run


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    """`peaks` of each token, in float32 for the `CHECKED` largest; `order` ranks those, the largest first."""

    scan: Scan
    peaks: Sequence[Peak]
    order: Sequence[int]


class VocabularyScanner:
    """`sieve` and `wide` run the same model, in a fast dtype and in float32; they may be one. Headroom is `dtype`'s."""

    def __init__(
        self,
        sieve: Scans,
        wide: Scans,
        recorder: PromptRecorder,
        vocabulary: Vocabulary,
        tokenizer: ReadsBack,
        begin: Sequence[int],
        dtype: str,
    ) -> None:
        self._sieve, self._wide, self._recorder = sieve, wide, recorder
        self._vocabulary, self._tokenizer, self._begin = vocabulary, tokenizer, begin
        self._dtype = dtype

    def scan(self, name: str, context: Sequence[int], limit: int, progress: Progress | None) -> Scanned:
        """The first `limit` tokens, each after `context`."""
        began = time.monotonic()
        peaks = self._sieve.scan(range(limit), context, stage(f"{name}: {limit:,} tokens", progress))
        order = sorted(range(limit), key=lambda token: -peaks[token].value)[:CHECKED]
        moved = 0.0
        if self._sieve is not self._wide:
            checked = self._wide.scan(order, context, stage(f"{name}: in float32", progress))
            pairs = zip(order, checked, strict=True)
            moved = max((abs(_bits(peaks[token].value, found.value)) for token, found in pairs), default=0.0)
            for token, again in zip(order, checked, strict=True):
                peaks[token] = again
            order.sort(key=lambda token: -peaks[token].value)
        plain = [token for token in context if token not in self._begin]
        is_text = {token: text_of(self._tokenizer, [*plain, token]) is not None for token in order}
        worst = list(islice((token for token in order if is_text[token]), SHOWN))
        by_ids = list(islice((token for token in order if not is_text[token]), SHOWN))
        confirmed: dict[int, Peak] = {}
        for tokens in (worst, by_ids):
            if tokens:
                confirmed |= dict(zip(tokens, self._recorder.after(tokens, context), strict=True))
        kinds = [kind_of(self._vocabulary, token) for token in range(limit)]

        def confirmed_peaks(tokens: Iterable[int]) -> tuple[TokenPeak, ...]:
            ranked = sorted(tokens, key=lambda token: -confirmed[token].value)
            return tuple(self._token_peak(token, kinds[token], confirmed[token], is_text[token]) for token in ranked)

        headrooms = [headroom(peak.value, self._dtype) for peak in peaks]
        scan = Scan(
            name=name,
            context=tuple(context),
            context_text=self._tokenizer.decode(plain),
            scanned=limit,
            dtype=self._sieve.dtype,
            checked=len(order),
            moved=moved,
            bins=tuple(sorted(Counter(math.floor(10 * bits) for bits in headrooms if bits is not None).items())),
            beyond=sum(number_format(self._dtype).overflows(peak.value) for peak in peaks),
            not_finite=sum(finite(peak.value) is None for peak in peaks),
            sites=tuple(Counter(peak.place.site for peak in peaks).most_common()),
            kinds=_by_kind(kinds, headrooms),
            worst=confirmed_peaks(worst),
            by_ids=confirmed_peaks(by_ids),
            seconds=time.monotonic() - began,
        )
        return Scanned(scan=scan, peaks=peaks, order=order)

    def _token_peak(self, token: int, kind: str, peak: Peak, is_text: bool) -> TokenPeak:
        return TokenPeak(
            token=token,
            text=self._tokenizer.piece(token),
            kind=kind,
            is_text=is_text,
            value=finite(peak.value),
            headroom=headroom(peak.value, self._dtype),
            site=peak.place.site,
            label=peak.place.label,
            layer=peak.place.layer,
        )


def _by_kind(kinds: Sequence[str], headrooms: Sequence[float | None]) -> tuple[KindPeaks, ...]:
    """In the order of `KINDS`, the categories that occur."""
    grouped: Mapping[str, list[float | None]] = {kind: [] for kind in KINDS}
    for kind, bits in zip(kinds, headrooms, strict=True):
        grouped[kind].append(bits)
    found = []
    for kind, members in grouped.items():
        known = [bits for bits in members if bits is not None]
        if members:
            least, median = (min(known), statistics.median(known)) if known else (None, None)
            found.append(KindPeaks(kind=kind, count=len(members), least=least, median=median))
    return tuple(found)


def _bits(one: float, other: float) -> float:
    """The distance of two magnitudes in bits; 0 where one of them is zero or not finite."""
    return math.log2(one / other) if 0 < one < math.inf and 0 < other < math.inf else 0.0

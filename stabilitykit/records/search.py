"""What a search for prompts that break has found; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from stabilitykit.records.provenance import CheckpointProvenance


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPeak:
    """The largest magnitude at one token's position, of what the low-precision dtype would have to store.

    `value` is a float32 run's, None where it is not finite there; `headroom` in bits of the dtype, negative past its
    range, None with the value. `site`, `label` and `layer` say where it stands. `kind` is one of `KINDS`. `is_text`:
    the token can be written in a prompt; others are reached by ids only.
    """

    token: int
    text: str
    kind: str
    is_text: bool
    value: float | None
    headroom: float | None
    site: str
    label: str | None
    layer: int | None


KINDS: Mapping[str, str] = {
    "control": "control tokens, such as <bos>",
    "unused": "unused tokens",
    "byte": "single bytes",
    "newline": "newlines",
    "space": "spaces and tabs",
    "punctuation": "punctuation and symbols",
    "digit": "digits",
    "word": "words and parts of words",
    "other": "anything else, such as several kinds in one",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KindPeaks:
    """Of the `count` scanned tokens of a kind the `least` headroom and the `median`, in bits, None as in TokenPeak."""

    kind: str
    count: int
    least: float | None
    median: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Every token of the vocabulary, or the first `scanned`, as the next one of `context`.

    `name` is "alone", "after <bos>" or "inside a text". Peaks were computed in `dtype` first, and the best `checked` in
    float32, which moved those that are finite in both by at most `moved` bits. `bins` holds, by the lower edge of
    headroom in tenths of a bit, how many tokens there are; `beyond` counts those whose peak leaves the range,
    `not_finite` those without a finite peak, which are in no bin. `sites` counts in which site the peaks stand, most
    frequent first. `worst` are the worst of those that are text, and `by_ids` of the others; both as the recorder has
    them in float32.
    """

    name: str
    context: tuple[int, ...]
    context_text: str
    scanned: int
    dtype: str
    checked: int
    moved: float
    bins: tuple[tuple[int, int], ...]
    beyond: int
    not_finite: int
    sites: tuple[tuple[str, int], ...]
    kinds: tuple[KindPeaks, ...]
    worst: tuple[TokenPeak, ...]
    by_ids: tuple[TokenPeak, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """A prompt, and how near it comes.

    `tokens` hold `<bos>` where `bos` says so; `text` is what `file` holds, None for what no file can. `value`, at
    `position`, and `headroom` are those of a float32 run, as in TokenPeak. `breaks`: a run in the dtype itself, with
    the recorder, was not finite. `sentence` tells of that run.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    bos: bool
    text: str | None
    file: str | None
    value: float | None
    headroom: float | None
    site: str
    label: str | None
    layer: int | None
    position: int
    breaks: bool
    broken_site: str | None
    broken_layer: int | None
    broken_position: int | None
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A length of the extension: of `tried` prompts of `length` tokens the one whose last token came nearest."""

    bos: bool
    length: int
    tried: int
    text: str
    value: float | None
    headroom: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search(CheckpointProvenance):
    """Everything that a search found. `bos` is the prompt of `<bos>` alone; `finds` are the nearest prompts, without
    `<bos>` before with, and of each the best first; `steps` how they grew. `vocabulary` counts tokens.
    """

    dtype: str
    vocabulary: int
    bos: Find | None
    scans: tuple[Scan, ...]
    steps: tuple[Step, ...]
    finds: tuple[Find, ...]
    seconds: float
    schema: int = 1

    @property
    def breaking(self) -> tuple[Find, ...]:
        """Those that broke when they ran, the shortest first; `<bos>` alone among them."""
        known = self.finds if self.bos is None else (self.bos, *self.finds)
        return tuple(sorted((find for find in known if find.breaks), key=lambda find: len(find.tokens)))

"""The result of a search for prompts that overflow; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from stabilitykit.records.provenance import CheckpointProvenance


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPeak:
    """The largest magnitude at one token's position, over what the low-precision dtype would have to store.

    `value` is that of a float32 run, None where that is not finite; `headroom` is in bits of the dtype, negative above
    its maximum, None with the value. `site`, `label` and `layer` say in which tensor it is. `kind` is the token's
    category, one of `KINDS`. `is_text`: some text tokenizes to the token; others are reachable only as token ids.
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
    """The `least` and the `median` headroom [bits] of the `count` tokens of a category; None as in TokenPeak."""

    kind: str
    count: int
    least: float | None
    median: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Every token of the vocabulary, or the first `scanned`, as the next token after `context`.

    `name` is "alone", "after <bos>" or "inside a text". Peaks were computed in `dtype` first and the `checked` largest
    again in float32, which moved those that are finite in both by at most `moved` bits. `bins` is a histogram of
    headroom: the lower edge in tenths of a bit, and the number of tokens. `beyond` counts tokens whose peak overflows,
    `not_finite` those without a finite peak, which are in no bin. `sites` counts the sites of the peaks, most frequent
    first. `worst` are the tokens with the least headroom among those that are text, `by_ids` among the others; both
    as recorded in float32.
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
    """A prompt that was found, and how close it comes to the maximum.

    `tokens` include `<bos>` where `bos`; `text` is the contents of `file`, None for tokens that no text leads to.
    `value`, at `position`, and `headroom` are those of a float32 run, as in TokenPeak. `breaks`: a recorded run in the
    dtype itself was not finite. `sentence` is the verdict on that run.
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
    """One length: of the `tried` prompts of `length` tokens, the one whose last token has the least headroom."""

    bos: bool
    length: int
    tried: int
    text: str
    value: float | None
    headroom: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search(CheckpointProvenance):
    """The result of a search. `bos` is the prompt of `<bos>` alone. `finds` are the prompts found, first those without
    `<bos>`, and in each group the best first; `steps` tell how they grew. `given` are those that were made of prompts
    that the user gave, in their order, and of two of them put together. `vocabulary` counts tokens.
    """

    dtype: str
    vocabulary: int
    bos: Find | None
    scans: tuple[Scan, ...]
    steps: tuple[Step, ...]
    finds: tuple[Find, ...]
    seconds: float
    given: tuple[Find, ...] = ()
    schema: int = 1

    @property
    def breaking(self) -> tuple[Find, ...]:
        """The prompts that broke when they ran, the shortest first; `<bos>` alone is among them."""
        known = (*(() if self.bos is None else (self.bos,)), *self.finds, *self.given)
        return tuple(sorted((find for find in known if find.breaks), key=lambda find: len(find.tokens)))

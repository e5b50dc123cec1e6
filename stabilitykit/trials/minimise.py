"""The smallest input that fails alike: rows, then tokens are left out for as long as the same break stays.

Delta debugging: parts are left out by halves, quarters and so on, at last token by token, until no token can go. A run
costs as much as its input is long, so the long ones are spared: where nothing at a later position took part in a
break, what follows it is cut off at once, and of what is left the end is tried first, twice as much of it each time.
Most runs stop at the first break.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import nn

from stabilitykit.diagnosis.outcome import decisive
from stabilitykit.errors import MisuseError
from stabilitykit.records import Record, Recording
from stabilitykit.records.trials import Smallest
from stabilitykit.run.case import Progress
from stabilitykit.trials.reproduction import Reproduction
from stabilitykit.trials.situation import recorded, without_layers

_MOST = 1000  # runs

Tokens = tuple[tuple[int, ...], ...]
"""The tokens of each row."""


class Ragged(Reproduction, Protocol):
    """Runs rows of any lengths, without padding, such as prompts."""

    @property
    def tokens(self) -> Tokens: ...

    def with_tokens(self, rows: Tokens) -> Reproduction:
        """The same of other prompts, run on a model that this one made. Raises MisuseError for what cannot be run."""
        ...


@runtime_checkable
class Columned(Reproduction, Protocol):
    """Runs rows of equal lengths, and with them masks and all else that has columns for tokens."""

    @property
    def tokens(self) -> Tokens: ...

    def with_columns(self, rows: Sequence[int], columns: Sequence[int]) -> Reproduction:
        """The same with these rows and columns alone, by number, on a model that this one made.

        Raises MisuseError for what cannot be left out.
        """
        ...


def has_tokens(reproduction: Reproduction) -> TypeGuard[Ragged | Columned]:
    """Whether there are tokens to leave out."""
    return bool(getattr(reproduction, "tokens", ()))


@dataclass(frozen=True, slots=True)
class _Kept:
    """The numbers of rows, and of the tokens that are kept in each; of columns where all rows have the same."""

    rows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def whole(cls, tokens: Tokens, together: bool) -> "_Kept":
        columns = tuple(tuple(range(len(row))) for row in tokens)
        return cls(tuple(range(len(tokens))), columns[:1] if together else columns)

    def of_rows(self, places: Sequence[int]) -> "_Kept":
        columns = self.columns if self.together else tuple(self.columns[place] for place in places)
        return _Kept(tuple(self.rows[place] for place in places), columns)

    def with_columns(self, place: int, columns: tuple[int, ...]) -> "_Kept":
        return replace(self, columns=(*self.columns[:place], columns, *self.columns[place + 1 :]))

    @property
    def together(self) -> bool:
        """Whether columns are of all rows."""
        return len(self.columns) != len(self.rows) or len(self.rows) == 1

    def tokens(self, of: Tokens) -> Tokens:
        columns = self.columns if len(self.columns) == len(self.rows) else self.columns * len(self.rows)
        return tuple(tuple(of[row][at] for at in kept) for row, kept in zip(self.rows, columns, strict=True))


@dataclass(frozen=True, slots=True)
class Minimised:
    """The smallest input found, and how it is run."""

    smallest: Smallest
    reproduction: Reproduction


def minimise(
    reproduction: Ragged | Columned,
    *,
    model: nn.Module | None = None,
    most_runs: int = _MOST,
    progress: Progress | None = None,
) -> Minimised | None:
    """Leaves out rows and tokens for as long as the decisive break is of the same kind and label.

    Args:
        reproduction: what fails, and how it is run with less.
        model: the one that fails, which `reproduction` made, if there is one already.
        most_runs: to give up after; the result then says that it is not minimal.
        progress: called with (what is being done, tokens left out so far, all tokens).

    Returns:
        The smallest input found, or None where nothing breaks. Where a site has no label, breaks are alike whose sites
        are so but for the numbers of layers. Which token breaks may change, and so may its layer.
    """
    model = reproduction.model(reproduction.dtype) if model is None else model
    search = _Search(reproduction, model, most_runs, progress)
    stopped = search.recorded(reproduction, whole=False)
    search.past = next(iter(stopped.header.starts), 0)
    broke = stopped.first_break()
    if broke is None:
        return None
    minimised = search.run(broke, by_first=True)
    if minimised is not None:
        return minimised
    whole = search.recorded(reproduction, whole=True)  # what broke first does not decide
    found = decisive(whole)
    if found is None:
        return None
    first = whole.first_break() is found.broke
    minimised = search.run(found.broke, by_first=first, harmless=found.harmless is True)
    return minimised or search.run(found.broke, by_first=False)


class _RunsSpentError(Exception):
    """As many runs as were allowed."""


class _Search:
    def __init__(
        self,
        reproduction: Ragged | Columned,
        model: nn.Module,
        most_runs: int,
        progress: Progress | None,
    ) -> None:
        self.reproduction = reproduction
        self.model = model
        self.most_runs = most_runs
        self.runs = 0
        self.past = 0  # tokens in a cache
        self.tell = progress or (lambda what, done, total: None)
        self.tokens = reproduction.tokens
        self.before = sum(map(len, self.tokens))

    def run(self, broke: Record, *, by_first: bool, harmless: bool = False) -> Minimised | None:
        """The smallest input that breaks as `broke`, which did in the whole one, harmlessly or not.

        `by_first`: it was the first to break there, so that runs stop at the first break. None where it turns out that
        what breaks first does not decide.
        """
        self.broke = broke  # of what is kept
        self.wanted = _mark(broke)
        self.by_first = by_first
        self.kept = _Kept.whole(self.tokens, isinstance(self.reproduction, Columned))
        self.gone: set[_Kept] = set()  # without these the break is gone
        minimal = True
        try:
            self.cut_tail()
            self.only_row()
            self.grow()
            while True:
                start = self.kept
                self.thin_rows()
                for place in range(len(self.kept.columns)):
                    self.thin(place)
                if self.kept == start:
                    break
        except _RunsSpentError:
            minimal = False
        broke = self.broke
        if self.by_first:
            last = self.record(self.kept, whole=True)
            found = None if last is None else decisive(last)
            if found is None or _mark(found.broke) != self.wanted or (found.harmless and not harmless):
                return None
            broke = found.broke
        assert broke.broke is not None
        tokens, text = self.kept.tokens(self.tokens), self.reproduction.text
        smallest = Smallest(
            tokens=tokens,
            texts=None if text is None else tuple("".join(map(text, row)) for row in tokens),
            before=self.before,
            runs=self.runs,
            minimal=minimal,
            site=broke.site,
            kind=broke.broke.kind,
            label=broke.label,
        )
        return Minimised(smallest, self.fewer(self.kept))

    # Runs

    def attempt(self, kept: _Kept) -> bool:
        """Whether the break stays; what is kept is this, then."""
        if kept in self.gone:
            return False
        if self.runs >= self.most_runs:
            raise _RunsSpentError
        broke = self.breaks(kept)
        if broke is None:
            self.gone.add(kept)
            return False
        self.kept, self.broke = kept, broke
        self.cut_tail()
        return True

    def breaks(self, kept: _Kept) -> Record | None:
        """The same break with fewer tokens."""
        recording = self.record(kept, whole=not self.by_first)
        if recording is None:
            return None
        if self.by_first:
            first = recording.first_break()
            if first is None or _mark(first) == self.wanted:
                return first
            recording = self.record(kept, whole=True)  # that one may be harmless
        found = None if recording is None else decisive(recording)
        return None if found is None or _mark(found.broke) != self.wanted else found.broke

    def record(self, kept: _Kept, *, whole: bool) -> Recording | None:
        """None for what cannot be run."""
        self.tell(
            "minimising",
            self.before - sum(map(len, self.kept.tokens(self.tokens))),
            self.before,
        )
        try:
            return self.recorded(self.fewer(kept), whole=whole)
        except MisuseError:
            return None

    def recorded(self, reproduction: Reproduction, *, whole: bool) -> Recording:
        self.runs += 1
        return recorded(reproduction, self.model, stop_at_break=not whole).recording

    def fewer(self, kept: _Kept) -> Reproduction:
        whole = self.reproduction
        if isinstance(whole, Columned):
            return whole.with_columns(kept.rows, kept.columns[0])
        return whole.with_tokens(kept.tokens(self.tokens))

    # What is left out

    def place(self) -> tuple[int, int] | None:
        """Which of the kept rows broke, and how many of its tokens come before the one that broke; None if unknown."""
        broke = self.broke.broke
        assert broke is not None
        if broke.position is None or (broke.row is None and len(self.kept.rows) > 1):
            return None
        row = broke.row or 0
        if row >= len(self.kept.rows):
            return None
        own = self.kept.tokens(self.tokens)
        padding, position = max(map(len, own)) - len(own[row]), broke.position - self.past
        for before in (position - padding, position):  # padded on the left, on the right
            if 0 <= before < len(own[row]) and broke.token in (None, own[row][before]):
                return row, before
        return None

    def cut_tail(self) -> None:
        """Leaves out what follows the token that broke, where nothing of that took part."""
        found = self.place()
        if found is None or self.broke.broke is None or not self.broke.broke.causal:
            return
        row, before = found
        place = 0 if self.kept.together else row
        columns = self.kept.columns[place]
        if before + 1 < len(columns):
            self.attempt(self.kept.with_columns(place, columns[: before + 1]))

    def only_row(self) -> None:
        found = self.place()
        if found is not None and len(self.kept.rows) > 1:
            self.attempt(self.kept.of_rows([found[0]]))

    def grow(self) -> None:
        """Keeps the shortest end of the row that broke, of 1, 2, 4, 8 and so many tokens, that fails alike."""
        found = self.place()
        place = 0 if found is None or self.kept.together else found[0]
        columns, size = self.kept.columns[place], 1
        while size < len(columns) and not self.attempt(self.kept.with_columns(place, columns[-size:])):
            size *= 2

    def thin_rows(self) -> None:
        self.thinned(lambda: range(len(self.kept.rows)), lambda places: self.kept.of_rows(places))

    def thin(self, place: int) -> None:
        self.thinned(
            lambda: self.kept.columns[place],
            lambda columns: self.kept.with_columns(place, tuple(columns)),
        )

    def thinned(self, items: Callable[[], Sequence[int]], without: Callable[[Sequence[int]], _Kept]) -> None:
        """Leaves out runs of items, shorter and shorter ones, until no single one can go."""
        size = max(1, len(items()) // 2)
        while True:
            start, fewer = 0, False
            while start < len(items()):
                have: Sequence[Any] = items()
                rest = [*have[:start], *have[start + size :]]
                if rest and self.attempt(without(rest)):
                    fewer = True
                else:
                    start += size
            if size == 1 and not fewer:
                return
            size = max(1, size // 2)


def _mark(broke: Record) -> tuple[str, str]:
    """What breaks that are alike have in common."""
    assert broke.broke is not None
    return broke.broke.kind, broke.label or without_layers(broke.site)

"""What changed from one report to another: the plan, what broke, how large the peaks are, what it costs in accuracy.

Cases are the same where their settings are, whatever the digest of their text. A kind of thing is compared only where
both reports have it; the report compared with is the earlier one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabilitykit.diagnosis.rounding import divergence
from stabilitykit.diagnosis.rounding import sentence as parted
from stabilitykit.formats import FORMATS, NumberFormat, number_format
from stabilitykit.records import LogitsError, Recording
from stabilitykit.records.sweep import Case, Memory, Results
from stabilitykit.report.blocks import Block, Cell, Column, Prose, Section, Table
from stabilitykit.report.outcomes import Names, Outcome, outcomes
from stabilitykit.report.style import share, size
from stabilitykit.words import code, count, grouped, listed, sentence

# Peaks no further apart are taken for equal: kernels of another shape or machine round differently.
MOST_ULP = 4.0

# Relative changes below these are taken for noise: of a KL divergence, and of a measured peak of memory.
LEAST_LOGITS, LEAST_MEMORY = 0.01, 0.05

# Sites listed for each case, worst first; all are counted.
MOST_SITES = 10


def compare(ours: Results, theirs: Results) -> Section:
    """What changed from `theirs` to `ours`."""
    pairs = _pairs(ours, theirs)
    compared = [pair for pair in pairs if ours.is_done(pair.ours) and theirs.is_done(pair.theirs)]
    tokens, parts = _token_changes(ours, theirs, compared)
    tables = [
        _case_changes(ours, theirs, pairs),
        _break_changes(ours, theirs, compared),
        tokens,
        _peak_changes(ours, theirs, compared),
        _logits_changes(ours, theirs, compared),
        _memory_changes(ours, theirs, compared),
    ]
    blocks: list[Block] = [Prose(_summary(ours, theirs, compared, [table for table in tables if table.rows]))]
    return Section(
        key="against",
        title=f"Against {theirs.plan.title or theirs.plan.name}",
        opening=f"What changed since the report in {theirs.folder.name}, by {count(len(compared), 'case')} finished in "
        f"both. Peaks within {MOST_ULP:g} ulp are taken for equal, since "
        "another machine or version rounds differently; a change of rounding alone can move a break next to a limit.",
        blocks=[*blocks, *parts, *(table for table in tables if table.rows)],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The same case in both reports."""

    name: str
    ours: Case
    theirs: Case


def _pairs(ours: Results, theirs: Results) -> list[_Pair]:
    names = Names(ours.plan.cases)
    before = {_key(case): case for case in theirs.plan.cases}
    return [
        _Pair(name=_said(case, names), ours=case, theirs=before[_key(case)])
        for case in ours.plan.cases
        if _key(case) in before
    ]


def _key(case: Case) -> str:
    settings = {name: value for name, value in case.unusual.items() if name != "text_sha256"}
    return repr((case.kind, sorted(settings.items())))


def _digest(case: Case) -> object:
    return case.settings.get("text_sha256")


def _said(case: Case, names: Names) -> str:
    """A case in few words: the text, its length and <bos>; the dtype has a column of its own."""
    length = f"{case.settings.get('length', '?')} tokens"
    if not case.runs_prompt:
        told = [f"{name} {case.settings[name]}" for name in ("model", "room") if name in case.settings]
        return ", ".join([case.kind, *told, length])
    bos = case.settings.get("bos")
    return ", ".join([names(case), length, *([] if bos is None else ["with <bos>" if bos else "without <bos>"])])


def _summary(ours: Results, theirs: Results, compared: Sequence[_Pair], changed: Sequence[Table]) -> str:
    plan = _plan_changes(ours, theirs)
    texts = [pair for pair in compared if _digest(pair.ours) != _digest(pair.theirs)]
    parts = [sentence(text) for text in plan]
    if texts:
        names = list(dict.fromkeys(str(pair.ours.settings.get("prompt")) for pair in texts))
        what = "The text of" if len(names) == 1 else "The texts of"
        parts.append(f"{what} {listed(names, most=6)} changed, which alone may explain what differs in them.")
    if not compared:
        parts.append("No case has finished in both, so there is nothing to compare.")
    elif not changed:
        same = "its only common case" if len(compared) == 1 else f"all {len(compared):,} common cases"
        parts.append(
            f"**Nothing {'else ' if parts else ''}changed** in {same}: neither first breaks nor tokens, peaks, errors "
            "of the logits or memory, so far as both reports hold them."
        )
    else:
        found = [f"{count(len(table.rows), 'row')} under “{table.title}”" for table in changed]
        parts.append(f"**Something changed**: {listed(found)}.")
    return " ".join(parts)


def _plan_changes(ours: Results, theirs: Results) -> list[str]:
    """Checkpoint, versions and machine; cases have a table."""
    without = [replace(results.plan, cases=()) for results in (ours, theirs)]
    return without[0].differences(without[1])


def _case_changes(ours: Results, theirs: Results, pairs: Sequence[_Pair]) -> Table:
    common = {_key(pair.ours) for pair in pairs}
    rows: list[list[Cell]] = [
        [_said(pair.ours, Names(ours.plan.cases)), pair.ours.settings.get("dtype"), before, after]
        for pair in pairs
        if (before := _state(theirs, pair.theirs)) != (after := _state(ours, pair.ours))
    ]
    for results, is_new in ((ours, True), (theirs, False)):
        names = Names(results.plan.cases)
        for case in results.plan.cases:
            if _key(case) not in common:
                state = _state(results, case)
                states = ("not planned", state) if is_new else (state, "not planned")
                rows.append([_said(case, names), case.settings.get("dtype"), *states])
    return Table(name="against-cases", title="Cases", columns=[*_WHOSE, *_BEFORE_AND_AFTER], rows=rows)


_WHOSE = (Column("case"), Column("dtype"))
_BEFORE_AND_AFTER = (Column("before"), Column("now"))


def _changes(name: str, title: str, rows: Sequence[Sequence[Cell]], *, note: str = "", **values: Any) -> Table:
    """Rows of case, dtype, what has changed, its value before and now; `values` say how the two are written."""
    columns = [*_WHOSE, Column("what"), Column("before", **values), Column("now", **values)]
    return Table(name=name, title=title, columns=columns, rows=rows, note=note)


def _state(results: Results, case: Case) -> str:
    if results.is_done(case):
        return "done"
    failure = results.failure(case)
    return "missing" if failure is None else f"failed: {failure.kind}"


def _break_changes(ours: Results, theirs: Results, compared: Sequence[_Pair]) -> Table:
    new = {_key(outcome.case): outcome for outcome in outcomes(ours)}
    old = {_key(outcome.case): outcome for outcome in outcomes(theirs)}
    rows: list[list[Cell]] = []
    for pair in compared:
        if pair.ours.runs_prompt:
            before, after = old[_key(pair.theirs)], new[_key(pair.ours)]
            rows += [[pair.name, after.dtype, *row] for row in _break_rows(before, after)]
    return _changes("against-breaks", "First breaks", rows)


def _break_rows(before: Outcome, after: Outcome) -> Iterator[list[Cell]]:
    """Whether it breaks, from which length, where, at which token; the first of these that differs, and where."""
    old, new = before.first, after.first
    if old is None and new is None:
        return
    if old is None or new is None:
        said = ["clean" if span is None else f"at {span.first:,} tokens in {span.site}" for span in (old, new)]
        yield ["breaks", *said]
        return
    differing: tuple[tuple[str, Callable[[Any], Cell]], ...] = (
        ("first broken length", lambda span: span.first),
        ("site", lambda span: span.site),
        ("position", lambda span: span.broke.position),
        ("kind", lambda span: span.broke.kind),
    )
    for what, of in differing:
        if of(old) != of(new):
            yield [what, of(old), of(new)]
    yield from _other_lengths(before, after)


def _other_lengths(before: Outcome, after: Outcome) -> Iterator[list[Cell]]:
    """Lengths at which both break, past their first ones, at different sites: the least, and how many there are."""
    old, new = _sites(before), _sites(after)
    firsts = {outcome.first.first for outcome in (before, after) if outcome.first is not None}
    differing = [length for length in sorted(old.keys() & new.keys() - firsts) if old[length] != new[length]]
    if differing:
        least, others = differing[0], len(differing) - 1
        more = f" and {count(others, 'other length')}" if others else ""
        yield [f"site at {count(least, 'token')}{more}", old[least], new[least]]


def _sites(outcome: Outcome) -> dict[int, str | None]:
    """The site of the first break, by length, where there is one."""
    broken = [span for span in outcome.spans if span.broke is not None]
    return {length: span.site for span in broken for length in range(span.first, span.last + 1)}


def _token_changes(ours: Results, theirs: Results, compared: Sequence[_Pair]) -> tuple[Table, list[Prose]]:
    """The tokens at which runs part that stayed finite before and now, and what that means."""
    rows: list[list[Cell]] = []
    said: list[Prose] = []
    for pair in compared:
        if pair.ours.kind != "run":
            continue
        found = divergence(theirs.recording(pair.theirs), ours.recording(pair.ours))
        if found is None:
            continue
        dtype = pair.ours.settings.get("dtype")
        what = "next token" if found.position is None else f"token {found.position:,}"
        rows.append([pair.name, dtype, what, *map(code, found.texts)])
        if not said:
            said.append(Prose(f"**Rounding, not range**, in {pair.name} in {dtype}. {parted(found)}"))
    return _changes("against-tokens", "Tokens that differ though nothing left the range", rows), said


def _peak_changes(ours: Results, theirs: Results, compared: Sequence[_Pair]) -> Table:
    rows: list[tuple[float, list[Cell]]] = []
    for pair in compared:
        if pair.ours.kind == "run":
            moved = list(_moved_sites(theirs.recording(pair.theirs), ours.recording(pair.ours)))
        elif pair.ours.kind == "lengths":
            moved = list(_moved_curve(theirs, ours, pair))
        else:
            continue
        moved.sort(key=lambda entry: -entry[1])
        for where, ulp, before, after in moved[:MOST_SITES]:
            more = len(moved) if len(moved) > MOST_SITES else None
            rows.append((ulp, [pair.name, pair.ours.settings.get("dtype"), where, before, after, ulp, more]))
    rows.sort(key=lambda row: -row[0])
    return Table(
        name="against-peaks",
        title="Peaks that moved",
        columns=[
            *_WHOSE,
            Column("where"),
            *_BEFORE_AND_AFTER,
            Column("moved by", unit="ulp"),
            Column("of so many", unit="places", format=grouped),
        ],
        rows=[row for _, row in rows],
        note=f"Places where both reports know the largest finite magnitude, and it moved by more than {MOST_ULP:g} "
        f"units in the last place of the dtype at the earlier value; worst first, at most {MOST_SITES} for each case.",
    )


_Moved = tuple[str, float, float, float]


def _moved_sites(before: Recording, after: Recording) -> Iterator[_Moved]:
    """Site, ulp, amax before, amax now, for the sites that stored something finite in both."""
    old = {(record.site, record.step): record for record in before}
    for record in after:
        other = old.get((record.site, record.step))
        if other is None or other.amax is None or record.amax is None:
            continue
        form = FORMATS.get(other.dtype) or number_format(before.header.dtype)
        moved = ulps(form, other.amax, record.amax)
        if moved > MOST_ULP:
            yield record.site, moved, other.amax, record.amax


def _moved_curve(theirs: Results, ours: Results, pair: _Pair) -> Iterator[_Moved]:
    """The length at which the largest stored value moved most."""
    before, after = theirs.length_map(pair.theirs), ours.length_map(pair.ours)
    form = number_format(before.header.dtype)
    length = min(before.longest, after.longest)
    old, new = before.curve()[:length], after.curve()[:length]
    moved = [
        (ulps(form, float(old[at]), float(new[at])), int(at))
        for at in np.flatnonzero(np.isfinite(old) & np.isfinite(new) & (old != new))
    ]
    far = [(ulp, at) for ulp, at in moved if ulp > MOST_ULP]
    if far:
        ulp, at = max(far, key=lambda pair: pair[0])
        yield f"the largest of all sites, at {count(at + 1, 'token')}", ulp, float(old[at]), float(new[at])


def ulps(form: NumberFormat, before: float, after: float) -> float:
    """|after - before| in units in the last place of `form` at `before`, both finite; below 2^emin, of subnormals."""
    exponent = form.emin if before == 0 else max(math.frexp(before)[1] - 1, form.emin)
    return abs(after - before) / math.ldexp(1.0, exponent - form.precision + 1)


def _logits_changes(ours: Results, theirs: Results, compared: Sequence[_Pair]) -> Table:
    rows: list[list[Cell]] = []
    for pair in compared:
        if pair.ours.kind == "run":
            before = theirs.recording(pair.theirs).header.logits_error
            after = ours.recording(pair.ours).header.logits_error
            if before is not None and after is not None:
                dtype = pair.ours.settings.get("dtype")
                rows += [[pair.name, dtype, *row] for row in _logits_rows(before, after)]
    return _changes(
        "against-logits",
        "Errors of the logits",
        rows,
        note=f"KL divergence from the reference in nats a token, where it changed by more than {share(LEAST_LOGITS)}; "
        "top-1 agreement as a fraction of positions, where it changed.",
    )


def _logits_rows(before: LogitsError, after: LogitsError) -> Iterator[list[Cell]]:
    for what, old, new in (
        ("KL, mean", before.kl_mean, after.kl_mean),
        ("KL, largest", before.kl_max, after.kl_max),
    ):
        if (old is None) != (new is None) or (
            old is not None and new is not None and not math.isclose(old, new, rel_tol=LEAST_LOGITS)
        ):
            yield [what, old, new]
    if before.top1 != after.top1:
        yield ["top-1 agreement", before.top1, after.top1]


def _memory_changes(ours: Results, theirs: Results, compared: Sequence[_Pair]) -> Table:
    new = {_key(case): memory for case, memory in ours.memories()}
    old = {_key(case): memory for case, memory in theirs.memories()}
    rows: list[list[Cell]] = []
    for pair in compared:
        if pair.ours.kind == "memory":
            before, after = old[_key(pair.theirs)], new[_key(pair.ours)]
            rows += [[pair.name, after.dtype, *row] for row in _memory_rows(before, after)]
    return _changes(
        "against-memory",
        "Memory",
        rows,
        unit="bytes",
        format=size,
        note=f"Computed sizes where they changed at all, measured peaks where they changed by more than "
        f"{share(LEAST_MEMORY)}.",
    )


def _memory_rows(before: Memory, after: Memory) -> Iterator[list[Cell]]:
    for part in ("weights", "cache", "activations"):
        old, new = getattr(before, part), getattr(after, part)
        if old != new:
            yield [f"{part}, computed", old, new]
    peaks = before.peak - before.libraries, after.peak - after.libraries
    if not math.isclose(*peaks, rel_tol=LEAST_MEMORY):
        yield ["peak without libraries, measured", *peaks]

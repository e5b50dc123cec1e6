"""Length by dtype: where each text first breaks, and how its headroom shrinks as it grows."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from stabilitykit.formats import number_format
from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.records.sweep import Case, Results
from stabilitykit.report.blocks import Block, Cell, Column, Prose, Section, Table
from stabilitykit.report.outcomes import Names, Outcome, outcomes, texts
from stabilitykit.report.parts.by_length import Maps, break_map, curves
from stabilitykit.report.style import bits
from stabilitykit.report.tables import table
from stabilitykit.words import code, count, grouped, listed, quoted

_T = TypeVar("_T")


def section(results: Results) -> Section:
    """The map, the curves, and the tables of first breaks, spans and checks, of whatever has finished."""
    names = Names(results.plan.cases)
    maps = [(names(case), case, found) for case, found in results.length_maps()]
    found = outcomes(results)
    title = "Length × dtype"
    if not found:
        return Section(
            key="lengths", title=title, opening="No case that runs a prompt has finished: no length is known."
        )
    blocks: list[Block] = [break_map(list(texts(found)))]
    if maps:
        figure = curves(maps, results.form)
        blocks += [
            *([] if figure is None else [figure]),
            _first_breaks(maps),
            Prose(_trust(maps)),
            *([_checks(maps)] if any(lengths.checks for _, _, lengths in maps) else []),
            _spans(maps),
        ]
    else:
        blocks.append(
            Prose("No case over a range of lengths has finished, so only the lengths of single runs are known.")
        )
    if runs := [outcome for outcome in found if outcome.case.kind == "run"]:
        blocks.append(_runs(runs))
    return Section(
        key="lengths",
        title=title,
        opening="At which lengths each text breaks in each dtype, and how much headroom is left before it does. Length "
        "is no cause by itself: a longer prompt holds more tokens, one of which may grow too large, so another text "
        "breaks at another length.",
        blocks=blocks,
    )


_Whose = tuple[str, Case, LengthMap]
_TOKENS: dict[str, Any] = {"unit": "tokens", "format": grouped}


def _whose(of: Callable[[_T], _Whose]) -> list[tuple[Column, Callable[[_T], Cell]]]:
    """The columns that say whose a row is."""
    return [
        (Column("text"), lambda item: of(item)[0]),
        (Column("<bos>"), lambda item: of(item)[1].settings.get("bos")),
        (Column("dtype"), lambda item: of(item)[2].header.dtype),
    ]


def _first_breaks(maps: Maps) -> Table:
    return table(
        "first-breaks",
        "First breaks",
        maps,
        [
            *_whose(_itself),
            (Column("lengths from 1 to", **_TOKENS), lambda one: one[2].longest),
            (Column("first broken", **_TOKENS), lambda one: one[2].first_broken),
            (Column("in"), lambda one: _first(one[2]).site),
            (Column("at token"), lambda one: _token(_first(one[2]))),
            (Column("value there"), lambda one: _value(_first(one[2]))),
            (Column("headroom at the longest clean", unit="bits", format=bits), lambda one: _headroom(one[2])),
            (Column("runs"), lambda one: one[2].runs),
            (Column("checks that agree"), lambda one: _agreeing(one[2])),
            (Column("worst", unit="ulp"), lambda one: max((check.ulp for check in one[2].checks), default=None)),
        ],
        note="Headroom is in the dtype's own bits. Runs are the forward passes that all lengths follow from; checks "
        "are lengths run again directly, worst how far apart any site's peak is in them.",
    )


def _itself(one: _Whose) -> _Whose:
    return one


def _first(found: LengthMap) -> Span:
    """The first broken span; a clean one, of which nothing is told, where none broke."""
    return next((span for span in found.spans if span.broke is not None), Span(first=0, last=0, run=0))


def _token(span: Span) -> str | None:
    return None if span.token_text is None else quoted(span.token_text)


def _value(span: Span) -> float | None:
    return None if span.broke is None else span.broke.value


def _headroom(found: LengthMap) -> float | None:
    """At the longest clean length, in the dtype's own bits."""
    clean = max((span.last for span in found.spans if span.broke is None), default=None)
    amax = math.nan if clean is None else float(found.curve()[clean - 1])
    return None if math.isnan(amax) else number_format(found.header.dtype).headroom(amax)


def _agreeing(found: LengthMap) -> str | None:
    return f"{sum(check.agrees for check in found.checks)} of {len(found.checks)}" if found.checks else None


def _trust(maps: Maps) -> str:
    """How far the lengths that were not run themselves can be trusted."""
    checks = [check for _, _, found in maps for check in found.checks]
    wrong = [(text, check) for text, _, found in maps for check in found.checks if not check.agrees]
    near = [(text, span) for text, _, found in maps for span in found.spans if span.near and not span.direct]
    passes, lengths = sum(found.runs for _, _, found in maps), sum(found.longest for _, _, found in maps)
    source = f"{'comes' if lengths == 1 else 'come'} from {count(passes, 'forward pass', 'forward passes')}"
    parts = [f"{count(lengths, 'length')} in {count(len(maps), 'case')} {source}."]
    if not checks:
        parts.append("None was run again directly, so these lengths are unchecked.")
    elif not wrong:
        agree = "was run again directly and agrees" if len(checks) == 1 else "were run again directly and all agree"
        peak, site = max(check.peak_ulp for check in checks), max(check.ulp for check in checks)
        beyond, compared = sum(check.beyond for check in checks), sum(check.compared for check in checks)
        same = f"{count(len(checks), 'length')} {agree}: the same first break, and"
        parts.append(
            f"{same} the largest peak within {peak:.3g} ulp. Of single sites {beyond:,} in {compared:,} are further "
            f"apart than four ulp, by {site:.3g} at most: kernels of another shape sum in another order."
            if beyond
            else f"{same} peaks within {site:.3g} ulp."
        )
    else:
        where = listed([f"{code(text)} at {count(check.length, 'token')}" for text, check in wrong], most=4)
        parts.append(
            f"**{len(wrong):,} of {count(len(checks), 'length')} run again directly "
            f"{'disagrees' if len(wrong) == 1 else 'disagree'}**: {where}."
        )
    if near:
        where = listed([f"{code(text)} at {_between(span)}" for text, span in near], most=4)
        parts.append(f"Undecided, because the value that decides lies within eight ulp of the limit: {where}.")
    return " ".join(parts)


def _between(span: Span) -> str:
    return count(span.first, "token") if span.first == span.last else f"{span.first:,} to {span.last:,} tokens"


def _checks(maps: Maps) -> Table:
    return table(
        "length-checks",
        "Lengths run again directly",
        [(one, check) for one in maps for check in one[2].checks],
        [
            *_whose(_first_of),
            (Column("length", **_TOKENS), lambda pair: pair[1].length),
            (Column("first break"), lambda pair: pair[1].site),
            (Column("first break, directly"), lambda pair: pair[1].direct_site),
            (Column("agrees"), lambda pair: pair[1].agrees),
            (Column("largest peak apart", unit="ulp"), lambda pair: pair[1].peak_ulp),
            (Column("worst site apart", unit="ulp"), lambda pair: pair[1].ulp),
            (Column("worst site"), lambda pair: pair[1].ulp_site),
            (Column("relative"), lambda pair: pair[1].relative),
            (Column("sites apart by more than four ulp"), lambda pair: pair[1].beyond),
            (Column("sites compared"), lambda pair: pair[1].compared),
        ],
        note="A length agrees where both ways break first at the same site, or not at all, and the largest peak of all "
        "sites is no further apart than four ulp, in units of the dtype at that peak.",
    )


def _first_of(pair: tuple[_Whose, object]) -> _Whose:
    return pair[0]


def _spans(maps: Maps) -> Table:
    return table(
        "spans",
        "Every range of lengths with the same first break",
        [(one, span) for one in maps for span in one[2].spans],
        [
            *_whose(_first_of),
            (Column("from", **_TOKENS), lambda pair: pair[1].first),
            (Column("to", **_TOKENS), lambda pair: pair[1].last),
            (Column("first break"), lambda pair: pair[1].site),
            (Column("what"), lambda pair: pair[1].label),
            (Column("kind"), lambda pair: None if pair[1].broke is None else pair[1].broke.kind),
            (Column("at token"), lambda pair: _token(pair[1])),
            (Column("position"), lambda pair: None if pair[1].broke is None else pair[1].broke.position),
            (Column("value"), lambda pair: _value(pair[1])),
            (Column("from a run of", **_TOKENS), lambda pair: pair[1].run),
            (Column("undecided"), lambda pair: pair[1].near and not pair[1].direct),
        ],
    )


def _runs(runs: Sequence[Outcome]) -> Table:
    return table(
        "runs",
        "Single runs",
        [(run, span) for run in runs for span in run.spans],
        [
            (Column("text"), lambda pair: pair[0].text),
            (Column("<bos>"), lambda pair: pair[0].bos),
            (Column("dtype"), lambda pair: pair[0].dtype),
            (Column("length", **_TOKENS), lambda pair: pair[1].first),
            (Column("first break"), lambda pair: pair[1].site),
            (Column("at token"), lambda pair: _token(pair[1])),
            (Column("value there"), lambda pair: _value(pair[1])),
            (Column("headroom", unit="bits", format=bits), lambda pair: pair[0].headroom),
            (Column("sampling raised"), lambda pair: pair[0].error),
        ],
        alarming=lambda pair: pair[1].broke is not None,
    )

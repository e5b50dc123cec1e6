"""The verdict in one paragraph: what breaks where, in which texts and at which lengths, and what to do."""

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from stabilitykit.commands import line, repair
from stabilitykit.diagnosis.parts import is_stream
from stabilitykit.diagnosis.verdict import limits
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records.lengths import Span
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Cell, Column, Prose, Section, Table
from stabilitykit.report.outcomes import Outcome, Text, is_known, least_headroom, outcomes, reference, standing, texts
from stabilitykit.report.style import bits
from stabilitykit.report.tables import table
from stabilitykit.report.words import at_broken_token, happened, layers_by_length, located, short_place
from stabilitykit.words import code, count, grouped, listed, none_finished, number, sentence, with_bos

# Less than this, in bits, and a value twice as large as the largest seen would break.
NARROW = 1.0


def section(results: Results) -> Section:
    """The paragraph, and a table by dtype. Draws on the finished cases of kinds "run" and "lengths"."""
    found = outcomes(results)
    planned = [case for case in results.plan.cases if case.runs_prompt]
    if not planned:
        opening = "This experiment runs no prompt, so there is nothing to judge."
        return Section(key="verdict", title="Verdict", opening=opening)
    if not found:
        opening = f"There is no verdict yet: {none_finished(len(planned), 'case', ' that would run a prompt')}."
        return Section(
            key="verdict",
            title="Verdict",
            opening=opening,
            blocks=[Prose(" ".join(part for part in (_unfinished(results), _skipped(results)) if part))],
        )
    finished = f"{count(len(found), 'finished case')} of {len(planned):,} {'comes' if len(found) == 1 else 'come'} to"
    return Section(
        key="verdict",
        title="Verdict",
        opening=f"What {finished}. It holds for these texts and lengths: another text may contain a token with larger "
        "values.",
        blocks=[Prose(paragraph(results, found)), _table(results, found)],
    )


def paragraph(results: Results, found: Sequence[Outcome]) -> str:
    """The verdict for people. `found` has at least one case."""
    dtypes = _dtypes(found, results.form)
    broken = [dtype for dtype in dtypes if standing(found, dtype) == "breaks"]
    clean = [dtype for dtype in dtypes if dtype not in broken]
    sentences = [text for dtype in broken for text in _breaks(found, dtype)]
    if results.form.name not in dtypes:
        sentences.append(_forecast(results, found))
    if clean:
        sentences.append(_clean(results, found, clean, nothing_broke=not broken))
    sentences += [_advice(results, found, broken), _unfinished(results), _skipped(results), *limits(results.plan.notes)]
    return " ".join(text for text in sentences if text)


def _dtypes(found: Sequence[Outcome], form: NumberFormat) -> list[str]:
    """Those that ran, `form` first, then by width."""
    return sorted({o.dtype for o in found}, key=lambda name: (name != form.name, number_format(name).bits, name))


def _breaks(found: Sequence[Outcome], dtype: str) -> Iterator[str]:
    """Where it first breaks, then in which texts and at which lengths, then what comes of it."""
    own = list(texts([o for o in found if o.dtype == dtype]))
    first_text = min((text for text in own if text.broken), key=lambda text: text.broken[0].first)
    first = first_text.broken[0]
    bos = "" if first_text.bos is None else f" {with_bos(first_text.bos)}"
    alone = sum(text.lengths for text in own) == 1
    shortest = "the one length that ran" if alone else "the shortest that breaks"
    yield (
        f"**{dtype} breaks in {located(first)}{at_broken_token(first)}**, in {code(first_text.name)}{bos} at "
        f"{count(first.first, 'token')}, {shortest}: {happened(first, dtype)}."
    )
    order = (True, False, None)
    for bos, group in groupby(sorted(own, key=lambda text: order.index(text.bos)), key=lambda text: text.bos):
        yield _group(bos, list(group))
    yield _consequence([o for o in found if o.dtype == dtype])


def _group(bos: bool | None, own: Sequence[Text]) -> str:
    broken = [text for text in own if text.broken]
    prefix = f"{with_bos(bos)}, " if bos is not None else ""
    if not broken:
        return sentence(f"{prefix}{_all(len(own))} {'is' if len(own) == 1 else 'are'} clean")
    how_many = (
        f"{_all(len(own))} {'breaks' if len(own) == 1 else 'break'}"
        if len(broken) == len(own)
        else f"{len(broken):,} of {len(own):,} texts {'breaks' if len(broken) == 1 else 'break'}"
    )
    stories = {(_extent(text), _where(text)) for text in broken}
    everywhere = all(not text.clean for text in broken)
    if len(stories) == 1:
        ((extent, where),) = stories
        named = "" if len(broken) == len(own) > 1 else f" ({_names(broken)})"
        said = f"{named} {extent}, in {where}"
    elif everywhere and len({where for _, where in stories}) == 1:
        ranges: dict[str, list[Text]] = {}
        for text in broken:
            ranges.setdefault(_range(text.spans), []).append(text)
        each = [f"{_names(texts)} {lengths}" for lengths, texts in ranges.items()]
        said = f" at every length that ran, in {_where(broken[0])}: {'; '.join(each)}"
    else:
        each = [f"{code(text.name)} {_extent(text)} ({_where(text)})" for text in broken]
        said = f": {listed(each, most=6)}"
    rest = len(own) - len(broken)
    clean = "" if rest == 0 else f"; the other {'one is' if rest == 1 else f'{rest:,} are'} clean"
    return sentence(f"{prefix}{how_many}{said}{clean}")


def _all(amount: int) -> str:
    return "the one text" if amount == 1 else "both texts" if amount == 2 else f"all {amount:,} texts"


def _names(own: Sequence[Text]) -> str:
    return listed([code(text.name) for text in own], most=6)


def _where(text: Text) -> str:
    """Where its shortest broken length breaks, and from which length on another layer is first."""
    elsewhere = layers_by_length(text.broken)
    return short_place(text.broken[0]) + (f", then {elsewhere}" if elsewhere else "")


def _range(spans: Sequence[Span]) -> str:
    """`at 2 tokens` · `from 1 to 512 tokens`, from the shortest to the longest."""
    first, last = min(span.first for span in spans), max(span.last for span in spans)
    return f"at {count(first, 'token')}" if first == last else f"from {first:,} to {last:,} tokens"


def _extent(text: Text) -> str:
    """At which lengths a text breaks that does."""
    first, last = text.broken[0].first, max(span.last for span in text.broken)
    if not text.clean:
        if text.lengths == 1:
            return f"at {count(first, 'token')}, the one length that ran"
        if text.lengths == last - first + 1:
            return f"at every length that ran, {_range(text.spans)}"
        return f"at all {text.lengths:,} lengths that ran, {_range(text.spans)}"
    longest_clean = max(span.last for span in text.clean)
    if longest_clean + 1 == first:
        return _range(text.broken)
    if longest_clean < first:
        return f"{_range(text.broken)}, though not yet at {longest_clean:,}"
    return f"at some lengths {_range(text.spans)}, {count(first, 'token')} the shortest"


def _consequence(own: Sequence[Outcome]) -> str:
    hidden = [o for o in own if o.hidden]
    raised = [o for o in own if o.first is not None and o.error]
    parts = []
    if raised:
        parts.append(f"Sampling then raises {code(raised[0].error)}, seen {_at_lengths(raised)}.")
    if hidden:
        parts.append(
            f"In {count(len(hidden), 'recorded run')}, {_at_lengths(hidden)}, the logits are finite all the same, "
            "which hides the break."
        )
    return " ".join(parts)


def _at_lengths(own: Sequence[Outcome]) -> str:
    """`at 2 and 64 tokens`: the lengths of these runs."""
    lengths = sorted({span.first for o in own for span in o.spans})
    return f"at {listed([f'{length:,}' for length in lengths], most=4)} {'token' if lengths == [1] else 'tokens'}"


def _forecast(results: Results, found: Sequence[Outcome]) -> str:
    form = results.form
    planned = any(case.settings.get("dtype") == form.name and case.runs_prompt for case in results.plan.cases)
    lead = f"No case in {form.name} has finished" if planned else f"{form.name} is not part of this sweep"
    known = [o for o in reference(found) if o.largest is not None]
    if not known:
        return f"{lead}."
    top = max(known, key=lambda o: o.largest or 0.0)
    assert top.largest is not None
    judged = f"the largest value that {top.dtype} stored, {number(top.largest)} in {code(top.text)},"
    if form.overflows(top.largest):
        return f"{lead}; {judged} would overflow it (maximum {number(form.largest)})."
    if not is_known(found):
        return f"{lead}, and a text that breaks in every dtype that ran may hold values too large for it."
    return f"{lead}; {judged} would leave {_bits(form.headroom(top.largest))} of headroom in it."


def _clean(results: Results, found: Sequence[Outcome], dtypes: Sequence[str], *, nothing_broke: bool) -> str:
    said = []
    for dtype in dtypes:
        own = [o for o in found if o.dtype == dtype]
        room = least_headroom(own)
        spare = "" if room is None else f", at least {_bits(room)} of headroom"
        said.append(f"{dtype} ({count(len(own), 'case')}{spare})")
    verb = "is" if len(dtypes) == 1 else "are"
    finished = all(results.is_done(case) for case in results.plan.cases if case.runs_prompt)
    lead = f"**Nothing{'' if finished else ' that has finished'} breaks**: " if nothing_broke else ""
    raised = [o.error for o in found if o.dtype in dtypes and o.error is not None]
    harmless = sum(o.harmless for o in found if o.dtype in dtypes)
    ended = f" In {count(harmless, 'recorded run')} an overflow ends without loss." if harmless else ""
    but = f" Sampling raised all the same in {count(len(raised), 'run')}: {code(raised[0])}." if raised else ""
    return f"{lead}{listed(said)} {verb} clean.{ended}{but}"


def _bits(value: float) -> str:
    return f"{bits(value)} {'bit' if bits(value) == '1.0' else 'bits'}"


def _advice(results: Results, found: Sequence[Outcome], broken: Sequence[str]) -> str:
    if not broken:
        return _advice_when_clean(found)
    wrong = next((o for dtype in broken for o in found if o.dtype == dtype and o.first and not o.is_of_range), None)
    if wrong is not None:
        why, kind = wrong.cause, None if wrong.first is None or wrong.first.broke is None else wrong.first.broke.kind
        if why is not None and why.remedy:
            return f"What to do: {sentence(why.remedy)}"
        if kind == "unresolved":
            return f"What to do: record operators to see how that came about{_again(results, 'level=operators')}."
        return "What to do: look at the operands of that break; its cause is not the range of the format."
    wider = [dtype for dtype in ("bfloat16", "float32") if standing(found, dtype) == "clean"]
    likely = [dtype for dtype in ("bfloat16", "float32") if standing(found, dtype) == "would fit"]
    scale = _scale(results, found, broken)
    if wider:
        clean = "which is" if len(wider) == 1 else "which are"
        return f"What to do: use {' or '.join(wider)}, {clean} clean here{scale}."
    if likely:
        return f"What to do: use {' or '.join(likely)}, whose range holds these values though it did not run{scale}."
    wide = _again(results, "dtype=bfloat16,float32")
    return f"What to do: run the sweep in bfloat16 and float32 before choosing one of them{wide}{scale}."


def _again(results: Results, override: str) -> str:
    """The sweep's own command with something else, and another folder for that; in parentheses, after a space."""
    command = results.plan.command or ""
    if not command.startswith(line("sweep")):
        return ""
    more = shlex.join(["--set", override, "--out", f"{results.folder}-{override.partition('=')[0]}"])
    return f" ({code(f'{command} {more}')})"


def _scale(results: Results, found: Sequence[Outcome], broken: Sequence[str]) -> str:
    """How to stay in the dtypes that break, where all of it is the residual stream; after a semicolon."""
    firsts = [o.first for o in found if o.dtype in broken and o.first is not None]
    if not all(is_stream(span.label) for span in firsts):
        return ""
    command = repair(results.plan.checkpoint) if "float16" in broken else None
    by = "" if command is None else f": {code(command)}"
    return f"; to stay in {listed(broken)}, scale the residual stream down by a power of two first{by}"


def _advice_when_clean(found: Sequence[Outcome]) -> str:
    rooms = [(o.headroom, o) for o in found if o.headroom is not None]
    if not rooms:
        return ""
    room, least = min(rooms, key=lambda pair: pair[0])
    if room < NARROW:
        return (
            f"What to do: treat {least.dtype} as broken all the same: {code(least.text)} leaves {_bits(room)} of "
            "headroom, and a value twice as large would overflow."
        )
    return f"What to do: nothing for texts like these; {least.dtype} has the least headroom, {_bits(room)}."


def _unfinished(results: Results) -> str:
    cases = [case for case in results.plan.cases if case.runs_prompt]
    failed = [(case, failure) for case, failure in results.failed() if case.runs_prompt]
    missing = [case for case in results.missing() if case.runs_prompt]
    parts = []
    if failed:
        kinds = sorted({failure.kind for _, failure in failed})
        parts.append(f"{len(failed):,} failed ({listed(kinds)})")
    if missing:
        parts.append(f"{len(missing):,} {'has' if len(missing) == 1 else 'have'} not run")
    if not parts:
        return ""
    dtypes = sorted({str(case.settings.get("dtype")) for case in [*missing, *(case for case, _ in failed)]})
    return f"Not included: of {count(len(cases), 'case')}, {listed(parts)}, in {listed(dtypes)}."


def _skipped(results: Results) -> str:
    """The lengths that texts do not reach; the first few of them."""
    told = [str(one) for one in results.plan.skipped]
    more = [f"{len(told) - 3:,} more"] if len(told) > 4 else []
    return f"Shorter texts: {'; '.join([*told[: 3 if more else 4], *more])}." if told else ""


def _table(results: Results, found: Sequence[Outcome]) -> Table:
    planned = [str(case.settings.get("dtype")) for case in results.plan.cases if case.runs_prompt]
    dtypes = [*_dtypes(found, results.form), *sorted(set(planned) - {o.dtype for o in found})]
    return table(
        "verdict",
        "By dtype",
        [(dtype, [o for o in found if o.dtype == dtype]) for dtype in dtypes],
        [
            (Column("dtype"), lambda row: row[0]),
            (Column("cases"), lambda row: planned.count(row[0])),
            (Column("finished"), lambda row: len(row[1])),
            (Column("broken"), lambda row: sum(o.first is not None for o in row[1])),
            (Column("least headroom", unit="bits", format=bits), lambda row: least_headroom(row[1])),
            (Column("shortest broken length", unit="tokens", format=grouped), lambda row: _shortest(row[1], "first")),
            (Column("first break there"), lambda row: _shortest(row[1], "site")),
        ],
        note="Headroom is log2(maximum / largest magnitude), in the dtype's own bits; of a value that overflowed it is "
        "negative. A case that breaks loses its later values, which may be larger still.",
        alarming=lambda row: any(o.first is not None for o in row[1]),
    )


def _shortest(own: Sequence[Outcome], what: Literal["first", "site"]) -> Cell:
    """The length, or the site, of the first break in the shortest broken prompt; None where none broke."""
    broken = [o.first for o in own if o.first is not None]
    first = min(broken, key=lambda span: span.first, default=None)
    return None if first is None else first.first if what == "first" else first.site

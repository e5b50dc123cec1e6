"""Which runs are drawn where a sweep holds many, what of them can be trusted, and what to say where there are none."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from stabilitykit.diagnosis.outcome import is_harmless
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import Level, Record, Recording
from stabilitykit.records.sweep import USUAL, Case, Results
from stabilitykit.report.blocks import Section
from stabilitykit.words import at_token, counted, none_finished, place, with_bos

REFERENCE = "float32"

RULE = (
    "Of the {} finished groups of runs, figures show those of the plan's first prompt, with and without <bos>, at the "
    "length that finished in the most dtypes, the longest of several."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in their dtype alone, the widest first and then in the plan's order.

    `name` is for people; `slug`, for the names of files, tells apart the groups that are drawn. `form` is the number
    format that the report judges values by.
    """

    name: str
    slug: str
    settings: dict[str, Any]
    runs: dict[str, Recording]
    form: NumberFormat

    @property
    def reference(self) -> Recording | None:
        return self.runs.get(REFERENCE)

    @property
    def widest(self) -> Recording:
        """The run that shows most: in the format of the largest range, one that did not break if there is one."""
        return next(iter(self.runs.values()))

    @property
    def low(self) -> dict[str, Recording]:
        """The runs in other dtypes than the reference's."""
        return {dtype: run for dtype, run in self.runs.items() if dtype != REFERENCE}


def groups(results: Results) -> list[Group]:
    """Every finished run of the sweep, in the plan's order."""
    found: list[tuple[dict[str, Any], dict[str, Recording]]] = []
    for case, recording in results.runs():
        settings = {name: value for name, value in case.settings.items() if name != "dtype"}
        runs = next((runs for known, runs in found if known == settings), None)
        if runs is None:
            reference = results.reference(case)
            runs = {} if reference is None else {REFERENCE: reference}
            found.append((settings, runs))
        runs[recording.header.dtype] = recording
    varied = [name for name in USUAL if len({str(settings.get(name)) for settings, _ in found}) > 1]
    return [
        Group(
            name=_name(settings, runs, varied),
            slug=_slug(settings),
            settings=settings,
            runs=_widest_first(runs),
            form=results.form,
        )
        for settings, runs in found
    ]


def _widest_first(runs: dict[str, Recording]) -> dict[str, Recording]:
    widest = max(runs.items(), key=_width)
    return {widest[0]: widest[1], **runs}


def _width(run: tuple[str, Recording]) -> tuple[bool, float, int]:
    form = number_format(run[0])
    return first_break(run[1]) is None, form.largest, form.precision


def chosen(results: Results) -> list[Group]:
    """The groups that are drawn, at most one with <bos> and one without, by RULE.

    Of groups that are alike in this the most finely recorded is taken, and of these the plan's first.
    """
    every = groups(results)
    first = [group for group in every if group.settings.get("prompt") == every[0].settings.get("prompt")]
    kinds = dict.fromkeys(group.slug for group in first)
    return [max((group for group in first if group.slug == kind), key=_rank) for kind in kinds]


def missing(results: Results) -> str:
    """A sentence on the runs that are planned and not there; empty where there are none."""
    planned, failed, waiting = _progress(results)
    if not failed and not waiting:
        return ""
    have = "has" if waiting == 1 else "have"
    return (
        f"Of {counted(planned, 'planned run')}, {failed} failed and {waiting} {have} not finished. They are left out."
    )


def nothing(key: str, title: str, results: Results, what: str) -> Section:
    """The section of a sweep without a finished run, or whose runs hold nothing of `what` is shown."""
    planned, failed, waiting = _progress(results)
    if not planned:
        why = "the experiment plans no recorded runs."
    elif planned == failed + waiting:
        why = f"{none_finished(planned, 'planned run')}; {failed} failed."
    else:
        why = f"no finished run that would be drawn here holds {what}. {missing(results)}"
    return Section(key=key, title=title, opening=f"Nothing can be shown here: {why.strip()}")


def opening(results: Results, text: str) -> str:
    """The text, by which rule runs were chosen if any were left out, and what is missing from the sweep."""
    found = len(groups(results))
    rule = RULE.format(found) if found > len(chosen(results)) else ""
    return " ".join(filter(None, (text, rule, missing(results))))


def intact(recording: Recording) -> Iterator[Record]:
    """The records of the first step from before its first break, none of which holds a lost element.

    What a broken run holds later is what the break left over, and no measure of the model.
    """
    first = first_break(recording)
    for record in recording:
        if record.step == 0 and record.lost == 0 and (first is None or record.order < first.order):
            yield record


def first_break(recording: Recording) -> Record | None:
    """The record that broke first; None where nothing did, or every break ended as the true value would have."""
    first = recording.first_break()
    return None if first is None or is_harmless(recording) else first


def magnitude(record: Record) -> float | None:
    """The largest that it holds, or would hold: of one that overflowed, the value that did not fit if it is known."""
    broke = record.broke
    over = None if broke is None or broke.kind != "overflow" or broke.value is None else abs(broke.value)
    if over is None or not math.isfinite(over):
        return record.amax
    return max(over, record.amax or 0.0)


def peak_token(recording: Recording, record: Record) -> tuple[int | None, str | None]:
    """Position and text of the token at which `magnitude` is reached."""
    if record.broke is not None and magnitude(record) != record.amax:
        return record.broke.position, recording.header.text_of(record.broke.token)
    return record.amax_position, record.amax_token_text


def break_sentence(recording: Recording) -> str | None:
    """float16 breaks at 64 tokens in layer 7, residual after MLP, at token 0 '<bos>'; None where nothing broke."""
    first = first_break(recording)
    if first is None or first.broke is None:
        return None
    where = at_token(first.broke.position, recording.header.text_of(first.broke.token))
    return f"{recording.header.dtype} breaks at {counted(tokens_in(recording), 'token')} in {place(first)}{where}"


def breaks(group: Group) -> list[str]:
    """`break_sentence` of the runs that broke."""
    return [sentence for run in group.runs.values() if (sentence := break_sentence(run)) is not None]


def tokens_in(recording: Recording) -> int:
    """The sequence's length in tokens, from what was recorded where the tokens are redacted."""
    tokens = recording.header.tokens
    return len(tokens[0]) if tokens else max((record.positions or 0 for record in recording), default=0)


def _progress(results: Results) -> tuple[int, int, int]:
    cases: Sequence[Case] = [case for case in results.plan.cases if case.kind == "run"]
    open_cases = [case for case in cases if not results.is_done(case)]
    failed = sum(results.failure(case) is not None for case in open_cases)
    return len(cases), failed, len(open_cases) - failed


def _rank(group: Group) -> tuple[int, int, int]:
    level = get_args(Level).index(group.widest.header.level)
    return len(group.runs), tokens_in(group.widest), level


def _slug(settings: dict[str, Any]) -> str:
    bos = settings.get("bos")
    return "any" if bos is None else "with-bos" if bos else "without-bos"


def _name(settings: dict[str, Any], runs: dict[str, Recording], varied: Sequence[str]) -> str:
    words = [str(settings.get("prompt", "the prompt")), counted(tokens_in(next(iter(runs.values()))), "token")]
    if settings.get("bos") is not None:
        words.append(with_bos(settings["bos"], mark=""))
    return ", ".join(words + [f"{name} {settings.get(name)}" for name in varied])

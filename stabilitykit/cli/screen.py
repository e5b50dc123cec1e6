"""What the commands print: progress on standard error, findings on standard output."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from stabilitykit.diagnosis import LayerRow, StepRow, by_layer, by_step, chain, verdict, weights_sentence
from stabilitykit.diagnosis.bounds import by_kind, folded, summary, unproved
from stabilitykit.diagnosis.forecast import Forecast, overflow_becomes, prediction
from stabilitykit.diagnosis.remedies import how_rescaled, outlier, recommendation
from stabilitykit.diagnosis.search import how_measured, of_what_kind, place, shortest, shown, with_bos
from stabilitykit.formats import FLOAT16
from stabilitykit.records import Recording, StoredWeights
from stabilitykit.records.bounds import SiteBound
from stabilitykit.records.remedies import Ranking, Score
from stabilitykit.records.search import Scan, Search, TokenPeak
from stabilitykit.records.sweep import Plan
from stabilitykit.report.style import bits, share, size
from stabilitykit.words import count, number, quoted

if TYPE_CHECKING:
    from stabilitykit.sweeps.cost import Cost

# Shown only once the work has taken this long, in seconds: a flash of a bar says nothing.
_PATIENCE = 1.0

output = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
messages = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document, strictly: anything that JSON cannot hold is an error here, not in the reader."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2))


class ProgressBar:
    """Called with (what, done, total); shows itself when the work outlasts a second, and never in a pipe."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=messages,
            transient=True,
        )
        self._began = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._shown = False

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            for task in self._tasks.values():
                self._bars.update(task, visible=False)
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)
        if not self._shown and messages.is_terminal and time.monotonic() - self._began > _PATIENCE:
            self._bars.start()
            self._shown = True

    def close(self) -> None:
        if self._shown:  # stopping bars that never started prints an empty line
            self._bars.stop()


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.close()


def print_weights(recordings: Sequence[Recording]) -> None:
    """A line for each dtype in which the weights are not what they were."""
    stored = [recording.header.weights for recording in recordings]
    lines = [weights_sentence(weights) for weights in stored if weights is not None]
    for line in filter(None, lines):
        print_note(line)
    if any(lines):
        output.print()


def print_verdict(recording: Recording, reference: Recording | None) -> None:
    broken = recording.first_break() is not None or recording.header.error is not None
    output.print(Text(verdict(recording, reference), style="bold red" if broken else "bold green"))
    output.print()


def print_layers(recording: Recording) -> None:
    """The table by layer; LEGEND explains its columns."""
    dtype, rows = recording.header.dtype, by_layer(recording)
    columns: dict[str, Callable[[LayerRow], str]] = {
        "amax": lambda row: "-" if row.amax is None else number(row.amax),
        "headroom": lambda row: "-" if row.headroom is None else f"{row.headroom:.1f}",
        "subnormal": lambda row: _zero_as_dash(row.subnormal),
        "entropy": lambda row: "" if row.entropy_mean is None else f"{row.entropy_mean:.2f}",
    }
    if any(row.lost for row in rows):
        columns["lost"] = lambda row: _zero_as_dash(row.lost)
    if dtype != "float16":
        columns[">float16"] = lambda row: _zero_as_dash(row.past_float16)
    table = _table(f"{dtype}, by layer")
    table.add_column("layer")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("amax is in", overflow="fold")
    for row in rows:
        at = "" if row.position is None else f", {row.position if row.token is None else quoted(row.token)}"
        table.add_row(
            row.name,
            *(cell(row) for cell in columns.values()),
            escape(f"{row.label or row.site or ''}{at}"),
            style="red" if row.lost else None,
        )
    output.print(table)
    output.print()


def print_steps(recording: Recording) -> None:
    """The steps of a generation at which the largest value so far grew, and the last one."""
    steps = by_step(recording)
    if len(steps) < 2:
        return
    shown: list[StepRow] = []
    for row in steps:
        if not shown or row.lost or (row.amax or 0.0) > max(s.amax or 0.0 for s in shown) or row is steps[-1]:
            shown.append(row)
    table = _table(f"{recording.header.dtype}, by step: {len(steps)} steps; the largest value grew at these")
    for name in ("step", "token", "position", "amax", "headroom", "lost", "amax is in"):
        right = name not in ("token", "amax is in")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in shown:
        table.add_row(
            str(row.step),
            escape("prompt" if row.step == 0 else "" if row.token is None else quoted(row.token)),
            "" if row.position is None else str(row.position),
            "-" if row.amax is None else number(row.amax),
            "-" if row.headroom is None else f"{row.headroom:.1f}",
            _zero_as_dash(row.lost),
            escape(("" if row.layer is None else f"layer {row.layer}, ") + (row.label or row.site or "")),
            style="red" if row.lost else None,
        )
    output.print(table)
    output.print()


def print_cases(plan: Plan, costs: "Sequence[Cost | None]") -> None:
    """What a sweep would run: its cases, the tokens of the longest pass of each, and what each will cost."""
    table = _table(f"{plan.title}: {count(len(plan.cases), 'case')}")
    table.add_column("kind")
    table.add_column("case", overflow="fold")
    for name in ("tokens", "about", "memory"):
        table.add_column(name, justify="right")
    for case, cost in zip(plan.cases, costs, strict=True):
        tokens = case.settings.get("tokens", case.settings.get("length"))
        price = ("", "") if cost is None else (_duration(cost.seconds), size(cost.memory))
        table.add_row(case.kind, escape(str(case)), f"{tokens:,}", *price)
    output.print(table)
    known = [cost for cost in costs if cost is not None]
    if known:
        total, most = sum(cost.seconds for cost in known), max(cost.memory for cost in known)
        print_note(
            f"About {_duration(total)} in all, and at most {size(most)} of weights and activations. Time is judged by "
            "this machine's speed just now, without reading weights; a range of lengths takes a pass more for every "
            "stretch that breaks elsewhere, and a comparison with a float32 run takes the memory of that model too."
        )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(seconds, 0.1):.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def print_forecasts(recording: Recording, found: Sequence[Forecast]) -> None:
    """A sentence for each format, then a table of what would become of elements and weights."""
    for one in found:
        style = "bold red" if one.breaks else "bold green"
        output.print(Text(prediction(recording, one), style=style))
    output.print()
    dtype, judged = recording.header.dtype, found[0]
    table = _table(
        f"What would become of {judged.elements:,} elements in {count(judged.judged, 'tensor')} of the {dtype} run"
    )
    table.add_column("format")
    for name in ("past its range", "which becomes", "subnormal", "zero", "headroom [bits]", "weights lost"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            one.format,
            _zero_as_dash(one.past),
            overflow_becomes(one.format, saturating=one.saturating),
            *(share(part / one.elements) if part else "-" for part in (one.subnormal, one.zero)),
            "-" if one.headroom is None else f"{one.headroom:.1f}",
            "-" if one.weights is None else _zero_as_dash(_lost(one.weights, one.saturating)),
            style="red" if one.breaks else None,
        )
    output.print(table)
    output.print()
    print_note(
        "Judged are the tensors that a float16 run stores in 16 bits, by their values in this run, exact to the "
        "rounding ties. After a first overflow nothing is what it would have been. weights lost: become infinite or "
        "zero."
    )


def _lost(weights: StoredWeights, saturating: bool) -> int:
    return weights.zero + (0 if saturating else weights.overflow)


def print_bounds(found: Sequence[SiteBound]) -> None:
    """A sentence on all sites, then a table with a row for each kind."""
    output.print(Text(summary(found), style="bold red" if unproved(found) else "bold green"))
    output.print()
    rows = by_kind(found)
    shown = folded(rows)
    table = _table("By kind of tensor, over all layers")
    table.add_column("tensor", overflow="fold")
    for name in ("bound", "in layer", "found", "bound/found", "observed"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for row in shown:
        share = "" if row.share == row.sites else f", {row.share} of {row.sites}"
        table.add_row(
            escape(row.worst.label or row.worst.kind),
            number(row.worst.bound),
            "" if row.worst.layer is None else str(row.worst.layer),
            "-" if row.found is None else number(row.found),
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            "-" if row.observed is None else number(row.observed),
            f"{row.verdict}{share}",
            style="red" if row.verdict.startswith("reachable") else None,
        )
    output.print(table)
    output.print()
    print_note(
        "bound: no prompt of any length exceeds it, rounding included. found: the largest that a search over hidden "
        "states entering a layer's norm made; no prompt is known that leads there, and the residual stream is the "
        "hidden state itself. bound/found: in the layer where they are closest. observed: in three texts, in float32. "
        f"Left out are {len(rows) - len(shown)} kinds of operators: the tables of cos and sin, and those whose bound "
        "is that of another row within 2%."
    )


def print_proof(bounds: Mapping[str, float]) -> None:
    """What a checker proved, the worst layer of each kind of tensor."""
    table = _table("What no prompt exceeds")
    table.add_column("tensor")
    table.add_column("bound", justify="right")
    for kind, bound in bounds.items():
        table.add_row(escape(kind), number(bound), style=None if bound <= FLOAT16.largest else "red")
    output.print(table)
    output.print()


def print_scores(scores: Sequence[Score]) -> None:
    """The remedies, best first."""
    table = _table(f"Against float32, over {scores[0].positions:,} held-out tokens")
    table.add_column("remedy", overflow="fold")
    for name in ("mean KL", "±", "99%", "largest", "same token", "perplexity", "headroom", "memory", "time"):
        table.add_column(name, justify="right")
    for one in scores:
        if not one.finite or one.kl_mean is None:
            cells = ["not finite", *["-"] * 6]
        else:
            perplexity = "-" if one.perplexity is None else f"{100 * one.perplexity:+.3f}%"
            room = "-" if one.headroom is None else f"{one.headroom:.1f}"
            kls = (one.kl_mean, one.kl_interval, one.kl_p99, one.kl_max)
            cells = [*map(_short, kls), share(one.top1 or 0.0), perplexity, room]
        style = None if one.finite else "red"
        table.add_row(one.name, *cells, size(one.weights + one.extra), f"{one.time:.2f}×", style=style)
    output.print(table)
    output.print()
    for one in scores:
        print_note(f"{one.name}: {one.summary}")
    output.print()
    print_note(
        "KL of float32's next-token distribution from the remedy's, in nats a token: mean, half the width of its 95% "
        "interval, 99th percentile, largest. headroom: bits between the largest value stored and the dtype's end. "
        "memory: weights, and what a window takes beside a plain run. time: against plain float16 on this machine."
    )
    output.print()


def _short(value: float | None) -> str:
    """4.8e-5"""
    return "-" if value is None else re.sub(r"e([-+])0?", r"e\1", f"{value:.1e}")


def print_ranking(ranking: Ranking) -> None:
    """The remedies, best first; which to take, and what the rescale does."""
    print_scores(ranking.scores)
    carried = ranking.repaired
    output.print(Text(recommendation(ranking), style="bold green" if carried.finite else "bold red"))
    for text in (how_rescaled(ranking), outlier(carried)):
        if text is not None:
            output.print(Text(text))


_WORST = 8  # tokens of each context


def print_search(search: Search) -> None:
    """What breaks, or comes nearest; the worst tokens of each context; how prompts grew, and the finds."""
    breaks = {find.bos for find in search.breaking}
    for bos, said in ((True, with_bos(search)), (False, shortest(search, False)), (True, shortest(search, True))):
        if said is not None:
            output.print(Text(said, style="bold red" if bos in breaks else "bold green"))
            output.print()
    for scan in search.scans:
        _print_scan(scan, search.dtype)
    if len(search.finds) > 1 or search.steps:
        _print_steps(search)
    by_ids = [peak for scan in search.scans for peak in scan.by_ids]
    if by_ids:
        known = list(dict.fromkeys(quoted(peak.text) for peak in by_ids))
        more = f" and {len(known) - _WORST} more, in the JSON" if len(known) > _WORST else ""
        print_note(f"Reached by ids only, for no text is read as them: {' '.join(known[:_WORST])}{more}.")
    print_note(how_measured(search))


def _print_scan(scan: Scan, dtype: str) -> None:
    text = f": {quoted(scan.context_text)}" if scan.context_text else ""
    table = _table(f"The worst tokens {scan.name}{text}")
    for name in ("token", "id", "what it is", "largest", "headroom", "in"):
        table.add_column(name, justify="right" if name in ("id", "largest", "headroom") else "left", overflow="fold")
    for peak in scan.worst[:_WORST]:
        table.add_row(
            escape(quoted(peak.text)),
            str(peak.token),
            peak.kind,
            "not finite" if peak.value is None else number(peak.value),
            "-" if peak.headroom is None else bits(peak.headroom),
            escape(place(peak)),
            style="red" if _is_past(peak) else None,
        )
    output.print(table)
    print_note(of_what_kind(scan))
    if scan.beyond:
        print_note(f"{count(scan.beyond, 'token')} of {scan.scanned:,} would leave the range of {dtype} there.")
    output.print()


def _is_past(peak: TokenPeak) -> bool:
    return peak.value is None or (peak.headroom is not None and peak.headroom < 0)


def _print_steps(search: Search) -> None:
    table = _table("How prompts grew: the nearest of each length")
    for name in ("tokens", "tried", "largest", "headroom", "text"):
        table.add_column(name, justify="left" if name == "text" else "right", overflow="fold")
    for step in search.steps:
        largest = "not finite" if step.value is None else number(step.value)
        room = "-" if step.headroom is None else bits(step.headroom)
        said = f"{'<bos> ' if step.bos else ''}{quoted(step.text)}"
        table.add_row(str(step.length), f"{step.tried:,}", largest, room, escape(said))
    output.print(table)
    output.print()
    table = _table("Finds")
    for name in ("file", "prompt", "largest", "headroom", "breaks in"):
        table.add_column(name, justify="right" if name in ("largest", "headroom") else "left", overflow="fold")
    for find in search.finds:
        largest = "not finite" if find.value is None else number(find.value)
        room = "-" if find.headroom is None else bits(find.headroom)
        broken = f"{find.broken_site}, token {find.broken_position}" if find.breaks else "-"
        style = "red" if find.breaks else None
        table.add_row(find.file, escape(shown(find)), largest, room, broken, style=style)
    output.print(table)
    output.print()


LEGEND = (
    "amax: largest finite magnitude stored in the dtype. headroom: bits between it and the format's end; with less "
    "than 1, twice as much overflows. subnormal, lost (inf or NaN), >float16 (past its range): elements. entropy: of "
    "the softmax, mean over heads and rows, in nats."
)


def print_chain(recording: Recording) -> None:
    links = chain(recording)
    if not links:
        return
    table = _table("How it spread")
    for name in ("", "site", "what happened"):
        table.add_column(name, overflow="fold")
    for _, group in groupby(links, key=lambda link: (link.event, link.text)):
        first, *rest = group
        site = f"{first.site} ... {rest[-1].site}" if rest else first.site or ""
        named = f" ({first.label})" if first.label else ""
        table.add_row(first.event, escape(f"{site}{named}"), escape(first.text))
    output.print(table)
    output.print()


def print_note(text: str) -> None:
    output.print(Text(text, style="dim"))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, collapse_padding=True)


def _zero_as_dash(count: int) -> str:
    return f"{count:,}" if count else "-"

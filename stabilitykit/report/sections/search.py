"""Which tokens and short prompts come nearest to the format's maximum, and why."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stabilitykit.commands import line
from stabilitykit.diagnosis.search import how_measured, of_what_kind, shortest, shown, with_bos
from stabilitykit.records.search import KINDS, Find, Scan, Search, TokenPeak
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.prose import plain
from stabilitykit.report.style import INK, VERMILLION, bits, series_style
from stabilitykit.report.tables import table
from stabilitykit.words import code, number, place, quoted

if TYPE_CHECKING:
    import matplotlib.figure

KEY, TITLE = "search", "Dangerous tokens and prompts"

OPENING = (
    "The largest value at a token's own position, over all tensors that are stored in the dtype. A search shows what "
    "overflows; that it found nothing proves nothing, because it tries few of the prompts there are."
)


def section(results: Results) -> Section:
    """The search in the sweep's folder, if `stabilitykit search --report` has put one there."""
    search = results.search
    if search is None:
        command = code(line("search", results.plan.checkpoint, "--report", results.folder))
        opening = f"No search has been run for this checkpoint. {command}, with this report's folder, adds one here."
        return Section(key=KEY, title=TITLE, opening=opening)
    found = blocks(search)
    if any(scan.bins for scan in search.scans):
        found.append(_figure(search))
    found.append(_kinds(search))
    if search.command:
        found.append(Prose(f"To search again: {code(search.command)}"))
    return Section(key=KEY, title=TITLE, opening=OPENING, blocks=found)


def blocks(search: Search) -> list[Block]:
    """What overflows, or comes nearest; the prompts and how they grew; the worst tokens of each context."""
    breaks = {find.bos for find in search.breaking}
    said = ((True, with_bos(search)), (False, shortest(search, False)), (True, shortest(search, True)))
    found: list[Block] = [
        Prose(plain(text), tone="bad" if bos in breaks else "good") for bos, text in said if text is not None
    ]
    if search.finds:
        found += [_finds("finds", "Prompts found", search.finds, search.dtype), _steps(search)]
    if search.given:
        found.append(_finds("given-prompts", "What became of the prompts that were given", search.given, search.dtype))
    for scan in search.scans:
        found += [_worst(scan), Prose(plain(of_what_kind(scan)), tone="note")]
    if any(scan.by_ids for scan in search.scans):
        found.append(_by_ids(search))
    return [*found, Prose(plain(how_measured(search)), tone="note")]


_VALUE, _HEADROOM = Column("largest", format=number), Column("headroom", unit="bits", format=bits)


def _worst(scan: Scan) -> Table:
    text = f", which is {quoted(scan.context_text)}" if scan.context_text else ""
    return table(
        f"worst-{_slug(scan)}",
        f"The worst {len(scan.worst)} tokens {scan.name}",
        scan.worst,
        [
            (Column("token"), lambda peak: quoted(peak.text)),
            (Column("id"), lambda peak: peak.token),
            (Column("what it is"), lambda peak: peak.kind),
            (_VALUE, lambda peak: peak.value),
            (_HEADROOM, lambda peak: peak.headroom),
            (Column("in"), place),
        ],
        note=f"Of {scan.scanned:,} tokens{plain(text)}; {scan.beyond:,} would overflow. Those that a text can hold.",
        alarming=_overflows,
    )


def _overflows(peak: TokenPeak) -> bool:
    return peak.value is None or (peak.headroom is not None and peak.headroom < 0)


def _by_ids(search: Search) -> Table:
    return table(
        "by-ids",
        "Reachable only as raw token ids: no text tokenizes to them",
        [(scan.name, peak) for scan in search.scans for peak in scan.by_ids],
        [
            (Column("where"), lambda pair: pair[0]),
            (Column("token"), lambda pair: quoted(pair[1].text)),
            (Column("id"), lambda pair: pair[1].token),
            (Column("what it is"), lambda pair: pair[1].kind),
            (_VALUE, lambda pair: pair[1].value),
            (_HEADROOM, lambda pair: pair[1].headroom),
            (Column("in"), lambda pair: place(pair[1])),
        ],
        note="A caller that passes ids to the model can use them, and chat templates do.",
        alarming=lambda pair: _overflows(pair[1]),
    )


def _kinds(search: Search) -> Table:
    return table(
        "token-kinds",
        "Headroom by kind of token",
        [(scan.name, kind) for scan in search.scans for kind in scan.kinds],
        [
            (Column("where"), lambda pair: pair[0]),
            (Column("kind"), lambda pair: KINDS[pair[1].kind]),
            (Column("tokens"), lambda pair: pair[1].count),
            (Column("least headroom", unit="bits", format=bits), lambda pair: pair[1].least),
            (Column("median", unit="bits", format=bits), lambda pair: pair[1].median),
        ],
    )


def _finds(name: str, title: str, finds: Sequence[Find], dtype: str) -> Table:
    return table(
        name,
        title,
        finds,
        [
            (Column("file"), lambda one: one.file or None),
            (Column("prompt"), shown),
            (Column("<bos>"), lambda one: one.bos),
            (Column("breaks"), lambda one: one.breaks),
            (_VALUE, lambda one: one.value),
            (_HEADROOM, lambda one: one.headroom),
            (Column("in"), place),
            (Column("at token"), lambda one: one.position),
            (Column("breaks in"), lambda one: one.broken_site),
        ],
        note=f"Values are float32's; whether a prompt breaks was observed in {dtype} itself.",
        alarming=lambda one: one.breaks,
    )


def _steps(search: Search) -> Table:
    return table(
        "prompt-steps",
        "How prompts grew: the nearest of each length",
        search.steps,
        [
            (Column("<bos>"), lambda one: one.bos),
            (Column("length", unit="tokens"), lambda one: one.length),
            (Column("tried"), lambda one: one.tried),
            (_VALUE, lambda one: one.value),
            (_HEADROOM, lambda one: one.headroom),
            (Column("prompt"), lambda one: quoted(one.text)),
        ],
        note="The best few prompts of each length were extended by another token.",
    )


def _slug(scan: Scan) -> str:
    return scan.name.replace(" ", "-").replace("<", "").replace(">", "")


def _figure(search: Search) -> Figure:
    scans = [scan for scan in search.scans if scan.bins]
    least = "; ".join(f"{scan.name}: from {scan.bins[0][0] / 10:g} bits" for scan in scans)
    return Figure(
        name="headroom-over-the-vocabulary",
        title="Headroom over the vocabulary",
        caption=f"How many tokens leave how much headroom in {search.dtype}, in steps of a tenth of a bit. Left of the "
        "line a token overflows.",
        alt=f"A histogram for each context. {least}.",
        draw=partial(_draw, scans=scans, dtype=search.dtype),
        size=(8.0, 3.8),
    )


def _draw(figure: "matplotlib.figure.Figure", scans: Sequence[Scan], dtype: str) -> list[Hover]:
    axes = figure.subplots()
    hovers = []
    for index, scan in enumerate(scans):
        first, last = scan.bins[0][0], scan.bins[-1][0]
        known = dict(scan.bins)
        edges = [edge / 10 for edge in range(first, last + 2)]
        counts = [known.get(edge, 0) for edge in range(first, last + 1)]
        look = series_style(index)
        axes.stairs(counts, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.6, label=scan.name)
        for edge, amount in scan.bins:
            text = f"{scan.name}: {amount:,} tokens with {edge / 10:g} to {(edge + 1) / 10:g} bits"
            low = amount * 10 ** (-0.06)
            hovers.append(Hover(left=edge / 10, right=(edge + 1) / 10, bottom=low, top=amount * 1.15, text=text))
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.axvline(0, color=VERMILLION, linewidth=1.0, linestyle=(0, (1, 1.5)))
    axes.annotate(f"{dtype} maximum", xy=(0, 1), xycoords=("data", "axes fraction"), xytext=(-3, -4),
                  textcoords="offset points", ha="right", va="top", rotation=90, fontsize=7.5, color=INK)  # fmt: skip
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.1), math.ceil(10 * right) / 10)
    axes.set_xlabel(f"headroom in {dtype} [bits]")
    axes.set_ylabel("tokens")
    figure.legend(loc="outside upper right", ncols=3)
    return hovers

"""Which tokens and short prompts come nearest to the format's end, and why."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stabilitykit.diagnosis.search import how_measured, of_what_kind, place, shortest, shown, with_bos
from stabilitykit.records.search import KINDS, Scan, Search, TokenPeak
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import INK, VERMILLION, bits, series_style
from stabilitykit.words import code, quoted
from stabilitykit.words import grouped as count

if TYPE_CHECKING:
    import matplotlib.figure

KEY, TITLE = "search", "Dangerous tokens and prompts"

OPENING = (
    "The largest value at a token's own position, over all tensors that are stored in the dtype. A search finds what "
    "breaks; that it found nothing proves nothing, for it tries few of the prompts there are."
)


def section(results: Results) -> Section:
    """The search in the sweep's folder, if `stabilitykit search --report` has put one there."""
    search = results.search
    if search is None:
        command = code(f"stabilitykit search {results.plan.checkpoint} --report FOLDER")
        opening = f"Nobody searched. {command}, with this report's folder, looks for prompts that break and adds them."
        return Section(key=KEY, title=TITLE, opening=opening)
    said = [with_bos(search), shortest(search, False), shortest(search, True)]
    blocks: list[Block] = [Prose(_plain(text)) for text in said if text is not None]
    if search.finds:
        blocks += [_finds(search), _steps(search)]
    if any(scan.bins for scan in search.scans):
        blocks.append(_figure(search))
    for scan in search.scans:
        blocks += [_worst(scan), Prose(_plain(of_what_kind(scan)))]
    blocks.append(_kinds(search))
    if any(scan.by_ids for scan in search.scans):
        blocks.append(_by_ids(search))
    blocks.append(Prose(how_measured(search)))
    if search.command:
        blocks.append(Prose(f"To search again: {code(search.command)}"))
    return Section(key=KEY, title=TITLE, opening=OPENING, blocks=blocks)


def _plain(text: str) -> str:
    """Without what would be markup: tokens may be stars and backticks."""
    return text.replace("`", "'").replace("**", "∗∗")


_PEAK = [
    Column(name="largest", format=count),
    Column(name="headroom", unit="bits", format=bits),
    Column(name="in"),
]


def _peak(peak: TokenPeak) -> list[Cell]:
    return [peak.value, peak.headroom, place(peak)]


def _worst(scan: Scan) -> Table:
    text = f", which is {quoted(scan.context_text)}" if scan.context_text else ""
    return Table(
        name=f"worst-{_slug(scan)}",
        title=f"The worst {len(scan.worst)} tokens {scan.name}",
        columns=[Column(name="token"), Column(name="id"), Column(name="what it is"), *_PEAK],
        rows=[[quoted(peak.text), peak.token, peak.kind, *_peak(peak)] for peak in scan.worst],
        note=f"Of {scan.scanned:,} tokens{text}; {scan.beyond:,} would leave the range. Those that a text can hold.",
    )


def _by_ids(search: Search) -> Table:
    return Table(
        name="by-ids",
        title="Tokens that no text is read as",
        columns=[Column(name="where"), Column(name="token"), Column(name="id"), Column(name="what it is"), *_PEAK],
        rows=[
            [scan.name, quoted(peak.text), peak.token, peak.kind, *_peak(peak)]
            for scan in search.scans
            for peak in scan.by_ids
        ],
        note="A prompt of text never holds them. Whoever hands ids to the model can, and chat templates do.",
    )


def _kinds(search: Search) -> Table:
    return Table(
        name="token-kinds",
        title="Headroom by kind of token",
        columns=[
            Column(name="where"),
            Column(name="kind"),
            Column(name="tokens", format=count),
            Column(name="least headroom", unit="bits", format=bits),
            Column(name="median", unit="bits", format=bits),
        ],
        rows=[
            [scan.name, KINDS[kind.kind], kind.count, kind.least, kind.median]
            for scan in search.scans
            for kind in scan.kinds
        ],
    )


def _finds(search: Search) -> Table:
    return Table(
        name="finds",
        title="Prompts",
        columns=[
            Column(name="prompt"),
            Column(name="<bos>"),
            Column(name="breaks"),
            *_PEAK,
            Column(name="at token"),
            Column(name="breaks in"),
        ],
        rows=[
            [shown(one), one.bos, one.breaks, one.value, one.headroom, place(one), one.position, one.broken_site]
            for one in search.finds
        ],
        note=f"Values are float32's; whether it breaks was seen in {search.dtype} itself.",
    )


def _steps(search: Search) -> Table:
    return Table(
        name="prompt-steps",
        title="How prompts grew",
        columns=[
            Column(name="<bos>"),
            Column(name="length", unit="tokens"),
            Column(name="tried", format=count),
            Column(name="nearest"),
            Column(name="largest", format=count),
            Column(name="headroom", unit="bits", format=bits),
        ],
        rows=[[one.bos, one.length, one.tried, quoted(one.text), one.value, one.headroom] for one in search.steps],
        note="Of each length the prompt whose last token came nearest; the best few of each were drawn out.",
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
        "line the range has ended.",
        alt=f"A histogram for each context. {least}.",
        draw=partial(_draw, scans=scans, dtype=search.dtype),
        size=(8.0, 3.8),
    )


def _draw(figure: "matplotlib.figure.Figure", scans: Sequence[Scan], dtype: str) -> list[Hover]:
    axes = figure.subplots()
    hovers = []
    for number, scan in enumerate(scans):
        first, last = scan.bins[0][0], scan.bins[-1][0]
        known = dict(scan.bins)
        edges = [edge / 10 for edge in range(first, last + 2)]
        counts = [known.get(edge, 0) for edge in range(first, last + 1)]
        look = series_style(number)
        axes.stairs(counts, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.6, label=scan.name)
        for edge, amount in scan.bins:
            text = f"{scan.name}: {amount:,} tokens with {edge / 10:g} to {(edge + 1) / 10:g} bits"
            low = amount * 10 ** (-0.06)
            hovers.append(Hover(left=edge / 10, right=(edge + 1) / 10, bottom=low, top=amount * 1.15, text=text))
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.axvline(0, color=VERMILLION, linewidth=1.0, linestyle=(0, (1, 1.5)))
    axes.annotate(f"{dtype} ends", xy=(0, 1), xycoords=("data", "axes fraction"), xytext=(-3, -4),
                  textcoords="offset points", ha="right", va="top", rotation=90, fontsize=7.5, color=INK)  # fmt: skip
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.1), math.ceil(10 * right) / 10)
    axes.set_xlabel(f"headroom in {dtype} [bits]")
    axes.set_ylabel("tokens")
    figure.legend(loc="outside upper right", ncols=3)
    return hovers

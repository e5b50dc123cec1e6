"""Bytes by dtype and length, computed and measured; what happens when they are short; which dtype to choose."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stabilitykit.records.sweep import Footprint, Memory, Results, Shortage
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.outcomes import outcomes
from stabilitykit.report.parts.bars import Part, stacked_bars
from stabilitykit.report.parts.hardware import dtype_to_choose
from stabilitykit.report.style import INK, share, size
from stabilitykit.report.tables import table
from stabilitykit.words import count, grouped, none_finished

if TYPE_CHECKING:
    import matplotlib.figure

TITLE = "Memory and hardware"

# How far a computed sum may lie from the measured peak before the report says so.
TOLERANCE = 0.10

_PARTS = (("weights", "weights", ""), ("cache", "KV cache", "////"), ("activations", "activations", "\\\\\\\\"))


def section(results: Results) -> Section:
    """The measurements that have finished, and the choice of a dtype that the finished runs lead to."""
    measured = [memory for _, memory in results.memories()]
    planned = [case for case in results.plan.cases if case.kind == "memory"]
    found = outcomes(results)
    blocks: list[Block] = []
    if measured:
        blocks += [Prose(_agreement(measured)), _figure(measured), _table(measured)]
    if footprints := [(str(case.settings["model"]), footprint) for case, footprint in results.footprints()]:
        blocks.append(_computed_alone(footprints))
    if shortages := [shortage for _, shortage in results.shortages()]:
        blocks.append(_shortages(shortages))
    if found:
        blocks.append(dtype_to_choose(found, measured))
    return Section(key="memory", title=TITLE, opening=_opening(len(measured), len(planned), bool(found)), blocks=blocks)


def _opening(measured: int, planned: int, judged: bool) -> str:
    if measured:
        missing = "" if measured == planned else f" {planned - measured:,} of {planned:,} measurements did not finish."
        text = (
            "What the model takes, computed from its sizes and next to it the peak of a fresh process that ran one "
            "prompt. A process allocates more than it uses, so the measured peak varies by a few percent. What "
            f"libraries take is in rows of its own, because it does not grow with the model.{missing}"
        )
    elif planned:
        text = f"No memory is known: {none_finished(planned, 'measurement')}."
    else:
        text = "This experiment measures no memory."
    if judged:
        return f"{text} The choice of a dtype rests on the texts and lengths that ran."
    return f"{text} No prompt has run to its end either, so there is no dtype to recommend."


def _agreement(measured: Sequence[Memory]) -> str:
    worst = max(measured, key=lambda memory: abs(memory.error))
    off = [memory for memory in measured if abs(memory.error) > TOLERANCE]
    of = f"at {_name(worst)}, where {size(worst.computed)} were computed"
    if not off:
        within = "The computed sum is" if len(measured) == 1 else f"All {len(measured):,} computed sums are"
        return (
            f"{within} within {TOLERANCE:.0%} of the measured peak; the largest difference is "
            f"{share(abs(worst.error))}, {of} and {size(worst.peak - worst.libraries)} measured."
        )
    which = (
        "The computed sum is"
        if len(measured) == 1
        else f"{len(off):,} of {len(measured):,} computed sums {'is' if len(off) == 1 else 'are'}"
    )
    return (
        f"**{which} further than {TOLERANCE:.0%} from the measured peak**; the largest difference is "
        f"{share(abs(worst.error))}, {of} and {size(worst.peak - worst.libraries)} measured."
    )


def _name(memory: Footprint) -> str:
    return f"{memory.dtype}, {count(memory.length, 'token')}, {memory.device}"


_BYTES: dict[str, Any] = {"unit": "bytes", "format": size}


def _table(measured: Sequence[Memory]) -> Table:
    return table(
        "memory",
        "Bytes by dtype and length",
        [(memory, own) for memory in measured for own in (memory, None)],
        [
            (Column("dtype"), lambda pair: pair[0].dtype),
            (Column("length", unit="tokens", format=grouped), lambda pair: pair[0].length),
            (Column("device"), lambda pair: pair[0].device),
            (Column("for"), lambda pair: "libraries" if pair[1] is None else "the model"),
            (Column("weights", **_BYTES), lambda pair: None if pair[1] is None else pair[1].weights),
            (Column("KV cache", **_BYTES), lambda pair: None if pair[1] is None else pair[1].cache),
            (Column("activations", **_BYTES), lambda pair: None if pair[1] is None else pair[1].activations),
            (Column("computed", **_BYTES), lambda pair: None if pair[1] is None else pair[1].computed),
            (
                Column("measured", **_BYTES),
                lambda pair: pair[0].peak - pair[0].libraries if pair[1] else pair[0].libraries,
            ),
            (Column("error", format=share), lambda pair: None if pair[1] is None else pair[1].error),
        ],
        note="The error is (computed - measured) / measured, without the libraries: positive where too much was "
        "computed. Libraries are what the process held before it read a checkpoint.",
    )


def _figure(measured: Sequence[Memory]) -> Figure:
    return footprint_figure(
        measured,
        name="memory-by-part",
        title="Computed parts, measured peak",
        caption="Stacked: what was computed. The upright mark is the measured peak, without the libraries.",
    )


def footprint_figure(
    footprints: Sequence[Footprint], *, name: str, title: str, caption: str, limit: float | None = None
) -> Figure:
    """One stacked bar each, a mark at the measured peak where there is one, and a line at `limit` bytes."""
    most = max(footprints, key=lambda f: f.computed)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        alt=f"{count(len(footprints), 'stacked bar')}: weights, KV cache, activations. The longest is {_name(most)} "
        f"with {size(most.computed)}.",
        draw=partial(
            _draw, footprints=footprints, names=[f"{f.dtype}, {f.length:,} tokens" for f in footprints], limit=limit
        ),
        size=(8.0, 1.2 + 0.32 * len(footprints)),
    )


def _draw(
    figure: "matplotlib.figure.Figure", *, footprints: Sequence[Footprint], names: Sequence[str], limit: float | None
) -> list[Hover]:
    from matplotlib.ticker import FuncFormatter

    parts = [
        Part(name=name, values=[getattr(f, attribute) for f in footprints], colour=index, hatch=hatch)
        for index, (attribute, name, hatch) in enumerate(_PARTS)
    ]
    axes, hovers = stacked_bars(figure, names, parts, say=size)
    peaks = {level: f.peak - f.libraries for level, f in enumerate(footprints) if isinstance(f, Memory)}
    if peaks:
        axes.plot(
            list(peaks.values()), list(peaks), "|", color=INK, markersize=15, markeredgewidth=2, label="measured peak"
        )
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=f"{limit / 1e9:.0f} GB")
    top = math.ceil(max([*peaks.values(), *(f.computed for f in footprints), limit or 0]))
    step = 2 ** max(0, math.ceil(math.log2(top / 6)))  # powers of two are round numbers of MiB
    axes.set_xticks(range(0, top + step, step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if value else "0"))
    axes.set_xlim(0, top * 1.04)
    figure.legend(loc="outside upper right", ncols=5)
    return hovers


def _computed_alone(footprints: Sequence[tuple[str, Footprint]]) -> Table:
    return table(
        "footprints",
        "Computed for released sizes",
        footprints,
        [
            (Column("model"), lambda pair: pair[0]),
            (Column("dtype"), lambda pair: pair[1].dtype),
            (Column("length", unit="tokens", format=grouped), lambda pair: pair[1].length),
            (Column("device"), lambda pair: pair[1].device),
            (Column("weights", **_BYTES), lambda pair: pair[1].weights),
            (Column("KV cache", **_BYTES), lambda pair: pair[1].cache),
            (Column("activations", **_BYTES), lambda pair: pair[1].activations),
            (Column("in all", **_BYTES), lambda pair: pair[1].computed),
        ],
        note="From the sizes in the released config alone; nothing was run, and libraries take more.",
    )


def _shortages(shortages: Sequence[Shortage]) -> Table:
    return table(
        "shortages",
        "What happens when memory is short",
        shortages,
        [
            (Column("dtype"), lambda one: one.dtype),
            (Column("length", unit="tokens", format=grouped), lambda one: one.length),
            (Column("device"), lambda one: one.device),
            (Column("needed on top of the weights", **_BYTES), lambda one: one.needed),
            (Column("allowed", **_BYTES), lambda one: one.room),
            (Column("outcome"), lambda one: one.outcome),
            (Column("why"), lambda one: one.reason),
        ],
        note="Needed is computed. The limit holds for tensors and for what libraries add during the pass.",
    )

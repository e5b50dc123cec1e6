"""Bytes by dtype and length, computed and measured; and which dtype to choose on which hardware."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.outcomes import Outcome, outcomes, standing
from stabilitykit.report.style import INK, PAPER, bits, series_style, share, size
from stabilitykit.report.style import count as grouped
from stabilitykit.report.words import count, none_of
from stabilitykit.results import Memory, Results

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
    if found:
        blocks.append(_choice(found, measured))
    return Section(key="memory", title=TITLE, opening=_opening(len(measured), len(planned), bool(found)), blocks=blocks)


def _opening(measured: int, planned: int, judged: bool) -> str:
    if measured:
        missing = "" if measured == planned else f" {planned - measured:,} of {planned:,} measurements did not finish."
        text = (
            "What the model takes, computed from its sizes and next to it the peak of a fresh process that ran one "
            "prompt. A process asks for more than it holds, so the measured peak wobbles by some percent, and what "
            f"the libraries take for themselves is on lines of its own: it does not grow with the model.{missing}"
        )
    elif planned:
        text = f"No memory is known: {none_of(planned, 'measurement')} has finished."
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


def _name(memory: Memory) -> str:
    return f"{memory.dtype}, {count(memory.length, 'token')}, {memory.device}"


def _table(measured: Sequence[Memory]) -> Table:
    rows: list[list[Cell]] = []
    for memory in measured:
        own: list[Cell] = [memory.weights, memory.cache, memory.activations, memory.computed]
        peak = memory.peak - memory.libraries
        where: list[Cell] = [memory.dtype, memory.length, memory.device]
        rows.append([*where, "the model", *own, peak, memory.error])
        rows.append([*where, "libraries", None, None, None, None, memory.libraries, None])
    return Table(
        name="memory",
        title="Bytes by dtype and length",
        columns=[
            Column(name="dtype"),
            Column(name="length", unit="tokens", format=grouped),
            Column(name="device"),
            Column(name="for"),
            Column(name="weights", unit="bytes", format=size),
            Column(name="KV cache", unit="bytes", format=size),
            Column(name="activations", unit="bytes", format=size),
            Column(name="computed", unit="bytes", format=size),
            Column(name="measured", unit="bytes", format=size),
            Column(name="error", format=share),
        ],
        rows=rows,
        note="The error is (computed - measured) / measured, without the libraries: positive where too much was "
        "computed. Libraries are what the process held before it read a checkpoint.",
    )


def _figure(measured: Sequence[Memory]) -> Figure:
    most = max(measured, key=lambda memory: memory.computed)
    return Figure(
        name="memory-by-part",
        title="Computed parts, measured peak",
        caption="Stacked: what was computed. The upright mark is the measured peak, without the libraries.",
        alt=f"One stacked bar for each of {count(len(measured), 'measurement')}: weights, KV cache, activations. The "
        f"longest is {_name(most)} with {size(most.computed)}.",
        draw=partial(_draw, measured=measured),
        size=(8.0, 1.2 + 0.32 * len(measured)),
    )


def _draw(figure: "matplotlib.figure.Figure", *, measured: Sequence[Memory]) -> list[Hover]:
    from matplotlib.ticker import FuncFormatter

    axes = figure.subplots()
    hovers = []
    for index, (attribute, name, hatch) in enumerate(_PARTS):
        lefts = [sum(getattr(memory, part) for part, _, _ in _PARTS[:index]) for memory in measured]
        widths = [getattr(memory, attribute) for memory in measured]
        axes.barh(
            range(len(measured)),
            widths,
            left=lefts,
            height=0.6,
            label=name,
            color=series_style(index)["color"],
            edgecolor=PAPER,
            hatch=hatch,
            linewidth=0.5,
        )
        hovers += [
            Hover(
                left=left,
                right=left + width,
                bottom=level - 0.4,
                top=level + 0.4,
                text=f"{_name(memory)}: {name} {size(width)}",
            )
            for level, (left, width, memory) in enumerate(zip(lefts, widths, measured, strict=True))
        ]
    peaks = [memory.peak - memory.libraries for memory in measured]
    axes.plot(peaks, range(len(measured)), "|", color=INK, markersize=15, markeredgewidth=2, label="measured peak")
    axes.set_yticks(range(len(measured)), [f"{m.dtype}, {m.length:,} tokens" for m in measured])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    top = max([*peaks, *(memory.computed for memory in measured)])
    step = 2 ** max(0, math.ceil(math.log2(top / 6)))  # powers of two are round numbers of MiB
    axes.set_xticks(range(0, top + step, step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if value else "0"))
    axes.set_xlim(0, top * 1.04)
    figure.legend(loc="outside upper right", ncols=4)
    return hovers


def _choice(found: Sequence[Outcome], measured: Sequence[Memory]) -> Table:
    """One row a kind of hardware: the dtype, and the reasons that the finished cases give."""
    return Table(
        name="dtype-to-choose",
        title="Which dtype to choose",
        columns=[
            Column(name="hardware"),
            Column(name="dtype"),
            Column(name="weights", unit="bytes", format=size),
            Column(name="why"),
        ],
        rows=[
            [hardware, dtype or "none", _weights(measured, dtype), why]
            for hardware, (dtype, why) in (
                ("GPU with bfloat16", _with_bfloat16(found)),
                ("GPU without bfloat16", _without_bfloat16(found)),
                ("CPU only", _cpu(found)),
            )
        ],
        note="Clean means: no break in any case of this sweep that finished. On a CPU without instructions for 16-bit "
        "products these are slower than float32, not faster.",
    )


def _weights(measured: Sequence[Memory], dtype: str | None) -> int | None:
    return next((memory.weights for memory in measured if memory.dtype == dtype), None)


def _with_bfloat16(found: Sequence[Outcome]) -> tuple[str | None, str]:
    state = standing(found, "bfloat16")
    if state == "clean":
        sharper = "; float16 is clean too, and rounds eight times finer, for texts like these"
        return "bfloat16", f"{_is(found, 'bfloat16')}{sharper if standing(found, 'float16') == 'clean' else ''}."
    if state == "would fit":
        return "bfloat16", f"{_is(found, 'bfloat16')}; run it to see what its rounding costs."
    return _float32(found, _is(found, "bfloat16"))


def _without_bfloat16(found: Sequence[Outcome]) -> tuple[str | None, str]:
    if standing(found, "float16") == "clean":
        return "float16", f"{_is(found, 'float16')}; a text with a larger token may still break it."
    repair = "it needs a repair first, such as scaling the residual stream down by a power of two"
    broken = standing(found, "float16") in ("breaks", "would break")
    of_range = all(o.is_of_range for o in found if o.dtype == "float16" and o.first is not None)
    return _float32(found, _is(found, "float16") + (f"; {repair}" if broken and of_range else ""))


def _cpu(found: Sequence[Outcome]) -> tuple[str | None, str]:
    dtype, why = _float32(found, "")
    if dtype is not None and standing(found, "bfloat16") in ("clean", "would fit"):
        why += f" Where memory is short, bfloat16 takes half as much: {_is(found, 'bfloat16')}."
    return dtype, why


def _float32(found: Sequence[Outcome], because: str) -> tuple[str | None, str]:
    """float32 unless it breaks as well; `because` says what spoke against another dtype."""
    lead = f"{because}; " if because else ""
    match standing(found, "float32"):
        case "clean":
            return "float32", f"{lead}{_is(found, 'float32')}."
        case "breaks":
            of_range = all(o.is_of_range for o in found if o.dtype == "float32" and o.first is not None)
            cause = "values leave even its range" if of_range else "the number format is not the cause, see the verdict"
            return None, f"{lead}{_is(found, 'float32')}: {cause}."
        case "would break":
            return None, f"{lead}float32 did not run, and values were stored that its range does not hold."
        case "would fit":
            return "float32", f"{lead}float32 did not run, but its range holds every value that was stored."
        case "unknown":
            return "float32", f"{lead}float32 did not run; it is the reference and the widest dtype of the three."


def _is(found: Sequence[Outcome], dtype: str) -> str:
    """A clause: how the dtype fared."""
    own = [outcome for outcome in found if outcome.dtype == dtype]
    broken = sum(outcome.first is not None for outcome in own)
    match standing(found, dtype):
        case "breaks" if len(own) == 1:
            return f"{dtype} breaks in its only case"
        case "breaks":
            return f"{dtype} breaks in {broken:,} of its {len(own):,} cases"
        case "clean":
            room = min((o.headroom for o in own if o.headroom is not None), default=None)
            spare = "" if room is None else f", with at least {bits(room)} bits to spare"
            return f"{dtype} is clean in {'its only case' if len(own) == 1 else f'all its {len(own):,} cases'}{spare}"
        case "would break":
            return f"{dtype} did not run, and values were stored that its range does not hold"
        case "would fit":
            return f"{dtype} did not run, but its range holds every value that was stored"
        case "unknown":
            return f"{dtype} did not run"

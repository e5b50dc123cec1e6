"""How sharp the attention is, how large its logits are, and how many of its probabilities vanish."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from stabilitykit.records import Record, Recording, Softmax
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts import choose, lines
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.parts.lines import Point
from stabilitykit.report.style import heat_map, share
from stabilitykit.report.tables import table
from stabilitykit.words import counted, number

if TYPE_CHECKING:
    import matplotlib.figure

Lines = dict[str, list[Point]]

KEY, TITLE = "softmax", "Softmax of the attention"

OPENING = (
    "Entropy of the attention by layer and head (0 nats: all on one key), the largest logit, and the share of unmasked "
    "probabilities that underflow to zero. A query that sees few keys has little entropy whatever the model does, so "
    "entropies of prompts of different lengths do not compare; and a probability that underflows is often one that did "
    "not matter."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """The softmax of one layer."""

    layer: int
    record: Record
    softmax: Softmax


def section(results: Results) -> Section:
    """Maps of entropy in the widest run and lines for every dtype of the chosen groups, and a table of every run."""
    blocks: list[Block] = []
    for group in choose.chosen(results):
        if _attention(group.widest):
            blocks += [Prose(" ".join(_sentences(group))), _figure(group)]
    if not blocks:
        return choose.nothing(
            KEY,
            TITLE,
            results,
            what="the softmax of an attention: operators have to be recorded, and built by eager code",
        )
    blocks.append(_table(choose.groups(results)))
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, OPENING), blocks=blocks)


def _attention(recording: Recording) -> list[_Attention]:
    """The first softmax of each layer in the first step, in order, broken ones too."""
    found: dict[int, _Attention] = {}
    for record in recording:
        if record.softmax is not None and record.layer is not None and record.step == 0:
            found.setdefault(record.layer, _Attention(layer=record.layer, record=record, softmax=record.softmax))
    return [found[layer] for layer in sorted(found)]


def _whole(recording: Recording) -> list[_Attention]:
    """Those from before the run's first break."""
    whole = {id(record) for record in choose.intact(recording)}
    return [attention for attention in _attention(recording) if id(attention.record) in whole]


def _underflow(attention: _Attention, dtype: str) -> float:
    """The share of unmasked probabilities that are zero once they are rounded to `dtype`, in which they are used.

    Softmax computes in float32, and the zeros of the rounding come on top of its own.
    """
    record, own = attention.record, attention.softmax.underflow_share
    counts = record.formats.get(dtype)
    if counts is None or own == 1:
        return own
    shown = (record.elements - record.lost - record.masked - record.zero) / (1 - own)
    return own + counts.zero / shown if shown else own


def _mean_entropies(softmax: Softmax) -> list[float]:
    return [entropy for entropy in softmax.entropy_mean if not math.isnan(entropy)]


def _sentences(group: Group) -> Iterator[str]:
    dtype = group.widest.header.dtype
    yield f"**{group.name}**:"
    heads = [
        (entropy, attention.layer, head)
        for attention in _whole(group.widest)
        for head, entropy in enumerate(attention.softmax.entropy_mean)
        if not math.isnan(entropy)
    ]
    if heads:
        entropy, layer, head = min(heads)
        yield (
            f"in the {dtype} run the sharpest head is head {head} of layer {layer}, with a mean entropy of "
            f"{number(entropy)} nats."
        )
    for name, recording in group.runs.items():
        found = [(attention.softmax.max_logit, attention.layer) for attention in _whole(recording)]
        logits = [(logit, layer) for logit, layer in found if logit is not None]
        if logits:
            logit, layer = max(logits)
            most = max(_underflow(attention, name) for attention in _whole(recording))
            yield (
                f"{name}: largest logit {number(logit)} (layer {layer}), at most {share(most)} of a layer's "
                "probabilities underflow."
            )
    yield from (f"{sentence}." for sentence in choose.breaks(group))


def _lines(group: Group) -> tuple[Lines, Lines]:
    """Largest logit and share of underflow by layer, in each dtype, from before a break."""
    logits: Lines = {}
    underflow: Lines = {}
    for dtype, recording in group.runs.items():
        found = _whole(recording)
        logits[dtype] = [
            Point(x=attention.layer, y=logit, text=f"{number(logit)} in layer {attention.layer}")
            for attention in found
            if (logit := attention.softmax.max_logit) is not None
        ]
        underflow[dtype] = [
            Point(x=attention.layer, y=100 * part, text=f"{share(part)} in layer {attention.layer}")
            for attention in found
            for part in (_underflow(attention, dtype),)
        ]
    return logits, underflow


def _figure(group: Group) -> Figure:
    found = _attention(group.widest)
    heads = max(len(attention.softmax.entropy_mean) for attention in found)
    entropies = [entropy for attention in found for entropy in _mean_entropies(attention.softmax)]
    broken = choose.breaks(group)
    spread = f"from {number(min(entropies))} to {number(max(entropies))} nats" if entropies else "nowhere finite"
    return Figure(
        name=f"softmax-{group.slug}",
        title=f"Softmax of the attention: {group.name}",
        caption=(
            f"Left: mean entropy over the queries, {group.widest.header.dtype} run. Right: the largest logit that no "
            "mask hides, and the share of unmasked probabilities that are zero once rounded to the dtype."
            + (f" A line ends where its run broke: {'; '.join(broken)}." if broken else "")
        ),
        alt=(
            f"A heat map of entropy over {len(found)} layers and {counted(heads, 'head')}, {spread}; beside it "
            f"lines over layers for {', '.join(group.runs)}."
        ),
        draw=functools.partial(_draw, group=group),
        size=(8.0, max(4.2, 1.3 + 0.16 * len(found))),
    )


def _draw(figure: "matplotlib.figure.Figure", group: Group) -> Sequence[Hover]:
    found = _attention(group.widest)
    logits, underflow = _lines(group)
    grid = figure.add_gridspec(2, 2)
    entropy = figure.add_subplot(grid[:, 0])
    upper, lower = (figure.add_subplot(grid[row, 1]) for row in range(2))
    heads = range(max(len(attention.softmax.entropy_mean) for attention in found))

    def value(attention: _Attention, head: int) -> float:
        entropies = attention.softmax.entropy_mean
        if head >= len(entropies):
            return math.nan
        broken = math.isnan(entropies[head]) and attention.softmax.nan_rows > 0
        return -math.inf if broken else entropies[head]

    def hover(row: int, head: int) -> str:
        attention = found[row]
        where = f"layer {attention.layer}, head {head}"
        if not math.isfinite(value(attention, head)):
            return f"{where}: no row that is neither NaN nor fully masked"
        least, mean = attention.softmax.entropy_min[head], attention.softmax.entropy_mean[head]
        return f"{where}: {number(mean)} nats on average, {number(least)} at least"

    hovers = heat_map(
        entropy,
        [[value(attention, head) for head in heads] for attention in found],
        rows=[str(attention.layer) for attention in found],
        columns=[str(head) for head in heads],
        label="mean entropy [nats]",
        hover=hover,
        axes_number=figure.axes.index(entropy),
    )
    entropy.set_xlabel("head")
    entropy.set_ylabel("layer")
    for axes, panel, title, unit in (
        (upper, logits, "largest logit", "logit"),
        (lower, underflow, "probabilities that underflow", "share [%]"),
    ):
        lines.plot(axes, panel)
        lines.layer_axis(axes, found[-1].layer + 1)
        axes.set_title(title)
        axes.set_ylabel(unit)
    _, top = lower.get_ylim()
    lower.set_ylim(-0.03 * max(top, 0.1), max(top, 0.1))
    lines.legend(figure)
    return [*hovers, *lines.hovers(upper, logits), *lines.hovers(lower, underflow)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run's attention: in `found` all layers, in `whole` those from before its first break."""

    name: str
    dtype: str
    found: list[_Attention]
    whole: list[_Attention]

    @property
    def entropies(self) -> list[float]:
        return [entropy for attention in self.whole for entropy in _mean_entropies(attention.softmax)]

    def largest(self, of: Callable[[_Attention], float | None]) -> float | None:
        return max((value for attention in self.whole if (value := of(attention)) is not None), default=None)


def _table(groups: Sequence[Group]) -> Table:
    return table(
        "softmax",
        "Softmax of the attention in every run, before it breaks",
        [
            _Run(name=group.name, dtype=dtype, found=found, whole=_whole(run))
            for group in groups
            for dtype, run in group.runs.items()
            if (found := _attention(run))
        ],
        [
            (Column("run"), lambda run: run.name),
            (Column("dtype"), lambda run: run.dtype),
            (Column("layers"), lambda run: len(run.whole)),
            (Column("least mean entropy", unit="nats"), lambda run: min(run.entropies, default=None)),
            (Column("mean entropy", unit="nats"), lambda run: fmean(run.entropies) if run.entropies else None),
            (Column("largest logit"), lambda run: run.largest(lambda one: one.softmax.max_logit)),
            (Column("largest range of logits"), lambda run: run.largest(lambda one: one.softmax.logit_range)),
            (
                Column("largest underflow share", format=share),
                lambda run: run.largest(lambda one: _underflow(one, run.dtype)),
            ),
            (Column("largest |Σp − 1|"), lambda run: run.largest(lambda one: one.softmax.sum_error)),
            (Column("layers with NaN rows"), lambda run: sum(one.softmax.nan_rows > 0 for one in run.found)),
            (Column("fully masked rows"), lambda run: sum(one.softmax.masked_rows for one in run.found)),
        ],
        note="Over the layers before a run's first break; NaN rows are counted in all layers. Entropies are means over "
        "a head's queries. A share is of one layer's unmasked probabilities, rounded to the dtype.",
    )

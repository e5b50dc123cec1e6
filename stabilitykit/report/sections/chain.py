"""From the first infinity to the sampler's error, for one broken run."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from stabilitykit.diagnosis import chain, verdict
from stabilitykit.diagnosis.outcome import is_harmless
from stabilitykit.records import Record, Recording
from stabilitykit.records.layers import is_layer
from stabilitykit.records.sweep import Case, Results
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.outcomes import Names, outcomes, texts
from stabilitykit.report.parts.choose import tokens_in
from stabilitykit.report.style import BACKING, INK, series_style
from stabilitykit.report.tables import table
from stabilitykit.report.words import layers_by_length, short_place
from stabilitykit.words import code, count, with_bos

if TYPE_CHECKING:
    import matplotlib.figure

TITLE = "From the first break to the error"


def section(results: Results) -> Section:
    """The chain of the first broken run in the format in question; of another dtype where none in it broke."""
    runs = list(results.runs())
    broken = [
        (case, recording)
        for case, recording in runs
        if recording.first_break() is not None and not is_harmless(recording)
    ]
    broken.sort(key=lambda pair: pair[1].header.dtype != results.form.name)
    if not broken:
        return Section(key="chain", title=TITLE, opening=_nothing(results, runs))
    case, recording = broken[0]
    bos = with_bos(case.settings.get("bos"))
    name, length = Names(results.plan.cases)(case), count(tokens_in(recording), "token")
    told = " ".join([code(name), *([bos] if bos else []), "in", recording.header.dtype])
    others = "" if len(broken) == 1 else f" It is the first of {len(broken):,} runs that broke."
    layers = _layers(recording)
    said = [f"**{length}**: {verdict(recording, results.reference(case))}", _elsewhere(results, case, name, recording)]
    blocks: list[Block] = [Prose(" ".join(filter(None, said))), spread(recording)]
    if layers:
        blocks.append(_figure(recording, layers))
    return Section(
        key="chain",
        title=TITLE,
        opening=f"What became of the first value that was not finite, site by site, in {told} at {length}.{others} "
        "Where inf turns into NaN depends on the prompt, and once attention has read a NaN, it is in every token, the "
        "earlier ones too, so what is lost late says nothing about the cause.",
        blocks=blocks,
    )


def _elsewhere(results: Results, case: Case, name: str, recording: Recording) -> str:
    """That the same text breaks in another place at other lengths; empty where it does not, or none other ran."""
    own = (recording.header.dtype, name, case.settings.get("bos"))
    text = next(text for text in texts(outcomes(results)) if (text.dtype, text.name, text.bos) == own)
    shortest, elsewhere = text.broken[0], layers_by_length(text.broken)
    if not elsewhere:
        return ""
    begins = f"{short_place(shortest)} from {count(shortest.first, 'token')}"
    return f"Where it breaks first depends on the length: in {begins}, then {elsewhere}."


def _nothing(results: Results, runs: Sequence[tuple[Case, Recording]]) -> str:
    planned = [case for case in results.plan.cases if case.kind == "run"]
    if not planned:
        return "This experiment records no run in full, so no break can be followed to the sampler."
    if not runs:
        return (
            f"None of the {len(planned):,} runs to be recorded in full has finished."
            if len(planned) > 1
            else ("The one run to be recorded in full has not finished.")
        )
    if len(runs) == 1:
        return "The one run that was recorded in full did not break: there is no chain to follow."
    return f"None of the {len(runs):,} runs that were recorded in full broke: there is no chain to follow."


def spread(recording: Recording) -> Table:
    """The chain; neighbouring links of which the same is said, such as those of many layers, are one row."""
    together = [list(group) for _, group in groupby(chain(recording), key=lambda link: (link.event, link.text))]
    return table(
        "chain",
        "How it spread",
        together,
        [
            (Column("event"), lambda links: links[0].event),
            (Column("site"), lambda links: " … ".join(dict.fromkeys(str(link.site) for link in (links[0], links[-1])))),
            (Column("what"), lambda links: links[0].label),
            (Column("operator"), lambda links: links[0].operator),
            (Column("how"), lambda links: links[0].text),
        ],
        note="A token or a channel is lost where any of its elements is inf or NaN.",
    )


def _layers(recording: Recording) -> list[Record]:
    """The outputs of the decoder layers in the step that broke, in order; empty where their positions are unknown."""
    first = recording.first_break()
    assert first is not None
    found = {
        record.layer: record
        for record in recording
        if record.step == first.step and record.layer is not None and is_layer(record.site)
    }
    return [found[layer] for layer in sorted(found) if found[layer].positions and found[layer].channels]


def _figure(recording: Recording, layers: Sequence[Record]) -> Figure:
    whole = next((record for record in layers if record.lost == record.elements), None)
    begun = next((record for record in layers if record.lost), None)
    saying = (
        "No layer's output loses anything."
        if begun is None
        else f"The first loss in a layer's output is in layer {begun.layer}"
        + ("." if whole is None else f"; from layer {whole.layer} on everything is lost.")
    )
    return Figure(
        name="lost-by-layer",
        title="How much is lost, layer by layer",
        caption="Share of tokens and of channels that hold an element that is not finite, in the output of each layer.",
        alt=f"Two lines over layers, the share of tokens and of channels lost. {saying}",
        draw=partial(_draw, layers=layers, first=recording.first_break()),
        size=(8.0, 2.6),
    )


def _draw(figure: "matplotlib.figure.Figure", *, layers: Sequence[Record], first: Record | None) -> list[Hover]:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    axes = figure.subplots()
    numbers = [record.layer or 0 for record in layers]
    lines = [
        ("tokens", [record.lost_positions / (record.positions or 1) for record in layers]),
        ("channels", [record.lost_channels / (record.channels or 1) for record in layers]),
    ]
    for index, (name, shares) in enumerate(lines):
        axes.plot(numbers, shares, label=f"{name} lost", **series_style(index))
    if first is not None and first.layer is not None:
        axes.axvline(first.layer, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5)))
        before = first.layer - numbers[0] > (numbers[-1] - numbers[0]) / 4  # nothing is lost there: room for words
        axes.text(
            first.layer - 0.2 if before else first.layer + 1.2,
            0.5,
            f"first break: {first.site}",
            ha="right" if before else "left",
            va="center",
            fontsize=8,
            bbox=BACKING,
        )
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.set_xlabel("layer")
    figure.legend(loc="outside upper right", ncols=2)
    return [
        Hover(
            left=number - 0.5,
            right=number + 0.5,
            bottom=-0.05,
            top=1.05,
            text=f"layer {number}: {record.lost_positions:,} of {record.positions:,} tokens, "
            f"{record.lost_channels:,} of {record.channels:,} channels lost",
        )
        for number, record in zip(numbers, layers, strict=True)
    ]

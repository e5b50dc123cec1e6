"""What keeps Gemma 3 270M finite in float16, side by side: how far from float32, in how much memory.

python experiments/remedies.py                 into reports/remedies, about five minutes
python experiments/remedies.py --out FOLDER    elsewhere
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.gemma.tokenizer import Tokenizer
from stabilitykit.remedies.ranking import Score
from stabilitykit.remedies.repair import Repair, repair
from stabilitykit.remedies.texts import texts
from stabilitykit.report.blocks import Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import INK, bits, series_style, share, size
from stabilitykit.report.write import write_report

if TYPE_CHECKING:
    import matplotlib.figure

ROOT = Path(__file__).parent.parent
CHECKPOINT = "gemma3-270m"


def section(found: Repair) -> Section:
    gamma, score = found.rescaled.gamma, found.score
    wide = next(one for one in found.scores if one.name == "bfloat16")
    finite = [one for one in found.scores if one.finite and one.kl_mean]
    assert score.kl_mean
    assert wide.kl_mean
    assert score.kl_max
    return Section(
        key="remedies",
        title="Remedies",
        opening="Each remedy on texts that chose nothing of it, against the same tokens in float32. KL is that of "
        "float32's next-token distribution from the remedy's, in nats a token; its interval is over means of 64 "
        "neighbouring tokens. Remedies that need code around the model cannot be exported.",
        blocks=[
            Prose(
                f"**Rescaled by {gamma:g}**, the largest value that float16 must store, {found.peak:,.0f} in "
                f"`{found.site}`, becomes {found.peak * gamma:,.0f}, and the mean KL is {score.kl_mean:.2g}: "
                f"{wide.kl_mean / score.kl_mean:,.0f} times less than bfloat16's {wide.kl_mean:.2g}, in the same "
                f"memory. {score.kl_max / (score.kl_mean * score.positions):.0%} of its sum is one token's, where "
                f"the KL is {score.kl_max:.2g}."
            ),
            Figure(
                name="kl-against-memory",
                title="KL to float32 against memory",
                caption="Filled: the mean over all tokens, with its 95% interval; hollow: the 99th percentile. Memory "
                "is that of the weights and of what a window of tokens takes beside a plain run. Not drawn: what is "
                "not finite.",
                alt="; ".join(f"{one.name}: mean {one.kl_mean:.2g}, {size(one.weights + one.extra)}" for one in finite),
                draw=functools.partial(draw, scores=finite),
                size=(8.0, 3.4),
            ),
            Table(
                name="remedies",
                title=f"Remedies over {score.positions:,} held-out tokens, best first",
                columns=[
                    Column(name="remedy"), Column(name="finite"), Column(name="mean KL", format=short),
                    Column(name="± 95%", format=short), Column(name="99th percentile", format=short),
                    Column(name="largest", format=short), Column(name="same likeliest token", format=share),
                    Column(name="perplexity", format=lambda value: f"{100 * value:+.3f}%"),
                    Column(name="least headroom", unit="bits", format=bits), Column(name="weights", format=size),
                    Column(name="extra", format=size), Column(name="time ÷ float16", format=lambda x: f"{x:.2f}"),
                ],
                rows=[row(one) for one in found.scores],
                note="A dash: not finite. Times are one machine's.",
            ),
            *(Prose(f"**{one.name}**: {one.summary}") for one in found.scores),
            Prose("To make this again: `python experiments/remedies.py`"),
        ],
    )  # fmt: skip


def short(value: float) -> str:
    return f"{value:.2g}"


def row(one: Score) -> Sequence[Cell]:
    kls = (one.kl_mean, one.kl_interval, one.kl_p99, one.kl_max, one.top1, one.perplexity, one.headroom)
    known = kls if one.finite else (None,) * len(kls)
    return (one.name, one.finite, *known, one.weights, one.extra, one.time)


def draw(figure: "matplotlib.figure.Figure", scores: Sequence[Score]) -> list[Hover]:
    axes = figure.subplots()
    axes.set_xscale("log")
    hovers = []
    for level, one in enumerate(scores):
        assert one.kl_mean
        assert one.kl_interval
        assert one.kl_p99
        look = series_style(level) | {"linestyle": ""}
        low = max(one.kl_mean - one.kl_interval, one.kl_mean / 20)
        memory = (one.weights + one.extra) / 2**20
        axes.plot([low, one.kl_mean + one.kl_interval], [memory, memory], color=INK, linewidth=1)
        axes.plot(one.kl_mean, memory, **look, markersize=8, label=one.name)
        axes.plot(one.kl_p99, memory, **look, markersize=7, fillstyle="none")
        text = f"{one.name}: mean KL {one.kl_mean:.2g} ± {one.kl_interval:.1g}, {size(one.weights + one.extra)}"
        hovers.append(Hover(left=low, right=one.kl_p99, bottom=0.99 * memory, top=1.01 * memory, text=text))
    axes.set_xlabel("KL divergence from float32 [nats a token]")
    axes.set_ylabel("memory [MiB]")
    bottom, top = axes.get_ylim()
    axes.set_ylim(0.9 * bottom, 1.1 * top)
    figure.legend(loc="outside upper right", ncols=4)
    return hovers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "remedies")
    out: Path = parser.parse_args().out
    opened = open_checkpoint(CHECKPOINT)

    def announce(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    found = repair(opened, texts(opened.config, Tokenizer(opened.vocabulary)), progress=announce)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps([asdict(one) for one in found.scores], indent=1) + "\n", "utf-8")
    print(write_report("What keeps Gemma 3 270M finite in float16", [section(found)], out))


if __name__ == "__main__":
    main()

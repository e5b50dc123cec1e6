"""What no prompt can make a tensor exceed, beside what hidden states and texts made of it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from stabilitykit.commands import line
from stabilitykit.diagnosis.bounds import KindRow, by_kind, folded, summary, unbounded, unproved
from stabilitykit.formats import FLOAT16
from stabilitykit.records.bounds import Bounds, SiteBound
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts.lines import layer_axis
from stabilitykit.report.style import limit_line, magnitude_axis, series_style
from stabilitykit.report.tables import table
from stabilitykit.words import code, number

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

KEY, TITLE = "bounds", "Bounds for every prompt"

OPENING = (
    "The results of a sweep hold for the prompts that it ran. Bounds follow from the weights alone and hold for every "
    "prompt: behind an RMSNorm no vector is longer than sqrt(d) times its gain, and every later tensor inherits a "
    "bound from that. They include rounding, with norms and softmax computed in float32, and products summed in "
    "float32 and rounded once. Found is the largest value that a search over hidden states reached: it shows how tight "
    "a bound may be, not that a prompt leads there. Observed is the largest value in three texts."
)

METHOD = (
    "**RMSNorm**: n = x / sqrt(mean(x²) + eps) has ||n|| ≤ sqrt(d), so channel i of the output, g_i n_i, is at most "
    "sqrt(d) |g_i|.",
    "**Projections**: a row w meets n with the gain in between: |w · (g n)| ≤ sqrt(d) ||w g||, by Cauchy and Schwarz. "
    "Reached by n along w g.",
    "**Attention**: a head's output is a mixture of values, so it is at most the largest of them; `o_proj` adds the "
    "heads, each of which may look at another token: sqrt(d) Σ ||w_h V_h g||.",
    "**Scores**: RoPE turns pairs of channels and keeps their length. With norms on q and k a score is at most D times "
    "the largest product of two pairs' gains; without, at most d σ(T Q g) σ(K g / T) for any scale T of the pairs.",
    "**gate · up**: one n meets both rows a and b, and gelu(x) ≤ max(x, 0), so the product is at most "
    "d (||a|| ||b|| + |a · b|) / 2: the larger eigenvalue of (a bᵀ + b aᵀ) / 2. Reached half-way between a and ±b.",
    "**down_proj**: for x > 0 and every s > 0, W x y ≤ |W| (s x ± y / s)² / 4. A row is then at most d times the "
    "largest eigenvalue of Σ |W_j| c_j c_jᵀ with c_j = (s_j a_j ± b_j / s_j) / 2; what gelu is below zero is added.",
    "**Residual stream**: the largest embedding row and, from generation 2 on, one post-norm's bound after the other; "
    "in generation 1 those of `o_proj` and `down_proj` themselves. Channel by channel, and the largest channel counts.",
)

_PANELS = 9


def section(results: Results) -> Section:
    """The bounds in the sweep's folder, if `stabilitykit bound --report` has put some there."""
    bounds = results.bounds
    if bounds is None:
        command = code(line("bound", results.plan.checkpoint, "--report", results.folder))
        opening = f"No bounds have been computed. {command}, with this report's folder, adds them here."
        return Section(key=KEY, title=TITLE, opening=opening)
    added: list[Block] = [*map(Prose, METHOD), _sites(bounds)]
    if bounds.command:
        added.append(Prose(f"To compute them again: {code(bounds.command)}"))
    said, kinds = blocks(bounds.sites)
    return Section(key=KEY, title=TITLE, opening=OPENING, blocks=[said, _figure(bounds), kinds, *added])


def blocks(found: Sequence[SiteBound]) -> tuple[Prose, Table]:
    """All sites in a sentence, and a row for each kind of tensor."""
    rows = by_kind(found)
    kept = folded(rows)
    kinds = table(
        "bounds-by-kind",
        f"Bounds by kind of tensor, as stored in {found[0].dtype} (maximum {number(found[0].limit)})",
        kept,
        [
            (Column("tensor"), lambda row: row.worst.label or row.worst.kind),
            (Column("verdict"), _verdict),
            (Column("bound", format=number), lambda row: row.worst.bound),
            (Column("in layer"), lambda row: row.worst.layer),
            (Column("found", format=number), lambda row: row.found),
            (Column("bound ÷ found", format=lambda value: f"{value:.2f}"), lambda row: row.ratio),
            (Column("observed", format=number), lambda row: row.observed),
        ],
        note="Bound: no prompt of any length exceeds it, rounding included. Found: the largest value that a search "
        "over hidden states entering a layer's norm reached; no prompt is known that leads there. Bound ÷ found: in "
        "the layer where they are closest. Observed: in three texts, in float32. Kinds of operators are left out whose "
        f"bound is within 2% of another row's, and the tables of cos and sin: {len(rows) - len(kept)}.",
        alarming=lambda row: row.verdict.startswith("reachable"),
    )
    said = " ".join(filter(None, (summary(found), unbounded(found))))
    return Prose(said, tone="bad" if unproved(found) else "good"), kinds


def _verdict(row: KindRow) -> str:
    return row.verdict if row.share == row.sites else f"{row.verdict}, {row.share} of {row.sites}"


def proof(bounds: Mapping[str, float], assumptions: Sequence[str]) -> tuple[Table, Prose]:
    """What a checker proved: the bound of the worst layer of each kind of tensor, and what that takes for granted."""
    proved = table(
        "proof",
        f"Proved bounds for every prompt (float16 maximum {number(FLOAT16.largest)})",
        bounds.items(),
        [(Column("tensor"), lambda pair: pair[0]), (Column("bound", format=number), lambda pair: pair[1])],
        alarming=lambda pair: pair[1] > FLOAT16.largest,
    )
    return proved, Prose(" ".join(["Assumed, not examined:", *assumptions]), tone="note")


def _sites(bounds: Bounds) -> Table:
    return table(
        "bounds",
        "Every tensor",
        bounds.sites,
        [
            (Column("site"), lambda one: one.site),
            (Column("bound", format=number), lambda one: one.bound),
            (Column("found", format=number), lambda one: one.found),
            (Column("observed", format=number), lambda one: one.observed),
            (Column("verdict"), lambda one: one.verdict),
            (Column("by"), _by),
        ],
        note="A dash: no hidden state or text was tried, or none counts. The texts are the beginnings of the kit's "
        "prose, code and scripts; hidden states are in bounds.json, as `state`.",
    )


def _by(one: SiteBound) -> str | None:
    return one.prompt or (None if one.state is None else "a state, in bounds.json")


def _figure(bounds: Bounds) -> Figure:
    rows = folded(by_kind(bounds.sites))
    layered = sorted((row for row in rows if row.worst.layer is not None), key=lambda row: -row.worst.bound)
    kinds = [row.worst.kind for row in layered[:_PANELS]]
    panels = {kind: [one for one in bounds.sites if one.kind == kind] for kind in kinds}
    down = (len(panels) + 2) // 3
    return Figure(
        name="bounds-by-layer",
        title="Bound, found and observed by layer",
        caption="The kinds with the largest bounds. The dotted line is the format's maximum: a tensor whose bound "
        "stays below it does not overflow, whatever the prompt.",
        alt="; ".join(
            f"{sites[0].label or kind}: bound {number(max(one.bound for one in sites))}"
            for kind, sites in panels.items()
        ),
        draw=partial(_draw, panels=panels, dtype=bounds.dtype),
        size=(9.0, 0.7 + 2.1 * down),
    )


def _draw(figure: "matplotlib.figure.Figure", *, panels: dict[str, list[SiteBound]], dtype: str) -> list[Hover]:
    down = (len(panels) + 2) // 3
    grid = figure.subplots(down, 3, sharex=True, sharey=True, squeeze=False)
    hovers: list[Hover] = []
    for axes, (kind, sites) in zip(grid.flat, panels.items(), strict=False):
        for index, name in enumerate(("bound", "found", "observed")):
            points = [(one.layer, getattr(one, name)) for one in sites if getattr(one, name)]
            if points:
                look = series_style(index) | {"linewidth": 1.4, "markersize": 3.5}
                axes.plot(*zip(*points, strict=True), label=name, **look)
        axes.set_title(sites[0].label or kind, fontsize="small")
        layer_axis(axes, len(sites))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    magnitude_axis(grid[0, 0])
    for axes, sites in zip(grid.flat, panels.values(), strict=False):
        limit_line(axes, dtype, in_legend=True)
        hovers += _hovers(figure, axes, sites)
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    shown: dict[str, Artist] = {}
    for axes in grid.flat:
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside upper right", ncols=4)
    return hovers


def _hovers(figure: "matplotlib.figure.Figure", axes: "Axes", sites: Sequence[SiteBound]) -> list[Hover]:
    bottom, top = axes.get_ylim()
    found = []
    for one in sites:
        assert one.layer is not None
        said = [f"layer {one.layer}: bound {number(one.bound)}"]
        said += [
            f"{name} {number(value)}" for name, value in (("found", one.found), ("observed", one.observed)) if value
        ]
        found.append(
            Hover(
                left=one.layer - 0.5,
                right=one.layer + 0.5,
                bottom=bottom,
                top=top,
                text=", ".join([*said, one.verdict]),
                axes=figure.axes.index(axes),
            )
        )
    return found

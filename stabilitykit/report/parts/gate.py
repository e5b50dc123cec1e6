"""What a check decided, as prose and tables."""

import math
from collections.abc import Iterator

from stabilitykit.diagnosis.weights import weights_sentence
from stabilitykit.records.gate import CheckedPrompt, Gate, SiteHeadroom
from stabilitykit.report.blocks import Block, Column, Prose, Table
from stabilitykit.report.parts.trials import short
from stabilitykit.report.style import bits
from stabilitykit.report.tables import table
from stabilitykit.words import counted, listed, number, place_and_site, quoted, sentence

_CLOSEST = 5  # sites
_WORST = 5  # violations of a limit


def blocks(gate: Gate) -> list[Block]:
    """The weights, the prompts, the closest sites, each violation, what differs from the baseline, and the verdict."""
    made: list[Block] = []
    said = "" if gate.weights is None else weights_sentence(gate.weights)
    if said:
        made.append(Prose(said, tone="note"))
    if gate.ran:
        made += [_prompts(gate), _closest(gate)]
    made += list(_violations(gate))
    if gate.differences:
        told = listed([f"{one.what} ({one.before[:16]}, now {one.now[:16]})" for one in gate.differences])
        made.append(Prose(f"Since the baseline was written, this has changed: {told}."))
    made += [Prose(sentence(remark), tone="note") for remark in gate.remarks]
    return [*made, Prose(summary(gate), tone="good" if gate.holds else "bad")]


def summary(gate: Gate) -> str:
    """Whether it holds, in a sentence: in which dtype, on how much."""
    if not gate.ran:
        if gate.holds:
            return f"The weights hold in {gate.dtype}. Nothing was run."
        return f"The weights do not hold in {gate.dtype}, so nothing was run."
    if gate.holds:
        return f"{gate.dtype} holds on {counted(len(gate.prompts), 'prompt')}."
    of = counted(len(gate.violations), "violation")
    failed = len({name for one in gate.violations for name in one.prompts})
    where = f", on {failed} of {counted(len(gate.prompts), 'prompt')}" if failed else ""
    return f"{gate.dtype} does not hold: {of}{where}."


def _violations(gate: Gate) -> Iterator[Prose]:
    """The worst of each limit, and how many more there are."""
    for limit in dict.fromkeys(one.limit for one in gate.violations):
        found = [one for one in gate.violations if one.limit == limit]
        yield from (Prose(one.text, tone="bad") for one in found[:_WORST])
        if len(found) > _WORST:
            yield Prose(
                f"There are {counted(len(found) - _WORST, 'more violation')} of this limit ({limit}); all are in the "
                "JSON document (--json).",
                tone="note",
            )


def _prompts(gate: Gate) -> Table:
    compared = gate.limits.max_kl is not None
    return table(
        "checked-prompts",
        f"Checked in {gate.dtype}",
        gate.prompts,
        [
            (Column("prompt"), lambda one: one.name),
            (Column("tokens"), lambda one: one.tokens),
            (Column("judged"), lambda one: "every length" if one.every_length else "its own length"),
            (Column("breaks from length"), lambda one: one.first_broken),
            (Column("headroom", unit="bits", format=bits), _headroom),
            *([(Column("mean KL", format=short), lambda one: one.kl_mean)] if compared else []),
            *([(Column("largest KL", format=short), lambda one: one.kl_max)] if compared else []),
        ],
        alarming=lambda one: any(one.name in violation.prompts for violation in gate.violations),
    )


def _headroom(one: CheckedPrompt) -> float | None:
    return one.headroom if one.headroom is None or math.isfinite(one.headroom) else None


def _closest(gate: Gate) -> Table:
    """The sites with the least headroom, up to where each prompt first left the range."""
    return table(
        "headroom",
        f"Closest to the {gate.dtype} maximum",
        gate.headroom[:_CLOSEST],
        [
            (Column("headroom", unit="bits", format=bits), lambda one: one.headroom),
            (Column("amax", format=number), lambda one: one.amax),
            (Column("in"), place_and_site),
            (Column("at"), _at),
        ],
        note=f"Of {counted(len(gate.headroom), 'site')}; all are in the JSON document (--json).",
        alarming=lambda one: one.headroom < 0,
    )


def _at(one: SiteHeadroom) -> str:
    token = "" if one.token is None else f" {quoted(one.token)}"
    return one.prompt + ("" if one.position is None else f", token {one.position:,}{token}")

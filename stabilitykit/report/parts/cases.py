"""The cases of a sweep before they run."""

from collections.abc import Sequence
from typing import Protocol

from stabilitykit.records.sweep import Plan
from stabilitykit.report.blocks import Block, Column, Prose
from stabilitykit.report.style import size
from stabilitykit.report.tables import table
from stabilitykit.words import count


class Cost(Protocol):
    """Seconds, and bytes of weights and activations."""

    @property
    def seconds(self) -> float: ...
    @property
    def memory(self) -> float: ...


def cases(plan: Plan, costs: Sequence[Cost | None]) -> list[Block]:
    """The cases, the tokens of the longest pass of each, and what each will cost; None where that is not known."""
    rows = table(
        "cases",
        f"{plan.title}: {count(len(plan.cases), 'case')}",
        zip(plan.cases, costs, strict=True),
        [
            (Column("kind"), lambda pair: pair[0].kind),
            (Column("case"), lambda pair: str(pair[0])),
            (Column("tokens"), lambda pair: pair[0].settings.get("tokens", pair[0].settings.get("length"))),
            (Column("about", format=duration), lambda pair: None if pair[1] is None else pair[1].seconds),
            (Column("memory", format=size), lambda pair: None if pair[1] is None else pair[1].memory),
        ],
    )
    known = [cost for cost in costs if cost is not None]
    if not known:
        return [rows]
    total, most = sum(cost.seconds for cost in known), max(cost.memory for cost in known)
    said = (
        f"About {duration(total)} in all, and at most {size(most)} of weights and activations. Times are estimated "
        "from this machine's present speed and leave out reading weights; a range of lengths takes another pass for "
        "each stretch that breaks elsewhere, and a comparison with a float32 run takes the memory of that model too."
    )
    return [rows, Prose(said, tone="note")]


def duration(seconds: float) -> str:
    """0.1 s · 59.9 s · 12 min · 3 h 20 min"""
    if seconds < 60:
        return f"{max(seconds, 0.1):.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""The explorer: every record of the sweep, on a map of layers and sites."""

from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Explorer, Section
from stabilitykit.report.explorer.data import explored, told
from stabilitykit.report.parts import choose

KEY, TITLE = "explore", "Explore every record"

OPENING = (
    "A cell is a tensor: its number is the whole bits of headroom that its largest magnitude leaves, its colour the "
    "class that the number is in. Choose one to see its record. What comes after the first break of a run is what the "
    "break left over, and no measure of the model."
)


def section(results: Results) -> Section:
    """Draws on the finished cases of kinds "run" and "lengths"."""
    found = explored(results)
    if found is None:
        return choose.nothing(KEY, TITLE, results, what="a tensor")
    return Section(
        key=KEY,
        title=TITLE,
        opening=f"{OPENING} {told(found)}",
        blocks=[Explorer(title="a map of layers and sites, every record at a click", document=found.document)],
    )

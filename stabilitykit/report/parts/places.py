"""The places of a decoder that a report follows from layer to layer, by their labels."""

import re
from collections.abc import Iterable

from stabilitykit.records import Record, Recording

AFTER_ATTENTION, AFTER_MLP = RESIDUAL = "residual after attention", "residual after MLP"
GATE_UP, SCORES = "gate · up", "attention scores"
ATTENTION_ADDS, MLP_ADDS = "attention adds", "MLP adds"
OUTSIDE = ("embedding, scaled", "final norm", "logits")


def sublayers(recording: Recording) -> dict[str, str]:
    """The labels of what is followed inside the layers.

    What attention and MLP add to the residual stream is a projection, or the norm after it in generations with one.
    """
    labels = {record.label for record in recording}
    return {
        ATTENTION_ADDS: "norm after attention" if "norm after attention" in labels else "attention output projection",
        MLP_ADDS: "norm after MLP" if "norm after MLP" in labels else "down projection",
        GATE_UP: GATE_UP,
        SCORES: SCORES,
    }


def at(records: Iterable[Record], label: str) -> dict[int, Record]:
    """By layer the record with this label, that with the largest amax of several."""
    found: dict[int, Record] = {}
    for record in records:
        if record.label == label and record.layer is not None:
            known = found.get(record.layer)
            if known is None or (record.amax or 0.0) > (known.amax or 0.0):
                found[record.layer] = record
    return found


def relative(record: Record) -> str:
    """The site as every layer has it: mlp.down_proj of `layers.7.mlp.down_proj`, add.0 of `layers.7/add.0`.

    The layer's own output is "output"; a site outside the layers is itself.
    """
    return relative_site(record.site, record.layer)


def relative_site(site: str, layer: int | None) -> str:
    """`relative` of a site in this layer."""
    if layer is None:
        return site
    inside = re.sub(rf"^(?:.*?\.)?{layer}(?=[./]|$)", "", site, count=1)
    return inside.removeprefix(".").removeprefix("/") or "output"


def kind(record: Record) -> str:
    """The label, or the relative site of a place nobody has named: what the same place is called in every layer."""
    return record.label or relative(record)

"""The rows of a map: the sites of several runs in one order, each named once for all layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from stabilitykit.records import Record
from stabilitykit.records.layers import layer_of
from stabilitykit.records.lengths import Peak
from stabilitykit.report.parts import places

Key = tuple[str, str, bool]  # the stack of layers, the site as each layer has it, whether it is outside the layers


@dataclass(slots=True)
class Texts:
    """Strings by number, each kept once."""

    all: list[str] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)

    def number(self, text: str | None) -> int:
        """-1 for None."""
        if text is None:
            return -1
        if text not in self._known:
            self._known[text] = len(self.all)
            self.all.append(text)
        return self._known[text]


def key_of(record: Record | Peak) -> Key:
    """Of the row in which a record stands, or the peaks of one."""
    return _place_key(record.site, record.layer)


@cache
def _place_key(site: str, layer: int | None) -> Key:
    found = None if layer is None else layer_of(site.partition("/")[0])
    return ("" if found is None else found[0], places.relative_site(site, layer), layer is None)


def rows_of(runs: Iterable[Iterable[Record | Peak]], texts: Texts) -> tuple[dict[Key, int], list[list[int]]]:
    """Every run's sites in the order of execution, and each as [stack, label, path, 1 outside the layers]."""
    order: list[Key] = []
    labels: dict[Key, str | None] = {}
    for run in runs:
        own: dict[Key, None] = {}
        for record in run:
            key = key_of(record)
            own.setdefault(key)
            if labels.get(key) is None:
                labels[key] = record.label
        order = _merged(order, list(own))
    several = len({stack for stack, _, outside in order if not outside}) > 1
    rows = [
        [texts.number(stack if several else ""), texts.number(labels[key]), texts.number(path), int(outside)]
        for key in order
        for stack, path, outside in (key,)
    ]
    return {key: number for number, key in enumerate(order)}, rows


def _merged(order: list[Key], own: Sequence[Key]) -> list[Key]:
    """`order` with what only `own` has put behind the neighbour that it follows there."""
    if not order:
        return list(own)
    known = set(order)
    after: dict[Key | None, list[Key]] = {}
    last: Key | None = None
    for key in own:
        if key in known:
            last = key
        else:
            after.setdefault(last, []).append(key)
    merged = list(after.get(None, ()))
    for key in order:
        merged += [key, *after.get(key, ())]
    return merged

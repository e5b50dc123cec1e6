"""One run's tensors, kept until a wider run of the same tokens has made its own: how far each is from that."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stabilitykit.formats import FLOAT32, FORMATS
from stabilitykit.recorder.deviation import measure_deviation
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.tensors import aside
from stabilitykit.records import Recording

_Key = tuple[int, str]


@dataclass(slots=True, eq=False)
class _Copy:
    entry: Entry
    parts: list[Tensor | None]


@dataclass(slots=True)
class Copies:
    """What a recorder fills in one run, `record(..., copies=...)`, and compares in a later one, `compared=[...]`.

    `room` are the bytes that are left; a tensor that does not fit is left out and counted. A copy is freed when it has
    been compared. Tensors are told by step and site, several of one site by their order, and those that attention makes
    in blocks block by block.
    """

    room: int
    left_out: int = 0
    _kept: dict[int, _Copy] = field(default_factory=dict)  # by the entry's identity
    _named: dict[_Key, list[_Copy]] | None = None
    _seen: dict[_Key, list[tuple[Entry, int]]] = field(default_factory=dict)

    def take(self, entry: Entry, tensor: Tensor, hidden: Tensor | None) -> None:
        """Keeps a copy of what `entry` is the record of, or of one more part of it. What a mask hides is left out."""
        size = tensor.numel() * tensor.element_size()
        known = self._kept.get(id(entry))
        if tensor.is_meta or size > self.room:
            self.left_out += known is None
            return
        self.room -= size
        with aside():
            copy = tensor.detach().clone() if hidden is None else tensor.detach().masked_fill(hidden, torch.nan)
        if known is None:
            known = self._kept[id(entry)] = _Copy(entry, [])
        known.parts.append(copy)

    def compare(self, entry: Entry, reference: Tensor) -> None:
        """Measures how far the copy of the same place is from what the wider run made there."""
        if self._named is None:  # sites are final once the run that was copied is over
            self._named = {}
            for copy in self._kept.values():
                self._named.setdefault((copy.entry.step.number, copy.entry.site), []).append(copy)
        key = entry.step.number, entry.site
        copies = self._named.get(key)
        if copies is None:
            return
        seen = self._seen.setdefault(key, [])
        at = next((at for at, (one, _) in enumerate(seen) if one is entry), len(seen))
        if at == len(seen):
            seen.append((entry, 0))
        part = seen[at][1]
        seen[at] = entry, part + 1
        if at >= len(copies) or part >= len(copies[at].parts):
            return
        ours, copies[at].parts[part] = copies[at].parts[part], None
        if ours is not None:
            of = copies[at].entry
            with aside():
                if ours.numel() == reference.numel() and ours.shape[-1:] == reference.shape[-1:]:
                    ours = ours.reshape(reference.shape)  # of a product whose rows and positions were one axis
                found = measure_deviation(ours, reference, FORMATS.get(of.form.dtype, FLOAT32))
                of.deviation = of.deviation if found is None else found.joined(of.deviation)

    def told(self, recording: Recording, reference: Recording) -> Recording:
        """`recording`, which was copied, with the deviations that were found; `reference` is what it was compared with.

        Of steps in which the two did not run the same tokens there are none: a generation may take another turn.
        """
        alike = _same_steps(recording, reference)
        found = {
            copy.entry.order: copy.entry.deviation.result()
            for copy in self._kept.values()
            if copy.entry.deviation is not None and copy.entry.step.number in alike
        }
        notes: tuple[str, ...] = ()
        if self.left_out:
            notes = (
                f"not compared with {reference.header.dtype}: {self.left_out:,} tensors, whose copies would have taken "
                "too much memory",
            )
        header = recording.header
        self._kept.clear()
        return Recording(
            replace(header, reference=reference.header.dtype, notes=(*header.notes, *notes)),
            [replace(one, deviation=found.get(one.order)) for one in recording],
            repro=recording.repro,
        )


def _same_steps(one: Recording, other: Recording) -> set[int]:
    """The steps up to which both are known to have run the same tokens; of redacted runs the first alone is."""
    a, b = one.header, other.header
    if a.tokens is None or b.tokens is None:
        return {0}
    ends_a, ends_b = [*a.starts[1:], len(a.tokens[0])], [*b.starts[1:], len(b.tokens[0])]
    return {
        step
        for step, (end, other_end) in enumerate(zip(ends_a, ends_b, strict=False))
        if end == other_end
        and a.starts[: step + 1] == b.starts[: step + 1]
        and [row[:end] for row in a.tokens] == [row[:end] for row in b.tokens]
    }

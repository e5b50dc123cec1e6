"""What broke, and how: all that a candidate needs to know to say whether it fits."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from stabilitykit.diagnosis.outcome import OUTSIDE, Outcome, decisive
from stabilitykit.diagnosis.parts import Part, Place, part_of, place_in
from stabilitykit.recorder import record
from stabilitykit.records import Record, Recording
from stabilitykit.remedies.seen import Seen, add_overflowing
from stabilitykit.run.dry_run import with_stored_dtypes
from stabilitykit.trials.answers import Answers, Change, answers
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import Kept, Reproduction, dtype_of

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_OVERFLOWS = ("overflow", "reduction")


def without_layers(site: str) -> str:
    """A site with the numbers of layers and experts left out; operators keep theirs, which says which one it is."""
    path, slash, operator = site.partition("/")
    return NUMBER.sub("*", path) + slash + operator


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A failure of `model`, which computes in the failing dtype, and is one of `models`.

    `low` are the records of that run, `found` what became of its decisive break, and `part` the part of the model that
    broke; None where nothing did. `wide` are the records of a float32 run of the same, with stored dtypes, and
    `overflowing` those of what the dtype cannot hold, by site, of all steps the largest. `asks`: the code itself asks
    for narrower formats than float32.
    """

    reproduction: Reproduction
    models: Kept
    model: nn.Module
    low: Recording
    wide: Recording
    found: Outcome | None
    part: Part | None
    overflowing: Mapping[str, Record]
    asks: bool

    @property
    def broke(self) -> Record | None:
        return None if self.found is None else self.found.broke

    @property
    def is_outside(self) -> bool:
        """Whether code that is not the model's made what broke."""
        return self.broke is not None and self.broke.site.startswith(OUTSIDE)

    @property
    def kind(self) -> str | None:
        broke = self.broke
        return None if broke is None or broke.broke is None else broke.broke.kind

    @property
    def casts(self) -> bool:
        """Whether it is the run that casts to the failing dtype, such as autocasting, and the weights have another."""
        return dtype_of(self.model) != self.reproduction.dtype

    @property
    def place(self) -> Place | None:
        return None if self.broke is None else place_in(self.low, self.broke)

    @property
    def seen(self) -> Seen:
        """For remedies of a repair. What broke is among what overflows, also where float32 does not show it, and so is
        the sum with a mask that does.
        """
        overflowing = dict(self.overflowing)
        if self.kind == "masked-row":
            own = self.rounded()
            overflowing |= {one.site: one for one in self.low if one.site in own}
        largest = max(overflowing.values(), key=lambda one: one.amax or 0.0, default=None)
        return Seen(
            model=self.model,
            low=self.low,
            peak=0.0 if largest is None else largest.amax or 0.0,
            site="" if largest is None else largest.site,
            overflowing=overflowing,
        )

    def alike(self) -> list[str]:
        """What broke, and the sites that overflow and are called so but for the number of their layer."""
        broke = self.broke
        if broke is None:
            return []
        pattern = without_layers(broke.site)
        return list(dict.fromkeys([broke.site, *(s for s in self.overflowing if without_layers(s) == pattern)]))

    def to_softmax(self) -> list[str]:
        """Of scores that broke, what attention makes of them until their softmax, in every layer where they do."""
        if self.part != "scores" or self.place is None:
            return []
        modules = {one.partition("/")[0] for one in self.alike()}
        own = [one for one in self.place.after if one.module == self.place.record.module]
        end = next((place for place, one in enumerate(own) if one.operator == "softmax"), 0)
        patterns = {without_layers(one.site) for one in own[:end]}
        sites = [one.site for one in self.low if one.module in modules and without_layers(one.site) in patterns]
        return list(dict.fromkeys(sites))

    def rounded(self) -> list[str]:
        """From the site whose rounding made the zero or the infinity at which it broke, what carries that there."""
        first = None if self.broke is None or self.broke.broke is None else self.broke.broke.rounded_site
        if first is None or first == "constant" or self.broke is None:
            return []
        step = [one for one in self.low if one.step == self.broke.step and one.order < self.broke.order]
        start = next((place for place, one in enumerate(step) if one.site == first), None)
        if start is None:
            return [first]
        return [first, *(one.site for one in step[start + 1 :] if one.zero and one.dtype == self.broke.dtype)]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run's records and what it gave."""

    recording: Recording
    answers: Answers


def recorded(
    reproduction: Reproduction,
    model: nn.Module,
    *,
    around: Change | None = None,
    recast: Recast | None = None,
    formats: Sequence[str] = (),
    watch: Sequence[tuple[str, int]] = (),
    stop_at_break: bool = False,
) -> Recorded:
    """Runs `model` under a recorder. `stop_at_break`: only as far as the first break."""
    kept: list[Recording] = []

    @contextmanager
    def recorder() -> Iterator[None]:
        with record(
            model,
            formats=formats,
            watch=watch,
            stop_at_break=stop_at_break,
            backward=reproduction.grad,
            fused_softmax=False,
            token_text=reproduction.text,
        ) as recording:
            kept.append(recording)
            yield

    made = answers(reproduction, model, around=around, recast=recast, recorder=recorder())
    return Recorded(kept[0], made)


def look(models: Kept, low: Recording, wide: Recorded) -> Situation:
    """What both runs say."""
    found = decisive(low)
    dtype = models.of.dtype
    overflowing: dict[str, Record] = {}
    stored = with_stored_dtypes(wide.recording, low)
    add_overflowing(overflowing, stored, dtype)
    broke = None if found is None else found.broke
    if broke is not None and broke.dtype == dtype and broke.broke is not None and broke.broke.kind in _OVERFLOWS:
        overflowing.setdefault(broke.site, broke)  # float32 has none of the casts to the dtype
    return Situation(
        reproduction=models.of,
        models=models,
        model=models.model(dtype),
        low=low,
        wide=stored,
        found=found,
        part=None if broke is None else part_of(low, broke),
        overflowing=overflowing,
        asks=bool(wide.answers.recast),
    )

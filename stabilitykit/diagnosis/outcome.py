"""What became of a break: it reached the model's output, or ended on the way, harmlessly or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stabilitykit.diagnosis.harmless import Ending, ending
from stabilitykit.diagnosis.logits import logits_of
from stabilitykit.records import Record, Recording

OUTSIDE = "outside/"

OutcomeName = Literal["none", "reached", "absorbed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of `broke`, a record that broke.

    "reached": the model's output was not finite, or an error was raised. "absorbed": it was finite, and `ending` is the
    first operator that made finite numbers of what was lost. "none": it was finite, and no such operator was seen; so
    it is where only modules were recorded, and outside the model. `harmless`: every operator that ended it gives the
    same for the true value, None where that is not known.
    """

    name: OutcomeName
    broke: Record
    ending: Ending | None = None
    harmless: bool | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """A recording, with its records by step and those that broke."""

    recording: Recording
    steps: dict[int, list[Record]]
    broken: list[Record]
    tells: bool

    @classmethod
    def of(cls, recording: Recording) -> "_Run":
        steps: dict[int, list[Record]] = {}
        for record in recording:
            steps.setdefault(record.step, []).append(record)
        broken = [record for record in recording if record.broke is not None]
        return cls(recording, steps, broken, tells_outputs(recording))

    def after(self, broke: Record) -> list[Record]:
        """What ran from there on in the same pass, forward or backward."""
        of_step = self.steps[broke.step]
        return [r for r in of_step if r.order >= broke.order and r.is_gradient == broke.is_gradient]

    def outcome(self, at: int) -> Outcome:
        """Of the break that is number `at`."""
        broke, level = self.broken[at], self.recording.header.level
        ended = self._ended_harmlessly(at)
        if not ended and self._reaches(broke):
            return Outcome(name="reached", broke=broke)
        endings = [] if level != "operators" else ended or self._endings(self.after(broke))
        of_step = self.steps[broke.step]
        inside = [record for record in of_step if not (record.site.startswith(OUTSIDE) or record.is_gradient)]
        if not ended and inside and inside[-1].lost:  # of what ended it nothing was seen
            endings = []
        if not endings:
            return Outcome(name="none", broke=broke)
        told = {one.harmless for one in endings}
        harmless = False if False in told else None if None in told else True
        return Outcome(name="absorbed", broke=broke, ending=_last_word(endings, self.after(broke)), harmless=harmless)

    def _reaches(self, broke: Record) -> bool:
        """Whether something not finite came out of the model, or an error was raised, in the break's step or later."""
        header = self.recording.header
        if header.error is not None or any(step >= broke.step for step in header.lost_steps):
            return True
        logits = logits_of(self.recording, broke.step)
        if logits is None or not logits.lost:
            return False
        return not self.tells or not any(r.absorbs and r.order > logits.order for r in self.steps[broke.step])

    def _ended_harmlessly(self, at: int) -> list[Ending]:
        """How a break ended, harmlessly, before another one, so that it is the other one which reached the output."""
        if at + 1 == len(self.broken) or self.recording.header.level != "operators":
            return []
        broke, later = self.broken[at], self.broken[at + 1]
        between = self.after(broke)
        if later.step == broke.step:
            between = [record for record in between if record.order < later.order]
        elif any(broke.step <= step < later.step for step in self.recording.header.lost_steps):
            return []
        absorbing = [record.order for record in between if record.absorbs]
        if not absorbing or any(record.lost for record in between if record.order > absorbing[-1]):
            return []
        endings = self._endings(between)
        return endings if all(one.harmless for one in endings) else []

    def _endings(self, records: Sequence[Record]) -> list[Ending]:
        """Of records from a break on, those that end what is lost, as far as nothing goes past them.

        In x · rsqrt(mean(x²)) an infinite x leaves rsqrt finite, and the product NaN: what follows in the module shows
        it.
        """
        absorbing = [at for at, record in enumerate(records) if record.absorbs and any(r.lost for r in records[:at])]
        ending_it = [at for at in absorbing if not _goes_past(records, at)] or absorbing
        broke = records[0].broke
        sites = () if broke is None else broke.operand_sites
        made_of = next((r for r in self.steps[records[0].step] if len(sites) == 1 and r.site == sites[0]), None)
        return [ending([r for r in records[:at] if r.lost], records[at], made_of) for at in ending_it]


def outcome(recording: Recording) -> Outcome | None:
    """What became of the first break; None where nothing broke."""
    run = _Run.of(recording)
    return run.outcome(0) if run.broken else None


def decisive(recording: Recording) -> Outcome | None:
    """What became of the first break that is not harmless; of the first of all where each of them is harmless."""
    run = _Run.of(recording)
    found = (run.outcome(at) for at in range(len(run.broken)))
    return next((one for one in found if not one.harmless), run.outcome(0) if run.broken else None)


def is_harmless(recording: Recording) -> bool:
    """Whether something broke, and every break ended as the true value would have, so that nothing is lost."""
    found = decisive(recording)
    return found is not None and found.harmless is True


def tells_outputs(recording: Recording) -> bool:
    """Whether the steps whose outputs are not finite are known; earlier versions did not record them."""
    if recording.header.lost_steps:
        return True
    return any(
        record.absorbs or (record.broke is not None and (record.broke.origin_kind or record.broke.positions))
        for record in recording
    )


def _last_word(endings: Sequence[Ending], records: Sequence[Record]) -> Ending:
    """The first ending after which nothing is lost any more, else the first of all."""
    lost = max((record.order for record in records if record.lost), default=-1)
    return next((one for one in endings if one.record.order > lost), endings[0])


def _goes_past(records: Sequence[Record], at: int) -> bool:
    follows = records[at + 1] if at + 1 < len(records) else None
    return follows is not None and follows.lost > 0 and follows.broke is None and follows.module == records[at].module

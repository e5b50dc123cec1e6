"""What becomes of a step that was watched: which rows broke, why, and what is done about them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from stabilitykit.formats import FORMATS
from stabilitykit.guards.breaks import NumericalBreak, RowBreak, Seen
from stabilitykit.guards.examine import Finding, examine
from stabilitykit.guards.log import LOGGER, tell, tell_headroom, told
from stabilitykit.guards.metrics import UNKNOWN, Metrics
from stabilitykit.guards.places import with_logits
from stabilitykit.guards.sequences import Sequences
from stabilitykit.guards.step import Step
from stabilitykit.guards.watch import Looked, Watched
from stabilitykit.guards.wide import NoWeights, WideModel, WideRows, no_use, put

WAYS = ("stop", "raise", "warn", "retry")

Findings = Mapping[int, Finding | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a guard was asked to work."""

    on_break: str | Callable[[Sequence[RowBreak]], str | None]
    headroom: float | None
    metrics: Sequence[Metrics]
    token_text: Callable[[int], str] | None
    redact: bool


@dataclass(slots=True, eq=False)
class Outcome:
    """A step as it came: what the model returned, its logits, and those of the wide rows' own steps."""

    step: Step
    sequences: Sequences
    number: int
    output: Any
    logits: Tensor | None
    wide: list[tuple[WideRows, Step]]
    beams: int = 0
    changed: bool = False

    @property
    def sound(self) -> int:
        """Rows that have not broken."""
        return self.step.rows - len(self.sequences.known)

    @property
    def answer(self) -> Any:
        """What the model's caller gets."""
        if not self.changed or self.logits is None:
            return self.output
        return with_logits(self.output, self.logits)


class Judge:
    """Decides about steps of `model`. `wide` are its weights for rows that are retried."""

    def __init__(self, model: nn.Module, settings: Settings, wide: WideModel, keep: Callable[[RowBreak], None]) -> None:
        self._model, self._settings, self._wide, self._keep = model, settings, wide, keep
        self.raised: Exception | None = None  # by the user's callable

    def broken(self, found: Outcome, looked: Sequence[Looked]) -> None:
        """Names the rows that broke and does what was asked for. Raises NumericalBreak if that is what it was."""
        known = found.sequences.known
        last = looked[-1]
        lost = {int(row) for row in np.flatnonzero(~np.isfinite(last.largest))} - known
        if lost:
            seen: Seen = "logits" if last.part == "logits" else "final norm"
            self._act(found, self._named(found, sorted(lost), seen))

    def absorbed(self, found: Outcome, looked: Sequence[Looked]) -> None:
        """Reports rows whose residual stream was not finite although their logits are."""
        sequences = found.sequences
        if not looked or looked[-1].part != "logits":
            return
        finite = np.isfinite([one.largest for one in looked])
        rows = {int(row) for row in np.flatnonzero(~finite.all(0) & finite[-1])}
        rows -= sequences.known | sequences.widened | sequences.absorbed
        if rows:
            sequences.absorbed |= rows
            breaks, _ = self._named(found, sorted(rows), "residual")
            self._report(breaks, None)

    def headroom(self, found: Outcome, looked: Sequence[Looked]) -> float | None:
        """The least of the step, in bits, over rows that are finite; warns once a site where it is under the limit."""
        sequences, limit = found.sequences, self._settings.headroom
        amax = np.array([one.largest for one in looked])
        amax[~np.isfinite(amax)] = 0.0
        if sequences.known or sequences.wide:
            amax[:, sorted(sequences.known | sequences.widened)] = 0.0
        least = math.inf
        for one, largest, row in zip(looked, amax.max(1).tolist(), amax.argmax(1).tolist(), strict=True):
            if one.dtype not in FORMATS:
                continue
            bits = FORMATS[one.dtype].headroom(largest)
            least = min(least, bits)
            if limit is not None and bits < limit and one.site not in sequences.low:
                sequences.low.add(one.site)
                tell_headroom(one.site, one.dtype, row, bits, limit)
        return None if math.isinf(least) else least

    def of_scores(self, breaks: Sequence[RowBreak], sequences: Sequences) -> None:
        """Rows that logits processors left nothing to choose from."""
        if not breaks:
            return
        if self._settings.redact:
            breaks = [replace(one, token=None) for one in breaks]
        how: str | None = self._how(breaks)
        sequences.known |= {one.row for one in breaks}
        if how in ("stop", "retry"):
            sequences.ended |= {one.row for one in breaks}
        if how == "retry":
            why = "it is a logits processor's doing, from scores that were finite, and no dtype mends that"
            breaks = [replace(one, did="gave up", why=why) for one in breaks]
            how = None
        done = self._report(breaks, how)
        if how == "raise":
            raise NumericalBreak(done, sound=sequences.rows - len(sequences.known))

    def parted(self, found: Outcome, group: WideRows, error: Exception) -> None:
        """Gives up rows of which a step in the wider dtype failed, as where memory ran out."""
        sequences, dtype = found.sequences, str(self._wide.dtype).removeprefix("torch.")
        sequences.wide.remove(group)
        rows = [row for row in group.rows if row not in sequences.known]
        sequences.known |= set(rows)
        sequences.ended |= set(rows)
        why = f"its step in {dtype} failed ({told(error)}), and its own cache is lost with it"
        bare = [self._bare(found, row, "logits") for row in rows]
        self._report([replace(one, unexamined="nothing new broke", did="gave up", why=why) for one in bare], None)

    @property
    def ends(self) -> bool:
        """Whether rows are ended, as far as that is known before they broke."""
        return self._settings.on_break in ("stop", "retry")

    @property
    def decides_at_once(self) -> bool:
        """Whether scores have to be looked at before a token is chosen."""
        return self._settings.on_break == "raise" or callable(self._settings.on_break)

    def _how(self, breaks: Sequence[RowBreak]) -> str:
        how = self._settings.on_break
        if not callable(how):
            return how
        try:
            said = how(tuple(breaks)) or "warn"
        except Exception as error:
            self.raised = error
            raise
        if said not in WAYS:
            LOGGER.error("on_break returned %r, none of %s; it is taken for 'warn'", said, ", ".join(WAYS))
            return "warn"
        return said

    def _act(self, found: Outcome, named: tuple[list[RowBreak], Findings]) -> None:
        breaks, findings = named
        sequences = found.sequences
        in_wide = sequences.widened
        again = [one for one in breaks if one.row in in_wide]
        first = [one for one in breaks if one.row not in in_wide]
        done: list[RowBreak] = []
        if again:
            why = f"{str(self._wide.dtype).removeprefix('torch.')} fails too"
            given_up = [replace(one, did="gave up", why=why) for one in again]
            sequences.ended |= {one.row for one in again}
            done += self._report(given_up, None)
        if first:
            how: str | None = self._how(first)
            if how in ("stop", "retry") and found.beams > 1:
                why = "beam search moves rows from one hypothesis to another, which a cache of their own cannot follow"
                if how == "retry":
                    first = [replace(one, did="gave up", why=why) for one in first]
                how = None
            elif how == "retry":
                first, how = self._retried(found, first, findings), None
            elif how == "stop":
                sequences.ended |= {one.row for one in first}
            done += self._report(first, how)
        sequences.known |= {one.row for one in done if one.did != "retried"}
        raised = [one for one in done if one.did == "raised"]
        if raised:
            raise NumericalBreak(raised, found.answer, found.sound)

    def _retried(self, found: Outcome, breaks: Sequence[RowBreak], findings: Findings) -> list[RowBreak]:
        """Runs the rows that a wider dtype may help in it, and gives up the others."""
        reasons: dict[int, str] = {}
        for one in breaks:
            why = no_use(findings.get(one.row), found.step, self._wide, parted=found.sequences.parted)
            if why is not None:
                reasons[one.row] = why
        rows = tuple(one.row for one in breaks if one.row not in reasons)
        if rows and found.logits is not None:
            try:
                reasons |= self._widen(found, rows)
            except NoWeights as error:
                reasons |= dict.fromkeys(rows, str(error))
            except Exception as error:
                reasons |= dict.fromkeys(rows, f"the step could not be repeated ({told(error)})")
        elif rows:
            reasons |= dict.fromkeys(rows, "the model returns no logits")
        found.sequences.ended |= reasons.keys()
        return [
            replace(one, did="gave up", why=reasons[one.row]) if one.row in reasons else replace(one, did="retried")
            for one in breaks
        ]

    def _widen(self, found: Outcome, rows: tuple[int, ...]) -> dict[int, str]:
        """The rows that are not finite in the wider dtype either, each with a sentence."""
        wide = self._wide
        module = wide.of(self._model).get_submodule(found.step.path)
        group = WideRows(rows)
        _, logits = group.step(found.step, module, wide.dtype)
        watched = Watched()
        watched.look("logits", "logits", logits, None)
        (looked,) = watched.read(len(rows))
        lost = [row for at, row in enumerate(rows) if not np.isfinite(looked.largest[at])]
        if len(lost) < len(rows):
            assert found.logits is not None
            found.logits, found.changed = put(found.logits, rows, logits), True
            found.sequences.wide.append(group)
        name = str(wide.dtype).removeprefix("torch.")
        return dict.fromkeys(lost, f"{name} fails too: its logits are not finite either")

    def _named(self, found: Outcome, rows: Sequence[int], seen: Seen) -> tuple[list[RowBreak], Findings]:
        """A break for each row, with what its repetition found."""
        findings: dict[int, Finding | str] = {}
        narrow = [row for row in rows if row not in found.sequences.widened]
        if narrow:
            together = not (found.sequences.known | found.sequences.widened)
            findings |= self._examined(found.step, self._model, narrow, together=together)
        for group, step in found.wide:
            own = [at for at, row in enumerate(group.rows) if row in rows]
            if own:
                made = self._examined(step, self._wide.of(self._model), own, together=False)
                findings |= {group.rows[at]: finding for at, finding in made.items()}
        return [self._break(found, row, seen, findings[row]) for row in rows if row in findings], findings

    def _examined(self, step: Step, model: nn.Module, rows: Sequence[int], *, together: bool) -> Findings:
        settings = self._settings
        return examine(step, model, rows, settings.token_text, together=together, redact=settings.redact)

    def _bare(self, found: Outcome, row: int, seen: Seen) -> RowBreak:
        return RowBreak(
            row=row,
            phase=found.step.phase(found.number),
            step=found.number,
            position=None,
            token=None,
            seen=seen,
            absorbed=seen == "residual",
        )

    def _break(self, found: Outcome, row: int, seen: Seen, finding: Finding | str) -> RowBreak:
        step, bare = found.step, self._bare(found, row, seen)
        if isinstance(finding, str):
            token = None
            if step.tokens is not None and not self._settings.redact:
                token = int(step.tokens[row, -1])
            return replace(bare, token=token, unexamined=finding)
        record = finding.record
        return replace(
            bare,
            position=finding.position,
            channel=finding.channel,
            token=None if self._settings.redact else finding.token,
            token_text=finding.token_text,
            harmless=finding.found.harmless if bare.absorbed else None,
            kind=finding.broke.kind,
            site=record.site,
            label=record.label,
            layer=record.layer,
            operator=record.operator,
            chain=finding.links,
            verdict=finding.text,
        )

    def _report(self, breaks: Sequence[RowBreak], how: str | None) -> list[RowBreak]:
        done = tell(breaks, how)
        for one in done:
            self._keep(one)
            for sink in self._settings.metrics:
                sink.broke(one.site or UNKNOWN, one.kind or UNKNOWN)
                if one.did == "retried":
                    sink.retried()
        return done

"""What broke in a step, row by row: the step is repeated under the recorder, on a copy of its cache."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from stabilitykit.diagnosis import Link, chain, verdict
from stabilitykit.diagnosis.outcome import Outcome, decisive
from stabilitykit.guards.cache import CannotRepeat
from stabilitykit.guards.step import Step
from stabilitykit.recorder import record
from stabilitykit.records import Break, Record, Recording

_MOST_ALONE = 8  # rows of one step that are repeated one by one


@dataclass(frozen=True, slots=True)
class Finding:
    """The decisive break of one row, in a recording of that row or of its whole batch; its `position` and `token`."""

    recording: Recording
    found: Outcome
    position: int | None
    token: int | None

    @property
    def record(self) -> Record:
        return self.found.broke

    @property
    def broke(self) -> Break:
        assert self.found.broke.broke is not None
        return self.found.broke.broke

    @property
    def links(self) -> tuple[Link, ...]:
        return chain(self.recording)

    @property
    def text(self) -> str:
        return verdict(self.recording, advise=False)


def examine(
    step: Step,
    model: nn.Module,
    rows: Sequence[int],
    token_text: Callable[[int], str] | None,
    *,
    together: bool,
    redact: bool,
) -> dict[int, Finding | str]:
    """For each of `rows` what broke in it, or why that is not known.

    `together`: all rows of the step are repeated as they ran, and what that says of a row's own place holds for it; not
    where rows that broke earlier would come first. Of those that are left each is repeated alone, up to 8 of them.
    """
    named: dict[int, Finding | str] = {}
    whole = _recorded(step, model, None, token_text, redact=redact) if together else None
    if isinstance(whole, str):
        return dict.fromkeys(rows, whole)
    found = None if whole is None else decisive(whole)
    if whole is not None and found is not None and found.broke.broke is not None:
        broke = found.broke.broke
        if len(broke.positions) == 1 or len(broke.rows) == 1 or step.rows == 1:
            of = broke.rows or ((broke.row,) if broke.row is not None else (0,) if step.rows == 1 else ())
            named |= {row: _of_row(whole, found, step, row) for row in rows if row in of}
    left = [row for row in rows if row not in named]
    for row in left[:_MOST_ALONE]:
        alone = _recorded(step, model, [row], token_text, redact=redact)
        if isinstance(alone, str):
            named[row] = alone
            continue
        found = decisive(alone)
        if found is None or found.broke.broke is None:
            named[row] = "nothing broke when the step was repeated for this row alone"
        else:
            named[row] = Finding(alone, found, found.broke.broke.position, found.broke.broke.token)
    for row in left[_MOST_ALONE:]:
        named[row] = f"{_MOST_ALONE} other rows of this step were repeated, and no more"
    return named


def _of_row(recording: Recording, found: Outcome, step: Step, row: int) -> Finding:
    broke = found.broke.broke
    assert broke is not None
    token = broke.token
    if row != broke.row and broke.position is not None and recording.header.tokens is not None:
        ids = recording.header.tokens[row]
        token = ids[broke.position] if broke.position < len(ids) else None
    return Finding(recording, found, broke.position, token)


def _recorded(
    step: Step,
    model: nn.Module,
    rows: Sequence[int] | None,
    token_text: Callable[[int], str] | None,
    *,
    redact: bool,
) -> Recording | str:
    """The recording, or why there is none."""
    try:
        again = step.again(step.module, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with record(model, formats=(), token_text=token_text, redact=redact) as recording:
                again.run()
    except CannotRepeat as cannot:
        return str(cannot)
    except Exception as error:  # of the recorder or of the model: the user's own pass has long returned
        return f"the step could not be repeated ({type(error).__name__}: {str(error).splitlines()[:1]})"
    return recording

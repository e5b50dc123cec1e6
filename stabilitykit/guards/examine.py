"""What broke in a step, row by row: the step is repeated under the recorder, on a copy of its cache."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from stabilitykit.diagnosis import Link, chain, verdict
from stabilitykit.diagnosis.outcome import Outcome, decisive
from stabilitykit.diagnosis.parts import broken_channel
from stabilitykit.guards.cache import CannotRepeat
from stabilitykit.guards.log import told
from stabilitykit.guards.step import Step
from stabilitykit.guards.twin import twin
from stabilitykit.recorder import record
from stabilitykit.records import Break, Record, Recording

_MOST_ALONE = 8  # rows of one step that are repeated one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The decisive break of one row, in a repetition of that row or of its whole batch; its place and `token`."""

    found: Outcome
    broke: Break
    links: tuple[Link, ...]
    text: str
    position: int | None
    channel: int | None
    token: int | None
    token_text: str | None

    @property
    def record(self) -> Record:
        return self.found.broke

    @classmethod
    def of(cls, recording: Recording) -> "Finding | None":
        """That of the row which the recording names first; None where nothing broke."""
        found = decisive(recording)
        if found is None or found.broke.broke is None:
            return None
        broke = found.broke.broke
        return cls(
            found=found,
            broke=broke,
            links=chain(recording),
            text=verdict(recording, advise=False),
            position=broke.position,
            channel=broken_channel(recording, found.broke),
            token=broke.token,
            token_text=recording.header.text_of(broke.token),
        )


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
    try:
        model = twin(model)
    except Exception as error:
        return dict.fromkeys(rows, f"the model's modules cannot be copied to be looked at ({told(error)})")
    named: dict[int, Finding | str] = {}
    whole = _recorded(step, model, None, token_text, redact=redact) if together else None
    if isinstance(whole, str):
        return dict.fromkeys(rows, whole)
    found = None if whole is None else Finding.of(whole)
    if whole is not None and found is not None:
        broke = found.broke
        if len(broke.positions) == 1 or len(broke.rows) == 1 or step.rows == 1:
            of = broke.rows or ((broke.row,) if broke.row is not None else (0,) if step.rows == 1 else ())
            named |= {row: _of_row(whole, found, row) for row in rows if row in of}
    left = [row for row in rows if row not in named]
    for row in left[:_MOST_ALONE]:
        alone = _recorded(step, model, [row], token_text, redact=redact)
        if isinstance(alone, str):
            named[row] = alone
            continue
        named[row] = Finding.of(alone) or "nothing broke when the step was repeated for this row alone"
    for row in left[_MOST_ALONE:]:
        named[row] = f"{_MOST_ALONE} other rows of this step were repeated, and no more"
    return named


def _of_row(recording: Recording, found: Finding, row: int) -> Finding:
    """That of another row which broke at the same position of the same tensor."""
    header, position = recording.header, found.position
    if row == found.broke.row or position is None or header.tokens is None:
        return found
    token = header.tokens[row][position] if position < len(header.tokens[row]) else None
    return replace(found, token=token, token_text=header.text_of(token))


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
        again = step.again(model.get_submodule(step.path), rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with record(model, formats=(), token_text=token_text, redact=redact) as recording:
                again.run()
    except CannotRepeat as cannot:
        return str(cannot)
    except Exception as error:  # of the recorder or of the model: the user's own pass has long returned
        return f"the step could not be repeated ({told(error)})"
    return recording

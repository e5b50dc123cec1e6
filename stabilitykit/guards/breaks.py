"""A row of a batch that broke, and the exception that names several of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from stabilitykit.diagnosis import Link
from stabilitykit.errors import StabilityKitError
from stabilitykit.words import listed

Phase = Literal["prefill", "decode"]
Seen = Literal["logits", "final norm", "residual", "scores"]
Did = Literal["stopped", "raised", "warned", "retried", "gave up", "reported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBreak:
    """A row of a batch in which something left the number format's range, in one step of the model.

    `seen` is the watched tensor that was not finite: the logits, the final norm of a model without logits, the
    residual stream where the logits are finite all the same (`absorbed`), or the scores that logits processors made.
    `step` 0 is the prompt, or its first chunk; `position` is absolute, padding included, and `token` the id there.

    `kind`, `site`, `label`, `layer`, `operator`, `channel`, `chain` and `verdict` are of the step's repetition under
    the recorder; `channel` counts from 0 and is None where the tensor's last axis counts no channels. Without a
    repetition they are None, and `unexamined` says why; of "scores" `kind` is "no-token" (every score is -inf) or
    "not-finite", and `site` the logits processor that made them so. `harmless`: what was absorbed would have been the
    same from the true value; None where that is not known. `did` is what was done about the row, `why` the reason where
    a retry was given up.
    """

    row: int
    phase: Phase
    step: int
    position: int | None
    token: int | None
    token_text: str | None = None
    seen: Seen
    absorbed: bool = False
    harmless: bool | None = None
    kind: str | None = None
    site: str | None = None
    label: str | None = None
    layer: int | None = None
    operator: str | None = None
    channel: int | None = None
    chain: tuple[Link, ...] = ()
    verdict: str | None = None
    unexamined: str | None = None
    did: Did = "reported"
    why: str | None = None

    @property
    def place(self) -> str:
        """`layer 7, residual after MLP`; the watched tensor where nothing more is known."""
        named = self.label or self.site or self.seen
        return named if self.layer is None else f"layer {self.layer}, {named}"

    def __str__(self) -> str:
        token = "" if self.position is None else f", position {self.position}"
        token += f" {self.token_text!r}" if self.token_text else ""
        channel = "" if self.channel is None else f", channel {self.channel:,}"
        how = f" ({self.kind})" if self.kind else ""
        ending = f"; gave up: {self.why}" if self.why else ""
        return f"row {self.row} broke in {self.phase}, step {self.step}{token}: {self.place}{channel}{how}{ending}"

    def document(self) -> dict[str, Any]:
        """As plain JSON values, for an answer or a log."""
        return asdict(self) | {"chain": [link.text for link in self.chain], "message": str(self)}


class NumericalBreak(StabilityKitError, RuntimeError):  # noqa: N818  a break is what the kit calls it
    """Rows of a batch broke. `rows` are their numbers, `breaks` what is known of each.

    `output` is what the model returned, None where it was a logits processor's doing: the rows that are not named in it
    are as good as without a guard, and the cache is as the model left it, so the caller can go on with them. It may
    hold a whole cache, so that it is left out where the exception is pickled.
    """

    def __init__(self, breaks: Sequence[RowBreak], output: Any = None, sound: int = 0) -> None:
        self.breaks = tuple(breaks)
        self.rows = tuple(sorted({one.row for one in breaks}))
        self.output = output
        self._sound = sound
        several = len(self.rows) > 1
        text = f"{'Rows' if several else 'Row'} {listed([str(row) for row in self.rows])} of the batch cannot be used: "
        text += "; ".join(map(str, self.breaks)) + "."
        if sound:
            text += " The other rows are sound: go on with them." if sound > 1 else " The other row is sound: go on."
        if any(one.seen != "scores" for one in self.breaks):
            text += f" guard(model, 'retry') runs {'such rows' if several else 'such a row'} in a wider dtype."
        super().__init__(text)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.breaks, None, self._sound)

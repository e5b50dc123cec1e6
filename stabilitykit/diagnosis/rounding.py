"""Two finite runs of one prompt that continue it differently: nothing left the range, so what differs is rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

from stabilitykit.diagnosis.outcome import is_harmless
from stabilitykit.diagnosis.verdict import is_finite
from stabilitykit.records import LogitsError, Recording
from stabilitykit.words import number, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where two finite runs part: at `position` of what was generated, or in the token that greedy decoding takes next.

    `texts` are the two tokens; `errors` are those of their logits against the reference, None without one.
    """

    position: int | None
    texts: tuple[str, str]
    errors: tuple[LogitsError | None, LogitsError | None]


def divergence(before: Recording, after: Recording) -> Divergence | None:
    """How two runs of the same prompt part; None where they do not, or where one of them is not finite."""
    if not (_stays_in_range(before) and _stays_in_range(after)):
        return None
    errors = before.header.logits_error, after.header.logits_error
    ours, theirs = _tokens(before), _tokens(after)
    if ours != theirs:
        shared = min(len(ours), len(theirs))
        at = next((i for i in range(shared) if ours[i] != theirs[i]), None)
        if at is None or at < _prompt(before) or at < _prompt(after):  # not the same prompt, or one ran on
            return None
        texts = before.header.named(ours[at]), after.header.named(theirs[at])
        return Divergence(position=at, texts=(texts[0] or "", texts[1] or ""), errors=errors)
    old, new = before.header.case.get("next_text"), after.header.case.get("next_text")
    if not isinstance(old, str) or not isinstance(new, str) or old == new:
        return None
    return Divergence(position=None, texts=(quoted(old), quoted(new)), errors=errors)


def sentence(found: Divergence, names: tuple[str, str] = ("before", "now")) -> str:
    """`Greedy decoding takes ' a' before and '.' now, and nothing left the range …`"""
    takes = "Greedy decoding takes" if found.position is None else f"The token at position {found.position:,} is"
    told = f"{takes} {found.texts[0]} {names[0]} and {found.texts[1]} {names[1]}"
    known = [(error, name) for error, name in zip(found.errors, names, strict=True) if error is not None]
    far = [f"{number(error.kl_mean)} {name}" for error, name in known if error.kl_mean is not None]
    from_reference = (
        f" The logits' mean KL divergence from the reference is {' and '.join(far)}, in nats a token."
        if far
        else " How far the logits differ is not known, for neither run was compared with a reference."
    )
    return f"{told}. Nothing left the range in either run, so the difference is one of rounding.{from_reference}"


def _stays_in_range(recording: Recording) -> bool:
    header = recording.header
    breaks = recording.first_break() is not None and not is_harmless(recording)
    return len(recording) > 0 and not breaks and not header.lost_steps and header.error is None and is_finite(recording)


def _tokens(recording: Recording) -> Sequence[int]:
    return () if recording.header.tokens is None else recording.header.tokens[0]


def _prompt(recording: Recording) -> int:
    """How many tokens the prompt had: the second step begins behind it."""
    starts = recording.header.starts
    return starts[1] if len(starts) > 1 else len(_tokens(recording))

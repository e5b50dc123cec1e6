"""What trials came to, in sentences."""

from stabilitykit.commands import training
from stabilitykit.diagnosis.outcome import decisive
from stabilitykit.diagnosis.places import where
from stabilitykit.records import Recording
from stabilitykit.records.trials import Diagnosis, Distance, Trial
from stabilitykit.words import counted, listed, number

_SHOWN = 3  # names in a row
_ANOTHER = 0.5  # of the largest value: what differs by so much is another number
_SAME, _UNKNOWN = "no difference", "not to be compared"
_BLAMES = {
    "weight replaced": "nothing else is to blame; what belongs there only the original weights say",
    "input replaced": "what makes this input is to blame, and not the model",
    "one label that counts": "only the labels are to blame",
}
"""Trials that cure nothing, but show what alone is to blame."""


def happened(recording: Recording, error: str) -> str:
    """What broke in a run with a change, or what was raised: one short sentence."""
    found = decisive(recording)
    if found is None or found.broke.broke is None:
        return error or "Not finite."
    broke = found.broke.broke
    value = "" if broke.value is None else f" ({number(broke.value)})"
    what = {
        "overflow": f"Overflows in {where(found.broke)}{value}.",
        "reduction": f"A partial sum overflows in {where(found.broke)}.",
    }
    return what.get(broke.kind, f"Breaks in {where(found.broke)} ({broke.kind}).")


def advice(diagnosis: Diagnosis) -> str:
    """One paragraph: what was lost, whether it is the format, what was tried, what cures it, and what does not."""
    changes = [one for one in diagnosis.trials if not one.is_format]
    formats = [one for one in diagnosis.trials if one.is_format]
    if diagnosis.is_well and not changes:
        return " ".join(part for part in (_well(diagnosis), _rounding(diagnosis)) if part)
    to_blame = [one for one in changes if one.cured and one.name in _BLAMES and not any(f.cured for f in formats)]
    parts = [_of_part(diagnosis), _harm(diagnosis), _formats(formats), *(_blamed(one, diagnosis) for one in to_blame)]
    cures = [one for one in changes if one.cured and one not in to_blame]
    failed = [one for one in changes if not one.cured]
    parts.append(_cures(cures, diagnosis) if cures else _helpless(changes, formats, bool(to_blame), diagnosis))
    parts += [_failed(failed), _on_whole(diagnosis)]
    return " ".join(part for part in parts if part)


def _on_a_step() -> str:
    return f"Loss scales and other changes are tried on a training step, by `{training()}`."


def _wide(diagnosis: Diagnosis) -> str:
    """What the runs were compared with."""
    return "float64" if diagnosis.dtype in ("float32", "float64") else "float32"


def _of_part(diagnosis: Diagnosis) -> str:
    """Which input this is about, where it is not the whole one."""
    one = diagnosis.smallest
    if one is None or diagnosis.diagnosed == "whole":
        return ""
    size = f"{counted(one.after, 'token')} of {one.before:,}"
    return f"This is about the smallest input found that fails alike, {size}, not about the whole one."


def _on_whole(diagnosis: Diagnosis) -> str:
    """What of that which cures the smallest input cures the whole one, too."""
    cures = [one.name for one in diagnosis.trials if one.cures_whole]
    failed = [one.name for one in diagnosis.trials if one.cures_whole is False]
    told = [f"On the whole input {listed(cures)} helps, too."] if cures else []
    if failed:
        told.append(
            f"What helps the smallest input ({listed(failed, _SHOWN)}) does not cure the whole one, in which more may "
            "break: diagnose that without minimise."
        )
    return " ".join(told)


def _well(diagnosis: Diagnosis) -> str:
    far, harm = _from(diagnosis.plain, diagnosis), diagnosis.harm
    if _is_gradient(diagnosis):
        return f"What {diagnosis.dtype} returns is finite, and {far}; it is a gradient that is not. {_on_a_step()}"
    ran = diagnosis.findings.get("dtype")
    if harm is None and ran == _wide(diagnosis) != diagnosis.dtype and far == f"the same as {ran}":
        return f"What was to run in {diagnosis.dtype} ran in {ran}, so nothing is known of {diagnosis.dtype}."
    if harm is None:
        plain = diagnosis.plain
        if plain is not None and (plain.error_max or 0.0) >= _ANOTHER:
            return f"{diagnosis.dtype} is finite, and wrong: {far}, though nothing overflowed."
        return f"{diagnosis.dtype} is finite, and {far}."
    without = "" if harm.without is None else f"; without the overflow it would be {_from(harm.without, diagnosis)}"
    is_worse = harm.without is not None and harm.plain.is_farther(harm.without)
    little = "less harm than rounding does" if is_worse else "no harm that can be measured"
    return f"What overflows in {harm.site} does {little}: what is returned is {far}{without}."


def _rounding(diagnosis: Diagnosis) -> str:
    """How far the same run in other ways is, and whether that makes other tokens."""
    ways = [one for one in diagnosis.rounding if one.distance.compared]
    if not ways:
        return ""
    worst = max(ways, key=lambda one: one.distance.error_max or 0.0)
    if not worst.distance.error_max:
        return f"Run in other ways ({listed([one.name for one in ways], 4)}) it returns the same numbers."
    told = f"Run in other ways it rounds differently, most with {worst.name}: {_far(worst.distance)} from this run"
    parted = [one for one in ways if one.margin is not None]
    if not parted:
        return f"{told}. The likeliest tokens stay the same." if worst.distance.top1 is not None else f"{told}."
    least = min(one.margin for one in parted if one.margin is not None)
    return (
        f"{told}. With {listed([one.name for one in parted], 3)} another token is the likeliest in places, where the "
        f"two largest logits are {_short(least)} apart: that is rounding, not range."
    )


def _harm(diagnosis: Diagnosis) -> str:
    """What is lost or wrong, where the records do not say it."""
    harm, error = diagnosis.harm, diagnosis.findings.get("error")
    if not diagnosis.finite and _is_gradient(diagnosis):
        return "It is a gradient that is not finite."
    if not diagnosis.finite:
        return f"In {diagnosis.dtype} it does not run: {_ended(error)}" if error and not _breaks(diagnosis) else ""
    if harm is None:
        return f"What is returned is finite and wrong, {_from(diagnosis.plain, diagnosis)}, though nothing overflowed."
    place = ""
    if harm.rows:
        _, row, position, far = harm.rows[0]
        at = f"row {row}" if position is None else f"position {position} of row {row}"
        place = f"; {at} is worst, off by {_part(far)}"
    without = "" if harm.without is None else f" Without the overflow it would be {_far(harm.without)}."
    return f"What is returned is finite and wrong, {_from(harm.plain, diagnosis)}{place}.{without}"


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _breaks(diagnosis: Diagnosis) -> bool:
    return diagnosis.findings.get("first_break") is not None


def _is_gradient(diagnosis: Diagnosis) -> bool:
    """Whether it is a gradient that broke."""
    broke = diagnosis.findings.get("first_break") or {}
    return str(broke.get("site", "")).startswith("backward/")


def _formats(trials: list[Trial]) -> str:
    """Whether it is the format at all."""
    good = [one.name for one in trials if one.cured]
    bad = [one.name for one in trials if not one.finite]
    if good:
        but = f"; {listed(bad)} {'is' if len(bad) == 1 else 'are'} not" if bad else ""
        return f"It is the format: {listed(good)} {'is' if len(good) == 1 else 'are'} finite on the same input{but}."
    if bad:
        return f"It is not the format: {listed(bad)} {'fails' if len(bad) == 1 else 'fail'} too."
    return ""


def _blamed(one: Trial, diagnosis: Diagnosis) -> str:
    """Of a number that was put in the place of a lost one: what that shows."""
    far = _from(one.distance, diagnosis)
    told = f"Tried: {one.summary[:1].lower()}{one.summary[1:]}"
    return f"{told} With that the run is finite ({far}), so {_BLAMES[one.name]}."


def _cures(cures: list[Trial], diagnosis: Diagnosis) -> str:
    best, *others = cures
    told = f"Tried, and it helps: {best.name} ({_from(best.distance, diagnosis)}). {best.summary}"
    if not others:
        return told
    shown = listed([f"{one.name} ({_far(one.distance)})" for one in others], _SHOWN)
    return f"{told} So {'does' if len(others) == 1 else 'do'} {shown}."


def _helpless(changes: list[Trial], formats: list[Trial], is_blamed: bool, diagnosis: Diagnosis) -> str:
    wider = [one.name for one in formats if one.cured]
    if wider and changes:
        return f"Nothing that was tried in {diagnosis.dtype} helps; a wider format does ({listed(wider)})."
    if _is_gradient(diagnosis):
        helps = f"What helps is a wider format ({listed(wider)})." if wider else "Nothing that was tried helps."
        return f"{helps} {_on_a_step()}" if wider else helps
    if wider and _breaks(diagnosis):
        return f"No change that is known fits what broke in {diagnosis.dtype}; what helps is a wider format."
    return "" if is_blamed or not changes else "Nothing that was tried helps."


def _failed(failed: list[Trial]) -> str:
    told = [f"{one.name} ({f'finite, but {_far(one.distance)}' if one.finite else 'not finite'})" for one in failed]
    return f"Tried without success: {listed(told, _SHOWN)}." if told else ""


def _from(distance: Distance | None, diagnosis: Diagnosis) -> str:
    """`KL 1.2e-5 nats from float32`"""
    far, wide = _far(distance), _wide(diagnosis)
    return far if far == _UNKNOWN else f"the same as {wide}" if far == _SAME else f"{far} from {wide}"


def _far(distance: Distance | None) -> str:
    """`KL 1.2e-5 nats`, or `0.13% of the largest value`; of logits, as a mean over tokens."""
    if distance is None or distance.compared == 0:
        return _UNKNOWN
    if not distance.error_max and not distance.kl_mean:
        return _SAME
    if distance.kl_mean is not None:
        return f"KL {_short(distance.kl_mean)} nats"
    return _part(distance.error_max or 0.0)


def _part(error: float) -> str:
    return f"{_short(100 * error)}% of the largest value"


def _short(value: float) -> str:
    """Two digits: `0.013`, `1.2e-5`, `0`."""
    if 0 < value < 1e-12:
        return "under 1e-12"
    if value == 0 or value >= 1e-3:
        return number(float(f"{value:.2g}"))
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"

"""What trials came to, in sentences."""

from stabilitykit.diagnosis.outcome import decisive
from stabilitykit.diagnosis.places import where
from stabilitykit.records import Recording
from stabilitykit.records.trials import Diagnosis, Distance, Trial
from stabilitykit.words import listed, number

_SHOWN = 3  # of what was tried without success


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
    """One paragraph: what was tried, what cures it, at what distance from float32, and what does not."""
    dtype, cures = diagnosis.dtype, diagnosis.cures
    changes = [one for one in diagnosis.trials if not one.is_format]
    formats = [one for one in diagnosis.trials if one.is_format]
    parts = [_harm(diagnosis), _formats(formats, dtype, bool(diagnosis.finite and diagnosis.harm is None))]
    best = next((one for one in cures if one in changes), None)
    if best is not None:
        parts.append(f"Tried: {best.name} cures it, {_far(best.distance)} from float32. {best.summary}")
        others = [one for one in cures if one in changes and one is not best]
        if others:
            parts.append(f"So do {listed([f'{one.name} ({_far(one.distance)})' for one in others], _SHOWN)}.")
    elif changes:
        parts.append(f"Nothing that was tried within {dtype} cures it.")
    failed = [one for one in changes if not one.cured]
    if failed:
        told = [f"{one.name} ({'not finite' if not one.finite else f'finite, {_far(one.distance)}'})" for one in failed]
        parts.append(f"Tried without success: {listed(told, _SHOWN)}.")
    return " ".join(part for part in parts if part)


def _harm(diagnosis: Diagnosis) -> str:
    harm = diagnosis.harm
    if harm is None:
        return ""
    far = _far(harm.plain)
    if not harm.harmful:
        return f"What overflowed in {harm.site} ends without harm: what is returned is {far} from float32."
    place = ""
    if harm.rows:
        _, row, position, error = harm.rows[0]
        place = f", most in row {row}" + ("" if position is None else f" at position {position}") + f" ({error:.2g})"
    without = "" if harm.without is None else f" With that operator in float32 it is {_far(harm.without)}."
    return f"What is returned is finite and wrong, {far} from float32{place}.{without}"


def _formats(trials: list[Trial], dtype: str, fine: bool) -> str:
    """Whether it is the format at all."""
    if fine or not trials:
        return ""
    good = [one.name for one in trials if one.cured]
    bad = [one.name for one in trials if not one.finite]
    if good:
        return f"It is the format: {listed(good, 3)} {'is' if len(good) == 1 else 'are'} finite on the same input."
    if bad:
        return f"It is not the format alone: {listed(bad, 3)} {'fails' if len(bad) == 1 else 'fail'} too."
    return ""


def _far(distance: Distance | None) -> str:
    """`KL 1.2e-05 nats`, or the largest error in parts of the largest magnitude."""
    if distance is None or distance.compared == 0:
        return "not comparable"
    if distance.kl_mean is not None:
        return f"KL {distance.kl_mean:.1e} nats"
    return f"{distance.error_max:.1e}"

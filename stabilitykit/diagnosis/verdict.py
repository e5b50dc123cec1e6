"""The findings of a run: one paragraph for people, one document for scripts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stabilitykit.diagnosis.cause import cause
from stabilitykit.diagnosis.chain import Link, chain
from stabilitykit.diagnosis.gradients import clean, goes_on
from stabilitykit.diagnosis.layers import by_step, peak, stored
from stabilitykit.diagnosis.logits import logits_of
from stabilitykit.diagnosis.outcome import Outcome, decisive, outcome, tells_outputs
from stabilitykit.diagnosis.outside import is_outside
from stabilitykit.diagnosis.places import place_of, where
from stabilitykit.diagnosis.ranges import how_to_repair
from stabilitykit.diagnosis.sentences import dependence, first_sentence
from stabilitykit.diagnosis.untried import UNTRIED, how_to_try
from stabilitykit.diagnosis.weights import weights_sentence
from stabilitykit.formats import number_format
from stabilitykit.records import Record, Recording
from stabilitykit.records.document import finite_or_text, to_document
from stabilitykit.words import counted, number

__all__ = ["document", "is_finite", "limits", "place_of", "reference_value", "verdict", "weights_sentence", "where"]


def is_finite(recording: Recording) -> bool:
    """Whether every logit of the last step is finite; without a head, whether every record is.

    Where something ended what was lost on the way, or after the head, it is the model's output that counts.
    """
    step = max((record.step for record in recording), default=0)
    logits = logits_of(recording, step)
    lost = logits.lost > 0 if logits is not None else any(record.lost for record in recording)
    if lost and tells_outputs(recording) and _ends(recording, logits):
        return step not in recording.header.lost_steps
    return not lost


def _ends(recording: Recording, logits: Record | None) -> bool:
    """Whether what is lost may not be what came out: the head has something after it, or there is no head."""
    if logits is None:
        found = outcome(recording)
        return found is not None and not (is_outside(found.broke) and found.name == "none")
    return True


def reference_value(recording: Recording, reference: Recording | None) -> float | None:
    """What the reference run had at the element that broke first, in the same step, if it watched that element."""
    first = recording.first_break()
    if first is None or first.broke_at is None or reference is None:
        return None
    wanted = first.site, first.broke_at
    values = [value for site, index, value in reference.header.watched if (site, index) == wanted]
    steps = [one.step for one in reference if one.site == first.site and one.elements > first.broke_at]
    if not steps and len(values) == 1:  # of a run whose records were left out
        return values[0]
    return dict(zip(steps, values, strict=True)).get(first.step) if len(steps) == len(values) else None


def document(recording: Recording, reference: Recording | None = None) -> dict[str, Any]:
    """The findings as plain JSON values: a number that is not finite is a string."""
    header = recording.header
    why, found = cause(recording), outcome(recording)
    return {
        "checkpoint": header.checkpoint,
        "sha256": header.sha256,
        "versions": dict(header.versions),
        "attention": header.case.get("attention"),
        "dtype": header.dtype,
        "tokens": None if header.tokens is None else list(header.tokens[0]),
        "notes": list(header.notes),
        "weights": to_document(header.weights),
        "finite": is_finite(recording),
        "verdict": verdict(recording, reference),
        "first_break": None if found is None else _break_document(recording, found, reference),
        "cause": None if why is None else why.name,
        "chain": [dataclasses.asdict(link) for link in chain(recording)],
        "steps": [dataclasses.asdict(row) for row in by_step(recording)] if len(header.starts) > 1 else None,
        "error": header.error,
    }


def _break_document(recording: Recording, found: Outcome, reference: Recording | None) -> dict[str, Any]:
    first, broke = found.broke, found.broke.broke
    assert broke is not None
    origin = None
    if broke.origin_kind is not None:
        origin = {"kind": broke.origin_kind, "name": broke.origin_name, "finite": broke.origin_finite}
    rounded = None
    if broke.rounded_site is not None:
        rounded = {"site": broke.rounded_site, "from": finite_or_text(broke.rounded_from)}
    return {
        "site": first.site,
        "label": first.label,
        "layer": first.layer,
        "operator": first.operator,
        "kind": broke.kind,
        "step": first.step,
        "position": broke.position,
        "positions": list(broke.positions),
        "row": broke.row,
        "rows": list(broke.rows),
        "channel": broke.channel,
        "count": broke.count,
        "token": recording.header.text_of(broke.token),
        "token_id": broke.token,
        "value": finite_or_text(broke.value),
        "scaled": finite_or_text(broke.scaled),
        "reference_value": finite_or_text(reference_value(recording, reference)),
        "limit": broke.limit,
        "operands": [finite_or_text(operand) for operand in broke.operands],
        "operand_sites": list(broke.operand_sites),
        "origin": origin,
        "rounded": rounded,
        "outside": broke.outside,
        "outcome": found.name,
        "absorbed_at": None if found.ending is None else found.ending.record.site,
        "absorbed_by": None if found.ending is None else found.ending.record.operator,
        "harmless": found.harmless,
    }


def verdict(
    recording: Recording,
    reference: Recording | None = None,
    *,
    advise: bool = True,
    tries: bool = True,
    harmful: bool | None = None,
) -> str:
    """One paragraph: what broke, where, why, and how it became the error; or how much headroom was left.

    `advise`: what to do about it, which no record has tried; False where somebody has. Where that is only a candidate,
    the line to type that tries it comes last, and for who uses the command line the one that repairs the model;
    without `tries` neither does. `harmful`: whether what was absorbed made the output worse, if that was measured.
    """
    found, notes = decisive(recording), limits(recording.header.notes)
    if found is None:
        return " ".join([_clean(recording), *notes])
    first, why = found.broke, cause(recording)
    assert first.broke is not None
    parts = [_before(recording, first), first_sentence(recording, first), _reference_sentence(recording, reference)]
    parts.append(why.sentence if why is not None and why.shown else "")
    parts.append(dependence(recording, first))
    parts.append(_consequences(chain(recording)))
    parts.append(_ending(recording, found, harmful))
    parts.append(goes_on(recording, first))
    remedy = "" if why is None or not advise else why.remedy
    parts += [remedy, *notes, how_to_try(recording.header) if UNTRIED in remedy and tries else ""]
    parts.append(how_to_repair(recording, first) if remedy and tries else "")
    return " ".join(part for part in parts if part)


def limits(notes: Sequence[str]) -> list[str]:
    """Of a checkpoint's notes those that begin with "only": they limit what a verdict speaks of, so it repeats them."""
    return [f"{note[0].upper()}{note[1:]}." for note in notes if note.startswith("only ")]


def _clean(recording: Recording) -> str:
    header, dtype = recording.header, recording.header.dtype
    top = peak(stored(recording))
    if top is None or top.amax is None:
        return f"{dtype}: nothing was recorded."
    ending = "" if header.error is None else f" Sampling still raised: {header.error}"
    form = number_format(dtype)
    place = f"{where(top)}{place_of(recording, top.amax_position, top.amax_row, top.amax_token, top.step)}"
    headroom = (
        f"The largest magnitude is {number(top.amax)}, in {place}: {form.headroom(top.amax):.1f} bits of headroom "
        f"below the maximum ({number(form.largest)})."
    )
    if header.lost_steps:
        steps = "" if len(header.starts) < 2 else f" in {counted(len(header.lost_steps), 'step')}"
        return (
            f"What the model returned{steps} is not finite in {dtype}, and no operator or module that was recorded "
            f"made it so: how it came about was not seen.{ending}"
        )
    return f"{dtype} is finite throughout. {headroom}{_unseen(recording)}{clean(recording)}{ending}"


def _unseen(recording: Recording) -> str:
    if recording.header.level == "operators":
        return ""
    what = "layer" if recording.header.level == "layers" else "module"
    return (
        f" Only what each {what} returns was recorded: an overflow inside one that ends there again (x / inf = 0, a "
        "clamp, tanh, a softmax) cannot be excluded. Record operators to see it."
    )


def _before(recording: Recording, first: Record) -> str:
    """Breaks before the decisive one, all of them harmless."""
    earlier = [r for r in recording if r.broke is not None and (r.step, r.order) < (first.step, first.order)]
    if not earlier:
        return ""
    others = "" if len(earlier) == 1 else f" and {counted(len(earlier) - 1, 'other place')}"
    return f"Overflows in {where(earlier[0])}{others} end without loss."


def _reference_sentence(recording: Recording, reference: Recording | None) -> str:
    value = reference_value(recording, reference)
    if value is None or reference is None:
        return ""
    return f"The {reference.header.dtype} run has {number(value)} there."


def _consequences(links: tuple[Link, ...]) -> str:
    nan = next((link for link in links if link.event == "first NaN"), None)
    layers = [link for link in links if link.event == "layer"]
    whole = next((link for link in layers if link.lost_positions and link.lost_positions == link.positions), None)
    logits = next((link for link in links if link.event == "logits"), None)
    error = next((link for link in links if link.event == "error"), None)
    greedy = next((link for link in links if link.event == "greedy"), None)
    parts = []
    if nan is not None:
        parts.append(f"in {where(nan)} infinity becomes NaN ({nan.text.split(' makes')[0]})")
    if whole is not None:
        parts.append(f"after layer {whole.layer} {'the' if whole.positions == 1 else 'every'} token is lost")
    if logits is not None:
        parts.append(logits.text)
    if error is not None:
        parts.append(f"sampling raises: {error.text}")
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    text = f"{text[0].upper()}{text[1:]}." if text else ""
    return f"{text} {greedy.text[0].upper()}{greedy.text[1:]}." if greedy is not None else text


def _ending(recording: Recording, found: Outcome, harmful: bool | None) -> str:
    """How what was lost became finite again, and what that means for the model's output."""
    if found.ending is None:
        outside = is_outside(found.broke) or found.broke.is_gradient
        if found.name == "none" and tells_outputs(recording) and not outside:
            return "What the model returns is finite all the same."
        return ""
    ends = f"It is absorbed in {where(found.ending.record)}: {found.ending.how}"
    if found.harmless:
        clamped = " is clamped" in found.ending.how
        return f"{ends}, as {'the true value is' if clamped else 'it is of the true value'}, so nothing is lost."
    if harmful is False:
        return f"{ends}. What the model returns is finite."
    if found.harmless is False:
        return f"{ends}. What the model returns is finite, and wrong: it is computed from that."
    return f"{ends}. What the model returns is finite; whether it is right only a run in a wider format shows."

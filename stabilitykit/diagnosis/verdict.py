"""The findings of a run: one paragraph for people, one document for scripts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stabilitykit.diagnosis.cause import Cause, cause
from stabilitykit.diagnosis.chain import Link, chain, logits_of
from stabilitykit.diagnosis.layers import by_step, peak, stored
from stabilitykit.formats import number_format
from stabilitykit.records import Break, Record, Recording, StoredWeights
from stabilitykit.records.document import finite_or_text, to_document
from stabilitykit.words import escaped, listed, number, ordinal

_SIGNS = {"add": "+", "sub": "-", "mul": "·", "div": "÷"}


def is_finite(recording: Recording) -> bool:
    """Whether every logit of the last step is finite; without a head, whether every record is."""
    step = max((record.step for record in recording), default=0)
    logits = logits_of(recording, step)
    return logits.lost == 0 if logits is not None else all(record.lost == 0 for record in recording)


def reference_value(recording: Recording, reference: Recording | None) -> float | None:
    """What the reference run had at the element that broke first, if it watched that element."""
    first = recording.first_break()
    if first is None or first.broke is None or reference is None:
        return None
    wanted = first.site, first.broke_at
    return next((value for site, index, value in reference.header.watched if (site, index) == wanted), None)


def document(recording: Recording, reference: Recording | None = None) -> dict[str, Any]:
    """The findings as plain JSON values: a number that is not finite is a string."""
    header, first = recording.header, recording.first_break()
    why = cause(recording)
    return {
        "checkpoint": header.checkpoint,
        "dtype": header.dtype,
        "tokens": None if header.tokens is None else list(header.tokens[0]),
        "notes": list(header.notes),
        "weights": to_document(header.weights),
        "finite": is_finite(recording),
        "verdict": verdict(recording, reference),
        "first_break": None if first is None else _break_document(recording, first, reference),
        "cause": None if why is None else why.name,
        "chain": [dataclasses.asdict(link) for link in chain(recording)],
        "steps": [dataclasses.asdict(row) for row in by_step(recording)] if len(header.starts) > 1 else None,
        "error": header.error,
    }


def _break_document(recording: Recording, first: Record, reference: Recording | None) -> dict[str, Any]:
    broke = _broke(first)
    return {
        "site": first.site,
        "label": first.label,
        "layer": first.layer,
        "operator": first.operator,
        "kind": broke.kind,
        "step": first.step,
        "position": broke.position,
        "row": broke.row,
        "channel": broke.channel,
        "count": broke.count,
        "token": recording.header.text_of(broke.token),
        "token_id": broke.token,
        "value": finite_or_text(broke.value),
        "reference_value": finite_or_text(reference_value(recording, reference)),
        "limit": broke.limit,
        "operands": [finite_or_text(operand) for operand in broke.operands],
        "operand_sites": list(broke.operand_sites),
    }


def verdict(recording: Recording, reference: Recording | None = None) -> str:
    """One paragraph: what broke, where, why, and how it became the error; or how much headroom was left."""
    first = recording.first_break()
    if first is None:
        return " ".join([_clean(recording), *limits(recording.header.notes)])
    parts = [_first_sentence(recording, first), _reference_sentence(recording, reference)]
    why = cause(recording)
    if why is not None and (why.name != "range" or _broke(first).kind == "weight"):
        parts.append(why.sentence)
    elif why is not None:
        parts.append(_dependence(recording, first))
    parts.append(_consequences(chain(recording)))
    parts += [_advice(why), *limits(recording.header.notes)]
    return " ".join(part for part in parts if part)


def limits(notes: Sequence[str]) -> list[str]:
    """Of a checkpoint's notes those that begin with "only": they limit what a verdict speaks of, so it repeats them."""
    return [f"{note[0].upper()}{note[1:]}." for note in notes if note.startswith("only ")]


def _clean(recording: Recording) -> str:
    dtype = recording.header.dtype
    top = peak(stored(recording))
    if top is None or top.amax is None:
        return f"{dtype}: nothing was recorded."
    form = number_format(dtype)
    ending = "" if recording.header.error is None else f" Sampling still raised: {recording.header.error}"
    place = f"{where(top)}{place_of(recording, top.amax_position, top.amax_row, top.amax_token, top.step)}"
    return (
        f"{dtype} is finite throughout. The largest magnitude is {number(top.amax)}, in {place}: "
        f"{form.headroom(top.amax):.1f} bits of headroom below the maximum ({number(form.largest)}).{ending}"
    )


def _first_sentence(recording: Recording, first: Record) -> str:
    broke, dtype = _broke(first), first.dtype
    at = place_of(recording, broke.position, broke.row, broke.token, first.step)
    place = f"{where(first)}{at}"
    count = "" if broke.count == 1 else f" ({broke.count:,} elements of this tensor)"
    match broke.kind:
        case "overflow":
            maximum = f"the {dtype} maximum, {number(broke.limit)}"
            return f"{dtype} overflows in {place}{count}: {_made(first)} exceeds {maximum}."
        case "reduction":
            return (
                f"{dtype} overflows in {place}{count}: the result, {number(broke.value)}, fits, but a partial sum "
                f"exceeds the {dtype} maximum, {number(broke.limit)}."
            )
        case "invalid" | "division-by-zero":
            lost = "NaN" if broke.kind == "invalid" else "infinite"
            return f"{place} is {lost}{count}: {_made(first, which='')}."
        case "masked-row":
            return f"{place} is NaN{count}: every key of that row is masked."
        case "weight" | "input" | "constant":
            source = " and ".join(broke.operand_sites)
            return f"{place} is the first tensor that is not finite{count}, because {source} is not."
        case "unresolved":
            return f"{place} is the first tensor that is not finite{count}; record operators to see how."


def _reference_sentence(recording: Recording, reference: Recording | None) -> str:
    value = reference_value(recording, reference)
    if value is None or reference is None:
        return ""
    return f"The {reference.header.dtype} run has {number(value)} there."


def _dependence(recording: Recording, first: Record) -> str:
    position = _broke(first).position
    if position is None or first.layer is None:
        return ""
    token = _broke(first).token
    if position == 0:
        text = escaped(recording.header.text_of(token) or "")
        named = "" if token is None else f", {text}" if text else f" (id {token})"
        return f"This depends only on the first token{named}: every prompt that starts with it overflows here."
    return f"This depends only on the first {position + 1} tokens: every prompt that starts with them overflows here."


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


def _advice(why: Cause | None) -> str:
    return "" if why is None else why.remedy


def _made(record: Record, which: str = ", which") -> str:
    """The arithmetic that broke, with its numbers: `60,000 + 8,000 = 68,000`, or `exp of operands up to 99 gives inf`.

    To the second one `which` is added, for a verb to follow.
    """
    broke = _broke(record)
    sign = _SIGNS.get(record.operator or "")
    if sign and len(broke.operands) == 2:
        return f"{number(broke.operands[0])} {sign} {number(broke.operands[1])} = {number(broke.value)}"
    operands = " and ".join(number(operand) for operand in broke.operands)
    of = f" of operands up to {operands}" if operands else ""
    return f"{record.operator or 'the operator'}{of} gives {number(broke.value)}{which}"


def where(record: Record | Link) -> str:
    """layer 7, residual after MLP (layers.7, operator add)"""
    layer = "" if record.layer is None else f"layer {record.layer}, "
    operator = f", operator {record.operator}" if record.operator else ""
    named = record.label or record.site or ""
    return f"{layer}{named} ({record.site}{operator})" if named != record.site else f"{layer}{named}{operator}"


def place_of(recording: Recording, position: int | None, row: int | None, token: int | None, step: int) -> str:
    """, at token 0 '<bos>'; empty where the position is not known."""
    if position is None:
        return ""
    named = recording.header.named(token)
    text = f", at token {position}" + (f" {named}" if named else "")
    if recording.header.rows > 1 and row is not None:
        text += f" of row {row}"
    if step > 0 and position == recording.header.first_position(step):
        text += f", the {ordinal(step)} token generated"
    return text


def weights_sentence(stored: StoredWeights, *, saturating: bool = False) -> str:
    """What storing the checkpoint in a dtype does to its weights, by a cast that saturates or not; nothing where it
    does nothing.
    """
    form = number_format(stored.dtype)
    becomes = "infinite" if form.has_infinities else "NaN"
    if form.saturates(asked=saturating):
        becomes = f"±{number(form.largest)}"
    counts = (
        (
            stored.nonfinite,
            "is NaN or infinite in the checkpoint itself",
            "are NaN or infinite in the checkpoint itself",
        ),
        (stored.overflow, f"becomes {becomes}", f"become {becomes}"),
        (stored.zero, "becomes zero", "become zero"),
        (stored.subnormal, "goes subnormal", "go subnormal"),
    )
    parts = [f"{count:,} {one if count == 1 else many}" for count, one, many in counts if count]
    if not parts:
        return ""
    worst = stored.worst[0].name
    return f"Of {stored.elements:,} weights stored in {stored.dtype}, {listed(parts)}, mostly in {worst}."


def _broke(record: Record) -> Break:
    if record.broke is None:
        raise ValueError(f"{record.site} did not break")
    return record.broke

"""What helps against an overflow, by the part of the model that overflowed: what is certain, and what is a candidate.

A candidate follows from how such parts are computed, and has not been tried on this model.
"""

import math

from stabilitykit.commands import is_typed, repair
from stabilitykit.diagnosis.parts import Part, Place, is_activation, is_norm, part_of, place_in
from stabilitykit.diagnosis.untried import UNTRIED, named
from stabilitykit.formats import FORMATS
from stabilitykit.records import Break, Record, Recording
from stabilitykit.records.layers import is_layer
from stabilitykit.words import number

_NORMAL = ("bfloat16", "float32")
_SCALED: frozenset[Part] = frozenset({"residual", "sum", "gate-up", "up", "query", "key", "value", "before-norm"})
"""Parts of which a power of two can be moved elsewhere."""


def fact(recording: Recording, record: Record) -> str:
    """What the operators after the break would have made of the value; empty where that is not known."""
    broke = record.broke
    if broke is None or broke.scaled is None or not _fits_scaled(record, broke):
        return ""
    scales = {"scores": "its scale", "expert": "its routing weight"}
    by = scales.get(part_of(recording, record), "what it is scaled by next")
    return f"Times {by} it would be {number(broke.scaled)}, which {record.dtype} holds."


def remedy(recording: Recording, record: Record) -> str:
    """What to do about an overflow, or about a partial sum that overflowed."""
    broke = record.broke
    assert broke is not None
    part = part_of(recording, record)
    names = holding(record, broke.value, recording.header.dtype)
    if part == "residual":
        scale = "scale the residual stream down by a power of two"
        return f"{_use(names)}, or {scale}." if names else f"{_none_holds(record, broke)}{_capital(scale)}."
    place = place_in(recording, record)
    lead = f"{_use(names)}." if names else _none_holds(record, broke).strip()
    certain, candidate = _certain(part, record, names), _candidate(part, place, broke)
    if broke.kind == "reduction" and not candidate:
        candidate = "let this operator sum in float32; only a partial sum overflows, and the result fits"
    told = f"{UNTRIED}{candidate}." if candidate else ""
    return " ".join(text for text in (certain or lead, told) if text)


def how_to_repair(recording: Recording, record: Record) -> str:
    """For who uses the command line, what looks for powers of two that keep the model in float16 and writes it."""
    name, broke = named(recording.header), record.broke
    if not is_typed() or name is None or broke is None or broke.kind not in ("overflow", "reduction"):
        return ""
    if recording.header.dtype != "float16" or part_of(recording, record) not in _SCALED:
        return ""
    command = repair(name)
    return "" if command is None else f"To have it scaled so, and written: `{command}`."


def holding(record: Record, value: float | None, own: str) -> list[str]:
    """The usual formats that hold `value`, other than the tensor's and the run's own."""
    if value is None or math.isnan(value):
        return []
    eighth = record.dtype.startswith("float8")  # of a run in a wider dtype, which may hold it
    others = [name for name in (("float16", *_NORMAL) if eighth else _NORMAL) if eighth or name != own]
    return [name for name in others if not FORMATS[name].overflows(value) and _is_wider(name, record.dtype)]


def _is_wider(name: str, dtype: str) -> bool:
    known = FORMATS.get(dtype)
    return known is None or FORMATS[name].largest > 1.01 * known.largest


def _use(names: list[str]) -> str:
    return f"Use a format with a wider range ({', '.join(names)})"


def _none_holds(record: Record, broke: Break) -> str:
    """Said where no usual format is wider; with a space after it, or empty."""
    value = broke.value
    if value is None:
        return ""
    if math.isnan(value) or FORMATS["float32"].overflows(value):
        only = "" if not math.isfinite(value) else ", only float64 does"
        return f"Neither bfloat16 nor float32 holds this value{only}. "
    return ""


def _certain(part: Part, record: Record, names: list[str]) -> str:
    """Advice that follows from the record alone."""
    form = FORMATS.get(record.dtype)
    if part == "angles" and "float32" in names and form is not None:
        return (
            f"Compute positions and rotary angles in float32: {record.dtype} holds no number past "
            f"{number(form.largest)}, and not every whole number past {2**form.precision:,}."
        )
    if part == "mask":
        return (
            "Give masked positions half of the dtype's minimum, or pass a boolean mask: a score added to the minimum "
            "itself overflows."
        )
    return ""


def _candidate(part: Part, place: Place, broke: Break) -> str:
    """What may help within the format; without a capital or a full stop."""
    own, k = place.module, _halvings(place.record, broke)
    match part:
        case "gate-up" | "up":
            up, down = _up_and_down(place)
            return f"multiply {up} by 2^-k and {down} by 2^k, {k}, which leaves their result as it is"
        case "query" | "key":
            name = own if "/" not in place.record.site else "q_proj" if part == "query" else "k_proj"
            return f"multiply {name} by 2^-k and the attention's scale by 2^k, {k}, which leaves the scores as they are"
        case "value":
            name = own if "/" not in place.record.site else "v_proj"
            return f"multiply {name} by 2^-k and the output projection by 2^k, {k}, which leaves their result as it is"
        case "scores":
            return (
                'fold the scale into q_proj, so that the product is scaled already, or use attn_implementation="sdpa"'
            )
        case "expert":
            return "multiply by the routing weight before down_proj instead of after it"
        case "before-norm":
            return (
                f"multiply {own} by 2^-k and the eps of {_last(place.norm)} by 2^-2k, {k}, which leaves what the norm "
                "returns as it is"
            )
        case "norm":
            return "compute this norm in float32, squares and their mean included"
        case "exp":
            most = number(math.floor(100 * math.log(broke.limit)) / 100)
            return f"subtract the largest exponent first, as softmax does, or clamp the exponent; exp fits up to {most}"
        case "cache":
            return "keep keys and values in a format that holds them, or leave out what stands for no key and mask it"
        case "logits":
            return "compute the logits in float32, the product of the head alone"
        case "cast":
            return "leave this tensor in the wider dtype that it comes from until it is in range"
        case "sum":
            kept = "this sum" if place.record.operator == "add" else f"{own} and the sum that it is added to"
            return (
                f"keep {kept} in float32, or scale down by one power of two everything that is added up from layer to "
                "layer, if only norms read it"
            )
        case "other" if _fits_scaled(place.record, broke):
            return "scale an operand before this operator instead of its result"
    return ""


def _fits_scaled(record: Record, broke: Break) -> bool:
    """Whether the tensor's own format holds what the value is scaled to next."""
    form = FORMATS.get(record.dtype)
    return broke.scaled is not None and form is not None and not form.overflows(broke.scaled)


def _halvings(record: Record, broke: Break) -> str:
    """`k of at least 2`: so many halvings bring this value into the range."""
    form = FORMATS.get(record.dtype)
    if form is None or broke.value is None or not math.isfinite(broke.value) or not form.overflows(broke.value):
        return "k of at least 1"
    return f"k of at least {max(1, math.ceil(-form.headroom(abs(broke.value))))}"


def _up_and_down(place: Place) -> tuple[str, str]:
    """The names of the projections before and after a product of a gate and something else."""
    record = place.record
    down = next((r for r in place.after if r.operator == "matmul"), None)
    after = "down_proj" if down is None or "/" in down.site else _last(down.site)
    if "/" not in record.site:
        return _last(record.site), after
    sites = () if record.broke is None else record.broke.operand_sites
    before = next((site for site in sites if not is_activation(site) and "/" not in site and not is_layer(site)), None)
    named = before is not None and "." in before and not is_norm(before)
    return (_last(before) if named else "up_proj", after)


def _last(path: str | None) -> str:
    return (path or "").rpartition(".")[2]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

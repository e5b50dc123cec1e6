"""Which dtype to choose on which hardware, by what the finished cases of a sweep came to."""

from collections.abc import Sequence

from stabilitykit.records.sweep import Memory
from stabilitykit.report.blocks import Column, Table
from stabilitykit.report.outcomes import Outcome, least_headroom, standing
from stabilitykit.report.style import bits, size
from stabilitykit.report.tables import table


def dtype_to_choose(found: Sequence[Outcome], measured: Sequence[Memory]) -> Table:
    """One row a kind of hardware: the dtype, and the reasons that the finished cases give."""
    return table(
        "dtype-to-choose",
        "Which dtype to choose",
        [
            ("GPU with bfloat16", *_with_bfloat16(found)),
            ("GPU without bfloat16", *_without_bfloat16(found)),
            ("CPU only", *_cpu(found)),
        ],
        [
            (Column("hardware"), lambda row: row[0]),
            (Column("dtype"), lambda row: row[1] or "none"),
            (Column("weights", unit="bytes", format=size), lambda row: _weights(measured, row[1])),
            (Column("why"), lambda row: row[2]),
        ],
        note="Clean means: no break in any case of this sweep that finished. On a CPU without instructions for 16-bit "
        "products these are slower than float32, not faster.",
    )


def _weights(measured: Sequence[Memory], dtype: str | None) -> int | None:
    return next((memory.weights for memory in measured if memory.dtype == dtype), None)


def _with_bfloat16(found: Sequence[Outcome]) -> tuple[str | None, str]:
    state = standing(found, "bfloat16")
    if state == "clean":
        sharper = "; float16 is clean too, and rounds eight times finer, for texts like these"
        return "bfloat16", f"{_is(found, 'bfloat16')}{sharper if standing(found, 'float16') == 'clean' else ''}."
    if state == "would fit":
        return "bfloat16", f"{_is(found, 'bfloat16')}; run it to see what its rounding costs."
    return _float32(found, _is(found, "bfloat16"))


def _without_bfloat16(found: Sequence[Outcome]) -> tuple[str | None, str]:
    if standing(found, "float16") == "clean":
        return "float16", f"{_is(found, 'float16')}; a text with a larger token may still break it."
    repair = "it needs a repair first, such as scaling the residual stream down by a power of two"
    broken = standing(found, "float16") in ("breaks", "would break")
    of_range = all(o.is_of_range for o in found if o.dtype == "float16" and o.first is not None)
    return _float32(found, _is(found, "float16") + (f"; {repair}" if broken and of_range else ""))


def _cpu(found: Sequence[Outcome]) -> tuple[str | None, str]:
    dtype, why = _float32(found, "")
    if dtype is not None and standing(found, "bfloat16") in ("clean", "would fit"):
        why += f" Where memory is short, bfloat16 takes half as much: {_is(found, 'bfloat16')}."
    return dtype, why


def _float32(found: Sequence[Outcome], because: str) -> tuple[str | None, str]:
    """float32 unless it breaks as well; `because` says what spoke against another dtype."""
    lead = f"{because}; " if because else ""
    match standing(found, "float32"):
        case "clean":
            return "float32", f"{lead}{_is(found, 'float32')}."
        case "breaks":
            broken = [o for o in found if o.dtype == "float32" and o.first is not None]
            cause = "the number format is not the cause, see the verdict"
            if all(o.is_of_range for o in broken):
                cause = "values leave even its range"
            elif any(o.is_unresolved for o in broken):
                cause = "why is not known, see the verdict"
            return None, f"{lead}{_is(found, 'float32')}: {cause}."
        case "would break":
            return None, f"{lead}float32 did not run, and other dtypes stored values that would overflow it."
        case "would fit":
            return "float32", f"{lead}float32 did not run, but its range holds every value that was stored."
        case "unknown":
            return "float32", f"{lead}float32 did not run; it is the reference and the widest dtype of the three."


def _is(found: Sequence[Outcome], dtype: str) -> str:
    """A clause: how the dtype fared."""
    own = [outcome for outcome in found if outcome.dtype == dtype]
    broken = sum(outcome.first is not None for outcome in own)
    match standing(found, dtype):
        case "breaks" if len(own) == 1:
            return f"{dtype} breaks in its only case"
        case "breaks":
            return f"{dtype} breaks in {broken:,} of its {len(own):,} cases"
        case "clean":
            room = least_headroom(own)
            spare = "" if room is None else f", with at least {bits(room)} bits of headroom"
            return f"{dtype} is clean in {'its only case' if len(own) == 1 else f'all its {len(own):,} cases'}{spare}"
        case "would break":
            return f"{dtype} did not run, and other dtypes stored values that would overflow it"
        case "would fit":
            return f"{dtype} did not run, but its range holds every value that was stored"
        case "unknown":
            return f"{dtype} did not run"

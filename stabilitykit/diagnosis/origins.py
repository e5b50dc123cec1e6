"""Causes that were there before any arithmetic: weights, buffers, inputs, caches and constants that are not finite."""

from stabilitykit.diagnosis.causes import Cause
from stabilitykit.diagnosis.weights import element
from stabilitykit.formats import FORMATS
from stabilitykit.records import Break, Header, Record, StoredWeights
from stabilitykit.words import counted, number

UNNAMED = "a tensor"  # as a recording calls what nobody gave a name
_HELPLESS = "Check how the checkpoint was written and cast; no number format helps."


def of_origin(header: Header, record: Record) -> Cause | None:
    """The cause of a break that began with something not finite; None for a break of another kind."""
    broke = record.broke
    assert broke is not None
    if broke.kind == "weight":
        return _of_weight(header, broke)
    if broke.kind == "input":
        return _of_input(broke)
    if broke.kind == "constant":
        return _of_constant()
    return None


def source_of(broke: Break) -> str:
    """What was not finite to begin with: its name, or the operands that were not."""
    name = None if broke.origin_name == UNNAMED else broke.origin_name
    return name or " and ".join(broke.operand_sites) or "an operand"


def _of_weight(header: Header, broke: Break) -> Cause:
    stored, name = header.weights, source_of(broke)
    if stored is not None and stored.nonfinite and header.checkpoint is not None:
        return of_file(stored)
    if stored is not None and stored.overflow:
        return of_storing(stored)
    if broke.origin_kind == "buffer":
        return _of_buffer(header, broke, name)
    form = FORMATS.get(header.dtype)
    if stored is not None and stored.worst and stored.worst[0].nonfinite:
        worst = stored.worst[0]
        name = f"{element(worst)}, {counted(worst.nonfinite, 'element')} of it in all" if worst.index else worst.name
    if form is None or form.bits > 16:
        return Cause(
            "weights",
            f"The weights were not finite to begin with: {name}.",
            "Check how the checkpoint was written, loaded and changed before this run.",
        )
    return Cause(
        "weights",
        f"The weights were not finite to begin with: {name}. The model was in {header.dtype} when this run began, so "
        f"whether the checkpoint holds {_it(broke)} so, or a cast to {header.dtype} (such as .half()) made it so, is "
        "not known.",
        f"Look at {_it(broke)} in the checkpoint: if it is finite there, load the model in a format that holds it; if "
        "not, no number format helps.",
    )


def _it(broke: Break) -> str:
    return "them" if broke.origin_name is None and len(broke.operand_sites) > 1 else "it"


def _of_buffer(header: Header, broke: Break, name: str) -> Cause:
    if broke.rounded_from is not None:
        return Cause(
            "weights",
            f"The buffer {name} is not finite in {header.dtype} alone: it is {number(broke.rounded_from)} in a wider "
            "format.",
            f"Give it a value that {header.dtype} holds, or keep it in float32.",
        )
    return Cause(
        "weights",
        f"The buffer {name} was not finite to begin with. Whether it was made so or became so in a cast to "
        f"{header.dtype} is not known.",
        f"Look at how the model makes {name}: if its numbers are finite there, keep it in a format that holds them.",
    )


def of_storing(stored: StoredWeights) -> Cause:
    """Weights that are finite in the checkpoint, and not in the run's dtype."""
    worst = stored.worst[0]
    lost = counted(stored.overflow, "weight overflows", "weights overflow")
    where = f": {element(worst)}" if worst.value is not None else f", mostly in {worst.name}"
    value = worst.value
    holding = [name for name in ("bfloat16", "float32") if value is None or not FORMATS[name].overflows(value)]
    others = [name for name in holding if name != stored.dtype]
    return Cause(
        "range",
        f"Stored in {stored.dtype}, {lost}{where}; the checkpoint itself is finite.",
        f"Store the weights in a format with a wider range ({', '.join(others)})."
        if others
        else "Scale these weights by a power of two, and what reads their result by its inverse.",
        shown=True,
    )


def of_file(stored: StoredWeights) -> Cause:
    """Weights that the checkpoint itself holds as NaN or infinities."""
    worst, lost = stored.worst[0], counted(stored.nonfinite, "of them is", "of them are")
    more = ", ..." if worst.nonfinite < stored.nonfinite else ""
    named = element(worst) if worst.index is not None else worst.name
    block = ""
    if worst.block is not None:
        size = "" if worst.block_size is None else f" of {worst.block_size:,} weights"
        block = f" They are in block {worst.block}{size}, whose own scale is not finite."
    elif worst.role is not None:
        block = f" It is a {worst.role} that quantised weights are read with, so all of those are lost."
    return Cause(
        "weights",
        f"The weights were not finite to begin with: {lost} NaN or infinite in the checkpoint itself ({named}{more})."
        f"{block}",
        "Get the file again, or make it again from the original weights; no number format helps."
        if block
        else _HELPLESS,
    )


def may_be_weights(stored: StoredWeights) -> Cause:
    """Of a break that was seen from outside a module only, beside weights that the run's dtype does not hold."""
    lost = counted(stored.overflow, "weight overflows", "weights overflow")
    return Cause(
        "unresolved",
        f"Stored in {stored.dtype}, {lost} ({element(stored.worst[0])}), which may be the reason; only a recording of "
        "operators shows whether it is.",
        "Record operators to see how.",
    )


def _of_input(broke: Break) -> Cause:
    name = broke.origin_name
    if broke.origin_kind == "cache":
        what = f" ({name})" if name else ""
        return Cause(
            "input",
            f"A cache that was passed to the model{what} was not finite before this step: a slot of it holds NaN or "
            "infinities, or was never written.",
            "Look at what writes into the cache, and mask the slots that nothing has been written to.",
        )
    if broke.origin_kind == "outside":
        what = f" ({name})" if name and name != UNNAMED else ""
        return Cause(
            "input",
            f"What code outside the model made{what} was not finite before the model touched it.",
            "Look at that code: the model did not make it so.",
        )
    what = f"The input {name}" if name else "An input"
    return Cause("input", f"{what} was not finite before the model touched it.", "Check what is passed to the model.")


def _of_constant() -> Cause:
    return Cause(
        "constant",
        "The model's own code puts it there; no arithmetic on the model's numbers made it.",
        "Look at that line of the model. If the number is finite where it is written, this dtype does not hold it.",
    )


def constant_source(record: Record, broke: Break) -> str:
    """`masked_fill puts inf there`, or where a constant was made: `a constant that full makes is not`."""
    name = broke.origin_name
    try:
        number_put = None if name is None else float(name)
    except ValueError:
        number_put = None
    if number_put is not None:
        return f"{record.operator or 'the code'} puts {name} there"
    return f"a constant{'' if name is None else f', made by {name},'} is not"

"""What a format that did not run would make of a run's tensors, from their exact counts against its limits.

Only tensors that a low-precision run stores in low precision are judged: Gemma computes norms and softmax in float32 in
every dtype. Which those are is what `Record.stored_dtype` says.
"""

from dataclasses import dataclass

from stabilitykit.commands import again
from stabilitykit.diagnosis.layers import peak
from stabilitykit.diagnosis.places import place_of, where
from stabilitykit.diagnosis.untried import by_running
from stabilitykit.diagnosis.weights import weights_sentence
from stabilitykit.errors import MisuseError
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import Record, Recording, StoredWeights
from stabilitykit.words import counted, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What storing the judged tensors in `format` would come to, rounding to nearest, ties to even.

    `first` is the first in order of execution of which some element would leave the range, None where none would.
    `past`, `subnormal` and `zero` count elements of all `judged` tensors that would leave the range, be stored as
    subnormals, and become zero without having been one; `elements` is how many they have. `closest` has the largest
    magnitude. `weights` is what storing the checkpoint in it does, if that was counted. `saturating`: what would
    overflow becomes the format's maximum.
    """

    format: str
    judged: int
    elements: int
    first: Record | None
    past: int
    subnormal: int
    zero: int
    closest: Record | None
    weights: StoredWeights | None = None
    saturating: bool = False

    @property
    def overflow(self) -> int:
        """How many elements of `first` would leave the range."""
        return 0 if self.first is None else self.first.formats[self.format].overflow

    @property
    def headroom(self) -> float | None:
        """Bits from the magnitude of `closest` up to the format's maximum; None where nothing finite was judged."""
        amax = None if self.closest is None else self.closest.amax
        return None if amax is None else number_format(self.format).headroom(amax)

    @property
    def breaks(self) -> bool:
        """Whether an activation or a weight would overflow, and become infinite or NaN."""
        leaves = self.first is not None or (self.weights is not None and self.weights.overflow > 0)
        return leaves and not self.saturating


def forecast(
    recording: Recording, name: str, weights: StoredWeights | None = None, *, saturating: bool = False
) -> Forecast:
    """The forecast for the format called `name`, of a run that recorded counts for it.

    With `saturating` casts to 8 bits make the format's maximum of what would overflow, as the OCP's specification
    allows, NVIDIA's `satfinite` does, and torch 2.13 on a CPU does to e4m3fn; wider formats have no such cast.

    Values are the run's own: those of a float32 run are what a low-precision one computes up to its rounding errors, so
    where a value lies that close to the limit the forecast may name a neighbour. After a first overflow nothing that
    follows is what it would be.

    Raises MisuseError for an unknown format, one that was not counted, a run that broke itself, and for a run of which
    nobody found out what is stored in low precision.
    """
    form = number_format(name)
    if form.name not in recording.header.formats:
        raise MisuseError(
            f"This recording has no counts for {form.name}, only for {', '.join(recording.header.formats)}. Record "
            f"again with formats=({form.name!r}, ...)."
        )
    first = recording.first_break()
    if first is not None:
        raise MisuseError(
            f"A forecast needs a run that stays finite; this one does not, from {first.site} on. Run it in float32"
            f"{by_running('forecast', recording.header, 'float32')}."
        )
    judged = [record for record in recording if record.stored_dtype is not None and _is_low(record.stored_dtype)]
    if not judged:
        command = again("forecast", recording.header.checkpoint or "CHECKPOINT")
        raise MisuseError(
            "A forecast needs to know which tensors a 16-bit run stores in 16 bits, and this recording does not say. "
            f"Make it with `{command}`, and without an adapter or quantised weights."
        )
    counts = [(record, record.formats[form.name]) for record in judged]
    over = next((record for record, count in counts if count.overflow), None)
    return Forecast(
        format=form.name,
        judged=len(judged),
        elements=sum(record.elements - record.masked for record in judged),
        first=over,
        past=sum(count.overflow for _, count in counts),
        subnormal=sum(count.subnormal for _, count in counts),
        zero=sum(count.zero for _, count in counts),
        closest=peak(judged),
        weights=weights,
        saturating=form.saturates(asked=saturating),
    )


def prediction(recording: Recording, found: Forecast) -> str:
    """The forecast in a sentence or two."""
    form, first = number_format(found.format), found.first
    lost = found.weights is not None and found.weights.overflow > 0
    said = ""
    if found.weights is not None and lost:
        said = weights_sentence(found.weights, saturating=found.saturating) + " "
    if first is None:
        if found.closest is None or found.headroom is None:
            return f"{said}{form.name}: nothing was recorded that it would have to hold."
        what = "every activation, not every weight" if lost else "every value"
        return (
            f"{said}{form.name} would hold {what}: the largest magnitude{' of an activation' if lost else ''} is "
            f"{number(found.closest.amax)}, in {where(found.closest)}: {found.headroom:.1f} bits of headroom below the "
            f"maximum ({number(form.largest)})."
        )
    at = place_of(recording, first.amax_position, first.amax_row, first.amax_token, first.step)
    return (
        f"{said}{form.name} would {'saturate' if found.saturating else 'overflow'} first in {where(first)}: "
        f"{counted(found.overflow, 'element exceeds', 'elements exceed')} the maximum, {number(form.largest)}"
        f"{_earliest(recording, first, form)}; the largest magnitude there is {number(first.amax)}{at}."
    )


def first_position(record: Record, form: NumberFormat, rows: int = 1) -> tuple[int, int] | None:
    """Row and position, counted from the step's first, of the earliest token of which an element overflows.

    None where the run kept no magnitudes by position.
    """
    peaks = record.position_amax or ()
    if not peaks or len(peaks) != record.positions or len(peaks) % rows:
        return None
    length = len(peaks) // rows
    over = [(at % length, at // length) for at, peak in enumerate(peaks) if form.overflows(peak)]
    if not over:
        return None
    position, row = min(over)
    return row, position


def _earliest(recording: Recording, record: Record, form: NumberFormat) -> str:
    """Where the first of them is, unless the largest is that one: `, the first at token 0 '<bos>'`."""
    found = first_position(record, form, max(recording.header.rows, 1))
    if found is None:
        return ""
    row, within = found
    position = within + (recording.header.first_position(record.step) or 0)
    if (position, row) == (record.amax_position, record.amax_row or 0):
        return ""
    tokens = recording.header.tokens
    ids = tokens[row] if tokens is not None and row < len(tokens) else ()
    token = ids[position] if position < len(ids) else None
    at = place_of(recording, position, row, token, record.step)
    return f", the first{at.removeprefix(',')}"


def overflow_becomes(name: str, *, saturating: bool = False) -> str:
    """What a cast makes of a value above the format's maximum; only those to 8 bits may saturate.

    Whether one does is up to who casts: torch 2.13 on a CPU saturates to float8_e4m3fn, infinities included, and makes
    infinity of what float8_e5m2 does not hold.
    """
    form = number_format(name)
    if form.saturates(asked=saturating):
        return f"±{number(form.largest)}"
    return "±inf" if form.has_infinities else "NaN"


def _is_low(dtype: str) -> bool:
    return number_format(dtype).bits < 32

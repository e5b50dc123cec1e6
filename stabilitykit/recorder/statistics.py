"""The statistics of one tensor, exact, from one reading of its bits.

Read as an integer, the magnitude bits of a float grow with its magnitude. So counts against a few codes and one
histogram of exponents say everything at once, without a cast that could itself overflow: zeros, subnormals,
infinities, NaN, and what would overflow or vanish elsewhere. Sums are taken in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.blocks import Part
from stabilitykit.recorder.kernels import device, plain
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import FIELDS, SHRINK, Edges, Field, edges
from stabilitykit.recorder.kernels.positions import position_peaks
from stabilitykit.recorder.tensors import measurable
from stabilitykit.records import FormatCounts, index_at

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What `measure` found; None where there is no finite element (`smallest`: no finite non-zero one)."""

    elements: int
    masked: int
    nan: int
    positive_inf: int
    negative_inf: int
    zero: int = 0
    subnormal: int = 0
    amax: float | None = None
    smallest: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    rms: float | None = None
    exponent_first: int = 0
    exponents: tuple[int, ...] = ()
    formats: dict[str, FormatCounts]
    amax_index: tuple[int, ...] | None = None

    @property
    def nonfinite(self) -> int:
        return self.nan + self.positive_inf + self.negative_inf


def measure(tensor: Tensor, formats: Sequence[str], masked: Tensor | None = None) -> Statistics:
    """The statistics of a floating tensor of any shape, strides and device, empty ones included.

    Elements where `masked`, boolean and of the tensor's shape, is True count in `elements` and `masked` and
    nowhere else: a mask's minimum is no large value, and its -inf no overflow.

    `amax_index` is that of the first element with the largest finite magnitude, in row-major order; −0
    counts as zero. float8 tensors are measured through float32, which holds all their values.
    """
    tensor = measurable(tensor.detach())
    if masked is not None:
        tensor = tensor.masked_fill(masked, 0.0)  # kernels let NaN under a mask count: there it is the model's own
    against = edges(tensor.dtype, tuple(formats))
    row = tally(tensor, against, masked)
    return decode(row.numpy(force=True) if isinstance(row, Tensor) else row, against, tensor.shape)


def tally(tensor: Tensor, against: Edges, hidden: Tensor | None = None, limit: float = math.inf) -> Row | Tensor:
    """What `decode` reads: a row of `layout`, by the kernel of the tensor's device, and still there if not on a CPU."""
    kind = tensor.device.type
    if kind == "cpu":
        return _cpu_kernels()[0](tensor, against, hidden, limit)
    if kind == "meta":
        return _of_none(tensor, against)
    if kind == "mps":  # has no float64 to sum in
        return tally(tensor.cpu(), against, None if hidden is None else hidden.cpu(), limit)
    if device.runs_triton(tensor.device):
        return _cuda_kernel()(tensor, against, hidden, limit)
    return plain.tally(tensor, against, hidden, limit)


def tally_by_position(
    tensor: Tensor, against: Edges, axes: Axes, hidden: Tensor | None = None, limit: float = math.inf
) -> tuple[Row | Tensor, Tensor]:
    """As `tally`, with the largest finite magnitude that is not masked by row and position; 0 where there is none.

    `axes` must have a position.
    """
    if tensor.device.type == "cpu":
        return _cpu_kernels()[1](tensor, against, axes, hidden, limit)
    masked = None if hidden is None else hidden & (tensor <= limit)
    return tally(tensor, against, hidden, limit), position_peaks(tensor, axes, masked)


def _of_none(tensor: Tensor, against: Edges) -> Row:
    """Of a tensor whose elements have no values: none of them counts."""
    row = np.zeros(against.width)
    row[Field.MASKED], row[Field.AMAX], row[Field.SCALE] = tensor.numel(), -1.0, 1.0
    return row


@cache
def _cpu_kernels() -> tuple[Callable[..., Row], Callable[..., tuple[Row, Tensor]]]:
    from stabilitykit.recorder.kernels import cpu  # numba, only when something is measured

    return cpu.tally, cpu.tally_by_position


@cache
def _cuda_kernel() -> Callable[..., Tensor]:
    from stabilitykit.recorder.kernels import cuda  # Triton, which other machines may lack

    return cuda.tally


def joined(first: Row | None, row: Row, part: Part | None) -> Row:
    """The row of a tensor of whose parts `first` has counted some, and `row` one more.

    Of equal peaks the first in row-major order counts, as everywhere.
    """
    if part is not None and row[Field.AMAX] >= 0:
        row[Field.INDEX] = part.index(int(row[Field.INDEX]))
    if first is None:
        return row
    with np.errstate(over="ignore", invalid="ignore"):  # of float64 sums, for which there is SHRUNK
        both: Row = first + row
    best = min(first, row, key=lambda one: (-one[Field.AMAX], one[Field.INDEX]))
    both[[Field.AMAX, Field.INDEX]] = best[[Field.AMAX, Field.INDEX]]
    for least in (Field.SMALLEST, Field.MINIMUM):
        both[least] = min(first[least], row[least])
    both[Field.MAXIMUM] = max(first[Field.MAXIMUM], row[Field.MAXIMUM])
    scale = max(first[Field.SCALE], row[Field.SCALE])
    both[Field.SCALE] = scale
    both[Field.SQUARES] = sum(one[Field.SQUARES] * (one[Field.SCALE] / scale) ** 2 for one in (first, row))
    return both


def decode(row: Row, against: Edges, shape: Sequence[int], elements: int | None = None) -> Statistics:
    """The statistics that a kernel counted of a tensor of this shape, or of as many of its elements."""
    elements = math.prod(shape) if elements is None else elements
    masked, nan, plus, minus, amax, index, smallest, minimum, maximum, total, squares, scale, shrunk = row[
        :FIELDS
    ].tolist()
    counted = elements - int(masked + nan + plus + minus)
    counts = partial(
        Statistics,
        elements=elements,
        masked=int(masked),
        nan=int(nan),
        positive_inf=int(plus),
        negative_inf=int(minus),
    )
    if not counted:
        return counts(
            formats=dict.fromkeys(against.formats, FormatCounts(0, 0, 0)),
        )
    bins = FIELDS + against.count
    held = row[bins:].nonzero()[0]
    first, last = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
    exponents = list(map(int, row[bins + first : bins + last].tolist()))
    at_least = list(accumulate(reversed(exponents), initial=0))[::-1]  # by exponent, from the first that is held
    nonzero = at_least[0]
    codes = list(map(int, row[FIELDS:bins].tolist()))

    def reaching(code: int) -> int:
        place = against.at_least[code]
        if place < bins:
            return codes[place - FIELDS]
        return at_least[min(max(place - bins - first, 0), last - first)]

    return counts(
        zero=counted - nonzero,
        subnormal=nonzero - reaching(against.normal),
        amax=amax,
        smallest=smallest if nonzero else None,
        minimum=minimum,
        maximum=maximum,
        mean=total / counted if math.isfinite(total) else min(max(shrunk / counted * SHRINK, minimum), maximum),
        rms=math.sqrt(squares / counted) * scale,
        exponent_first=against.lowest + first if exponents else against.own_lowest,
        exponents=tuple(exponents),
        formats={
            name: FormatCounts(
                overflow=reaching(over),
                subnormal=reaching(not_zero) - reaching(normal),
                zero=nonzero - reaching(not_zero),
            )
            for name, (not_zero, normal, over) in against.formats.items()
        },
        amax_index=index_at(int(index), shape),
    )

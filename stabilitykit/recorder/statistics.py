"""The statistics of one tensor, exact, in one pass over its bits.

Read as an integer, the magnitude bits of a float grow with its magnitude. So one histogram of those codes,
with an edge at every power of two and at every threshold that any format asks about, gives all counts at
once, without a cast that could itself overflow: zeros, subnormals, infinities, NaN, and what would overflow
or vanish elsewhere. Sums are taken in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import FormatCounts, index_at

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What `measure` found; None where there is no finite element (`smallest`: no finite non-zero one).

    `measure_peaks` leaves `zero` and `subnormal` None too.
    """

    elements: int
    masked: int
    nan: int
    positive_inf: int
    negative_inf: int
    zero: int | None = 0
    subnormal: int | None = 0
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


@dataclass(frozen=True, slots=True)
class _Edges:
    """Ascending codes; counts at or above `codes[i]` answer every question below by its index."""

    codes: tuple[int, ...]
    nonzero: int
    normal: int
    infinity: int
    nan: int
    powers: tuple[int, ...]  # of 2^exponent_first, 2^(exponent_first + 1), ...
    exponent_first: int
    formats: dict[str, tuple[int, int, int]]  # not rounded to zero, not to a subnormal, overflowing


def measure(tensor: Tensor, formats: Sequence[str], masked: Tensor | None = None) -> Statistics:
    """The statistics of a floating tensor of any shape, strides and device, empty ones included.

    Elements where `masked`, boolean and of the tensor's shape, is True count in `elements` and `masked` and
    nowhere else: a mask's minimum is no large value, and its -inf no overflow.

    `amax_index` is that of the first element with the largest finite magnitude, in row-major order; −0
    counts as zero. float8 tensors are measured through float32, which holds all their values.
    """
    tensor = tensor.detach()
    if tensor.device.type == "mps":  # has no float64 to sum in
        tensor, masked = tensor.cpu(), None if masked is None else masked.cpu()
    tensor = measurable(tensor)
    edges = _edges(tensor.dtype, tuple(formats))
    elements = tensor.numel()
    hidden = 0 if masked is None else int(masked.sum())
    if hidden == elements:
        return _without_finite_elements(elements, hidden, 0, 0, 0, formats)
    if masked is not None and hidden:
        tensor = tensor.masked_fill(masked, 0)
    codes = magnitude_codes(tensor).reshape(-1)
    bins = torch.bucketize(codes, _bounds(edges.codes, codes.dtype, codes.device), right=True, out_int32=True).bincount(
        minlength=len(edges.codes) + 1
    )
    at_least = list(accumulate(reversed(bins.tolist())))[::-1][1:]

    nonfinite, nan = at_least[edges.infinity], at_least[edges.nan]
    positive_inf = int((tensor == math.inf).sum()) if nonfinite > nan else 0
    negative_inf = nonfinite - nan - positive_inf
    counted = elements - hidden - nonfinite
    if counted == 0:
        return _without_finite_elements(elements, hidden, nan, positive_inf, negative_inf, formats)

    if nonfinite:
        codes = torch.where(codes >= edges.codes[edges.infinity], -1, codes)
    finite = tensor
    if nonfinite or hidden:
        keep = (codes >= 0).view(tensor.shape)
        finite = tensor[keep if masked is None else keep & ~masked]
    peak = int(codes.argmax())
    index = index_at(peak, tensor.shape)
    nonzero = at_least[edges.nonzero] - nonfinite
    smallest = int(torch.where(codes > 0, codes, torch.iinfo(codes.dtype).max).min()) if nonzero else 0
    low, high = torch.aminmax(finite)
    powers = [at_least[i] for i in edges.powers] + [nonfinite]
    exponents = [above - below for above, below in pairwise(powers)]
    held = [i for i, count in enumerate(exponents) if count]
    first, last = (held[0], held[-1] + 1) if held else (0, 0)
    return Statistics(
        elements=elements,
        masked=hidden,
        nan=nan,
        positive_inf=positive_inf,
        negative_inf=negative_inf,
        zero=elements - hidden - at_least[edges.nonzero],
        subnormal=at_least[edges.nonzero] - at_least[edges.normal],
        amax=abs(float(tensor[index])),
        smallest=_value(smallest, tensor.dtype) if nonzero else None,
        minimum=float(low),
        maximum=float(high),
        mean=float(finite.sum(dtype=torch.float64)) / counted,
        rms=_rms(finite),
        exponent_first=edges.exponent_first + first,
        exponents=tuple(exponents[first:last]),
        formats={
            name: FormatCounts(
                overflow=at_least[over] - nonfinite,
                subnormal=at_least[not_zero] - at_least[normal],
                zero=at_least[edges.nonzero] - at_least[not_zero],
            )
            for name, (not_zero, normal, over) in edges.formats.items()
        },
        amax_index=index,
    )


def measurable(tensor: Tensor) -> Tensor:
    """The same values in a dtype that has order and bits: complex numbers as pairs, float8 as float32."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor if tensor.dtype in _INTEGERS else tensor.float()


def magnitude_codes(tensor: Tensor) -> Tensor:
    """The bits below the sign as integers of the tensor's width: ordered as the magnitudes are, NaN on top."""
    integers = _INTEGERS[tensor.dtype]
    return tensor.view(integers) & torch.iinfo(integers).max


def infinity_code(dtype: torch.dtype) -> int:
    return int(magnitude_codes(torch.tensor(math.inf, dtype=dtype)))


def _rms(finite: Tensor) -> float:
    """Root of the mean square, scaled so that float64 does not overflow on its own largest numbers."""
    scale = float(finite.abs().max()) if finite.dtype == torch.float64 else 1.0
    norm = float(torch.linalg.vector_norm(finite / scale if scale not in (0.0, 1.0) else finite, dtype=torch.float64))
    return norm / math.sqrt(finite.numel()) * (scale or 1.0)


def _without_finite_elements(
    elements: int, masked: int, nan: int, positive_inf: int, negative_inf: int, formats: Sequence[str]
) -> Statistics:
    return Statistics(
        elements=elements,
        masked=masked,
        nan=nan,
        positive_inf=positive_inf,
        negative_inf=negative_inf,
        formats=dict.fromkeys(formats, FormatCounts(0, 0, 0)),
    )


def _value(code: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(code, dtype=_INTEGERS[dtype]).view(dtype))


def _code_at(value: float, dtype: torch.dtype, *, above: bool = False) -> int:
    """The smallest magnitude code of `dtype` whose value is at least `value` (`above`: greater than it)."""
    code = int(magnitude_codes(torch.tensor(value, dtype=torch.float64).to(dtype)))
    held = _value(code, dtype)
    return code + 1 if held < value or (above and held == value) else code


@lru_cache(maxsize=64)
def _bounds(codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or it could not be used again outside of that mode
        return torch.tensor(codes, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _edges(dtype: torch.dtype, formats: tuple[str, ...]) -> _Edges:
    own = number_format(str(dtype))
    infinity = infinity_code(dtype)
    lowest = own.emin - own.precision + 1
    powers = [_code_at(math.ldexp(1.0, exponent), dtype) for exponent in range(lowest, own.emax + 1)]
    asked_for = {name: thresholds(number_format(name), dtype) for name in formats}
    asked = {1, _code_at(own.smallest_normal, dtype), infinity, infinity + 1, *powers}
    asked |= {code for codes in asked_for.values() for code in codes}
    codes = tuple(sorted(asked))
    where = {code: i for i, code in enumerate(codes)}
    return _Edges(
        codes=codes,
        nonzero=where[1],
        normal=where[_code_at(own.smallest_normal, dtype)],
        infinity=where[infinity],
        nan=where[infinity + 1],
        powers=tuple(where[code] for code in powers),
        exponent_first=lowest,
        formats={name: (where[a], where[b], where[c]) for name, (a, b, c) in asked_for.items()},
    )


@lru_cache(maxsize=64)
def thresholds(target: NumberFormat, dtype: torch.dtype) -> tuple[int, int, int]:
    """Codes of `dtype` from which rounding to `target` no longer gives zero, a subnormal, a finite value.

    Half the smallest subnormal is a tie that goes to zero; half of it below the smallest normal is one that
    goes to the normal.
    """
    infinity = infinity_code(dtype)
    half = target.smallest_subnormal / 2  # 0.0 for float64, whose thresholds are then exact anyway
    edge, tie_overflows = target.overflow_edge
    not_zero = _code_at(half, dtype, above=True) if half else 1
    return (
        min(not_zero, infinity),
        min(_code_at(target.smallest_normal - half, dtype), infinity),
        min(_code_at(edge, dtype, above=not tie_overflows), infinity),
    )

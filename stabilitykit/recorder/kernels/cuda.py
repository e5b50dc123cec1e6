"""The tally of a CUDA tensor in Triton: one kernel reads it once, another adds up what the first one's programs found.

Nothing waits for the device, and nothing is copied to it: the codes that elements are counted against are constants of
the compiled kernel. Triton compiles one for each dtype, choice of formats and kind of strides when it is first needed
and keeps it on disk.

Counts and peaks are exact. Magnitudes are compared and counted as integers, so no mode of the floating-point units can
flush a subnormal; sums are taken in float64, in an order that depends on the shape and the device alone.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from stabilitykit.recorder.kernels import device
from stabilitykit.recorder.kernels.layout import FIELDS, SHRINK, Edges, Field

_BLOCK = 1024  # elements that a program looks at together, eight in each thread
_BLOCK_OF_FLOAT64 = 512
_BLOCKS = 4  # that one program takes at least: fewer and the second kernel would cost more than it saves
_COLUMNS = 32  # of a row, that one program of the second kernel adds up

_MASKED, _NAN, _PLUS, _MINUS, _AMAX, _INDEX, _SMALLEST, _MINIMUM, _MAXIMUM, _SUM, _SQUARES, _SCALE, _SHRUNK = (
    tl.constexpr(int(field)) for field in Field
)
_FIELDS = tl.constexpr(FIELDS)
_SHRINK = tl.constexpr(1 / SHRINK)
_STEP = tl.constexpr(32)  # rows that the second kernel reads together
_LARGE, _SMALL = tl.constexpr(2.0**500), tl.constexpr(2.0**-500)  # beyond these float64's squares leave its range
_UP, _DOWN = tl.constexpr(2.0**600), tl.constexpr(2.0**-600)


def tally(tensor: Tensor, edges: Edges, hidden: Tensor | None = None, limit: float = math.inf) -> Tensor:
    """A row as in `layout`, float64 on the tensor's device, of a tensor of a dtype of `FLOATS`, with any strides.

    An element is masked where `hidden`, boolean and of the tensor's shape, is True and it is not above `limit`; NaN
    never is. Of equal magnitudes INDEX is that of the first in row-major order, 0 if no element is finite. −0 counts as
    zero. SCALE is a power of two; for float64 one with which no square leaves the range.
    """
    places: tuple[int, ...]
    parts = [tensor.detach()] if hidden is None else [tensor.detach(), hidden]
    elements = tensor.numel()
    if elements == 0 or all(part.is_contiguous() for part in parts):
        places, dimensions = (1,) * 15, 0
    else:
        parts, places, dimensions = device.walked(parts)
        if dimensions == 1 and all(stride == 1 for stride in places[9::5]):
            dimensions = 0
    block = _BLOCK_OF_FLOAT64 if tensor.dtype == torch.float64 else _BLOCK
    even = elements % 16 == 0
    programs = max(1, min(device.programs(tensor.device), elements // (block * _BLOCKS)))
    table = torch.empty((programs, edges.width), dtype=torch.float64, device=tensor.device)
    with device.current(tensor.device):
        count[(programs,)](
            parts[0],
            parts[-1],
            table,
            elements // 16 if even else elements,
            _key(limit, edges.wide),
            *places[1:10],
            *places[-5:],
            CODES=_codes(edges),
            COUNT=edges.count,
            KINDS=device.power_of_two(edges.count + 5),
            BINS=edges.bins,
            HIDDEN=hidden is not None,
            DIMENSIONS=dimensions,
            LARGE=device.large(parts),
            EVEN=even,
            BLOCK=block,
        )
        if programs == 1:
            return table[0]
        row = torch.empty(edges.width, dtype=torch.float64, device=tensor.device)
        grid = (1 + triton.cdiv(edges.width - FIELDS, _COLUMNS),)
        merge[grid](table, row, programs, edges.width, ROWS=device.power_of_two(programs), COLUMNS=_COLUMNS)
    return row


@lru_cache(maxsize=64)
def _codes(edges: Edges) -> tuple[int, ...]:
    return tuple(edges.codes.tolist())


@lru_cache(maxsize=256)
def _key(limit: float, wide: torch.dtype) -> int:
    """An integer that is as large among those of all numbers as `limit` among numbers; +0's is above −0's."""
    floating, integer = (np.float64, np.int64) if wide == torch.float64 else (np.float32, np.int32)
    with np.errstate(over="ignore"):
        bits = int((np.float64(limit) + 0.0).astype(floating).view(integer))  # −0 + 0 is +0, and both are within it
    return bits if bits >= 0 else bits ^ np.iinfo(integer).max


# Below is what Triton compiles.


@triton.jit
def wide_bits(stored):
    """The bits, int32, of the float32 that a number of 32 bits or fewer is; of a float64, int64, its own."""
    if stored.dtype == tl.float64:
        bits = stored.to(tl.int64, bitcast=True)
    elif stored.dtype == tl.float32:
        bits = stored.to(tl.int32, bitcast=True)
    elif stored.dtype == tl.bfloat16:
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:  # a float16's subnormals are normal in float32
        bits = stored.to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def value_of(bits):
    """The float32 or float64 with these bits."""
    if bits.dtype == tl.int64:
        value = bits.to(tl.float64, bitcast=True)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def ordered(bits):
    """Integers that are in the order of the numbers with these bits; twice applied it is undone. +0 is above −0."""
    if bits.dtype == tl.int64:
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key


@triton.jit
def offset(flat, n1, n2, n3, n4, s0, s1, s2, s3, s4, DIMENSIONS: tl.constexpr):
    """Where the elements with these row-major indices lie, of the last DIMENSIONS of five; 0: all in one piece."""
    if DIMENSIONS == 0:
        at = flat
    else:
        at = tl.zeros_like(flat)
        if DIMENSIONS > 1:
            at += flat % n4 * s4
            flat = flat // n4
        if DIMENSIONS > 2:
            at += flat % n3 * s3
            flat = flat // n3
        if DIMENSIONS > 3:
            at += flat % n2 * s2
            flat = flat // n2
        if DIMENSIONS > 4:
            at += flat % n1 * s1
            flat = flat // n1
        if DIMENSIONS == 5:
            at += flat * s0
        elif DIMENSIONS == 4:
            at += flat * s1
        elif DIMENSIONS == 3:
            at += flat * s2
        elif DIMENSIONS == 2:
            at += flat * s3
        else:
            at += flat * s4
    return at


@triton.jit(
    do_not_specialize="elements limit n1 n2 n3 n4 s0 s1 s2 s3 s4 h0 h1 h2 h3 h4".split(),
    do_not_specialize_on_alignment=["hidden"],
)
def count(
    data,
    hidden,
    out,
    elements,
    limit,
    n1,
    n2,
    n3,
    n4,
    s0,
    s1,
    s2,
    s3,
    s4,
    h0,
    h1,
    h2,
    h3,
    h4,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    KINDS: tl.constexpr,
    BINS: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    LARGE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes to `out[program]` a row of `layout` for every so many-th block of elements.

    Each lane keeps its own extremes and sums until the end. Everything else is counted by histograms, which need no
    more than one look at a block: of exponent fields, of the leading bits of subnormal numbers, and of kinds. An
    element's kind is the number of CODES that its own reaches or, above COUNT, masked, NaN, +inf, -inf. The bins at 0
    take what is not to be counted.
    """
    STORED: tl.constexpr = data.dtype.element_ty
    WIDE: tl.constexpr = STORED == tl.float64
    INTEGER: tl.constexpr = tl.int64 if WIDE else tl.int32
    FLOATING: tl.constexpr = tl.float64 if WIDE else tl.float32
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    MANTISSA: tl.constexpr = 52 if WIDE else 23
    BIAS: tl.constexpr = 1023 if WIDE else 127
    MAGNITUDE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    INFINITY: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    NARROW: tl.constexpr = STORED == tl.float16  # whose exponents are few, and none subnormal in float32
    BEFORE: tl.constexpr = 102 if NARROW else 0  # the exponent field before the first that is counted
    PLACES: tl.constexpr = 64 if NARROW else 2 * (BIAS + 1)
    LEADING: tl.constexpr = 64 if WIDE else 32

    elements = elements.to(INDEX)
    if EVEN:  # so that the compiler knows, which then reads several elements at once
        elements = elements * 16
    lanes = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1, INTEGER)
    where = tl.zeros([BLOCK], INDEX)
    least = tl.full([BLOCK], INFINITY, INTEGER)
    lowest = tl.full([BLOCK], INFINITY, INTEGER)
    highest = tl.full([BLOCK], -INFINITY - 1, INTEGER)
    total = tl.zeros([BLOCK], tl.float64)
    shrunk = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    large_squares = tl.zeros([BLOCK], tl.float64)
    small_squares = tl.zeros([BLOCK], tl.float64)
    places = tl.zeros([PLACES], tl.int32)
    leading = tl.zeros([LEADING], tl.int32)
    kinds = tl.zeros([KINDS], tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        flat = tl.full([BLOCK], block, INDEX) * BLOCK + lanes
        inside = flat < elements
        at = offset(flat, n1, n2, n3, n4, s0, s1, s2, s3, s4, DIMENSIONS)
        bits = wide_bits(tl.load(data + at, mask=inside, other=0.0))
        code = bits & MAGNITUDE
        key = ordered(bits)
        kept = inside & (code < INFINITY)
        kind = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(COUNT):
            kind += (code >= CODES[i]).to(tl.int32)
        infinite = tl.where(bits < 0, COUNT + 4, COUNT + 3)
        kind = tl.where(code < INFINITY, kind, tl.where(code > INFINITY, COUNT + 2, infinite))
        if HIDDEN:
            at = offset(flat, n1, n2, n3, n4, h0, h1, h2, h3, h4, DIMENSIONS)
            hides = tl.load(hidden + at, mask=inside, other=0) != 0
            masked = hides & (key <= limit) & (code <= INFINITY)
            kept = kept & (masked == 0)
            kind = tl.where(masked, COUNT + 1, kind)
        kinds += tl.histogram(tl.where(inside, kind, 0), KINDS)

        code = tl.where(kept, code, -1)
        more = code > most  # of equal ones in a lane the first stays
        most = tl.where(more, code, most)
        where = tl.where(more, flat, where)
        least = tl.minimum(least, tl.where(code > 0, code, INFINITY))
        lowest = tl.minimum(lowest, tl.where(kept, key, INFINITY))
        highest = tl.maximum(highest, tl.where(kept, key, -INFINITY - 1))
        field = (code >> MANTISSA).to(tl.int32)
        places += tl.histogram(tl.maximum(field - BEFORE, 0), PLACES)
        if not NARROW:  # a subnormal's code is its significand: as a number of its own it has an exponent field
            significand = tl.where(field == 0, code, 0).to(FLOATING).to(INTEGER, bitcast=True)
            leading += tl.histogram(tl.maximum((significand >> MANTISSA).to(tl.int32) - (BIAS - 1), 0), LEADING)

        value = value_of(tl.where(kept, bits, 0)).to(tl.float64)
        total += value
        if WIDE:
            shrunk += value * _SHRINK
            magnitude = value_of(tl.where(kept, code, 0))
            is_large, is_small = magnitude > _LARGE, magnitude < _SMALL
            scaled = magnitude * tl.where(is_large, _DOWN, tl.where(is_small, _UP, 1.0))
            square = scaled * scaled
            large_squares += tl.where(is_large, square, 0.0)
            small_squares += tl.where(is_small, square, 0.0)
            squares += tl.where(is_large | is_small, 0.0, square)
        else:
            squares += value * value

    out += tl.program_id(0).to(tl.int64) * (_FIELDS + COUNT + BINS)
    peak = tl.max(most, axis=0)
    first = tl.min(tl.where(most == peak, where.to(tl.int64), 0x7FFFFFFFFFFFFFFF), axis=0)
    tl.store(out + _AMAX, tl.where(peak < 0, -1.0, value_of(tl.maximum(peak, 0)).to(tl.float64)))
    tl.store(out + _INDEX, first.to(tl.float64))
    tl.store(out + _SMALLEST, value_of(tl.min(least, axis=0)).to(tl.float64))
    tl.store(out + _MINIMUM, value_of(ordered(tl.min(lowest, axis=0))).to(tl.float64))
    tl.store(out + _MAXIMUM, value_of(ordered(tl.max(highest, axis=0))).to(tl.float64))
    tl.store(out + _SUM, tl.sum(total, axis=0))
    tl.store(out + _SHRUNK, tl.sum(shrunk, axis=0))
    middle = tl.sum(squares, axis=0)
    if WIDE:
        large = tl.sum(large_squares, axis=0)
        small = tl.sum(small_squares, axis=0)
        scale = tl.where(large > 0, _UP, tl.where(middle > 0, 1.0, tl.where(small > 0, _DOWN, 1.0)))
        sum_of_squares = rescaled(large, _UP, scale) + rescaled(middle, 1.0, scale) + rescaled(small, _DOWN, scale)
        tl.store(out + _SQUARES, sum_of_squares)
        tl.store(out + _SCALE, scale)
    else:
        tl.store(out + _SQUARES, middle)
        tl.store(out + _SCALE, 1.0)

    kind = tl.arange(0, KINDS)
    fields = out + tl.where(kind == COUNT + 1, _MASKED, tl.where(kind == COUNT + 2, _NAN, 0))
    fields += tl.where(kind == COUNT + 3, _PLUS, tl.where(kind == COUNT + 4, _MINUS, 0))
    tl.store(fields, kinds.to(tl.float64), mask=(kind > COUNT) & (kind <= COUNT + 4))
    reaches = (kind[None, :] > kind[:, None]) & (kind[None, :] <= COUNT)
    at_least = tl.sum(tl.where(reaches, kinds[None, :], 0), axis=1)
    tl.store(out + _FIELDS + kind, at_least.to(tl.float64), mask=kind < COUNT)
    out += _FIELDS + COUNT
    place = tl.arange(0, PLACES)
    at = place + (BEFORE + MANTISSA - 1)
    tl.store(out + at, places.to(tl.float64), mask=(place > 0) & (at < BINS))
    if NARROW:  # nothing is in the bins on either side
        at = tl.arange(0, 512)
        empty = (at < BEFORE + MANTISSA) | ((at >= BEFORE + MANTISSA - 1 + PLACES) & (at < BINS))
        tl.store(out + at, tl.zeros([512], tl.float64), mask=empty)
    else:
        place = tl.arange(0, LEADING)
        tl.store(out + place - 1, leading.to(tl.float64), mask=(place > 0) & (place <= MANTISSA))


@triton.jit
def rescaled(squares, scale, target):
    """A sum of squares of numbers divided by `scale`, as if they had been divided by `target`.

    Where `scale` is greater the sum is zero. Two steps of _UP below `target` are taken for one: the sum is then below
    1e-250 of the other either way.
    """
    return tl.where(target > scale, squares * _DOWN * _DOWN, squares)  # _DOWN * _DOWN itself would be zero


@triton.jit(do_not_specialize=["rows", "width"])
def merge(table, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes to `out` what the rows of `table` say together; its first program the fields, each other some counts."""
    if tl.program_id(0) == 0:
        each = tl.arange(0, ROWS)
        given = each < rows
        row = table + each.to(tl.int64) * width
        amax = tl.load(row + _AMAX, mask=given, other=-1.0)
        peak = tl.max(amax, axis=0)
        index = tl.load(row + _INDEX, mask=given & (amax == peak), other=float("inf"))
        tl.store(out + _AMAX, peak)
        tl.store(out + _INDEX, tl.min(index, axis=0))
        tl.store(out + _SMALLEST, tl.min(tl.load(row + _SMALLEST, mask=given, other=float("inf")), axis=0))
        tl.store(out + _MINIMUM, tl.min(tl.load(row + _MINIMUM, mask=given, other=float("inf")), axis=0))
        tl.store(out + _MAXIMUM, tl.max(tl.load(row + _MAXIMUM, mask=given, other=float("-inf")), axis=0))
        tl.store(out + _MASKED, tl.sum(tl.load(row + _MASKED, mask=given, other=0.0), axis=0))
        tl.store(out + _NAN, tl.sum(tl.load(row + _NAN, mask=given, other=0.0), axis=0))
        tl.store(out + _PLUS, tl.sum(tl.load(row + _PLUS, mask=given, other=0.0), axis=0))
        tl.store(out + _MINUS, tl.sum(tl.load(row + _MINUS, mask=given, other=0.0), axis=0))
        tl.store(out + _SUM, tl.sum(tl.load(row + _SUM, mask=given, other=0.0), axis=0))
        tl.store(out + _SHRUNK, tl.sum(tl.load(row + _SHRUNK, mask=given, other=0.0), axis=0))
        squares = tl.load(row + _SQUARES, mask=given, other=0.0)
        scales = tl.load(row + _SCALE, mask=given, other=1.0)
        scale = tl.max(tl.where(squares > 0, scales, 0.0), axis=0)
        scale = tl.where(scale > 0, scale, 1.0)
        tl.store(out + _SQUARES, tl.sum(rescaled(squares, scales, scale), axis=0))
        tl.store(out + _SCALE, scale)
    else:
        column = _FIELDS + (tl.program_id(0) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        counts = tl.zeros([COLUMNS], tl.float64)
        for start in range(0, rows, _STEP):
            each = start + tl.arange(0, _STEP)
            given = (each < rows)[:, None] & (column < width)[None, :]
            read = tl.load(table + each.to(tl.int64)[:, None] * width + column[None, :], mask=given, other=0.0)
            counts += tl.sum(read, axis=0)
        tl.store(out + column, counts, mask=column < width)

"""The tally of a CPU tensor: one function in machine code, run by torch's own threads.

A block of elements is read once, widened exactly where it has 16 bits, and stays in the first cache while it is looked
at: magnitudes as integers, exponents as bytes, counted by comparisons that the processor makes 32 at a time. numba
compiles the function when it is first needed and keeps it on disk.
"""

import ctypes
import math
import struct
import threading
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.kernels import plain
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import FIELDS, Edges, Field
from stabilitykit.recorder.kernels.machine import (
    FASTER,
    Compiled,
    address_of,
    as_function,
    copy,
    float_of,
    pointer,
    run,
    taken,
    widen_bfloat16,
    widen_float16,
)
from stabilitykit.recorder.kernels.places import OUTER, joined
from stabilitykit.recorder.kernels.positions import positions
from stabilitykit.recorder.kernels.vectors import AT_ONCE, BYTES, GROUP, counts, scan, vector_holding, vector_with

_BLOCK = 4096  # elements; their codes, exponents and widened bits fit the smallest first caches
_CHUNK = 1 << 14  # elements that one thread takes at a time
_MANY = 96  # exponents in one block, from which on counting one by one is faster
_FEW = 16  # elements of one exponent in a block, up to which they are looked for by it
_FIELDS = 1 << 11  # values of an exponent's field
_ROOM = 3 << 17  # bytes that a thread has for its blocks and its row
_PIECE = 1 << 15  # numbers, about a hundred rows
_LEAST_SQUARES = 1e-280  # a smaller sum may have lost some to float64's own subnormals

# The arguments are 64-bit: three counters of the kernel's own, addresses, sizes, and one float64.
_NEXT, _WORKERS, _FINISHED, _DATA, _HIDDEN, _LIMIT, _EDGES, _EDGE_COUNT, _OUT, _WIDTH, _SCRATCH, _ELEMENTS = range(12)
_PLACES, _POSITIONS, _PEAKS = range(12, 15)
_ARGUMENTS = 15
_PACKED = struct.Struct("<5qd9q")
# The places, at an address of their own: a shape, the strides of the tensor and of the mask.
_STRIDES, _HIDDEN_STRIDES = OUTER + 1, 2 * (OUTER + 1)

_MASKED, _NAN, _PLUS, _MINUS, _AMAX, _INDEX, _SMALLEST, _MINIMUM, _MAXIMUM, _SUM, _SQUARES, _SCALE = (
    int(field) for field in Field if field is not Field.SHRUNK
)  # SHRUNK stays 0: where a sum overflows, so do the squares, and `plain` counts


def tally(tensor: Tensor, edges: Edges, hidden: Tensor | None = None, limit: float = math.inf) -> NDArray[np.float64]:
    """A row as in `layout`, of a tensor on the CPU, of a dtype of `FLOATS`, with any strides.

    An element is masked where `hidden`, boolean and of the tensor's shape, is True and it is not above `limit`.
    """
    return _tally(tensor, edges, hidden, limit, 0, 0)


def tally_by_position(
    tensor: Tensor, edges: Edges, axes: Axes, hidden: Tensor | None = None, limit: float = math.inf
) -> tuple[NDArray[np.float64], Tensor]:
    """As `tally`, with the largest finite magnitude that is not masked by row and position, as `positions` gives it."""
    found, wide = positions(axes), tensor.dtype == torch.float64
    threads = _threads(tensor.numel())
    codes = np.zeros((threads, *found.shape), np.int64 if wide else np.int32)
    row = _tally(tensor, edges, hidden, limit, found.address, codes.ctypes.data)
    peaks = codes[0] if threads == 1 else codes.max(axis=0)
    return row, torch.from_numpy(peaks.view(np.float64 if wide else np.float32))


def _threads(elements: int) -> int:
    return 1 if elements <= _CHUNK else min(torch.get_num_threads(), -(-elements // _CHUNK))


def _tally(
    tensor: Tensor, edges: Edges, hidden: Tensor | None, limit: float, positions: int, peaks: int
) -> NDArray[np.float64]:
    """`positions` and `peaks` are addresses: of the numbers that say what is whose, and of codes for each thread."""
    elements = tensor.numel()
    threads = _threads(elements)
    places = 0  # one piece of memory
    if hidden is not None or not tensor.is_contiguous():
        found = joined(tensor.shape, (tensor.stride(), (tensor if hidden is None else hidden).stride()))
        if found is None:
            flat = None if hidden is None else hidden.reshape(-1)
            return _tally(tensor.reshape(-1), edges, flat, limit, positions, peaks)
        places = found.address
    mine = _own.memory
    row, address = mine.row(edges.width)
    _PACKED.pack_into(
        mine.arguments,
        0,
        0,
        0,
        0,
        tensor.data_ptr(),
        0 if hidden is None else hidden.data_ptr(),
        limit,
        edges.address,
        edges.count,
        address,
        edges.width,
        mine.rooms_for(threads),
        elements,
        places,
        positions,
        peaks,
    )
    dtype = tensor.dtype
    run(_kernel(dtype), mine.address, threads)
    if dtype == torch.float64 and row[_AMAX] > 0 and not _LEAST_SQUARES < row[_SQUARES] < math.inf:
        return plain.tally(tensor, edges, hidden, limit).numpy()
    return row


class _Memory:
    """For arguments, for the kernel's blocks, and for rows, which are cut from one piece."""

    def __init__(self) -> None:
        self.arguments = ctypes.create_string_buffer(_PACKED.size)
        self.address = ctypes.addressof(self.arguments)
        self.piece = np.empty(0)
        self.start = 0
        self.used = 0
        self.rooms = np.empty(0, np.uint8)
        self.scratch = 0

    def row(self, numbers: int) -> tuple[NDArray[np.float64], int]:
        """An array of so many numbers that nobody else has, and its address."""
        if self.used + numbers > len(self.piece):
            self.piece = np.empty(max(_PIECE, numbers))
            self.start, self.used = self.piece.ctypes.data, 0
        begin = self.used
        self.used += numbers
        return self.piece[begin : self.used], self.start + 8 * begin

    def rooms_for(self, threads: int) -> int:
        """The address of a room for each thread."""
        if threads * _ROOM > len(self.rooms):
            self.rooms = np.empty(threads * _ROOM, np.uint8)
            self.scratch = self.rooms.ctypes.data
        return self.scratch


class _Own(threading.local):
    """Each Python thread's."""

    def __init__(self) -> None:
        self.memory = _Memory()


_own = _Own()


# Below is what numba compiles. It finds a kernel on disk by what the kernel closes over: numbers and types. A function
# would have a new name in each process, and the kernel be compiled again.


@njit(error_model="numpy")  # no branch for a division by zero
def _offsets(places, flat):
    """Of one element: where it is in the tensor and in the mask, and how many its row still has, itself included."""
    inner = places[OUTER]
    outer = flat // inner
    column = flat - outer * inner
    at, hidden_at = column * places[_STRIDES + OUTER], column * places[_HIDDEN_STRIDES + OUTER]
    for dimension in range(OUTER - 1, -1, -1):
        size = places[dimension]
        if size > 1:
            rest = outer // size
            index = outer - rest * size
            outer = rest
            at += index * places[_STRIDES + dimension]
            hidden_at += index * places[_HIDDEN_STRIDES + dimension]
    return at, hidden_at, inner - column


@njit
def _picked(source, step, target):
    if step == 1:
        for i in range(target.size):
            target[i] = source[i]
    else:
        for i in range(target.size):
            target[i] = source[i * step]


@njit
def _gathered(data, hidden, places, begin, elements, hides):
    """Brings elements, and what the mask says of them, into one piece from wherever they are."""
    filled = 0
    while filled < elements.size:
        at, hidden_at, row = _offsets(places, begin + filled)
        piece = min(row, elements.size - filled)
        step = places[_STRIDES + OUTER]
        source = carray(pointer(data + at * elements.itemsize), (piece * step,), elements.dtype)
        _picked(source, step, elements[filled : filled + piece])
        if hidden:
            step = places[_HIDDEN_STRIDES + OUTER]
            source = carray(pointer(hidden + hidden_at), (piece * step,), hides.dtype)
            _picked(source, step, hides[filled : filled + piece])
        filled += piece


@njit
def _shown(bits, values, hides, limit, clean, kept):
    """Zeros for what is masked, and what is `kept`; returns how many are masked."""
    masked = np.int32(0)
    for i in range(kept.size):
        hidden = (hides[i] != 0) & (values[i] <= limit)
        masked = np.int32(masked + np.int32(hidden))
        kept[i] = not hidden
        clean[i] = 0 if hidden else bits[i]
    return masked


@njit
def _finite(bits, integer, magnitude, infinity, clean, kept):
    """Zeros for what is not finite, which is not `kept`; returns how many are NaN, inf and -inf."""
    lost, nan, plus = np.int32(0), np.int32(0), np.int32(0)
    for i in range(kept.size):
        code = integer(bits[i] & magnitude)
        infinite = code >= infinity
        lost = np.int32(lost + np.int32(infinite))
        nan = np.int32(nan + np.int32(code > infinity))
        plus = np.int32(plus + np.int32(bits[i] == infinity))
        kept[i] = kept[i] & (not infinite)
        clean[i] = 0 if infinite else bits[i]
    return nan, plus, lost - nan - plus


@njit
def _lowest(bits, kept, unsigned, most):
    """As an unsigned integer: the smallest where none is negative, the largest where none is positive."""
    low = most
    for i in range(kept.size):
        low = min(low, unsigned(bits[i]) if kept[i] else most)
    return low


@njit
def _least(bits, magnitude, unsigned, infinity):
    """The smallest magnitude code above zero, or that of infinity."""
    least = unsigned(infinity - 1)
    for i in range(bits.size):
        least = min(least, unsigned(unsigned(bits[i] & magnitude) - unsigned(1)))  # zero becomes the largest
    return least + unsigned(1)


@njit
def _between(bits, integer, magnitude, edge, last):
    found = np.int32(0)
    for i in range(bits.size):
        code = integer(bits[i] & magnitude)
        found = np.int32(found + np.int32((code >= edge) & (code <= last)))
    return found


@njit
def _between_few(bits, exponents, groups, exponent, integer, magnitude, edge, last):
    """The same in the groups alone that have this exponent, the edge's."""
    group = bits.size // groups
    found = np.int32(0)
    i = vector_holding(exponents, 0, groups, exponent)
    while i < groups:
        found = np.int32(found + _between(bits[i * group : (i + 1) * group], integer, magnitude, edge, last))
        i = vector_holding(exponents, i + 1, groups, exponent)
    return found


@njit
def _index_of(bits, magnitude, code):
    """Of the first one that has this code, which there must be."""
    lanes = BYTES // bits.itemsize
    i = vector_with(bits, code) * lanes
    while bits[i] & magnitude != code:
        i += 1
    return i


@njit
def _largest(bits, integer, magnitude):
    largest = integer(0)
    for i in range(bits.size):
        largest = max(largest, integer(bits[i] & magnitude))
    return largest


@njit
def _raise(peaks, bits, integer, magnitude):
    for i in range(bits.size):
        peaks[i] = max(peaks[i], integer(bits[i] & magnitude))


@njit(error_model="numpy")
def _by_position(bits, integer, magnitude, begin, positions, peaks):
    """Raises each position's peak to those of its elements in a block; of a query and a key the later one's."""
    inner, outer, length, before, pairs = positions[0], positions[1], positions[2], positions[3], positions[4]
    done = 0
    while done < bits.size:
        flat = begin + done
        place = flat // inner
        column = flat - place * inner
        size = min(inner - column, bits.size - done)
        position = place % length
        first = flat // outer * length
        own = min(max(before + position + 1 - column, 0), size) if pairs else size
        if own:
            largest = _largest(bits[done : done + own], integer, magnitude)
            peaks[first + position] = max(peaks[first + position], largest)
        if own < size:
            key = first + column + own - before
            _raise(peaks[key : key + size - own], bits[done + own : done + size], integer, magnitude)
        done += size


@njit
def _count_subnormal(bits, magnitude, normal, row, bins):
    """Those below the smallest normal number: the exponent is that of the code's leading bit."""
    for i in range(bits.size):
        code = bits[i] & magnitude
        if 0 < code < normal:
            place = -1
            while code:
                code = code >> 1
                place += 1
            row[bins + place] += 1


@njit
def _started(row):
    for i in range(row.size):
        row[i] = 0.0
    row[_AMAX], row[_SCALE] = -1.0, 1.0
    row[_SMALLEST], row[_MINIMUM], row[_MAXIMUM] = np.inf, np.inf, -np.inf


@njit(fastmath=FASTER)
def _sum(numbers):
    total = 0.0
    for i in range(numbers.size):
        total += numbers[i]
    return total


@njit
def _merge(row, other):
    """Makes one row of two; of equal peaks the first in row-major order."""
    if other[_AMAX] > row[_AMAX] or (other[_AMAX] == row[_AMAX] and other[_INDEX] < row[_INDEX]):
        row[_AMAX], row[_INDEX] = other[_AMAX], other[_INDEX]
    for field in (_SMALLEST, _MINIMUM):
        row[field] = min(row[field], other[field])
    row[_MAXIMUM] = max(row[_MAXIMUM], other[_MAXIMUM])
    for field in (_MASKED, _NAN, _PLUS, _MINUS, _SUM, _SQUARES):
        row[field] += other[field]
    for i in range(FIELDS, row.size):
        row[i] += other[i]


def _compiled(dtype: str, stored: Any, integer: Any, unsigned: Any, floating: Any, exponent: Any, mantissa: int) -> Any:
    """The kernel for one dtype: how it is stored, and the integers and floats that it is counted by."""
    magnitude = integer(np.iinfo(integer).max)
    infinity, normal = integer(magnitude - (2**mantissa - 1)), integer(2**mantissa)
    most = unsigned(np.iinfo(unsigned).max)
    none = exponent(np.iinfo(exponent).max)  # of `scan`, where all exponent fields are 0
    size, wide = np.dtype(stored).itemsize, np.dtype(integer).itemsize
    group = GROUP * BYTES // wide
    half, brain = dtype == "float16", dtype == "bfloat16"
    direct = stored is integer
    room = _BLOCK * wide + 5 * 64  # not a power of two: of those a cache holds few

    def kernel(given):
        arguments = carray(given, (_ARGUMENTS,), np.int64)
        own = address_of(given)
        elements, width = arguments[_ELEMENTS], arguments[_WIDTH]
        chunks = max(-(-elements // _CHUNK), 1)
        chunk = taken(own + 8 * _NEXT, 1)
        if chunk >= chunks:
            return
        worker = taken(own + 8 * _WORKERS, 1)
        scratch = arguments[_SCRATCH] + worker * _ROOM
        widened = carray(pointer(scratch + room), (_BLOCK,), integer)
        shown = carray(pointer(scratch + 2 * room), (_BLOCK,), integer)
        finite = carray(pointer(scratch + 3 * room), (_BLOCK,), integer)
        exponents = carray(pointer(scratch + 4 * room), (_BLOCK,), exponent)
        hides = carray(pointer(scratch + 5 * room), (_BLOCK,), np.uint8)
        kept = carray(pointer(scratch + 6 * room), (_BLOCK,), np.uint8)
        counted = carray(pointer(scratch + 7 * room), (_FIELDS,), np.int64)
        row = carray(pointer(arguments[_OUT] if worker == 0 else scratch + 8 * room), (width,), np.float64)
        _started(row)
        floating_limit = floating(carray(given, (_ARGUMENTS,), np.float64)[_LIMIT])
        edges = carray(pointer(arguments[_EDGES]), (arguments[_EDGE_COUNT],), np.int64)
        bins = FIELDS + edges.size
        data, hidden, somewhere = arguments[_DATA], arguments[_HIDDEN], arguments[_PLACES] != 0
        places = carray(pointer(arguments[_PLACES]), (_HIDDEN_STRIDES + OUTER + 1,), np.int64)
        positions, positioned = carray(pointer(arguments[_POSITIONS]), (6,), np.int64), arguments[_POSITIONS] != 0
        asked = positions[5] if positioned else 0
        peaks = carray(pointer(arguments[_PEAKS] + worker * asked * wide), (asked,), integer)
        peak, smallest = integer(-1), infinity
        done = 0
        while chunk < chunks:
            begin = chunk * _CHUNK
            end = min(begin + _CHUNK, elements)
            while begin < end:
                block = min(_BLOCK, end - begin)
                groups = -(-block // group)
                padded = groups * group

                # The elements in one piece, then their bits, with zeros up to a whole group.
                where, hidden_where = data + begin * size, hidden + begin
                if somewhere:
                    at, hidden_at, piece = _offsets(places, begin)
                    where, hidden_where = data + at * size, hidden + hidden_at
                    if (
                        piece < block
                        or places[_STRIDES + OUTER] != 1
                        or (hidden and places[_HIDDEN_STRIDES + OUTER] != 1)
                    ):
                        where, hidden_where = scratch, scratch + 5 * room
                        _gathered(data, hidden, places, begin, carray(pointer(where), (block,), stored), hides)
                source = carray(pointer(where), (block,), stored)
                if direct and padded == block:
                    bits = carray(pointer(where), (padded,), integer)
                else:
                    bits = widened[:padded]
                    if half:
                        widen_float16(source, bits.view(floating), bits)
                    elif brain:
                        widen_bfloat16(source, bits.view(floating), bits)
                    else:
                        copy(source, bits.view(floating), bits)
                    bits[block:] = 0
                lost = 0
                if hidden:
                    hiding = carray(pointer(hidden_where), (block,), np.uint8)
                    masked = _shown(bits, bits.view(floating), hiding, floating_limit, shown, kept[:block])
                    shown[block:padded] = 0
                    bits = shown[:padded]
                    row[_MASKED] += masked
                    lost += masked

                signed, high, first, final, total, squares = scan(bits, exponents, groups)
                top = max(integer(unsigned(high) & unsigned(magnitude)), signed)
                if top >= infinity:
                    if not hidden:
                        kept[:block] = 1
                    nan, plus, minus = _finite(bits, integer, magnitude, infinity, finite, kept[:block])
                    finite[block:padded] = 0
                    bits = finite[:padded]
                    row[_NAN] += nan
                    row[_PLUS] += plus
                    row[_MINUS] += minus
                    lost += nan + plus + minus
                    signed, high, first, final, total, squares = scan(bits, exponents, groups)
                    top = max(integer(unsigned(high) & unsigned(magnitude)), signed)
                if lost == block:
                    begin += block
                    continue

                row[_SUM] += total
                row[_SQUARES] += squares
                if high < 0:
                    row[_MINIMUM] = min(row[_MINIMUM], np.float64(float_of(high)))
                if signed > 0:
                    row[_MAXIMUM] = max(row[_MAXIMUM], np.float64(float_of(signed)))
                if (high >= 0 and row[_MINIMUM] > 0) or (signed <= 0 and row[_MAXIMUM] < 0):
                    if lost == 0:
                        kept[:block] = 1
                    low = np.float64(float_of(integer(_lowest(bits, kept[:block], unsigned, most))))
                    row[_MINIMUM], row[_MAXIMUM] = min(row[_MINIMUM], low), max(row[_MAXIMUM], low)
                if top > peak:
                    peak = top
                    place = 0
                    if top > 0:
                        place = _index_of(bits, magnitude, top)
                    elif lost:
                        while not kept[place]:
                            place += 1
                    row[_INDEX] = begin + place

                if positioned:
                    _by_position(bits[:block], integer, magnitude, begin, positions, peaks)

                nonzero, low, last = 0, np.int64(first) + 1, np.int64(final)
                if first == none:
                    low, last = 1, 0
                if last - low < _MANY:
                    for wanted in range(low, last + 1, AT_ONCE):
                        found = counts(exponents, groups, exponent(wanted))
                        for i in range(min(AT_ONCE, last + 1 - wanted)):
                            row[bins + mantissa - 1 + wanted + i] += found[i]
                            counted[wanted + i] = found[i]
                            nonzero += found[i]
                else:
                    counted[low : last + 1] = padded
                    for i in range(padded):
                        if exponents[i]:
                            row[bins + mantissa - 1 + exponents[i]] += 1
                            nonzero += 1
                least = normal
                if nonzero < padded or low << mantissa <= smallest:
                    least = integer(_least(bits, magnitude, unsigned, infinity))
                    smallest = min(smallest, least)
                    if least < normal:
                        _count_subnormal(bits, magnitude, normal, row, bins)
                for i in range(edges.size):  # among those of its exponent
                    edge = integer(edges[i])
                    ends, field = integer(edge | integer(normal - 1)), edge >> mantissa
                    if low <= field <= last and 0 < counted[field] <= _FEW:
                        few = _between_few(bits, exponents, groups, exponent(field), integer, magnitude, edge, ends)
                        row[FIELDS + i] += few
                    elif (low <= field <= last and counted[field]) or max(least, edge) < normal:
                        row[FIELDS + i] += _between(bits, integer, magnitude, edge, ends)
                begin += block
            done += 1
            chunk = taken(own + 8 * _NEXT, 1)
        if peak >= 0:
            row[_AMAX] = np.float64(float_of(peak))
        row[_SMALLEST] = np.float64(float_of(smallest))

        if taken(own + 8 * _FINISHED, done) + done < chunks:
            return  # the last one to finish goes on
        row = carray(pointer(arguments[_OUT]), (width,), np.float64)
        for other in range(1, arguments[_WORKERS]):
            scratch = arguments[_SCRATCH] + other * _ROOM
            _merge(row, carray(pointer(scratch + 8 * room), (width,), np.float64))
        for i in range(edges.size):
            row[FIELDS + i] += _sum(row[bins + mantissa + (edges[i] >> mantissa) :])

    return cfunc(types.void(types.voidptr), cache=True)(kernel)


@cache
def _kernel(dtype: torch.dtype) -> Compiled:
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float64:
        return as_function(_compiled(name, np.int64, np.int64, np.uint64, np.float64, np.uint16, 52))
    stored = np.int32 if dtype == torch.float32 else np.int16
    return as_function(_compiled(name, stored, np.int32, np.uint32, np.float32, np.uint8, 23))

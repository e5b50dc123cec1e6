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
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.kernels import plain
from stabilitykit.recorder.kernels.layout import FIELDS, Edges, Field
from stabilitykit.recorder.kernels.machine import (
    FASTER,
    OUTER,
    Compiled,
    address_of,
    as_function,
    copy,
    joined,
    pointer,
    run,
    taken,
    widen_bfloat16,
    widen_float16,
)

_BLOCK = 4096  # elements; their codes, exponents and widened bits fit the smallest first caches
_CHUNK = 1 << 16  # elements that one thread takes at a time
_MANY = 96  # exponents in one block, from which on counting one by one is faster
_PIECE = 1 << 15  # numbers, about a hundred rows
_LEAST_SQUARES = 1e-280  # a smaller sum may have lost some to float64's own subnormals

# The arguments are 64-bit: two counters of the kernel's own, addresses, sizes, strides in elements, a float64.
_NEXT, _WORKERS, _DATA, _HIDDEN, _LIMIT, _EDGES, _EDGE_COUNT, _OUT, _WIDTH, _ELEMENTS, _SHAPE = range(11)
_STRIDES = _SHAPE + OUTER + 1
_HIDDEN_STRIDES = _STRIDES + OUTER + 1
_ARGUMENTS = _HIDDEN_STRIDES + OUTER + 1
_PACKED = struct.Struct(f"<4qd{_ARGUMENTS - 5}q")

_MASKED, _NAN, _PLUS, _MINUS, _AMAX, _INDEX, _SMALLEST, _MINIMUM, _MAXIMUM, _SUM, _SQUARES, _SCALE = map(int, Field)
_ONES, _ZEROS = (1,) * OUTER, (0,) * OUTER


def supports(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tally(tensor: Tensor, edges: Edges, hidden: Tensor | None = None, limit: float = math.inf) -> NDArray[np.float64]:
    """A row as in `layout`, of a tensor that this kernel supports, with any strides.

    An element is masked where `hidden`, boolean and of the tensor's shape, is True and it is not above `limit`.
    """
    elements = tensor.numel()
    threads = 1 if elements <= _CHUNK else min(torch.get_num_threads(), -(-elements // _CHUNK))
    places: tuple[int, ...] | None
    if elements == 0 or (hidden is None and tensor.is_contiguous()):
        places = (*_ONES, elements, *_ZEROS, 1, *_ZEROS, 0)
    else:
        places = joined((tensor, tensor if hidden is None else hidden))
        if places is None:
            return tally(tensor.reshape(-1), edges, None if hidden is None else hidden.reshape(-1), limit)
    rows, address = _mine.rows(threads * edges.width)
    _PACKED.pack_into(
        _mine.arguments,
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
        elements,
        *places,
    )
    run(_kernel(tensor.dtype), _mine.address, threads)
    if threads > 1:
        rows = _merged(rows.reshape(threads, edges.width))
    if tensor.dtype == torch.float64 and rows[_AMAX] > 0 and not _LEAST_SQUARES < rows[_SQUARES] < math.inf:
        return plain.tally(tensor, edges, hidden, limit).numpy()
    return rows


class _Mine(threading.local):
    """Each Python thread's own memory for arguments, and for rows, of which many are cut from one piece."""

    def __init__(self) -> None:
        self.arguments = ctypes.create_string_buffer(_PACKED.size)
        self.address = ctypes.addressof(self.arguments)
        self.piece = np.empty(0)
        self.start = 0
        self.used = 0

    def rows(self, numbers: int) -> tuple[NDArray[np.float64], int]:
        """An array of so many numbers that nobody else has, and its address."""
        if self.used + numbers > len(self.piece):
            self.piece = np.empty(max(_PIECE, numbers))
            self.start, self.used = self.piece.ctypes.data, 0
        begin = self.used
        self.used += numbers
        return self.piece[begin : self.used], self.start + 8 * begin


_mine = _Mine()


def _merged(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """One row from those of several threads; of equal peaks the first in row-major order."""
    row: NDArray[np.float64] = rows.sum(axis=0)
    best = min(range(len(rows)), key=lambda i: (-rows[i, _AMAX], rows[i, _INDEX]))
    row[_AMAX], row[_INDEX] = rows[best, _AMAX], rows[best, _INDEX]
    for field in (_SMALLEST, _MINIMUM):
        row[field] = rows[:, field].min()
    row[_MAXIMUM] = rows[:, _MAXIMUM].max()
    row[_SCALE] = 1.0
    return row


# Below is what numba compiles.


@intrinsic
def _equal(context: Any, keys: Any, vectors: Any, wanted: Any) -> Any:
    """How many of `vectors` times 32 bytes of `keys` are `wanted`; a lane holds the count of its own, so at most 255.

    Written out, because no loop of numba's is compiled to sums of bytes that are added up only once.
    """
    width = keys.dtype.bitwidth
    lanes = 256 // width

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        lane, count = ir.IntType(width), ir.IntType(64)
        vector = ir.VectorType(lane, lanes)
        start = builder.bitcast(array.data, vector.as_pointer())
        alone = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], ir.Constant(count, 0))
        spread = builder.shuffle_vector(
            alone, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        )
        before = builder.block
        body, after = builder.append_basic_block("equal"), builder.append_basic_block("equal.summed")
        builder.branch(body)
        builder.position_at_end(body)
        index, found = builder.phi(count), builder.phi(vector)
        index.add_incoming(ir.Constant(count, 0), before)
        found.add_incoming(ir.Constant(vector, [0] * lanes), before)
        loaded = builder.load(builder.gep(start, [index]), align=1)
        more = builder.sub(found, builder.sext(builder.icmp_unsigned("==", loaded, spread), vector))
        following = builder.add(index, ir.Constant(count, 1))
        index.add_incoming(following, body)
        found.add_incoming(more, body)
        builder.cbranch(builder.icmp_signed("<", following, arguments[1]), body, after)
        builder.position_at_end(after)
        wide = ir.VectorType(ir.IntType(16), lanes)
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(16), [wide]), f"llvm.vector.reduce.add.v{lanes}i16"
        )
        summed = builder.zext(more, wide) if width < 16 else more
        return builder.zext(builder.call(reduce, [summed]), count)

    return types.int64(keys, types.int64, keys.dtype), generate


@njit
def _at_least(codes, edge):
    found = np.int32(0)
    for i in range(codes.size):
        found = np.int32(found + np.int32(codes[i] >= edge))
    return found


@njit(fastmath=FASTER)
def _sums(values):
    total, squares = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value
        squares += value * value
    return total, squares


def _compiled(stored: Any, integer: Any, unsigned: Any, floating: Any, exponent: Any, mantissa: int, widen: Any) -> Any:
    """The kernel for one dtype: how it is stored, and the integers and floats that it is counted by."""
    magnitude = integer(np.iinfo(integer).max)
    shift = integer(mantissa)
    infinity = integer(magnitude - (2**mantissa - 1))
    last = int(infinity >> shift)
    unused = exponent(last)
    lowest, most = np.iinfo(integer).min, np.iinfo(unsigned).max
    width_of_one = np.dtype(stored).itemsize
    direct = stored is integer

    @njit
    def codes_of(bits, codes, exponents):
        for i in range(bits.size):
            code = integer(bits[i] & magnitude)
            codes[i] = code
            exponents[i] = exponent(code >> shift)

    @njit
    def extremes(bits):
        """Of the bits as signed and as unsigned integers, and the least magnitude code, less one, as unsigned."""
        signed, high, low, least = integer(lowest), unsigned(0), unsigned(most), unsigned(most)
        for i in range(bits.size):
            one = bits[i]
            signed = max(signed, one)
            high = max(high, unsigned(one))
            low = min(low, unsigned(one))
            least = min(least, unsigned(unsigned(one & magnitude) - unsigned(1)))
        return signed, high, low, least

    @njit
    def cleaned(bits, values, hidden, limit, codes, exponents, clean, row):
        """`bits` with zero where something is masked or not finite; `codes` become negative there, `row` counts it."""
        masked, lost, nan, plus = integer(0), integer(0), integer(0), integer(0)
        one, none = integer(1), integer(0)
        for i in range(bits.size):
            code = codes[i]
            shown = none if (hidden[i] != 0) & (values[i] <= limit) else one
            infinite = shown if code >= infinity else none
            masked = integer(masked + integer(one - shown))
            lost = integer(lost + infinite)
            nan = integer(nan + (infinite if code > infinity else none))
            plus = integer(plus + (infinite if bits[i] == infinity else none))
            kept = integer(shown - infinite)
            clean[i] = integer(bits[i] & integer(-kept))
            codes[i] = integer((code & integer(-kept)) | integer(kept - one))
            exponents[i] = exponent(codes[i] >> shift)
        row[_MASKED] += masked
        row[_NAN] += nan
        row[_PLUS] += plus
        row[_MINUS] += lost - nan - plus

    @njit
    def extremes_of_clean(bits, codes):
        signed, high, low, least = integer(lowest), unsigned(0), unsigned(most), unsigned(most)
        for i in range(bits.size):
            kept, one = codes[i] >= 0, bits[i]
            signed = max(signed, one if kept else integer(lowest))
            high = max(high, unsigned(one) if kept else unsigned(0))
            low = min(low, unsigned(one) if kept else unsigned(most))
            least = min(least, unsigned(unsigned(codes[i]) - unsigned(1)))
        return signed, high, low, least

    @njit
    def count(codes, exponents, top, least, edges, row):
        """Histogram and edges of one block, whose largest code is `top` and whose least above zero is `least`."""
        bins = FIELDS + edges.size
        nonzero = 0
        first, final = int(least >> shift), int(top >> shift)
        if final - first < _MANY:
            lanes = 32 // exponents.itemsize
            vectors = -(-codes.size // lanes)
            for i in range(codes.size, vectors * lanes):
                exponents[i] = unused
            for wanted in range(max(first, 1), final + 1):
                found = _equal(exponents, vectors, exponent(wanted))
                row[bins + mantissa - 1 + wanted] += found
                nonzero += found
        else:
            for i in range(codes.size):
                place = int(codes[i] >> shift)
                if 0 < place < last:
                    row[bins + mantissa - 1 + place] += 1
                    nonzero += 1
        if first == 0:  # subnormal ones: the leading bit is the exponent
            for i in range(codes.size):
                code = codes[i]
                if code > 0 and code >> shift == 0:
                    place = -1
                    while code:
                        code = code >> integer(1)
                        place += 1
                    row[bins + place] += 1
                    nonzero += 1
        for i in range(edges.size):
            if edges[i] <= least:
                row[FIELDS + i] += nonzero
            elif edges[i] <= top:
                row[FIELDS + i] += _at_least(codes, integer(edges[i]))

    def kernel(given):
        arguments = carray(given, (_ARGUMENTS,), np.int64)
        own = address_of(given)
        worker = taken(own + 8 * _WORKERS)
        limit = carray(given, (_ARGUMENTS,), np.float64)[_LIMIT]
        floating_limit = floating(limit)
        edges = carray(pointer(arguments[_EDGES]), (arguments[_EDGE_COUNT],), np.int64)
        width, elements = arguments[_WIDTH], arguments[_ELEMENTS]
        row = carray(pointer(arguments[_OUT] + 8 * worker * width), (width,), np.float64)
        for i in range(width):
            row[i] = 0.0
        row[_AMAX], row[_SCALE] = -1.0, 1.0
        row[_SMALLEST], row[_MINIMUM], row[_MAXIMUM] = np.inf, np.inf, -np.inf
        codes = np.empty(_BLOCK, integer)
        exponents = np.empty(_BLOCK, exponent)
        widened = np.empty(_BLOCK, integer)
        spare = np.empty(_BLOCK, integer)
        picked = np.empty(_BLOCK, stored)
        nothing = np.zeros(_BLOCK, np.uint8)
        gathered = np.empty(_BLOCK, np.uint8)
        value_of = np.empty(1, integer)
        inner = arguments[_SHAPE + OUTER]
        step, hidden_step = arguments[_STRIDES + OUTER], arguments[_HIDDEN_STRIDES + OUTER]
        peak = integer(-1)
        while True:
            begin = taken(own + 8 * _NEXT) * _CHUNK
            if begin >= elements:
                break
            end = min(begin + _CHUNK, elements)
            while begin < end:
                filled, top, least = 0, integer(-1), magnitude
                block = min(_BLOCK, end - begin)
                while filled < block:
                    flat = begin + filled
                    outer = flat // inner
                    column = flat - outer * inner
                    piece = min(inner - column, block - filled)
                    at, hidden_at = column * step, column * hidden_step
                    for dimension in range(OUTER - 1, -1, -1):
                        size = arguments[_SHAPE + dimension]
                        rest = outer // size
                        index = outer - rest * size
                        outer = rest
                        at += index * arguments[_STRIDES + dimension]
                        hidden_at += index * arguments[_HIDDEN_STRIDES + dimension]
                    address = arguments[_DATA] + at * width_of_one
                    source = carray(pointer(address), ((piece - 1) * step + 1,), stored)
                    if direct and step == 1:
                        bits = source[:piece]
                        values = carray(pointer(address), (piece,), floating)
                    else:
                        bits = widened[:piece]
                        values = bits.view(floating)
                        if step == 1:
                            widen(source[:piece], values, bits)
                        else:
                            for i in range(piece):
                                picked[i] = source[i * step]
                            widen(picked[:piece], values, bits)
                    here = codes[filled : filled + piece]
                    bytes_here = exponents[filled : filled + piece]
                    codes_of(bits, here, bytes_here)
                    signed, high, low, less = extremes(bits)
                    negative = high > unsigned(magnitude)
                    most_here = integer(high & unsigned(magnitude))
                    if negative and signed >= 0:
                        most_here = max(most_here, signed)
                    kept = piece
                    if arguments[_HIDDEN] or most_here >= infinity:
                        if arguments[_HIDDEN] == 0:
                            hides = nothing[:piece]
                        elif hidden_step == 1:
                            hides = carray(pointer(arguments[_HIDDEN] + hidden_at), (piece,), np.uint8)
                        else:
                            hides = gathered[:piece]
                            for i in range(piece):
                                where = arguments[_HIDDEN] + hidden_at + i * hidden_step
                                hides[i] = carray(pointer(where), (1,), np.uint8)[0]
                        before = row[_MASKED] + row[_NAN] + row[_PLUS] + row[_MINUS]
                        cleaned(bits, values, hides, floating_limit, here, bytes_here, spare[:piece], row)
                        kept = piece - (row[_MASKED] + row[_NAN] + row[_PLUS] + row[_MINUS] - before)
                        bits = spare[:piece]
                        values = bits.view(floating)
                        signed, high, low, less = extremes_of_clean(bits, here)
                        negative = high > unsigned(magnitude)
                        most_here = integer(high & unsigned(magnitude))
                        if negative and signed >= 0:
                            most_here = max(most_here, signed)
                    if kept == 0:
                        filled += piece
                        continue
                    total, squares = _sums(values)
                    row[_SUM] += total
                    row[_SQUARES] += squares
                    value_of[0] = integer(high if negative else low)
                    row[_MINIMUM] = min(row[_MINIMUM], np.float64(value_of.view(floating)[0]))
                    value_of[0] = signed if signed >= 0 else integer(low)
                    row[_MAXIMUM] = max(row[_MAXIMUM], np.float64(value_of.view(floating)[0]))
                    least_here = integer(less + unsigned(1)) if less < unsigned(magnitude) else magnitude
                    top, least = max(top, most_here), min(least, least_here)
                    filled += piece
                if top > peak:
                    peak = top
                    for i in range(block):
                        if codes[i] == top:
                            row[_INDEX] = begin + i
                            break
                if top > 0:
                    count(codes[:block], exponents, top, least, edges, row)
                    value_of[0] = least
                    row[_SMALLEST] = min(row[_SMALLEST], np.float64(value_of.view(floating)[0]))
                begin += block
        if peak >= 0:
            value_of[0] = peak
            row[_AMAX] = np.float64(value_of.view(floating)[0])

    return cfunc(types.void(types.voidptr), cache=True)(kernel)


@cache
def _kernel(dtype: torch.dtype) -> Compiled:
    if dtype == torch.float64:
        made = _compiled(np.int64, np.int64, np.uint64, np.float64, np.uint16, 52, copy)
    elif dtype == torch.float32:
        made = _compiled(np.int32, np.int32, np.uint32, np.float32, np.uint8, 23, copy)
    else:
        widen = widen_float16 if dtype == torch.float16 else widen_bfloat16
        made = _compiled(np.int16, np.int32, np.uint32, np.float32, np.uint8, 23, widen)
    return as_function(made)

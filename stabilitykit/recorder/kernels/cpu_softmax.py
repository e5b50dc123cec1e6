"""The statistics of a softmax on a CPU: each row of logits and probabilities read once, by torch's own threads."""

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.kernels.machine import (
    FASTER,
    Compiled,
    address_of,
    as_function,
    float_of,
    pointer,
    run,
    taken,
    widen_bfloat16,
    widen_float16,
)
from stabilitykit.recorder.kernels.places import OUTER, Places, joined
from stabilitykit.recorder.kernels.softmax_layout import FIELDS, HEAD_FIELDS, Field, empty_row, merged

_CHUNK = 1 << 16  # elements, in whole rows, that one thread takes at a time

# The arguments are 64-bit integers: two counters of the kernel's own, addresses, sizes.
_NEXT, _WORKERS, _LOGITS, _PROBABILITIES, _HIDDEN, _OUT, _WIDTH, _ROWS, _HEAD_ROWS, _HEADS, _TAKEN, _PLACES = range(12)
_ARGUMENTS = 12
_PACKED = struct.Struct(f"<{_ARGUMENTS}q")
# The places, at an address of their own: a shape, and the strides of each tensor.
_LOGITS_STRIDES, _PROBABILITIES_STRIDES, _HIDDEN_STRIDES = ((OUTER + 1) * i for i in (1, 2, 3))

_MAX_LOGIT, _RANGE, _MAX_PROBABILITY, _SUM_ERROR, _VISIBLE, _UNDERFLOWED, _MASKED_ROWS, _NAN_ROWS, _BOTH_ROWS = map(
    int, Field
)

_STORED = {torch.float16: np.int16, torch.bfloat16: np.int16, torch.float32: np.int32, torch.float64: np.int64}
_SPAN = 64  # elements that are looked at together for one that is not zero


def tally(logits: Tensor, probabilities: Tensor, head: int | None, hidden: Tensor | None) -> NDArray[np.float64]:
    """A row of `softmax_layout`, of tensors of one shape whose last dimension the softmax runs over."""
    shape = logits.shape
    heads = 1 if head is None else shape[head]
    rows = logits.numel() // max(shape[-1], 1)
    result = empty_row(heads)
    if rows == 0 or shape[-1] == 0:
        return result
    head_rows = rows if head is None else math.prod(shape[head + 1 : -1])
    tensors = [part if part.stride(-1) == 1 else part.contiguous() for part in (logits, probabilities)]
    if hidden is not None:
        hidden = hidden.expand(shape)
        hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    places = _places(tensors, hidden)
    if places is None:
        tensors = [part.contiguous() for part in tensors]
        hidden = None if hidden is None else hidden.contiguous()
        places = _places(tensors, hidden)
        assert places is not None
    taken_rows = max(1, _CHUNK // shape[-1])
    threads = min(torch.get_num_threads(), -(-rows // taken_rows))
    table = result.reshape(1, -1) if threads == 1 else np.tile(result, (threads, 1))
    arguments = ctypes.create_string_buffer(
        _PACKED.pack(
            0,
            0,
            tensors[0].data_ptr(),
            tensors[1].data_ptr(),
            0 if hidden is None else hidden.data_ptr(),
            table.ctypes.data,
            table.shape[1],
            rows,
            head_rows,
            heads,
            taken_rows,
            places.address,
        ),
        _PACKED.size,
    )
    run(_kernel(logits.dtype, probabilities.dtype), arguments, threads)
    return result if threads == 1 else merged(table)


def _places(tensors: Sequence[Tensor], hidden: Tensor | None) -> Places | None:
    strides = (*(part.stride() for part in tensors), (tensors[0] if hidden is None else hidden).stride())
    return joined(tensors[0].shape, strides, keep=1)


# Below is what numba compiles. It finds a kernel on disk by what the kernel closes over: numbers and types. A function
# would have a new name in each process, and the kernel be compiled again.


@njit(fastmath=FASTER, error_model="numpy")  # the other one branches at each division
def _entropy_of_float32(bits):
    """-Σ p · ln p, to about 1e-7 of itself; a subnormal p adds less than 1e-36 and counts as 0.

    ln m = 2 · artanh((m - 1) / (m + 1)) for the significand m, taken between 1/√2 and √2 where the series is short.
    """
    total = np.float32(0)
    one, half_root, shift = np.float32(1), np.int32(0x3F3504F3), np.int32(23)
    for i in range(bits.size):
        code = np.int32(bits[i] & np.int32(0x7FFFFFFF))
        exponent = np.int32(np.int32(code - half_root) >> shift)
        m = float_of(np.int32(code - np.int32(exponent << shift)))
        s = (m - one) / (m + one)
        square = s * s
        series = np.float32(1 / 7) + square * np.float32(1 / 9)
        series = np.float32(1 / 5) + square * series
        series = np.float32(1 / 3) + square * series
        series = one + square * series
        p = float_of(code if code >= np.int32(0x00800000) else np.int32(0))
        total -= p * (np.float32(exponent) * np.float32(0.6931471805599453) + np.float32(2) * s * series)
    return total


@njit
def _entropy_of_float64(bits):
    total = 0.0
    for p in bits.view(np.float64):
        if p > 0:
            total -= p * np.log(p)
    return total


@njit
def _key(bits, integer, most):
    """An integer that grows with the number that these bits stand for; of a key, the bits."""
    return integer(bits ^ integer(most if bits < 0 else 0))


@njit
def _logits_of(bits, hidden, integer, least, most, infinity):
    """Of the logits that are finite and not hidden the largest and the smallest, as keys; and how many are shown."""
    high, low, visible = least, most, np.int32(0)
    for i in range(bits.size):
        key = _key(bits[i], integer, most)
        kept = (hidden[i] == 0) & (integer(bits[i] & most) < infinity)
        high = max(high, key if kept else least)
        low = min(low, key if kept else most)
        visible = np.int32(visible + np.int32((hidden[i] == 0) & (bits[i] != integer(least | infinity))))
    return high, low, visible


@njit
def _probabilities_of(bits, logit_bits, hidden, integer, least, most, infinity):
    """The largest, as its bits; how many are NaN, and how many are zero where the logit is shown."""
    largest, nan, zero = integer(0), np.int32(0), np.int32(0)
    for i in range(bits.size):
        code = integer(bits[i] & most)
        shown = (hidden[i] == 0) & (logit_bits[i] != integer(least | infinity))
        largest = max(largest, bits[i])
        nan = np.int32(nan + np.int32(code > infinity))
        zero = np.int32(zero + np.int32((code == 0) & shown))
    return largest, nan, zero


@njit
def _span(bits):
    """Where the first and the last are that are not zero, in whole spans: a mask leaves many zeros at the ends."""
    begin, end = 0, bits.size
    while end - begin > _SPAN and _all_zero(bits[end - _SPAN : end]):
        end -= _SPAN
    while end - begin > _SPAN and _all_zero(bits[begin : begin + _SPAN]):
        begin += _SPAN
    return begin, end


@njit
def _all_zero(bits):
    some = bits[0]
    for i in range(bits.size):
        some |= bits[i]
    return some == 0


@njit(fastmath=FASTER)
def _sum(values):
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i])
    return total


def _compiled(logits: str, logits_stored: Any, probabilities: str, stored: Any) -> Any:
    wide = stored is np.int64
    integer, floating = (np.int64, np.float64) if wide else (np.int32, np.float32)
    least, most = integer(np.iinfo(integer).min), integer(np.iinfo(integer).max)
    infinity = integer(np.array(np.inf, floating).view(integer))
    logits_size, size = np.dtype(logits_stored).itemsize, np.dtype(stored).itemsize
    half_logits, brain_logits = logits == "float16", logits == "bfloat16"
    half, brain = probabilities == "float16", probabilities == "bfloat16"

    def kernel(given):
        arguments = carray(given, (_ARGUMENTS,), np.int64)
        own = address_of(given)
        width, rows = arguments[_WIDTH], arguments[_ROWS]
        places = carray(pointer(arguments[_PLACES]), (_HIDDEN_STRIDES + OUTER + 1,), np.int64)
        columns = places[OUTER]
        worker = taken(own + 8 * _WORKERS, 1)
        row = carray(pointer(arguments[_OUT] + 8 * worker * width), (width,), np.float64)
        widened_logits, widened = np.empty(columns, integer), np.empty(columns, integer)
        nothing = np.zeros(columns, np.uint8)
        while True:
            begin = taken(own + 8 * _NEXT, 1) * arguments[_TAKEN]
            if begin >= rows:
                break
            for index in range(begin, min(begin + arguments[_TAKEN], rows)):
                outer, at, logits_at, hidden_at = index, 0, 0, 0
                for dimension in range(OUTER - 1, -1, -1):
                    rest = outer // places[dimension]
                    place = outer - rest * places[dimension]
                    outer = rest
                    logits_at += place * places[_LOGITS_STRIDES + dimension]
                    at += place * places[_PROBABILITIES_STRIDES + dimension]
                    hidden_at += place * places[_HIDDEN_STRIDES + dimension]
                logits_where = arguments[_LOGITS] + logits_at * logits_size
                where = arguments[_PROBABILITIES] + at * size
                logit_bits, bits = widened_logits, widened
                if half_logits:
                    source = carray(pointer(logits_where), (columns,), np.int16)
                    widen_float16(source, widened_logits.view(floating), widened_logits)
                elif brain_logits:
                    source = carray(pointer(logits_where), (columns,), np.int16)
                    widen_bfloat16(source, widened_logits.view(floating), widened_logits)
                else:
                    logit_bits = carray(pointer(logits_where), (columns,), integer)
                if half:
                    source = carray(pointer(where), (columns,), np.int16)
                    widen_float16(source, widened.view(floating), widened)
                elif brain:
                    source = carray(pointer(where), (columns,), np.int16)
                    widen_bfloat16(source, widened.view(floating), widened)
                else:
                    bits = carray(pointer(where), (columns,), integer)
                hidden = nothing
                if arguments[_HIDDEN]:
                    hidden = carray(pointer(arguments[_HIDDEN] + hidden_at), (columns,), np.uint8)
                high, low, visible = _logits_of(logit_bits, hidden, integer, least, most, infinity)
                largest, nan, zero = _probabilities_of(bits, logit_bits, hidden, integer, least, most, infinity)
                if high >= low:
                    highest, lowest = float_of(_key(high, integer, most)), float_of(_key(low, integer, most))
                    row[_MAX_LOGIT] = max(row[_MAX_LOGIT], np.float64(highest))
                    row[_RANGE] = max(row[_RANGE], np.float64(floating(highest - lowest)))
                row[_VISIBLE] += visible
                row[_UNDERFLOWED] += zero
                masked = visible == 0
                if masked:
                    row[_MASKED_ROWS] += 1
                if nan:
                    row[_NAN_ROWS] += 1
                if masked and nan:
                    row[_BOTH_ROWS] += 1
                if not masked and not nan:
                    first, end = _span(bits)
                    bits = bits[first:end]
                    row[_MAX_PROBABILITY] = max(row[_MAX_PROBABILITY], np.float64(float_of(largest)))
                    row[_SUM_ERROR] = max(row[_SUM_ERROR], abs(_sum(bits.view(floating)) - 1.0))
                    entropy = np.float64(_entropy_of_float64(bits) if wide else _entropy_of_float32(bits))
                    head = FIELDS + HEAD_FIELDS * (index // arguments[_HEAD_ROWS] % arguments[_HEADS])
                    row[head] = min(row[head], entropy)
                    row[head + 1] += entropy
                    row[head + 2] += 1

    return cfunc(types.void(types.voidptr), cache=True)(kernel)


@cache
def _kernel(logits: torch.dtype, probabilities: torch.dtype) -> Compiled:
    names = [str(dtype).removeprefix("torch.") for dtype in (logits, probabilities)]
    return as_function(_compiled(names[0], _STORED[logits], names[1], _STORED[probabilities]))

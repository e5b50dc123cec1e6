"""What kernels in machine code share: torch's threads, memory by its address, and 16-bit numbers in float32's bits.

The threads are those of torch's OpenMP library, started by the call that a compiler would have made: threads of our
own would have to share the cores with those, which spin for a while after each operator.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FASTER = {"reassoc", "contract", "nsz"}  # for sums, which may be split; NaN and infinities keep their meaning

_kept: list[Any] = []

Compiled = Callable[[Any], None]
"""A function of one pointer, to its arguments."""


def as_function(compiled: Any) -> Compiled:
    """numba's function, called by its address: without a look at the argument's type."""
    _kept.append(compiled)  # the machine code goes with it
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


def run(kernel: Compiled, arguments: Any, threads: int) -> None:
    """Runs `kernel` once in each of as many threads, all with the same arguments."""
    parallel = _torch_threads() if threads > 1 else None
    if parallel is None:
        kernel(arguments)  # it does the work of all
    else:
        parallel(kernel, arguments, threads, 0)


@cache
def _torch_threads() -> Callable[..., Any] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch itself runs on, or None."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            start = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        start.restype = None
        start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return start
    return None


# Below is what numba compiles.


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def address_of(context: Any, pointer: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


@intrinsic
def taken(context: Any, address: Any, number: Any) -> Any:
    """The counter at this address, which is higher by `number` afterwards: no two threads get the same.

    Who gets a number sees all that was written by those who got the ones before it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The float with these bits, an int32 or int64."""
    wide = bits.bitwidth == 64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType() if wide else ir.FloatType())

    return (types.float64 if wide else types.float32)(bits), generate


@intrinsic
def bits_of(context: Any, value: Any) -> Any:
    """Of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit
def widen_float16(source, values, bits):
    """Shifted into float32's fields, the exponent is 112 too small; infinity and NaN need the largest one."""
    for i in range(source.size):
        moved = np.int32(np.int32(np.int32(source[i]) << np.int32(13)) & np.int32(-0x70002000))
        lost = np.int32(moved & np.int32(0x0F800000)) == np.int32(0x0F800000)
        bits[i] = bits_of(float_of(moved) * np.float32(2.0**112)) | (np.int32(0x7F800000) if lost else np.int32(0))


@njit
def widen_bfloat16(source, values, bits):
    for i in range(source.size):
        bits[i] = np.int32(source[i]) << np.int32(16)


@njit
def copy(source, values, bits):
    for i in range(source.size):
        bits[i] = source[i]

"""The passes over a block that numba's own loops are too slow for, written out in LLVM's language.

A pass goes through memory in vectors of 32 bytes, which every processor's LLVM takes apart or together as it must. It
takes whole groups of `GROUP` vectors and is given at least one.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTES = 32  # of a vector
GROUP = 4  # vectors, whose exponents fit one vector
MANTISSA = {32: 23, 64: 52}
EXPONENT = {32: 8, 64: 11}
AT_ONCE = 4  # values that `counts` looks for in one pass

_I64 = ir.IntType(64)
_DOUBLE = ir.DoubleType()
_FUSED = ("contract",)  # a product and a sum may be one instruction


def _looped(
    builder: Any, rounds: Any, starts: Sequence[Any], step: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> Sequence[Any]:
    """What `step(index, values)` makes of `starts` after so many rounds, one or more."""
    before = builder.block
    body, after = builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(_I64)
    values = [builder.phi(start.type) for start in starts]
    following = step(index, values)
    more = builder.add(index, _I64(1))
    for phi, start, new in zip((index, *values), (_I64(0), *starts), (more, *following), strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(new, builder.block)
    builder.cbranch(builder.icmp_signed("<", more, rounds), body, after)
    builder.position_at_end(after)
    return following


def _filled(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    """A vector that holds this value in all lanes."""
    vector = ir.VectorType(value.type, lanes)
    alone = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I64(0))
    zeros = _filled(ir.VectorType(ir.IntType(32), lanes), 0)
    return builder.shuffle_vector(alone, ir.Constant(vector, ir.Undefined), zeros)


def _loaded(builder: Any, start: Any, index: Any) -> Any:
    return builder.load(builder.gep(start, [index]), align=1)


def _vectors(builder: Any, context: Any, type_: Any, array: Any) -> Any:
    """The address of an array's elements, as one of vectors."""
    width = type_.dtype.bitwidth
    vector = ir.VectorType(ir.IntType(width), 8 * BYTES // width)
    return builder.bitcast(context.make_array(type_)(context, builder, array).data, vector.as_pointer())


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


def _reduced(builder: Any, how: str, vector: Any) -> Any:
    type_ = vector.type
    name = f"llvm.vector.reduce.{how}.v{type_.count}i{type_.element.width}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(type_.element, [type_]), name)
    return builder.call(function, [vector])


@intrinsic
def scan(context: Any, bits: Any, exponents: Any, groups: Any) -> Any:
    """Of the bits of so many groups of floats: the largest as signed and as unsigned integer, the smallest exponent
    field above zero, less one, and the largest one; the sum and the sum of squares. `exponents` gets the fields, in an
    order of its own.
    """
    width, field = bits.dtype.bitwidth, exponents.dtype.bitwidth
    lanes = 8 * BYTES // width
    mantissa = MANTISSA[width]
    returned = types.Tuple((bits.dtype, bits.dtype, exponents.dtype, exponents.dtype, types.float64, types.float64))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer, narrow = ir.IntType(width), ir.IntType(field)
        vector, fields = ir.VectorType(integer, lanes), ir.VectorType(narrow, GROUP * lanes)
        quarter = ir.VectorType(_DOUBLE, 4)
        stored = ir.VectorType(ir.FloatType() if width == 32 else _DOUBLE, 4)
        source = _vectors(builder, context, signature.args[0], arguments[0])
        values = builder.bitcast(source, stored.as_pointer())
        written = _vectors(builder, context, signature.args[1], arguments[1])
        pieces = lanes // 4

        def step(index: Any, state: Sequence[Any]) -> Sequence[Any]:
            signed, high, least, most, *sums = state
            packed = None
            for part in range(GROUP):
                place = builder.add(builder.mul(index, _I64(GROUP)), _I64(part))
                one = _loaded(builder, source, place)
                signed = builder.select(builder.icmp_signed(">", signed, one), signed, one)
                high = _larger(builder, high, one)
                shift = mantissa - field * part
                moved = (builder.lshr if shift > 0 else builder.shl)(one, _filled(vector, abs(shift)))
                moved = builder.and_(moved, _filled(vector, ((1 << EXPONENT[width]) - 1) << (field * part)))
                packed = moved if packed is None else builder.or_(packed, moved)
                for piece in range(pieces):
                    value = _loaded(builder, values, builder.add(builder.mul(place, _I64(pieces)), _I64(piece)))
                    if width == 32:
                        value = builder.fpext(value, quarter)
                    lane = 2 * ((part * pieces + piece) % 4)
                    sums[lane] = builder.fadd(sums[lane], value, flags=_FUSED)
                    squared = builder.fmul(value, value, flags=_FUSED)
                    sums[lane + 1] = builder.fadd(sums[lane + 1], squared, flags=_FUSED)
            packed = builder.bitcast(packed, fields)
            builder.store(packed, builder.gep(written, [index]), align=1)
            least = _smaller(builder, least, builder.sub(packed, _filled(fields, 1)))
            return signed, high, least, _larger(builder, most, packed), *sums

        starts = [_filled(vector, -(2 ** (width - 1))), _filled(vector, 0), _filled(fields, -1), _filled(fields, 0)]
        starts += [_filled(quarter, 0.0)] * 8
        signed, high, least, most, *sums = _looped(builder, arguments[2], starts, step)
        totals = []
        for kind in range(2):
            four = sums[kind]
            for other in sums[kind + 2 :: 2]:
                four = builder.fadd(four, other)
            total = builder.extract_element(four, _I64(0))
            for lane in range(1, 4):
                total = builder.fadd(total, builder.extract_element(four, _I64(lane)))
            totals.append(total)
        found = [("smax", signed), ("umax", high), ("umin", least), ("umax", most)]
        reduced = [_reduced(builder, how, part) for how, part in found]
        return context.make_tuple(builder, signature.return_type, [*reduced, *totals])

    return returned(bits, exponents, types.int64), generate


@intrinsic
def counts(context: Any, keys: Any, vectors: Any, first: Any) -> Any:
    """How many of the keys in so many vectors are `first`, and how many each of the numbers after it.

    A lane holds the count of its own, so there are at most 255 vectors.
    """
    width = keys.dtype.bitwidth
    lanes = 8 * BYTES // width

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, lane = ir.VectorType(ir.IntType(width), lanes), ir.IntType(width)
        start = _vectors(builder, context, signature.args[0], arguments[0])
        wanted = [_spread(builder, builder.add(arguments[2], lane(i)), lanes) for i in range(AT_ONCE)]

        def step(index: Any, found: Sequence[Any]) -> Sequence[Any]:
            loaded = _loaded(builder, start, index)
            equal = [builder.sext(builder.icmp_unsigned("==", loaded, one), vector) for one in wanted]
            return [builder.sub(some, more) for some, more in zip(found, equal, strict=True)]

        found = _looped(builder, arguments[1], [_filled(vector, 0)] * AT_ONCE, step)
        wide = ir.VectorType(ir.IntType(32), lanes)
        summed = [_reduced(builder, "add", builder.zext(some, wide)) for some in found]
        return context.make_tuple(builder, signature.return_type, [builder.zext(some, _I64) for some in summed])

    return types.UniTuple(types.int64, AT_ONCE)(keys, types.int64, keys.dtype), generate


@intrinsic
def vector_with(context: Any, bits: Any, code: Any) -> Any:
    """The first vector with a float of this magnitude code, which there must be."""
    width = bits.dtype.bitwidth
    lanes = 8 * BYTES // width

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = _vectors(builder, context, signature.args[0], arguments[0])
        wanted = _spread(builder, builder.shl(arguments[1], ir.IntType(width)(1)), lanes)
        before = builder.block
        body, after = builder.append_basic_block("seek"), builder.append_basic_block("found")
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(_I64)
        following = builder.add(index, _I64(1))
        index.add_incoming(_I64(0), before)
        index.add_incoming(following, body)
        loaded = _loaded(builder, start, index)
        same = builder.icmp_unsigned("==", builder.shl(loaded, _filled(loaded.type, 1)), wanted)
        which = builder.bitcast(same, ir.IntType(lanes))
        builder.cbranch(builder.icmp_unsigned("==", which, ir.IntType(lanes)(0)), body, after)
        builder.position_at_end(after)
        return index

    return types.int64(bits, bits.dtype), generate


@intrinsic
def vector_holding(context: Any, keys: Any, first: Any, vectors: Any, wanted: Any) -> Any:
    """The first vector from `first` on that has this key in it, or `vectors`."""
    lanes = 8 * BYTES // keys.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = _vectors(builder, context, signature.args[0], arguments[0])
        wanted = _spread(builder, arguments[3], lanes)
        before = builder.block
        check, body, after = (builder.append_basic_block(name) for name in ("check", "seek", "found"))
        builder.branch(check)
        builder.position_at_end(check)
        index = builder.phi(_I64)
        builder.cbranch(builder.icmp_signed("<", index, arguments[2]), body, after)
        builder.position_at_end(body)
        which = builder.icmp_unsigned("==", _loaded(builder, start, index), wanted)
        which = builder.bitcast(which, ir.IntType(lanes))
        following = builder.add(index, _I64(1))
        index.add_incoming(arguments[1], before)
        index.add_incoming(following, body)
        builder.cbranch(builder.icmp_unsigned("==", which, ir.IntType(lanes)(0)), check, after)
        builder.position_at_end(after)
        return index

    return types.int64(keys, types.int64, types.int64, keys.dtype), generate

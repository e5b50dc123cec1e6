"""The statistics of a softmax on CUDA, in Triton: logits and probabilities read once, without a wait for the device.

A program takes rows of one head, several at a time where they are short, in pieces where they are long. A second kernel
brings together what the programs found.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabilitykit.recorder.kernels import device
from stabilitykit.recorder.kernels.cuda import offset, ordered, value_of, wide_bits
from stabilitykit.recorder.kernels.softmax_layout import FIELDS, HEAD_FIELDS, Field

_TILE = 1024  # elements that a program looks at together, eight in each thread
_TILE_OF_FLOAT64 = 512
_TILES = 4  # that one program takes at least

_MAX_LOGIT, _RANGE, _MAX_PROBABILITY, _SUM_ERROR, _VISIBLE, _UNDERFLOWED, _MASKED_ROWS, _NAN_ROWS, _BOTH_ROWS = (
    tl.constexpr(int(field)) for field in Field
)
_FIELDS, _HEAD_FIELDS = tl.constexpr(FIELDS), tl.constexpr(HEAD_FIELDS)
_PARTS = tl.constexpr(256)  # rows that the second kernel reads together


def tally(logits: Tensor, probabilities: Tensor, head: int | None, hidden: Tensor | None) -> Tensor:
    """A row of `softmax_layout`, float64 on the tensors' device, of tensors that this kernel supports.

    They have one shape, to which `hidden`, boolean, expands; the softmax runs over their last dimension, of any length.
    Strides do not matter. A row of the softmax with a NaN among its probabilities, or with nothing to see, enters no
    statistic but its count. A subnormal probability adds less than 1e-36 to an entropy, and counts as 0 there.
    """
    places: tuple[int, ...]
    shape = logits.shape
    heads = 1 if head is None else shape[head]
    columns = shape[-1]
    rows = logits.numel() // max(columns * heads, 1)  # of each head
    parts = [logits.detach(), probabilities.detach()]
    if hidden is not None:
        parts.append(hidden.expand(shape))
    if logits.numel() == 0:
        places, dimensions, columns = (1,) * 20, 1, 1
    else:
        parts, places, dimensions = device.walked(parts, keep=1)
    tile = _TILE_OF_FLOAT64 if probabilities.dtype == torch.float64 else _TILE
    width = min(max(device.power_of_two(columns), 16), tile)
    tiles = -(-rows // (tile // width)) * -(-columns // width)  # of each head
    even = columns % 16 == 0 and all(stride % 16 == 0 for stride in (*places[5:9], *places[10:14]))
    programs = max(1, min(device.programs(logits.device) // max(heads, 1), tiles // _TILES))
    table = torch.empty((heads, programs, FIELDS + HEAD_FIELDS), dtype=torch.float64, device=logits.device)
    with device.current(logits.device):
        if heads > 0:
            look[(heads, programs)](
                parts[0],
                parts[1],
                parts[-1],
                table,
                rows,
                max(rows if head is None else math.prod(shape[head + 1 : -1]), 1),
                columns // 16 if even else columns,
                *places[1:4],
                *places[5:15],
                *places[-5:],
                HIDDEN=hidden is not None,
                DIMENSIONS=dimensions - 1,
                DENSE=all(stride == 1 for stride in places[9::5]),
                EVEN=even,
                LARGE=device.large(parts),
                ROWS=tile // width,
                COLUMNS=width,
            )
        if heads == programs == 1:
            return table.view(-1)
        row = torch.empty(FIELDS + HEAD_FIELDS * heads, dtype=torch.float64, device=logits.device)
        merge[(heads + 1,)](table, row, heads, programs)
    return row


# Below is what Triton compiles.


@triton.jit(
    do_not_specialize="rows head_rows columns n1 n2 n3 l0 l1 l2 l3 l4 p0 p1 p2 p3 p4 h0 h1 h2 h3 h4".split(),
    do_not_specialize_on_alignment=["hidden"],
)
def look(
    logits,
    probabilities,
    hidden,
    out,
    rows,
    head_rows,
    columns,
    n1,
    n2,
    n3,
    l0,
    l1,
    l2,
    l3,
    l4,
    p0,
    p1,
    p2,
    p3,
    p4,
    h0,
    h1,
    h2,
    h3,
    h4,
    HIDDEN: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes to `out[head, program]` a row for one head, of every so many-th group of ROWS rows.

    `rows` are those of one head; `head_rows` of them lie together. Logits and probabilities are read as integers, in
    which order, zero, infinity and NaN show without arithmetic that could flush a subnormal.
    """
    WIDE: tl.constexpr = probabilities.dtype.element_ty == tl.float64
    INTEGER: tl.constexpr = tl.int64 if WIDE else tl.int32
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    MAGNITUDE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    INFINITY: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    NORMAL: tl.constexpr = 0x0010000000000000 if WIDE else 0x00800000

    if EVEN:  # so are rows and columns, and the compiler, where it knows, reads several elements at once
        columns = columns * 16
    head, heads = tl.program_id(0), tl.num_programs(0)
    each = tl.arange(0, ROWS).to(INDEX)
    lanes = tl.arange(0, COLUMNS).to(INDEX)
    max_logit = tl.full([ROWS], float("-inf"), tl.float64)
    max_range = tl.full([ROWS], float("-inf"), tl.float64)
    max_probability = tl.full([ROWS], float("-inf"), tl.float64)
    max_error = tl.full([ROWS], float("-inf"), tl.float64)
    visible = tl.zeros([ROWS], tl.int64)
    underflowed = tl.zeros([ROWS], tl.int64)
    masked_rows = tl.zeros([ROWS], tl.int32)
    nan_rows = tl.zeros([ROWS], tl.int32)
    both_rows = tl.zeros([ROWS], tl.int32)
    least_entropy = tl.full([ROWS], float("inf"), tl.float64)
    entropies = tl.zeros([ROWS], tl.float64)
    sound_rows = tl.zeros([ROWS], tl.int32)
    for group in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        index = tl.full([ROWS], group, INDEX) * ROWS + each
        given = index < rows
        row = (index // head_rows * heads + head) * head_rows + index % head_rows
        logits_at = offset(row, 1, n1, n2, n3, 0, l0, l1, l2, l3, DIMENSIONS)
        probabilities_at = offset(row, 1, n1, n2, n3, 0, p0, p1, p2, p3, DIMENSIONS)
        if EVEN:
            logits_at = logits_at // 16 * 16
            probabilities_at = probabilities_at // 16 * 16
        hidden_at = offset(row, 1, n1, n2, n3, 0, h0, h1, h2, h3, DIMENSIONS)

        highest = tl.full([ROWS, COLUMNS], -MAGNITUDE - 1, INTEGER)
        lowest = tl.full([ROWS, COLUMNS], MAGNITUDE, INTEGER)
        largest = tl.zeros([ROWS, COLUMNS], INTEGER)
        seen = tl.zeros([ROWS, COLUMNS], tl.int32)
        zero = tl.zeros([ROWS, COLUMNS], tl.int32)
        nan = tl.zeros([ROWS, COLUMNS], tl.int32)
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        entropy = tl.zeros([ROWS, COLUMNS], tl.float64 if WIDE else tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + lanes
            inside = given[:, None] & (column < columns)[None, :]
            at = logits_at[:, None] + (column if DENSE else column * l4)[None, :]
            bits = wide_bits(tl.load(logits + at, mask=inside, other=0.0))
            at = probabilities_at[:, None] + (column if DENSE else column * p4)[None, :]
            chances = wide_bits(tl.load(probabilities + at, mask=inside, other=0.0))
            shown = inside
            if HIDDEN:
                at = hidden_at[:, None] + (column if DENSE else column * h4)[None, :]
                shown = shown & (tl.load(hidden + at, mask=inside, other=0) == 0)
            finite = shown & ((bits & MAGNITUDE) < INFINITY)
            shown = shown & (bits != -MAGNITUDE - 1 + INFINITY)  # the bits of -inf
            key = ordered(bits)
            highest = tl.maximum(highest, tl.where(finite, key, -MAGNITUDE - 1))
            lowest = tl.minimum(lowest, tl.where(finite, key, MAGNITUDE))
            seen += shown.to(tl.int32)

            code = chances & MAGNITUDE
            largest = tl.maximum(largest, chances)
            zero += (shown & (code == 0)).to(tl.int32)
            nan += (code > INFINITY).to(tl.int32)
            chance = value_of(chances)
            total += chance.to(tl.float64)
            normal = tl.where(code >= NORMAL, chance, 1.0)  # 1 · ln 1 = 0 for the others
            entropy -= normal * tl.log(normal)

        high, low = tl.max(highest, axis=1), tl.min(lowest, axis=1)
        any_finite = high >= low
        high = value_of(tl.where(any_finite, ordered(high), 0))
        low = value_of(tl.where(any_finite, ordered(low), 0))
        max_logit = tl.maximum(max_logit, tl.where(any_finite, high.to(tl.float64), float("-inf")))
        max_range = tl.maximum(max_range, tl.where(any_finite, (high - low).to(tl.float64), float("-inf")))
        count = tl.sum(seen, axis=1)
        visible += count
        underflowed += tl.sum(zero, axis=1)
        masked = given & (count == 0)
        spoiled = tl.sum(nan, axis=1) > 0
        sound = given & (count > 0) & (spoiled == 0)
        masked_rows += masked.to(tl.int32)
        nan_rows += spoiled.to(tl.int32)
        both_rows += (masked & spoiled).to(tl.int32)
        sound_rows += sound.to(tl.int32)
        chance = value_of(tl.where(sound, tl.max(largest, axis=1), 0)).to(tl.float64)
        max_probability = tl.maximum(max_probability, tl.where(sound, chance, float("-inf")))
        error = tl.abs(tl.where(sound, tl.sum(total, axis=1), 0.0) - 1.0)
        max_error = tl.maximum(max_error, tl.where(sound, error, float("-inf")))
        row_entropy = tl.sum(entropy, axis=1).to(tl.float64)
        least_entropy = tl.minimum(least_entropy, tl.where(sound, row_entropy, float("inf")))
        entropies += tl.where(sound, row_entropy, 0.0)

    out += (head * tl.num_programs(1) + tl.program_id(1)) * (_FIELDS + _HEAD_FIELDS)
    tl.store(out + _MAX_LOGIT, tl.max(max_logit, axis=0))
    tl.store(out + _RANGE, tl.max(max_range, axis=0))
    tl.store(out + _MAX_PROBABILITY, tl.max(max_probability, axis=0))
    tl.store(out + _SUM_ERROR, tl.max(max_error, axis=0))
    tl.store(out + _VISIBLE, tl.sum(visible, axis=0).to(tl.float64))
    tl.store(out + _UNDERFLOWED, tl.sum(underflowed, axis=0).to(tl.float64))
    tl.store(out + _MASKED_ROWS, tl.sum(masked_rows, axis=0).to(tl.float64))
    tl.store(out + _NAN_ROWS, tl.sum(nan_rows, axis=0).to(tl.float64))
    tl.store(out + _BOTH_ROWS, tl.sum(both_rows, axis=0).to(tl.float64))
    tl.store(out + _FIELDS, tl.min(least_entropy, axis=0))
    tl.store(out + _FIELDS + 1, tl.sum(entropies, axis=0))
    tl.store(out + _FIELDS + 2, tl.sum(sound_rows, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["heads", "programs"])
def merge(table, out, heads, programs):
    """Writes to `out` what `table[head, program]` says: the first programs each of one head, the last of all."""
    head = tl.program_id(0)
    each = tl.arange(0, _PARTS)
    if head < heads:
        least = tl.full([_PARTS], float("inf"), tl.float64)
        total = tl.zeros([_PARTS], tl.float64)
        rows = tl.zeros([_PARTS], tl.float64)
        for start in range(0, programs, _PARTS):
            given = start + each < programs
            part = table + (head * programs + start + each) * (_FIELDS + _HEAD_FIELDS) + _FIELDS
            least = tl.minimum(least, tl.load(part, mask=given, other=float("inf")))
            total += tl.load(part + 1, mask=given, other=0.0)
            rows += tl.load(part + 2, mask=given, other=0.0)
        out += _FIELDS + head * _HEAD_FIELDS
        tl.store(out, tl.min(least, axis=0))
        tl.store(out + 1, tl.sum(total, axis=0))
        tl.store(out + 2, tl.sum(rows, axis=0))
    else:
        for field in tl.static_range(_SUM_ERROR + 1):
            most = tl.full([_PARTS], float("-inf"), tl.float64)
            for start in range(0, heads * programs, _PARTS):
                part = table + (start + each) * (_FIELDS + _HEAD_FIELDS) + field
                most = tl.maximum(most, tl.load(part, mask=start + each < heads * programs, other=float("-inf")))
            tl.store(out + field, tl.max(most, axis=0))
        for field in tl.static_range(_SUM_ERROR + 1, _FIELDS):
            total = tl.zeros([_PARTS], tl.float64)
            for start in range(0, heads * programs, _PARTS):
                part = table + (start + each) * (_FIELDS + _HEAD_FIELDS) + field
                total += tl.load(part, mask=start + each < heads * programs, other=0.0)
            tl.store(out + field, tl.sum(total, axis=0))

"""What storing a checkpoint in a format does to its weights, before anything runs."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from stabilitykit.checkpoints.mapped import give_back, pieces, read_once
from stabilitykit.recorder.statistics import Statistics, measure
from stabilitykit.records import StoredWeights, WeightCount, WeightCounts, WeightRole, flat_index

_SHOWN = 5
_KINDS: tuple[WeightCount, ...] = ("nonfinite", "overflow", "zero", "subnormal")

# As GPTQ, AWQ, bitsandbytes, gemma_pytorch, float8 and MXFP4 checkpoints call them. A model's own `logit_scale` or
# `layer_scale` is none of them.
_ROLES: Mapping[WeightRole, re.Pattern[str]] = {
    "scale": re.compile(
        r"(?:^|[._])(?:scales|scale_inv|scaler|SCB|absmax|(?:weight|input|activation|global|proj)_scale(?:_2)?)$"
    ),
    "zero point": re.compile(r"(?:^|[._])(?:q?zeros|zero_point)$"),
}


def role_of(name: str) -> WeightRole | None:
    """What a tensor of a quantised layer is, by the last part of its name; None for what is no such tensor's."""
    return next((role for role, pattern in _ROLES.items() if pattern.search(name)), None)


def check_weights(
    tensors: Iterable[tuple[str, Tensor]],
    formats: Sequence[str],
    progress: Callable[[int], None] | None = None,
    *,
    blocks: Mapping[str, int] | None = None,
) -> dict[str, StoredWeights]:
    """`StoredWeights` of named tensors for each format, exact, ties included, in one reading of every tensor.

    Counts are those of a cast to the nearest, ties to even. Tensors of integers, such as quantised weights, are passed
    over; their floating scales are not. Of a mapped tensor a few rows at a time are in memory. `progress` is called
    with the bytes read, after each such piece. `blocks` are the elements that share a scale, by the names of tensors
    that were quantised. Single elements are looked for only in tensors that are among the worst so far.
    """
    sums: dict[str, Counter[str]] = {dtype: Counter() for dtype in formats}
    worst: dict[str, list[WeightCounts]] = {dtype: [] for dtype in formats}
    for name, tensor in tensors:
        is_counted = tensor.is_floating_point() and tensor.numel() > 0
        seen = []
        for piece in read_once(tensor):
            if is_counted:
                seen.append(measure(piece, formats))
            if progress is not None:
                progress(piece.nbytes)
        for dtype in sums if is_counted else ():
            counts = _counts(name, tensor, seen, dtype, (blocks or {}).get(name))
            sums[dtype].update({kind: getattr(counts, kind) for kind in ("elements", *_KINDS)})
            worst[dtype] = [
                _located(one, tensor, seen, dtype) if one is counts else one for one in _worst([*worst[dtype], counts])
            ]
    return {
        dtype: StoredWeights(
            dtype=dtype, worst=tuple(worst[dtype]), elements=of["elements"], **{kind: of[kind] for kind in _KINDS}
        )
        for dtype, of in sums.items()
    }


def _counts(name: str, tensor: Tensor, seen: Sequence[Statistics], dtype: str, block: int | None) -> WeightCounts:
    counts = [piece.formats[dtype] for piece in seen]
    return WeightCounts(
        name=name,
        elements=tensor.numel(),
        overflow=sum(count.overflow for count in counts),
        subnormal=sum(count.subnormal for count in counts),
        zero=sum(count.zero for count in counts),
        nonfinite=sum(piece.nonfinite for piece in seen),
        block_size=block,
        role=role_of(name),
    )


def _worst(found: Sequence[WeightCounts]) -> list[WeightCounts]:
    """Those with most to lose, worst first, and of each kind the one with most of it."""
    touched = [c for c in found if c.overflow or c.subnormal or c.zero or c.nonfinite]
    touched.sort(key=lambda c: (c.nonfinite, c.overflow, c.zero + c.subnormal), reverse=True)
    most = [max(touched, key=lambda c: getattr(c, kind)) for kind in _KINDS] if touched else []
    return [one for place, one in enumerate(touched) if place < _SHOWN or any(one is other for other in most)]


def _located(counts: WeightCounts, tensor: Tensor, seen: Sequence[Statistics], dtype: str) -> WeightCounts:
    """With its first element that is not finite or would overflow or, without one, that becomes zero."""
    is_lost = bool(counts.nonfinite or counts.overflow)
    if not is_lost and not counts.zero:
        return counts

    def holds(part: Statistics) -> bool:
        of = part.formats[dtype]
        return bool(part.nonfinite or of.overflow) if is_lost else bool(of.zero)

    parts = pieces(tensor)
    number = next(number for number, part in enumerate(seen) if holds(part))
    piece = parts[number]
    index = _first(piece, lambda part: holds(measure(part, (dtype,))))
    value = float(piece[index])
    give_back(piece)
    if number:
        index = (index[0] + sum(map(len, parts[:number])), *index[1:])
    block = None if counts.block_size is None else flat_index(index, tensor.shape) // counts.block_size
    return replace(counts, index=index, value=value, block=block)


def _first(values: Tensor, holds: Callable[[Tensor], bool]) -> tuple[int, ...]:
    """Row-major index of the first element that `holds` is true of, which there must be; by halves, each read once."""
    index: list[int] = []
    while values.ndim:
        begin, end = 0, len(values)
        while end - begin > 1:
            middle = (begin + end) // 2
            begin, end = (begin, middle) if holds(values[begin:middle]) else (middle, end)
        index.append(begin)
        values = values[begin]
    return tuple(index)

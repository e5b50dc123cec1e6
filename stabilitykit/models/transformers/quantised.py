"""Weights that are stored as small numbers beside their scales: which tensor takes a power of two instead of them.

A weight W = s q, with a scale s for each block of elements, becomes 2^e W by s alone, and q stays as it is. So a factor
can be put into a format whose scales can hold it, and differ from block to block where scales do.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabilitykit.errors import CheckpointError
from stabilitykit.models.transformers.stored_names import blocks, by_element
from stabilitykit.records.scaling import Factor

_Tensors = Mapping[str, Tensor]
_Axis = tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A weight of this `shape` in the model, made of the stored tensors `parts`.

    The one named `scale` takes its factor. `axes` are, for each dimension of it, the dimension of the weight and how
    many elements along that share one scale; None for one of size 1. With `flat` it has one scale for so many elements
    of the flattened weight instead. A scale that is `divided` by takes the inverse. `refused` says why none of the
    parts can take a factor.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    scale: str = ""
    axes: tuple[_Axis, ...] = ()
    flat: int = 0
    divided: bool = False
    refused: str = ""


def find_quantised(tensors: _Tensors, settings: Mapping[str, Any]) -> dict[str, Quantised]:
    """By the name that a weight would have if it were stored plainly, those among `tensors` that are quantised.

    `settings` are the config's `quantization_config`. Raises CheckpointError, by name, for a tensor of integers that is
    no part of a format known here.
    """
    found: dict[str, Quantised] = {}
    for name in tensors:
        for ending, (plain, read) in _FORMATS.items():
            if name.endswith(ending):
                base = name.removesuffix(ending)
                one = read(base, tensors, settings)
                if one is not None:
                    found[base + plain] = one
                    break
    parts = {part for one in found.values() for part in one.parts}
    fixed = [name for name in tensors if name.endswith(_FIXED)]
    if fixed:
        found = {
            name: _with_reason(one, f"it has scales of its inputs that were measured beforehand ({fixed[0]})")
            for name, one in found.items()
        }
    odd = [name for name in tensors if name not in parts and _is_quantised(tensors[name])]
    if odd:
        raise CheckpointError(
            f"{odd[0]} holds {tensors[odd[0]].dtype}, quantised by {settings.get('quant_method')} in a way that is not "
            "known here: its scales cannot be found."
        )
    return found


def on_scale(name: str, one: Quantised, factor: Factor) -> Factor:
    """The factor of the tensor `one.scale`, so that the weight `name` is multiplied by `factor`.

    Raises CheckpointError where the format cannot take it, or has one scale for elements of different factors.
    """
    if one.refused:
        raise CheckpointError(f"{name} cannot be multiplied by a power of two: {one.refused}.")
    if factor.added:
        raise CheckpointError(f"{name} is quantised, and a gain c + w cannot be scaled by its scale.")
    wanted = by_element(factor, torch.Size(one.shape))
    if one.flat:
        rows = wanted.reshape(-1)
        rows = torch.nn.functional.pad(rows, (0, -len(rows) % one.flat), value=int(rows[-1])).reshape(-1, one.flat)
        own, coarse = rows[:, 0], bool((rows != rows[:, :1]).any())
    else:
        each = dict(axis for axis in one.axes if axis is not None)
        steps = [each.get(dim, size) for dim, size in enumerate(one.shape)]
        own = wanted[tuple(slice(None, None, step) for step in steps)]
        coarse = any(end % steps[dim] and end != one.shape[dim] for dim, ends in factor.ends.items() for end in ends)
        order = list(each)
        own = own.permute(*order, *(dim for dim in range(own.ndim) if dim not in order))
        own = own.reshape([1 if axis is None else own.shape[order.index(axis[0])] for axis in one.axes])
    if coarse:
        raise CheckpointError(f"{name} has one scale in {one.scale} for elements that need different powers of two.")
    made = blocks(own, 0.0)
    return made.inverse if one.divided else made


def _with_reason(one: Quantised, reason: str) -> Quantised:
    return Quantised(shape=one.shape, parts=one.parts, refused=one.refused or reason)


def _is_quantised(tensor: Tensor) -> bool:
    """Numbers that nobody stores but as part of something larger. Integers of 64 bits count things."""
    return tensor.ndim > 1 and (not tensor.is_floating_point() or tensor.element_size() == 1) and tensor.dtype not in (
        torch.int64, torch.bool,
    )  # fmt: skip


def _axes(scale: Tensor, shape: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[_Axis, ...] | None:
    """Of scales that are one, or one for each block of a weight, whose size the config says if it does not divide the
    weight's. None where they are neither.
    """
    if scale.numel() == 1:
        return (None,) * scale.ndim
    counts = (*scale.shape, *[1] * (len(shape) - scale.ndim))
    told = settings.get("weight_block_size")
    if told and len(told) == len(shape) == scale.ndim:
        return tuple((dim, int(size)) for dim, size in enumerate(told))
    if len(counts) != len(shape) or any(size % count for size, count in zip(shape, counts, strict=True)):
        return None
    return tuple(None if counts[dim] == 1 else (dim, shape[dim] // counts[dim]) for dim in range(scale.ndim))


def _beside(base: str, endings: tuple[str, ...], tensors: _Tensors) -> tuple[str, ...]:
    return tuple(base + ending for ending in endings if base + ending in tensors)


def _scaled_weight(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    """float8 or int8 of the weight's own shape: finegrained float8, fbgemm, compressed-tensors, quark."""
    weight = tensors[base]
    name = next(iter(_beside(base, ("_scale_inv", "_scale"), tensors)), None)
    if name is None or not _is_quantised(weight):
        return None
    shape = tuple(weight.shape)
    axes = _axes(tensors[name], shape, settings)
    parts = (base, name, *_beside(base, ("_zero_point",), tensors))
    if axes is None:
        return Quantised(shape=shape, parts=parts, refused=f"{name} has a shape that its blocks do not follow from")
    return Quantised(shape=shape, parts=parts, scale=name, axes=axes)


def _packed(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    """Several to a byte or a word: compressed-tensors."""
    packed, name = f"{base}_packed", f"{base}_scale"
    if name not in tensors:
        return None
    parts = (packed, name, *_beside(base, ("_shape", "_zero_point", "_g_idx", "_global_scale"), tensors))
    scale = tensors[name]
    told = f"{base}_shape"
    if told in tensors:
        shape = tuple(int(size) for size in tensors[told].tolist())
    else:
        shape = (*tensors[packed].shape[:-1], 2 * tensors[packed].shape[-1])  # four bits each, in bytes
    if f"{base}_global_scale" in tensors:
        return Quantised(shape=shape, parts=parts, scale=f"{base}_global_scale", axes=(None,), divided=True)
    axes = _axes(scale, shape, settings)
    if axes is None:
        return Quantised(shape=shape, parts=parts, refused=f"{name} has a shape that its blocks do not follow from")
    if f"{base}_g_idx" in tensors:  # columns are in no order, and any of them may be of any group
        axes = tuple(None if axis is not None and axis[0] == 1 else axis for axis in axes)
    return Quantised(shape=shape, parts=parts, scale=name, axes=axes)


def _grouped(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    """`scales` [groups, out] of a weight [out, in] that is stored packed and transposed: GPTQ and AWQ."""
    name = f"{base}.scales"
    if name not in tensors:
        return None
    scale, packed = tensors[name], tensors[f"{base}.qweight"]
    bits = int(settings.get("bits") or settings.get("w_bit") or 4)
    inward = packed.shape[0] if settings.get("quant_method") == "awq" else packed.shape[0] * 32 // bits
    shape = (int(scale.shape[1]), int(inward))
    parts = (f"{base}.qweight", name, *_beside(base, (".qzeros", ".g_idx"), tensors))
    ordered = scale.shape[0] > 1 and not settings.get("desc_act")  # else a group may be of any columns
    return Quantised(
        shape=shape,
        parts=parts,
        scale=name,
        axes=((1, math.ceil(inward / scale.shape[0])) if ordered else None, (0, 1)),
    )


def _bitsandbytes_8bit(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    weight, name = tensors[f"{base}.weight"], f"{base}.SCB"
    if name not in tensors:
        return None
    parts = (f"{base}.weight", name, *_beside(base, (".weight_format",), tensors))
    threshold = settings.get("llm_int8_threshold", 6.0)
    if threshold:
        reason = f"llm_int8_threshold singles out inputs above {threshold:g}, whatever they are scaled by"
        return Quantised(shape=tuple(weight.shape), parts=parts, refused=reason)
    return Quantised(shape=tuple(weight.shape), parts=parts, scale=name, axes=((0, 1),))


def _bitsandbytes_4bit(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    weight = f"{base}.weight"
    parts = tuple(name for name in tensors if name == weight or name.startswith(f"{weight}."))
    state = next((name for name in parts if ".quant_state.bitsandbytes__" in name), None)
    if state is None:
        return None
    told = json.loads(bytes(tensors[state].tolist()))
    shape = tuple(int(size) for size in told["shape"])
    if "nested_absmax" in {name.rpartition(".")[2] for name in parts}:
        return Quantised(shape=shape, parts=parts, refused="its scales are quantised themselves (double quantisation)")
    return Quantised(shape=shape, parts=parts, scale=f"{weight}.absmax", flat=int(told["blocksize"]))


def _shared_exponents(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    """Experts in MXFP4: blocks [experts, out, groups, 16] of a weight [experts, in, out], and for each an exponent."""
    name = f"{base}_scales"
    if name not in tensors:
        return None
    experts, outward, groups, each = tensors[f"{base}_blocks"].shape
    shape = (int(experts), int(groups * each * 2), int(outward))
    return Quantised(shape=shape, parts=(f"{base}_blocks", name), scale=name, axes=((0, 1), (2, 1), (1, 2 * int(each))))


def _torchao(base: str, tensors: _Tensors, settings: Mapping[str, Any]) -> Quantised | None:
    data, name = f"{base}_weight_qdata", f"{base}_weight_scale"
    parts = tuple(one for one in tensors if one.startswith(f"{base}_weight_"))
    shape = tuple(tensors[data].shape)
    axes = _axes(tensors[name], shape, settings) if name in tensors else None
    zeros = [one for one in parts if one.endswith("_zero_point") and tensors[one].is_floating_point()]
    if (
        axes is None
        or zeros
        or {one.removeprefix(f"{base}_weight_") for one in parts} - {"qdata", "scale", "zero_point"}
    ):
        return Quantised(shape=shape, parts=parts, refused=f"{base}weight is stored as {', '.join(parts)}")
    return Quantised(shape=shape, parts=parts, scale=name, axes=axes)


# By how a stored tensor's name ends: how the weight's own name goes on from there, and who reads it.
_FORMATS: dict[str, tuple[str, Callable[[str, _Tensors, Mapping[str, Any]], Quantised | None]]] = {
    "weight_packed": ("weight", lambda base, tensors, settings: _packed(f"{base}weight", tensors, settings)),
    ".qweight": (".weight", _grouped),
    ".SCB": (".weight", _bitsandbytes_8bit),
    ".weight.absmax": (".weight", _bitsandbytes_4bit),
    "_blocks": ("", _shared_exponents),
    "_weight_qdata": ("weight", _torchao),
    "": ("", _scaled_weight),
}
_FIXED = (".input_scale", ".activation_scale", ".input_global_scale", ".k_scale", ".v_scale")

"""Operators that only place values, or choose among those of one tensor: exponents go where values go."""

from typing import Any

import torch
from torch import Tensor

from stabilitykit.scaling.call import Call
from stabilitykit.scaling.shadows import Shadow, compressed, expanded

VIEWS = (
    "view _unsafe_view reshape _reshape_alias t transpose permute expand slice select unsqueeze squeeze split "
    "split_with_sizes unsafe_split unsafe_split_with_sizes unbind detach alias clone contiguous _to_copy repeat narrow "
    "chunk as_strided unfold diagonal movedim flip roll lift_fresh lift_fresh_copy lift to view_as _conj resolve_conj "
    "resolve_neg positive expand_as view_as_real view_as_complex real imag"
)
_LOOKUPS = "index index_select gather embedding repeat_interleave tril triu take_along_dim masked_select take"
_AS_THEY_ARE = frozenset(
    "detach alias clone contiguous _to_copy lift_fresh lift_fresh_copy lift to _conj resolve_conj resolve_neg positive "
    "tril triu".split()
)
_AS_RESHAPED = frozenset(("view", "_unsafe_view", "_reshape_alias", "view_as", "expand_as"))
_COMPLEX = frozenset(("view_as_real", "view_as_complex", "real", "imag"))
_OF_MEMORY = frozenset(("as_strided", "masked_select", "take"))  # what they take is not told by dimensions alone


def move(call: Call) -> Shadow | list[Shadow]:
    """f places values: f(2^e x) = 2^(f(e)) f(x), where f(e) places exponents in the same way. An integer has none."""
    shadow = call.first()
    if not call.outputs:
        return call.zero(shadow, "it becomes an integer")
    return shadow if isinstance(shadow, int) else moved(call, shadow)


def is_followed(call: Call) -> bool:
    """Whether it is known where each element goes."""
    return call.name not in _COMPLEX | _OF_MEMORY


def moved(call: Call, shadow: Shadow) -> Shadow | list[Shadow]:
    """The shadow of what a move makes of a tensor with this one; elements that it cannot follow get one exponent."""
    if call.name in _AS_THEY_ARE:
        return shadow
    if not is_followed(call):
        return call.one(shadow)
    full = expanded(shadow, call.args[0].shape)
    if call.name in _AS_RESHAPED:
        return compressed(full.reshape(call.outputs[0].shape))
    rest: dict[str, Any] = {name: value for name, value in call.kwargs.items() if name != "dtype"}
    made = call.func(full, *call.args[1:], **rest)
    return compressed(made) if isinstance(made, Tensor) else [compressed(one) for one in made]


def pick(call: Call) -> Shadow | list[Shadow]:
    """Chosen by size among the elements along a dimension, which need one scale: max, sort, topk, pooling.

    2^e > 0 keeps their order, and the first of equals stays the first.
    """
    return call.one(call.first())


def pad(call: Call) -> Shadow:
    """Put around by a value, which needs the same scale: 0 and ±inf have any."""
    value = call.argument(2, "value", 0)
    if value is not None and value != 0 and abs(value) != float("inf"):
        return call.zero(call.first(), f"it is padded with {value:g}, which has a scale of its own")
    return call.one(call.first())


def place(call: Call) -> Shadow:
    """Written into another tensor: both need one scale. Into zeros that have any they bring their own."""
    return call.one(call.equal(*(call.one(shadow) for shadow in call.all())))


def put_together(call: Call) -> Shadow:
    """One behind the other. Tensors without elements say nothing: a cache begins with one."""
    parts = call.args[0]
    filled = [part for part in parts if part.numel()] or list(parts[:1])
    shadows = [call.of(part) for part in filled]
    if all(isinstance(shadow, int) for shadow in shadows) and len(set(shadows)) == 1:
        return shadows[0]
    dim = call.argument(1, "dim", 0)
    full = [expanded(shadow, part.shape) for shadow, part in zip(shadows, filled, strict=True)]
    made = torch.stack(full, dim) if call.name == "stack" else torch.cat(full, dim)
    return call.one(compressed(made), "tensors that are put one behind the other need one scale")


RULES = {
    move: f"{VIEWS} {_LOOKUPS}",
    pick: "max min amax amin sort topk kthvalue mode median nanmedian msort cummax cummin max_pool1d max_pool2d "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool1d aminmax "
    "pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im",
    pad: "constant_pad_nd pad",
    place: "index_put _index_put_impl copy index_copy index_add scatter scatter_add scatter_reduce slice_scatter "
    "select_scatter masked_scatter diagonal_scatter index_fill index_reduce put",
    put_together: "cat stack hstack vstack concat",
}

"""Operators that make tensors of numbers: zeros and infinities have any scale, other numbers have the exponent 0."""

from stabilitykit.scaling.call import Call, has_any_scale, is_number
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.shadows import Shadow


def zeros(call: Call) -> Shadow:
    """2^e 0 = 0 for every e. What `empty` makes is filled later."""
    return call.any_scale()


def filled(call: Call) -> Shadow:
    """Filled with one number: 0, ±inf and a mask's minimum have any scale."""
    place = {"new_full": 2, "scalar_tensor": 0}.get(call.name, 1)
    value = call.argument(place, "fill_value", call.kwargs.get("value"))
    if is_number(value):
        if call.of(value) != ZERO:
            return call.one(call.of(value))
        value = float(value.real) if value.numel() == 1 else 1.0
    return call.any_scale() if isinstance(value, float | int) and has_any_scale(value) else ZERO


def fill(call: Call) -> Shadow:
    """Written over what a tensor held, which may be a part of a larger one: the number needs that one's scale."""
    made = filled(call)
    return call.equal(call.first(), made)


def clear(call: Call) -> Shadow:
    """Zeros written over what a tensor held keep its scale."""
    return call.first()


RULES = {
    zeros: "zeros zeros_like new_zeros empty empty_like new_empty empty_strided new_empty_strided empty_permuted",
    filled: "full full_like new_full scalar_tensor",
    fill: "fill",
    clear: "zero",
}

"""Products, quotients and powers: exponents add up, or are multiplied."""

from fractions import Fraction

from torch import Tensor

from stabilitykit.scaling.call import Call, is_number, scalar
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.shadows import Shadow, compressed, elementwise, expanded


def multiply(call: Call) -> Shadow:
    """2^a x · 2^b y = 2^(a + b) x y. A number may follow a setting of the config, which then has an exponent."""
    one, other = call.args[0], call.args[1]
    if is_number(one) and is_number(other):
        return call.sum(call.of(one), call.of(other))
    value, tensor = (scalar(other), one) if is_number(one) else (scalar(one), other)
    return call.sum(call.of(tensor), _of_number(call, value))


def divide(call: Call) -> Shadow:
    """2^a x / 2^b y = 2^(a - b) x / y; a quotient that is rounded to an integer needs the exponent 0."""
    one, other = call.args[0], call.args[1]
    over = call.of(one) if is_number(one) else _of_number(call, scalar(one))
    under = call.of(other) if is_number(other) else _of_number(call, scalar(other))
    made = call.difference(over, under)
    if call.kwargs.get("rounding_mode"):
        return call.zero(made, "the quotient is rounded to an integer")
    return made


def _of_number(call: Call, value: float | None) -> int:
    setting = None if value is None else call.follows(value)
    return ZERO if setting is None else setting


def multiply_add(call: Call) -> Shadow:
    """x + c a b: the product needs the scale of x."""
    return call.equal(call.of(call.args[0]), call.sum(call.of(call.args[1]), call.of(call.args[2])))


def divide_add(call: Call) -> Shadow:
    """x + c a / b: the quotient needs the scale of x."""
    return call.equal(call.of(call.args[0]), call.difference(call.of(call.args[1]), call.of(call.args[2])))


_POWERS = {
    "square": Fraction(2), "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "reciprocal": Fraction(-1),
    "var": Fraction(2),
}  # fmt: skip


def power(call: Call) -> Shadow:
    """(2^e x)^k = 2^(k e) x^k, for a number k; where k is a tensor, or is raised to one, e = 0."""
    exponent = _POWERS.get(call.name)
    if exponent is None:
        base, to = call.args[0], scalar(call.args[1])
        if to is None or not is_number(base):
            for operand in call.operands:
                call.zero(call.of(operand), "it is raised to a power that is no number, or is one itself")
            return ZERO
        exponent = Fraction(to).limit_denominator(64)
    shadow = call.one(call.first()) if call.name == "var" else call.first()
    return call.times(exponent, shadow)


def variance_and_mean(call: Call) -> list[Shadow]:
    """Var(2^e x) = 2^(2e) Var(x), and the mean is 2^e times as large."""
    one = call.one(call.first())
    return [call.times(2, one), one]


def matmul(call: Call) -> Shadow:
    """Σ_k 2^a x_ik 2^b y_kj = 2^(a + b) (x y)_ij: neither may change along k; y may along j. An addend needs a + b."""
    adds = call.name in ("addmm", "baddbmm", "addmv", "addbmm")
    left, right = call.args[adds], call.args[adds + 1]
    made = contracted(call, left, right, transposed=call.name == "linear")
    addend = call.args[0] if adds else call.argument(2, "bias") if call.name == "linear" else None
    return made if addend is None else call.equal(made, call.of(addend))


def contracted(call: Call, left: Tensor, right: Tensor, *, transposed: bool) -> Shadow:
    """The exponents of a product of matrices; of groups of rows, one matrix's are every matrix's."""
    a, b = call.of(left), call.of(right)
    if isinstance(b, Tensor) and transposed and b.ndim > 1:
        b = b.mT
    if isinstance(a, Tensor):
        a = _along_rows(call, a, -1) if left.ndim == call.outputs[0].ndim else call.one(a)
    if isinstance(b, Tensor):
        b = _along_rows(call, b, -2) if right.ndim > 1 else call.one(b)
    if isinstance(b, Tensor) and b.ndim > call.outputs[0].ndim:  # a matrix for each group of rows
        b = b[0] if b.shape[0] == 1 else call.one(b)
    return elementwise(call.exponents.sum, a, b)


def _along_rows(call: Call, shadow: Tensor, summed: int) -> Shadow:
    """Without the dimension that is summed over, along which there may be no changes."""
    first = shadow.narrow(summed, 0, 1)
    call.equal(shadow, first, why="what a product sums over needs one scale")
    return compressed(first)


def convolve(call: Call) -> Shadow:
    """As a product of matrices: input and weight each need one scale; the weight may differ between output channels."""
    x = call.one(call.of(call.args[0]))
    weight = call.args[1]
    shadow = call.of(weight)
    bias = call.argument(2, "bias")
    turned = bool(call.argument(6, "transposed", False))
    if isinstance(shadow, Tensor) and not turned:
        full = expanded(shadow, weight.shape).reshape(weight.shape[0], -1)
        rows = call.equal(full, full[:, :1], why="what a convolution sums over needs one scale")
        per_channel = expanded(rows, full.shape)[:, 0]
        shape = [1, -1] + [1] * (call.outputs[0].ndim - 2)
        made = call.sum(x, compressed(per_channel.reshape(shape)))
    else:
        made = call.sum(x, call.one(shadow))
    if bias is None:
        return made
    of_bias = call.of(bias)
    if isinstance(of_bias, Tensor):
        of_bias = of_bias.reshape([1, -1] + [1] * (call.outputs[0].ndim - 2))
    return call.equal(made, of_bias)


RULES = {
    multiply: "mul multiply",
    divide: "div true_divide divide",
    multiply_add: "addcmul",
    divide_add: "addcdiv",
    power: "pow square sqrt rsqrt reciprocal var",
    variance_and_mean: "var_mean",
    matmul: "mm bmm addmm baddbmm matmul linear mv dot vdot addmv addbmm _grouped_mm _scaled_grouped_mm grouped_mm",
    convolve: "convolution _convolution mkldnn_convolution conv1d conv2d conv3d conv_transpose2d",
}

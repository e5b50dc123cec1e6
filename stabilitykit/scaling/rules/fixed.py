"""Operators that know no scale: what they are given needs the exponent 0, or they do not ask for it at all."""

from stabilitykit.scaling.call import Call, Known
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.shadows import Shadow, compressed, expanded

_NAMES = {"_softmax": "softmax", "_log_softmax": "log_softmax", "_safe_softmax": "softmax"}


def fixed(call: Call) -> Shadow:
    """f(2^e x) is no power of two times f(x) unless e = 0: softmax, gelu, exp, sigmoid, rounding, a draw."""
    name = _NAMES.get(call.name, call.name)
    for operand in call.operands:
        call.zero(call.of(operand), f"{name} is not homogeneous{_scaled_by(call.known(operand))}")
    return ZERO


def _scaled_by(known: Known) -> str:
    if known.constant is None:
        return ""
    return (
        f", and the constant {known.constant:.6g} that its operand was multiplied by follows no setting of the config"
    )


def gate(call: Call) -> Shadow:
    """a · sigmoid(b), of the halves of one tensor: b needs the exponent 0, and the result has that of a."""
    dim = call.argument(1, "dim", -1)
    full = expanded(call.first(), call.args[0].shape)
    a, b = full.chunk(2, dim)
    call.zero(compressed(b), "sigmoid is not homogeneous")
    return compressed(a)


def number(call: Call) -> None:
    """A number that leaves the tensors, or an integer made of one: what happens to it is not seen."""
    for operand in call.operands:
        call.zero(call.of(operand), "its value is read by Python, or becomes an integer")


def order(call: Call) -> None:
    """Which element is largest, where they stand, whether one is finite: 2^e > 0 changes none of it."""
    for operand in call.operands:
        call.one(call.of(operand))


def sign(call: Call) -> Shadow:
    """sign(2^e x) = sign(x)."""
    return ZERO


def angle(call: Call) -> Shadow:
    """atan2(2^e y, 2^e x) = atan2(y, x): both need one scale, and the result has none."""
    call.equal(*call.all())
    return ZERO


RULES = {
    fixed: "_softmax _log_softmax _safe_softmax softmax log_softmax gelu silu tanh sigmoid exp exp2 expm1 log log2 "
    "log10 log1p logsumexp logcumsumexp sin cos tan asin acos atan sinh cosh erf erfc erfinv softplus elu celu selu "
    "mish hardswish hardsigmoid log_sigmoid_forward logit round floor ceil trunc frac fmod remainder floor_divide "
    "prod cumprod multinomial threshold softshrink hardshrink digamma lgamma i0 special_expit sinc "
    "_euclidean_dist bucketize searchsorted histc grid_sampler_2d _scaled_mm "
    "fake_quantize_per_tensor_affine_cachemask",
    gate: "glu",
    number: "_local_scalar_dense item",
    order: "argmax argmin argsort isnan isinf isfinite nonzero any all signbit logical_not logical_and logical_or "
    "logical_xor is_nonzero count_nonzero isposinf isneginf",
    sign: "sign sgn",
    angle: "atan2",
}

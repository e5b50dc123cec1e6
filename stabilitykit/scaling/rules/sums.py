"""Operators that are linear in their operands together: all of them need one scale."""

from stabilitykit.scaling.call import Call, has_any_scale, is_mask, is_number, scalar
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.shadows import Shadow, values


def linear(call: Call) -> Shadow:
    """f(2^e x) = 2^e f(x): f is homogeneous of degree one, element by element: -x, |x|, relu."""
    return call.first()


def reduce(call: Call) -> Shadow:
    """As `linear`, of elements that are summed or averaged, which need one scale."""
    return call.one(call.first())


def leak(call: Call) -> Shadow:
    """x where it is positive, else w x: homogeneous in x, of which w is a weight."""
    call.zero(call.of(call.args[1]), "it is a slope, which only some elements are multiplied by")
    return call.first()


def length(call: Call) -> Shadow:
    """A norm of 2^e x is 2^e times that of x, unless it counts what is not 0."""
    one = call.one(call.first())
    return ZERO if call.argument(1, "ord", 2) == 0 else one


def distance(call: Call) -> Shadow:
    """Distances between 2^e x and 2^e y are 2^e times as large, unless they count what differs."""
    one = call.one(call.equal(*call.all(), why="distances are between what has one scale"))
    return ZERO if call.argument(2, "p", 2.0) == 0 else one


def bag(call: Call) -> list[Shadow]:
    """Sums of rows, each of which may have a weight; rows and weights each need one scale."""
    several = [call.one(one) for one in call.all()]
    return [call.sum(*several)] * len(call.outputs)


def add(call: Call) -> Shadow:
    """2^e x + 2^e y = 2^e (x + y). A gain c + w has the sum's exponent; other constants must follow their operand."""
    one, other = call.args[0], call.args[1]
    if is_number(one) and is_number(other):
        return call.equal(*(call.any_scale() if _hides(call, x) else call.of(x) for x in (one, other)))
    value, tensor = (scalar(other), one) if is_number(one) else (scalar(one), other)
    shadow = call.of(tensor)
    if value == 0:
        return shadow
    if value is None:  # of integers, which are constants
        return call.zero(shadow, "integers are added to it, which have a scale of their own")
    known = call.known(tensor)
    if known.parameter is not None:
        call.gain(known.parameter, -value if call.name == "sub" else value)
        return shadow
    return beside(call, shadow, value)


def beside(call: Call, shadow: Shadow, value: float) -> Shadow:
    """x + c: c must be scaled as x is, which a config can do where the module's c follows one of its settings."""
    one = call.one(shadow)
    setting = call.follows(value)
    if setting is not None:
        why = f"{value:g} is added to it, which follows {call.exponents.in_words(setting)}"
        call.exponents.equate(one, setting, call.site, why, "eps" if value < 1e-2 else "")
        return one
    why = f"{value:g} is added to it, which no setting of the config changes"
    return call.zero(one, why, "eps" if 0 < value < 1e-2 else "")


def _hides(call: Call, tensor: object) -> bool:
    """Whether an operand is a mask made of constants: 0 beside what hides, which may have any scale."""
    return is_number(tensor) and values(call.of(tensor)) == [ZERO] and is_mask(tensor)  # type: ignore[arg-type]


def choose(call: Call) -> Shadow:
    """Elements of one or the other: both need one scale. 0, ±inf and a mask's minimum have any."""
    numbers = [one for one in (*call.args, *call.kwargs.values()) if scalar(one) is not None]
    shadows = [call.any_scale() if _hides(call, one) else call.of(one) for one in call.operands]
    for number in numbers:
        if not has_any_scale(number):
            return call.zero(call.equal(*shadows), f"{number:g} takes its place, which has a scale of its own")
    return call.equal(*shadows)


def bound(call: Call) -> Shadow:
    """min(max(x, low), high): bounds need the scale of x. 0, ±inf and magnitudes past 60,000 have any."""
    bounds = [one for one in (*call.args[1:], *call.kwargs.values()) if one is not None]
    shadow = call.first()
    for one in bounds:
        if is_number(one):
            shadow = call.equal(shadow, call.any_scale() if _hides(call, one) else call.of(one))
        elif not has_any_scale(one):
            setting = call.follows(float(one))
            if setting is not None:
                shadow = call.equal(shadow, setting)
            else:
                why = f"it is clamped at {one:g}, which no setting of the config changes"
                call.zero(shadow, why, "bound" if 0 < one < 1e-2 else "")
    return shadow


def compare(call: Call) -> None:
    """2^e x < 2^e y exactly where x < y; a number must be 0 or infinite."""
    tensors = [one for one in call.args[:2] if is_number(one)]
    if len(tensors) == 2:
        call.equal(*(call.of(one) for one in tensors), why="what is compared needs one scale")
        return
    for number in map(scalar, call.args[:2]):
        if number is not None and number != 0 and abs(number) != float("inf"):
            call.zero(call.of(tensors[0]), f"it is compared with {number:g}, which has a scale of its own")


def interpolate(call: Call) -> Shadow:
    """x + t (y - x): x and y need one scale, and t is a number."""
    one, other, weight = call.args[:3]
    call.zero(call.of(weight), "it is a weight between two tensors")
    return call.equal(call.of(one), call.of(other))


RULES = {
    linear: "neg abs relu leaky_relu rrelu_with_noise native_dropout dropout conj",
    reduce: "sum mean cumsum std nansum nanmean avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d "
    "_upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_trilinear3d reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d _fft_r2c _fft_c2r _fft_c2c trace",
    leak: "_prelu_kernel prelu",
    length: "linalg_vector_norm norm",
    distance: "_cdist_forward",
    bag: "_embedding_bag _embedding_bag_forward_only",
    add: "add sub rsub",
    choose: "where masked_fill maximum minimum fmax fmin",
    bound: "clamp clamp_min clamp_max hardtanh nan_to_num",
    compare: "eq ne lt le gt ge isclose",
    interpolate: "lerp",
}

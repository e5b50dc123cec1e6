"""Norms in one operator. x / sqrt(mean x² + eps) · gain + bias is free of the scale of x, if eps follows its square."""

from torch import Tensor

from stabilitykit.scaling.call import Call
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.rules.sums import beside
from stabilitykit.scaling.shadows import Shadow

# Where each has gain, bias and eps among its arguments.
_PLACES = {
    "native_layer_norm": (2, 3, 4),
    "layer_norm": (2, 3, 4),
    "native_group_norm": (1, 2, 7),
    "group_norm": (2, 3, 4),
    "_fused_rms_norm": (2, None, 3),
    "rms_norm": (2, None, 3),
}


def normalise(call: Call) -> list[Shadow]:
    """norm(2^e x) = norm(x) where eps has the exponent 2e; the result has the gain's, which the bias needs too.

    The statistics that come out beside it are the mean, 2^e as large, and the reciprocal root, 2^-e as large.
    """
    at_gain, at_bias, at_eps = _PLACES[call.name]
    gain, bias = call.argument(at_gain, "weight"), None if at_bias is None else call.argument(at_bias, "bias")
    x = call.one(call.first())
    eps = call.argument(at_eps, "eps")
    if eps:
        beside(call, call.times(2, x), float(eps))
    made = ZERO if gain is None else call.one(call.of(gain))
    if bias is not None:
        made = call.equal(made, call.of(bias))  # type: ignore[assignment]
    root = call.times(-1, x)
    return ([made, root] if call.name == "_fused_rms_norm" else [made, x, root])[: len(call.outputs)]


def normalise_batch(call: Call) -> list[Shadow]:
    """(x - mean) / sqrt(variance + eps) · gain + bias, with statistics that were learnt: they scale as x does."""
    x, gain, bias, mean, variance = call.args[:5]
    eps = next(one for one in reversed(call.args) if isinstance(one, float))
    scale = call.one(call.of(x))
    for learnt, times in ((mean, 1), (variance, 2)):
        if isinstance(learnt, Tensor):
            call.equal(call.times(times, scale), call.of(learnt), why="learnt statistics scale as what they are of")
    if eps:
        beside(call, call.times(2, scale), eps)
    made: Shadow = ZERO if gain is None else call.one(call.of(gain))
    if bias is not None:
        made = call.equal(made, call.of(bias))
    return [made, *([ZERO] * (len(call.outputs) - 1))]


RULES = {
    normalise: " ".join(_PLACES),
    normalise_batch: "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm",
}

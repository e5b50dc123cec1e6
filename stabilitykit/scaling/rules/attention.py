"""Attention in one operator: softmax(q · k · scale + mask) v."""

from stabilitykit.scaling.call import Call
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.shadows import Shadow


def attend(call: Call) -> list[Shadow]:
    """The scores need the exponent 0: that of q, of k and of the scale add up to it. The result has that of v."""
    query, key, value = (call.of(one) for one in call.args[:3])
    scale = call.kwargs.get("scale")
    setting = call.follows(float(scale)) if isinstance(scale, float) else None
    parts = [call.one(query), call.one(key), *([] if setting is None else [setting])]
    call.zero(call.sum(*parts), _why(scale, setting))
    mask = call.argument(3, "attn_mask") if call.name != "_flash_attention_forward" else None
    call.zero(call.of(mask), "it is added to the scores of attention, of which a softmax is taken")
    return [value, *([ZERO] * (len(call.outputs) - 1))]


def _why(scale: object, setting: object) -> str:
    why = "a softmax is taken of q · k"
    if scale is not None and setting is None:
        why += f", whose scale {scale:g} no setting of the config changes"
    return why


RULES = {
    attend: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention",
}

"""The model against transformers, and against gemma_pytorch's arithmetic written out step by step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from reference import reference_model
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.config import RELEASED, GemmaConfig
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.choices import RoundingName
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.load import build
from stabilitykit.models.gemma.model import ROUNDINGS, Gemma, RMSNorm, soft_cap

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
_TINY_3 = GemmaConfig(
    generation=3, layers=4, hidden_size=48, feed_forward=80, heads=4, kv_heads=2, head_dim=16, vocabulary=300,
    query_scalar=21.0, window=7, global_every=3, rope_base=1e6, rope_scaling=8.0,
)  # fmt: skip
TINY = {
    "gemma 1, multi-query": GemmaConfig(
        generation=1, layers=3, hidden_size=48, feed_forward=80, heads=4, kv_heads=1, head_dim=16, vocabulary=300,
        query_scalar=16.0,
    ),
    "gemma 1, one key per query": GemmaConfig(
        generation=1, layers=2, hidden_size=40, feed_forward=64, heads=3, kv_heads=3, head_dim=32, vocabulary=300,
        query_scalar=32.0,
    ),
    "gemma 2": GemmaConfig(
        generation=2, layers=4, hidden_size=48, feed_forward=80, heads=4, kv_heads=2, head_dim=16, vocabulary=300,
        query_scalar=9.0, window=7, global_every=2, attention_softcap=5.0, logit_softcap=3.0,
    ),
    "gemma 3": _TINY_3,
    "gemma 3, one key": replace(_TINY_3, heads=2, kv_heads=1, rope_scaling=1.0, query_scalar=16.0),
}  # fmt: skip
EACH = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())


def random_model(
    config: GemmaConfig, dtype: torch.dtype = torch.float32, rounding: RoundingName = "transformers"
) -> Gemma:
    """The same float32 weights for one config, cast to `dtype`; large enough that soft-caps and rounding bite."""
    torch.manual_seed(5)
    model = Gemma(config, rounding=rounding).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.copy_(torch.randn(weight.shape) * (0.3 if weight.dim() == 1 else 2.0 * weight.shape[1] ** -0.5))
        if name == "embed_tokens.weight":
            weight.div_(2.0)
    return model.to(dtype)


def random_tokens(config: GemmaConfig, batch: int = 2, length: int = 23) -> Tensor:
    return torch.randint(4, config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_equals_transformers_bit_for_bit(config: GemmaConfig, dtype: torch.dtype) -> None:
    model, tokens = random_model(config, dtype), random_tokens(config)
    expected = reference_model(model)(tokens).logits
    logits = model(tokens)
    assert logits.dtype == dtype
    assert torch.equal(logits, expected)


def test_the_comparison_can_fail() -> None:
    """The random weights are such that every feature of the config reaches the logits."""
    name: str
    value: Any
    for config, name, value in (
        (TINY["gemma 1, multi-query"], "query_scalar", 17.0),
        (TINY["gemma 1, multi-query"], "rms_eps", 1e-5),
        (TINY["gemma 1, multi-query"], "rope_base", 9999.0),
        (TINY["gemma 2"], "window", 8),
        (TINY["gemma 2"], "global_every", 3),
        (TINY["gemma 2"], "attention_softcap", 5.01),
        (TINY["gemma 2"], "logit_softcap", 3.01),
        (TINY["gemma 3"], "rope_scaling", 7.9),
        (TINY["gemma 3"], "rope_base", 9e5),
        (TINY["gemma 3"], "rope_base_local", 9000.0),
    ):
        changed = replace(config, **{name: value})
        tokens = random_tokens(config)
        difference = (random_model(config)(tokens) - random_model(changed)(tokens)).abs().max()
        assert difference > 1e-4, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_left_padding_equals_transformers(config: GemmaConfig, dtype: torch.dtype) -> None:
    model, tokens = random_model(config, dtype), random_tokens(config)
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[1, :9] = False
    expected = reference_model(model)(tokens, attention_mask=padding.long()).logits
    logits = model(tokens, padding=padding)
    assert torch.equal(logits[padding], expected[padding])
    assert torch.equal(logits.nan_to_num(), expected.nan_to_num())  # float16 masks padded rows to -inf


@EACH
def test_padding_leaves_the_function(config: GemmaConfig) -> None:
    """RoPE sees differences of positions only, so a padded row is the row alone, up to rounding."""
    model, tokens = random_model(config), random_tokens(config)
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[1, :9] = False
    alone = model(tokens[1:, 9:])
    torch.testing.assert_close(model(tokens, padding=padding)[1:, 9:], alone, rtol=0, atol=2e-4)


@EACH
def test_cached_decoding_equals_transformers(config: GemmaConfig) -> None:
    """Prompts longer and shorter than the window, in pieces and token by token; padded too."""
    model, tokens = random_model(config), random_tokens(config)
    reference = reference_model(model)
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[0, :3] = False
    cache = KVCache(config, batch=2, length=23, dtype=model.dtype)
    past = None
    for start, end in ((0, 5), (5, 14), (14, 15), (15, 16), (16, 23)):
        logits = model(tokens[:, start:end], padding=padding[:, :end], cache=cache)
        theirs = reference(
            tokens[:, start:end], attention_mask=padding[:, :end].long(), past_key_values=past, use_cache=True
        )
        past = theirs.past_key_values
        real = padding[:, start:end]
        torch.testing.assert_close(logits[real], theirs.logits[real], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 23
    with pytest.raises(MisuseError, match=r"allocated for 23 tokens; 23 held and 1 new ones are 24"):
        model(tokens[:, :1], cache=cache)


def test_a_failed_pass_leaves_the_cache_as_it_was() -> None:
    config = TINY["gemma 3"]
    model, tokens = random_model(config), random_tokens(config)
    cache = KVCache(config, batch=2, length=23, dtype=model.dtype)
    model(tokens[:, :5], cache=cache)

    def fail(*_: object) -> None:
        raise InterruptedError

    handle = model.layers[2].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        model(tokens[:, 5:9], cache=cache)
    handle.remove()
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(model(tokens[:, 5:], cache=cache), model(tokens)[:, 5:], rtol=0, atol=1e-5)


def test_last_only() -> None:
    model, tokens = random_model(TINY["gemma 2"]), random_tokens(TINY["gemma 2"])
    last = model(tokens, last_only=True)
    assert last.shape == (2, 1, 300)
    torch.testing.assert_close(last, model(tokens)[:, -1:], rtol=0, atol=1e-6)


def test_own_mask_replaces_all_masks() -> None:
    config = TINY["gemma 3"]
    model, tokens = random_model(config), random_tokens(config)
    seen = torch.zeros(1, 1, 23, 23)
    causal = seen.masked_fill(torch.ones(23, 23).triu(1).bool(), -3e38)
    everywhere_global = random_model(replace(config, window=100))
    torch.testing.assert_close(model(tokens, mask=causal), everywhere_global(tokens), rtol=0, atol=1e-6)
    both_ways = model(tokens, mask=seen)
    changed = tokens.clone()
    changed[:, -1] = 7
    assert (model(changed, mask=seen)[:, 0] - both_ways[:, 0]).abs().max() > 1e-3
    with pytest.raises(MisuseError, match=r"shape \[2 or 1, 1, 23, 23\]; it is \[23, 23\]"):
        model(tokens, mask=seen[0, 0])


def test_padding_of_another_shape_is_refused() -> None:
    model, tokens = random_model(TINY["gemma 1, multi-query"]), random_tokens(TINY["gemma 1, multi-query"])
    with pytest.raises(MisuseError, match=r"each of \[2, 23\] tokens whether it is real; it is \[2, 22\]"):
        model(tokens, padding=torch.ones(2, 22, dtype=torch.bool))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@EACH
def test_float64_is_the_same_function(config: GemmaConfig, rounding: RoundingName) -> None:
    tokens = random_tokens(config)
    single, double = (random_model(config, dtype, rounding)(tokens) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    difference = (single.double() - double).abs().max()
    assert 0 < difference < 1e-4


def test_positions_reach_half_precision_unrounded() -> None:
    """bfloat16 holds integers to 256, float16 to 2,048: past them angles computed there would repeat."""
    cos_td, _ = random_model(TINY["gemma 1, multi-query"], torch.bfloat16).rotary_emb(
        True, 0, 4001, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert torch.equal(cos_td[:, 0], torch.arange(4001.0).cos().bfloat16())


def complex_rope(x_btnd: Tensor, base: float, scaling: float) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned in float32, rounded once."""
    channels = x_btnd.shape[-1]
    frequencies = 1.0 / (base ** (torch.arange(0, channels, 2).float() / channels)) / scaling
    angles = torch.outer(torch.arange(x_btnd.shape[1]), frequencies).float()
    turns = torch.polar(torch.ones_like(angles), angles)
    first, second = x_btnd.float().chunk(2, dim=-1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * turns[None, :, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x_btnd.dtype)


def gemma_pytorch_logits(model: Gemma, tokens: Tensor) -> Tensor:
    """gemma_pytorch's arithmetic, step by step, in the layout [B, T, heads, channels] that it uses."""
    config, dtype = model.config, model.dtype
    w = dict(model.named_parameters())
    batch, length = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.rms_eps)
        return (wide * (1 + w[name].float())).type_as(x)

    causal = torch.triu(torch.full((length, length), -2.3819763e38), diagonal=1)
    h = F.embedding(tokens, w["embed_tokens.weight"]) * torch.tensor(config.hidden_size**0.5, dtype=dtype)
    for i in range(config.layers):
        at = f"layers.{i}."
        local = config.window is not None and (i + 1) % config.global_every != 0
        mask = causal
        if local:
            mask = mask + torch.tril(torch.full((length, length), -2.3819763e38), diagonal=-(config.window or 0))
        x = norm(h, at + "input_layernorm.weight")
        q, k, v = (
            F.linear(x, w[f"{at}self_attn.{kind}_proj.weight"]).view(batch, length, -1, config.head_dim)
            for kind in "qkv"
        )
        if config.generation == 3:
            q, k = norm(q, at + "self_attn.q_norm.weight"), norm(k, at + "self_attn.k_norm.weight")
        base, scaling = (config.rope_base_local, 1.0) if local else (config.rope_base, config.rope_scaling)
        q, k = complex_rope(q, base, scaling), complex_rope(k, base, scaling)
        k, v = (t.repeat_interleave(config.heads // config.kv_heads, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # half precision kernels differ by layout
        scores = torch.matmul(q * config.query_scalar**-0.5, k.transpose(2, 3))
        if config.attention_softcap is not None:
            scores = torch.tanh(scores / config.attention_softcap) * config.attention_softcap
        probabilities = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        a = torch.matmul(probabilities, v).transpose(1, 2).contiguous().view(batch, length, -1)
        a = F.linear(a, w[at + "self_attn.o_proj.weight"])
        if config.generation > 1:
            a = norm(a, at + "post_attention_layernorm.weight")
        h = h + a
        x = norm(h, at + ("pre_feedforward" if config.generation > 1 else "post_attention") + "_layernorm.weight")
        gate = F.gelu(F.linear(x, w[at + "mlp.gate_proj.weight"]), approximate="tanh")
        m = F.linear(gate * F.linear(x, w[at + "mlp.up_proj.weight"]), w[at + "mlp.down_proj.weight"])
        if config.generation > 1:
            m = norm(m, at + "post_feedforward_layernorm.weight")
        h = h + m
    logits = torch.matmul(norm(h, "norm.weight"), w["embed_tokens.weight"].t())
    if config.logit_softcap is not None:
        logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_other_rounding_is_gemma_pytorchs(config: GemmaConfig, dtype: torch.dtype) -> None:
    model, tokens = random_model(config, dtype, "gemma_pytorch"), random_tokens(config)
    logits = model(tokens)
    assert torch.equal(logits, gemma_pytorch_logits(model, tokens))
    # and it is another rounding of the same function
    transformers_logits = random_model(config, dtype)(tokens)
    assert not torch.equal(logits, transformers_logits)
    if dtype == torch.float32:
        torch.testing.assert_close(logits, transformers_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masks_of_both_references(dtype: torch.dtype) -> None:
    """Only rows that are masked throughout show the difference in the logits: theirs are even in float32."""
    config, padding = TINY["gemma 3"], torch.ones(2, 23, dtype=torch.bool)
    padding[1, :9] = False
    ours, theirs = (
        random_model(config, dtype, rounding)._mask(False, 2, 0, 23, padding).whole() for rounding in ROUNDINGS
    )
    assert ours.dtype == dtype
    assert theirs.dtype == torch.float32
    assert ours.min() == torch.finfo(dtype).min
    assert theirs.min() == torch.tensor(-2.3819763e38)
    assert torch.equal(ours == 0, theirs == 0)


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(MisuseError, match="one of transformers, gemma_pytorch; 'jax' is none of them"):
        Gemma(TINY["gemma 3"], rounding="jax")  # type: ignore[arg-type]


def test_head_is_one_parameter_with_the_embedding() -> None:
    model = Gemma(TINY["gemma 3"])
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert dict(model.named_parameters()).keys() == parameter_shapes(TINY["gemma 3"]).keys()


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_embedding_factor_of_both_references_agrees(name: str, dtype: torch.dtype) -> None:
    """transformers rounds sqrt(hidden) to float32 and then to the dtype, gemma_pytorch at once."""
    root = RELEASED[name].hidden_size ** 0.5
    assert torch.tensor(root, dtype=torch.float32).to(dtype) == torch.tensor(root, dtype=dtype)


def test_rms_norm_and_non_finite_values() -> None:
    norm = RMSNorm(4, 1e-6)
    assert norm(torch.zeros(4)).tolist() == [0, 0, 0, 0]
    with_inf = norm(torch.tensor([1.0, torch.inf, -2.0, 3.0]))
    assert with_inf[1].isnan()
    assert with_inf[[0, 2, 3]].tolist() == [0, 0, 0]
    assert norm(torch.tensor([1.0, torch.nan, -2.0, 3.0])).isnan().all()
    # float16 squares would overflow at 256; the mean is float32's
    assert norm(torch.full((4,), 60_000.0, dtype=torch.float16)).tolist() == [1, 1, 1, 1]


def test_rms_norm_in_float64_has_no_float32_inside() -> None:
    x, norm = torch.randn(3, 40, dtype=torch.float64), RMSNorm(40, 1e-6).double()
    expected = x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=0)


def test_soft_cap_hides_infinity() -> None:
    capped = soft_cap(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]), 30.0)
    assert capped[[0, 1, 3]].tolist() == [30, -30, 0]
    assert capped[2].isnan()


@pytest.mark.parametrize("length", [16, 700])
def test_270m_equals_transformers(model_270m: Gemma, reference_270m: transformers.PreTrainedModel, length: int) -> None:
    tokens = torch.randint(4, 262_144, (1, length), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 2
    difference = 0.0
    expected = reference_270m(tokens).logits
    logits = model_270m(tokens)
    for ours, theirs in zip(logits[0].split(64), expected[0].split(64), strict=True):
        difference = max(difference, float((ours - theirs).abs().max()))
    assert difference <= 1e-4


@pytest.fixture(scope="module")
def model_270m(checkpoint_270m: Checkpoint) -> Gemma:
    return build(checkpoint_270m)


@pytest.fixture(scope="module")
def reference_270m(model_270m: Gemma) -> transformers.PreTrainedModel:
    return reference_model(model_270m)

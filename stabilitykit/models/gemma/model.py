"""The text decoder of Gemma 1, 2 and 3 in plain torch; what differs between them is read from GemmaConfig.

Shape suffixes: B sequences, T new tokens, K tokens seen so far with the new ones (T without a cache),
E hidden channels, F feed-forward channels, N query heads, G key/value heads, D channels of a head, V vocabulary.
A trailing 1 is an axis of length one.

Modules carry Hugging Face's paths without the leading `model.`, and every operator runs directly in the
`forward` of the module it belongs to, so that an observer of operators can say where each tensor arose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.choices import RoundingName
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.mask import AttentionMask
from stabilitykit.models.gemma.query_blocks import QueryBlock, query_blocks
from stabilitykit.models.gemma.sampler import Sampler
from stabilitykit.records.scaling import UNCHANGED

if TYPE_CHECKING:
    from stabilitykit.checkpoints.checkpoint import Vocabulary
    from stabilitykit.models.gemma.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """The moments at which the two reference implementations round differently.

    In float32 the choice moves logits by a few ulp; in 16 bits it decides what overflows first. Everything else
    rounds at the same moments in both: RMSNorm and softmax in float32 and back, the rest in the model's dtype.

    `scale_queries`: q · scale before q·kᵀ, so that the product has its final size, rather than (q·kᵀ) · scale.
    `float32_rope`: cos and sin stay float32, so that q and k are rotated in float32 and rounded once, rather
    than cos, sin, both products and their sum each rounded to the dtype.
    `float32_mask`: the mask is float32 and promotes the scores before the softmax. It is −2.3819763e38, where
    transformers adds the dtype's own minimum: in float16 −65,504 plus a negative score rounds to −inf.
    """

    scale_queries: bool
    float32_rope: bool
    float32_mask: bool


# transformers: models/gemma{,2,3}/modeling_gemma*.py (`eager_attention_forward`, `apply_rotary_pos_emb`) and
# `eager_mask` in masking_utils.py, 5.23. gemma_pytorch: gemma/model.py at 014acb7, `GemmaAttention.forward`,
# `apply_rotary_emb`, and the masks in `GemmaForCausalLM.generate`. Two of gemma_pytorch's differences change no
# rounding and are not followed: one matrix for q, k and v, and attention over its cache's unused tail.
ROUNDINGS: Mapping[RoundingName, Rounding] = {
    "transformers": Rounding(scale_queries=False, float32_rope=False, float32_mask=False),
    "gemma_pytorch": Rounding(scale_queries=True, float32_rope=True, float32_mask=True),
}
_GEMMA_PYTORCH_MASK = -2.3819763e38


class Gemma(nn.Module):
    """Gemma 1, 2 or 3 without a vocabulary's strings: token ids in, logits out.

    Bit for bit transformers' eager model in float32, bfloat16 and float16, or with `rounding="gemma_pytorch"`
    that one's arithmetic. In float64 what the references compute in float32 is computed in float64; the RoPE
    tables are float32's own numbers, so that it is the same function, computed more precisely.
    `scaling` has the powers of two that its weights and settings were multiplied by; `streamed` says that matrices are
    in memory only while they are in use, as `stabilitykit.models.stream` arranges. `source`, `sha256` and `notes` are
    the checkpoint's. Non-finite values are passed on as the operators pass them.
    """

    def __init__(self, config: GemmaConfig, *, rounding: RoundingName = "transformers") -> None:
        super().__init__()
        if rounding not in ROUNDINGS:
            raise MisuseError(f"Unknown rounding {rounding!r}; choose one of: {', '.join(ROUNDINGS)}.")
        self.config = config
        self.rounding = rounding
        self.scaling = UNCHANGED
        self.streamed = False
        self.source = ""
        self.sha256 = ""
        self.notes: tuple[str, ...] = ()
        self.vocabulary: Vocabulary | None = None
        self.eos = 1  # <eos> in every Gemma's vocabulary

        self.embed_tokens = Embedding(config)
        self.rotary_emb = RotaryEmbedding(config, ROUNDINGS[rounding])
        self.layers = nn.ModuleList(DecoderLayer(config, index, ROUNDINGS[rounding]) for index in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.sampler = Sampler()

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The checkpoint's tokenizer, built when first asked for (about half a second); None without a vocabulary."""
        if self.vocabulary is None:
            return None
        from stabilitykit.models.gemma.tokenizer import Tokenizer  # sentencepiece, only when there is text

        return Tokenizer(self.vocabulary)

    @property
    def rescale(self) -> float:
        """What the embedding's rows were multiplied by: 1 unless the model is scaled."""
        factor = self.scaling.parameters.get("embed_tokens.weight")
        return 1.0 if factor is None else 2.0 ** factor.exponents[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [B, T, V] in the model's dtype, of the last token alone [B, 1, V] with `last_only`.

        `padding` [B, K] is True where a real token stands. Positions count from the first column, padding
        included, as in a plain transformers forward pass without position ids (RoPE sees only their
        differences). Padded rows come out too and mean nothing: all their keys are masked alike.
        `mask` [B or 1, 1, T, K], floating, is added to the scores of every layer in place of the causal,
        windowed and padding masks. With `cache` the tokens continue those it holds. Raises MisuseError for
        shapes that do not fit.
        """
        past = 0 if cache is None else cache.get_seq_length()
        batch, new = tokens_BT.shape
        seen = past + new
        masks: dict[bool, Tensor | AttentionMask] = {}
        rope = {}
        by_blocks = mask is None and bool(query_blocks(batch * self.config.heads, new, seen, None))
        for is_global in sorted({self.config.is_global(index) for index in range(self.config.layers)}):
            if mask is None:
                own = self._mask(is_global, batch, past, seen, padding)
                masks[is_global] = own if by_blocks else own.whole()
            else:
                masks[is_global] = mask
            rope[is_global] = self.rotary_emb(is_global, past, seen, dtype=self.dtype, device=self.device)
        if mask is not None and (mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, new, seen)):
            raise MisuseError(
                f"A mask for these tokens has shape [{batch} or 1, 1, {new}, {seen}]; it is {list(mask.shape)}."
            )

        h_BTE = self.embed_tokens(tokens_BT)
        for index, layer in enumerate(self.layers):
            is_global = self.config.is_global(index)
            h_BTE = layer(h_BTE, rope=rope[is_global], mask=masks[is_global], cache=cache)
        if cache is not None:
            cache.advance(new)
        h_BTE = self.norm(h_BTE)
        if last_only:
            h_BTE = h_BTE[:, -1:]
        logits_BTV: Tensor = self.lm_head(h_BTE)
        return soft_cap(logits_BTV, self.config.logit_softcap)

    def _mask(self, is_global: bool, batch: int, past: int, seen: int, padding: Tensor | None) -> AttentionMask:
        float32 = ROUNDINGS[self.rounding].float32_mask
        return AttentionMask(
            batch=batch,
            queries=seen - past,
            keys=seen,
            window=None if is_global else self.config.window,
            padding=padding,
            dtype=torch.float32 if float32 else self.dtype,
            blocked=_GEMMA_PYTORCH_MASK if float32 else torch.finfo(self.dtype).min,
            device=self.device,
        )


def blank(config: GemmaConfig, dtype: torch.dtype, rounding: RoundingName = "transformers") -> Gemma:
    """A model on the meta device, where nothing has a value."""
    with torch.device("meta"):
        model = Gemma(config, rounding=rounding)
    model = model.to(dtype).eval()
    model.lm_head.weight = model.embed_tokens.weight
    return model


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles: one table for the local layers, one for the global ones."""

    def __init__(self, config: GemmaConfig, rounding: Rounding) -> None:
        super().__init__()
        self.float32_tables = rounding.float32_rope
        # Plain attributes on the CPU, not buffers: `.to(torch.float16)` must not reach them, and `pow` on
        # another device may differ in the last bit.
        self.frequencies = {
            False: rope_frequencies(config.head_dim, config.rope_base_local),
            True: rope_frequencies(config.head_dim, config.rope_base, config.rope_scaling),
        }

    def forward(
        self, is_global: bool, past: int, seen: int, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of positions `past` to `seen` - 1, computed in float32."""
        positions_T1 = torch.arange(past, seen, device=device)[:, None].float()
        angles = positions_T1 * self.frequencies[is_global].to(device)
        angles_TD = torch.cat((angles, angles), dim=-1)
        if self.float32_tables:
            turns_TD = torch.polar(torch.ones_like(angles_TD), angles_TD)  # not the last bit of cos() and sin()
            return turns_TD.real, turns_TD.imag
        return angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream; from generation 2 on normalised before it is added."""

    def __init__(self, config: GemmaConfig, index: int, rounding: Rounding) -> None:
        super().__init__()
        self.post_norms = config.post_norms
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config, index, rounding)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config)
        if self.post_norms:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_eps)

    def forward(
        self, h_BTE: Tensor, *, rope: tuple[Tensor, Tensor], mask: Tensor | AttentionMask, cache: KVCache | None
    ) -> Tensor:
        a_BTE = self.self_attn(self.input_layernorm(h_BTE), rope=rope, mask=mask, cache=cache)
        if self.post_norms:
            a_BTE = self.post_attention_layernorm(a_BTE)
        h_BTE = h_BTE + a_BTE

        # The name is Hugging Face's: in generation 1 `post_attention_layernorm` is the norm before the MLP.
        pre_norm = self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm
        m_BTE = self.mlp(pre_norm(h_BTE))
        if self.post_norms:
            m_BTE = self.post_feedforward_layernorm(m_BTE)
        out_BTE: Tensor = h_BTE + m_BTE
        return out_BTE


class Attention(nn.Module):
    """Attention of N query heads over G key/value heads, each of which serves N / G queries.

    `query_block` is that which is being computed, where a prompt is too long to be computed at once.
    """

    query_block: QueryBlock | None = None

    def __init__(self, config: GemmaConfig, index: int, rounding: Rounding) -> None:
        super().__init__()
        self.index = index
        self.rounding = rounding
        self.head_dim = config.head_dim
        self.groups = config.heads // config.kv_heads
        self.scale = config.query_scalar**-0.5
        self.softcap = config.attention_softcap
        self.query_key_norm = config.query_key_norm
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        if self.query_key_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_eps)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x_BTE: Tensor, *, rope: tuple[Tensor, Tensor], mask: Tensor | AttentionMask, cache: KVCache | None
    ) -> Tensor:
        batch, new, _ = x_BTE.shape
        q_BNTD = self.q_proj(x_BTE).view(batch, new, -1, self.head_dim).transpose(1, 2)
        k_BGTD = self.k_proj(x_BTE).view(batch, new, -1, self.head_dim).transpose(1, 2)
        v_BGTD = self.v_proj(x_BTE).view(batch, new, -1, self.head_dim).transpose(1, 2)
        if self.query_key_norm:
            q_BNTD = self.q_norm(q_BNTD)
            k_BGTD = self.k_norm(k_BGTD)
        q_BNTD = rotate(q_BNTD, *rope)
        k_BGTD = rotate(k_BGTD, *rope)

        k_BGKD, v_BGKD = (k_BGTD, v_BGTD) if cache is None else cache.update(self.index, k_BGTD, v_BGTD)
        k_BNKD = repeat_heads(k_BGKD, self.groups)
        v_BNKD = repeat_heads(v_BGKD, self.groups)

        if isinstance(mask, Tensor):
            out_BNTD = self._attend(q_BNTD, k_BNKD, v_BNKD, mask)
        else:
            out_BNTD = self._attend_by_blocks(q_BNTD, k_BNKD, v_BNKD, mask)
        out_BTND = out_BNTD.transpose(1, 2).contiguous()
        out_BTE: Tensor = self.o_proj(out_BTND.view(batch, new, -1))
        return out_BTE

    def _attend(self, q_BNTD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: Tensor) -> Tensor:
        if self.rounding.scale_queries:
            scores_BNTK = torch.matmul(q_BNTD * self.scale, k_BNKD.transpose(2, 3))
        else:
            scores_BNTK = torch.matmul(q_BNTD, k_BNKD.transpose(2, 3)) * self.scale
        scores_BNTK = soft_cap(scores_BNTK, self.softcap) + mask
        p_BNTK = F.softmax(scores_BNTK, dim=-1, dtype=at_least_float32(q_BNTD.dtype)).to(q_BNTD.dtype)
        return torch.matmul(p_BNTK, v_BNKD)

    def _attend_by_blocks(self, q_BNTD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: AttentionMask) -> Tensor:
        batch, heads, new, channels = q_BNTD.shape
        out_BNTD = q_BNTD.new_empty((batch, new, heads, channels)).transpose(1, 2)  # as the projection wants it
        try:
            for block in query_blocks(batch * heads, new, k_BNKD.shape[2], mask.window):
                self.query_block = block
                queries, keys = slice(block.start, block.stop), slice(block.first_key, block.last_key)
                out_BNTD[:, :, queries] = self._attend(
                    q_BNTD[:, :, queries], k_BNKD[:, :, keys], v_BNKD[:, :, keys], mask.of(block)
                )
        finally:
            self.query_block = None
        return out_BNTD


class MLP(nn.Module):
    """A gated feed-forward network: down(gelu(gate(x)) · up(x)), gelu in its tanh form."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        out_BTE: Tensor = self.down_proj(F.gelu(self.gate_proj(x_BTE), approximate="tanh") * self.up_proj(x_BTE))
        return out_BTE


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (1 + w) · scale, in at least float32, rounded once to the dtype of x.

    `scale` is a power of two outside the weight, so that a gain can be scaled without rounding: scaling in the
    weight would store `scale · (1 + w) − 1`. An infinity in x makes its own channel NaN (inf · 0) and every
    other finite channel zero; a NaN makes all NaN.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = 1.0
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        gain = 1.0 + self.weight.to(wide.dtype)
        if self.scale != 1.0:
            gain = gain * self.scale
        return (normed * gain).to(x.dtype)


class Embedding(nn.Embedding):
    """Rows of the vocabulary times sqrt(hidden), itself rounded to the dtype first (55.4256 is 55.5 in bfloat16)."""

    def __init__(self, config: GemmaConfig) -> None:
        weight = torch.empty(config.vocabulary, config.hidden_size)
        super().__init__(config.vocabulary, config.hidden_size, _weight=weight)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        self.normalizer = config.hidden_size**0.5

    def forward(self, tokens_BT: Tensor) -> Tensor:
        # https://github.com/huggingface/transformers/pull/29402; by way of float32, as transformers' buffer is.
        normalizer = torch.tensor(self.normalizer, dtype=torch.float32, device="cpu").to(self.weight.dtype)
        return F.embedding(tokens_BT, self.weight) * normalizer.item()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rope_frequencies(head_dim: int, base: float, scaling: float = 1.0) -> Tensor:
    """Radians per token of each pair of channels, divided by `scaling`. [D / 2], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return 1.0 / (base**exponents) / scaling


def rotate(x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE on [..., T, D]: channels i and i + D/2 turn together. Float32 tables promote, with one rounding at the end.

    Those give gemma_pytorch's complex product: the same products and the same sum, on a CPU bit for bit where D is a
    multiple of 16 (past its vectors, and on a GPU, a compiler may fuse one product into the sum).
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD).to(x.dtype)


def repeat_heads(x_BGKD: Tensor, groups: int) -> Tensor:
    """Each key/value head `groups` times in a row: [B, G, K, D] -> [B, G · groups, K, D]."""
    if groups == 1:
        return x_BGKD
    batch, heads, seen, channels = x_BGKD.shape
    return x_BGKD[:, :, None].expand(batch, heads, groups, seen, channels).reshape(batch, -1, seen, channels)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap); x itself when cap is None. Infinities become ±cap, and so are hidden; NaN stays."""
    if cap is None:
        return x
    return torch.tanh(x / cap) * cap

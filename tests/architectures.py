"""Small models with random weights of many architectures, each with something to run it on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

TOKENS = torch.tensor([[3, 70, 71, 72, 73, 74, 75], [5, 6, 7, 8, 9, 10, 11]])

_SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 120}
_SEQUENCES: dict[str, Any] = {
    "vocab_size": 120, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
_SOUND: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
}  # fmt: skip
_PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": 120, "hidden_size_per_layer_input": 8}

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model, and the arguments of a call of it."""


def images(size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sound(samples: int = 800) -> Tensor:
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(2))


def _tokens(model: str, config: str, **sizes: Any) -> Callable[[], Example]:
    """A model of transformers that reads tokens."""

    def make() -> Example:
        return _built(model, config, **sizes), (), {"input_ids": TOKENS}

    return make


def _causal(name: str, **sizes: Any) -> Callable[[], Example]:
    return _tokens(f"{name}ForCausalLM", f"{name}Config", **_SIZES | sizes)


def _encoder(name: str, **sizes: Any) -> Callable[[], Example]:
    return _tokens(f"{name}Model", f"{name}Config", **_SIZES | {"type_vocab_size": 2} | sizes)


def _two_sided(model: str, config: str, **sizes: Any) -> Callable[[], Example]:
    def make() -> Example:
        given = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4], "use_cache": False}
        return _built(model, config, **sizes), (), given

    return make


def _of(given: Callable[[], dict[str, Any]], model: str, config: str, **sizes: Any) -> Callable[[], Example]:
    def make() -> Example:
        return _built(model, config, **sizes), (), given()

    return make


def _pixels(name: str, size: int = 32, **sizes: Any) -> Callable[[], Example]:
    return _of(lambda: {"pixel_values": images(size)}, f"{name}Model", f"{name}Config", **sizes)


def _built(model: str, config: str, **sizes: Any) -> nn.Module:
    kind = getattr(transformers, config)
    attention = sizes.pop("attn_implementation", None)  # the fused kernel, where a model can have it
    try:
        made = kind(**sizes)
    except (AttributeError, TypeError, ValueError):  # a config that takes no `head_dim`
        made = kind(**{name: size for name, size in sizes.items() if name != "head_dim"})
    if attention is not None:
        made._attn_implementation = attention
    built: nn.Module = getattr(transformers, model)(made)
    return built


def _clip() -> Example:
    text = {**_SIZES, "projection_dim": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config={**_VISION, "projection_dim": 16})
    return transformers.CLIPModel(config), (), {"input_ids": TOKENS, "pixel_values": images()}


def _siglip() -> Example:
    config = transformers.SiglipConfig(text_config=_SIZES, vision_config=_VISION)
    return transformers.SiglipModel(config), (), {"input_ids": TOKENS, "pixel_values": images()}


def _gemma3n() -> Example:
    sizes: dict[str, Any] = _SIZES | {"intermediate_size": [64] * 15, "num_hidden_layers": 15}
    config = transformers.Gemma3nTextConfig(
        **sizes, **_PER_LAYER, num_kv_shared_layers=5, laurel_rank=4, sliding_window=4,
        activation_sparsity_pattern=[0.95] * 5 + [0.0] * 10,
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(config), (), {"input_ids": TOKENS}


def _whisper() -> Example:
    config = transformers.WhisperConfig(
        **_SEQUENCES, num_mel_bins=8, max_source_positions=32, max_target_positions=64, suppress_tokens=None
    )
    mel = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3))
    return transformers.WhisperModel(config), (), {"input_features": mel, "decoder_input_ids": TOKENS[:, :4]}


TEXT: dict[str, Callable[[], Example]] = {
    "Llama": _causal("Llama"),
    "Llama eager": _causal("Llama", attn_implementation="eager"),
    "Gemma": _causal("Gemma"),
    "Gemma 2": _causal("Gemma2", sliding_window=4, attn_implementation="eager"),
    "Gemma 3": _tokens("Gemma3ForCausalLM", "Gemma3TextConfig", **_SIZES | {"sliding_window": 4}),
    "Gemma 3n": _gemma3n,
    "Gemma 4": _tokens(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        **_SIZES | _PER_LAYER | {"sliding_window": 4, "global_head_dim": 16, "num_hidden_layers": 6},
    ),
    "Mistral": _causal("Mistral", sliding_window=4),
    "Mixtral": _causal("Mixtral", **_EXPERTS),
    "Qwen2": _causal("Qwen2"),
    "Qwen2-MoE": _causal("Qwen2Moe", **_EXPERTS),
    "Qwen3": _causal("Qwen3"),
    "Qwen3-MoE": _causal("Qwen3Moe", **_EXPERTS),
    "OLMoE": _causal("Olmoe", **_EXPERTS),
    "PhiMoE": _causal("Phimoe", **_EXPERTS),
    "DeepSeek-V3": _tokens(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        **_SIZES | {"head_dim": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "gpt-oss": _causal("GptOss", attn_implementation="eager", **_EXPERTS),
    "Phi": _causal("Phi"),
    "Phi-3": _causal("Phi3"),
    "GPT-2": _tokens("GPT2LMHeadModel", "GPT2Config", **_GPT),
    "GPT-J": _tokens("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=4),
    "GPT-Neo": _tokens(
        "GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=120, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, window_size=4,
    ),
    "GPT-NeoX": _causal("GPTNeoX"),
    "CodeGen": _tokens("CodeGenForCausalLM", "CodeGenConfig", **_GPT, rotary_dim=4, n_ctx=64),
    "OPT": _causal("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "BLOOM": _tokens("BloomForCausalLM", "BloomConfig", vocab_size=120, hidden_size=32, n_layer=2, n_head=4),
    "Falcon": _causal("Falcon", alibi=True),
    "MPT": _tokens("MptForCausalLM", "MptConfig", vocab_size=120, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "OLMo 2": _causal("Olmo2"),
    "Cohere": _causal("Cohere"),
    "StableLM": _causal("StableLm"),
    "Starcoder2": _causal("Starcoder2"),
    "Granite": _causal("Granite"),
    "GLM-4": _causal("Glm4"),
    "SmolLM3": _causal("SmolLM3"),
    "EXAONE 4": _causal("Exaone4"),
    "Nemotron": _causal("Nemotron"),
    "Mamba": _causal("Mamba", state_size=4),
    "Mamba 2": _tokens(
        "Mamba2ForCausalLM", "Mamba2Config", vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=8,
        num_heads=8, head_dim=8, n_groups=2, chunk_size=4,
    ),
    "RWKV": _causal("Rwkv", attention_hidden_size=32, context_length=64),
    "LFM2": _causal("Lfm2"),
    "BERT": _encoder("Bert"),
    "BERT eager": _encoder("Bert", attn_implementation="eager"),
    "RoBERTa": _encoder("Roberta"),
    "DistilBERT": _tokens("DistilBertModel", "DistilBertConfig", vocab_size=120, dim=32, n_layers=2, n_heads=4),
    "DeBERTa": _encoder("Deberta", attn_implementation="eager", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "DeBERTa-v2": _encoder(
        "DebertaV2", attn_implementation="eager", relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "ELECTRA": _encoder("Electra", embedding_size=16),
    "ALBERT": _encoder("Albert", embedding_size=16),
    "MPNet": _encoder("MPNet", attn_implementation="eager"),
    "ModernBERT": _encoder("ModernBert", local_attention=4),
    "Longformer": _encoder("Longformer", attention_window=4, attn_implementation="eager"),
    "T5": _two_sided("T5Model", "T5Config", **_T5, attn_implementation="eager"),
    "mT5": _two_sided("MT5Model", "MT5Config", **_T5, attn_implementation="eager"),
    "Switch": _two_sided(
        "SwitchTransformersModel", "SwitchTransformersConfig", **_T5, attn_implementation="eager", num_experts=2
    ),
    "BART": _two_sided("BartModel", "BartConfig", **_SEQUENCES),
    "Pegasus": _two_sided("PegasusModel", "PegasusConfig", **_SEQUENCES),
    "Marian": _two_sided("MarianModel", "MarianConfig", **_SEQUENCES),
}  # fmt: skip

OTHERS: dict[str, Callable[[], Example]] = {
    "Whisper": _whisper,
    "Wav2Vec2": _of(lambda: {"input_values": sound()}, "Wav2Vec2Model", "Wav2Vec2Config", **_SOUND),
    "HuBERT": _of(lambda: {"input_values": sound()}, "HubertModel", "HubertConfig", **_SOUND),
    "ViT": _pixels("ViT", **_VISION),
    "DINOv2": _pixels("Dinov2", 40, **_VISION),
    "BEiT": _pixels("Beit", **_VISION),  # its table of relative positions would outlive the mode it was made in
    "SigLIP": _siglip,
    "CLIP": _clip,
    "Swin": _pixels(
        "Swin", image_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4,
        attn_implementation="eager",
    ),
    "ConvNeXt": _pixels("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "ResNet": _pixels("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "SegFormer": _pixels(
        "Segformer", num_encoder_blocks=2, hidden_sizes=[8, 16], depths=[1, 1], num_attention_heads=[1, 2],
        sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], attn_implementation="eager",
    ),
    "MobileViT": _pixels(
        "MobileViT", image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32],
        num_attention_heads=4, attn_implementation="eager", size=64,
    ),
}  # fmt: skip


def _diffusers(name: str, given: Callable[[], dict[str, Any]], **sizes: Any) -> Callable[[], Example]:
    def make() -> Example:
        import diffusers  # only some have it

        return getattr(diffusers, name)(**sizes), (), given()

    return make


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _latents(**more: Any) -> dict[str, Any]:
    return {"sample": _noise(2, 4, 8, 8), "timestep": torch.tensor([3, 400]), **more}


DIFFUSERS: dict[str, Callable[[], Example]] = {
    "VAE": _diffusers(
        "AutoencoderKL", lambda: {"sample": images()}, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ),
    "tiny VAE": _diffusers(
        "AutoencoderTiny", lambda: {"sample": images()}, encoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1),
    ),
    "VQ": _diffusers(
        "VQModel", lambda: {"sample": images()}, block_out_channels=(8,), norm_num_groups=4, latent_channels=4,
        num_vq_embeddings=16,
    ),
    "U-Net": _diffusers(
        "UNet2DModel", lambda: _latents(), in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "conditional U-Net": _diffusers(
        "UNet2DConditionModel", lambda: _latents(encoder_hidden_states=_noise(2, 5, 16)), block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "DiT": _diffusers(
        "DiTTransformer2DModel",
        lambda: {"hidden_states": _noise(2, 4, 8, 8), "timestep": torch.tensor([3, 400]),
                 "class_labels": torch.tensor([1, 2])},
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    ),
    "PixArt": _diffusers(
        "PixArtTransformer2DModel",
        lambda: {"hidden_states": _noise(2, 4, 8, 8), "encoder_hidden_states": _noise(2, 5, 16),
                 "timestep": torch.tensor([3, 400]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        caption_channels=16, cross_attention_dim=16, use_additional_conditions=False,
    ),
    "SD3": _diffusers(
        "SD3Transformer2DModel",
        lambda: {"hidden_states": _noise(2, 4, 8, 8), "encoder_hidden_states": _noise(2, 5, 16),
                 "pooled_projections": _noise(2, 16), "timestep": torch.tensor([3, 400])},
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    ),
    "FLUX": _diffusers(
        "FluxTransformer2DModel",
        lambda: {"hidden_states": _noise(2, 16, 4), "encoder_hidden_states": _noise(2, 5, 16),
                 "pooled_projections": _noise(2, 16), "timestep": torch.tensor([0.3, 0.4]),
                 "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ),
}  # fmt: skip


# torch.nn's own


class Function(nn.Module):
    """A function of tensors, and no parameter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _nn(make: Callable[[], nn.Module], *shapes: tuple[int, ...], **kwargs: Any) -> Callable[[], Example]:
    return lambda: (make(), tuple(_noise(*shape) for shape in shapes), kwargs)


def _function(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], Example]:
    return _nn(lambda: Function(function), *shapes)


_PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
_BAG = torch.tensor([[1, 2, 3], [4, 5, 5]])


def _interpolate(mode: str, ndim: int, **how: Any) -> Callable[[], Example]:
    shape = (2, 3, *(8, 8, 8)[:ndim])
    return _function(lambda x: F.interpolate(x, size=(13, 11, 9)[:ndim], mode=mode, **how), shape)


TORCH: dict[str, Callable[[], Example]] = {
    "Linear": _nn(lambda: nn.Linear(32, 16), (2, 7, 32)),
    "Linear of a batch": _nn(lambda: nn.Linear(32, 16, bias=False), (2, 3, 7, 32)),
    "Bilinear": _nn(lambda: nn.Bilinear(8, 8, 4), (2, 8), (2, 8)),
    "RNN": _nn(lambda: nn.RNN(32, 16, num_layers=2), (7, 2, 32)),
    "LSTM": _nn(lambda: nn.LSTM(32, 16, num_layers=2, bidirectional=True), (7, 2, 32)),
    "projected LSTM": _nn(lambda: nn.LSTM(32, 16, proj_size=8, batch_first=True), (2, 7, 32)),
    "GRU": _nn(lambda: nn.GRU(32, 16, num_layers=2, bidirectional=True), (7, 2, 32)),
    "LSTMCell": _nn(lambda: nn.LSTMCell(32, 16), (2, 32)),
    "GRUCell": _nn(lambda: nn.GRUCell(32, 16), (2, 32)),
    "RNNCell": _nn(lambda: nn.RNNCell(32, 16), (2, 32)),
    "MultiheadAttention": _nn(lambda: nn.MultiheadAttention(32, 4, batch_first=True), *[(2, 7, 32)] * 3),
    "MultiheadAttention without weights": _nn(
        lambda: nn.MultiheadAttention(32, 4, batch_first=True), *[(2, 7, 32)] * 3, need_weights=False
    ),
    "MultiheadAttention over padding": _nn(
        lambda: nn.MultiheadAttention(32, 4, batch_first=True), *[(2, 7, 32)] * 3, key_padding_mask=_PADDING
    ),
    "TransformerEncoderLayer": _nn(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 7, 32)),
    "TransformerEncoder": _nn(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2), (2, 7, 32)
    ),
    "TransformerEncoder over padding": _nn(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        (2, 7, 32),
        src_key_padding_mask=_PADDING,
    ),
    "Transformer": _nn(lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True), (2, 7, 32), (2, 5, 32)),
    "Conv1d": _nn(lambda: nn.Conv1d(3, 8, 3, padding=1), (2, 3, 16)),
    "Conv2d": _nn(lambda: nn.Conv2d(4, 8, 3, stride=2, groups=2), (2, 4, 16, 16)),
    "Conv2d, padded the same": _nn(lambda: nn.Conv2d(4, 8, 4, padding="same"), (2, 4, 16, 16)),
    "Conv2d, padded by reflection": _nn(lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "Conv3d": _nn(lambda: nn.Conv3d(2, 4, 3), (2, 2, 6, 6, 6)),
    "ConvTranspose2d": _nn(lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 7, 7)),
    "BatchNorm2d": _nn(lambda: nn.BatchNorm2d(4), (2, 4, 8, 8)),
    "BatchNorm1d in training": _nn(lambda: nn.BatchNorm1d(4), (6, 4)),
    "InstanceNorm2d": _nn(lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 8, 8)),
    "GroupNorm": _nn(lambda: nn.GroupNorm(2, 4), (2, 4, 8, 8)),
    "LayerNorm": _nn(lambda: nn.LayerNorm(32), (2, 7, 32)),
    "RMSNorm": _nn(lambda: nn.RMSNorm(32), (2, 7, 32)),
    "LocalResponseNorm": _nn(lambda: nn.LocalResponseNorm(2), (2, 4, 8, 8)),
    "Embedding": lambda: (nn.Embedding(120, 16, padding_idx=0, max_norm=1.0), (TOKENS,), {}),
    "EmbeddingBag of means": lambda: (nn.EmbeddingBag(120, 16), (_BAG,), {}),
    "EmbeddingBag of sums": lambda: (
        nn.EmbeddingBag(120, 16, mode="sum"), (_BAG.flatten(), torch.tensor([0, 4])), {"per_sample_weights": _noise(6)},
    ),
    "EmbeddingBag of maxima": lambda: (nn.EmbeddingBag(120, 16, mode="max"), (_BAG,), {}),
    "pools": _function(
        lambda x: (F.max_pool2d(x, 2), F.avg_pool2d(x, 3), F.adaptive_avg_pool2d(x, 3), F.lp_pool2d(x, 2.0, 2)),
        (2, 4, 8, 8),
    ),
    "nearest": _interpolate("nearest", 2),
    "linear": _interpolate("linear", 1),
    "bilinear": _interpolate("bilinear", 2),
    "bilinear, antialiased": _interpolate("bilinear", 2, antialias=True),
    "bicubic": _interpolate("bicubic", 2),
    "bicubic, antialiased": _interpolate("bicubic", 2, antialias=True),
    "trilinear": _interpolate("trilinear", 3),
    "area": _interpolate("area", 2),
    "PixelShuffle": _nn(lambda: nn.PixelShuffle(2), (2, 4, 4, 4)),
    "grid_sample": _function(lambda x, grid: F.grid_sample(x, grid, align_corners=False), (2, 3, 8, 8), (2, 5, 5, 2)),
    "activations": _function(
        lambda x: [f(x) for f in (F.gelu, F.silu, F.mish, F.selu, F.softplus, F.hardswish, F.logsigmoid, F.glu)],
        (2, 7, 32),
    ),
    "PReLU": _nn(lambda: nn.PReLU(4), (2, 4, 8)),
    "losses": _function(
        lambda x, y: (
            F.cross_entropy(x, y.argmax(-1), label_smoothing=0.1), F.binary_cross_entropy_with_logits(x, y.sigmoid()),
            F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean"), F.smooth_l1_loss(x, y),
            F.cosine_embedding_loss(x, y, torch.ones(6)), F.triplet_margin_loss(x, y, y.flip(0)),
            F.margin_ranking_loss(x[:, 0], y[:, 0], torch.ones(6)), F.poisson_nll_loss(x, y.exp()),
        ),
        (6, 9), (6, 9),
    ),
    "CTCLoss": _function(
        lambda x: F.ctc_loss(
            x.log_softmax(-1), torch.tensor([[1, 2], [3, 3]]), torch.tensor([9, 9]), torch.tensor([2, 2])
        ),
        (9, 2, 6),
    ),
    "distances": _function(lambda x, y: (torch.cdist(x, y), F.cosine_similarity(x, y), F.pairwise_distance(x, y)),
                           (6, 9), (6, 9)),
    "products": _function(
        lambda x, y: (x @ y.mT, x[0] @ y.mT, x @ y[0].mT, x @ y[0, 0], torch.einsum("bik,bjk->bij", x, y),
                      torch.tensordot(x, y, dims=([2], [2])), torch.kron(x[0], y[0]),
                      torch.linalg.multi_dot([x[0], y[0].mT, x[0]])),
        (2, 7, 16), (2, 7, 16),
    ),
    "linear algebra": _function(
        lambda x: (torch.linalg.inv(x), torch.linalg.svd(x).S, torch.linalg.det(x), torch.matrix_exp(x),
                   torch.linalg.solve(x, x.mT), torch.linalg.norm(x), torch.linalg.matrix_power(x, 3)),
        (6, 6),
    ),
    "Fourier": _function(lambda x: (torch.fft.rfft(x).abs(), torch.stft(x, 16, return_complex=True,
                                    window=torch.hann_window(16)).abs()), (2, 64)),
    "indices": _function(
        lambda x: (x[:, torch.tensor([1, 1, 3])], x.index_add(1, torch.tensor([0, 2]), x[:, :2]),
                   x.masked_fill(x > 0, 1.0), x.gather(1, torch.zeros(2, 2, 9, dtype=torch.long)), x.cumsum(1),
                   x.sort(-1).values, x.topk(3).values, x.std(-1), x.var(1, correction=0), x.logsumexp(-1), x.prod(-1)),
        (2, 6, 9),
    ),
    "weight norm": _nn(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (2, 8)),
    "spectral norm": _nn(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), (2, 8)),
    "Dropout": _nn(lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.AlphaDropout(0.2)), (2, 8)),
}  # fmt: skip

ARCHITECTURES = TEXT | OTHERS
"""Those of transformers."""


def example(table: dict[str, Callable[[], Example]], name: str) -> Example:
    """The one of this name: the same weights each time, in evaluation mode unless its name says training."""
    torch.manual_seed(0)
    model, args, kwargs = table[name]()
    training = "training" in name or name == "Dropout"
    return model.train(training), args, kwargs

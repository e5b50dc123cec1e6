"""Rows and positions are followed through operators: what is claimed holds when one token after another changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from followed import Point, disturbed, followed, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from stabilitykit.recorder import record

B, L, D = 2, 5, 8
IDS = torch.arange(3, 3 + B * L).view(B, L)
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip


class Applied(nn.Module):
    """`function` of the embeddings `[B, L, D]` of ids."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, D).double()
        self.function = function

    def forward(self, ids: Tensor) -> Any:
        return self.function(self.embed(ids))


def causal(x: Tensor) -> Tensor:
    """Scores of earlier keys, -inf of later ones."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return (x @ x.transpose(1, 2)).masked_fill(later, float("-inf"))


def into(shape: tuple[int, ...], write: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Any]:
    """Writes into zeros of this shape, and reads them."""

    def run(x: Tensor) -> Tensor:
        made = torch.zeros(shape, dtype=x.dtype)
        write(made, x)
        return made * 1

    return run


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 4, 2).transpose(1, 2)


def recurrence(x: Tensor) -> Tensor:
    states = [x[:, 0] * 1]
    for i in range(1, x.shape[1]):
        states.append(states[-1] * 0.5 + x[:, i])
    return torch.stack(states, 1) * 1


LEAST = torch.finfo(torch.float64).min
MIX = torch.linspace(-1, 1, D * D, dtype=torch.float64).view(D, D).sin()
PERM = torch.tensor([3, 1, 4, 0, 2])
KERNEL = torch.linspace(0.1, 1, D * 3, dtype=torch.float64).view(D, 1, 3)

OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: (x * 2 + 1).sin() * x[:, :1].exp(),
    "shifted": lambda x: x[:, 1:] - x[:, :-1],
    "linear": lambda x: F.linear(x, MIX, MIX[0]),
    "addmm": lambda x: torch.addmm(MIX[0], x.view(-1, D), MIX).view(B, L, D) * 1,
    "weights first": lambda x: (MIX @ x.transpose(1, 2)) * 1,
    "vector": lambda x: (x @ MIX[0]) * 1,
    "token mixing": lambda x: (x.transpose(1, 2) @ MIX[:L, :L]) * 1,
    "mean over channels": lambda x: x.mean(-1, keepdim=True) * x,
    "norm over channels": lambda x: x / x.norm(dim=-1, keepdim=True),
    "mean over positions": lambda x: x + x.mean(1, keepdim=True),
    "amax over positions": lambda x: x.amax(1) * 2,
    "layer norm": lambda x: F.layer_norm(x, (D,)),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 2),
    "batch norm": lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True) * 1,
    "softmax over channels": lambda x: x.softmax(-1) * 1,
    "softmax over positions": lambda x: x.softmax(1) * x,
    "attention": lambda x: causal(x).softmax(-1) @ x,
    "attention without a mask": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "attention, mask added": lambda x: (
        x @ x.mT + torch.full((L, L), LEAST, dtype=x.dtype).triu(1)
    ).softmax(-1) @ x,
    "attention, wrong mask": lambda x: (
        x @ x.mT + torch.full((L, L), LEAST, dtype=x.dtype).triu(2)
    ).softmax(-1) @ x,
    "attention, where": lambda x: torch.where(
        torch.ones(L, L).tril().bool(), x @ x.mT, torch.tensor(float("-inf"), dtype=x.dtype)
    ).softmax(-1) @ x,
    "attention by hand": lambda x: (
        (scores := causal(x)).sub(scores.amax(-1, keepdim=True)).exp()
        / (causal(x) - scores.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    ) @ x,
    "linear attention": lambda x: ((x @ x.mT).tril() @ x) * 1,
    "linear attention, both ways": lambda x: (x @ (x.mT @ x)) * 1,
    "fused attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True) * 1,
    "fused attention, both ways": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)) * 1,
    "fused attention, boolean mask": lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), attn_mask=torch.ones(L, L).tril().bool()
    ) * 1,
    "keys and queries swapped": lambda x: (x @ x.mT).transpose(1, 2).softmax(1).transpose(1, 2) @ x,
    "cumsum": lambda x: x.cumsum(1) * 1,
    "cumsum from behind": lambda x: x.flip(1).cumsum(1).flip(1) * 1,
    "heads": lambda x: heads(x) @ heads(x).mT,
    "flattened": lambda x: x.reshape(B * L, D) @ MIX,
    "transposed and flattened": lambda x: x.transpose(0, 1).reshape(B * L, D) * 2,
    "split channels": lambda x: x.view(B, L, 2, 2, 2).permute(3, 0, 2, 1, 4).contiguous() * 2,
    "chunks": lambda x: [part * 2 for part in x.chunk(2, -1)],
    "unbound": lambda x: torch.stack([part * 2 for part in x.unbind(1)], 1) * 1,
    "stacked last": lambda x: torch.stack([x[:, i] * 2 for i in range(L)], -1) * 1,
    "recurrence": recurrence,
    "expanded": lambda x: x[:, :, None].expand(B, L, 3, D).reshape(B, L * 3, D) * 2,
    "repeated": lambda x: x.repeat(1, 2, 1) * 2,
    "repeated each": lambda x: x.repeat_interleave(2, dim=1) * 2,
    "rows repeated": lambda x: x.repeat_interleave(3, dim=0) * 2,
    "flipped": lambda x: x.flip(1) * 2,
    "rolled": lambda x: x.roll(1, 1) * 2,
    "cat": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1) * 2,
    "cat with constants": lambda x: torch.cat([torch.ones(B, 2, D, dtype=x.dtype), x], 1) * 2,
    "cat of channels": lambda x: torch.cat([x, x * 2], -1) * 2,
    "padded": lambda x: F.pad(x, (0, 0, 2, 0)) * 2,
    "cropped by a pad": lambda x: F.pad(x, (0, 0, 1, -1)) * 2,
    "index": lambda x: x[:, PERM] * 2,
    "index of both": lambda x: x[torch.tensor([1, 0, 1]), torch.tensor([4, 0, 2])] * 2,
    "boolean index": lambda x: x[torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 1, 1]]).bool()] * 2,
    "index_select": lambda x: x.index_select(1, PERM) * 2,
    "gather": lambda x: x.gather(1, torch.tensor([4, 0]).view(1, 2, 1).expand(B, 2, D)) * 2,
    "masked_select": lambda x: x.masked_select((torch.arange(L) % 2 == 0).view(1, L, 1)) * 2,
    "sorted channels": lambda x: x.sort(-1).values * 2,
    "sorted positions": lambda x: x.sort(1).values * 2,
    "topk": lambda x: x.topk(3, -1).values * 2,
    "copied": into((B, L, D), lambda made, x: made.copy_(x)),
    "copied into a part": into((B, 9, D), lambda made, x: made[:, 3 : 3 + L].copy_(x)),
    "written by position": into((B, L, D), lambda made, x: [made[:, i].copy_(x[:, i]) for i in range(L)]),
    "written by channel": into(
        (B, L, D), lambda made, x: [made[..., i::2].copy_(x[..., i::2]) for i in range(2)]
    ),
    "index_copy": into((B, 9, D), lambda made, x: made.index_copy_(1, PERM + 2, x)),
    "index_add": into((B, L, D), lambda made, x: made.index_add_(1, PERM, x)),
    "index_add into one": into((B, L, D), lambda made, x: made.index_add_(1, torch.tensor([0, 0, 1, 1, 1]), x)),
    "index_put": into((B, 9, D), lambda made, x: made.__setitem__((slice(None), PERM), x)),
    "scatter": into((B, L, D), lambda made, x: made.scatter_(2, torch.arange(D).flip(0).expand(B, L, D), x)),
    "added in place": lambda x: x.mul(1).add_(x).mul_(2) * 1,
    "out": lambda x: torch.mul(x, 2, out=torch.empty_like(x)) * 1,
    "routed": lambda x: (
        (flat := x.reshape(-1, D)),
        (order := torch.tensor([7, 1, 9, 0, 3, 2, 8, 5, 4, 6])),
        torch.zeros_like(flat).index_add_(0, order, flat[order] @ MIX).view(B, L, D) * 1,
    ),
    "convolution": lambda x: F.conv1d(x.mT, KERNEL, padding=2, groups=D)[..., :L] * 1,
    "convolution, both ways": lambda x: F.conv1d(x.mT, KERNEL, padding=1, groups=D) * 1,
    "convolution, padded before": lambda x: F.conv1d(F.pad(x.mT, (2, 0)), KERNEL, groups=D) * 1,
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(B, L, 4, 2)) * 1j).flatten(2) * 2,
    "einsum": lambda x: torch.einsum("bld,bmd->blm", x, x) * 1,
    "outer": lambda x: (x[:, :, None, :] - x[:, None, :, :]).sum(-1) * 1,
    "glu": lambda x: F.glu(x, -1) * 1,
    "unknown": lambda x: torch.linalg.svdvals(x) * 1,
    "foreach": lambda x: torch._foreach_mul([x, x], 2.0)[0] * 1,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_what_an_operator_does_is_followed(name: str) -> None:
    model = Applied(OPERATORS[name])
    report = disturbed(model, lambda: model(IDS), tokens(IDS, model.embed.weight.data))
    assert report.wrong == []
    if name not in LOST:
        assert report.share == 1.0, report.unnamed


# Their results belong to no position, or not all of them do.
LOST = {
    "token mixing", "mean over positions", "amax over positions", "linear attention, both ways", "unknown",
    "index_add into one", "batch norm", "group norm", "attention by hand", "sorted positions",
}  # fmt: skip

CAUSAL = {
    "pointwise": False, "linear": True, "layer norm": True, "attention": True, "attention, mask added": True,
    "attention, where": True, "linear attention": True, "fused attention": True, "cumsum": True, "convolution": True,
    "fused attention, boolean mask": True, "convolution, padded before": True, "recurrence": True, "routed": True,
    "attention by hand": True, "attention without a mask": False, "attention, wrong mask": False,
    "fused attention, both ways": False, "cumsum from behind": False, "convolution, both ways": False,
    "mean over positions": False, "softmax over positions": False,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, expected in CAUSAL.items() if name != "pointwise"])
def test_what_is_causal_is_known_to_be(name: str) -> None:
    """That nothing is called so which is not, the test above tells."""
    run = followed(model := Applied(OPERATORS[name]), lambda: model(IDS))
    last = next(made for made in reversed(run.made) if made.labels.position is not None)
    assert all(last.causal(row, at) for row in range(B) for at in range(L - 1)) == CAUSAL[name]


def llama(attention: str = "eager") -> Any:
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(**SMALL)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).eval().double()


def moe(experts: str) -> Any:
    config = transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    return model if experts == "grouped_mm" else model.double()  # which has no float64


def mixtral() -> Any:
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    )
    model.set_experts_implementation("eager")
    return model.double()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, tie_word_embeddings=False
    )
    return transformers.MambaForCausalLM(config).double()


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=3)
    return transformers.GptOssForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertModel(config).double()


def gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL, sliding_window=3)).double()


MODELS: dict[str, Callable[[], Any]] = {
    "llama, eager": llama,
    "llama, sdpa": lambda: llama("sdpa"),
    "qwen3 moe, eager": lambda: moe("eager"),
    "qwen3 moe, grouped": lambda: moe("grouped_mm"),
    "qwen3 moe, batched": lambda: moe("batched_mm"),
    "mixtral": mixtral,
    "gpt-2": gpt2,
    "gemma 3": gemma3,
    "gpt-oss": gpt_oss,
    "mamba": mamba,
    "bert": bert,
}


@pytest.mark.table
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_followed(name: str, rows: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = IDS[:rows]
    table = model.get_input_embeddings().weight.data
    wide = table.dtype == torch.float64
    report = disturbed(
        model, lambda: model(ids), tokens(ids, table), little=1e-5 if wide else 1e-4, seen=1e-13 if wide else 0
    )
    assert report.wrong == []
    assert report.share > 0.98, report.unnamed
    if name != "bert":
        assert report.causal > 250


@pytest.mark.table
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_are_followed_from_step_to_step(kind: str, attention: str) -> None:
    model = llama(attention)
    parts = [IDS, torch.tensor([[20], [21]]), torch.tensor([[24, 26, 28], [25, 27, 29]])]

    def call() -> None:
        cache: Any = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=12)
        for part in parts:
            model(part, past_key_values=cache)

    table = model.get_input_embeddings().weight.data
    points = [point for part, start in zip(parts, (0, 5, 6), strict=True) for point in tokens(part, table, start=start)]
    report = disturbed(model, call, points, little=1e-5)
    assert report.wrong == []
    assert report.share > 0.99
    assert report.causal > 900


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_causal_only_where_a_query_sees_something(side: str, attention: str) -> None:
    model = llama(attention)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    mask = mask if side == "left" else mask.flip(1)
    report = disturbed(
        model, lambda: model(IDS, attention_mask=mask), tokens(IDS, model.get_input_embeddings().weight.data)
    )
    assert report.wrong == []


def test_t5s_encoder_and_decoder_have_positions_of_their_own() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval().double()
    model.decoder.embed_tokens = nn.Embedding(64, 32).double()  # of its own, to be disturbed alone
    model.lm_head = nn.Linear(32, 64).double()
    decoded = torch.arange(30, 40).view(B, L)  # as many as the encoder's
    points = tokens(IDS, model.encoder.embed_tokens.weight.data)
    points += tokens(decoded, model.decoder.embed_tokens.weight.data, "decoder_input_ids")
    call = lambda: model(input_ids=IDS, decoder_input_ids=decoded)  # noqa: E731
    report = disturbed(model, call, points, little=1e-3, seen=1e-9)  # its norms are float32
    assert report.wrong == []
    assert report.share > 0.99


def whisper(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=6,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval().to(dtype)
    model.proj_out = nn.Linear(32, 64).to(dtype)
    return model


def test_whispers_frames_are_no_tokens() -> None:
    model = whisper()
    sound, ids = torch.randn(2, 8, 12).double(), torch.arange(30, 38).view(2, 4)
    table = model.model.decoder.embed_tokens.weight.data
    call = lambda: model(input_features=sound, decoder_input_ids=ids)  # noqa: E731
    report = disturbed(model, call, tokens(ids, table, "decoder_input_ids"))
    assert report.wrong == []
    model.model.encoder.layers[1].fc2.weight.data[4] = torch.inf
    with torch.no_grad(), record(model) as recording:
        call()
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert first.site.startswith("encoder.layers.1.fc2")
    assert (first.broke.counts, first.broke.token, first.broke.causal) == ("frame", None, False)
    assert first.broke.positions == tuple(range(6))


def test_an_images_patches_are_counted() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config).eval().double()
    image = torch.randn(2, 3, 8, 8).double()
    points: list[Point] = [
        ("", row, 2 * i + j, image[row, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4])
        for row in range(2)
        for i in range(2)
        for j in range(2)
    ]
    report = disturbed(model, lambda: model(pixel_values=image), points)
    assert report.wrong == []
    assert report.share > 0.8  # the class token belongs to no patch
    model.layernorm.weight.data.fill_(torch.inf)
    with torch.no_grad(), record(model) as recording:
        model(pixel_values=image)
    found = recording.at("embeddings.patch_embeddings.projection")
    assert (found.positions, found.amax_token) == (8, None)
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.broke.counts, first.broke.positions, first.broke.rows) == ("patch", (0, 1, 2, 3), (0, 1))


def test_the_token_an_expert_was_given_is_named() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        config = transformers.Qwen3MoeConfig(
            **SMALL | {"num_hidden_layers": 1}, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=1,
            decoder_sparse_step=1,
        )  # fmt: skip
        model = transformers.Qwen3MoeForCausalLM(config).eval()
        experts = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"]
        ids = torch.randperm(60)[: 2 * L].view(2, L) + 3
        for expert in range(4):
            kept = experts.data.clone()
            experts.data[expert, 5] = torch.inf
            with torch.no_grad(), record(model) as recording:
                hidden = model(ids, output_hidden_states=True).hidden_states[-1]
            experts.data.copy_(kept)
            first = recording.first_break()
            if first is None:
                continue  # nobody was sent there
            assert first.broke is not None
            row, position = first.broke.row, first.broke.position
            assert row is not None
            assert position is not None
            broken = (~hidden.isfinite()).any(-1)
            assert bool(broken[row, position])
            assert first.broke.token == int(ids[row, position])
            assert set(first.broke.positions) == set(broken.nonzero()[:, 1].tolist())
            assert first.broke.causal


class Sums(nn.Module):
    """Adds what all positions have in common, or only those before."""

    def __init__(self, *, backwards: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4).half()
        self.embed.weight.data.fill_(600)
        self.embed.weight.data[9] = 650
        self.backwards = backwards

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + (x.amax(1, keepdim=True) if self.backwards else x.cummax(1).values) * 100


@pytest.mark.parametrize("backwards", [False, True])
def test_a_break_says_whether_what_follows_took_part(backwards: bool) -> None:
    model = Sums(backwards=backwards)
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[5, 6, 9]]))
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert first.broke.positions == ((0, 1, 2) if backwards else (2,))
    assert first.broke.causal is not backwards


def test_a_cropped_cache_keeps_what_it_holds() -> None:
    model = llama().float()
    model.model.embed_tokens.weight.data[21] = torch.inf
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[1, 10, 11, 12, 13]]), past_key_values=cache)
        cache.crop(-3)
        model(torch.tensor([[20, 21]]), past_key_values=cache)
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.broke.position, first.broke.token) == (3, 21)
    assert recording.header.tokens == ((1, 10, 20, 21),)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_beams_keep_the_tokens_of_the_rows_they_continue(implementation: str | None) -> None:
    torch.manual_seed(0)
    model = llama().float()
    given: list[list[list[int]]] = []
    prepare = model.prepare_inputs_for_generation

    def prepared(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(input_ids.tolist())
        return prepare(input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = prepared
    with torch.no_grad(), record(model) as recording:
        model.generate(
            torch.tensor([[3, 4, 5], [6, 7, 8]]), max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0,
            cache_implementation=implementation,
        )  # fmt: skip
    assert recording.header.tokens == tuple(map(tuple, given[-1]))
    final = [found for found in recording if found.step == len(given) - 1 and found.amax_token is not None]
    assert len(final) > 20
    for found in final:
        assert found.amax_row is not None
        assert found.amax_position is not None
        assert given[-1][found.amax_row][found.amax_position] == found.amax_token


def test_masks_and_steps_in_time_are_no_ids() -> None:
    model = llama().half()
    model.model.layers[0].input_layernorm.weight.data.fill_(6e4)
    with torch.no_grad(), record(model) as recording:
        model(inputs_embeds=torch.randn(1, L, 32).half(), attention_mask=torch.ones(1, L).long())
    assert recording.header.tokens is None
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.broke.counts, first.broke.token) == ("position", None)

    class Timed(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * timestep.view(-1, 1, 1)

    timed = Timed()
    with record(timed) as recording:
        timed(torch.ones(2, 3, 4), torch.tensor([5, 6]))
    assert recording.header.tokens is None
    (found,) = recording
    assert (found.amax_row, found.amax_position, found.positions) == (1, 0, 6)


class Prompted(nn.Module):
    """Puts vectors of its own before the embeddings of ids."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.prompt = nn.Parameter(torch.randn(1, 2, 32))

    def forward(self, input_ids: Tensor, past_key_values: Any) -> Any:
        embedded: Tensor = self.inner.embed_tokens(input_ids)
        if not past_key_values.get_seq_length():
            embedded = torch.cat([self.prompt, embedded], 1)
        return self.inner(inputs_embeds=embedded, past_key_values=past_key_values)


def test_tokens_behind_a_soft_prompt_are_named_at_the_positions_they_have() -> None:
    inner = llama().float().model
    inner.layers[0].mlp.down_proj.weight.data.fill_(1e38)
    model, cache = Prompted(inner), DynamicCache(config=inner.config)
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[20, 21, 22]]), cache)
        model(torch.tensor([[23]]), cache)
    there = [None, None, 20, 21, 22, 23]
    for step, positions in ((0, range(5)), (1, range(5, 6))):
        found = recording.at("inner.layers.0.self_attn.q_proj", step)
        assert found.amax_position is not None
        assert found.amax_position in positions
        assert found.amax_token == there[found.amax_position]


@pytest.mark.parametrize("level", ["modules", "layers"])
def test_without_operators_positions_are_those_of_what_a_module_was_given(level: Any) -> None:
    model = llama().float()
    with torch.no_grad(), record(model, level=level) as recording:
        model(IDS)
    found = recording.at("layers.1")
    assert (found.positions, found.channels) == (B * L, 32)
    assert found.amax_row is not None
    assert found.amax_position is not None
    assert found.amax_token == int(IDS[found.amax_row, found.amax_position])


def test_a_call_that_cannot_be_followed_runs_as_it_would() -> None:
    class Odd(nn.Module):
        def forward(self, ids: Any, cache: Any) -> Tensor:
            return torch.ones(2, 3) * len(ids)

    class Cache:
        def get_seq_length(self) -> int:
            raise RuntimeError("not yet")

    model = Odd()
    with record(model) as recording:
        assert bool((model(torch.ones(2, 3).long(), cache=Cache()) == 2).all())
    assert recording.header.error is None

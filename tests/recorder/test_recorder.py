"""`record` sees every tensor, changes none, and leaves nothing behind."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.diagnosis import verdict
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma, KVCache
from stabilitykit.recorder import record
from stabilitykit.records import Level

Small = Callable[..., Gemma]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("level", ["layers", "modules", "operators"])
def test_nothing_outlives_the_block(small: Small, tokens: torch.Tensor, level: Level) -> None:
    model = small(3)
    with record(model, level=level) as recording:
        assert hooks(model) > 0
        assert len(_get_current_dispatch_mode_stack()) == (level == "operators")
        model(tokens)
    assert hooks(model) == 0
    assert _get_current_dispatch_mode_stack() == []
    assert len(recording) > 0


def test_nothing_outlives_an_exception_and_what_was_seen_is_kept(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the middle")

    handle = model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in the middle"), record(model) as recording:
        model(tokens)
    handle.remove()
    assert hooks(model) == 0
    assert _get_current_dispatch_mode_stack() == []
    assert recording.header.error == "in the middle"
    assert recording.records[-1].layer == 1


def test_a_failed_pass_does_not_confuse_the_next_one_in_the_same_block(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)
    with record(model) as alone:
        model(tokens)
    with record(model) as recording:
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        logits = model(tokens)
        logits * 2.0
    assert [r.site for r in recording if r.step == 1] == [*(r.site for r in alone), "outside/mul.0"]


@pytest.mark.table
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("generation", [1, 2, 3])
@pytest.mark.parametrize("level", ["layers", "modules", "operators"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_logits_are_the_same_bits_with_and_without(
    small: Small, tokens: torch.Tensor, dtype: str, generation: int, level: Level, mode: Callable[[], Any]
) -> None:
    model = small(generation, dtype)
    with mode():
        bare = model(tokens)
        with record(model, level=level):
            recorded = model(tokens)
    assert torch.equal(bare, recorded)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_sites_do_not_depend_on_the_grad_mode(small: Small, tokens: torch.Tensor, generation: int) -> None:
    model = small(generation, "float16")
    seen = []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), record(model) as recording:
            model(tokens)
        seen.append([(r.site, r.operator, r.amax) for r in recording])
    assert seen[0] == seen[1] == seen[2]


def test_a_layer_is_recorded_site_by_site(small: Small, tokens: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="Nothing was recorded"), record(small(3)) as recording:
        small(3)(tokens)  # an unrelated model is nobody's business
    assert {r.module for r in recording} == {"outside"}
    model = small(3)
    with record(model) as recording:
        model(tokens)
    norm = ["/pow.0", "/mean.0", "/add.0", "/rsqrt.0", "/mul.0", "/add.1", ""]

    def normed(name: str) -> list[str]:
        return [f"layers.1.{name}{suffix}" for suffix in norm]

    attention = [
        *("/mul.0", "/neg.0", "/mul.1", "/add.0", "/mul.2", "/neg.1", "/mul.3", "/add.1"),
        *("/matmul.0", "/mul.4", "/add.2", "/softmax.0", "/matmul.1"),
    ]
    assert [r.site for r in recording if r.layer == 1] == [
        *normed("input_layernorm"),
        *(f"layers.1.self_attn.{name}_proj" for name in "qkv"),
        *normed("self_attn.q_norm"),
        *normed("self_attn.k_norm"),
        *(f"layers.1.self_attn{suffix}" for suffix in attention),
        "layers.1.self_attn.o_proj",
        *normed("post_attention_layernorm"),
        "layers.1/add.0",
        *normed("pre_feedforward_layernorm"),
        *("layers.1.mlp.gate_proj", "layers.1.mlp/gelu.0", "layers.1.mlp.up_proj", "layers.1.mlp/mul.0"),
        "layers.1.mlp.down_proj",
        *normed("post_feedforward_layernorm"),
        "layers.1",
    ]
    assert recording.at("layers.1").label == "residual after MLP"
    assert recording.at("layers.1").operator == "add"
    assert recording.at("layers.1.mlp.down_proj").operator == "matmul"


def test_levels_nest_and_agree(small: Small, tokens: torch.Tensor) -> None:
    model = small(2, "float16")
    seen = {}
    for level in ("layers", "modules", "operators"):
        with torch.inference_mode(), record(model, level=level) as recording:
            model(tokens)
        seen[level] = {r.site: (r.amax, r.mean, r.elements, r.amax_position) for r in recording}
    rotary = {"rotary_emb", "rotary_emb[1]"}
    assert set(seen["layers"]) == {
        *rotary,
        "embed_tokens",
        "layers.0",
        "layers.1",
        "layers.2",
        "norm",
        "lm_head",
        "/output",
    }
    assert seen["layers"].items() <= seen["modules"].items()
    assert {"layers.0.mlp.gate_proj", "layers.2.self_attn.o_proj"} <= set(seen["modules"])
    # The model has no path to be called by, so its own last operator keeps its name.
    assert set(seen["modules"]) - set(seen["operators"]) == {"/output", "rotary_emb[1]"}
    assert all(seen["operators"][site] == found for site, found in seen["modules"].items() if site in seen["operators"])


class Odd(nn.Module):
    """Keyword arguments, tuples, dicts, in-place writes, views and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Returns()
        self.mask = torch.full((4, 4), -math.inf).triu(1)

    def forward(self, *, x: torch.Tensor) -> dict[str, object]:
        a, rest = self.inner(value=x)
        a.mul_(3.0)
        rest["b"][0, 0] = 7.0
        scores = a[:, :4] + self.mask
        return {"out": (scores, rest["b"].view(-1))}


class Returns(nn.Module):
    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return value + 1, {"b": value * 2}


def test_keywords_tuples_dicts_and_writes_in_place_are_seen() -> None:
    x = torch.ones(4, 5)
    model = Odd()
    with torch.no_grad(), record(model) as recording:
        model(x=x)
    by_site = {r.site: r for r in recording}
    assert by_site["inner"].amax == 2.0
    assert by_site["inner"].operator == "add"
    assert by_site["inner/mul.0"].amax == 2.0  # handed out second, and still the operator's
    assert by_site["/mul.0"].amax == 6.0  # the product, not the 2.0 that it wrote over
    scores = by_site["/add.0"]
    assert (scores.operator, scores.masked, scores.amax, scores.broke) == ("add", 6, 6.0, None)
    assert by_site["/output[1]"].amax == 7.0  # a view, after the write
    assert recording.first_break() is None


def test_what_an_in_place_operator_overwrote_is_still_known_when_it_breaks() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 0).mul_(4.0)

    model = InPlace()
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[[1.0, 30000.0]]], dtype=torch.float16))
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.operator, first.broke.kind, first.broke.value) == ("mul", "overflow", 120000.0)
    assert first.broke.operands == (30000.0, 4.0)


def test_float16s_own_mask_is_no_overflow(small: Small, tokens: torch.Tensor) -> None:
    """transformers adds -65,504: with a score below -16 that rounds to -inf, before anything is wrong."""
    model = small(3, "float16")
    model.layers[0].self_attn.scale = 400.0
    with torch.no_grad(), record(model) as recording:
        logits = model(tokens)
    masked = recording.at("layers.0.self_attn/add.2")
    scores = recording.at("layers.0.self_attn/mul.4")
    assert scores.minimum is not None
    assert scores.minimum < -16
    length = tokens.shape[1]
    hidden = sum(max(0, length - 1 - q) + max(0, q - 3) for q in range(length))  # later keys, and past a window of 4
    assert masked.masked == 4 * hidden
    assert masked.negative_inf == 0
    assert masked.amax is not None
    assert masked.amax < 60000
    assert recording.first_break() is None
    assert torch.isfinite(logits).all()


def test_a_sampling_filter_is_no_break() -> None:
    class Filter(nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            kept = logits.topk(3).values[..., -1:]
            filtered = logits.masked_fill(logits < kept, -math.inf)
            also = torch.where(logits < kept, -math.inf, logits)
            return torch.softmax(filtered / 0.7, dim=-1) + torch.softmax(also, dim=-1)

    model = Filter()
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).half())
    assert recording.first_break() is None
    assert {recording.at(site).masked for site in ("/masked_fill.0", "/div.0", "/where.0")} == {94}
    softmax = recording.at("/softmax.0").softmax
    assert softmax is not None
    assert (softmax.underflow_share, softmax.masked_rows) == (0.0, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_masked_key_is_no_probability_that_underflowed_in_any_dtype(
    small: Small, tokens: torch.Tensor, dtype: str
) -> None:
    model = small(3, dtype)
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    found = [made.softmax for made in recording if made.softmax is not None]
    assert found
    assert {made.underflow_share for made in found} == {0.0}


def test_a_float32_island_is_judged_as_float32(small: Small, tokens: torch.Tensor) -> None:
    model = small(1, "float16")
    model.embed_tokens.weight.data *= 2000
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    squares = recording.at("layers.0.input_layernorm/pow.0")
    assert squares.amax is not None
    assert squares.amax > 65504
    assert (squares.dtype, squares.broke) == ("float32", None)
    assert squares.formats["float16"].overflow > 0
    assert recording.first_break() is None


def test_a_module_without_floating_parameters_is_judged_by_what_it_is_given() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    module = Doubled()
    for value, ends in ((100.0, "finite throughout"), (40_000.0, "exceeds the float16 maximum")):
        with record(module) as recording:
            module(torch.full((3,), value, dtype=torch.float16))
        assert recording.header.dtype == "float16"
        assert ends in verdict(recording)
    module.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with record(module) as recording:
        module(torch.ones(3, dtype=torch.bfloat16))
    assert recording.header.dtype == "bfloat16"
    module.scale = nn.Parameter(torch.ones(2, dtype=torch.float16))
    with record(module) as recording:
        module(torch.ones(3))
    assert recording.header.dtype == "float16"


def test_peaks_are_located_by_token_and_channel(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)
    with torch.no_grad(), record(model, position_peaks=True) as recording:
        model(tokens)
    model.embed_tokens.weight.data[73, 5] = 900.0
    with torch.no_grad(), record(model, position_peaks=True) as recording:
        model(tokens)
    embedding = recording.at("embed_tokens")
    assert (embedding.amax_row, embedding.amax_position, embedding.amax_channel) == (0, 4, 5)
    assert embedding.amax_token == 73
    assert embedding.amax_token_text == model.tokenizer.piece(73)
    assert embedding.position_amax is not None
    assert len(embedding.position_amax) == tokens.shape[1]
    assert embedding.position_amax[4] == embedding.amax
    down = recording.at("layers.0.mlp.down_proj")  # stored flattened, [B·T, E]
    assert (down.positions, down.channels) == (7, 32)


def test_rows_and_absolute_positions_with_a_cache(small: Small) -> None:
    model = small(3)
    model.embed_tokens.weight.data[73, 5] = 900.0
    batch = torch.tensor([[2, 70, 71], [2, 72, 70]])
    cache = KVCache(model.config, batch=2, length=4, dtype=model.dtype)
    with torch.no_grad(), record(model) as recording:
        model(batch, cache=cache)
        model(torch.tensor([[70], [73]]), cache=cache)
    second = recording.at("embed_tokens", step=1)
    assert (second.amax_row, second.amax_position, second.amax_token) == (1, 3, 73)
    assert recording.header.tokens == ((2, 70, 71, 70), (2, 72, 70, 73))


def test_softmax_statistics_against_float64(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)
    layer = model.layers[2].self_attn
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    x: dict[str, torch.Tensor] = {}
    handle = layer.q_norm.register_forward_hook(lambda module, args, output: x.update(q=output))
    other = layer.k_norm.register_forward_hook(lambda module, args, output: x.update(k=output))
    with torch.no_grad():
        model(tokens)
    handle.remove(), other.remove()
    cos, sin = model.rotary_emb(model.config.is_global(2), 0, tokens.shape[1], dtype=model.dtype, device=model.device)

    def turned(t: torch.Tensor) -> torch.Tensor:
        first, last = t.double().chunk(2, -1)
        return t.double() * cos.double() + torch.cat([-last, first], -1) * sin.double()

    scores = turned(x["q"]) @ turned(x["k"]).repeat_interleave(2, 1).transpose(2, 3) * layer.scale
    length = tokens.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)
    hidden = (key > query) | (key <= query - 4)
    p = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)[0]
    seen = recording.at("layers.2.self_attn/softmax.0").softmax
    assert seen is not None
    assert seen.entropy_mean == pytest.approx(entropy.mean(-1).tolist(), abs=1e-5)
    assert seen.entropy_min == pytest.approx(entropy.amin(-1).tolist(), abs=1e-5)
    assert seen.max_logit == pytest.approx(float(scores.masked_fill(hidden, -math.inf).max()), abs=1e-4)
    shown = scores.masked_fill(hidden, math.nan)[0]
    spread = max(float(row[~row.isnan()].max() - row[~row.isnan()].min()) for head in shown for row in head)
    assert seen.logit_range == pytest.approx(spread, abs=1e-4)
    assert seen.max_probability == pytest.approx(1.0)
    assert (seen.masked_rows, seen.nan_rows, seen.underflow_share) == (0, 0, 0.0)
    assert seen.sum_error is not None
    assert seen.sum_error < 1e-6


def test_softmax_counts_what_underflows_and_what_is_masked() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, -1)

    model = Plain()
    rows = torch.tensor([[0.0, -200.0, 0.0], [-math.inf, -math.inf, -math.inf], [math.nan, 0.0, 0.0]])
    with torch.no_grad(), record(model) as recording:
        model(rows)
    found = recording.records[0].softmax
    assert found is not None
    assert (found.masked_rows, found.nan_rows) == (1, 2)
    assert found.underflow_share == pytest.approx(1 / 6)
    assert found.logit_range == 200.0


def test_redaction_leaves_no_token(small: Small, tokens: torch.Tensor) -> None:
    with torch.no_grad(), record(model := small(3), redact=True) as recording:
        model(tokens)
    assert recording.header.tokens is None
    assert recording.header.token_texts == {}
    assert all(r.amax_token is None and r.amax_token_text is None for r in recording)
    assert recording.at("embed_tokens").amax_position is not None


def test_single_elements_can_be_watched(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)
    with torch.no_grad(), record(model, watch=[("layers.1", 40), ("layers.1.mlp/mul.0", 3)]) as recording:
        outputs = []
        handle = model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
        model(tokens)
        handle.remove()
    watched = {site: value for site, _, value in recording.header.watched}
    assert watched["layers.1"] == float(outputs[0].flatten()[40])
    assert len(recording.header.watched) == 2


def test_an_unknown_level_is_told_the_known_ones(small: Small) -> None:
    with (
        pytest.raises(MisuseError, match="unknown level 'all'; choose one of: layers"),
        record(small(1), level="all"),  # type: ignore[arg-type]
    ):
        pass


def test_what_is_no_module_is_told_so() -> None:
    number: Any = 5
    with (
        pytest.raises(MisuseError, match=r"expects a torch\.nn\.Module, got int\. If it wraps a model"),
        record(number),
    ):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
def test_a_compiled_model_is_refused_rather_than_seen_in_part(small: Small) -> None:
    model = small(3)
    model.layers[1] = torch.compile(model.layers[1])  # type: ignore[assignment]
    with pytest.raises(MisuseError, match=r"before torch\.compile"), record(model):
        pass
    assert hooks(model) == 0


def test_complex_numbers_and_float8_are_measured_too() -> None:
    class Unusual(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            turned = torch.view_as_complex(x) * torch.polar(torch.tensor(3e38), torch.tensor(0.1))
            return turned * 2.0, (x * 96).to(torch.float8_e4m3fn)

    model = Unusual()
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[[1.0, 0.0], [2.0, 4.0]]]))
    assert recording.at("/mul.0").dtype == "float32"
    assert recording.at("/mul.0").shape == (1, 2, 2)
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.operator, first.broke.kind) == ("mul", "overflow")
    cast = recording.at("/cast.0")
    assert (cast.dtype, cast.amax) == ("float8_e4m3fn", 384.0)

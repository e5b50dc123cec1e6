"""Mechanisms planted in a few lines of code that were answered wrongly or crashed: each gets its right answer."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.recorder.statistics import measure
from truth.models import decoder
from truth.told import IDS, first, says, says_not, silent, told

NAN, INF, HALF = math.nan, math.inf, torch.float16
GIVEN = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]]).half()
CASTING_ADVICE = ("bfloat16, float32", "wider range")


class Code(nn.Module):
    def __init__(self, code: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.code = code
        self.w = nn.Parameter(torch.ones(4).half(), requires_grad=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Any) -> Any:
        return self.code(self, x)


def of(code: Callable[..., Any], x: Any, level: str = "operators", **tensors: Tensor) -> dict[str, Any]:
    return told(Code(code, **tensors), lambda m: m(x), level)


# Breaks that were not seen


def assign(m: Any, x: Tensor) -> Tensor:
    y = x * m.w
    y[0, 1] = NAN
    return y + 1


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: (x * m.w).masked_fill(x > 7, NAN) + 1,
        lambda m, x: (x * m.w).masked_fill(x > 7, INF) + 1,
        lambda m, x: torch.where(x > 7, NAN, x * m.w) + 1,
        lambda m, x: (x * m.w).clamp(max=NAN) + 1,
        assign,
    ],
    ids=["filled", "filled with infinity", "chosen", "clamped", "assigned"],
)
def test_what_the_code_itself_puts_in_is_a_constant(code: Callable[..., Any]) -> None:
    said = of(code, GIVEN)
    found = first(said)
    assert (found["kind"], found["origin"]["kind"], found["origin"]["finite"]) == ("constant", "constant", False)
    says_not(said, "finite throughout", "check what is passed")


@pytest.mark.parametrize(
    ("code", "x"),
    [
        (lambda m, x: x * m.w + m.b, torch.full((1, 2, 4), -40000.0)),
        (lambda m, x: x * m.w * m.b, torch.full((1, 2, 4), 2.0)),
        (lambda m, x: x + x, torch.full((1, 1, 2, 4), -40000.0)),
    ],
    ids=["sum", "product", "four dimensions"],
)
def test_large_negative_numbers_are_no_mask_where_nothing_is_hidden(code: Callable[..., Any], x: Tensor) -> None:
    found = first(of(code, x.half(), b=torch.full((2, 4), -40000.0).half()))
    assert (found["kind"], found["value"]) == ("overflow", -80000.0)


# Interference


def test_an_empty_mean_is_invalid_and_raises_nothing() -> None:
    found = first(of(lambda m, x: (x * m.w)[:, :0].mean(1), GIVEN))
    assert (found["operator"], found["kind"]) == ("mean", "invalid")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchs_encoder_runs_with_padding() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 7, 32), torch.zeros(2, 7).bool()
    padding[0, 5:] = True
    with torch.no_grad():
        bare = model(x, src_key_padding_mask=padding)
        with sk.record(model) as recording:
            recorded = model(x, src_key_padding_mask=padding)
    assert torch.equal(bare, recorded)
    assert recording.first_break() is None


@pytest.mark.parametrize("part", [lambda: nn.LazyLinear(4), lambda: torch.jit.script(nn.Linear(32, 4))])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_modules_that_cannot_be_followed_run_or_are_refused_before_the_pass(part: Callable[[], Any]) -> None:
    model = nn.Sequential(part())
    with torch.no_grad():
        try:
            with sk.record(model):
                model(torch.ones(1, 2, 32))
        except MisuseError:
            return


class Resized(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(13, 13), mode=self.mode)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Resized("bilinear"), (1, 3, 8, 8)), (Resized("bicubic"), (1, 3, 8, 8)), (nn.GRU(32, 16), (7, 2, 32))],
    ids=["bilinear", "bicubic", "recurrent"],
)
def test_composites_that_have_a_kernel_compute_the_same_bits(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    with torch.inference_mode():
        bare = model(x)
        with sk.record(model):
            recorded = model(x)
    for one, other in zip(bare, recorded, strict=True) if isinstance(bare, tuple) else [(bare, recorded)]:
        assert torch.equal(one, other)


calls: list[int] = []


@torch.library.custom_op("truth::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    calls.append(1)
    return x * 6e4 + torch.rand_like(x)


def test_an_operator_of_the_users_own_runs_once_and_draws_once() -> None:
    model, x = Code(lambda m, x: counted(x)), torch.full((1, 2, 4), 2.0).half()
    torch.manual_seed(0)
    model(x)
    wanted = torch.rand(1)
    calls.clear()
    torch.manual_seed(0)
    with sk.record(model) as recording:
        model(x)
    assert torch.equal(torch.rand(1), wanted)
    assert len(calls) == 1
    assert recording.first_break() is not None


# Positions and tokens


@pytest.mark.parametrize("seed", range(3))
def test_tokens_sorted_by_expert_are_told_at_their_own_position_or_none(seed: int) -> None:
    torch.manual_seed(seed)
    kind: Any = transformers.Qwen3MoeConfig
    config = kind(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=1,
        decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval().half().requires_grad_(False)
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj.mul_(50)
    kept = experts.down_proj.clone()
    ids = torch.randint(3, 64, (1, 8))
    for expert in range(4):
        experts.down_proj.copy_(kept)
        experts.down_proj[expert, 5] = 6e4
        seen: list[Any] = []
        hook = model.model.layers[1].mlp.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        said = told(model, lambda m: m(ids))
        hook.remove()
        output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        lost = (~output.isfinite()).any(-1).flatten().nonzero().flatten().tolist()
        if lost:
            found = first(said)
            assert found["position"] in (None, lost[0])
            assert found["token_id"] in (None, int(ids[0, lost[0]]))
            says_not(said, "starts with") if lost[0] else None


def test_a_cropped_cache_forgets_the_tokens_that_were_rejected() -> None:
    model = decoder("llama")
    model.model.embed_tokens.weight[21] = INF

    def run(m: Any) -> Any:
        cache = transformers.DynamicCache(config=m.config)
        m(torch.tensor([[1, 10, 11, 12, 13]]), past_key_values=cache)
        cache.crop(-3)
        return m(torch.tensor([[20, 21]]), past_key_values=cache)

    said = told(model, run)
    found = first(said)
    assert (found["position"], found["token_id"], found["step"]) == (3, 21, 1)
    assert said["tokens"][:4] == [1, 10, 20, 21]


def test_a_decoders_position_is_told_by_the_decoders_token() -> None:
    torch.manual_seed(0)
    kind: Any = transformers.T5Config
    config = kind(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval().half().requires_grad_(False)
    model.decoder.block[0].layer[2].DenseReluDense.wo.weight[4] = 6e4
    encoded, decoded = torch.tensor([[45, 9, 49, 55, 44]]), torch.tensor([[21, 50, 11, 50, 59]])
    found = first(told(model, lambda m: m(input_ids=encoded, decoder_input_ids=decoded)))
    if found["position"] is not None:
        assert found["token_id"] == int(decoded[0, found["position"]])


def test_a_mask_of_ones_beside_embeddings_is_no_text() -> None:
    model = decoder("llama").half()
    model.model.layers[0].input_layernorm.weight.fill_(6e4)
    vectors = torch.randn(1, 5, 64).half()
    said = told(model, lambda m: m(inputs_embeds=vectors, attention_mask=torch.ones(1, 5).long()))
    assert said["tokens"] is None
    assert first(said)["token_id"] is None
    says_not(said, "id 1)", "starts with")


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.amax(1, keepdim=True) * 100


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(50, 8), nn.ModuleList([Mixing()])
        self.half().requires_grad_(False)
        self.embed.weight.fill_(600.0)
        self.embed.weight[9] = 650.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers[0](self.embed(ids))


def test_without_a_causal_mask_no_prefix_is_blamed() -> None:
    model = Bidirectional()
    assert bool(model(torch.tensor([[5, 6, 7]])).isfinite().all())
    said = told(model, lambda m: m(torch.tensor([[5, 6, 9]])))
    assert first(said)["kind"] == "overflow"
    says_not(said, "starts with", "depends only on the first")


# Outside the model


def test_what_breaks_outside_the_model_is_told_by_its_line() -> None:
    model, x = nn.Linear(8, 4).half().requires_grad_(False), torch.ones(1, 2, 8).half()
    said = told(model, lambda m: m(x) * 1e6)
    assert first(said)["site"].startswith("outside")
    says(said, "outside the model", "test_public_code.py")
    says_not(said, "temperature", "top_p")
    said = told(model, lambda m: (m(x) * 0).div(m(x) * 0))
    assert first(said)["kind"] == "invalid"
    says_not(said, "temperature", "top_p")


# Formats


@pytest.mark.parametrize(
    ("code", "x"),
    [
        (lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8), torch.ones(1, 2, 4)),
        (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8), torch.full((1, 2, 4), 1e-4)),
        (lambda m, x: torch.log(torch.softmax(x, -1)), torch.tensor([[[0.0, 20, 0, 0]]])),
    ],
    ids=["eps", "squares", "probability"],
)
def test_a_zero_that_half_made_is_told_as_rounding(code: Callable[..., Any], x: Tensor) -> None:
    assert bool(code(None, x).isfinite().all())
    said = of(code, x.half())
    assert first(said)["rounded"] is not None
    says_not(said, "in any format", "will not help")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF])
def test_a_number_past_float32_is_advised_no_format_that_does_not_hold_it(dtype: torch.dtype) -> None:
    said = of(lambda m, x: torch.exp(x * 100), torch.full((1, 2, 4), 2.0, dtype=dtype))
    assert first(said)["value"] == pytest.approx(math.exp(200), rel=0.02)
    says_not(said, "(bfloat16, float32)")


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: torch.atanh(x), lambda m, x: torch.logit(x), lambda m, x: torch.erfinv(x),
        lambda m, x: torch.lgamma(x - x), lambda m, x: torch.xlogy(x, x - x), lambda m, x: torch.addcdiv(x, x, x - x),
    ],
    ids=["atanh", "logit", "erfinv", "lgamma", "xlogy", "addcdiv"],
)  # fmt: skip
def test_a_pole_is_no_overflow(code: Callable[..., Any]) -> None:
    assert first(of(code, torch.ones(1, 2, 4)))["kind"] == "division-by-zero"


@pytest.mark.parametrize("level", ["operators", "modules", "layers"])
def test_a_weight_that_is_nan_is_never_called_range(level: str) -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, ids: Tensor) -> Tensor:
            return self.layers[0](self.embed(ids))

    model = Layered().requires_grad_(False)
    model.layers[0].weight[1, 1] = NAN
    said = told(model, lambda m: m(torch.tensor([[1, 2]])), level)
    assert first(said)["kind"] in (("weight",) if level == "operators" else ("weight", "unresolved"))
    assert said["cause"] != "range"
    says_not(said, "starts with", *CASTING_ADVICE)


def test_a_weight_that_half_made_infinite_is_not_called_lost_in_every_format() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    model.weight[1, 1] = 7e4
    model.half()
    said = told(model, lambda m: m(torch.ones(1, 2, 4).half()))
    assert first(said)["kind"] == "weight"
    assert "no number format helps" not in said["verdict"].replace("if not, no number format helps", "")


# What moves values


@torch.library.custom_op("truth::enlarge_", mutates_args=("x",))
def enlarge_(x: Tensor) -> None:
    x.mul_(60000)


def foreach(m: Any, x: Tensor) -> Tensor:
    y = [x * 1]
    torch._foreach_mul_(y, 60000.0)
    return y[0] - 1


def written(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    enlarge_(y)
    return y - 1


def unwritten(m: Any, x: Tensor) -> Tensor:
    keys = torch.full((4, 4), NAN).half()
    keys[:2] = x
    return x @ keys.T


BIG, ONES, ROW = torch.full((2, 4), 6e4).half(), torch.ones(2, 4).half(), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("code", "x", "kinds", "operator"),
    [
        (lambda m, x: (x * 1).index_put_((ROW,), x, accumulate=True) - 1, BIG, ("overflow",), "index_put"),
        (lambda m, x: (x * 1).scatter(0, torch.zeros(2, 4).long(), x, reduce="add") - 1, BIG, ("overflow",), "scatter"),
        (foreach, BIG, ("overflow",), "foreach_mul"),
        (written, BIG, ("overflow", "unresolved"), "enlarge"),
        (unwritten, ONES, ("constant",), "matmul"),
        (lambda m, x: torch.cat([x * 1, torch.full((1, 4), INF).half()]) - 1, ONES, ("constant",), ""),
        (lambda m, x: F.pad(x * 1, (0, 1), value=NAN) * 2, ONES, ("constant",), ""),
    ],
    ids=["index_put", "scatter", "foreach", "custom", "cache", "cat", "pad"],
)
def test_damage_that_is_moved_is_told_where_it_was_made(
    code: Callable[..., Any], x: Tensor, kinds: tuple[str, ...], operator: str
) -> None:
    said = of(code, x)
    found = first(said)
    assert found["kind"] in kinds, said["verdict"]
    assert operator in found["site"]
    says_not(said, "finite operands")


# Numbers


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (lambda m, x: 60000 - x, -6e4),
        (lambda m, x: torch.add(x, x, alpha=3), 3e4),
        (lambda m, x: torch.sub(x, x, alpha=-3), 3e4),
    ],
    ids=["less a tensor", "with a factor", "with a negative factor"],
)
def test_a_sum_that_is_printed_holds(code: Callable[..., Any], value: float) -> None:
    says(of(code, torch.full((1, 2, 4), value).half()), "120,000")  # told() checks every sum that is printed


def test_the_mean_of_large_float64_numbers_is_finite_and_nan_under_a_mask_is_masked() -> None:
    assert measure(torch.tensor([1.7e308, 1.7e308], dtype=torch.float64), ()).mean == pytest.approx(1.7e308)
    seen = measure(torch.tensor([NAN, 1.0]), (), torch.tensor([True, False]))
    assert (seen.nan, seen.masked) == (0, 1)


def test_two_healthy_runs_are_silent() -> None:
    silent(of(lambda m, x: x * m.w + 1, GIVEN))
    silent(told(decoder("llama").half(), lambda m: m(IDS)))

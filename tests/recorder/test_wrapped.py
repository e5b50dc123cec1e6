"""Models as people run them: under autocast, spread over devices, quantised, adapted, compiled, or nobody's family."""

from typing import Any

import pytest
import torch
from families import family_model
from torch import nn

from stabilitykit.errors import MisuseError
from stabilitykit.recorder import record
from stabilitykit.records import Recording

TOKENS = torch.tensor([[2, 70, 71, 72, 73, 74, 75]])


def same_bits(model: Any) -> Recording:
    with torch.inference_mode():
        bare = model(TOKENS).logits
        with record(model) as recording:
            recorded = model(TOKENS).logits
    assert torch.equal(bare, recorded)
    return recording


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_recorded_in_the_dtype_it_casts_to(dtype: torch.dtype) -> None:
    model = family_model("gemma3")
    with torch.autocast("cpu", dtype=dtype):
        recording = same_bits(model)
    name = str(dtype).removeprefix("torch.")
    assert recording.header.dtype == name
    assert recording.at("layers.0.mlp.down_proj").dtype == name
    assert recording.at("layers.0").dtype == "float32"  # the residual stream stays wide


def test_what_autocast_makes_of_a_large_weight_is_a_break_of_the_cast() -> None:
    model = family_model("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16), record(model) as recording:
        model(TOKENS)
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.site, first.broke.kind, first.broke.value) == ("layers.1.mlp.up_proj/cast.0", "overflow", 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_model_spread_by_accelerate_has_the_same_sites(family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = same_bits(family_model(family))
    spread = accelerate.dispatch_model(family_model(family), {"": "cpu"}, force_hooks=True)
    assert [r.site for r in same_bits(spread)] == [r.site for r in plain]
    offloaded = accelerate.cpu_offload(family_model(family), torch.device("cpu"))  # weights come layer by layer
    found = same_bits(offloaded)
    assert [(r.site, r.amax) for r in found] == [(r.site, r.amax) for r in plain]
    assert found.first_break() is None


@pytest.mark.filterwarnings("ignore")  # bitsandbytes', about what else it could do
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_quantised_by_bitsandbytes_compute_in_float16_and_break_there(bits: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                if bits == 4:
                    made = bitsandbytes.nn.Linear4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=torch.float16
                    )
                    made.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False)
                else:
                    made = bitsandbytes.nn.Linear8bitLt(
                        child.in_features, child.out_features, bias=False, has_fp16_weights=False
                    )
                    made.weight = bitsandbytes.nn.Int8Params(child.weight.data.float(), requires_grad=False)
                setattr(module, name, made.to("cpu"))
            else:
                quantised(child)
        return module

    model = quantised(family_model("gemma2", torch.float16))
    recording = same_bits(model)
    assert recording.first_break() is None
    assert recording.at("layers.1.mlp.down_proj").dtype == "float16"
    assert recording.at("layers.1.mlp.down_proj").label == "down projection"
    model.get_parameter("model.layers.1.post_feedforward_layernorm.weight").data.fill_(6e4)
    with torch.inference_mode(), record(model) as recording:
        model(TOKENS)
    first = recording.first_break()
    assert first is not None
    assert first.site == "layers.1.post_feedforward_layernorm"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, about transformers
def test_an_adapter_has_sites_of_its_own_and_moves_no_other() -> None:
    peft = pytest.importorskip("peft")
    plain = same_bits(family_model("gemma3"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(family_model("gemma3"), config).eval()
    recording = same_bits(model)
    sites = [r.site for r in recording]
    extra = [site for site in sites if site not in {r.site for r in plain}]
    assert {r.site for r in plain} - set(sites) == set()
    assert extra
    assert all(".q_proj" in site for site in extra)
    assert "layers.2.self_attn.q_proj.lora_B.default" in extra
    with record(model) as recording:  # generate calls the model inside the wrapper
        model.generate(
            input_ids=TOKENS,
            attention_mask=torch.ones_like(TOKENS),
            do_sample=False,
            max_new_tokens=2,
            min_new_tokens=2,
        )
    assert recording.header.starts == (0, 7)
    assert {r.step for r in recording} == {0, 1}


def test_tied_weights_are_one_weight() -> None:
    model = family_model("gemma3", torch.float16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens.weight.data[71, 3] = torch.nan
    with torch.inference_mode(), record(model) as recording:
        model(TOKENS)
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.broke.kind, first.broke.operand_sites) == ("weight", ("embed_tokens.weight",))


class Compiled(nn.Module):
    """Compiles a function of its own, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.after = torch.compile(lambda x: torch.relu(x) * 1e38 * 1e38, backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.after(self.linear(x))
        return out


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_function_compiled_inside_a_model_is_seen_operator_by_operator() -> None:
    model = Compiled()
    model(torch.ones(2, 4))
    with torch.no_grad(), record(model) as recording:
        model(torch.ones(2, 4))
    assert [r.site for r in recording] == ["linear", "/relu.0", "/mul.0", "/mul.1"]
    first = recording.first_break()
    assert first is not None
    assert first.site == "/mul.1"


def test_a_model_that_was_compiled_in_place_is_refused_in_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.compile(backend="eager")
    with pytest.raises(MisuseError, match=r"cannot see inside a compiled model\..*load it again"), record(model):
        pass


class Plain(nn.Module):
    """Nobody's family: a dictionary out, keywords in, a tuple between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, dtype=torch.float16)
        self.second = nn.Linear(8, 8, dtype=torch.float16)

    def forward(self, *, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.second(self.first(x)) * 3e4, "in": x}


def test_a_plain_module_has_sites_and_no_labels() -> None:
    torch.manual_seed(0)
    model = Plain().requires_grad_(False)
    with record(model) as recording:
        model(x=torch.full((2, 8), 1e3, dtype=torch.float16))
    assert [r.site for r in recording] == ["first", "second", "/mul.0"]
    assert {r.label for r in recording} == {None}
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.site, first.broke.kind) == ("/mul.0", "overflow")

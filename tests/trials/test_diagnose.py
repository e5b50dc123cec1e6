"""`diagnose`: what it tries and shows, and that nothing of the caller's changes."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from truth.decoders import IDS, LAST, product, residual
from truth.models import decoder

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.records.document import to_document
from stabilitykit.trials.diagnose import diagnose_run
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import copied

HALF = torch.float16


def llama_with_a_large_product() -> Any:
    """Its gate · up overflows float16 at one position, and nothing else does."""
    return product("llama").model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def keys_of(cache: Any) -> list[Tensor]:
    return [layer.keys for layer in cache.layers]


def test_what_cures_comes_first_and_says_how_far_it_is_from_float32() -> None:
    model = llama_with_a_large_product()
    found = sk.diagnose(model, input_ids=IDS)
    assert not found.finite
    assert found.trials[0].cured
    assert [one.cured for one in found.trials] == sorted((one.cured for one in found.trials), reverse=True)
    with torch.inference_mode():
        expected = model.float()(IDS).logits
        wide = copy.deepcopy(model)
        mlp = wide.model.layers[1].mlp
        mlp.up_proj.weight.data /= 4
        mlp.down_proj.weight.data *= 4
        by_hand = wide.half()(IDS).logits.float()
    best = found["up and down factors"]
    assert best.cured
    assert best.distance is not None
    far = (by_hand - expected).abs().amax() / expected.abs().max()
    assert best.distance.error_max == pytest.approx(float(far), rel=1e-4)
    p, q = expected.double().log_softmax(-1), by_hand.double().log_softmax(-1)
    assert best.distance.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_change_that_does_not_cure_is_said_not_to() -> None:
    found = sk.diagnose(llama_with_a_large_product(), input_ids=IDS)
    failed = [one for one in found.trials if not one.cured]
    for one in failed:
        assert one.then or (one.distance is not None and one.distance.error_max), one
    assert not any(one.name in found.advice.partition("without success")[0] for one in failed)


def test_which_dtype_is_finite_is_tried_too() -> None:
    found = sk.diagnose(llama_with_a_large_product(), input_ids=IDS)
    assert found["float32"].cured
    assert found["bfloat16"].cured
    assert "It is the format" in found.advice


def test_a_finite_run_is_said_to_be_finite_and_nothing_is_tried() -> None:
    found = sk.diagnose(decoder("llama").half(), input_ids=IDS)
    assert found.finite
    assert {one.name for one in found.trials} == {"bfloat16", "float32"}
    assert "finite throughout" in found.verdict


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_model_random_numbers_and_cache_stay_as_they_are(dtype: torch.dtype) -> None:
    model = llama_with_a_large_product().to(dtype)
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    keys = [cached.clone() for cached in keys_of(cache)]
    before, hooks = state(model), [len(one._forward_hooks) for one in model.modules()]
    draws = torch.get_rng_state()
    sk.diagnose(model, input_ids=IDS, past_key_values=cache, dtype="float16")
    assert torch.equal(torch.get_rng_state(), draws)
    assert [len(one._forward_hooks) for one in model.modules()] == hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(map(torch.equal, keys_of(cache), keys))
    assert len(keys_of(cache)) == len(keys)


def test_buffers_that_a_forward_pass_writes_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half().train()
    before = state(model)
    sk.diagnose(model, torch.full((3, 4), 300.0, dtype=HALF))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_generate_is_diagnosed_as_it_is_called() -> None:
    model = residual("gemma", position=LAST).model
    draws = torch.get_rng_state()
    found = sk.diagnose(model.generate, IDS, max_new_tokens=3, do_sample=True)
    assert torch.equal(torch.get_rng_state(), draws)
    assert "sampling raises" in found.verdict or "probability tensor" in str(found.findings["error"])
    assert found["rescale"].cured
    drawn = found["rescale"].distance, found["float32"].distance
    assert [one and one.rows for one in drawn] == [3, 3]  # a call for each token, none cut off by another draw


def test_with_a_reference_the_original_weights_are_what_it_is_compared_with() -> None:
    original = llama_with_a_large_product().float()
    original.model.layers[0].mlp.up_proj.weight.data *= 1.0 + 2.0**-13  # what float16 rounds away
    low = copy.deepcopy(original).half()
    alone, beside = sk.diagnose(low, input_ids=IDS), sk.diagnose(low, input_ids=IDS, reference=original)
    assert any("already" in note for note in alone.notes)
    assert not any("already" in note for note in beside.notes)
    assert alone.plain is not None
    assert beside.plain is not None
    assert alone.plain.error_mean != beside.plain.error_mean


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_a_merged_model_is_compared_with_the_adapter_that_it_was_merged_from() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"])
    adapted: Any = peft.get_peft_model(decoder("llama"), config).eval()
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        weight.data.zero_()
    layer.lora_A["default"].weight.data[0, 9], layer.lora_B["default"].weight.data[7, 0] = 300.0, 70000.0 / 300.0
    merged = copy.deepcopy(adapted).merge_and_unload().half()
    found = sk.diagnose(merged, input_ids=IDS, reference=adapted)
    assert "up_proj.weight[7, 9] is 70,0" in found.verdict
    assert found["float32"].cured


def test_the_document_is_plain_json_values() -> None:
    document = to_document(sk.diagnose(llama_with_a_large_product(), input_ids=IDS))
    assert document["trials"][0]["cured"] is True


class Fixed(nn.Module):
    """Casts to float16 itself, whatever its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.half() * 300) / 600


def test_code_that_fixes_float16_itself_is_run_wider_all_the_same() -> None:
    found = diagnose_run(Fixed(), lambda model: model(torch.full((1, 2, 4), 300.0)), dtype="float16")
    assert not found.finite
    assert found["float32"].cured
    assert any("asks for narrower formats" in note for note in found.notes)


@pytest.mark.parametrize("name", ["gemma", "gemma3", "llama", "qwen3moe", "gpt2"])
def test_recast_runs_a_float16_model_as_its_float32_copy_does(name: str) -> None:
    """Weights that were rounded to float16, computed in float32, bit for bit."""
    model = decoder(name).half()
    with torch.inference_mode():
        expected = copy.deepcopy(model).float()(IDS).logits
        with Recast(torch.float32) as recast:
            found = model(IDS).logits
    assert recast.changed
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_copy_in_float16_keeps_the_rotary_frequencies_of_transformers_in_float32() -> None:
    """As `from_pretrained(dtype=torch.float16)` does, and `.half()` does not."""
    model = decoder("llama")
    made: Any = copied(model, "float16")
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert {one.dtype for one in made.parameters()} == {HALF}


def test_a_plain_module_is_diagnosed_where_transformers_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import torch, stabilitykit as sk\n"
        "linear = torch.nn.Linear(4, 4, dtype=torch.float16); linear.weight.data.fill_(30000.0)\n"
        "print(sk.diagnose(linear, torch.ones(1, 4, dtype=torch.float16)).finite)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Hidden(nn.Module):
    """Adds a number to scores that float32 holds, float16 does not, and no power of two can change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.register_buffer("far", torch.tensor([-1e30]))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        scores = self.inner(x) @ x.mT
        return torch.softmax(scores + hidden.to(x.dtype) * self.far, -1) @ x


def test_where_no_scaling_can_be_found_that_is_said_and_the_rest_is_tried() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    found = sk.diagnose(Hidden(), x, torch.tensor([[0, 1], [0, 0]]))
    assert not found.finite  # 0 times minus infinity
    assert "No exact scaling" in found.left_out["rescale"]
    assert found["float32"].cured


def test_misuse_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"expects a torch\.nn\.Module or a method of one"):
        sk.diagnose(lambda x: x, 1)
    with pytest.raises(MisuseError, match="float17"):
        sk.diagnose(nn.Linear(1, 1), torch.ones(1, 1), dtype="float17")
    model = nn.Linear(2, 2)
    model.extra = model.weight * 2
    with pytest.raises(MisuseError, match="cannot be copied"):
        sk.diagnose(model, torch.ones(1, 2))


class Code(nn.Module):
    """A few lines without a weight."""

    epsilon: float

    def __init__(self, lines: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lines = lines

    def forward(self, x: Tensor) -> Tensor:
        return self.lines(x)


@pytest.mark.parametrize("given", [torch.float32, HALF])
def test_a_model_without_weights_runs_in_the_dtype_that_is_asked_for(given: torch.dtype) -> None:
    x = torch.tensor([[300.0, 2.0], [1.0, 3.0]], dtype=given)
    found = sk.diagnose(Code(lambda x: x * x / 4), x, dtype="float16" if given != HALF else None)
    assert (found.dtype, found.finite) == ("float16", False)
    assert "300 · 300 = 90,000" in found.verdict
    assert found["float32"].cured
    assert found["float32 operator"].cured
    assert found.left_out["rescale"] == "The model has no weights to scale."
    assert not any("already" in note for note in found.notes)


def test_a_model_whose_weights_are_still_to_be_made_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"0\.weight of Sequential has no numbers yet.*Run the model once"):
        sk.diagnose(nn.Sequential(nn.LazyLinear(2)), torch.ones(1, 3))


def test_the_larger_eps_that_only_the_code_holds_is_not_set_on_modules() -> None:
    in_code = sk.diagnose(Code(lambda x: x / (x.std(-1, keepdim=True) + 1e-8)), torch.zeros(1, 2, 4, dtype=HALF))
    assert in_code["larger eps"].command.startswith("# in the model's code: 6.1e-05")
    norm = Code(lambda x: x)
    norm.epsilon = 1e-8
    norm.lines = lambda x: x / (x.std(-1, keepdim=True) + norm.epsilon)
    x = torch.zeros(1, 2, 4, dtype=HALF)
    exec(sk.diagnose(norm, x)["larger eps"].command, {"model": norm})  # as it is to be pasted
    assert norm(x).isfinite().all()


def test_diagnose_does_not_send_to_itself() -> None:
    found = sk.diagnose(Code(lambda x: (x * 1000).exp()), torch.full((1, 2, 4), 2.0))  # past float64, too
    assert "A candidate, not tried" in found.verdict
    assert "sk.diagnose" not in found.verdict


def test_the_value_in_float32_is_that_of_the_call_that_broke() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.copy_(torch.eye(2) * 300)

    def twice(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        model(torch.ones(1, 3, 2, dtype=dtype))
        out: Tensor = model(torch.full((1, 3, 2), 400.0, dtype=dtype))
        return out

    assert "The float32 run has 120,000 there." in diagnose_run(model, twice).verdict


def test_a_call_that_raises_before_anything_is_computed_is_misuse() -> None:
    with pytest.raises(MisuseError, match=r"before anything is computed.* unexpected keyword argument 'inputs'"):
        sk.diagnose(torch.nn.Linear(4, 4), inputs=torch.ones(1, 4))

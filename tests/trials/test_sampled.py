"""Settings of sampling that fail in any dtype: which one it is, is found by leaving each out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from truth.decoders import IDS
from truth.models import VOCABULARY, decoder

import stabilitykit as sk
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.records.trials import Diagnosis
from stabilitykit.trials.diagnose import diagnose_run

pytestmark = pytest.mark.filterwarnings("ignore")
SUPPRESS = "without SuppressTokensLogitsProcessor"


def generated(sample: bool = True, **how: Any) -> Diagnosis:
    model: Any = copy.deepcopy(decoder("llama")).half()
    torch.manual_seed(0)
    found = sk.diagnose(
        model.generate, IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=sample, **how
    )
    assert not set(vars(model)) & {"generate", "_get_logits_processor"}
    return found


def cures(found: Diagnosis) -> set[str]:
    return {one.name for one in found.cures}


@pytest.mark.parametrize("sample", [True, False])
def test_the_processor_that_leaves_no_token_is_found(sample: bool) -> None:
    """Greedy decoding raises nothing and takes token 0, and is not said to be well."""
    found = generated(sample, suppress_tokens=list(range(VOCABULARY)), min_p=0.1)
    assert not found.finite
    assert cures(found) == {SUPPRESS}
    assert "greedy" not in cures(found)
    assert "suppress_tokens=None" in found[SUPPRESS].command
    if sample:
        assert not found["top-k off"].cured
        assert not found["without MinPLogitsWarper"].cured


class Broken(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.log(scores - 1000)


def test_a_processor_of_the_users_own_is_left_out_by_its_name() -> None:
    found = generated(logits_processor=LogitsProcessorList([Broken()]))
    assert cures(found) == {"without Broken"}


def test_a_temperature_of_a_generation_config() -> None:
    """Which no dtype but float64 divides by; greedy decoding does without."""
    model: Any = copy.deepcopy(decoder("llama")).half()
    model.generation_config.temperature = 1e-40
    model.generation_config.do_sample = True
    found = sk.diagnose(model.generate, IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    assert {"greedy", "without TemperatureLogitsWarper"} <= cures(found)
    assert "temperature in float32" not in {one.name for one in found.trials}  # transformers divides in it already
    assert model.generation_config.temperature == 1e-40


def gemma() -> Any:
    name = "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&vocabulary=512"
    return sk.build(random_checkpoint(name), dtype="float16")


def sampler(**how: Any) -> Diagnosis:
    def run(model: Any) -> Tensor:
        torch.manual_seed(0)
        drawn: Tensor = model.sampler(model(IDS)[:, -1], **how)
        return drawn

    return diagnose_run(gemma(), run)


def test_settings_of_the_kits_own_sampler() -> None:
    assert cures(sampler(top_k=0)) == {"greedy", "top-k off"}
    assert cures(sampler(top_p=-1.0)) == {"greedy", "top-p off"}


def test_a_tiny_temperature_overflows_float16_and_not_float32() -> None:
    found = sampler(temperature=1e-6)
    assert {"greedy", "temperature in float32", "float32", "bfloat16"} <= cures(found)
    assert not {"top-k off", "top-p off"} & cures(found)


def test_nothing_is_left_out_where_the_logits_are_lost() -> None:
    model: Any = copy.deepcopy(decoder("llama")).half()
    model.lm_head.weight.data[3, 3] = torch.nan
    found = sk.diagnose(model.generate, IDS, max_new_tokens=2, do_sample=True)
    assert not [one.name for one in found.trials if one.name.startswith(("greedy", "top", "without"))]

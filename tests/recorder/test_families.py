"""Models of transformers', recorded unchanged: every family, both kinds of attention, the same bits."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, family_model

from stabilitykit.recorder import record
from stabilitykit.records import Recording

TOKENS = torch.tensor([[2, 70, 71, 72, 73, 74, 75]])


@dataclass(frozen=True)
class Sites:
    """How many sites there are outside the layers and in each layer, in float32 and in float16.

    In float16 the norms and the softmax round back to it, and each rounding is a site.
    """

    float32: tuple[int, list[int]]
    float16: tuple[int, list[int]]


EAGER = {
    "gemma": Sites((12, [38] * 2), (13, [41] * 2)),
    "gemma2": Sites((15, [55] * 2), (16, [60] * 2)),
    "gemma3": Sites((14, [66] * 6), (15, [73] * 6)),
    # sparse activations in the first five layers; keys and values of others in the last five
    "gemma3n": Sites((77, [121] * 5 + [115] * 5 + [98] * 5), (79, [135] * 5 + [129] * 5 + [110] * 5)),
    "gemma4": Sites((25, [77] * 6), (27, [86] * 6)),
    "llama": Sites((10, [36] * 2), (11, [39] * 2)),
    "mistral": Sites((10, [36] * 2), (11, [39] * 2)),
    "qwen2": Sites((10, [36] * 2), (11, [39] * 2)),
    "qwen3": Sites((10, [48] * 2), (11, [53] * 2)),
}
FUSED = (
    4  # scores, scaled, masked and softmax become one kernel, which leaves its output: rounding once less in float16
)
NO_SDPA = {"gemma2"}  # transformers refuses: the kernel has no soft-cap


def counted(recording: Recording) -> tuple[int, list[int]]:
    by_layer = Counter(record.layer for record in recording)
    outside = by_layer.pop(None)
    return outside, [by_layer[layer] for layer in sorted(by_layer, key=lambda layer: layer or 0)]


@pytest.mark.table
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_recorded_and_no_bit_changes(
    family: str, attention: str, dtype: torch.dtype, mode: type[torch.no_grad]
) -> None:
    if attention == "sdpa" and family in NO_SDPA:
        with pytest.raises(ValueError, match="does not support"):
            family_model(family, dtype, attention)
        return
    model = family_model(family, dtype, attention)
    with mode():
        bare = model(TOKENS).logits
        with record(model) as recording:
            recorded = model(TOKENS).logits
    assert torch.equal(bare, recorded)
    expected = getattr(EAGER[family], str(dtype).removeprefix("torch."))
    fewer = 0 if attention == "eager" else FUSED + (dtype == torch.float16)
    assert counted(recording) == (expected[0], [count - fewer for count in expected[1]])
    assert recording.first_break() is None
    assert sum(r.softmax is not None for r in recording) == len(model.model.layers)


@pytest.mark.table
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_residual_sums_and_its_output_named(family: str) -> None:
    model = family_model(family)
    with torch.inference_mode(), record(model) as recording:
        model(TOKENS)
    labels = {r.label for r in recording if r.layer == 0}
    last = recording.at("layers.0").label
    assert "residual after attention" in labels
    assert "residual after MLP" in labels
    assert last == {"gemma3n": "AltUp streams after the layer", "gemma4": "residual after the layer, scaled"}.get(
        family, "residual after MLP"
    )
    scaled = family.startswith("gemma")
    assert recording.at("embed_tokens").label == ("embedding, scaled" if scaled else "embedding")
    assert {"norm before attention", "query projection", "attention probabilities"} <= labels


def test_a_family_that_nobody_has_named_has_no_labels() -> None:
    model = family_model("llama")
    model.config.model_type = "something-else"
    with torch.inference_mode(), record(model) as recording:
        model(TOKENS)
    assert {r.label for r in recording} == {None}
    assert recording.at("layers.1").layer == 1


def test_a_gemma_4_with_experts_has_no_labels_because_its_operators_are_others() -> None:
    model = family_model("gemma4")
    model.config.enable_moe_block = True
    with torch.inference_mode(), record(model) as recording:
        model(TOKENS)
    assert {r.label for r in recording} == {None}


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_at_the_level_of_layers_each_layer_is_one_record(family: str) -> None:
    model = family_model(family)
    with torch.inference_mode(), record(model, level="layers") as recording:
        model(TOKENS)
    layers = [r.site for r in recording if r.layer is not None]
    assert layers == [f"layers.{index}" for index in range(len(model.model.layers))]

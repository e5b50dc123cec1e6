"""A scan against the recorder: the same peaks of the same prompts, one by one and with everything recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import BOS, dangerous
from remedied import SPECS, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.recorder import record
from stabilitykit.run.dry_run import find_stored_dtypes
from stabilitykit.searches.confirm import PromptRecorder
from stabilitykit.searches.scan import Scanner

CONTEXTS = {"alone": [], "after <bos>": [BOS], "inside a text": [270, 280, 290, 300, 310, 320]}  # past the window of 4
TOKENS = [BOS, 5, 263, 300, 356, 511]


def is_of_body(site: str) -> bool:
    return site.startswith(("layers.", "embed_tokens", "norm"))


def recorded(model: Gemma, context: Sequence[int], token: int) -> tuple[float, str]:
    """The largest value at the position of `token`, and its site, of the body alone, recorded in a step of its own."""
    cache = KVCache(model.config, batch=1, length=len(context) + 1, dtype=model.dtype)
    with torch.inference_mode(), record(model, formats=()) as recording:
        if context:
            model(torch.tensor([context]), cache=cache)
        model(torch.tensor([[token]]), cache=cache)
    told = find_stored_dtypes(recording, GemmaSubject(model), 1, 1)
    return max(
        (made.amax or 0.0, made.site)
        for made in told
        if made.stored_dtype == "float16" and made.step == (1 if context else 0) and is_of_body(made.site)
    )


@pytest.mark.table
@pytest.mark.parametrize("rounding", ["transformers", "gemma_pytorch"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("generation", SPECS)
def test_peaks_are_those_that_a_recorder_sees(generation: int, context: str, rounding: str) -> None:
    model = build(small(generation), rounding=rounding)  # type: ignore[arg-type]
    found = Scanner(model).scan(TOKENS, CONTEXTS[context])
    expected = [recorded(model, CONTEXTS[context], token) for token in TOKENS]
    assert [peak.value for peak in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [peak.place.site for peak in found] == [site for _, site in expected]


@pytest.mark.parametrize("part", ["queries", "values"])
def test_peaks_inside_attention_count(part: str) -> None:
    """Peaks inside attention, where the batch's heads are one axis with it."""
    opened = small(1)
    name = {"queries": "q_proj", "values": "v_proj"}[part]
    tensors = dict(opened.tensors)
    for layer in range(opened.config.layers):
        tensors[f"layers.{layer}.self_attn.{name}.weight"] = tensors[f"layers.{layer}.self_attn.{name}.weight"] * 512
    model = build(replace(opened, tensors=tensors))
    found = Scanner(model).scan(TOKENS, [270, 280])
    expected = [recorded(model, [270, 280], token) for token in TOKENS]
    assert [peak.value for peak in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert any("self_attn" in peak.place.site for peak in found)


class Scores(TorchDispatchMode):
    """Of every product of as many rows as columns as the prompt has tokens, those with the last token's key."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.bmm.default, torch.ops.aten.matmul.default)
        if func in products and output.shape[-2:] == (self.length, self.length):
            self.largest = max(self.largest, output[..., -1].abs().max().item())
        return output


@pytest.mark.parametrize("generation", SPECS)
def test_the_recorder_of_a_whole_prompt_sees_the_same_and_the_scores_of_earlier_queries(generation: int) -> None:
    model = build(small(generation))
    recorder = PromptRecorder(model)
    found = Scanner(model).scan(TOKENS, CONTEXTS["inside a text"])
    prompts = [[*CONTEXTS["inside a text"], token] for token in TOKENS]
    whole = [peaks[-1] for peaks in recorder.peaks_of(prompts)]
    assert recorder.peaks(prompts[3])[-1].value == pytest.approx(whole[3].value, rel=1e-5)
    same = 0
    for one, other, prompt in zip(found, whole, prompts, strict=True):
        with torch.inference_mode(), Scores(len(prompt)) as scores:
            logits: Tensor = model(torch.tensor([prompt]))
        largest = max(one.value, scores.largest, logits[0, -1].abs().max().item())
        assert other.value == pytest.approx(largest, rel=1e-5)
        same += one.value == pytest.approx(other.value, rel=1e-5)
    assert 0 < same < len(TOKENS)  # both kinds are there


def test_peaks_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    scanner = Scanner(build(small(3)))
    whole = scanner.scan(range(64), [BOS, 270])
    monkeypatch.setattr(scanner, "_rows", 5)
    counted = []
    parts = scanner.scan(range(64), [BOS, 270], lambda done, total: counted.append((done, total)))
    assert [peak.value for peak in parts] == pytest.approx([peak.value for peak in whole], rel=1e-5)
    assert counted[0] == (5, 64)
    assert counted[-1] == (64, 64)


def test_a_scan_leaves_the_model_as_it_was() -> None:
    model = build(small(2))
    tokens = torch.tensor([[BOS, 270, 280]])
    with torch.inference_mode():
        before = model(tokens)
        Scanner(model).scan(range(10), [BOS])
        assert torch.equal(model(tokens), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_not_finite_counts_as_infinite() -> None:
    opened = dangerous(1, 300, float("inf"))
    found = Scanner(build(opened)).scan([299, 300])
    assert found[0].value < 100
    assert found[1].value == float("inf")
    assert PromptRecorder(build(opened)).peaks([300])[0].value == float("inf")


def test_a_16_bit_model_is_scanned_alike() -> None:
    """Up to one unit in the last place: a batch may sum in another order than a token by itself."""
    model = build(random_checkpoint(SPECS[3]), dtype="bfloat16")
    found = Scanner(model).scan(range(256), [BOS])[::16]
    expected = [recorded(model, [BOS], token) for token in range(0, 256, 16)]
    assert [peak.value for peak in found] == pytest.approx([value for value, _ in expected], rel=2.0**-7)
    assert [peak.place.site for peak in found] == [site for _, site in expected]

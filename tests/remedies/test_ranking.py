"""Scores against numbers made by hand in float64, and the order they come in."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from remedied import breaking, looked, rescaling, samples, small
from torch import nn

from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.matmul import matmul
from stabilitykit.records.scaling import UNCHANGED, Scaling
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.bfloat16 import BFLOAT16
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.original import GemmaOriginal
from stabilitykit.remedies.ranking import rank
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.repair import PLAIN


def windows(count: int = 3, length: int = 70) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[2, *torch.randint(4, 360, (length - 1,), generator=generator).tolist()] for _ in range(count)]


def test_scores_are_those_of_float64() -> None:
    opened, texts = small(3), windows()
    (score,), left_out = rank(GemmaOriginal(opened), [PLAIN], samples(held_out=texts).held_out)
    assert not left_out
    kl, same, surprise = [], [], []
    with torch.inference_mode():
        for window in texts:
            ids = torch.tensor([window])
            theirs = build(opened)(ids)[0].double().log_softmax(-1)
            with matmul("float32-accumulate"):
                ours = build(opened, dtype="float16")(ids)[0].double().log_softmax(-1)
            kl.append((theirs.exp() * (theirs - ours)).sum(-1))
            same.append(theirs.argmax(-1) == ours.argmax(-1))
            following = ids[0, 1:, None]
            surprise.append(theirs[:-1].gather(1, following) - ours[:-1].gather(1, following))
    every = torch.cat(kl)
    assert score.finite
    assert score.positions == every.numel() == 210
    assert score.kl_mean == pytest.approx(float(every.mean()), rel=1e-4)
    assert score.kl_max == pytest.approx(float(every.max()), rel=1e-4)
    assert score.kl_p99 == pytest.approx(float(every.quantile(0.99)), rel=1e-4)
    assert score.top1 == float(torch.cat(same).double().mean())
    assert score.perplexity == pytest.approx(math.expm1(float(torch.cat(surprise).mean())), abs=1e-9)
    blocks = torch.stack([part.mean() for part in every.split(64)])
    assert score.kl_interval == pytest.approx(1.96 * float(blocks.std()) / 2, rel=1e-4)
    assert score.weights == sum(weight.nbytes for weight in build(opened, dtype="float16").parameters())
    assert score.headroom is not None
    assert 0 < score.headroom < 30


def test_the_best_comes_first_and_what_is_not_finite_last() -> None:
    broken = small(3, breaking(3))
    offers = [offer(looked(broken)) for offer in REMEDIES]
    scaling = rescaling(broken, 1 / breaking(3))
    remedies = [PLAIN, *(one for one in offers if isinstance(one, Remedy)), scaling]
    assert len(remedies) == 6
    scores, _ = rank(GemmaOriginal(broken), remedies, samples(held_out=windows()).held_out)
    assert [score.finite for score in scores] == sorted((score.finite for score in scores), reverse=True)
    (plain,) = [score for score in scores if score.name == "float16"]
    assert (plain.finite, plain.headroom) == (False, None)
    finite = [score.kl_mean or 0.0 for score in scores if score.finite]
    assert finite == sorted(finite)
    by_name = {score.name: score for score in scores}
    assert by_name["scaling"].kl_mean < by_name["bfloat16"].kl_mean / 10


def test_models_of_the_same_weights_are_opened_once_and_scored_alike() -> None:
    opened: list[tuple[str, Scaling]] = []

    class Counting(GemmaOriginal):
        def open(self, dtype: str = "float32", scaling: Scaling = UNCHANGED) -> GemmaSubject:
            opened.append((dtype, scaling))
            return super().open(dtype, scaling)

    again = replace(PLAIN, name="again")
    remedies = [PLAIN, again, BFLOAT16, FLOAT32_RESIDUAL]
    scores, _ = rank(Counting(small(3)), remedies, samples(held_out=windows(1)).held_out)
    assert [dtype for dtype, _ in opened] == ["float16", "bfloat16", "float32"]
    by_name = {score.name: score for score in scores}
    assert by_name["again"].kl_mean == by_name["float16"].kl_mean
    assert by_name["float32 residual"].kl_mean != by_name["float16"].kl_mean


def test_a_remedy_that_a_model_cannot_be_run_with_is_left_out() -> None:
    @contextmanager
    def around(model: Any) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.layers[0].mlp.up_proj, "weight", nn.Parameter(torch.zeros(1, 1)))
            yield

    breaks = Remedy(name="breaks", summary="", around=around, exportable=False)
    scores, left_out = rank(GemmaOriginal(small(3)), [PLAIN, breaks], samples(held_out=windows(1)).held_out)
    assert [score.name for score in scores] == ["float16"]
    (one,) = left_out
    assert one.name == "breaks"
    assert one.why.startswith("The model does not run with it: ")
    with pytest.raises(RuntimeError):
        rank(GemmaOriginal(small(3)), [replace(breaks, exportable=True)], samples(held_out=windows(1)).held_out)


def test_what_returns_no_logits_is_ranked_by_its_largest_error() -> None:
    """A vision encoder: errors by hand, in float64."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    module = transformers.ViTModel(config).eval()
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    made = {"float32": module, "float16": copy.deepcopy(module).half(), "bfloat16": copy.deepcopy(module).bfloat16()}

    class Vision:
        source, sha256, notes, trust_remote_code = "hf:vit", "", (), False
        settings: Mapping[str, Any] = {}

        def open(self, dtype: str = "float32", scaling: Scaling = UNCHANGED) -> Any:
            return SimpleNamespace(module=made[dtype], device=torch.device("cpu"))

        def weights(self, subject: Any) -> Any:
            return ()

    scores, _ = rank(Vision(), [PLAIN, BFLOAT16], [pixels])
    assert [score.name for score in scores] == ["float16", "bfloat16"]
    with torch.inference_mode(), matmul("float32-accumulate"):
        theirs = module(**pixels).last_hidden_state.double()
        for score in scores:
            given = {"pixel_values": pixels["pixel_values"].to(getattr(torch, score.dtype))}
            ours = made[score.dtype](**given).last_hidden_state.double()
            assert score.error == pytest.approx(float((ours - theirs).abs().max() / theirs.abs().max()), rel=1e-3)
    assert [(score.finite, score.positions, score.kl_mean, score.perplexity) for score in scores] == [
        (True, 17, None, None)
    ] * 2

"""Scores against numbers made by hand in float64, and the order they come in."""

import math
from dataclasses import replace

import pytest
import torch
from remedied import breaking, small

from stabilitykit.models.gemma import build
from stabilitykit.models.matmul import matmul
from stabilitykit.remedies import REMEDIES, ranking
from stabilitykit.remedies.bfloat16 import BFLOAT16
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.ranking import rank
from stabilitykit.remedies.repair import PLAIN, repair
from stabilitykit.remedies.rescale import rescale, rescaling
from stabilitykit.run.windows import Texts


def windows(count: int = 3, length: int = 70) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[2, *torch.randint(4, 360, (length - 1,), generator=generator).tolist()] for _ in range(count)]


def test_scores_are_those_of_float64() -> None:
    opened, texts = small(3), windows()
    (score,) = rank(opened, [PLAIN], texts)
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
    assert score.kl_mean == pytest.approx(float(every.mean()), rel=1e-6)
    assert score.kl_max == pytest.approx(float(every.max()), rel=1e-6)
    assert score.kl_p99 == pytest.approx(float(every.quantile(0.99)), rel=1e-6)
    assert score.top1 == float(torch.cat(same).double().mean())
    assert score.perplexity == pytest.approx(math.expm1(float(torch.cat(surprise).mean())), abs=1e-9)
    blocks = torch.stack([part.mean() for part in every.split(64)])
    assert score.kl_interval == pytest.approx(1.96 * float(blocks.std()) / 2, rel=1e-6)
    assert score.weights == sum(weight.nbytes for weight in build(opened, dtype="float16").parameters())
    assert score.headroom is not None
    assert 0 < score.headroom < 30


def test_the_best_comes_first_and_what_is_not_finite_last() -> None:
    gamma = breaking(3)
    rescale = rescaling(1 / gamma)
    scores = rank(small(3, gamma), [PLAIN, *REMEDIES, rescale], windows())
    assert [score.finite for score in scores] == sorted((score.finite for score in scores), reverse=True)
    (plain,) = [score for score in scores if score.name == "float16"]
    assert (plain.finite, plain.headroom) == (False, None)
    finite = [score.kl_mean or 0.0 for score in scores if score.finite]
    assert finite == sorted(finite)
    by_name = {score.name: score for score in scores}
    assert by_name[rescale.name].kl_mean < by_name["bfloat16"].kl_mean / 10


def test_models_of_the_same_weights_are_built_once_and_scored_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(ranking, "build", lambda *a, **k: built.append(k.get("dtype")) or build(*a, **k))  # type: ignore[func-returns-value]
    again = replace(PLAIN, name="again")
    scores = rank(small(3), [PLAIN, again, BFLOAT16, FLOAT32_RESIDUAL], windows(1))
    assert built == [None, "float16", "bfloat16"]
    by_name = {score.name: score for score in scores}
    assert by_name["again"].kl_mean == by_name["float16"].kl_mean
    assert by_name["float32 residual"].kl_mean != by_name["float16"].kl_mean


def test_a_repair_is_chosen_by_the_peaks_of_the_choosing_texts() -> None:
    texts = Texts(choosing=(tuple(windows()[0]),), held_out=tuple(map(tuple, windows(2))))
    found = repair(small(3, 2.0**13), texts, margin=2.0).ranking
    assert 65504 / 8 < found.peak * found.gamma <= 65504 / 4
    assert found.repaired.name == f"rescale 2^{round(math.log2(found.gamma))}"
    assert found.repaired.finite
    assert found[found.carried].kl_mean < found["bfloat16"].kl_mean
    assert found[f"{found.carried} + float32 residual"].finite
    unchanged = repair(small(3), texts).ranking
    assert (unchanged.gamma, unchanged.carried) == (1.0, "float16")
    assert unchanged.before == unchanged.after


def test_what_float16_cannot_hold_is_named_and_losses_are_counted() -> None:
    texts = Texts(choosing=(tuple(windows()[0]),), held_out=tuple(map(tuple, windows(1))))
    opened = small(3, breaking(3))
    found = repair(opened, texts, margin=11.0).ranking
    assert found.after != found.before
    assert found.islands
    assert {"layers.2", "layers.2/add.0"} <= set(found.islands)
    assert found["float32 islands"].finite
    weights = torch.cat([tensor.flatten() for tensor in rescale(opened, found.gamma).checkpoint.tensors.values()])
    half = weights.half().abs()
    assert found.after.subnormal == int(((half > 0) & (half < 2.0**-14)).sum())
    assert found.after.zero == int(((half == 0) & (weights != 0)).sum())

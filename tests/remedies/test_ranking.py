"""Scores against numbers made by hand in float64, and the order they come in."""

import math

import pytest
import torch
from remedied import breaking, small

from stabilitykit.gemma import build
from stabilitykit.products import matmul
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.ranking import rank
from stabilitykit.remedies.repair import PLAIN, repair
from stabilitykit.remedies.rescale import rescaling
from stabilitykit.remedies.texts import Texts


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
    stress = breaking(3)
    rescale = rescaling(1 / stress)
    scores = rank(small(3, stress), [PLAIN, *REMEDIES, rescale], windows())
    assert [score.finite for score in scores] == sorted((score.finite for score in scores), reverse=True)
    (plain,) = [score for score in scores if score.name == "float16"]
    assert (plain.finite, plain.headroom) == (False, None)
    finite = [score.kl_mean for score in scores if score.finite]
    assert finite == sorted(finite)
    by_name = {score.name: score for score in scores}
    assert by_name[rescale.name].kl_mean < by_name["bfloat16"].kl_mean / 10


def test_a_repair_is_chosen_by_the_peaks_of_the_choosing_texts() -> None:
    texts = Texts(choosing=(tuple(windows()[0]),), held_out=tuple(map(tuple, windows(2))))
    found = repair(small(3, 2.0**10), texts, margin=2.0)
    assert 65504 / 8 < found.peak * found.rescaled.gamma <= 65504 / 4
    assert found.score.name == f"rescale 2^{round(math.log2(found.rescaled.gamma))}"
    assert found.score.finite
    assert repair(small(3), texts).rescaled.gamma == 1.0  # nothing to repair

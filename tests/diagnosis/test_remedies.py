"""What is said of a ranking: which is best, which a folder carries, and why."""

from scored import ranking, score

from stabilitykit.diagnosis.remedies import how_rescaled, outlier, recommendation
from stabilitykit.records.remedies import Small


def test_the_best_and_what_a_folder_carries() -> None:
    assert recommendation(ranking()) == (
        "Closest to float32 is float32 residual, 100 times as close as bfloat16; it needs code around the model, which "
        "no folder carries. What a folder carries is rescale 2^-2, 50 times as close as bfloat16."
    )
    alone = ranking(score("rescale 2^-2", 2e-3), score("bfloat16", 1e-2, dtype="bfloat16"))
    assert recommendation(alone) == "Closest to float32 is rescale 2^-2, 5.0 times as close as bfloat16."
    worse = ranking(score("bfloat16", 1e-3, dtype="bfloat16"), score("rescale 2^-2", 4e-3))
    assert recommendation(worse) == (
        "Closest to float32 is bfloat16. What a folder carries is rescale 2^-2, with 4.0 times bfloat16's mean KL."
    )


def test_nothing_to_change_and_nothing_that_helps() -> None:
    fine = ranking(score("float16", 1e-5), gamma=1.0, carried="float16")
    assert recommendation(fine) == (
        "Nothing has to be changed: all values that were seen fit in float16 with 1.5 bits of headroom."
    )
    assert how_rescaled(fine) is None
    assert recommendation(ranking(score("rescale 2^-2", None))) == "No remedy keeps the held-out texts finite."
    lost = ranking(score("bfloat16", 1e-3, dtype="bfloat16"), score("rescale 2^-2", None))
    assert recommendation(lost) == (
        "Closest to float32 is bfloat16. Rescale 2^-2 is not finite on the held-out texts, so there is nothing to "
        "export."
    )


def test_how_it_was_rescaled() -> None:
    assert how_rescaled(ranking()) == (
        "Rescaled by 0.25, the largest value that float16 must store, 100,000 in layers.1, becomes 25,000. Nothing is "
        "rounded in float32, where logits keep every bit. In float16 15 more weights are subnormal, 25 in all, and 2 "
        "more become zero."
    )
    same = ranking(after=Small(subnormal=10, zero=1), gains_rounded={"norm.weight": 1})
    assert how_rescaled(same) == (
        "Rescaled by 0.25, the largest value that float16 must store, 100,000 in layers.1, becomes 25,000. Of the "
        "norms, 1 gain had to be rounded in float32."
    )


def test_a_single_token_in_a_mean() -> None:
    assert outlier(score("rescale", 2e-5, kl_max=5e-3)) == (
        "Of rescale's mean KL one token among 1,000 makes up 25%: there it is 0.005."
    )
    assert outlier(score("rescale", 2e-5, kl_max=1e-3)) is None
    assert outlier(score("float16", None)) is None

"""What is said of a ranking: which is best, which a folder carries, and why."""

from dataclasses import replace

from scored import CHANGE, SCALING, UNCHANGED, ranking, score

from stabilitykit.diagnosis.remedies import how_scaled, in_the_way, moved, outlier, recommendation
from stabilitykit.records.remedies import Small


def test_the_best_and_what_a_folder_carries() -> None:
    assert recommendation(ranking()) == (
        "Closest to float32 is float32 residual, 100 times as close as bfloat16; it needs code around the model, which "
        "no folder carries. What a folder carries is scaling, 50 times as close as bfloat16."
    )
    alone = ranking(score("scaling", 2e-3), score("bfloat16", 1e-2, dtype="bfloat16"))
    assert recommendation(alone) == "Closest to float32 is scaling, 5.0 times as close as bfloat16."
    worse = ranking(score("bfloat16", 1e-3, dtype="bfloat16"), score("scaling", 4e-3))
    assert recommendation(worse) == (
        "Closest to float32 is bfloat16. What a folder carries is scaling, with 4.0 times bfloat16's mean KL."
    )


def test_nothing_to_change_and_nothing_that_helps() -> None:
    fine = ranking(score("float16", 1e-5), carried="float16", **UNCHANGED)
    assert recommendation(fine) == (
        "Nothing has to be changed: all values that were seen fit in float16 with 1.5 bits of headroom."
    )
    assert how_scaled(fine) is None
    assert recommendation(ranking(score("scaling", None))) == "No remedy keeps the held-out texts finite."
    lost = ranking(score("bfloat16", 1e-3, dtype="bfloat16"), score("scaling", None))
    assert recommendation(lost) == (
        "Closest to float32 is bfloat16. Scaling is not finite on the held-out texts, so there is nothing to export."
    )


def test_how_it_was_scaled() -> None:
    assert how_scaled(ranking()) == (
        "The repair scales 4 of 30 parameters by powers of two and rms_norm_eps by 2^-4: the largest value that float16"
        " must store, 100,000 in layers.1, becomes 25,000. Nothing is rounded in float32, where logits keep every bit. "
        "In float16 15 more weights are subnormal, 25 in all, and 2 more become zero."
    )
    other = replace(CHANGE, residual=-2, gains_rounded={"norm.weight": 1}, after=Small(subnormal=7, zero=1))
    assert how_scaled(ranking(change=other, scaled_site="layers.0")) == (
        "The repair scales 4 of 30 parameters by powers of two, the residual stream by 2^-2 and rms_norm_eps by 2^-4: "
        "the largest value that float16 must store, 100,000 in layers.1, becomes 25,000 in layers.0. Of the norms, 1 "
        "gain had to be rounded in float32. In float16 3 fewer weights are subnormal, 7 in all, and 0 more become zero."
    )
    near = how_scaled(ranking(change=replace(CHANGE, approximate=3e-5)))
    assert near is not None
    assert "It is approximate: what float32 returns changes by up to 3e-05 of its largest magnitude." in near


def test_what_stands_in_the_way() -> None:
    assert in_the_way(ranking()) is None
    blocked = ranking(margin=2.0, shortfall=1.125, obstacles=("gelu's operand in layers.3 is 35,584.",))
    assert in_the_way(blocked) == (
        "Of the 2 bits of headroom asked for, 1.1 cannot be had by an exact scaling. gelu's operand in layers.3 is "
        "35,584."
    )


def test_without_a_ranking() -> None:
    unranked = replace(ranking(), scores=())
    assert recommendation(unranked) == "The scaled model fits in float16, with 1.4 bits of headroom."
    assert recommendation(replace(unranked, scaled_peak=70_000.0)) == (
        "No exact scaling keeps the model finite in float16: layers.1 reaches 70,000, and the maximum is 65,504."
    )
    assert recommendation(replace(unranked, **UNCHANGED)) == (
        "Nothing has to be changed: all values that were seen fit in float16 with 9.4 bits of headroom."
    )


def test_the_parameters_of_all_layers_are_one_row() -> None:
    assert moved(SCALING) == [
        ("embed_tokens.weight", "2^-2"),
        ("layers.*.mlp.down_proj.weight", "2^-2 to 2^1"),
        ("norm.weight", "2^2"),
    ]


def test_a_single_token_in_a_mean() -> None:
    assert outlier(score("rescale", 2e-5, kl_max=5e-3)) == (
        "Of rescale's mean KL one token among 1,000 makes up 25%: there it is 0.005."
    )
    assert outlier(score("rescale", 2e-5, kl_max=1e-3)) is None
    assert outlier(score("float16", None)) is None


def test_a_value_that_overflows_on_the_way_is_no_repair_though_what_is_returned_is_finite() -> None:
    said = recommendation(ranking(scaled_peak=70_000.0))
    assert said.endswith("layers.1 reaches 70,000, and the maximum is 65,504.")

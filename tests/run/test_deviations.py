"""Several dtypes at once: every tensor that both have is compared with the widest run's, element by element."""

import numpy as np
import pytest
import torch
from torch import Tensor

import stabilitykit as sk
from stabilitykit.models.matmul import matmul
from stabilitykit.run import case
from stabilitykit.run.profile import Profile

TINY = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"
PROMPT = "Hello there"
GREEDY = sk.Sampling(temperature=None)


def plain(dtype: str, tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """What the modules return, by hooks of the test's own, with products summed as profile sums them."""
    model, found = sk.load(TINY, dtype=dtype), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: found.update({name: out}))
    with torch.inference_mode(), matmul("float32-accumulate" if dtype != "float32" else "native"):
        model(torch.tensor([tokens]))
    return {name: out for name, out in found.items() if isinstance(out, Tensor)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_site_of_both_runs_has_a_deviation_and_it_is_right(dtype: str) -> None:
    found = sk.profile(TINY, PROMPT, dtypes=["float32", dtype])
    assert list(found.recordings[0].header.case) == list(found.recordings[1].header.case)
    frame = found[dtype].frame
    theirs = set(found["float32"].frame.site)
    shared = frame[frame.site.isin(theirs)]
    assert shared["deviation.compared"].notna().all()
    assert len(shared) > 100
    assert (shared["deviation.compared"] <= shared.elements - shared.masked).all()  # a mask's minimum is no number
    assert found[dtype].header.reference == "float32"
    assert found["float32"].frame["deviation.compared"].isna().all()

    ours, wide = plain(dtype, found.tokens), plain("float32", found.tokens)
    checked = 0
    for record in found[dtype]:
        if record.site in ours and not record.site.endswith(("self_attn", "mlp", "lm_head")):
            a, b = ours[record.site].double().numpy(), wide[record.site].double().numpy()
            deviation = record.deviation
            assert deviation is not None
            assert deviation.compared == a.size
            assert deviation.largest == np.abs(a - b).max(), record.site
            ratio = 10 * np.log10(np.sum(b**2) / np.sum((a - b) ** 2))
            assert deviation.sqnr == pytest.approx(ratio, rel=1e-12)
            checked += 1
    assert checked > 20


def test_the_widest_run_is_the_reference_and_two_narrow_ones_have_none() -> None:
    three = sk.profile(TINY, PROMPT, dtypes=["float64", "float16", "float32"])
    assert [recording.header.reference for recording in three.recordings] == [None, "float64", "float64"]
    assert three.reference is three["float64"]
    worst = three["float32"].frame["deviation.sqnr"].min()
    assert worst > three["float16"].frame["deviation.sqnr"].min() + 40  # dB: 13 bits more are 78

    narrow = sk.profile(TINY, PROMPT, dtypes=["float16", "bfloat16"])
    assert narrow.reference is None
    assert all(record.deviation is None for recording in narrow.recordings for record in recording)


def steps_with(found: Profile) -> set[int]:
    return {record.step for record in found["float16"] if record.deviation is not None}


def test_steps_are_compared_as_long_as_the_tokens_are_the_same() -> None:
    found = sk.profile(TINY, PROMPT, dtypes=["float16", "float32"], new_tokens=3, sampling=GREEDY)
    assert found["float16"].header.tokens == found["float32"].header.tokens
    assert steps_with(found) == {0, 1, 2}

    drawn = sk.profile(
        TINY,
        PROMPT,
        dtypes=["float16", "float32"],
        new_tokens=4,
        sampling=sk.Sampling(temperature=50.0, top_p=1.0, top_k=512, seed=None),
    )
    ours, theirs = drawn["float16"].header.tokens, drawn["float32"].header.tokens
    assert ours is not None
    assert theirs is not None
    first = len(drawn.tokens)
    alike = next(at for at in range(first, first + 3) if ours[0][at] != theirs[0][at]) - first
    assert steps_with(drawn) == set(range(alike + 1))

    redacted = sk.profile(TINY, PROMPT, dtypes=["float16", "float32"], new_tokens=3, sampling=GREEDY, redact=True)
    assert steps_with(redacted) == {0}


def test_what_breaks_is_compared_where_it_is_finite_and_the_element_that_broke_still_has_its_reference() -> None:
    found = sk.profile(TINY, PROMPT, dtypes=["float16", "float32"], rescale=65536.0)
    first = found["float16"].first_break()
    assert first is not None
    assert first.deviation is not None
    assert first.deviation.compared == first.elements - first.lost
    assert "The float32 run has" in sk.verdict(found["float16"], found["float32"])


def test_copies_have_a_limit_and_what_was_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "_ROOM", 10_000)
    found = sk.profile(TINY, PROMPT, dtypes=["float16", "bfloat16", "float32"])["float16"]
    without = sum(record.deviation is None for record in found)
    assert 0 < without < len(found)
    (note,) = (note for note in found.header.notes if note.startswith("not compared"))
    assert "with float32" in note
    assert "too much memory" in note

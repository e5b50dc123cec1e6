"""Peaks alone say what the full statistics say of them, stop where a full recording breaks, and change nothing."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.gemma import Gemma
from stabilitykit.recorder import record
from stabilitykit.recorder.axes import Axes
from stabilitykit.recorder.kernels.layout import edges
from stabilitykit.recorder.peaks import measure_peaks, position_peaks
from stabilitykit.recorder.statistics import decode, measure
from stabilitykit.records import Record, Recording

Small = Callable[..., Gemma]
Floats = npt.NDArray[np.float64]

LEFT_OUT = {
    "zero", "subnormal", "smallest", "minimum", "maximum", "mean", "rms", "exponent_first", "exponents", "formats",
    "softmax",
}  # fmt: skip
ROWS, LENGTH, HEADS, WINDOW = 3, 11, 4, 4
PADDED = (0, 3, 7)
"""Pad tokens on the left of each row."""
BREAKS_FLOAT16 = 2.0**15
"""A stress at which each of the small models breaks in float16."""


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are real."""
    ids = torch.randint(262, 360, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    real = torch.stack([torch.arange(LENGTH) >= pads for pads in PADDED])
    return ids.masked_fill(~real, 0), real


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def shared(record: Record) -> dict[str, object]:
    """What both details say of a tensor; `repr` makes NaN equal to NaN."""
    return {spec.name: repr(getattr(record, spec.name)) for spec in dataclasses.fields(record)} | dict.fromkeys(
        LEFT_OUT
    )


def run(model: Gemma, *, padded: bool = True, **options: object) -> Recording:
    ids, real = batch()
    with torch.inference_mode(), record(model, **options) as recording:
        model(ids, padding=real if padded else None)
    return recording


@pytest.mark.parametrize(("stress", "padded"), [(1.0, False), (BREAKS_FLOAT16, True)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_peaks_are_those_of_the_full_statistics_in_the_same_places(
    small: Small, generation: int, dtype: str, stress: float, padded: bool
) -> None:
    model = small(generation, dtype, stress)
    full = run(model, padded=padded, position_peaks=True)
    peaks = run(model, padded=padded, position_peaks=True, detail="peaks")
    assert [r.site for r in peaks] == [r.site for r in full]
    assert len(full) > 120
    for found, expected in zip(peaks, full, strict=True):
        assert shared(found) == shared(expected), expected.site
    assert (full.first_break() is not None) == (dtype == "float16" and stress == BREAKS_FLOAT16)


def test_finite_tensors_are_spared_the_rest_and_others_are_not(small: Small) -> None:
    recording = run(small(2, "float16", BREAKS_FLOAT16), detail="peaks")
    lost = [r for r in recording if r.lost]
    # Without a position axis there is nothing to read off: RoPE's tables have one, gains are constants.
    spared = [r for r in recording if not r.lost and r.positions]
    assert lost
    assert all(r.exponents and r.formats and r.zero is not None for r in lost if r.amax)
    assert spared
    assert all((r.exponents, r.formats, r.zero, r.mean, r.rms, r.softmax) == ((), {}, None, None, None, None)
               for r in spared)  # fmt: skip


def belongs_to(pairs: npt.NDArray[np.bool_] | None, scores: Floats) -> Floats:
    """[B, H, L, L] -> [B, L]: element (i, k) belongs to max(i, k); `pairs` are those that count."""
    rows, heads, queries, keys = scores.shape
    found = np.zeros((rows, queries))
    for b, h, i, k in itertools.product(range(rows), range(heads), range(queries), range(keys)):
        if pairs is None or pairs[b, i, k]:
            found[b, max(i, k)] = max(found[b, max(i, k)], abs(scores[b, h, i, k]))
    return found


def double(tensor: torch.Tensor) -> Floats:
    return tensor.double().numpy()


@pytest.mark.parametrize(
    ("dtype", "detail"), [("float32", "peaks"), ("float16", "statistics"), ("float16", "peaks"), ("bfloat16", "peaks")]
)
@pytest.mark.parametrize("generation", [2, 3])
def test_each_positions_amax_is_that_of_the_elements_it_brings(
    small: Small, monkeypatch: pytest.MonkeyPatch, generation: int, dtype: str, detail: str
) -> None:
    """Tensors are taken by hooks, and by listening at the functions that make and read the attention scores."""
    model = small(generation, dtype)
    ids, real = batch()
    outputs: dict[str, torch.Tensor] = {}
    heard: dict[str, list[torch.Tensor]] = defaultdict(list)
    matmul, softmax = torch.matmul, torch.nn.functional.softmax

    def heard_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        heard["product"].append(matmul(a, b))
        return heard["product"][-1]

    def heard_softmax(x: torch.Tensor, **options: object) -> torch.Tensor:
        heard["masked"].append(x)
        heard["probabilities"].append(softmax(x, **options))
        return heard["probabilities"][-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "matmul", heard_matmul)
        patch.setattr(torch.nn.functional, "softmax", heard_softmax)
        handles = [
            module.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
            for name, module in model.named_modules()
            if name != "rotary_emb"
        ]
        with torch.inference_mode():
            model(ids, padding=real)
    for handle in handles:
        handle.remove()
    recording = run(model, position_peaks=True, detail=detail)

    compared = 0
    for name, output in outputs.items():
        if not name or name.endswith((".self_attn", ".mlp")):
            continue  # handed on as it came from the last of its own modules
        values = np.abs(double(output))
        position = 2 if values.ndim == 4 else 1  # after q_norm and k_norm: [B, H, L, D]
        expected = values.max(axis=tuple(d for d in range(1, values.ndim) if d != position))
        assert recording.at(name).position_amax == tuple(expected.flatten().tolist()), name
        compared += 1
    assert compared > 30

    i, k = np.indices((LENGTH, LENGTH))
    for layer in range(model.config.layers):
        shown = (k <= i) & (model.config.is_global(layer) | (k > i - WINDOW)) & double(real).astype(bool)[:, None, :]
        product, values = heard["product"][2 * layer : 2 * layer + 2]
        found = {r.site.rpartition("/")[2]: r for r in recording if r.module == f"layers.{layer}.self_attn"}
        last = max(int(name.removeprefix("add.")) for name in found if name.startswith("add."))
        for name, tensor, counting in (
            ("matmul.0", product, None),
            (f"add.{last}", heard["masked"][layer], shown),
            ("softmax.0", heard["probabilities"][layer], None),
        ):
            expected = belongs_to(counting, double(tensor.reshape(ROWS, HEADS, LENGTH, LENGTH)))
            record_ = found[name]
            assert record_.position_amax == tuple(expected.flatten().tolist()), record_.site
            assert record_.amax == expected.max()
            assert record_.masked == (0 if counting is None else int(HEADS * (~shown).sum()))
            assert expected[record_.amax_row, record_.amax_position] == record_.amax
        # Probabilities times values is made at the query's position, and is no pair of positions.
        expected = np.abs(double(values)).max(axis=(1, 3))
        assert found["matmul.1"].position_amax == tuple(expected.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_masks_and_blocks_are_as_in_a_plain_count(dtype: torch.dtype) -> None:
    """Few different values, so that most peaks tie; the reference looks at every element in row-major order."""
    generator = torch.Generator().manual_seed(0)
    cases = itertools.product(
        [((2, 3, 5, 4), 0, 2, False), ((2, 5, 4), 0, 1, False), ((2, 5, 3, 4), 0, 1, False),
         ((5, 7), None, 0, False), ((2, 3, 5, 5), 0, 2, True), ((1, 2, 5, 5), None, 2, True)],
        [0.0, 0.3, 0.9, 1.0],
        range(4),
    )  # fmt: skip
    for (shape, row, position, pairs), share, _ in cases:
        values = torch.randint(-3, 4, shape, generator=generator).to(dtype)
        masked = torch.rand(shape, generator=generator) < share if share else None
        axes = Axes(tuple(values.shape), row=row, position=position, pairs=pairs)
        found = measure_peaks(values, axes, masked)
        assert found is not None
        counted, peaks = found
        statistics = decode(counted, edges(dtype, ()), values.shape)
        hidden = np.zeros(shape, bool) if masked is None else masked.numpy()
        rows = 1 if row is None else shape[row]
        expected = np.zeros((rows, shape[position]))
        magnitudes = np.abs(double(values))
        best: tuple[float, tuple[int, ...] | None] = (-1.0, None)
        for place in np.ndindex(*shape):
            if hidden[place]:
                continue
            magnitude = magnitudes[place]
            at = (0 if row is None else place[row], max(place[-1], place[-2]) if pairs else place[position])
            expected[at] = max(expected[at], magnitude)
            if magnitude > best[0]:
                best = (magnitude, place)
        shown = best[1] is not None
        assert peaks.reshape(expected.shape).tolist() == expected.tolist()
        assert position_peaks(values, axes, masked).reshape(expected.shape).tolist() == expected.tolist()
        assert statistics.amax == (best[0] if shown else None)
        if best[0] != 0.0:  # among zeros any is as good, a masked one too
            assert statistics.amax_index == best[1]
            assert statistics.amax_index == measure(values, (), masked).amax_index
        assert statistics.masked == hidden.sum()


def test_long_scores_are_gathered_block_by_block_without_a_seam() -> None:
    length = 1030  # more than two blocks
    scores = torch.randn(1, 2, length, length, generator=torch.Generator().manual_seed(0))
    i, k = np.indices((length, length))
    expected = np.zeros(length, np.float32)
    np.maximum.at(expected, np.maximum(i, k).ravel(), scores.abs().amax((0, 1)).numpy().ravel())
    # The peak: once where it is alone, once where a later head has the same at an earlier position.
    for places in ([(0, 1, 700, 1029)], [(0, 1, 3, 600), (0, 0, 1029, 5)], [(0, 0, 600, 513), (0, 0, 513, 600)]):
        changed = scores.clone()
        for place in places:
            changed[place] = -9.0
            expected_here = expected.copy()
        for place in places:
            expected_here[max(place[2:])] = 9.0
        found = measure_peaks(changed, Axes(tuple(changed.shape), row=0, head=1, position=2, pairs=True), None)
        assert found is not None
        assert found[1].flatten().tolist() == expected_here.tolist()
        statistics = decode(found[0], edges(torch.float32, ()), changed.shape)
        assert (statistics.amax, statistics.amax_index) == (9.0, min(places))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_tensor_that_is_not_finite_is_left_to_the_full_statistics(value: float) -> None:
    for place in ((0, 0, 0), (0, 4, 2)):
        tensor = torch.ones(1, 5, 3)
        tensor[place] = value
        axes = Axes(tuple(tensor.shape), row=0, position=1)
        assert measure_peaks(tensor, axes, None) is None
        assert position_peaks(tensor, axes, None).tolist() == [[1.0] * 5]  # the finite ones
        hidden = torch.zeros(1, 5, 3, dtype=torch.bool)
        hidden[place] = True
        assert measure_peaks(tensor, axes, hidden) is not None


@pytest.mark.parametrize(
    ("generation", "detail", "level"),
    [
        (1, "peaks", "operators"),
        (2, "statistics", "operators"),
        (3, "peaks", "operators"),
        (3, "peaks", "modules"),
        (3, "statistics", "layers"),
    ],
)
def test_a_stopped_recording_is_the_beginning_of_the_whole_one(
    small: Small, generation: int, detail: str, level: str
) -> None:
    model = small(generation, "float16", BREAKS_FLOAT16)
    whole = run(model, detail=detail, level=level)
    expected = whole.first_break()
    assert expected is not None
    ids, real = batch()
    entered: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, args, out: entered.append(module)) for m in model.modules()]
    reached_the_end = False
    with torch.inference_mode(), record(model, detail=detail, level=level, stop_at_break=True) as stopped:
        model(ids, padding=real)
        reached_the_end = True
    seen = len(entered)
    for handle in handles:
        handle.remove()
    assert not reached_the_end
    assert seen < len(list(model.modules()))
    assert hooks(model) == 0
    assert _get_current_dispatch_mode_stack() == []
    assert stopped.header.error is None
    assert expected.order < len(stopped) < len(whole)
    assert [repr(r) for r in stopped] == [repr(r) for r in whole.records[: len(stopped)]]
    assert repr(stopped.first_break()) == repr(expected)
    again = run(model, detail=detail, level=level)  # nothing of it stayed behind in the model
    assert list(map(repr, again)) == list(map(repr, whole))


def test_a_break_after_the_last_module_began_ends_the_block_before_the_next_pass(small: Small) -> None:
    model = small(3, "float16")
    model.norm.scale = 2.0**14  # the head's product overflows
    ids, _ = batch()
    passes = 0
    with torch.inference_mode(), record(model, stop_at_break=True) as recording:
        for _ in range(3):
            model(ids)
            passes += 1
    assert passes == 1
    first = recording.first_break()
    assert first is not None
    assert first.site in ("norm", "norm/mul.1", "lm_head")
    assert {r.step for r in recording} == {0}
    assert hooks(model) == 0


def test_a_sound_pass_is_never_stopped(small: Small) -> None:
    model = small(3, "float16")
    whole, stopped = run(model, detail="peaks"), run(model, detail="peaks", stop_at_break=True)
    assert list(map(repr, stopped)) == list(map(repr, whole))


def test_an_exception_of_the_users_is_passed_on_by_a_stopping_recording_too(small: Small) -> None:
    model = small(3, "float16", BREAKS_FLOAT16)
    with pytest.raises(ZeroDivisionError), record(model, stop_at_break=True) as recording:
        raise ZeroDivisionError("before the model ran")
    assert recording.header.error == "before the model ran"
    assert hooks(model) == 0

"""A position's peak is that of the elements it brings; a recording that stops at a break is the whole's beginning."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.errors import SkippedStatements
from stabilitykit.models.gemma import Gemma
from stabilitykit.recorder import record
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import edges
from stabilitykit.recorder.kernels.positions import position_peaks
from stabilitykit.recorder.statistics import tally, tally_by_position
from stabilitykit.records import Level, Recording

Small = Callable[..., Gemma]
Floats = npt.NDArray[np.float64]

ROWS, LENGTH, HEADS, WINDOW = 3, 11, 4, 4
PADDED = (0, 3, 7)
"""Pad tokens on the left of each row."""
BREAKS_FLOAT16 = 2.0**15
"""A rescale at which each of the small models breaks in float16."""


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are real."""
    ids = torch.randint(262, 360, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    real = torch.stack([torch.arange(LENGTH) >= pads for pads in PADDED])
    return ids.masked_fill(~real, 0), real


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def run(model: Gemma, *, padded: bool = True, **options: Any) -> Recording:
    ids, real = batch()
    with torch.inference_mode(), record(model, **options) as recording:
        model(ids, padding=real if padded else None)
    return recording


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("generation", [2, 3])
def test_each_positions_amax_is_that_of_the_elements_it_brings(
    small: Small, monkeypatch: pytest.MonkeyPatch, generation: int, dtype: str
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

    def heard_softmax(x: torch.Tensor, **options: Any) -> torch.Tensor:
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
    recording = run(model, position_peaks=True)

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
        product, weighted = heard["product"][2 * layer : 2 * layer + 2]
        found = {r.site.rpartition("/")[2]: r for r in recording if r.module == f"layers.{layer}.self_attn"}
        last = max(int(name.removeprefix("add.")) for name in found if name.startswith("add."))
        tensor: torch.Tensor
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
        expected = np.abs(double(weighted)).max(axis=(1, 3))
        assert found["matmul.1"].position_amax == tuple(expected.flatten().tolist())


def counted(values: torch.Tensor, axes: Axes, hidden: npt.NDArray[np.bool_]) -> Floats:
    """By row and position, from a look at every element."""
    assert axes.position is not None
    folded, hidden = np.abs(double(values)).reshape(axes.shape), hidden.reshape(axes.shape)
    found = np.zeros((1 if axes.row is None else axes.shape[axes.row], axes.shape[axes.position]))
    before = axes.start - axes.first_key
    for place in np.ndindex(*axes.shape):
        if not hidden[place] and np.isfinite(folded[place]):
            position = place[axes.position]
            position = max(position, place[-1] - before) if axes.pairs else position
            at = (0 if axes.row is None else place[axes.row], position)
            found[at] = max(found[at], folded[place])
    return found


SHAPES = [
    Axes((2, 5, 4), row=0, position=1),
    Axes((2, 3, 5, 4), row=0, head=1, position=2),
    Axes((2, 5, 3, 4), row=0, position=1, head=2),
    Axes((2, 5, 1), row=0, position=1),
    Axes((5, 7), position=0),
    Axes((2, 0, 4), row=0, position=1),
    Axes((2, 3, 5, 5), row=0, head=1, position=2, pairs=True),
    Axes((1, 2, 5, 5), position=2, pairs=True),
    Axes((2, 3, 4, 9), row=0, head=1, position=2, pairs=True, start=9, first_key=4),  # a block of queries
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("axes", SHAPES, ids=str)
def test_every_way_to_find_a_positions_peak_agrees(axes: Axes, dtype: torch.dtype) -> None:
    """Few different values, so that most peaks tie; some not finite, some hidden; transposed in memory and not."""
    generator = torch.Generator().manual_seed(0)
    against = edges(dtype, ())
    for share, transposed, _ in itertools.product([0.0, 0.3, 1.0], [False, True], range(3)):
        shape = axes.shape[::-1] if transposed else axes.shape
        values = torch.randint(-3, 4, shape, generator=generator).to(dtype)
        chance = torch.rand(shape, generator=generator)
        values[chance < 0.1], values[chance > 0.95] = math.nan, -math.inf
        values = values.permute(*range(values.ndim)[::-1]) if transposed else values
        hidden = torch.rand(values.shape, generator=generator) < share if share else None
        expected = counted(values, axes, np.zeros(axes.shape, bool) if hidden is None else hidden.numpy())
        row, peaks = tally_by_position(values, against, axes, hidden)
        assert peaks.reshape(expected.shape).tolist() == expected.tolist()
        assert position_peaks(values, axes, hidden).reshape(expected.shape).tolist() == expected.tolist()
        assert np.array_equal(row, tally(values, against, hidden))


@pytest.mark.parametrize("limit", [-1.0, 0.0])
def test_what_a_mask_does_not_hide_counts(limit: float) -> None:
    values = torch.tensor([[[-5.0, 2.0], [3.0, -1.0]]])
    axes = Axes(tuple(values.shape), row=0, position=1)
    _, peaks = tally_by_position(values, edges(values.dtype, ()), axes, torch.ones(1, 2, 2, dtype=torch.bool), limit)
    assert peaks.tolist() == [[2.0, 3.0]]


def test_long_scores_have_no_seam_where_blocks_and_threads_meet() -> None:
    length = 1030
    scores = torch.randn(1, 2, length, length, generator=torch.Generator().manual_seed(0))
    scores[0, 1, 700, 1029], scores[0, 0, 1029, 5], scores[0, 1, 3, 600] = -9.0, 8.0, 7.0
    i, k = np.indices((length, length))
    expected = np.zeros(length, np.float32)
    np.maximum.at(expected, np.maximum(i, k).ravel(), scores.abs().amax((0, 1)).numpy().ravel())
    axes = Axes(tuple(scores.shape), row=0, head=1, position=2, pairs=True)
    _, peaks = tally_by_position(scores, edges(scores.dtype, ()), axes)
    assert peaks.flatten().tolist() == expected.tolist()
    assert position_peaks(scores, axes, None).flatten().tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "level"), [(1, "operators"), (2, "operators"), (3, "operators"), (3, "modules"), (3, "layers")]
)
def test_a_stopped_recording_is_the_beginning_of_the_whole_one(small: Small, generation: int, level: Level) -> None:
    model = small(generation, "float16", BREAKS_FLOAT16)
    whole = run(model, level=level)
    expected = whole.first_break()
    assert expected is not None
    ids, real = batch()
    entered: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, args, out: entered.append(module)) for m in model.modules()]
    reached_the_end = False
    left_out = pytest.warns(SkippedStatements, match="`reached_the_end` was not assigned")
    with torch.inference_mode(), left_out, record(model, level=level, stop_at_break=True) as stopped:
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
    again = run(model, level=level)  # nothing of it stayed behind in the model
    assert list(map(repr, again)) == list(map(repr, whole))


def test_a_break_after_the_last_module_began_ends_the_block_before_the_next_pass(small: Small) -> None:
    model = small(3, "float16")
    model.norm.scale = 2.0**14  # the head's product overflows
    ids, _ = batch()
    passes = 0
    left_out = pytest.warns(SkippedStatements, match="`passes` was not assigned")
    with torch.inference_mode(), left_out, record(model, stop_at_break=True) as recording:
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
    whole, stopped = run(model), run(model, stop_at_break=True)
    assert list(map(repr, stopped)) == list(map(repr, whole))


def test_an_exception_of_the_users_is_passed_on_by_a_stopping_recording_too(small: Small) -> None:
    model = small(3, "float16", BREAKS_FLOAT16)
    with pytest.raises(ZeroDivisionError), record(model, stop_at_break=True) as recording:
        raise ZeroDivisionError("before the model ran")
    assert recording.header.error == "before the model ran"
    assert hooks(model) == 0

"""Axes: guessed from shapes where an engine tells nothing else, and folded from labels where elements were followed."""

import numpy as np
import pytest
import torch

from stabilitykit.recorder.kernels.axes import axes_of
from stabilitykit.recorder.places.folded import axes_for
from stabilitykit.recorder.places.labels import Label, Labels, label, labels
from stabilitykit.recorder.places.memory import view, written

ROWS, LENGTH = 2, 5


@pytest.mark.parametrize(
    ("shape", "folded", "row", "position", "head", "start"),
    [
        ((2, 5, 8), (2, 5, 8), 0, 1, None, 0),
        ((10, 8), (2, 5, 8), 0, 1, None, 0),  # flattened for a matrix product
        ((2, 4, 5, 8), (2, 4, 5, 8), 0, 2, 1, 0),
        ((2, 5, 4, 8), (2, 5, 4, 8), 0, 1, 2, 0),
        ((8, 5, 7), (2, 4, 5, 7), 0, 2, 1, 0),  # heads flattened into rows
        ((2, 5, 5, 8), (2, 5, 5, 8), 0, 2, 1, 0),  # as many heads as tokens
        ((1, 1, 5, 7), (1, 1, 5, 7), None, 2, 1, 0),  # a mask, shared by rows and heads
        ((5, 8), (5, 8), None, 0, None, 0),  # a table of angles
        ((2, 9), (2, 1, 9), 0, 1, None, 4),  # logits of the last token
        ((2, 1, 9), (2, 1, 9), 0, 1, None, 4),
        ((8,), (8,), None, None, None, 0),  # a gain
        ((3, 8), (3, 8), None, None, None, 0),
    ],
)
def test_axes_of_a_decoders_shapes(
    shape: tuple[int, ...],
    folded: tuple[int, ...],
    row: int | None,
    position: int | None,
    head: int | None,
    start: int,
) -> None:
    found = axes_of(shape, ROWS, LENGTH)
    assert found.shape == folded
    assert (found.row, found.position, found.head, found.start) == (row, position, head, start)


def test_without_a_sequence_no_axis_is_named() -> None:
    found = axes_of((2, 5, 8), None, None)
    assert (found.row, found.position, found.head) == (None, None, None)


def hidden_state() -> Labels:
    """Of `[2, 5, 8]`."""
    row, position = label(np.arange(2).reshape(2, 1, 1)), label(np.arange(5).reshape(1, 5, 1))
    return labels((2, 5, 8), row, position, slot=0)


@pytest.mark.parametrize("seed", range(40))
def test_a_view_is_labelled_as_its_elements_are(seed: int) -> None:
    """Whatever views are taken one after another, and whatever is folded, an element keeps its row and position."""
    generator = np.random.default_rng(seed)
    base = hidden_state()
    tensor = torch.arange(80).view(2, 5, 8)
    for _ in range(generator.integers(1, 6)):
        tensor = random_view(tensor, generator)
    found = view(base, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    axes = axes_for(found)
    for index in np.ndindex(*tensor.shape):
        element = int(tensor[index])
        expected = element // 40, element // 8 % 5
        assert (at(found.row, index), at(found.position, index)) == expected
        flat = int(np.ravel_multi_index(index, tensor.shape)) if index else 0
        place = [int(i) for i in np.unravel_index(flat, axes.shape)]
        assert (axes.row_of(place), axes.position_of(place)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_into_a_view_is_where_it_was_written(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tensor = torch.arange(80).view(2, 5, 8)
    for _ in range(generator.integers(1, 4)):
        tensor = random_view(tensor, generator)
    shape = tuple(tensor.shape)
    new = labels(shape, label(np.full((1,) * len(shape), 7)), label(np.arange(tensor.numel()).reshape(shape)), slot=0)
    found = written(hidden_state(), new, tensor.stride(), int(tensor.storage_offset()))
    inside = {int(element): i for i, element in enumerate(tensor.reshape(-1))}
    for element in range(80):
        index = element // 40, element // 8 % 5, element % 8
        expected = (7, inside[element]) if element in inside else index[:2]
        assert (at(found.row, index), at(found.position, index)) == expected


def random_view(tensor: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    kind = generator.integers(5)
    dims = tensor.ndim
    if kind == 0 and dims > 1:
        return tensor.transpose(*generator.choice(dims, 2, replace=False).tolist())
    if kind == 1 and dims:
        dim = int(generator.integers(dims))
        start = int(generator.integers(tensor.shape[dim]))
        return tensor.movedim(dim, 0)[start :: int(generator.integers(1, 3))].movedim(0, dim)
    if kind == 2 and dims > 1:
        dim = int(generator.integers(dims))
        return tensor.select(dim, int(generator.integers(tensor.shape[dim])))
    if kind == 3:
        return tensor.unsqueeze(int(generator.integers(dims + 1)))
    if kind == 4 and tensor.is_contiguous():
        return tensor.view(-1, 2) if tensor.numel() % 2 == 0 and generator.integers(2) else tensor.view(-1)
    return tensor


def at(of: Label | None, index: tuple[int, ...]) -> int | None:
    return None if of is None else of.at(index)

"""Rows, positions and heads are found in every shape that a decoder makes."""

import pytest

from stabilitykit.recorder.kernels.axes import axes_of

ROWS, LENGTH = 2, 5


@pytest.mark.parametrize(
    ("shape", "folded", "row", "position", "head", "at_last"),
    [
        ((2, 5, 8), (2, 5, 8), 0, 1, None, False),
        ((10, 8), (2, 5, 8), 0, 1, None, False),  # flattened for a matrix product
        ((2, 4, 5, 8), (2, 4, 5, 8), 0, 2, 1, False),
        ((2, 5, 4, 8), (2, 5, 4, 8), 0, 1, 2, False),
        ((8, 5, 7), (2, 4, 5, 7), 0, 2, 1, False),  # heads flattened into rows
        ((2, 5, 5, 8), (2, 5, 5, 8), 0, 2, 1, False),  # as many heads as tokens
        ((1, 1, 5, 7), (1, 1, 5, 7), None, 2, 1, False),  # a mask, shared by rows and heads
        ((5, 8), (5, 8), None, 0, None, False),  # a table of angles
        ((2, 9), (2, 9), 0, None, None, True),  # logits of the last token
        ((2, 1, 9), (2, 1, 9), 0, None, None, True),
        ((8,), (8,), None, None, None, False),  # a gain
        ((3, 8), (3, 8), None, None, None, False),
    ],
)
def test_axes(
    shape: tuple[int, ...],
    folded: tuple[int, ...],
    row: int | None,
    position: int | None,
    head: int | None,
    at_last: bool,
) -> None:
    found = axes_of(shape, ROWS, LENGTH)
    assert found.shape == folded
    assert (found.row, found.position, found.head, found.at_last) == (row, position, head, at_last)


def test_without_a_sequence_no_axis_is_named() -> None:
    found = axes_of((2, 5, 8), None, None)
    assert (found.row, found.position, found.head, found.at_last) == (None, None, None, False)

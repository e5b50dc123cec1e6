"""The pytest plugin: the fixture `stability`. Torch is imported by the tests that ask for it, not by pytest."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stabilitykit.gate.assertions import Stability


@pytest.fixture(scope="session")
def stability() -> "Stability":
    """Assertions about a model's numbers: assert_finite, assert_headroom, assert_close_to_float32."""
    from stabilitykit.gate.assertions import Stability

    return Stability()

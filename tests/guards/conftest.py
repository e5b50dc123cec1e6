"""Small Gemmas in float16 of which one token breaks, in the kit's form and in transformers'."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import LARGE, gemma

from reference import reference_model

Make = Callable[..., Any]


@pytest.fixture
def own() -> Make:
    """`own(dtype, planted=True)`: the kit's model."""
    return gemma


@pytest.fixture
def theirs() -> Make:
    """`theirs(dtype, planted=True)`: transformers' model of the same weights."""

    def make(dtype: str = "float16", *, planted: bool = True) -> Any:
        model: Any = reference_model(gemma(dtype, planted=planted))
        model.generation_config.eos_token_id = 1
        model.generation_config.pad_token_id = 0
        return model.requires_grad_(False)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Three prompts, of which the second breaks at position 2."""
    return torch.tensor([[2, 70, 71, 72], [2, 70, LARGE, 72], [2, 73, 74, 75]])

"""An observer that measures nothing has for every operator the name that its record has, on every family and in every
way to run it.
"""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families import FAMILIES, family_model
from remedied import SPECS
from torch import Tensor, nn

from stabilitykit.models.gemma import load
from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.recorder import record
from stabilitykit.recorder.names import Names, by_operator

TOKENS = torch.tensor([[2, 70, 71, 72, 73, 74, 75]])


def named(model: nn.Module, tokens: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """The name and the shape of what each operator makes."""
    names = Names(model)
    seen: list[tuple[str, tuple[int, ...]]] = []

    def run(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = kind.func(*args, **kwargs)
        name = names.of_operator(kind, args, kwargs, output)
        if name is not None:
            made = output if isinstance(output, Tensor) else output[0]
            seen.append((name, tuple((torch.view_as_real(made) if made.is_complex() else made).shape)))
        return output

    with torch.inference_mode(), ExitStack() as stack:
        names.attach(stack)
        stack.enter_context(OperatorMode(run))
        model(tokens)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return seen


def recorded(model: nn.Module, tokens: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    with torch.inference_mode(), record(model, formats=()) as recording:
        model(tokens)
    return [(name, made.shape) for name, made in by_operator(recording)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_models(family: str, attention: str, dtype: torch.dtype) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no fused attention with a soft-cap")
    model = family_model(family, dtype, attention)
    names = named(model, TOKENS)
    assert names == recorded(model, TOKENS)
    assert len(names) > 40


@pytest.mark.parametrize("rounding", ["transformers", "gemma_pytorch"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_the_kits_own(generation: int, rounding: Any) -> None:
    model = load(SPECS[generation], dtype="float16", rounding=rounding)
    names = named(model, TOKENS)
    assert names == recorded(model, TOKENS)
    assert ("layers.2/add.1", (1, 7, 32)) in names

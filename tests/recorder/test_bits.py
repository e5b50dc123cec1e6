"""A recorded model computes what it computes without a recorder, bit for bit: outputs, gradients, buffers, and the
random numbers that are drawn next.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, DIFFUSERS, TEXT, TOKENS, TORCH, Example, Function, example
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.recorder import record
from stabilitykit.records import Recording

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": nullcontext,
}
WITHOUT_GRADIENTS = ("RWKV",)  # transformers' own backward pass raises
WITHOUT_AUTOCAST = ("DeBERTa", "TransformerEncoder over padding")  # they raise themselves
SEEN_IN_PART = ("CTCLoss",)
X = torch.linspace(-1, 1, 2 * 7 * 8).reshape(2, 7, 8)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers, about models as small as these

Outcome = dict[str, list[bytes | None]]  # by what it is


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def tensors(output: Any) -> list[Tensor]:
    if hasattr(output, "to_tuple"):  # a dataclass of transformers'
        output = output.to_tuple()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def bits(tensor: Tensor) -> bytes:
    """Dtype, shape, strides and elements."""
    form = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode()
    return form + tensor.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def outcome(
    of: Example, mode: str, recorded: dict[str, Any] | None, autocast: bool
) -> tuple[Outcome, Recording | None]:
    """What a pass leaves, and with gradients a backward pass in the same block; recorded with these options."""
    model, args, kwargs = of
    torch.manual_seed(5)
    block = nullcontext() if recorded is None else record(model, formats=(), **recorded)
    with MODES[mode](), torch.autocast("cpu", torch.bfloat16, enabled=autocast), block as recording:
        made = tensors(model(*args, **kwargs))
        differentiable = [one for one in made if one.requires_grad]
        if mode == "grad" and differentiable:
            torch.stack([one.abs().double().square().mean() for one in differentiable]).sum().backward()
    left: Outcome = {
        "outputs": [bits(one) for one in made],
        "gradients": [None if held.grad is None else bits(held.grad) for held in model.parameters()],
        "buffers": [bits(buffer) for buffer in model.buffers()],
        "random numbers": [bits(torch.get_rng_state())],
    }
    return left, recording


def compare(
    table: dict[str, Callable[[], Example]], name: str, mode: str, *, autocast: bool = False, **options: Any
) -> Recording:
    """The recording, of a pass that left the same."""
    if mode == "grad" and name in WITHOUT_GRADIENTS:
        pytest.skip("its backward pass raises without a recorder too")
    alone, _ = outcome(example(table, name), mode, None, autocast)
    recorded, recording = outcome(example(table, name), mode, options, autocast)
    for what, left in alone.items():
        assert left == recorded[what], what
    assert recording is not None
    assert len(recording) > 0
    assert name in SEEN_IN_PART or not any("could not be seen" in note for note in recording.header.notes)
    return recording


@pytest.mark.table
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_transformers(name: str, mode: str) -> None:
    compare(ARCHITECTURES, name, mode)


@pytest.mark.table
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DIFFUSERS)
def test_models_of_diffusers(name: str, mode: str) -> None:
    pytest.importorskip("diffusers")
    compare(DIFFUSERS, name, mode)


@pytest.mark.table
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TORCH)
def test_modules_of_torch(name: str, mode: str) -> None:
    compare(TORCH, name, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Llama", "DINOv2", "SigLIP", "GRU", "TransformerEncoder over padding", "bicubic"])
def test_those_that_tell_most(name: str, mode: str) -> None:
    compare(ARCHITECTURES | TORCH, name, mode)


@pytest.mark.table
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted((ARCHITECTURES | TORCH).keys() - set(WITHOUT_AUTOCAST)))
def test_under_autocast(name: str, mode: str) -> None:
    compare(ARCHITECTURES | TORCH, name, mode, autocast=True)


@pytest.mark.parametrize("mode", MODES)
def test_operators_of_others_under_autocast(mode: str) -> None:
    """Their own products are autocast, as without a recorder."""

    def squared(x: Tensor) -> Tensor:
        return x @ x.mT

    squared.__annotations__ = {"x": Tensor, "return": Tensor}
    operator = torch.library.custom_op("stabilitykit_tests::squared", mutates_args=())(squared)

    def small() -> Example:
        return Function(lambda x: (operator(x), torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist"))), (X,), {}

    recording = compare({"small": small}, "small", mode, autocast=True)
    assert recording.at("/squared.0").dtype == "bfloat16"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", ["layers", "modules"])
def test_at_coarser_levels(level: Any, mode: str) -> None:
    compare(TEXT, "Gemma 3", mode, level=level)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_in_16_bits_with_every_option(mode: str, dtype: torch.dtype) -> None:
    def small() -> Example:
        model, args, kwargs = TEXT["Qwen3"]()
        return model.to(dtype), args, kwargs

    compare({"small": small}, "small", mode, position_peaks=True, keep={})


def test_sampled_text_is_the_same() -> None:
    model, _, _ = example(TEXT, "Llama")
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(7)
    alone = model.generate(TOKENS, **how)
    torch.manual_seed(7)
    with record(model, formats=()):
        recorded = model.generate(TOKENS, **how)
    assert torch.equal(alone, recorded)


def test_gradients_with_activation_checkpointing() -> None:
    def small() -> Example:
        model, args, kwargs = TEXT["Llama"]()
        model.gradient_checkpointing_enable()
        model.train()
        return model, args, kwargs | {"use_cache": False}

    recording = compare({"training": small}, "training", "grad")
    plain = compare(TEXT, "Llama", "grad")
    assert recording.header.starts == plain.header.starts == (0,)  # the passes inside the backward pass are no steps


def test_gradients_of_gradients() -> None:
    class Force(nn.Module):
        """An energy's gradient by the positions, as models of molecules return it."""

        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    def small() -> Example:
        return Force(), (torch.linspace(-1, 1, 24).reshape(4, 6),), {}

    compare({"force": small}, "force", "grad")

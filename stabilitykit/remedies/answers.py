"""What a model of transformers' makes of prompts, in every way that people run it.

With both attentions, alone and beside a longer prompt with padding on the left, and token by token with a cache. A
model that reads no tokens gets images or sounds that are drawn by the prompt's first number.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.errors import CheckpointError
from stabilitykit.models.transformers.backend import imported, quiet

NEW_TOKENS = 16
ATTENTIONS = ("eager", "sdpa")
_OUTPUTS = ("last_hidden_state", "pooler_output", "image_embeds", "text_embeds")


def answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, generating: Sequence[str] = ATTENTIONS
) -> Iterator[tuple[str, Tensor]]:
    """By what was run, its outputs: logits where a model has any, or else hidden states, in float32, on the CPU.

    Token by token only with the attentions in `generating`: each token costs a run.
    """
    for attention in ATTENTIONS:
        with _attention(model, attention) as has:
            if not has:
                continue
            for number, prompt in enumerate(prompts, start=1):
                yield f"prompt {number}, {attention}", _outputs(model, inputs(model, [prompt]))
            if _main(model) == "input_ids":
                if len({len(prompt) for prompt in prompts}) > 1:
                    yield f"padded on the left, {attention}", _outputs(model, inputs(model, prompts))
                if attention in generating and _generates(model):
                    yield f"{NEW_TOKENS} new tokens with a cache, {attention}", _generated(model, prompts[0])


def plain_answers(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Only those of each prompt by itself, with the attention that the model has."""
    for prompt in prompts:
        yield _outputs(model, inputs(model, [prompt]))


def inputs(model: nn.Module, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The arguments of a call of the model: token ids padded on the left, and whatever else it cannot do without."""
    config: Any = model.config
    needed = inspect.signature(model.forward).parameters
    main = _main(model)
    made: dict[str, Tensor] = {}
    if main == "input_ids":
        width = max(map(len, prompts))
        made["input_ids"] = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        if "attention_mask" in needed:
            made["attention_mask"] = torch.tensor(
                [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            )
    draw = torch.Generator().manual_seed(prompts[0][0])
    sees = getattr(config, "vision_config", None)
    if main == "pixel_values" or (sees is not None and "pixel_values" in needed and not _generates(model)):
        made["pixel_values"] = torch.randn(len(prompts), *_image(sees or config), generator=draw)
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 512)
        made[main] = torch.randn(len(prompts), getattr(config, "num_mel_bins", 80), frames, generator=draw)
    if main == "input_values":
        made[main] = torch.randn(len(prompts), 4000, generator=draw)
    if getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None) or 0
        tail = min(4, *map(len, prompts))
        made["decoder_input_ids"] = torch.tensor([[start, *prompt[:tail]] for prompt in prompts])
    dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in made.items()}


def _main(model: nn.Module) -> str:
    return str(model.main_input_name)


def _generates(model: nn.Module) -> bool:
    return bool(model.can_generate())  # type: ignore[operator]


def _image(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or 224
    high, wide = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), high, wide


@torch.inference_mode()
def _outputs(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with _run(model):
        output = model(**given)
    named = {name: one for name, one in output.items() if isinstance(one, Tensor) and one.is_floating_point()}
    kept = [one for name, one in named.items() if "logits" in name]
    kept = kept or [named[name] for name in _OUTPUTS if name in named]
    return torch.cat([one.float().reshape(-1) for one in kept])


@torch.inference_mode()
def _generated(model: nn.Module, prompt: Sequence[int]) -> Tensor:
    transformers = imported()
    config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = torch.tensor([list(prompt)])
    with quiet(transformers), _run(model):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
    return torch.stack(made.logits).float().reshape(-1)


@contextmanager
def _run(model: nn.Module) -> Iterator[None]:
    """A refusal of the model's own code, in a sentence."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:  # some mix dtypes, or need a GPU
        told = f"{type(model).__name__} does not run in {str(model.dtype).removeprefix('torch.')} here"
        raise CheckpointError(f"{told}: {error}") from error


@contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[bool]:
    """The model with this attention, or False where it does not have that."""
    config: Any = model.config
    before = config._attn_implementation
    try:
        with quiet(imported()):
            model.set_attn_implementation(name)  # type: ignore[operator]
    except (ValueError, ImportError):
        yield False
        return
    try:
        yield True
    finally:
        with quiet(imported()):
            model.set_attn_implementation(before)  # type: ignore[operator]

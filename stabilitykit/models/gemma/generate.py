"""Continue a prompt, one forward pass per token."""

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.model import Gemma


@overload
def generate(
    model: Gemma,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float | None = 1.0,
    top_p: float = 0.95,
    top_k: int = 64,
    seed: int | None = None,
    padding: None = None,
) -> list[int]: ...


@overload
def generate(
    model: Gemma,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float | None = 1.0,
    top_p: float = 0.95,
    top_k: int = 64,
    seed: int | None = None,
    padding: Tensor | None = None,
) -> list[list[int]]: ...


@torch.no_grad()
def generate(
    model: Gemma,
    tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float | None = 1.0,
    top_p: float = 0.95,
    top_k: int = 64,
    seed: int | None = None,
    padding: Tensor | None = None,
) -> list[int] | list[list[int]]:
    """The new token ids after a prompt, up to the first `<eos>`, which is left out.

    A list of ids gives a list, a tensor [B, T] a list for each of its rows; rows shorter than T are padded on the
    left, and `padding` [B, T] is True where a real token stands. Temperature None or 0 is greedy, as in
    gemma_pytorch. The same `seed` gives the same tokens on one machine; None takes torch's global generator.
    Raises MisuseError for an empty prompt, and what the sampler raises when the logits are not finite: greedy
    decoding hides that and prints token 0, `<pad>`.
    """
    tokens_BT = tokens if isinstance(tokens, Tensor) else torch.tensor([list(tokens)], dtype=torch.int64)
    answers = decode(
        model,
        tokens_BT,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        padding=padding,
    )
    return answers if isinstance(tokens, Tensor) else answers[0]


def decode(
    model: Gemma,
    tokens_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float,
    top_k: int,
    seed: int | None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    every_logit: bool = False,
    saw: Callable[[Tensor], bool] | None = None,
) -> list[list[int]]:
    """What `generate` does, step by step: `saw` is called with each step's logits before a token is drawn from them.

    The logits are those of the last position [B, 1, V], or of all that the step computed, [B, T, V], with
    `every_logit`. Where `saw` returns True, that step's token is the last. `mask`, as in the model's `forward`, serves
    one step alone. Raises MisuseError for an empty prompt and for a mask with more than one new token.
    """
    if tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
        raise MisuseError(f"A prompt is at least one token, in a tensor [B, T]; it has shape {list(tokens_BT.shape)}.")
    if mask is not None and max_new_tokens != 1:
        raise MisuseError(
            f"A mask of one's own fits one step; {max_new_tokens} new tokens need one each: leave it out."
        )
    tokens_BT = tokens_BT.to(model.device)
    batch, length = tokens_BT.shape
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    cache = None
    if max_new_tokens > 1:
        room = length + max_new_tokens
        cache = KVCache(model.config, batch=batch, length=room, dtype=model.dtype, device=model.device)

    answers: list[list[int]] = [[] for _ in range(batch)]
    running = set(range(batch))
    for _ in range(max_new_tokens):
        logits_BTV = model(tokens_BT, padding=padding, mask=mask, cache=cache, last_only=not every_logit)
        last = saw is not None and saw(logits_BTV)
        ids_B = model.sampler(
            logits_BTV[:, -1], temperature=temperature or None, top_p=top_p, top_k=top_k, generator=generator
        )
        for row, token in enumerate(ids_B.tolist()):
            if token == model.eos:
                running.discard(row)
            elif row in running:
                answers[row].append(token)
        if last or not running:
            break
        tokens_BT = ids_B[:, None]
        if padding is not None:
            padding = torch.cat((padding, padding.new_ones(batch, 1)), dim=1)
    return answers

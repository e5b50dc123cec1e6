"""Continue a prompt, one forward pass per token."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.model import Gemma
from stabilitykit.models.subject import Continuation, Sampling, Saw


@overload
def generate(
    model: Gemma, tokens: Sequence[int], *, max_new_tokens: int, sampling: Sampling = ..., padding: None = None
) -> list[int]: ...


@overload
def generate(
    model: Gemma, tokens: Tensor, *, max_new_tokens: int, sampling: Sampling = ..., padding: Tensor | None = None
) -> list[list[int]]: ...


@torch.no_grad()
def generate(
    model: Gemma,
    tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(seed=None),  # noqa: B008  frozen
    padding: Tensor | None = None,
) -> list[int] | list[list[int]]:
    """The new token ids after a prompt, up to the first `<eos>`, which is left out.

    A list of ids gives a list, a tensor [B, T] a list for each of its rows; rows shorter than T are padded on the
    left, and `padding` [B, T] is True where a real token stands. The same seed gives the same tokens on one machine.
    Raises MisuseError for an empty prompt, and what the sampler raises when the logits are not finite. Greedy
    decoding raises nothing: of a row with NaN it takes the first NaN, of one of -inf alone token 0, `<pad>`.
    """
    tokens_BT = tokens if isinstance(tokens, Tensor) else torch.tensor([list(tokens)], dtype=torch.int64)
    answers = decode(model, tokens_BT, Continuation(new_tokens=max_new_tokens, sampling=sampling, padding=padding))
    return answers if isinstance(tokens, Tensor) else answers[0]


def decode(model: Gemma, tokens_BT: Tensor, how: Continuation, saw: Saw | None = None) -> list[list[int]]:
    """What `generate` does, step by step, with `saw` looking at each step's logits.

    Raises MisuseError for an empty prompt and for a mask with more than one new token.
    """
    if tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
        raise MisuseError(f"A prompt is at least one token, in a tensor [B, T]; it has shape {list(tokens_BT.shape)}.")
    if how.mask is not None and how.new_tokens != 1:
        raise MisuseError(f"A mask serves one new token; {how.new_tokens} were asked for: leave the mask out.")
    sampling, padding = how.sampling, how.padding
    tokens_BT = tokens_BT.to(model.device)
    batch, length = tokens_BT.shape
    generator = None if sampling.seed is None else torch.Generator(model.device).manual_seed(sampling.seed)
    cache = None
    if how.new_tokens > 1:
        most = length + how.new_tokens
        cache = KVCache(model.config, batch=batch, length=most, dtype=model.dtype, device=model.device)

    answers: list[list[int]] = [[] for _ in range(batch)]
    running = set(range(batch))
    for _ in range(how.new_tokens):
        logits_BTV = model(tokens_BT, padding=padding, mask=how.mask, cache=cache, last_only=not how.every_logit)
        last = saw is not None and saw(logits_BTV)
        ids_B = model.sampler(
            logits_BTV[:, -1],
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            generator=generator,
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

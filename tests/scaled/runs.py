"""What models are run on: prompts with decoding steps, batches padded on the left, images and sound."""

from typing import Any

import torch
from torch import Tensor, nn

from scaled.entry import Run

VOCABULARY = 120
PAD = 0
_FIRST = 3  # the ids before it are special


def ids(length: int, seed: int = 1, rows: int = 2) -> Tensor:
    return torch.randint(_FIRST, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(output: Any) -> dict[str, Any]:
    """The cache that a step returned, by the name under which the next one takes it."""
    return {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}


def decoded(prompt: Tensor, steps: int = 2, **given: Tensor) -> Run:
    """A prefill of all but the last `steps` tokens, then one token at a time with the cache: the logits of each."""

    def run(model: Any) -> tuple[Tensor, ...]:
        first = prompt.shape[1] - steps
        output = model(input_ids=prompt[:, :first], use_cache=True, **given)
        found = [output.logits]
        for at in range(first, prompt.shape[1]):
            output = model(input_ids=prompt[:, at : at + 1], use_cache=True, **kept(output))
            found.append(output.logits)
        return tuple(found)

    return run


def padded(length: int = 9, seed: int = 5) -> Run:
    """One prefill of a batch whose first row is padded on the left."""
    prompt, mask = ids(length, seed), torch.ones(2, length, dtype=torch.long)
    prompt[0, :4], mask[0, :4] = PAD, 0

    def run(model: Any) -> tuple[Tensor, ...]:
        return (model(input_ids=prompt, attention_mask=mask).logits,)

    return run


def generated(prompt: Tensor, tokens: int = 12, **given: Any) -> Run:
    """The logits of so many greedy steps; the tokens follow from them."""

    def run(model: Any) -> tuple[Tensor, ...]:
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=PAD, output_logits=True, return_dict_in_generate=True, **given,
        )  # fmt: skip
        return tuple(made.logits)

    return run


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def called(*outputs: str, **given: Tensor) -> Run:
    """One call; of what it returns these. Tensors of floats are given in the model's dtype."""

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        dtype = dtype_of(model)
        made = model(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()})
        return tuple(made[name] for name in outputs)

    return run


def answered(prompt: Tensor, steps: int = 2, **given: Tensor) -> Run:
    """`given` through the encoder, then `prompt` through the decoder with its cache: all but `steps` tokens at once."""

    def run(model: Any) -> tuple[Tensor, ...]:
        first = prompt.shape[1] - steps
        dtype = dtype_of(model)
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
        output = model(**cast, decoder_input_ids=prompt[:, :first], use_cache=True)
        read: dict[str, Any] = {"encoder_outputs": (output.encoder_last_hidden_state,)}
        read |= {name: tensor for name, tensor in given.items() if name == "attention_mask"}
        found = [output.logits]
        for at in range(first, prompt.shape[1]):
            output = model(**read, decoder_input_ids=prompt[:, at : at + 1], use_cache=True, **kept(output))
            found.append(output.logits)
        return tuple(found)

    return run

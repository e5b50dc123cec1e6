"""What a model is given while it is repaired: windows of text, or inputs from the user's files; and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers import HuggingFaceModel
from stabilitykit.run.windows import Texts, texts
from stabilitykit.scaling.subjects import fitted

_FEW = 4  # tokens, to see whether a model can be called

Inputs = Mapping[str, Tensor]
"""What one forward pass is given, by the names of its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Inputs that choose a scaling, and others, unless there is but one, that rank remedies."""

    choosing: tuple[Inputs, ...]
    held_out: tuple[Inputs, ...]


def samples_for(
    subject: Subject,
    *,
    prompts: Sequence[Path] = (),
    bos: bool = True,
    inputs: Sequence[Path] = (),
    held_out: int | None = None,
) -> Samples:
    """Windows of the kit's own texts, as many as have `held_out` tokens, and the user's `prompts` among those that
    choose; or `inputs`, safetensors files with tensors by the names of the model's arguments, for any model. Of these
    the first chooses and the others rank; one alone does both.

    Raises MisuseError, with what to do, for a model that reads no text and is given no `inputs`, and for files that
    cannot be read, or that do not hold what the model takes.
    """
    if inputs:
        read = tuple(map(_read, inputs))
        for one in read:
            _check(subject, one)
        return Samples(choosing=read[:1], held_out=read[1:] or read)
    if isinstance(subject, HuggingFaceModel):
        tokenizer, main = subject.tokenizer, subject.causal.main_input_name
        if tokenizer is None or main != "input_ids":
            raise MisuseError(
                f"{subject.source} reads {main}, and no text: its inputs cannot be made up. Give it some with --inputs "
                f"FILE, a safetensors file that holds {main} and whatever else its forward takes."
            )
        found = texts(subject.context, tokenizer, prompts, bos=bos, held_out=held_out)
    elif isinstance(subject.module, Gemma) and subject.module.tokenizer is not None:
        found = texts(subject.context, subject.module.tokenizer, prompts, bos=bos, held_out=held_out)
    else:
        raise MisuseError("A model that came without a tokenizer is repaired on --inputs, files of tensors.")
    made = of_texts(subject, found)
    _check(subject, {name: ids[:, :_FEW] for name, ids in made.choosing[0].items()})
    return made


def _check(subject: Subject, inputs: Inputs) -> None:
    """Raises MisuseError for inputs that the model cannot be called with."""
    with torch.inference_mode():
        answer(subject.module, inputs)


def of_texts(subject: Subject, found: Texts) -> Samples:
    """Windows as inputs: of a model with an encoder and a decoder the first half of each and the second."""

    def made(window: Sequence[int]) -> Inputs:
        return as_inputs(subject, window)

    return Samples(choosing=tuple(map(made, found.choosing)), held_out=tuple(map(made, found.held_out)))


def as_inputs(subject: Subject, tokens: Sequence[int]) -> Inputs:
    """A row of tokens as the arguments of one call: of an encoder and a decoder the first half and the second."""
    ids = torch.tensor([list(tokens)])
    config = getattr(subject.module, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    half = max(len(tokens) // 2, 1)
    start = getattr(config, "decoder_start_token_id", None)
    first = torch.full((1, 1), start if start is not None else subject.pad)
    return {"input_ids": ids[:, :half], "decoder_input_ids": torch.cat((first, ids[:, half:]), dim=1)}


class Answer(NamedTuple):
    """What a forward pass returned that is compared: `values` [..., V], and whether they are `logits` of V choices."""

    values: Tensor
    logits: bool


def answer(module: nn.Module, inputs: Inputs) -> Answer:
    """One forward pass: its logits where there are any, else the first tensor of numbers that it returns.

    The inputs are `fitted` to the model. Raises MisuseError for inputs that it cannot be called with.
    """
    given = fitted(inputs, module)
    if isinstance(module, Gemma):
        return Answer(module(given["input_ids"]), logits=True)
    try:
        output = module(**given)
    except (TypeError, ValueError, AttributeError) as error:  # an argument too many, or too few
        raise MisuseError(
            f"{type(module).__name__} cannot be called with {', '.join(inputs)}: {str(error).rstrip('.')}. A file of "
            "tensors names each by the argument of the model's forward that it is."
        ) from error
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return Answer(logits, logits=True)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return Answer(next(one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()), logits=False)


def following(module: nn.Module, inputs: Inputs) -> Tensor | None:
    """Of a language model that continues a text, the tokens that it answers for, [B, T]; None for any other."""
    if isinstance(module, Gemma):
        return inputs["input_ids"]
    generates = getattr(module, "can_generate", None)
    if generates is None or not generates():
        return None
    return inputs.get("decoder_input_ids", inputs.get("input_ids"))


def _read(path: Path) -> Inputs:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MisuseError(f"{path} cannot be read as a safetensors file: {error}.") from None

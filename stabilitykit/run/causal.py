"""Whether a model's tokens see later ones, found by changing the last of a few."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stabilitykit.models.gemma import Gemma
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.model import run_on

_FEW = 8  # tokens


def looks_back(subject: Subject, tokens: Sequence[int]) -> bool:
    """Whether no answer depends on a later token: with another last token, all before it are the same bits.

    Seen on the first few tokens. A single one has nothing before it; the kit's own Gemma is causal by its own tests. Of
    a model that gives one answer for all of a text it is False.
    """
    if isinstance(subject.module, Gemma) or len(tokens) < 2:
        return True
    row = torch.tensor([list(tokens[:_FEW])], device=subject.device)
    other = row.clone()
    other[0, -1] = 1 if row[0, -1] == 0 else 0
    with torch.inference_mode():
        one, two = (_answer(run_on(subject.module, subject.arguments(ids))) for ids in (row, other))
    if one.ndim < 3 or one.shape[1] != row.shape[1]:
        return False
    return bool(torch.equal(one[:, :-1].nan_to_num(), two[:, :-1].nan_to_num()))


def _answer(output: Any) -> Tensor:
    """The logits of an output, or else the first tensor of numbers that it holds."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return next(one for one in leaves if isinstance(one, Tensor) and one.is_floating_point())

"""Each row of a batch alone, without its padding: padding tokens have numbers too, which may be what overflows."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.answers import answers
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.batches import joined
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation
from stabilitykit.words import counted

NAME = "without padding"
_MASK = "attention_mask"
_NOT_COMPUTED = ("weight", "input", "constant")  # of a break that no token has a part in
_COMMAND = "[model(ids[None, keep]) for ids, keep in zip(input_ids, attention_mask.bool())]"


def without_padding(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where what broke stands at padding, or in a row of a mask that hides all its keys."""
    broke = situation.broke
    if broke is None or broke.broke is None or situation.is_outside or situation.kind in _NOT_COMPUTED:
        return
    mask = _mask_of(situation)
    if mask is None or not _stands_at(mask, broke.broke.row, broke.broke.position, situation.kind == "masked-row"):
        return
    calls = 1 + max(one.step for one in situation.low)
    if calls > 1:
        yield LeftOut(
            NAME, f"The model is called {calls:,} times; run each row of the batch alone without its padding."
        )
        return
    padded = int((~mask).any(-1).sum())
    yield Candidate(
        name=NAME,
        summary=f"Runs each row of the batch alone, {counted(padded, 'row')} without padding: nothing that is wanted "
        "depends on it.",
        command=_COMMAND,
        around=_around,
        reference=_around,
    )


def _stands_at(mask: Tensor, row: int | None, position: int | None, hidden: bool) -> bool:
    if bool(mask.all()) or not bool(mask.any(-1).all()):  # a row of padding alone leaves nothing to run
        return False
    if row is None or row >= len(mask):
        return True
    if position is None or position >= mask.shape[1] or hidden:
        return not bool(mask[row].all())
    return not bool(mask[row, position])


class _EnoughError(Exception):
    """Ends a run that was made to see what a model is given."""


def _mask_of(situation: Situation) -> Tensor | None:
    """Which tokens of the first call are no padding [rows, positions], as its mask says; None where it has none."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = _named(module, args, kwargs).get(_MASK)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            found.append(mask.bool().cpu())
        raise _EnoughError

    @contextmanager
    def around() -> Iterator[None]:
        handle = situation.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    answers(situation.reproduction, situation.model, around=around())
    return found[0] if found else None


def _named(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)


@contextmanager
def _around(model: Any) -> Iterator[None]:
    """Runs what pads its rows row by row, and puts the answers where they would be, with 0 at padding."""
    forward: Callable[..., Any] = model.forward

    def alone(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        mask = given.get(_MASK)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
            return forward(*args, **kwargs)
        keep = mask.bool()
        rows = [
            forward(**{name: _cut(name, one, row, keep) for name, one in given.items()}) for row in range(len(keep))
        ]
        return joined(rows, partial(_batch, keep))

    names = list(inspect.signature(forward).parameters)
    with attribute(model, "forward", alone):
        yield


def _cut(name: str, one: Any, row: int, keep: Tensor) -> Any:
    """What an argument says of a row's own tokens."""
    if not isinstance(one, Tensor) or one.ndim == 0:
        return one
    is_of_tokens = one.ndim > 1 and one.shape[1] == keep.shape[1] and not name.startswith("decoder")
    mine = one[row : row + 1] if one.shape[0] == len(keep) else one
    return mine[:, keep[row].to(one.device)] if is_of_tokens else mine


def _batch(keep: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Their own tokens' places in the batch, and 0 at padding."""
    first = rows[0]
    if first.ndim == 0:
        return torch.stack(list(rows)).mean()
    if first.ndim < 2 or any(one.shape[1] != int(kept.sum()) for one, kept in zip(rows, keep, strict=True)):
        return torch.cat(list(rows))
    made = first.new_zeros((len(rows), keep.shape[1], *first.shape[2:]))
    for row, (one, kept) in enumerate(zip(rows, keep.to(first.device), strict=True)):
        made[row, kept] = one[0]
    return made

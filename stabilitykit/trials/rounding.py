"""A run in which nothing leaves the range, again in ways that round elsewhere: is it rounding that a user sees?"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.records.trials import Rounding
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.answers import Answers, answers
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.batches import apart, calls, other_side, real, repeated, rows_of
from stabilitykit.trials.candidates.attention import with_attention
from stabilitykit.trials.compare import Row, compare, pairs
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import Kept, dtype_of
from stabilitykit.trials.sampling import settings

CLOSE = 2.0**-4  # of the largest magnitude: what is farther is no rounding of 16 bits
_TIMES = (2, 8)  # as many rows
_ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to run it. `mode`: it may run inside a mode of torch's, which compiled code may not."""

    name: str
    around: Callable[[nn.Module], AbstractContextManager[Any]]
    mode: bool = True


def rounding(models: Kept, wide: nn.Module, *, compiled: bool = False) -> tuple[tuple[Rounding, ...], tuple[str, ...]]:
    """The failing dtype's run in batches of other sizes, with padding on the other side, with other implementations of
    attention and, if asked for, compiled; and notes on those ways that could not be run, or are not the same model: one
    that draws random numbers returns others in another batch.

    Tokens are chosen greedily, so that none is drawn. `wide` is the model in a wider dtype, with which all are
    compared.
    """
    greedy = Altered(models.of, partial(settings, greedy=True))
    model = models.model(models.of.dtype)
    plain = answers(greedy, model)
    reference = answers(greedy, wide, recast=Recast(getattr(torch, dtype_of(wide))))
    company = _company(greedy, model)
    found, notes = [], []
    for way in _ways(company, model, compiled):
        made = answers(greedy if way.mode else _Bare(greedy.of, greedy.around), model, around=way.around(model))
        made = _regrouped(made, plain)
        if made.error is not None:
            notes.append(f"{way.name}: {made.error}")
        elif compare(made, plain).error:
            one = _measured(way.name, made, plain, reference, None if company is None else company.real)
            if (one.distance.error_max or 0.0) > CLOSE:
                notes.append(f"with {way.name} it returns something else, by more than rounding can do")
            else:
                found.append(one)
    return tuple(found), tuple(notes)


class _Bare(Altered):
    """Inside no mode."""

    @property
    def matmul(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Company:
    """What the model's caller calls: its name, the rows that it is given, and which of their tokens are no padding."""

    name: str
    rows: int | None
    real: Tensor | None


def _ways(company: _Company | None, model: nn.Module, compiled: bool) -> Iterator[_Way]:
    if company is not None and company.rows is not None:
        if company.rows > 1:
            yield _Way("single rows", partial(calls, partial(apart, 1)))
        for times in _TIMES:
            yield _Way(f"a batch of {company.rows * times}", partial(calls, partial(repeated, times)))
        takes = inspect.signature(model.forward).parameters
        if company.real is not None and company.name == "forward" and "position_ids" in takes:
            yield _Way("padding on the other side", partial(calls, other_side))
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    for name in _ATTENTIONS if own is not None and hasattr(model, "set_attn_implementation") else ():
        if name != own and _has(model, name, str(own)):
            yield _Way(f"{name} attention", partial(with_attention, name))
    if compiled:
        yield _Way("torch.compile", _compiled, mode=False)


def _company(greedy: Altered, model: nn.Module) -> _Company | None:
    seen: list[_Company] = []

    def look(call: Callable[..., Any]) -> Callable[..., Any]:
        def looking(*args: Any, **kwargs: Any) -> Any:
            seen.append(_Company(getattr(call, "__name__", "forward"), rows_of(args, kwargs), real(args, kwargs)))
            return call(*args, **kwargs)

        return looking

    answers(greedy, model, around=calls(look, model))
    return seen[0] if seen else None


def _has(model: Any, name: str, own: str) -> bool:
    """Whether the architecture has this implementation; transformers says so only when asked to use it."""
    try:
        model.set_attn_implementation(name)
    except ValueError:
        return False
    finally:
        model.set_attn_implementation(own)
    return True


@contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    torch._dynamo.reset()
    try:
        with attribute(model, "forward", torch.compile(model.forward)):
            yield
    finally:
        torch._dynamo.reset()


def _regrouped(made: Answers, plain: Answers) -> Answers:
    """The outputs of calls of more rows, or of fewer at a time, as those of calls of as many rows as there were."""
    if not plain.outputs or not made.outputs:
        return made
    steps, calls_made = len(plain.outputs), len(made.outputs)
    first, own = plain.outputs[0], made.outputs[0]
    if own.shape == first.shape or len(own.shape) < 2 or len(first.shape) < 2:
        return made
    rows = first.shape[0]
    if own.shape[0] > rows:
        outputs = [one.first(rows) for one in made.outputs]
        given = [tuple(_first(one, own.shape[0], rows) for one in ones) for ones in made.given]
        return replace(made, outputs=outputs, given=given)
    if calls_made != steps * rows or own.shape[0] != 1 or not all([*plain.given, *made.given]):
        return made
    outputs = [type(own).joined([made.outputs[row * steps + step] for row in range(rows)]) for step in range(steps)]
    given = []
    for step, expected in enumerate(plain.given):  # masks and positions are left out where a row has no padding
        ids = torch.cat([made.given[row * steps + step][0] for row in range(rows)])
        given.append(expected if torch.equal(ids, expected[0]) else (ids,))
    return replace(made, outputs=outputs, given=given)


def _first(tensor: Tensor, rows: int, kept: int) -> Tensor:
    return tensor[:kept] if tensor.ndim and tensor.shape[0] == rows else tensor


def _measured(name: str, made: Answers, plain: Answers, reference: Answers, tokens: Tensor | None) -> Rounding:
    """Of all rows but those of padding."""
    kept = _no_padding(made, tokens)
    distance = compare(made, plain).distance(kept)
    same = [
        (one == other).float().mean().item()
        for one, other in zip(made.tokens, plain.tokens, strict=False)
        if one.shape == other.shape and one.numel()
    ]
    return Rounding(
        name=name,
        distance=distance,
        wide=compare(made, reference).distance(kept),
        same_tokens=min(same) if same else distance.top1,
        margin=_margin(made, plain, kept),
    )


def _no_padding(made: Answers, tokens: Tensor | None) -> set[Row]:
    padding = set() if tokens is None else set((~tokens).flatten().nonzero()[:, 0].tolist())
    shape = () if tokens is None else tuple(tokens.shape)
    return {
        (number, row)
        for number, output in enumerate(made.outputs)
        for row in output.rows.tolist()
        if output.shape[:-1] != shape or row not in padding
    }


def _margin(made: Answers, plain: Answers, kept: set[Row]) -> float | None:
    """Where the likeliest token is another one, the least difference between the plain run's two largest logits."""
    margins: list[float] = []
    for number, (ours, theirs) in enumerate(pairs(made, plain)):
        if ours.logits and ours.values.shape[-1] > 1:
            counts = torch.tensor([(number, row) in kept for row in ours.rows.tolist()], device=ours.values.device)
            parted = (ours.values.argmax(-1) != theirs.values.argmax(-1)) & counts
            two = theirs.values[parted].float().topk(2, -1).values
            margins += (two[:, 0] - two[:, 1]).tolist()
    return min(margins, default=None)

"""Steps, and the sequences that enter the model in each: their rows, positions and ids."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

Ids = Sequence[int | None]


@dataclass(slots=True, eq=False)
class Stream:
    """A sequence that entered the model: `rows` of `length` each, the first of them at the position `start`.

    `counts` is what its positions count. `tokens` are the ids of this call, by row, and `before` those of the positions
    before it, as far as a cache holds them; None where they are not known. Streams of one `sequence` continue each
    other. `row_from` tells which row of `after`, the one before, each row continues, where that is another one.
    `adrift`: it may go on from a state that the model keeps to itself, so that where it begins is not known.
    """

    name: str
    start: int
    rows: int
    length: int
    counts: str = "token"
    tokens: Sequence[Ids] | None = None
    before: Sequence[Ids] | None = None
    sequence: object = field(default_factory=object)
    after: "Stream | None" = None
    row_from: Sequence[int] | None = None
    adrift: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def known(self) -> Sequence[Ids] | None:
        """The ids of each row from the first position on; None where they are not known."""
        if self.tokens is None:
            return None
        if not self.start:
            return self.tokens
        if self.before is None:
            return None
        return [[*old, *new] for old, new in zip(self.before, self.tokens, strict=True)]

    def token_at(self, row: int | None, position: int | None) -> int | None:
        """The id at a position that counts from the start of this call; None for none."""
        return None if position is None else self.token(row, position + self.start)

    def token(self, row: int | None, position: int) -> int | None:
        """The id at an absolute position. Without a row there has to be only one."""
        if row is None and self.rows != 1:
            return None
        ids = self.tokens if position >= self.start else self.before
        at = position - self.start if position >= self.start else position
        if ids is None or (row or 0) >= len(ids):
            return None
        own = ids[row or 0]
        return own[at] if 0 <= at < len(own) else None


@dataclass(slots=True, eq=False)
class Step:
    """A forward pass: `start` is the position of its first new token, `streams` what entered, by slot.

    `checks` tell, each a boolean or one for every row, that no score of a later key had any weight.
    """

    number: int = 0
    start: int = 0
    streams: list[Stream] = field(default_factory=list)
    checks: list[Any] = field(default_factory=list)

    @property
    def newest(self) -> bool:
        """Whether there is one new position only."""
        return self.start > 0 and all(stream.length <= 1 for stream in self.streams if stream.start >= self.start)

    @property
    def main(self) -> Stream | None:
        """The stream that is continued, if anything is: a decoder's before an encoder's, ids before embeddings."""
        own = [stream for stream in self.streams if stream.tokens is not None]
        return max(own, key=lambda stream: stream.name.startswith("decoder"), default=None)

    @property
    def rows(self) -> int | None:
        found = self.main or next(iter(self.streams), None)
        return None if found is None else found.rows


_INTEGERS = frozenset((torch.int32, torch.int64))
_IDS = re.compile(r"(^|_)(input_ids|input_tokens|ids|tokens|token_ids)$")
_NO_IDS = re.compile(
    r"mask|position|type|time|step|label|target|length|lens|offset|segment|cache|index|indices|slot|size|grid|thw|"
    r"num_|class|seed|scale|bbox|^at$|padding|lang|speaker|special"
)
_EMBEDDED = re.compile(r"(^|_)inputs?_embeds$|^input_?embeddings?$|^embeds$")
_SIGNAL = re.compile(r"feature|pixel|audio|image|video|spectrogram|waveform|input_values|sample|latent")


def _by_place(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


@lru_cache(maxsize=512)
def _of_class(forward: Callable[..., Any]) -> tuple[str, ...]:
    return _by_place(forward)[1:]


def named(module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a call, in order; positional ones without a name in the signature are called by number."""
    names: tuple[str, ...] = ()
    if module is not None and args:
        replaced = vars(module).get("forward")  # on this one module, as accelerate's hooks do
        names = _of_class(type(module).forward) if replaced is None else _by_place(replaced)
    for i, argument in enumerate(args):
        yield names[i] if i < len(names) else f"argument {i}", argument
    yield from kwargs.items()


@dataclass(slots=True, eq=False)
class Entering:
    """A tensor that begins a stream: dimensions of its rows and positions, and its ids if it holds them."""

    name: str
    tensor: Tensor
    row: int | None
    position: int | None
    counts: str
    ids: bool = False


def entering(module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Entering]:
    """What enters with a call of the model.

    Ids are the integer arguments called so, or else the first integer `[L]` or `[B, L]` that is not called anything
    else. Embeddings are arguments called so and other floating `[B, L, D]`; images and sound, whose positions begin
    with a convolution, have rows alone unless they have that shape too.
    """
    integers: list[tuple[str, Tensor]] = []
    floats: list[tuple[str, Tensor]] = []
    for name, argument in named(module, args, kwargs):
        if type(argument) is bool or argument is None:
            continue
        for tensor in _tensors(argument):
            if tensor.dtype in _INTEGERS:
                if tensor.ndim in (1, 2):
                    integers.append((name, tensor))
            elif tensor.is_floating_point() and tensor.ndim > 2:
                floats.append((name, tensor))
    ids = [(name, t) for name, t in integers if _role(name) == "ids"]
    if not ids and not any(_role(name) == "embedded" and t.ndim == 3 for name, t in floats):
        ids = [(name, t) for name, t in integers if not _is_other(name)][:1]
    found = [Entering(name, t, 0 if t.ndim == 2 else None, t.ndim - 1, "token", ids=True) for name, t in ids]
    for name, tensor in floats:
        role = _role(name)
        if role == "other":
            continue
        if tensor.ndim == 3:
            found.append(Entering(name, tensor, 0, 1, "position"))
        elif role == "signal":
            found.append(Entering(name, tensor, 0, None, "position"))
    return found


@lru_cache(maxsize=4096)
def _role(name: str) -> str:
    """What an argument of this name holds."""
    if _EMBEDDED.search(name):
        return "embedded"
    if _IDS.search(name) and not _NO_IDS.search(name):
        return "ids"
    if _SIGNAL.search(name):
        return "signal"
    return "other" if re.search(r"mask|bias|cache|past", name) else ""


@lru_cache(maxsize=4096)
def _is_other(name: str) -> bool:
    return bool(_NO_IDS.search(name))


def entering_part(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Entering]:
    """What enters with a call of a part of the model, such as a decoder: only what is called ids or embeddings."""
    found = []
    for name, tensor in kwargs.items():
        if isinstance(tensor, Tensor):
            if not tensor.is_floating_point() and tensor.ndim == 2 and _role(name) == "ids":
                found.append(Entering(name, tensor, 0, 1, "token", ids=True))
            elif tensor.is_floating_point() and tensor.ndim == 3 and _role(name) == "embedded":
                found.append(Entering(name, tensor, 0, 1, "position"))
    return found


def _tensors(argument: Any) -> Iterator[Tensor]:
    """The plain tensors in an argument; what a cache holds is none of them."""
    if isinstance(argument, Tensor):
        if type(argument) is Tensor:
            yield argument
    elif isinstance(argument, list | tuple):
        for part in argument[:16]:
            if isinstance(part, Tensor) and type(part) is Tensor:
                yield part
    elif isinstance(argument, Mapping):
        for part in list(argument.values())[:16]:
            if isinstance(part, Tensor) and type(part) is Tensor:
                yield part


_CACHES = ("cache", "past_key_values", "cache_params")


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    return next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)


def held(kwargs: Mapping[str, Any]) -> int:
    """The number of tokens before those of this call: what its cache holds, or else where its positions begin."""
    cache = cache_of(kwargs)
    count = getattr(cache, "get_seq_length", None)
    if count is not None:
        with suppress(Exception):  # a cache of states alone has no length, and says so
            return int(count())
    if isinstance(cache, list | tuple):
        keys = cached_keys(cache)
        if keys is not None and keys.ndim == 4:
            return int(keys.shape[-2])
    positions = kwargs.get("input_positions")  # gemma_pytorch's, beside caches that are bare tensors
    return int(positions.flatten()[0]) if isinstance(positions, Tensor) and positions.numel() else 0


def cached(cache: Any) -> Iterator[Tensor]:
    """The keys and values that a cache holds, as far as they can be found; their first dimension counts rows."""
    for inner in ("self_attention_cache", "cache"):
        cache = getattr(cache, inner, cache)
    layers = getattr(cache, "layers", None)
    parts: list[Any] = []
    if isinstance(layers, list | tuple):
        parts = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    elif isinstance(cache, list | tuple):
        parts = [part for layer in cache for part in (layer if isinstance(layer, list | tuple) else [layer])]
    else:
        for name in ("key_cache", "value_cache", "_keys", "_values"):
            own = getattr(cache, name, None)
            parts += own if isinstance(own, list) else []
    for part in parts:
        if isinstance(part, Tensor) and part.ndim > 1:
            yield part


def cached_keys(cache: Any) -> Tensor | None:
    """The first of them."""
    return next(cached(cache), None)

"""A key/value cache as it was before a step, without a copy until one is asked for.

A step of transformers' dynamic caches makes new tensors, so that what was there before can be had from a length, or
from a reference where a window dropped the oldest token. A static cache is written in place: what it held before is
what it holds now, up to its old length.
"""

import copy
import weakref
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from stabilitykit.models.gemma import KVCache
from stabilitykit.recorder.places.streams import cached

_GROWS = ("DynamicLayer",)
_SLIDES = ("DynamicSlidingWindowLayer",)
_WRITTEN = ("StaticLayer", "StaticSlidingWindowLayer")


class CannotRepeat(Exception):  # noqa: N818  no error: a step that cannot be run again, said in a break
    """Why a step cannot be repeated."""


class Before(Protocol):
    """A cache before a step."""

    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Any:
        """A copy for a repetition, of these rows or all, in `dtype` or its own. Raises CannotRepeat."""
        ...


def before(cache: Any, new: int) -> Before:
    """`cache` as it is now, before a step of `new` tokens. Nothing waits for a device."""
    if cache is None:
        return _None()
    if isinstance(cache, KVCache):
        return _Own(cache)
    if isinstance(cache, tuple | list):
        return _Tensors(cache)
    if hasattr(cache, "self_attention_cache"):
        return _Both(cache, new)
    if isinstance(getattr(cache, "layers", None), list):
        return _Layers(cache, new)
    return _Unknown(type(cache).__name__)


def _rows_of(tensor: Tensor, rows: Sequence[int] | None, dtype: torch.dtype | None) -> Tensor:
    chosen = tensor.detach() if rows is None else tensor.detach()[list(rows)]
    return chosen.to(dtype or tensor.dtype, copy=True)


def length_of(cache: Any) -> int | Tensor | None:
    """How many tokens `cache` holds; a tensor where nobody knows without waiting for a device."""
    count = getattr(cache, "get_seq_length", None)
    try:
        held = None if count is None else count()
    except Exception:  # a cache of states has no length
        return None
    return held if isinstance(held, int | Tensor) else None


def is_empty(cache: Any) -> bool | None:
    """Whether `cache` holds no token; None where that is not known without waiting for a device."""
    held = length_of(cache)
    if isinstance(held, Tensor):
        counts = (getattr(layer, "cumulative_length_int", None) for layer in getattr(cache, "layers", ()))
        held = next((count for count in counts if count is not None), None)
    return None if held is None else held == 0


class Left:
    """What a cache held when a step ended, by which it is seen whether anybody but a step has changed it since.

    Beam search moves its rows, assisted generation cuts its end off, a server empties it or gives a row to another
    request. Tensors made in inference mode do not tell what is written into them, only whether they are others.
    """

    def __init__(self, cache: Any) -> None:
        self._tensors = [_Left(one) for one in _first(cache)]
        self._length = length_of(cache)

    def changed(self, cache: Any) -> bool:
        now = _first(cache)
        return len(now) != len(self._tensors) or any(
            left.changed(one) for left, one in zip(self._tensors, now, strict=True)
        )

    def cut(self, cache: Any) -> int | None:
        """How many tokens fewer `cache` holds; None where that is not known, and where it holds more."""
        now = length_of(cache)
        if not isinstance(now, int) or not isinstance(self._length, int) or now > self._length:
            return None
        return self._length - now


def _first(cache: Any) -> list[Tensor]:
    """The first layer's keys and values, which tell for all; none of a cache whose layers come and go by themselves."""
    return [] if getattr(cache, "offloading", False) else list(islice(cached(cache), 2))


class _Left:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), _version(tensor)

    def changed(self, tensor: Tensor) -> bool:
        return self._tensor() is not tensor or _version(tensor) != self._version


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _None:
    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> None:
        return None


class _Unknown:
    def __init__(self, name: str) -> None:
        self._name = name

    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Any:
        raise CannotRepeat(f"what a {self._name} held before the step is not known")


class _Own:
    """The kit's."""

    def __init__(self, cache: KVCache) -> None:
        self._cache, self._held = cache, cache.get_seq_length()

    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> KVCache:
        return self._cache.copied(rows=rows, held=self._held, dtype=dtype)


class _Tensors:
    """Keys and values in tuples, which a step does not write to."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Any:
        return _copied(self._cache, rows, dtype)


def _copied(held: Any, rows: Sequence[int] | None, dtype: torch.dtype | None) -> Any:
    if isinstance(held, Tensor):
        return _rows_of(held, rows, dtype)
    return type(held)(_copied(one, rows, dtype) for one in held) if isinstance(held, tuple | list) else held


class _Layers:
    """transformers' Cache, a list of layers."""

    def __init__(self, cache: Any, new: int) -> None:
        self._cache = cache
        self._layers = [_Layer(layer, new) for layer in cache.layers]

    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Any:
        made = copy.copy(self._cache)
        made.layers = [layer.copy(rows, dtype) for layer in self._layers]
        return made


class _Both:
    """An encoder's and a decoder's."""

    def __init__(self, cache: Any, new: int) -> None:
        self._cache = cache
        self._own, self._cross = _Layers(cache.self_attention_cache, new), _Layers(cache.cross_attention_cache, 0)
        self._updated = dict(cache.is_updated)

    def copy(self, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Any:
        made = copy.copy(self._cache)
        made.self_attention_cache, made.cross_attention_cache = (
            self._own.copy(rows, dtype),
            self._cross.copy(rows, dtype),
        )
        made.is_updated = dict(self._updated)
        return made


class _Layer:
    """One layer of a Cache."""

    def __init__(self, layer: Any, new: int) -> None:
        self._layer, self._name = layer, type(layer).__name__
        self._state = dict(vars(layer)) if hasattr(layer, "__dict__") else {}
        self._length = 0
        keys = self._state.get("keys")
        if self._name in _GROWS and isinstance(keys, Tensor):
            self._length = keys.shape[-2] if keys.ndim == 4 else 0
            del self._state["keys"], self._state["values"]  # a reference would keep the old tensors alive
        elif self._name in _WRITTEN:
            held = self._state.get("cumulative_length")
            if isinstance(held, Tensor):
                self._state["cumulative_length"] = held.clone()
        count = self._state.get("cumulative_length_int", 0)
        self._dropped = bool(count) and count + new > self._state.get("max_cache_len", 0)

    def copy(self, rows: Sequence[int] | None, dtype: torch.dtype | None) -> Any:
        if self._name not in (*_GROWS, *_SLIDES, *_WRITTEN):
            raise CannotRepeat(f"what a {self._name} held before the step is not known")
        if self._dropped:
            raise CannotRepeat(f"a {self._name} is written in place, and its window dropped what the step had read")
        made = copy.copy(self._layer)
        vars(made).update(self._state)
        if not self._state.get("is_initialized"):
            made.keys = made.values = None
            made.is_initialized = False
            if self._name in _WRITTEN:
                made.cumulative_length = self._state["cumulative_length"].clone()
            return made
        for name in ("keys", "values"):
            held = self._state.get(name)
            if self._name in _GROWS:
                held = getattr(self._layer, name)[..., : self._length, :]
            if held is not None and held.ndim == 4:
                held = _rows_of(held, rows, dtype)
            setattr(made, name, held)
        if dtype is not None:
            made.dtype = dtype
        if self._name in _WRITTEN:
            made.cumulative_length = self._state["cumulative_length"].clone()
        return made

"""transformers' own plain cache in the place of another one."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from stabilitykit.diagnosis.parts import is_attention
from stabilitykit.models.transformers.backend import imported
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.answers import answers
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation

NAME = "plain cache"


def plain_cache(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where a model of transformers runs with a cache of another class, and what broke is in attention."""
    broke, model = situation.broke, situation.model
    if broke is None or broke.broke is None or not hasattr(model, "config"):
        return
    if broke.broke.origin_kind != "cache" and situation.part != "cache" and not is_attention(broke.module):
        return
    seen = _Seen()
    answers(situation.reproduction, model, around=_watched(seen, model))
    if not seen.others:
        return
    if seen.filled:
        yield LeftOut(
            NAME, f"The {seen.others[0]} that is passed holds keys and values already, which it wrote itself."
        )
        return
    yield Candidate(
        name=NAME,
        summary=f"Keeps keys and values in a DynamicCache, as they are, instead of {_a(seen.others[0])}.",
        command="past_key_values=transformers.DynamicCache(config=model.config)",
        around=_around,
    )


def _a(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


class _Seen:
    """The classes of caches that are not plain, and whether one held something before the model first saw it."""

    def __init__(self) -> None:
        self.others: list[str] = []
        self.filled = False
        self.known: list[Any] = []


def _is_other(cache: Any) -> bool:
    """Whether it is one of transformers' that is not plain: none is where nobody has imported transformers."""
    library: Any = sys.modules.get("transformers")
    if library is None or not isinstance(cache, library.Cache):
        return False
    return type(cache) is not library.DynamicCache and hasattr(cache, "update")


@contextmanager
def _watched(seen: _Seen, model: nn.Module) -> Iterator[None]:
    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        if not _is_other(cache) or any(cache is one for one in seen.known):
            return
        seen.known.append(cache)
        seen.others.append(type(cache).__name__)
        seen.filled = seen.filled or bool(cache.get_seq_length())

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _around(model: Any) -> Iterator[None]:
    """Swaps each cache for a plain one of its own, which later calls with the same one get too."""
    plain: list[tuple[Any, Any]] = []
    new = imported().DynamicCache

    def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if not _is_other(cache):
            return None
        own = next((made for one, made in plain if one is cache), None)
        if own is None:
            own = new(config=model.config)
            plain.append((cache, own))
        return args, kwargs | {"past_key_values": own}

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(swap, with_kwargs=True).remove)
        if hasattr(model, "generate"):
            generate = model.generate

            def generating(*args: Any, **kwargs: Any) -> Any:
                if _is_other(kwargs.get("past_key_values")):
                    kwargs["past_key_values"] = new(config=model.config)
                if kwargs.get("past_key_values") is None:
                    kwargs["cache_implementation"] = None
                return generate(*args, **kwargs)

            stack.enter_context(attribute(model, "generate", generating))
        yield

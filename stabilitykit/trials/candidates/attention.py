"""Other implementations of attention, of a model of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from stabilitykit.diagnosis.outcome import decisive
from stabilitykit.diagnosis.parts import is_attention
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation

_KNOWN = ("eager", "sdpa")
_OWN_STEPS = ("query", "key", "value", "norm", "cache", "angles", "before-norm", "residual", "sum")


def other_attention(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where something breaks between the product of queries and keys and that with values."""
    broke = situation.broke
    if broke is None or not is_attention(broke.module) or "/" not in broke.site:
        return
    if situation.kind in ("weight", "input", "constant"):
        return
    found = _of_transformers(situation.model)
    own = {str(one.config._attn_implementation) for one in found}
    is_known = own <= set(_KNOWN)  # what the caller's own code is like, nobody knows
    if len(own) != 1 or (is_known and situation.part in _OWN_STEPS):
        return
    for name in _KNOWN:
        if name not in own:
            yield _with(name, situation)


def _with(name: str, situation: Situation) -> Candidate | LeftOut:
    called = f"{name} attention"
    try:
        with with_attention(name, situation.model):
            pass
    except ValueError:
        return LeftOut(called, f"{type(situation.model).__name__} has no {name} attention.")
    return Candidate(
        name=called,
        summary=f"Computes attention with transformers' {name} implementation.",
        command=f"from_pretrained(..., attn_implementation={name!r})".replace("'", '"'),
        around=partial(with_attention, name),
        reference=None if decisive(situation.wide) is None else partial(with_attention, name),
    )


def _of_transformers(model: nn.Module) -> Sequence[Any]:
    """The models in it whose config names an implementation."""
    inner: list[Any] = [one for one in model.modules() if hasattr(one, "set_attn_implementation")]
    return [one for one in inner if getattr(getattr(one, "config", None), "_attn_implementation", None) is not None]


@contextmanager
def with_attention(name: str, model: nn.Module) -> Iterator[None]:
    """The models of transformers in this one have that implementation inside the block. Raises ValueError for one that
    they have not.
    """
    with ExitStack() as stack:
        for one in _of_transformers(model):
            stack.callback(one.set_attn_implementation, one.config._attn_implementation)
            one.set_attn_implementation(name)
        yield

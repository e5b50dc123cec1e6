"""Whether scores of keys that are later than their query have any weight: checked on what hides them, once a mask.

A prompt's first tokens alone decide about a position only where this holds. A check waits for no device: its result is
looked at when somebody asks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stabilitykit.models.operators import Traits
from stabilitykit.recorder.places.labels import MINUS, OPEN, ZERO, Labels
from stabilitykit.recorder.places.rules import scores_of
from stabilitykit.recorder.places.streams import Step
from stabilitykit.recorder.tensors import aside

_CARRIES = {
    MINUS: frozenset("add sub cast rsub clone".split()),
    ZERO: frozenset("mul div cast native_dropout dropout neg abs relu clone".split()),
}
FUSED = "scaled_dot_product_attention"


class Labelled(Protocol):
    """Knows the labels of tensors."""

    step: Step

    def of(self, tensor: Tensor) -> Labels: ...
    def entry_of(self, tensor: Tensor) -> object: ...


class Hiding:
    """Remembers, within a step, which masks were checked against which scores."""

    names = frozenset(f"add sub mul div cast exp masked_fill where tril native_dropout neg abs relu {FUSED}".split())

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[int, object]] = {}
        self._scores: dict[tuple[Labels, Labels], Labels] = {}

    def clear(self) -> None:
        self._seen.clear()
        self._scores.clear()

    @staticmethod
    def claim(token: int) -> tuple[int, int]:
        """What is hidden, and the bit of the check that it depends on."""
        number = token >> 2
        return token & 3, 1 << (number - 1) if number else 0

    def look(self, kind: Traits, given: Mapping[str, Any], labelled: Labelled) -> int:
        """A number for what holds of the scores that this call returns; 0: nothing is known to be hidden."""
        if kind.name == FUSED:
            return self._fused(given, labelled)
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        scores = next((t for t in tensors if labelled.of(t).key is not None), None)
        if scores is None:
            return OPEN
        own = labelled.of(scores)
        if own.hidden != OPEN:
            return _carried(kind, given, scores, own.hidden)
        if not own.has_later():
            return OPEN
        mask = _mask(kind, given, scores)
        if mask is None:
            return OPEN
        tensor, hidden = mask[0], mask[3]
        return self._checked(kind.name, tensor, own, mask, hidden, labelled)

    def _fused(self, given: Mapping[str, Any], labelled: Labelled) -> int:
        query, key = labelled.of(given["query"]), labelled.of(given["key"])
        if query.position is None or key.position is None or query.slot != key.slot:
            return OPEN
        pair = query, key
        if pair not in self._scores:
            self._scores[pair] = scores_of(query, key)
        scores = self._scores[pair]
        if not scores.has_later():
            return MINUS
        mask = given.get("attn_mask", given.get("attn_bias"))
        if mask is not None:
            how = (mask, None, None, MINUS)
            return self._checked(FUSED, mask, scores, how, MINUS, labelled)
        if given.get("is_causal", False):
            later = torch.from_numpy(scores.where_later())
            full = later.expand(*later.shape[:-2], *scores.shape[-2:])
            return OPEN if bool(full.tril().any()) else MINUS
        return OPEN

    def _checked(
        self, name: str, tensor: Tensor | None, scores: Labels, mask: "_Mask", hidden: int, labelled: Labelled
    ) -> int:
        if tensor is None:
            return OPEN
        entry = labelled.entry_of(tensor)
        storage = tensor.untyped_storage()._cdata
        key = name, storage, id(entry), tensor.shape, tensor.stride(), tensor.storage_offset(), scores, mask[2], hidden
        found = self._seen.get(key)
        if found is None:
            with aside():
                holds = _holds(tensor, scores, mask)
            checks = labelled.step.checks
            token = OPEN
            if holds is not None and len(checks) < 1000:
                checks.append(holds)
                token = hidden | len(checks) << 2
            found = self._seen[key] = token, entry
        return found[0]


_Mask = tuple[Tensor | None, bool | None, float | None, int]
"""A tensor; whether a boolean one is True where something is seen (None: it is added); what is put in elsewhere; what
that makes of scores."""


def _carried(kind: Traits, given: Mapping[str, Any], scores: Tensor, hidden: int) -> int:
    name = kind.name
    if hidden == MINUS and name == "exp":
        return ZERO
    if hidden == MINUS and name in ("mul", "div"):
        other = given.get("other")
        positive = isinstance(other, int | float) and other > 0
        return MINUS if positive and given.get("self") is scores else OPEN
    if name in ("sub", "div") and given.get("self") is not scores:
        return OPEN
    return hidden if name in _CARRIES[hidden] else OPEN


def _mask(kind: Traits, given: Mapping[str, Any], scores: Tensor) -> _Mask | None:
    name = kind.name
    if name in ("add", "mul"):
        other = given.get("other") if given.get("self") is scores else given.get("self")
        if not isinstance(other, Tensor):
            return None
        return other, None, None if name == "add" else 0.0, MINUS if name == "add" else ZERO
    if name == "masked_fill" and given.get("self") is scores:
        return _placed(given["mask"], False, given["value"], scores)
    if name == "where":
        own = given.get("self") is scores
        return _placed(given["condition"], own, given.get("other" if own else "self"), scores)
    if name == "tril":
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
        with aside():
            return ones.tril(given.get("diagonal", 0)), True, 0.0, ZERO
    return None


def _placed(mask: Tensor, seen: bool, value: Any, scores: Tensor) -> _Mask | None:
    """Where the mask is `seen`, scores stay; elsewhere there is `value`."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.device.type != "cpu":
            return None
        with aside():
            value = float(value)
    if value == 0:
        return mask, seen, 0.0, ZERO
    if isinstance(value, int | float) and scores.is_floating_point() and value <= torch.finfo(scores.dtype).min / 2:
        return mask, seen, float(value), MINUS
    return None


def _holds(tensor: Tensor, scores: Labels, mask: _Mask) -> Tensor | None:
    """Whether no later key is seen, for each row if the scores have rows of their own; None where that cannot be told.

    Where every key of a query is hidden by the same finite number, each has as much weight as the others.
    """
    _, when, value, hidden = mask
    if tensor.is_meta or tensor.ndim > len(scores.shape) or scores.key is None or len(scores.key.dims) != 1:
        return None
    along = scores.key.dims[0]
    blind: Tensor | None = None
    if when is not None:
        seen = tensor if when else ~tensor
    elif tensor.dtype == torch.bool:
        seen = tensor
    elif value == 0.0:
        seen = tensor != 0
    else:
        seen = tensor > torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float32).min / 2
    seen = seen.reshape((1,) * (len(scores.shape) - tensor.ndim) + tuple(tensor.shape))
    finite = hidden == MINUS and (when is None or (value is not None and math.isfinite(value)))
    if finite and tensor.dtype != torch.bool:
        blind = ~seen.any(along)
        if value is None and tensor.is_floating_point():
            whole = tensor.reshape(seen.shape)
            blind &= (whole != -math.inf).any(along)
    elif finite and when is not None:
        blind = ~seen.any(along)
    later = torch.from_numpy(scores.where_later()).to(tensor.device)
    wrong = seen & later
    row = _row_dim(scores, wrong)
    bad = _any_but(wrong, row)
    if blind is not None:
        hidden_rows = _any_but(blind.unsqueeze(along), row)
        bad = bad | hidden_rows
    return ~bad


def _row_dim(scores: Labels, wrong: Tensor) -> int | None:
    if scores.row is None or len(scores.row.dims) != 1:
        return None
    dim = scores.row.dims[0]
    rows: Sequence[int] = scores.row.values.reshape(-1).tolist()
    return dim if wrong.shape[dim] == len(rows) and list(rows) == list(range(len(rows))) else None


def _any_but(found: Tensor, row: int | None) -> Tensor:
    """Whether any is True, for each index of the dimension `row` if there is one."""
    if row is None or found.shape[row] == 1:
        return found.any().reshape(1)
    return found.movedim(row, 0).flatten(1).any(1)

"""A call's tokens, and what is left out of its other arguments along with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.errors import MisuseError
from stabilitykit.trials.minimise import Tokens
from stabilitykit.trials.reproduction import Given, called

_IDS = ("input_ids", "inputs", "tokens", "decoder_input_ids")
_MASKS = ("attention_mask", "mask")  # may have columns for what is in a cache, and come first
_COLUMNS_IN = {"inputs_embeds": 1, "cache_position": 0, "position_ids": -1}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Columns:
    """`args` and `kwargs` of a call with token ids [rows, columns] among them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ids: Tensor

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Columns | None":
        """None where no token ids are among the arguments."""
        named = [kwargs[name] for name in _IDS if name in kwargs]
        ids = next((one for one in (*named, *args) if _are_ids(one)), None)
        return None if ids is None else cls(tuple(args), kwargs, ids)

    @property
    def tokens(self) -> Tokens:
        return tuple(map(tuple, self.ids.tolist()))

    def kept(self, rows: Sequence[int], columns: Sequence[int]) -> Arguments:
        """The arguments with these rows and columns alone, by number.

        Columns are those of tensors of the ids' shape, and of masks, embeddings and positions by their names. Rows are
        those of every tensor that has as many. Raises MisuseError where rows of a cache would have to be left out.
        """
        if len(rows) < len(self.ids) and any(map(_holds_tensors, (*self.args, *self.kwargs.values()))):
            raise MisuseError("A cache that is passed to the model has its own rows, so that none can be left out.")
        return (
            tuple(self._of("", one, rows, columns) for one in self.args),
            {name: self._of(name, one, rows, columns) for name, one in self.kwargs.items()},
        )

    def _of(self, name: str, value: Any, rows: Sequence[int], columns: Sequence[int]) -> Any:
        if not isinstance(value, Tensor):
            return value
        batch, length = self.ids.shape
        made = value
        for dim in self._dims(name, value):
            past = value.shape[dim] - length
            made = made.index_select(dim, torch.tensor([*range(past), *(past + at for at in columns)]).to(made.device))
        by_row = 1 if name == "position_ids" and value.ndim == 3 else 0
        if value.ndim > by_row and name != "cache_position" and value.shape[by_row] == batch > len(rows):
            made = made.index_select(by_row, torch.tensor(rows).to(made.device))
        return made

    def _dims(self, name: str, value: Tensor) -> list[int]:
        """The dimensions that have the columns."""
        length, shape = self.ids.shape[1], value.shape
        if value.ndim == 2 and tuple(shape) == tuple(self.ids.shape):
            return [1]
        if name in _MASKS and value.ndim > 1 and shape[-1] >= length:
            return [value.ndim - 1, *([value.ndim - 2] if value.ndim == 4 and shape[-2] == length else [])]
        dim = _COLUMNS_IN.get(name)
        return [dim] if dim is not None and -value.ndim <= dim < value.ndim and shape[dim] == length else []


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and value.dtype in (torch.int64, torch.int32)
        and value.numel() > 0
    )


def _holds_tensors(value: Any) -> bool:
    """Whether it is a cache, or tensors in a list."""
    return hasattr(value, "get_seq_length") or (
        not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenColumns(Given):
    """A model that is there, called with token ids, some of which can be left out."""

    columns: Columns
    method: str

    @property
    def tokens(self) -> Tokens:
        return self.columns.tokens

    def with_columns(self, rows: Sequence[int], columns: Sequence[int]) -> Given:
        return replace(self, call=called(self.given, self.method, *self.columns.kept(rows, columns)))


def given_call(
    model: nn.Module, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, dtype: str, **how: Any
) -> Given:
    """A model that is there, and a call of one of its methods; with token ids that can be left out, if it has any."""
    call, columns = called(model, method, args, kwargs), Columns.of(args, kwargs)
    if columns is None:
        return Given(model, call, dtype, **how)
    return GivenColumns(model, call, dtype, columns=columns, method=method, **how)

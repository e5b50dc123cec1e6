"""One call of a model, kept so that it can be made again: for some rows, in another dtype, with a copy of its cache."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.guards.breaks import Phase
from stabilitykit.guards.cache import Before, before
from stabilitykit.recorder.places.streams import cache_of, named

_CACHES = ("cache", "past_key_values", "past_key_value", "cache_params")
_IDS = ("input_ids", "decoder_input_ids", "tokens_BT", "inputs_embeds", "decoder_inputs_embeds")
_MASKS = ("attention_mask", "decoder_attention_mask", "padding")
_OF_NO_ROW = ("cache_position",)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A call of `module`, which is the model or the part at `path` that holds its layers.

    `tokens` are the ids [B, T], None of embeddings; `rows` is B and `new` T. `real` [B, T] is True where a token stands
    that is no padding, None where nothing says so. `cache` is the live one, None where there was none, and `before`
    that one as it was before the call.
    """

    path: str
    module: nn.Module
    names: tuple[str, ...]
    arguments: tuple[Any, ...]
    positional: int
    tokens: Tensor | None
    rows: int
    new: int
    real: Tensor | None
    cache: Any
    before: Before

    @classmethod
    def of(cls, path: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Step":
        """Before the call is made."""
        pairs = list(named(module, args, kwargs))
        given = dict(pairs)
        ids = next((given[name] for name in _IDS if isinstance(given.get(name), Tensor)), None)
        if ids is None:
            ids = next((one for one in given.values() if isinstance(one, Tensor) and one.ndim > 1), None)
        rows, new = (1, 1) if ids is None else (ids.shape[0], ids.shape[1])
        whole = ids is not None and ids.ndim == 2 and not ids.is_floating_point()
        mask = next((given[name] for name in _MASKS if isinstance(given.get(name), Tensor)), None)
        real = None
        if new > 1 and mask is not None and mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] >= new:
            real = mask[:, -new:] != 0
        cache = cache_of(given)
        return cls(
            path=path,
            module=module,
            names=tuple(name for name, _ in pairs),
            arguments=tuple(value for _, value in pairs),
            positional=len(args),
            tokens=ids if whole else None,
            rows=rows,
            new=new,
            real=real,
            cache=cache,
            before=before(cache, new),
        )

    def phase(self, number: int) -> Phase:
        return "prefill" if number == 0 or self.new > 1 else "decode"

    def again(
        self,
        module: nn.Module,
        rows: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        cache: Any = None,
    ) -> "Step":
        """The same call of `module` for some rows, or all, its floating arguments in `dtype` where that is given.

        Its cache is `cache`, or else a copy of the live one as it was before. Raises CannotRepeat where there is none.
        """
        held = self.before.copy(rows, dtype) if cache is None else cache

        def fit(name: str, argument: Any) -> Any:
            if name in _CACHES:
                return held
            if name in _OF_NO_ROW:
                return argument
            return tree_map_only(Tensor, lambda one: self._of(one, rows, dtype), argument)

        values = [fit(name, value) for name, value in zip(self.names, self.arguments, strict=True)]
        args = values[: self.positional]
        kwargs = dict(zip(self.names[self.positional :], values[self.positional :], strict=True))
        return Step.of(self.path, module, args, kwargs)

    def run(self) -> Any:
        """Makes the call, without gradients; torch's random numbers go on afterwards as if it had not been made."""
        args = self.arguments[: self.positional]
        kwargs = dict(zip(self.names[self.positional :], self.arguments[self.positional :], strict=True))
        devices = {one.device for one in self.module.parameters() if one.is_cuda}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
            stack.enter_context(torch.no_grad())
            return self.module(*args, **kwargs)

    def _of(self, tensor: Tensor, rows: Sequence[int] | None, dtype: torch.dtype | None) -> Tensor:
        chosen = tensor.detach()
        if rows is not None and self.rows > 1:
            if chosen.ndim and chosen.shape[0] == self.rows:
                chosen = chosen[list(rows)]
            elif chosen.ndim == 3 and chosen.shape[1] == self.rows and not chosen.is_floating_point():
                chosen = chosen[:, list(rows)]  # positions along several axes [3, B, T]
        if dtype is not None and chosen.is_floating_point():
            chosen = chosen.to(dtype)
        return chosen.clone() if chosen is tensor or chosen._base is tensor else chosen

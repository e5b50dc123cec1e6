"""One call of a model, kept so that it can be made again: for some rows, in another dtype, with a copy of its cache."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.guards.breaks import Phase
from stabilitykit.guards.cache import Before, before, is_empty, length_of
from stabilitykit.recorder.places.streams import cache_of, named

_CACHES = ("cache", "past_key_values", "past_key_value", "cache_params")
_IDS = ("input_ids", "tokens_BT", "inputs_embeds")
_MASKS = ("attention_mask", "padding")
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")
_OF_NO_ROW = ("cache_position",)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A call of `module`, which is the model or the part at `path` that holds its layers.

    `tokens` are the ids [B, T], None of embeddings; `rows` is B and `new` T. `real` [B, T] is True where a token stands
    that is no padding, None where nothing says so. `cache` is the live one, None where there was none, and `before`
    that one as it was before the call. `follows`: that is known to have held tokens.
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
    follows: bool

    @classmethod
    def of(cls, path: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Step":
        """Before the call is made."""
        pairs = list(named(module, args, kwargs))
        given = dict(pairs)
        masks: Sequence[str] = ("decoder_attention_mask",)
        ids = _first(given, _DECODED)
        if ids is None and _decodes_its_labels(module, given):
            ids = given["labels"]
        elif ids is None:
            ids, masks = _first(given, _IDS), _MASKS
        if ids is None:
            ids = next((one for one in given.values() if isinstance(one, Tensor) and one.ndim > 1), None)
        rows, new = (1, 1) if ids is None else (ids.shape[0], ids.shape[1])
        whole = ids is not None and ids is not given.get("labels") and ids.ndim == 2 and not ids.is_floating_point()
        cache, mask = cache_of(given), _first(given, masks)
        real = None
        if new > 1 and mask is not None and mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] >= new:
            real = _of_these(mask, new, cache) != 0
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
            follows=is_empty(cache) is False,
        )

    def phase(self, number: int) -> Phase:
        return "decode" if self.new == 1 and (number > 0 or self.follows) else "prefill"

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
            if rows is not None and name == "adapter_names" and len(argument or ()) == self.rows > 1:
                return [argument[row] for row in rows]  # of each row its own, in peft
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


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _decodes_its_labels(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether an encoder and a decoder are called with nothing for the decoder but what it is to learn."""
    both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return bool(both) and isinstance(given.get("labels"), Tensor) and given["labels"].ndim == 2


def _of_these(mask: Tensor, new: int, cache: Any) -> Tensor:
    """The columns of `mask` [B, L] for the tokens of this call: its slots in the cache, else the last ones.

    A mask may be as long as a cache that is written in place, and end in slots that nobody has written.
    """
    if mask.shape[1] == new:
        return mask
    held = length_of(cache)
    if isinstance(held, Tensor):  # on a device, where nothing waits for it
        slots = torch.arange(new, device=held.device) + held
        return mask[:, slots.clamp(max=mask.shape[1] - 1).to(mask.device)]
    if held is not None and held + new <= mask.shape[1]:
        return mask[:, held : held + new]
    return mask[:, -new:]

"""Rows that broke, repeated in a wider dtype and carried on in it to their end, with a key/value cache of their own."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stabilitykit.errors import MisuseError
from stabilitykit.guards.examine import Finding
from stabilitykit.guards.log import told
from stabilitykit.guards.places import logits_of
from stabilitykit.guards.step import Step
from stabilitykit.recorder.places.streams import cache_of
from stabilitykit.trials.reproduction import copied, dtype_of

WideDtype = Literal["float32", "bfloat16"]


_ADAPTERS = ("_active_adapter", "active_adapter", "_disable_adapters", "merged_adapters")  # of peft's modules


class NoWeights(Exception):  # noqa: N818  no error of the pass: said in a break
    """Why there are no weights in the wider dtype."""


def _state(model: nn.Module) -> object:
    """Something else wherever the model's weights, or the adapters that are on, are others."""
    weights = [(id(one), 0 if one.is_inference() else one._version) for one in model.parameters()]
    adapters = [repr(vars(module)[name]) for module in model.modules() for name in _ADAPTERS if name in vars(module)]
    return weights, adapters


def check_given(wide: nn.Module, model: nn.Module) -> None:
    """Raises MisuseError unless `wide` is a module apart from `model`, in a dtype in which a retry is of use."""
    if not isinstance(wide, nn.Module):
        raise MisuseError(f"wide expects a torch.nn.Module, got {type(wide).__name__}.")
    if {id(one) for one in wide.modules()} & {id(one) for one in model.modules()}:
        raise MisuseError("wide is the guarded model, or shares parts of it; a retry needs a model of its own.")
    dtype = dtype_of(wide)
    if dtype == "float16":
        raise MisuseError("wide is in float16, which is no wider than any other; load it in float32 or bfloat16.")


class WideModel:
    """The same model in `dtype`, made when it is first asked for, or given."""

    strip: Callable[[nn.Module], None] | None = None
    """Takes off a copy what does not belong there."""

    def __init__(self, dtype: WideDtype, given: nn.Module | None = None) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype if given is None else dtype_of(given))
        self.given = given is not None
        self._model = given
        self._made_of: object = None
        self._lock = threading.Lock()

    def of(self, model: nn.Module) -> nn.Module:
        """That of `model` as it is now: made anew where weights or adapters are others. Raises NoWeights."""
        with self._lock:
            if self.given and self._model is not None:
                return self._model
            now = _state(model)
            if self._model is None or now != self._made_of:
                self._model = None  # its memory may be needed for the next
                self._model, self._made_of = self._copy(model), now
            return self._model

    def _copy(self, model: nn.Module) -> nn.Module:
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            made = copied(model, dtype)
        except Exception as error:
            raise NoWeights(f"no copy of the weights in {dtype} could be made ({told(error)})") from error
        if self.strip is not None:
            self.strip(made)
        return made

    def drop(self) -> None:
        """Frees the weights, unless they were given."""
        if not self.given:
            self._model = None


@dataclass(slots=True, eq=False)
class WideRows:
    """Rows of a batch that are in the wider dtype, with their cache, None before the first step of a cache."""

    rows: tuple[int, ...]
    cache: Any = None
    began: bool = False

    def step(self, step: Step, module: nn.Module, dtype: torch.dtype) -> tuple[Step, Tensor]:
        """The live model's step for these rows: the call that was made, and its logits [R, T, V], as they come."""
        again = step.again(module, self.rows, dtype, self.cache if self.began else None)
        output = again.run()
        self.cache = again.cache
        if self.cache is None:
            self.cache = cache_of(output) if isinstance(output, dict) else getattr(output, "past_key_values", None)
        self.began = True
        logits = logits_of(output)
        if logits is None:
            raise ValueError("the model returns no logits")
        return again, logits


def put(logits: Tensor, rows: Sequence[int], wide: Tensor) -> Tensor:
    """`logits` with those of `rows` from the wider step, in the dtype that holds both."""
    dtype = torch.promote_types(logits.dtype, wide.dtype)
    made = logits.to(dtype, copy=True)
    made[list(rows)] = wide.to(dtype)
    return made


def no_use(finding: Finding | str | None, step: Step, model: WideModel, *, parted: bool) -> str | None:
    """Why a wider dtype cannot help this row, or None where it may: what is to blame is the same in any dtype."""
    if not isinstance(finding, Finding):
        return None
    kind, text = finding.broke.kind, finding.text
    if kind == "input" and finding.broke.origin_kind == "cache" and parted:
        return (
            "the batch's cache was cut off, or its rows moved, since a row was retried, which that row's own could not "
            "follow; the batch's is not finite"
        )
    if kind == "input":
        what = "cache" if finding.broke.origin_kind == "cache" else "input"
        return f"the {what} was not finite before the step, which no dtype mends. {text}"
    if kind == "weight" and not model.given:
        return f"a weight is not finite, and a wider copy of it would not be either. {text}"
    if kind == "masked-row" and (step.new == 1 or step.new - 1 in finding.broke.positions):
        return f"every key is masked, so that there is nothing to attend to in any dtype. {text}"
    return None

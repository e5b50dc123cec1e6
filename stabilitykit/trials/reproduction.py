"""A failure that can be run again, in any dtype, each time from the same state."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.errors import MisuseError
from stabilitykit.models.stream import stored_weight
from stabilitykit.recorder.record import unrecorded
from stabilitykit.records.scaling import Scaling
from stabilitykit.scaling.apply import scaled, tensors_by_name, with_settings
from stabilitykit.scaling.blueprint import Blueprint
from stabilitykit.scaling.subjects import blueprint_of

_COPIED_FOR: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
"""The dtype of a copy: one without weights has nothing else that would tell."""


class Reproduction(Protocol):
    """A model and what it is run on. `dtype` is the one that fails.

    `source` is what a command line calls the model, None where it came without a name. `matmul` is how 16-bit products
    are summed, None for as torch does; `grad` whether the run needs gradients. `text` says what a token reads like.
    """

    @property
    def dtype(self) -> str: ...
    @property
    def source(self) -> str | None: ...
    @property
    def matmul(self) -> str | None: ...
    @property
    def grad(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def text(self) -> Callable[[int], str] | None: ...

    def in_dtype(self, dtype: str) -> str:
        """What to type to have the same in another dtype."""
        ...

    def model(self, dtype: str) -> nn.Module:
        """The model in `dtype`, made anew."""
        ...

    def run(self, model: nn.Module) -> Any:
        """Runs a model that `model` made, and returns what the caller of the failing run would get."""
        ...


@dataclass(frozen=True, slots=True)
class Given:
    """A model that is there, and `call`, which runs it or a copy of it in another dtype.

    `casts`: it is the run that casts to `dtype`, by autocasting or in code of its own; the weights stay as they are.
    """

    given: nn.Module
    call: Callable[[nn.Module], Any]
    dtype: str
    casts: bool = False
    reference: nn.Module | None = None
    grad: bool = False
    source: str | None = None
    matmul: str | None = None
    notes: tuple[str, ...] = ()
    text: Callable[[int], str] | None = None

    def in_dtype(self, dtype: str) -> str:
        if self.casts:
            return f"torch.{dtype} where the run casts to torch.{self.dtype}, as in torch.autocast(..., dtype=...)"
        return f"model.to(torch.{dtype})"

    def model(self, dtype: str) -> nn.Module:
        if self.casts:
            dtype = dtype_of(self.given)
        if self.reference is not None and dtype != dtype_of(self.given):
            return copied(self.reference, dtype)
        return copied(self.given, dtype)

    def run(self, model: nn.Module) -> Any:
        return self.call(model)


class Kept:
    """The models of a reproduction, each opened once and left as it is."""

    def __init__(self, reproduction: Reproduction) -> None:
        self.of = reproduction
        self._models: dict[str, nn.Module] = {}

    def on(self, reproduction: Reproduction) -> "Kept":
        """The same models, for one that runs them on something else."""
        made = Kept(reproduction)
        made._models = self._models
        return made

    def model(self, dtype: str) -> nn.Module:
        """In `dtype`, as it is."""
        if dtype not in self._models:
            self._models[dtype] = self.of.model(dtype)
        return self._models[dtype]

    def scaled(self, dtype: str, scaling: Scaling) -> nn.Module:
        """Another one, with its weights and settings scaled in float32 before they are rounded to `dtype`."""
        made = self.of.model(dtype)
        _scale(self.model("float32"), made, scaling)
        return made

    def run(self, model: nn.Module) -> Any:
        """As the reproduction does."""
        return self.of.run(model)

    def drop(self, dtype: str) -> None:
        """The model in `dtype` is needed no more."""
        self._models.pop(dtype, None)


def called(model: nn.Module, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[nn.Module], Any]:
    """Calls `method` of a copy of `model` with copies of the arguments: floating ones in the copy's dtype, where they
    have the model's. A streamer is left out, which would print each run.
    """
    own = getattr(torch, dtype_of(model, (args, kwargs)))
    kept = tree_map_only(Tensor, lambda one: one.detach().clone(), (list(args), dict(kwargs)))
    kept[1].pop("streamer", None)

    def fresh(other: nn.Module) -> Any:
        target = own if other is model else getattr(torch, dtype_of(other))
        try:
            made = copy.deepcopy(kept, {id(model): other})
        except RuntimeError as error:
            raise MisuseError(f"An argument cannot be copied, so that it cannot be passed again: {error}") from error
        cast = tree_map_only(Tensor, lambda one: one.to(target) if one.dtype == own and target != own else one, made)
        for value in cast[1].values():
            _recast_inside(value, own, target)
        return cast

    def call(other: nn.Module) -> Any:
        with unrecorded():
            fresh_args, fresh_kwargs = fresh(other)
        return getattr(other, method)(*fresh_args, **fresh_kwargs)

    return call


def _recast_inside(value: Any, own: torch.dtype, target: torch.dtype, depth: int = 4) -> None:
    """Casts the tensors that a cache holds."""
    if own == target or depth == 0 or isinstance(value, nn.Module | type | Tensor | str):
        return
    if isinstance(value, list | tuple):
        for item in value:
            _recast_inside(item, own, target, depth - 1)
    elif hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            if isinstance(item, Tensor) and item.dtype == own:
                setattr(value, name, item.to(target))
            elif isinstance(item, list) and item and all(isinstance(one, Tensor) for one in item):
                item[:] = [one.to(target) if one.dtype == own else one for one in item]
            else:
                _recast_inside(item, own, target, depth - 1)


def dtype_of(model: nn.Module, arguments: Any = ()) -> str:
    """The dtype of most of a model's floating parameters and buffers. Where there are none it is the one that the model
    was copied for, or that of its `arguments`, or float32.

    Of float8 and narrower ones, in which nothing is computed, there is no word. Raises MisuseError for parameters that
    only a first run makes.
    """
    lazy = next((name for name, one in model.named_parameters() if is_lazy(one)), None)
    if lazy is not None:
        raise MisuseError(
            f"{lazy} of {type(model).__name__} has no numbers yet, because a lazy module makes them in its first run. "
            "Run the model once before it is diagnosed."
        )
    held = _sizes((*model.parameters(), *model.buffers()))
    if not held and model in _COPIED_FOR:
        return _COPIED_FOR[model]
    sizes = held or _sizes(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    most = max(sizes, key=lambda one: sizes[one], default=torch.float32)
    return str(most).removeprefix("torch.")


def _sizes(tensors: Iterable[Tensor]) -> dict[torch.dtype, int]:
    """Elements by dtype, of the floating ones in which something is computed."""
    sizes: dict[torch.dtype, int] = {}
    for one in tensors:
        if one.is_floating_point() and one.element_size() > 1:
            sizes[one.dtype] = sizes.get(one.dtype, 0) + one.numel()
    return sizes


def copied(model: nn.Module, dtype: str) -> nn.Module:
    """A copy in `dtype`, as `from_pretrained` would have made it: what a model of transformers computes for itself,
    such as RoPE's frequencies, is not rounded. Raises MisuseError for a model that cannot be copied.
    """
    try:
        made: nn.Module = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise MisuseError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}), and it is not run as it is, so "
            "that nothing changes in it. Write a file with make(dtype), which builds the model anew: stabilitykit "
            "diagnose FILE.py:make"
        ) from error
    _COPIED_FOR[made] = dtype
    if dtype_of(made) == dtype:
        return made
    own = dict(_computed(made)) if hasattr(getattr(model, "config", None), "to_dict") else {}
    made.to(getattr(torch, dtype))
    for (module, name), buffer in own.items():
        module._buffers[name] = buffer
    return made


def _computed(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
    """The buffers that no checkpoint holds, by module and name."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield (module, name), buffer


def _scale(wide: nn.Module, low: nn.Module, scaling: Scaling) -> None:
    """Scales `low`: its weights become those of `wide`, scaled in float32 and rounded once, and its settings change."""
    made = tensors_by_name(low)
    with torch.no_grad():
        for name, factor in scaling.parameters.items():
            made[name].data = scaled(stored_weight(wide, name), factor).to(made[name])
    set_settings(low, blueprint_of(low), scaling.settings)


def set_settings(model: nn.Module, blueprint: Blueprint | None, settings: Mapping[str, int]) -> None:
    """Multiplies settings of a model's config by powers of two, where its modules have read them.

    The attributes are found by building the model twice on the meta device. Raises MisuseError where settings are to
    change and nothing says how the model is built.
    """
    if not settings:
        return
    if blueprint is None:
        raise MisuseError("This model has no config, so its settings cannot be changed.")
    with torch.device("meta"):
        before = blueprint.build(blueprint.settings)
        after = blueprint.build(with_settings(blueprint.settings, settings))
    old, new = dict(before.named_modules()), dict(after.named_modules())
    for path, module in model.named_modules():
        if path not in old:
            continue
        for name, value in vars(new[path]).items():
            if isinstance(value, float) and value != getattr(old[path], name):
                setattr(module, name, value)


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers go on after the block as if it had not been, whatever was drawn in it."""
    own, python, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(own)
        random.setstate(python)
        np.random.set_state(numbers)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

"""The fewest tensors kept in float32 that leave nothing to overflow, all the rest in float16.

Which they are is read from the records of one float32 run: those that float16 could not hold. Each is necessary, for
rounded to float16 it would be infinite, and together they suffice, for every other tensor was seen to fit.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.recorder.names import CONSTANT, Names, by_operator, site_path
from stabilitykit.recorder.tensors import floating_of_call
from stabilitykit.records import Recording
from stabilitykit.remedies.remedy import Around, LeftOut, Remedy
from stabilitykit.remedies.seen import Seen
from stabilitykit.words import counted

NAME = "float32 islands"


def float32_islands(seen: Seen) -> Remedy | LeftOut:
    """Keeps in float32 what overflowed, for any model; left out where nothing did."""
    if not seen.overflowing:
        return LeftOut(NAME, "No tensor overflows float16, so none has to be float32.")
    return keeping_in_float32(seen)


def keeping_in_float32(seen: Seen, dtype: str | None = None) -> Remedy:
    """What `seen` says is overflowing in float32; where nothing is, no bit changes. `dtype` as in `in_float32_at`."""

    def extra(tokens: int) -> int:
        return 2 * tokens * seen.channels  # float32 instead of float16, one tensor at a time

    many = len(seen.overflowing)
    which, those = ("the one tensor", "it") if many == 1 else (f"the {counted(many, 'tensor')}", "them")
    return Remedy(
        name=NAME,
        summary=f"Keeps in float32 {which} that float16 cannot hold, and rounds what is made of {those} to float16.",
        around=in_float32_at(seen.low, seen.overflowing, dtype, constants=True),
        extra=extra,
        exportable=False,
    )


def in_float32_at(low: Recording, sites: Iterable[str], dtype: str | None = None, *, constants: bool = False) -> Around:
    """Keeps in float32 what is made at `sites`, which are those of `low`, the records of a run in 16 bits.

    `dtype` is the one that they have in it: that of the model, unless the run casts to another. `constants`: so are
    those constants that are made of others there and do not fit; they have no records.
    """
    layout = _layout(low)
    kept = frozenset(layout.operators.get(site, site) for site in sites)

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            _Keeping(model, kept, layout, dtype or low.header.dtype, constants).attach(stack)
            yield

    return around


@dataclass(frozen=True, slots=True)
class _Layout:
    """By operator, named with its number, the dtype in which a plain run stores its result; by module, which operator
    makes what it returns.
    """

    dtypes: Mapping[str, str]
    operators: Mapping[str, str]


def _layout(low: Recording) -> _Layout:
    made = list(by_operator(low))
    return _Layout(
        dtypes={name: record.dtype for name, record in made},
        operators={record.site: name for name, record in made if "/" not in record.site},
    )


class _Keeping:
    """Runs the operators of `kept` in float32; what others make of their results is stored as a plain run stores it."""

    def __init__(self, model: nn.Module, kept: frozenset[str], layout: _Layout, low: str, constants: bool) -> None:
        self.model = model
        self.kept = kept
        self.layout = layout
        self.dtype: torch.dtype = getattr(torch, low)
        self.low = low
        self.names = Names(model)
        self.has_constants = any(f"/{CONSTANT}" in site for site in kept)
        self.keeps_constants = constants

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.model.named_modules():
            made = self.layout.operators.get(site_path(name))
            if made is not None and made not in self.kept and self.layout.dtypes[made] == self.low:
                stack.callback(module.register_forward_hook(self.narrow).remove)
        self.names.attach(stack)  # last, so that what the hooks do still stands in the module that ends
        stack.enter_context(OperatorMode(self.run, given=self.given))

    def narrow(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What a module returns in its input's dtype, as norms do, would be float32 behind an island."""
        return output.to(self.dtype) if isinstance(output, Tensor) and output.dtype == torch.float32 else None

    def given(self, kind: Traits, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator gets: those that are not pointwise, such as products, take no operands of two dtypes."""
        if self.is_mixed(args, kwargs) and not kind.pointwise and not kind.writes_in_place:
            return self.widened(args, kwargs)
        return args, kwargs

    def run(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixed = self.is_mixed(args, kwargs)
        args, kwargs = self.given(kind, args, kwargs)
        output = kind.func(*args, **kwargs)
        site = self.names.of_operator(kind, args, kwargs, output)
        if site is None and self.has_constants and _overflows(args, kwargs, output):
            site = self.names.frames[-1].site(f"{CONSTANT}{kind.name}")
        if site is None and self.has_constants and mixed and isinstance(output, Tensor):
            return self.constant(output)
        if site is None or kind.writes_in_place or not isinstance(output, Tensor):
            return (
                output if site not in self.kept or kind.writes_in_place else self.all_wide(kind, args, kwargs, output)
            )
        if kind.name == "cast" and site not in self.layout.dtypes and output.dtype == self.dtype and self.is_wide(args):
            return args[0]  # a cast that a plain run does not make, of what is float32 only here
        if site in self.kept:
            if output.dtype != self.dtype:
                return output
            args, kwargs = self.widened(args, kwargs)
            return self.names.same(kind.func(*args, **kwargs), output)
        if output.dtype == torch.float32 and self.is_low(site, mixed):
            return self.names.same(output.to(self.dtype), output)
        return output

    def all_wide(self, kind: Traits, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """For an operator that returns several tensors, as fused norms do."""
        args, kwargs = self.widened(args, kwargs)
        made = kind.func(*args, **kwargs)
        for tensor, other in zip(made, outputs, strict=True):
            self.names.same(tensor, other)
        return made

    def constant(self, output: Tensor) -> Tensor:
        """What is made of a constant that is kept and one that is not."""
        if output.dtype != torch.float32:
            return output
        low = output.to(self.dtype)
        return output if self.keeps_constants and not bool(low.isfinite().all()) else self.names.same(low, output)

    def is_mixed(self, args: Any, kwargs: dict[str, Any]) -> bool:
        dtypes = {tensor.dtype for tensor in floating_of_call(args, kwargs) if tensor.ndim}
        return dtypes >= {torch.float32, self.dtype}

    def is_wide(self, args: tuple[Any, ...]) -> bool:
        return isinstance(args[0], Tensor) and args[0].dtype == torch.float32

    def is_low(self, site: str, mixed: bool) -> bool:
        """Whether a plain run stores it in 16 bits; fused kernels, which a dry run has only as their parts, do."""
        stored = self.layout.dtypes.get(site)
        return stored == self.low if stored is not None else mixed

    def widened(self, args: Any, kwargs: dict[str, Any]) -> Any:
        def widen(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype == self.dtype else tensor

        args, kwargs = tree_map_only(Tensor, widen, (args, kwargs))
        if kwargs.get("dtype") == self.dtype:
            kwargs["dtype"] = torch.float32
        return args, kwargs


def _overflows(args: Any, kwargs: Any, output: Any) -> bool:
    """Whether what is not finite is made of what is."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or bool(output.isfinite().all()):
        return False
    return all(bool(one.isfinite().all()) for one in floating_of_call(args, kwargs))

"""Which tensors in a folder's files become which part of which parameter, found by letting transformers load them.

transformers renames, stacks, splits and transposes while it loads: experts that are stored one by one become one
parameter, and a name may lose its prefix. It is given placeholders that hold no values and keep account of what is done
to them. Where more was done to a placeholder than a cast, the same steps are done again to numbers that tell each
element's place in the files, one parameter at a time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.checkpoints.mapped import equal
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.records.scaling import Factor
from stabilitykit.words import listed

aten = torch.ops.aten
ONE = Factor(exponents=(0,))
"""What leaves a tensor as it is."""
# What leaves every element where it is.
_SAME = {aten.detach, aten.alias, aten._to_copy, aten.clone, aten.contiguous, aten.lift_fresh}
# What moves elements, and does nothing else to them.
_MOVED = {
    aten.view, aten._unsafe_view, aten.reshape, aten.cat, aten.stack, aten.split, aten.split_with_sizes, aten.chunk,
    aten.slice, aten.select, aten.transpose, aten.t, aten.permute, aten.unsqueeze, aten.squeeze, aten.unbind,
    aten.index_select, aten.flip,
}  # fmt: skip
_RESHAPED = {aten.view, aten._unsafe_view, aten.reshape}
_UNSET = torch.iinfo(torch.int16).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What is to be done to the tensors in a folder's files, by their names there.

    `factors` are those of tensors that change, and `exact` names those of them that must not be rounded. `dtypes` are
    the ones that plain transformers would hold tensors in, `unused` are those that have no place in the model.
    """

    factors: Mapping[str, Factor]
    dtypes: Mapping[str, torch.dtype]
    unused: tuple[str, ...]
    exact: frozenset[str] = frozenset()


_Made = tuple[Any, tuple[Any, ...], dict[str, Any], int]
"""An operator, its arguments, and which of its results it was; -1 for the only one."""


class Traced(Tensor):
    """A tensor without values that knows how it was made, from a tensor in the files or by an operator from others."""

    made: _Made | str
    blank: Tensor

    @staticmethod
    def __new__(cls, blank: Tensor, made: _Made | str) -> "Traced":
        meta = torch.device("meta")
        self: Traced = torch.Tensor._make_wrapper_subclass(
            cls, blank.shape, strides=blank.stride(), dtype=blank.dtype, device=meta
        )
        self.blank, self.made = blank, made
        return self

    def __repr__(self) -> str:  # type: ignore[override]  # torch's would print values
        return f"Traced({self.made if isinstance(self.made, str) else self.made[0]})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = {key: value for key, value in (kwargs or {}).items() if key not in ("device", "pin_memory")}
        if func._schema.is_mutable:  # as a parameter is filled with random numbers: it is no longer what was stored
            target = args[0]
            target.made = (func, (Traced(target.blank, target.made), *args[1:]), kwargs, -1)
            return target
        given, named = tree_map_only(Traced, lambda one: one.blank, (args, kwargs))
        result = func(*given, **named)
        if isinstance(result, Tensor):
            return Traced(result, (func, args, kwargs, -1))
        return [Traced(one, (func, args, kwargs, index)) for index, one in enumerate(result)]


def placeholders(stored: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, Tensor]:
    """For each tensor in the files, of this dtype and shape, one that transformers can load in its place."""
    return {
        name: Traced(torch.empty(tuple(shape), dtype=dtype, device="meta"), name)
        for name, (dtype, shape) in stored.items()
    }


def stored_factors(model: nn.Module, stored: Mapping[str, Tensor], factors: Mapping[str, Factor]) -> Stored:
    """What `factors`, by the names of `model`'s parameters and persistent buffers, ask of the tensors in its files.

    `model` is one that transformers loaded from `placeholders` of `stored`, the tensors in the files by name. Every
    exponent is carried over element by element: blocks of a parameter that is put together from several tensors become
    factors of these.

    Raises MisuseError for a name that the model does not have, and CheckpointError, by name, for a parameter that is in
    none of the files, that transformers computes from what is stored, and for a tensor of which two parameters ask for
    different things.
    """
    homes = _homes(model)
    wanted = by_every_name(model, stored, factors)
    consumers: dict[str, list[str]] = {}
    for name, tensor in homes.items():
        for source in dict.fromkeys(_sources(tensor)):
            consumers.setdefault(source, []).append(name)
    fed = {id(homes[name]) for names in consumers.values() for name in names}
    lost = [name for name in factors if id(homes[name]) not in fed]
    if lost:
        raise CheckpointError(f"{listed(lost, 3)}: in none of the folder's files, so it cannot be scaled there.")
    return Stored(
        factors=_carried(homes, wanted, consumers, stored),
        dtypes={source: homes[names[0]].dtype for source, names in consumers.items()},
        unused=tuple(name for name in stored if name not in consumers),
    )


def by_every_name(model: nn.Module, stored: Mapping[str, Tensor], factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """The factor of each parameter and persistent buffer, under each of the names that tied ones have.

    Arguments and errors are those of `stored_factors`.
    """
    homes = _homes(model)
    unknown = sorted(factors.keys() - homes.keys())
    if unknown:
        raise MisuseError(
            f"A scaling must name parameters of the model that {type(model).__name__} makes of the folder, and "
            f"{listed(unknown, 3)} {'is' if len(unknown) == 1 else 'are'} none. Was it made for another class?"
        )
    groups: dict[str, set[str]] = {name: {name} for name in homes}
    for one, other in _tied(model, homes, stored):
        joined = groups[one] | groups[other]
        groups |= dict.fromkeys(joined, joined)
    return {name: next((factors[one] for one in sorted(groups[name]) if one in factors), ONE) for name in homes}


def _homes(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by each of their names."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def _tied(model: nn.Module, homes: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names that stand for one parameter in the loaded model, though their placeholders may be two.

    transformers ties two stored tensors where their values are equal.
    """
    first: dict[int, str] = {}
    for name, tensor in homes.items():
        yield name, first.setdefault(id(tensor), name)
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        if name in homes and other in homes and homes[name] is not homes[other]:
            one, two = list(_sources(homes[name])), list(_sources(homes[other]))
            pairs = [(stored[a], stored[b]) for a, b in zip(one, two, strict=False)]
            if len(one) == len(two) and all(not a.is_meta and not b.is_meta and equal(a, b) for a, b in pairs):
                yield name, other


def _sources(tensor: Any) -> Iterator[str]:
    """The names of the stored tensors that this one was made of."""
    if isinstance(tensor, Traced):
        if isinstance(tensor.made, str):
            yield tensor.made
        else:
            yield from _sources(tensor.made[1:3])
    elif isinstance(tensor, list | tuple):
        for one in tensor:
            yield from _sources(one)
    elif isinstance(tensor, dict):
        yield from _sources(list(tensor.values()))


def _carried(
    homes: Mapping[str, Tensor],
    wanted: Mapping[str, Factor],
    consumers: Mapping[str, Sequence[str]],
    stored: Mapping[str, Tensor],
) -> dict[str, Factor]:
    found: dict[str, Factor] = {}
    spread: dict[str, list[str]] = {}  # parameters whose blocks have to be followed, by a tensor that they are made of
    for source, names in consumers.items():
        asked = {(wanted[name].exponents, wanted[name].added) for name in names}
        simple = len(names) == 1 and _moved_by(homes[names[0]]) is None
        if not any(any(wanted[name].exponents) for name in names):
            continue
        if simple:
            found[source] = wanted[names[0]]
        elif len(asked) == 1 and not wanted[names[0]].ends:
            _check_moved(names, homes)
            found[source] = Factor(exponents=wanted[names[0]].exponents, added=wanted[names[0]].added)
        else:
            _check_moved(names, homes)
            spread[source] = list(names)
    maps: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for names in spread.values() for name in names):
        for source, exponents in _spread(name, homes[name], wanted[name], stored).items():
            if source in spread:
                maps[source] = _joined(source, name, maps.get(source), exponents)
    for source, exponents in maps.items():
        added = {wanted[name].added for name in spread[source]}
        if len(added) > 1:
            raise CheckpointError(f"{source} is part of {listed(spread[source], 3)}, of which not all add to it.")
        found[source] = blocks(exponents.where(exponents != _UNSET, 0), added.pop())
    return {source: factor for source, factor in found.items() if any(factor.exponents)}


def _moved_by(tensor: Any) -> Any:
    """The first operator on the way to this tensor that does more than copy it, or None."""
    while isinstance(tensor, Traced) and not isinstance(tensor.made, str):
        func, args = tensor.made[:2]
        if func.overloadpacket not in _SAME:
            return func
        tensor = args[0]
    return None


def _check_moved(names: Sequence[str], homes: Mapping[str, Tensor]) -> None:
    for name in names:
        for func in _operators(homes[name]):
            if func.overloadpacket not in _SAME | _MOVED:
                raise CheckpointError(
                    f"transformers computes {name} from what is stored while it loads it, by {func.overloadpacket}: a "
                    "scaling of it cannot be carried to the files."
                )


def _operators(tensor: Any) -> Iterator[Any]:
    if isinstance(tensor, Traced) and not isinstance(tensor.made, str):
        yield tensor.made[0]
        yield from _operators(tensor.made[1])
    elif isinstance(tensor, list | tuple):
        for one in tensor:
            yield from _operators(one)


def _spread(name: str, tensor: Tensor, factor: Factor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exponents of a parameter's elements, by the stored tensors that these come from, each in its own shape.

    Every element of these has a number, and what the steps that made the parameter make of the numbers tells where each
    one went. A dimension that is one block, and stays a dimension, is cut to its first element: experts are large.
    """
    sources = list(dict.fromkeys(_sources(tensor)))
    free = [dim for dim in range(tensor.ndim) if dim not in factor.ends]
    lines = max(
        ((tensor.shape[dim], found) for dim in free if (found := _lines(tensor, dim)) is not None),
        key=lambda one: one[0],
        default=(0, {}),
    )[1]
    shapes = [[1 if dim == lines.get(one) else size for dim, size in enumerate(stored[one].shape)] for one in sources]
    starts = torch.tensor([0, *map(math.prod, shapes)]).cumsum(0)
    counting = torch.int32 if int(starts[-1]) < 2**31 else torch.int64
    marks = {
        one: torch.arange(int(start), int(end), dtype=counting).reshape(shape)
        for one, shape, start, end in zip(sources, shapes, starts, starts[1:], strict=False)
    }
    places = _again(tensor, marks)
    exponents = by_element(factor, places.shape)
    made = {
        one: torch.full((math.prod(shape),), _UNSET, dtype=torch.int16)
        for one, shape in zip(sources, shapes, strict=True)
    }
    for row in range(len(places)) if places.ndim else [...]:
        where, here = places[row].reshape(-1).long(), exponents[row].reshape(-1)
        owners = torch.bucketize(where, starts, right=True) - 1
        for owner in owners.bincount(minlength=len(sources)).nonzero().reshape(-1).tolist():
            own = owners == owner
            index, asked, map_ = where[own] - starts[owner], here[own], made[sources[owner]]
            before = map_[index]
            map_[index] = asked
            if bool(((before != _UNSET) & (before != asked)).any() or (map_[index] != asked).any()):
                raise _contradiction(sources[owner], name)
    return {one: made[one].reshape(shape) for one, shape in zip(sources, shapes, strict=True)}


def _lines(tensor: Any, dim: int) -> dict[str, int] | None:
    """By stored tensor, which of its dimensions is the dimension `dim` of this one; None where it is no whole one."""
    if isinstance(tensor.made, str):
        return {tensor.made: dim}
    func, args, kwargs, _ = tensor.made
    rule = func.overloadpacket
    if rule in _SAME:
        return _lines(args[0], dim)
    if rule is aten.transpose:
        one, other = (at % tensor.ndim for at in args[1:3])
        return _lines(args[0], {one: other, other: one}.get(dim, dim))
    if rule in (aten.cat, aten.stack):
        at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % tensor.ndim
        parts = [] if at == dim else [_lines(one, dim - (rule is aten.stack and at < dim)) for one in args[0]]
        found: dict[str, int] = {}
        for part in parts:
            if part is None or any(found.get(name, own) != own for name, own in part.items()):
                return None
            found |= part
        return found or None
    return None


def _joined(source: str, name: str, before: Tensor | None, exponents: Tensor) -> Tensor:
    """What two parameters ask of one stored tensor."""
    if before is None:
        return exponents
    if bool(((before != _UNSET) & (exponents != _UNSET) & (before != exponents)).any()):
        raise _contradiction(source, name)
    return torch.where(before != _UNSET, before, exponents)


def _contradiction(source: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{source} becomes part of {name} and of another parameter, or is there twice, with different factors: no "
        "factor of the stored tensor can say that."
    )


def _again(tensor: Any, marks: Mapping[str, Tensor]) -> Any:
    """What the steps that made `tensor` make of other numbers."""
    if isinstance(tensor, Traced):
        if isinstance(tensor.made, str):
            return marks[tensor.made]
        func, args, kwargs, index = tensor.made
        if func.overloadpacket in _SAME:
            return _again(args[0], marks)
        if func.overloadpacket in _RESHAPED:
            return _again(args[0], marks).reshape(args[1])
        result = func(*(_again(one, marks) for one in args), **kwargs)
        return result if index < 0 else result[index]
    if isinstance(tensor, list | tuple):
        return [_again(one, marks) for one in tensor]
    return tensor


def values(tensor: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """What a parameter of a model that was loaded from placeholders would hold, before it is cast to its dtype.

    Memory-mapped where it is one of the `stored` tensors as it is. Raises CheckpointError where transformers computes
    it in a way that cannot be followed.
    """
    if _moved_by(tensor) is not None:
        _check_moved(["a parameter"], {"a parameter": tensor})
    found: Tensor = _again(tensor, stored)
    return found


def by_element(factor: Factor, shape: torch.Size) -> Tensor:
    """The exponent of each element, expanded along dimensions of one block."""
    made = torch.tensor(factor.exponents, dtype=torch.int16)
    made = made.reshape([len(factor.ends.get(dim, (0,))) for dim in range(len(shape))])
    for dim, ends in factor.ends.items():
        made = made.repeat_interleave(torch.tensor(ends).diff(prepend=torch.tensor([0])), dim)
    return made.expand(shape)


def blocks(exponents: Tensor, added: float) -> Factor:
    """The factor with these exponents, in as few blocks as there can be."""
    ends: dict[int, tuple[int, ...]] = {}
    for dim in range(exponents.ndim):
        size = exponents.shape[dim]
        changes = (exponents.narrow(dim, 1, size - 1) != exponents.narrow(dim, 0, size - 1)) if size > 1 else None
        if changes is not None and bool(changes.any()):
            others = [other for other in range(exponents.ndim) if other != dim]
            lines = changes.amax(others) if others else changes
            ends[dim] = (*(int(end) + 1 for end in lines.nonzero().reshape(-1)), size)
    few = exponents
    for dim in range(exponents.ndim):
        first = [0, *ends[dim][:-1]] if dim in ends else [0]
        few = few.index_select(dim, torch.tensor(first))
    return Factor(exponents=tuple(few.reshape(-1).tolist()), ends=ends, added=added)

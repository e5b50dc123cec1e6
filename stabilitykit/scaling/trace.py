"""A trace: one run of a model in 16 bits, with every tensor's exponent as an expression in those of the parameters."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.scaling.blueprint import Blueprint, Follows, followers
from stabilitykit.scaling.call import Call, Known, Rows, is_number, numbers, scalar
from stabilitykit.scaling.exponents import ZERO, Exponents, Expression
from stabilitykit.scaling.following import Following
from stabilitykit.scaling.rules import CUTS, MAKES, MOVES, RULES
from stabilitykit.scaling.rules.moves import is_followed, moved
from stabilitykit.scaling.shadows import Shadow, along, same, values, with_dimensions

Run = Callable[[nn.Module], Any]
"""Runs a model on something, and returns what its caller gets: all of that keeps its scale."""

# An attribute of tensors, so that what a trace knows of one goes when it does.
_KNOWN = "_stabilitykit_known"
_MOST_BLOCKS = 64  # of one parameter
_LOW = (torch.float16, torch.bfloat16)
# Through these a number is remembered by which a tensor was multiplied.
_KEEP_CONSTANT = MOVES | {"mul", "div", "add", "where", "masked_fill"}
# Their results hold whatever the memory held.
_UNMEASURED = frozenset("empty empty_like new_empty empty_strided new_empty_strided empty_permuted".split())


@dataclass(slots=True)
class Parameter:
    """A parameter or persistent buffer: the expressions of its blocks along `dim`, and where these begin and end.

    `blocks` has the number of a block for each index along `dim`. `added` is the c of a gain c + w.
    """

    name: str
    shape: tuple[int, ...]
    expressions: tuple[Expression, ...]
    dim: int = 0
    blocks: tuple[int, ...] = ()
    added: float | None = None
    raw: bool = False
    used: bool = False


@dataclass(slots=True)
class Stored:
    """A tensor that a 16-bit run stores: its exponents, and the largest finite magnitude of each in the traced run."""

    shadow: Shadow
    peaks: dict[Expression, float] = field(default_factory=dict)


@dataclass(slots=True)
class Graph:
    """What a trace found.

    `stored`: by the name of the operator that made it, every tensor that a 16-bit run stores. `settings`: by config
    key, the expression of its exponent. `integral`: expressions that must come out as integers, though they are halves
    of others. `unknown_operators` are those without a rule, counted: what they were given keeps its scale.
    """

    exponents: Exponents
    parameters: dict[str, Parameter]
    settings: dict[str, Expression] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    integral: set[Expression] = field(default_factory=set)
    unknown_operators: Counter[str] = field(default_factory=Counter)
    operators: int = 0
    first: str = ""  # the matrix that is used first: an embedding, or the projection of what comes in

    @property
    def unused(self) -> list[str]:
        """Parameters that no operator was given."""
        return [name for name, one in self.parameters.items() if not one.used]


def trace(model: nn.Module, run: Run, blueprint: Blueprint | None = None) -> Graph:
    """What scales with what in `run(model)`.

    `model` is in bfloat16: casts are then where a float16 run has them, nothing overflows, and branches that are taken
    in float16 alone, such as clamps, are not. It runs once, and again where parts of a parameter turn out to have
    scales of their own. Gradients are off. What the run returns keeps its exponent: every tensor in it.
    """
    follow = followers(model, blueprint)
    first = _Trace(model, follow, {})
    graph = first.of(run)
    blocks = first.blocks()
    return _Trace(model, follow, blocks).of(run) if blocks else graph


class _Trace(Following):  # type: ignore[no-untyped-call]
    def __init__(
        self,
        model: nn.Module,
        follow: Mapping[tuple[str, str], Follows],
        blocks: Mapping[str, tuple[int, tuple[int, ...]]],
    ) -> None:
        super().__init__(model)
        self.follow = follow
        self.exponents = Exponents()
        self.graph = Graph(self.exponents, {})
        self.made: dict[str, Shadow] = {}  # what operators made, float32 included
        self.rewritten: dict[int, tuple[Shadow, int]] = {}  # by memory that was written over, its exponent, and when
        self.owners: dict[tuple[str, str], str] = {}  # module path and attribute -> the parameter's first name
        self.pieces: dict[tuple[str, int], set[tuple[int, ...]]] = defaultdict(set)
        self.linked: dict[str, tuple[str, int]] = {}  # a bias -> the rows of which parameter it is added to
        self.by_module = dict(model.named_modules())
        kept = set(model.state_dict(keep_vars=True))
        names: dict[int, str] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            is_kept = isinstance(tensor, nn.Parameter) or name in kept
            if not is_kept or not is_number(tensor):
                continue
            first = names.setdefault(id(tensor), name)
            path, _, leaf = name.rpartition(".")
            self.owners[path, leaf] = first
            if first == name:
                self.graph.parameters[name] = self._parameter(name, tensor, blocks.get(name))

    def _parameter(self, name: str, tensor: Tensor, blocks: tuple[int, tuple[int, ...]] | None) -> Parameter:
        if blocks is None:
            return Parameter(name, tuple(tensor.shape), (self.exponents.unknown(name, "parameter"),))
        dim, numbered = blocks
        several = tuple(self.exponents.unknown(f"{name}[{number}]", "parameter") for number in range(max(numbered) + 1))
        return Parameter(name, tuple(tensor.shape), several, dim, numbered)

    def of(self, run: Run) -> Graph:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for path, module in self.by_module.items():
                self._introduce(path, module)
            self.attach(stack, self._introduce)
            with self:
                output = run(self.model)
        for tensor in numbers(output):
            for one in values(self.known(tensor).shadow):
                self.exponents.equate(one, ZERO, "the model's output", "the model's output keeps its scale")
        for name, parameter in self.graph.parameters.items():
            if parameter.added is not None and parameter.raw:
                for one in parameter.expressions:
                    why = f"it is used as {parameter.added:g} + w and as w"
                    self.exponents.equate(one, ZERO, name, why)
        return self.graph

    def _introduce(self, path: str, module: nn.Module) -> None:
        """Names the module's parameters: of streamed models they are others at every call."""
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            owner = self.owners.get((path, leaf))
            if owner is not None and tensor is not None and not self._is_known(tensor):
                parameter = self.graph.parameters[owner]
                shadow: Shadow = parameter.expressions[0]
                if parameter.blocks:
                    each = [parameter.expressions[number] for number in parameter.blocks]
                    shadow = along(each, parameter.dim, tensor.ndim)
                self._note(tensor, Known(shadow, parameter=owner))

    def _is_known(self, tensor: Tensor) -> bool:
        return getattr(tensor, _KNOWN, (None, None))[0] is self.exponents

    def known(self, tensor: Tensor) -> Known:
        found: Known = getattr(tensor, _KNOWN)[1] if self._is_known(tensor) else Known()
        if self.rewritten:
            shadow, at = self.rewritten.get(tensor.untyped_storage().data_ptr(), (found.shadow, 0))
            if found.at < at:  # noted before what it shows was written over
                return Known(shadow, site=found.site)
        return found

    def _note(self, tensor: Tensor, known: Known) -> None:
        setattr(tensor, _KNOWN, (self.exponents, known))

    def follows(self, value: float) -> Expression | None:
        """The exponent of the setting that the one attribute of the innermost module with this value follows."""
        path = self.running[-1]
        module = self.by_module.get(path)
        names = (
            [name for name, own in vars(module).items() if isinstance(own, float) and own == value] if module else []
        )
        found = {self.follow[path, name] for name in names if (path, name) in self.follow}
        each = [self._setting(one) for one in sorted(found, key=lambda one: one.key)]
        if len(each) > 1:
            for one in each:
                self.exponents.equate(one, ZERO, path, f"{value:g} may be any of several settings")
        return each[0] if len(each) == 1 else None

    def _setting(self, one: Follows) -> Expression:
        if one.key not in self.graph.settings:
            unknown = self.exponents.unknown(one.key, "setting")
            self.graph.settings[one.key] = self.exponents.times(one.power.denominator, unknown)
        return self.exponents.times(one.power, self.graph.settings[one.key])

    def gain(self, name: str, added: float) -> None:
        parameter = self.graph.parameters[name]
        if parameter.added not in (None, added):
            parameter.raw = True
        parameter.added = added

    def after(self, name: str, site: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.graph.operators += 1
        asked: set[float] = set()

        def follows(value: float) -> Expression | None:
            asked.add(value)
            return self.follows(value)

        call = Call(name, func, args, kwargs, output, site, self.exponents, self.known, follows, self.gain)
        operands = [self.known(one) for one in call.operands]
        for one in operands:
            if one.parameter is not None:
                parameter = self.graph.parameters[one.parameter]
                parameter.used = True
                if not self.graph.first and len(parameter.shape) > 1:
                    self.graph.first = parameter.name
                parameter.raw = parameter.raw or not (name in MOVES or _is_gain(call, one))
        before = call.first() if call.operands and call.operands[0] is args[0] else ZERO
        made = self._result(call)
        self._hold_settings(call, asked)
        shadows = made if isinstance(made, list) else [made] * len(call.outputs)
        if (
            func._schema.is_mutable
            and len(call.outputs) == 1
            and call.outputs[0] is args[0]
            and not same(shadows[0], before)
        ):
            shadows = [self._write_over(call, before, shadows[0])]
        rows = self._rows(call, operands)
        constant = self._constant(call, operands)
        is_view = name in MOVES and bool(operands) and operands[0].parameter is not None
        for place, (tensor, shadow) in enumerate(zip(call.outputs, shadows, strict=False)):
            own = result_site(call.site, place)
            source = operands[0].site if name in MOVES and operands else own
            known = Known(
                ZERO if shadow is None else with_dimensions(shadow, tensor.ndim),
                parameter=operands[0].parameter if is_view and len(call.outputs) == 1 else None,
                rows=rows[place] if rows else None,
                site=source,
                at=self.graph.operators,
                constant=constant,
            )
            if tensor.numel() != 0:
                self._note(tensor, known)
            if name not in MOVES:
                self.made[own] = known.shadow
                self._need_integers(known.shadow)
            if tensor.dtype in _LOW and name not in _UNMEASURED and known.parameter is None:
                self._store(tensor, known, own if name not in MOVES or name == "_to_copy" else None)

    def _write_over(self, call: Call, before: Shadow, made: Shadow) -> Shadow:
        """What an operator that writes in place leaves: in all views of that memory, so that one exponent holds there;
        in a part of it, that of the rest.
        """
        tensor = call.outputs[0]
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize < storage.nbytes():
            return call.equal(before, made, why="it is written into a part of another tensor")
        self.rewritten[storage.data_ptr()] = call.one(made), self.graph.operators
        return made

    def _need_integers(self, shadow: Shadow) -> None:
        for one in values(shadow):
            if any(coefficient.denominator != 1 for _, coefficient in self.exponents.terms(one)):
                self.graph.integral.add(one)

    def _result(self, call: Call) -> Any:
        shadows = call.all()
        rule = RULES.get(call.name)
        if all(isinstance(one, int) and one == ZERO for one in shadows) and not self._has_setting(call):
            return rule(call) if rule is not None and call.name in MAKES and call.outputs else ZERO
        if rule is not None:
            return rule(call)
        self.graph.unknown_operators[call.name] += 1
        for one in shadows:
            call.zero(one, f"{call.name} has no rule")
        return ZERO

    def _has_setting(self, call: Call) -> bool:
        """Whether a number that an operator is given has a scale, though none of its tensors may have one."""
        given = (*call.args, *call.kwargs.values())
        return any(isinstance(one, float) and self.follows(one) is not None for one in given)

    def _hold_settings(self, call: Call, asked: set[float]) -> None:
        """A number that no rule has looked at is one that an operator knows no scale of: a slope, a weight, a power."""
        for value in {one for one in (*call.args, *call.kwargs.values()) if isinstance(one, float)} - asked:
            setting = self.follows(value)
            if setting is not None:
                why = f"{call.name} is given {value:g}, which follows {self.exponents.in_words(setting)}"
                self.exponents.equate(setting, ZERO, call.site, why)

    def _store(self, tensor: Tensor, known: Known, site: str | None) -> None:
        if site is None:
            return
        source = known.site or site
        stored = self.graph.stored.setdefault(source, Stored(self.made.get(source, known.shadow)))
        for one, largest in peaks_of(tensor, known.shadow):
            stored.peaks[one] = max(largest, stored.peaks.get(one, 0.0))

    def _constant(self, call: Call, operands: Sequence[Known]) -> float | None:
        """The number that scores, say, are multiplied by before a mask is added to them."""
        if not operands or call.name not in _KEEP_CONSTANT:
            return None
        if call.name not in ("mul", "div") or len(call.operands) > 1:
            return operands[0].constant
        value = scalar(call.args[1] if call.args[0] is call.operands[0] else call.args[0])
        return None if value is None or self.follows(value) is not None else value

    # Rows: which parts of a parameter's output are cut from one another.

    def _rows(self, call: Call, operands: Sequence[Known]) -> list[Rows | None] | None:
        if not operands or not call.outputs:
            return None
        first = operands[0].rows
        if call.name in MOVES and first is not None:
            return self._moved_rows(call, first)
        return self._made_rows(call)

    def _moved_rows(self, call: Call, rows: Rows) -> list[Rows | None] | None:
        if not is_followed(call):  # their numbers are no exponents, which could be made equal
            return None
        try:
            index = moved(call, rows.index) if not isinstance(rows.index, int) else rows.index
        except RuntimeError:
            return None
        several = index if isinstance(index, list) else [index] * len(call.outputs)
        if call.name in CUTS:
            for one in several:
                self.pieces[rows.parameter, rows.dim].add(tuple(values(one)))
        return [Rows(rows.parameter, rows.dim, one) for one in several]

    def _made_rows(self, call: Call) -> list[Rows | None] | None:
        """What a product with a parameter, and a row of an embedding, is made with."""
        args, name = call.args, call.name
        if name in ("mm", "bmm", "matmul", "linear", "addmm", "baddbmm", "_grouped_mm"):
            adds = name in ("addmm", "baddbmm")
            matrix = args[adds + 1]
            owner = self.known(matrix).parameter
            if owner is None or matrix.ndim < 2:
                return None
            bias = args[0] if adds else call.argument(2, "bias") if name == "linear" else None
            axis = 0 if name == "linear" else -1
            dim = self._dimension(owner, matrix, axis)
        elif name == "embedding":
            owner, bias, matrix, axis = self.known(args[0]).parameter, None, args[0], -1
            dim = None if owner is None else self._dimension(owner, matrix, -1)
        elif name == "add" and len(call.operands) == 2:
            return self._biased(call)
        else:
            return None
        if owner is None or dim is None:
            return None
        if bias is not None and self.known(bias).parameter is not None and bias.ndim == 1:
            self.linked[self.known(bias).parameter or ""] = owner, dim
        output = call.outputs[0]
        return [Rows(owner, dim, along(range(matrix.shape[axis]), -1, output.ndim))]

    def _biased(self, call: Call) -> list[Rows | None] | None:
        for bias, product in (call.operands, reversed(call.operands)):
            made, owner = self.known(product).rows, self.known(bias).parameter
            if made is not None and owner is not None and bias.ndim == 1:
                self.linked[owner] = made.parameter, made.dim
                return [made]
        return None

    def _dimension(self, owner: str, matrix: Tensor, axis: int) -> int | None:
        """Which dimension of the parameter a view of it has at `axis`, told by strides."""
        shape = self.graph.parameters[owner].shape
        strides = [1] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * shape[dim + 1]
        fitting = [
            dim for dim in range(len(shape)) if shape[dim] == matrix.shape[axis] and strides[dim] == matrix.stride(axis)
        ]
        return fitting[-1] if fitting else None

    def blocks(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """By parameter, the dimension along which it is cut and the number of the block of each index."""
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for (name, dim), pieces in self.pieces.items():
            size = self.graph.parameters[name].shape[dim]
            proper = [piece for piece in sorted(pieces) if len(piece) < size]
            if not proper:
                continue
            member = torch.zeros(size, len(proper), dtype=torch.long)
            for column, piece in enumerate(proper):
                member[list(piece), column] = 1
            _, numbered = torch.unique(member, dim=0, return_inverse=True)
            if 1 < int(numbered.max()) + 1 <= _MOST_BLOCKS:
                found[name] = dim, tuple(_in_order(numbered.tolist()))
        for bias, (name, dim) in self.linked.items():
            if name in found and found[name][0] == dim and self.graph.parameters[bias].shape == (len(found[name][1]),):
                found[bias] = 0, found[name][1]
        return found


def _in_order(numbers: Sequence[int]) -> Iterator[int]:
    """The same classes, numbered as they come."""
    known: dict[int, int] = {}
    for number in numbers:
        yield known.setdefault(number, len(known))


def _is_gain(call: Call, known: Known) -> bool:
    return call.name in ("add", "sub", "rsub") and len(call.operands) == 1 and known.parameter is not None


def result_site(site: str, place: int) -> str:
    """The name of one of the results of an operator."""
    return f"{site}[{place}]" if place else site


def peaks_of(tensor: Tensor, shadow: Shadow) -> Iterator[tuple[Expression, float]]:
    """The largest finite magnitude of the elements of each exponent; a mask's minimum is none."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        shadow = shadow if isinstance(shadow, int) else shadow[..., None]
    if tensor.is_meta or not tensor.numel():
        return
    if isinstance(shadow, int):
        yield shadow, _largest(tensor)
        return
    over = [dim for dim in range(tensor.ndim) if shadow.shape[dim] == 1]
    finite = torch.where(tensor.abs() < _BEYOND, tensor.abs(), 0).float()  # NaN is not below
    each = finite.amax(over, keepdim=True) if over else finite
    for one in values(shadow):
        yield one, float(each[shadow == one].max())


_BEYOND = 1e38


def _largest(tensor: Tensor) -> float:
    low, high = tensor.aminmax()
    largest = max(abs(float(low)), abs(float(high)))
    if largest < _BEYOND:
        return largest
    magnitudes = tensor.abs()
    return float(torch.where(magnitudes < _BEYOND, magnitudes, 0).max())

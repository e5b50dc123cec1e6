"""What one tensor looked like."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import pyarrow as pa

from stabilitykit.formats import FORMATS

BACKWARD = "backward"
"""What the sites of gradients begin with, and the module of their records."""

WEIGHT_GRADIENT = "weight gradient"
"""The label of a parameter's gradient; other gradients have none."""

BreakKind = Literal[
    "overflow",  # the result, combined in wider arithmetic, is past the stored format's largest value
    "reduction",  # the result would fit, but a partial sum on the way to it did not
    "invalid",  # NaN out of finite operands: 0/0, sqrt(-1)
    "division-by-zero",  # an exact infinity out of finite operands: x/0, rsqrt(0), log(0)
    "masked-row",  # softmax over a row in which every key is masked
    "weight",  # a parameter or buffer that is not finite to begin with
    "input",  # something passed to the model that is not finite to begin with, its cache too
    "constant",  # NaN or an infinity that the code itself put in: a fill, an assignment, unwritten memory
    "unresolved",  # not finite, and how it became so was not seen
]

OriginKind = Literal[
    "weight",  # a parameter of the model
    "buffer",  # a buffer of the model
    "constant",  # made inside the model without any of the above: a fill, a range of positions, arithmetic on those
    "input",  # passed to the model
    "cache",  # a slot of a cache that was passed to the model
    "outside",  # made by code outside the model
    "computed",  # the result of an operator
]

WeightCount = Literal["nonfinite", "overflow", "zero", "subnormal"]

WeightRole = Literal["scale", "zero point"]


@dataclass(frozen=True, slots=True)
class FormatCounts:
    """Exact counts of the finite elements that would leave a format's normal range, ties included.

    The same nearest-even rounding as a cast: `overflow` past the largest value, `subnormal` to a non-zero
    subnormal, `zero` from non-zero to zero.
    """

    overflow: int
    subnormal: int
    zero: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """Statistics of one softmax; logits are its inputs with masked ones (-inf or a mask's minimum) left out.

    Per-head tuples run over heads (one entry where there are none); entropies are in nats over rows that
    are neither fully masked nor NaN, NaN where a head has no such row. `underflow_share` is the fraction of
    unmasked probabilities that are exactly zero. `sum_error` is the largest |Σp - 1|. `recomputed`: the kernel kept no
    probabilities, and these are those of its queries and keys in float32.
    """

    max_logit: float | None
    logit_range: float | None
    entropy_min: tuple[float, ...]
    entropy_mean: tuple[float, ...]
    max_probability: float | None
    sum_error: float | None
    underflow_share: float
    masked_rows: int
    nan_rows: int
    recomputed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """How a site's output came to be non-finite although no earlier site's was.

    `count` elements of the tensor broke; `row`, `position` and `channel` locate the earliest one, `index` in
    the tensor's own shape; `token` is the id there, and `rows` and `positions` are all that hold a broken element, in
    order; None and () where they are not known. `counts` is what positions count. `operands` are the operands at that
    element, or, where one element combines many (a product, a sum), the largest magnitude among those it combines.
    `value` is what those operands give in float64, NaN and infinities included; None where it could not be recomputed.

    `origin_kind` and `origin_name` say where the damage came from: what was not finite to begin with
    (`origin_finite` False), or the largest operand of an operator whose operands were all finite (True). A name is a
    parameter's or buffer's path, an argument's name, an operator's name or a site. None where it was not seen.

    `rounded_site` made an operand that only this dtype's rounding turned into zero or an infinity, and `rounded_from`
    is what it would have been. `scaled` is what the next operator, a product with a scale or a weight, would have made
    of `value`. `outside` is the code that ran outside the model: a logits processor's class, "backward", or file, line
    and source. `causal`: as checked while it ran, nothing at a later position of the same sequence took part.
    """

    kind: BreakKind
    count: int
    row: int | None
    position: int | None
    channel: int | None
    token: int | None
    index: tuple[int, ...]
    operands: tuple[float, ...]
    operand_sites: tuple[str, ...]
    value: float | None
    limit: float
    rows: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    counts: str = "token"
    origin_kind: OriginKind | None = None
    origin_name: str | None = None
    origin_finite: bool | None = None
    rounded_site: str | None = None
    rounded_from: float | None = None
    scaled: float | None = None
    outside: str | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far a tensor is from the same site of the reference run, over elements that are finite in both.

    `sqnr` is 10 · log10(Σ reference² / Σ error²) in dB: inf for no error, None without a finite element or with a
    reference of zeros. `largest_ulp` is the largest error in units in the last place of the tensor's own dtype, at
    the reference's magnitude. `compared` counts the elements.
    """

    sqnr: float | None
    largest: float | None
    largest_ulp: float | None
    compared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCounts:
    """One parameter, stored in a format: how many of its elements would leave the format's normal range.

    `overflow` is past the largest value, `subnormal` rounds to a non-zero subnormal, `zero` from non-zero to zero;
    `nonfinite` were NaN or infinite before. `index` is that of the first element that is not finite or would overflow,
    else of the first that becomes zero, `value` what it is in the checkpoint, None where there is none. `block` is the
    number of the quantised block that holds it, row-major, where weights were stored in blocks of `block_size` elements
    with a scale each: integers are finite, so a `value` that is not comes from its block's scale. `role` is what a
    tensor is that quantised weights are multiplied by, or shifted by; None for weights and all else.
    """

    name: str
    elements: int
    overflow: int
    subnormal: int
    zero: int
    nonfinite: int
    index: tuple[int, ...] | None = None
    value: float | None = None
    block: int | None = None
    block_size: int | None = None
    role: WeightRole | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """All parameters of a checkpoint, stored in `dtype`: sums, and the five parameters with most to lose, worst first.

    Worst are those with elements that are not finite or would overflow, then those with most that vanish or go
    subnormal; parameters with none are left out. After the five come those that have most of one kind.
    """

    dtype: str
    elements: int
    overflow: int
    subnormal: int
    zero: int
    nonfinite: int
    worst: tuple[WeightCounts, ...]

    def most(self, kind: WeightCount) -> WeightCounts | None:
        """The parameter with most elements of this kind; None where none has any."""
        found = max(self.worst, key=lambda counts: int(getattr(counts, kind)), default=None)
        return None if found is None or not getattr(found, kind) else found


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsError:
    """Logits against the reference run's, over the positions at which both are finite.

    KL is that of the reference's distribution to this one, Σ p · log(p / q), in nats a token. `top1` is the
    fraction of positions with the same likeliest token; a tie counts for the lower id. All None for no positions.
    """

    kl_mean: float | None
    kl_max: float | None
    top1: float | None
    compared: int
    positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The statistics of one tensor; statistics over finite elements are None where there are none.

    `dtype` is the one in which the tensor was stored. Positions are absolute, rows count the batch.
    `masked` elements are a mask at work (-inf, or the minimum that stands for it) and enter no other count or
    statistic. `exponents[i]` counts the finite non-zero elements with floor(log2|x|) = `exponent_first + i`. `lost_*`
    count what holds a non-finite element. `absorbs`: an operand held such an element, and this tensor holds none.
    `position_amax` runs over rows, then positions; None unless asked for. `extra` are the statistics that a user added,
    by name: None where one has no value. `stored_dtype` is the dtype in which a run of
    the same model in float16 stores these values, None where nobody found out.
    """

    order: int
    step: int
    site: str
    label: str | None
    module: str
    operator: str | None
    layer: int | None
    dtype: str
    shape: tuple[int, ...]
    stored_dtype: str | None = None

    elements: int
    masked: int
    nan: int
    positive_inf: int
    negative_inf: int
    zero: int
    subnormal: int
    amax: float | None
    smallest: float | None
    minimum: float | None
    maximum: float | None
    mean: float | None
    rms: float | None
    exponent_first: int
    exponents: tuple[int, ...]
    formats: dict[str, FormatCounts]

    amax_row: int | None
    amax_position: int | None
    amax_channel: int | None
    amax_token: int | None = None
    amax_token_text: str | None = None
    position_amax: tuple[float, ...] | None = None

    positions: int | None = None
    channels: int | None = None
    lost_positions: int = 0
    lost_channels: int = 0
    absorbs: bool = False

    softmax: Softmax | None = None
    deviation: Deviation | None = None
    broke: Break | None = None
    extra: dict[str, float | None] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Elements that are not finite; masked ones are not among them."""
        return self.nan + self.positive_inf + self.negative_inf

    @property
    def headroom(self) -> float | None:
        """Bits between `amax` and the largest value of `dtype`, in which the tensor is stored: log2(largest / amax).

        -inf where an element is lost (NaN or infinite, no mask), inf of zeros alone, None where no element is left to
        be measured, or the dtype is no number format of the kit's.
        """
        form = FORMATS.get(self.dtype)
        if form is None or (self.amax is None and not self.lost):
            return None
        return -math.inf if self.lost or self.amax is None else form.headroom(self.amax)

    def is_stored_in(self, dtype: str) -> bool:
        """Whether a run of the model in 16 bits stores this tensor in 16 bits, as far as one in `dtype` tells.

        Gradients are none of them. The insides of RMSNorm and of softmax are computed in float32 in every dtype: what
        the squares in a norm reach says nothing about float16. Where `stored_dtype` is not known a tensor counts if it
        is stored in the run's own dtype.
        """
        if self.is_gradient:
            return False
        return self.dtype == dtype if self.stored_dtype is None else self.stored_dtype in ("float16", "bfloat16")

    @property
    def of_weight(self) -> bool:
        """Whether this is the gradient of a parameter."""
        return self.label == WEIGHT_GRADIENT

    @property
    def is_gradient(self) -> bool:
        """Whether this is of a backward pass."""
        return self.module == BACKWARD

    @property
    def broke_at(self) -> int | None:
        """Row-major index of the element that broke first; None where nothing broke."""
        return None if self.broke is None else flat_index(self.broke.index, self.shape)

    def row(self) -> dict[str, Any]:
        """The record as one flat row: nested parts spread over prefixed columns."""
        flat: dict[str, Any] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.name == "formats":
                for name, counts in value.items():
                    flat |= {f"{name}.{key}": number for key, number in dataclasses.asdict(counts).items()}
            elif spec.name in NESTED:
                part = NESTED[spec.name]
                flat |= {
                    f"{spec.name}.{inner.name}": None if value is None else getattr(value, inner.name)
                    for inner in dataclasses.fields(part)
                }
            elif spec.name == "extra":
                flat |= value
            else:
                flat[spec.name] = value
        return flat

    @classmethod
    def from_columns(cls, columns: Mapping[str, list[Any]]) -> "list[Record]":
        """The records whose rows have these columns, at least one of which there must be."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        own: dict[str, list[Any]] = {}
        extra: dict[str, list[Any]] = {}
        parts: dict[str, dict[str, list[Any]]] = {}
        for column, values in columns.items():
            part, _, name = column.rpartition(".")
            of_part = parts.setdefault(part, {}) if part else own if name in known else extra
            lists = type(next((value for value in values if value is not None), None)) is list
            of_part[name] = [None if value is None else tuple(value) for value in values] if lists else values
        counts: list[dict[str, FormatCounts]] = [{} for _ in next(iter(own.values()))]
        for part, of_part in parts.items():
            made = NESTED.get(part)
            held = [row.count(None) < len(row) for row in zip(*of_part.values(), strict=True)]
            if made is not None:
                own[part] = [made(**row) if there else None for row, there in zip(_rows(of_part), held, strict=True)]
                continue
            numbers = zip(*(of_part[spec.name] for spec in dataclasses.fields(FormatCounts)), strict=True)
            for formats, row, there in zip(counts, numbers, held, strict=True):
                if there:
                    formats[part] = FormatCounts(*row)
        extras = _rows(extra) if extra else ({} for _ in counts)
        return [
            cls(**row, formats=formats, extra=more)
            for row, formats, more in zip(_rows(own), counts, extras, strict=True)
        ]


def _rows(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


NESTED: dict[str, type[Softmax] | type[Deviation] | type[Break]] = {
    "softmax": Softmax,
    "deviation": Deviation,
    "broke": Break,
}


def flat_index(index: Sequence[int], shape: Sequence[int]) -> int:
    """The row-major position of an element in a tensor of this shape."""
    flat = 0
    for size, i in zip(shape, index, strict=True):
        flat = flat * size + i
    return flat


def index_at(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The inverse of `flat_index`."""
    index: list[int] = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return tuple(reversed(index))


def schema(formats: Sequence[str], statistics: Iterable[str] = ()) -> pa.Schema:
    return pa.schema(list(_column_types(formats, statistics)))


def _column_types(formats: Sequence[str], statistics: Iterable[str]) -> Iterator[tuple[str, pa.DataType]]:
    hints = get_type_hints(Record)
    for spec in dataclasses.fields(Record):
        if spec.name == "formats":
            for name in formats:
                yield from ((f"{name}.{inner.name}", pa.int64()) for inner in dataclasses.fields(FormatCounts))
        elif spec.name == "extra":
            yield from ((name, pa.float64()) for name in statistics)
        elif spec.name in NESTED:
            part = NESTED[spec.name]
            inner_hints = get_type_hints(part)
            for inner in dataclasses.fields(part):
                yield f"{spec.name}.{inner.name}", _arrow_type(inner_hints[inner.name])
        else:
            yield spec.name, _arrow_type(hints[spec.name])


def _arrow_type(hint: Any) -> pa.DataType:
    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    if hint in plain:
        return plain[hint]
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    if isinstance(arguments[0], str):  # a Literal
        return pa.string()
    if Ellipsis in arguments:  # tuple[x, ...]
        return pa.list_(_arrow_type(arguments[0]))
    return _arrow_type(arguments[0])

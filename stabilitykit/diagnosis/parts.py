"""Which part of a model overflowed, as far as its records show: by label, by path, and by what follows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stabilitykit.diagnosis.projections import DOWN, PROJECTIONS
from stabilitykit.records import Record, Recording
from stabilitykit.records.layers import is_layer

Part = Literal[
    "residual",  # the residual stream of a decoder that is known, or what is added to it
    "sum",  # a sum in a layer of a model that is not known
    "gate-up",
    "up",
    "query",
    "key",
    "value",
    "scores",
    "expert",
    "before-norm",
    "norm",
    "exp",
    "angles",
    "cache",
    "mask",
    "logits",
    "cast",
    "other",
]

LOGITS = ("logits", "logits, soft-capped")
_HEADS = ("lm_head", "embed_out")
_STREAM = ("embedding", "embedding, scaled", "norm after attention", "norm after MLP")
_WRITES_TO_IT = ("attention output projection", "down projection")

_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ANGLES = re.compile(r"rotary|(?:^|_)rope(?:_|$)|pos_emb", re.IGNORECASE)
_PROJECTIONS: dict[str, Part] = {name: part for part, names in PROJECTIONS.items() for name in names}
_BY_LABEL: dict[str, Part] = {
    "gate · up": "gate-up",
    "up projection": "up",
    "query projection": "query",
    "query, rotated": "query",
    "key projection": "key",
    "key, rotated": "key",
    "value projection": "value",
    "attention output, per head": "value",
    "attention scores": "scores",
    "logits": "logits",
}
_ACTIVATIONS = ("silu", "gelu", "relu", "mish", "hardswish", "sigmoid")
_WRITES = ("copy", "index_copy", "index_put", "slice_scatter", "scatter")


@dataclass(frozen=True, slots=True)
class Place:
    """A record of a recording, with what ran after it in the same step, nearest first."""

    record: Record
    after: Sequence[Record]

    @property
    def next(self) -> Record | None:
        return self.after[0] if self.after else None

    @property
    def module(self) -> str:
        """The last component of the path: `q_proj` of `layers.0.self_attn.q_proj`."""
        return self.record.module.rpartition(".")[2]

    @property
    def norm(self) -> str | None:
        """The norm that reads what the record holds: what is lost there, or ends there, shows that it does."""
        follows = self.next
        if follows is None or not (follows.lost or follows.absorbs) or follows.module == self.record.module:
            return None
        return follows.module if is_norm(follows.module) else None


def place_in(recording: Recording, record: Record) -> Place:
    return Place(record, [r for r in recording if r.step == record.step and r.order > record.order])


def is_norm(module: str) -> bool:
    return _NORM.search(module.rpartition(".")[2]) is not None


def is_attention(module: str) -> bool:
    return any(_ATTENTION.search(part) for part in module.split(".")[-2:])


def is_head(site: str) -> bool:
    """Whether a site is what a head of a language model returns, whatever the path to it: `model.lm_head`."""
    return site.rpartition(".")[2] in _HEADS


def part_of(recording: Recording, record: Record) -> Part:
    """What broke, of an overflow; "other" where neither path nor records say."""
    place = place_in(recording, record)
    if record.operator in ("exp", "exp2", "expm1", "cosh", "sinh"):
        return "exp"
    if _adds_a_mask(record):
        return "mask"
    if _is_angles(record):
        return "angles"
    if _is_square(place):
        return "norm"
    if _is_residual(place):
        return "residual"
    if _is_before_norm(place):
        return "before-norm"
    known = _BY_LABEL.get(record.label or "") or _by_path(place)
    if known is not None:
        return known
    if is_head(record.site):
        return "logits"
    if _is_cache(record):
        return "cache"
    if record.operator == "cast":
        return "cast"
    if record.operator == "add" and (is_layer(record.site) or is_layer(record.module)):
        return "sum"
    if "/" not in record.site and record.operator == "matmul" and _is_added(place):
        return "sum"
    return "other"


def broken_channel(recording: Recording, record: Record) -> int | None:
    """The channel, from 0, of the first element that broke; None where the last axis counts something else.

    That is keys in attention scores and probabilities, the vocabulary in logits and in what samples from them, inputs
    in a weight's gradient, and frames or columns of an image in what a convolution returns.
    """
    broke = record.broke
    if broke is None or broke.channel is None or not record.channels or record.is_gradient:
        return None
    if record.operator in ("softmax", "convolution") or record.module.partition(".")[0] in ("outside", "sampler"):
        return None
    if is_attention(record.module) and len(record.shape) > 2 and record.channels == record.positions:
        return None  # keys, or as many channels of a head as there are tokens
    return None if part_of(recording, record) in ("scores", "logits", "mask") else broke.channel


def _adds_a_mask(record: Record) -> bool:
    """A sum of two negative numbers, one of which is near the format's minimum: a mask, or two of them."""
    broke = record.broke
    if broke is None or record.operator != "add" or len(broke.operands) != 2:
        return False
    return max(broke.operands) < 0 and min(broke.operands) <= -broke.limit / 2 and is_attention(record.module)


def _is_angles(record: Record) -> bool:
    return record.operator in ("cos", "sin") or any(_ANGLES.search(part) for part in record.module.split("."))


def _is_square(place: Place) -> bool:
    """Of a mean of squares, or in a norm whose steps are operators of their own."""
    record, follows = place.record, place.next
    if is_norm(record.module):
        return True
    sites = () if record.broke is None else record.broke.operand_sites
    squares = record.operator == "pow" or (record.operator == "mul" and len(sites) == 2 and len(set(sites)) == 1)
    return squares and follows is not None and follows.operator in ("mean", "sum")


def is_stream(label: str | None) -> bool:
    """Whether a label is that of the residual stream, or of what is added to it as it is."""
    return label is not None and (label.startswith("residual after") or label in _STREAM)


def _is_residual(place: Place) -> bool:
    label = place.record.label or ""
    if is_stream(label):
        return True
    return label in _WRITES_TO_IT and place.norm is None and place.next is not None and place.next.operator == "add"


def _is_added(place: Place) -> bool:
    """Whether what a projection returns is added to something larger than its own module next."""
    rest = (r for r in place.after if r.operator not in ("clone", "native_dropout", "mul", None))
    follows = next(rest, None)
    own = place.record.module.rpartition(".")[0]
    return follows is not None and follows.operator == "add" and own.startswith(f"{follows.module}.")


def _is_before_norm(place: Place) -> bool:
    record = place.record
    makes = record.operator in ("matmul", "convolution") or record.operator is None
    return makes and "/" not in record.site and not is_layer(record.site) and place.norm is not None


def _by_path(place: Place) -> Part | None:
    record = place.record
    if _is_gate_up(place):
        return "gate-up"
    if "experts" in record.module.split(".") and record.operator in ("matmul", "_grouped_mm"):
        follows = place.next
        if follows is not None and follows.operator == "mul" and record.broke is not None and record.broke.scaled:
            return "expert"
    if "/" not in record.site:
        if place.module in DOWN:
            return "up"
        return _PROJECTIONS.get(place.module) if is_attention(record.module.rpartition(".")[0]) else None
    if record.operator == "matmul" and is_attention(record.module):
        own = [r.operator for r in place.after if r.module == record.module and r.operator in ("matmul", "softmax")]
        return "scores" if own[:1] == ["softmax"] else None
    return None


def _is_gate_up(place: Place) -> bool:
    record, follows = place.record, place.next
    if record.operator != "mul" or follows is None or follows.operator != "matmul" or record.broke is None:
        return False
    return len(record.broke.operand_sites) == 2 and any(is_activation(site) for site in record.broke.operand_sites)


def is_activation(site: str) -> bool:
    """Whether a site is an activation's, by its module or its operator."""
    module, _, operator = site.partition("/")
    last = module.rpartition(".")[2]
    return operator.partition(".")[0] in _ACTIVATIONS or (not operator and last in ("act", "act_fn", "activation_fn"))


def _is_cache(record: Record) -> bool:
    origin = None if record.broke is None else record.broke.origin_kind
    if origin == "cache" or (record.operator in _WRITES and is_attention(record.module)):
        return True
    return record.operator == "cast" and (record.dtype.startswith("float8") or is_attention(record.module))

"""Faults drawn at random: a family, a site, a kind, and where; all of them follow from one seed."""

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from truth import decoders, decoding, others
from truth.models import DECODERS, Embedder, siglip, t5, vit, whisper
from truth.plain import BFLOAT, INF, NAN, SINGLE, broke, full, lines, source
from truth.row import Expected, Planted, Row

Make = Callable[[], Planted]


def _position(draw: random.Random) -> int:
    return draw.randrange(decoders.LAST + 1)


def _size(draw: random.Random) -> float:
    return draw.choice((-1, 1)) * draw.uniform(70000, 200000)


def _linear(part: str) -> Callable[[random.Random, str], Make]:
    def plant(draw: random.Random, family: str) -> Make:
        # what attention returns at later positions is too much alike for one of them to be told from the others
        position = draw.randrange(2) if part == "output" else _position(draw)
        how = {
            "value": _size(draw), "position": position, "layer": draw.randrange(2),
            "channel": draw.randrange(16),
        }  # fmt: skip
        return lambda: decoders.linear(family, str(getattr(DECODERS[family].parts, part)), **how)  # type: ignore[arg-type]

    return plant


def _product(draw: random.Random, family: str) -> Make:
    how = (_position(draw), draw.randrange(2), draw.uniform(260, 500), draw.randrange(64))
    return lambda: decoders.product(family, *how)


def _scores(draw: random.Random, family: str) -> Make:
    position = _position(draw)
    return lambda: decoders.scores(family, position)


def _residual(draw: random.Random, family: str) -> Make:
    position, channel = _position(draw), draw.randrange(32)
    return lambda: decoders.residual(family, position, channel)


def _weight(draw: random.Random, family: str) -> Make:
    lost, place, layer = draw.choice((NAN, INF)), (draw.randrange(32), draw.randrange(32)), draw.randrange(2)
    return lambda: decoders.weight(family, lost, place, layer)


def _embedding(draw: random.Random, family: str) -> Make:
    position, channel = _position(draw), draw.randrange(64)
    return lambda: decoders.embedding(family, position, channel)


def _masked(draw: random.Random, family: str) -> Make:
    position = _position(draw)
    return lambda: decoders.masked(family, position)


def _embedded(draw: random.Random, family: str) -> Make:
    position = _position(draw)
    return lambda: decoders.embedded(family, position)


def _slot(draw: random.Random, family: str) -> Make:
    slot = draw.randrange(3, decoders.LAST + 1)  # one that a sliding window still holds
    return lambda: decoders.cache_slot(family, slot)


def _autocast(draw: random.Random, family: str) -> Make:
    position = _position(draw)
    return lambda: decoders.autocast(family, position)


def _batch(draw: random.Random, family: str) -> Make:
    place = draw.choice([(row, at) for row in (0, 1) for at in range(6) if decoding.LEFT_MASK[row, at]])
    return lambda: decoding.in_batch(family, *place)


def _generated(draw: random.Random, family: str) -> Make:
    cache = draw.choice((None, "static"))
    return lambda: decoders.generated(family, cache)


PLANTS: dict[str, Callable[[random.Random, str], Make]] = {
    "query": _linear("queries"), "value": _linear("values"), "up": _linear("up"), "down": _linear("down"),
    "attention output": _linear("output"), "logits": _linear("head"), "product": _product, "scores": _scores,
    "residual": _residual, "weight": _weight, "embedding": _embedding, "masked row": _masked, "input": _embedded,
    "cache slot": _slot, "autocast": _autocast, "batch": _batch, "generation": _generated,
}  # fmt: skip


def _fits(family: str, plant: str) -> bool:
    """Whether the family has the part."""
    parts = DECODERS[family].parts
    experts = parts.down.endswith("experts")
    return {
        "query": parts.queries is not None, "value": parts.values is not None, "up": bool(parts.up),
            "down": not experts,
        "product": parts.product is not None, "scores": parts.queries is not None,
        "residual": parts.residual and not experts, "autocast": not experts, "batch": not experts,
        "generation": not experts,
        "attention output": not experts,
    }.get(plant, True)  # fmt: skip


# A few lines of code: what comes before, what breaks, and what comes after

_BEFORE: tuple[tuple[str, Callable[[Any, Tensor], Tensor]], ...] = (
    ("plain", lambda m, x: x * m.w),
    ("added", lambda m, x: x + 0 * m.w),
    ("reshaped", lambda m, x: (x * m.w).flatten(0, 1).unflatten(0, x.shape[:2])),
    ("halves joined", lambda m, x: torch.cat((x * m.w).chunk(2, -1), -1)),
    ("rolled there and back", lambda m, x: (x * m.w).roll(1, -1).roll(-1, -1)),
    ("cast there and back", lambda m, x: (x * m.w).float().to(x.dtype)),
    ("written over", lambda m, x: (x * 0).copy_(x * m.w)),
)
_AFTER: tuple[tuple[str, Callable[[Tensor], Tensor], str, bool | None], ...] = (
    ("subtracted", lambda y: y - 1, "reached", None),
    ("halved", lambda y: y * 0.5, "reached", None),
    ("stacked", lambda y: torch.stack([y, y]) * 2, "reached", None),
    ("moved", lambda y: y.mT.contiguous() + 1, "reached", None),
    ("capped", lambda y: torch.tanh(y / 30) * 30, "absorbed", True),
    ("clamped", lambda y: y.clamp(-60000, 60000) * 0.5, "absorbed", None),
    ("inverted", lambda y: 3000 / y * 10, "absorbed", False),
)


def _broken(draw: random.Random) -> tuple[str, Callable[[Any, Tensor], Tensor], float, float, str]:
    """A name, an operator that overflows, the number it is given, what it would give, and its name in records."""
    value = draw.uniform(280, 900)
    large = draw.uniform(33000, 60000)
    high = draw.uniform(12, 25)
    return draw.choice(
        (
            ("square", lambda m, x: x * x, value, value**2, "mul"),
            ("power", lambda m, x: x.pow(2), value, value**2, "pow"),
            ("sum", lambda m, x: x + x, large, 2 * large, "add"),
            ("difference", lambda m, x: -x - x, large, -2 * large, "sub"),
            ("exponential", lambda m, x: torch.exp(x), high, math.exp(high), "exp"),
            ("quotient", lambda m, x: x / 0.001, value, value / 0.001, "div"),
            ("cosh", lambda m, x: torch.cosh(x), high, math.cosh(high), "cosh"),
        )
    )


def _code(draw: random.Random) -> tuple[str, Make]:
    before_name, before = draw.choice(_BEFORE)
    name, operation, given, value, operator = _broken(draw)
    after_name, after, outcome, harmless = draw.choice(_AFTER)
    position, channel, row = draw.randrange(3), draw.randrange(4), draw.randrange(2)
    x = full(1.0, 2, 3, 4)
    x[row, position, channel] = given

    def code(m: Any, x: Tensor) -> Tensor:
        return after(operation(m, before(m, x)))

    expected = Expected(
        sites=(f"/{operator}.*",), operators=(operator,), kinds=("overflow",), value=value, row=row, rows=(row,),
        position=position, positions=(position,), channel=channel, outcome=outcome, harmless=harmless,
        never=("starts with",),
    )  # fmt: skip
    return f"{name}, {before_name}, {after_name}", lambda: lines(
        code, x, parameters={"w": torch.ones(4)}, wide=True, expected=expected
    )


def _put(draw: random.Random) -> tuple[str, Make]:
    """NaN or an infinity that is no number's fault."""
    lost, channel, position = draw.choice((NAN, INF)), draw.randrange(4), draw.randrange(3)
    vector = full(1.0, 4)
    vector[channel] = lost
    x = full(1.0, 1, 3, 4)
    damaged = x.clone()
    damaged[0, position, channel] = lost
    kind = draw.choice(("weight", "buffer", "input", "fill", "bias"))
    never = ("overflows in", "finite operands")
    if kind == "bias":

        def modules() -> dict[str, nn.Module]:
            part = nn.Linear(4, 4)
            part.bias.data[channel] = lost
            return {"part": part}

        expected = broke(
            "part", "matmul", "weight", origin=source("weight", "part.bias", False), channel=channel, never=never
        )
        return f"{lost} in a bias", lambda: lines(lambda m, x: m.part(x) * 2, x, modules=modules, expected=expected)
    if kind == "input":
        expected = broke(
            "/mul.0",
            "mul",
            "input",
            origin=source("input", "x", False),
            position=position,
            channel=channel,
            never=never,
        )
        return f"{lost} in the input", lambda: lines(
            lambda m, x: x * m.w, damaged, parameters={"w": torch.ones(4)}, expected=expected
        )
    if kind == "fill":
        expected = broke("/masked_fill.0", "masked_fill", "constant", origin=source("constant", (), False), never=never)
        return f"{lost} filled in", lambda: lines(
            lambda m, x: (x * 2).masked_fill(x > 1, lost) + 1,
            torch.where(damaged == 1, damaged, 2.0),
            expected=expected,
        )
    expected = broke("/mul.0", "mul", "weight", origin=source(kind, "w", False), channel=channel, never=never)
    where = {"parameters": {"w": vector}} if kind == "weight" else {"buffers": {"w": vector}}
    return f"{lost} in a {kind}", lambda: lines(lambda m, x: x * m.w + 1, x, expected=expected, **where)  # type: ignore[arg-type]


# Layers of models that are no decoders: family, what builds and runs it, a layer, how many places, and whose tokens

_LAYERS: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any], str, int, Tensor | None], ...] = (
    ("t5", t5, others.run_t5, "encoder.block.0.layer.0.SelfAttention.q", 5, others.ENCODED),
    ("t5", t5, others.run_t5, "encoder.block.1.layer.0.SelfAttention.k", 5, others.ENCODED),
    ("t5", t5, others.run_t5, "decoder.block.0.layer.0.SelfAttention.k", 3, others.SHORT),
    ("whisper", whisper, others.run_whisper, "model.encoder.layers.1.self_attn.q_proj", 8, None),
    ("whisper", whisper, others.run_whisper, "model.decoder.layers.1.fc1", 3, others.SHORT),
    ("vit", vit, others.run_pixels, "layers.0.mlp.fc1", 5, None),
    ("siglip", siglip, others.run_pixels, "encoder.layers.0.self_attn.v_proj", 4, None),
    ("embedding", Embedder, others.run_embedder, "encoder.encoder.layer.0.attention.self.query", 10, others.PAIR),
)


def _layer(draw: random.Random) -> tuple[str, str, Make]:
    family, build, run, path, places, ids = draw.choice(_LAYERS)
    place, value = draw.randrange(places), _size(draw)
    row, position = divmod(place, 5) if family == "embedding" else (0, place)
    # what the first layer projects depends on its own token alone, in both directions
    alone = re.search(r"(layer|layers|block)\.0\..*\b(q|k|v|query|key|value|[qkv]_proj)$", path) is not None
    never = (
        () if ids is not None and alone else ("starts with",) if ids is not None else ("starts with", r"at token \d")
    )
    at = None if family == "embedding" else position
    columns: dict[str, Any] = {"place": place, "value": value, "row": row, "position": position, "says": ()}
    if family == "vit":  # has a class token before its patches, which are counted without
        columns["position"] = position - 1 if position else None
    if ids is not None:
        columns["token"] = int(ids[row, position])
    make = functools.partial(others.linear, build, run, path, at, never=never, **columns)
    return family, path.rpartition(".")[2], make


def _pole(draw: random.Random) -> tuple[str, Make]:
    """A zero that is a zero in any format, or one that only this dtype's rounding made."""
    small, position = draw.uniform(1e-5, 1e-4), draw.randrange(3)
    x = full(1.0, 1, 3, 4)
    if draw.random() < 0.5:
        x[0, position] = small
        rounded = broke(
            "/reciprocal.0", "reciprocal", "division-by-zero", rounded=("/mul.*",), rounded_from=small * small,
            position=position, never=("in any (format|dtype)", "will not help"),
        )  # fmt: skip
        return "a zero by rounding", lambda: lines(lambda m, x: 1 / (x * x), x, wide=True, expected=rounded)
    x[0, position] = 0.0
    code, operator, kind = draw.choice(
        (
            (lambda m, x: torch.log(x * 1), "log", "division-by-zero"),
            (lambda m, x: torch.rsqrt(x * 1), "rsqrt", "division-by-zero"),
            (lambda m, x: (x * 1) / (x * 1), "div", "invalid"),
        )
    )
    dtype = draw.choice((SINGLE, BFLOAT, torch.float16))
    never = ("wider range", "bfloat16, float32")
    expected = broke(f"/{operator}.0", operator, kind, no_rounding=True, position=position, never=never)
    return f"a zero in any format, {operator}", lambda: lines(code, x, wide=False, dtype=dtype, expected=expected)


def generate(seed: int, count: int = 200) -> Iterator[Row]:
    """Half of the rows are of a decoder, a third a few lines of code, the others of another model."""
    draw = random.Random(seed)
    for number in range(count):
        if number % 2:
            plant = draw.choice(list(PLANTS))
            family = draw.choice([name for name in DECODERS if _fits(name, plant)])
            yield Row(name=f"{number} {plant}", root=5, family=family, make=PLANTS[plant](draw, family))
        elif number % 3:
            name, make = draw.choice((_code, _code, _put, _pole))(draw)
            yield Row(name=f"{number} {name}", root=3, family="plain", make=make)
        else:
            family, name, make = _layer(draw)
            yield Row(name=f"{number} {name}", root=6, family=family, make=make)

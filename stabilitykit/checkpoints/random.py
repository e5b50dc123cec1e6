"""A Gemma with random weights, described by one line: `random:gemma2-2b?layers=2&seed=0`."""

import hashlib
import math
from dataclasses import replace
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from stabilitykit.checkpoints.checkpoint import Checkpoint, LazyTensors, PieceType, Vocabulary
from stabilitykit.checkpoints.config import ALIASES, GemmaConfig, released
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.errors import CheckpointError, MisuseError

_SPECIAL: tuple[tuple[str, PieceType], ...] = (
    ("<pad>", "control"),
    ("<eos>", "control"),
    ("<bos>", "control"),
    ("<unk>", "unknown"),
)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_TURNS = ("<start_of_turn>", "<end_of_turn>")
_ASCII = tuple(chr(code) for code in range(ord("!"), ord("~") + 1))
# The space has its own piece: as the three bytes of `▁` it would not decode to a space.
_SMALLEST_VOCABULARY = len(_SPECIAL) + len(_BYTES) + len(_TURNS) + 1


def random_checkpoint(spec: str) -> Checkpoint:
    """The checkpoint that `spec` describes, the same on every call.

    `spec` is `random:` and a released size, optionally followed by `?` and `key=value` pairs joined by `&`: `seed` (0
    by default) and any number in GemmaConfig but the generation, or `none` where the config allows None. Each tensor
    has its own generator and is drawn again whenever it is requested, so that a model larger than memory can be
    streamed. Values are float32 and representable in bfloat16. The standard deviation is in**-0.5 for linear weights,
    hidden**-0.5 for the embedding and 0.1 for norm gains `w`.

    Raises MisuseError for an invalid spec, CheckpointError for sizes that contradict each other.
    """
    name, _, query = spec.removeprefix("random:").partition("?")
    base = released(name)
    seed, changes = _parse_query(query)
    config = replace(base, **changes)  # type: ignore[arg-type]
    changed = {key: value for key, value in sorted(changes.items()) if value != getattr(base, key)}
    described = "&".join(f"{key}={value}".lower() for key, value in {**changed, "seed": seed}.items())
    source = f"random:{ALIASES.get(name, name)}?{described}"
    return Checkpoint(
        source=source,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        config=config,
        tensors=_tensors(config, seed),
        vocabulary=_vocabulary(config.vocabulary),
        notes=(f"random weights, seed {seed}",),
    )


def _parse_query(query: str) -> tuple[int, dict[str, float | None]]:
    """The seed, and the fields of the config to change."""
    types = {"seed": int, **{name: hint for name, hint in get_type_hints(GemmaConfig).items() if name != "generation"}}
    seed = 0
    changes: dict[str, float | None] = {}
    for pair in query.split("&") if query else ():
        key, _, text = pair.partition("=")
        if key not in types:
            raise MisuseError(f"Unknown key {key!r} in a random checkpoint; choose one of: {', '.join(types)}.")
        number, *others = get_args(types[key]) or (types[key],)
        if text.lower() == "none" and others:
            changes[key] = None
            continue
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 or key == "seed")):
            needed = "an integer" if key == "seed" else f"a positive {'integer' if number is int else 'number'}"
            raise MisuseError(f"{key} of a random checkpoint must be {needed}, got {text!r}.")
        if key == "seed":
            seed = value
        else:
            changes[key] = value
    return seed, changes


def _tensors(config: GemmaConfig, seed: int) -> LazyTensors:
    """Each tensor is drawn from the seed and its name alone."""
    shapes = parameter_shapes(config)

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        # The embedding's is hidden**-0.5, as for every other matrix: the model multiplies it by sqrt(hidden).
        deviation = 0.1 if len(shape) == 1 else math.sqrt(1 / shape[1])
        drawn = torch.randn(shape, generator=generator).mul_(deviation)
        return drawn.to(torch.bfloat16).float()

    return LazyTensors(shapes, draw)


def _vocabulary(size: int) -> Vocabulary:
    """Special pieces, bytes, turn markers and printable ASCII, then unused pieces up to `size`."""
    if size < _SMALLEST_VOCABULARY:
        raise CheckpointError(
            f"A random vocabulary needs at least {_SMALLEST_VOCABULARY} pieces, so that any text can be encoded as "
            f"bytes, got {size}."
        )
    known: list[tuple[str, PieceType]] = [*_SPECIAL]
    known += [(piece, "byte") for piece in _BYTES]
    known += [(piece, "control") for piece in _TURNS]
    known += [(piece, "normal") for piece in ("▁", *_ASCII)]
    known = known[:size]
    known += [(f"<unused{index}>", "unused") for index in range(size - len(known))]
    pieces, types = zip(*known, strict=True)
    return Vocabulary(pieces=pieces, scores=(0.0,) * size, types=types)

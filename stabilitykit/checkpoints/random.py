"""A Gemma of random weights, described by a line of text: `random:gemma2-2b?layers=2&seed=0`."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from stabilitykit.checkpoints.checkpoint import Checkpoint, PieceType, Vocabulary
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
# The space has a piece of its own: as three bytes of `▁` it would not be read back as a space.
_SMALLEST_VOCABULARY = len(_SPECIAL) + len(_BYTES) + len(_TURNS) + 1


def random_checkpoint(spec: str) -> Checkpoint:
    """The checkpoint that `spec` describes, the same on every call.

    `spec` is `random:` and a released size, then perhaps `?` and `key=value` pairs joined by `&`: `seed` (0 by
    default) and any number in GemmaConfig but the generation, or `none` where the config allows its absence.
    Each tensor has a generator of its own and is made anew whenever it is asked for, so that a model larger than
    memory can be streamed. Values are float32 and representable in bfloat16. Linear weights have standard
    deviation in**-0.5, the embedding hidden**-0.5, norm gains `w` 0.1.

    Raises MisuseError for a spec that cannot be meant, CheckpointError for sizes that contradict each other.
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
        tensors=_RandomTensors(config, seed),
        vocabulary=_vocabulary(config.vocabulary),
        notes=(f"random weights, seed {seed}",),
    )


def _parse_query(query: str) -> tuple[int, dict[str, float | None]]:
    """The seed, and the fields of the config to change."""
    kinds = {"seed": int, **{name: hint for name, hint in get_type_hints(GemmaConfig).items() if name != "generation"}}
    seed = 0
    changes: dict[str, float | None] = {}
    for pair in query.split("&") if query else ():
        key, _, text = pair.partition("=")
        if key not in kinds:
            raise MisuseError(f"After `?` a random checkpoint takes {', '.join(kinds)}; {key!r} is none of them.")
        kind, *others = get_args(kinds[key]) or (kinds[key],)
        if text.lower() == "none" and others:
            changes[key] = None
            continue
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 or key == "seed")):
            what = "an integer" if kind is int else "a finite number"
            sign = "" if key == "seed" else " above zero"
            raise MisuseError(f"{key} of a random checkpoint is {what}{sign}; {text!r} is not.")
        if key == "seed":
            seed = value
        else:
            changes[key] = value
    return seed, changes


class _RandomTensors(Mapping[str, Tensor]):
    """Tensors by name, each drawn when asked for, from the seed and its name alone."""

    def __init__(self, config: GemmaConfig, seed: int) -> None:
        self._shapes = parameter_shapes(config)
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        # The embedding's is hidden**-0.5, as for every other matrix: the model multiplies it by sqrt(hidden).
        deviation = 0.1 if len(shape) == 1 else math.sqrt(1 / shape[1])
        drawn = torch.randn(shape, generator=generator).mul_(deviation)
        return drawn.to(torch.bfloat16).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _vocabulary(size: int) -> Vocabulary:
    """The special pieces, the bytes, the turns and printable ASCII, then unused pieces up to `size`."""
    if size < _SMALLEST_VOCABULARY:
        raise CheckpointError(
            f"A random vocabulary holds at least {_SMALLEST_VOCABULARY} pieces, so that any text can be written in "
            f"bytes; {size} were asked for."
        )
    known: list[tuple[str, PieceType]] = [*_SPECIAL]
    known += [(piece, "byte") for piece in _BYTES]
    known += [(piece, "control") for piece in _TURNS]
    known += [(piece, "normal") for piece in ("▁", *_ASCII)]
    known = known[:size]
    known += [(f"<unused{index}>", "unused") for index in range(size - len(known))]
    pieces, types = zip(*known, strict=True)
    return Vocabulary(pieces=pieces, scores=(0.0,) * size, types=types)

"""What distinguishes one Gemma from another, as data, and the released models by name."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from stabilitykit.errors import CheckpointError, MisuseError

Generation = Literal[1, 2, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaSizes:
    """The part of a config that the shapes of the weights determine; sizes in elements."""

    generation: Generation
    layers: int
    hidden_size: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(GemmaSizes):
    """The text decoder of a Gemma of generation 1, 2 or 3.

    Lengths and windows are in tokens, sizes in elements. `None` means the feature is absent. Queries are scaled by
    `query_scalar ** -0.5`. RoPE frequencies of global layers are divided by `rope_scaling`. The head is tied: logits
    come from the embedding matrix. Raises CheckpointError for sizes that contradict each other.
    """

    context: int = 8192
    query_scalar: float = 256.0
    window: int | None = None  # of sliding (local) layers; a query sees itself and window - 1 keys before it
    global_every: int = 1  # layer i is global when (i + 1) is a multiple of this, else local
    rope_base: float = 10_000.0  # global layers
    rope_base_local: float = 10_000.0
    rope_scaling: float = 1.0  # global layers
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    rms_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (spec.name for spec in fields(GemmaSizes)):
            if (size := getattr(self, name)) < 1:
                raise CheckpointError(f"Every size in a config must be at least 1, got {name} = {size}.")
        ropes = ("rope_base", "rope_base_local", "rope_scaling")
        for name in ("context", "query_scalar", "window", "global_every", *ropes):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise CheckpointError(f"In a config {name} must be positive and finite, got {value}.")
        if self.heads % self.kv_heads:
            raise CheckpointError(
                "The number of attention heads must be a multiple of the number of key/value heads, got "
                f"{self.heads} and {self.kv_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even, as RoPE rotates pairs of channels, got {self.head_dim}.")

    @property
    def model_type(self) -> str:
        """Hugging Face's name for this generation's text decoder."""
        return {1: "gemma", 2: "gemma2", 3: "gemma3_text"}[self.generation]

    @property
    def query_key_norm(self) -> bool:
        """Whether q and k pass an RMSNorm (generation 3)."""
        return self.generation == 3

    @property
    def post_norms(self) -> bool:
        """Whether each sublayer's output is normalised before it is added (generations 2 and 3)."""
        return self.generation >= 2

    def is_global(self, layer: int) -> bool:
        return self.window is None or (layer + 1) % self.global_every == 0


_GEMMA_1 = GemmaConfig(
    generation=1, layers=18, hidden_size=2048, feed_forward=16384, heads=8, kv_heads=1, head_dim=256, vocabulary=256_000
)
_GEMMA_2 = GemmaConfig(
    generation=2, layers=26, hidden_size=2304, feed_forward=9216, heads=8, kv_heads=4, head_dim=256,
    vocabulary=256_000, window=4096, global_every=2, attention_softcap=50.0, logit_softcap=30.0,
)  # fmt: skip
_GEMMA_3 = GemmaConfig(
    generation=3, layers=18, hidden_size=640, feed_forward=2048, heads=4, kv_heads=1, head_dim=256,
    vocabulary=262_144, context=32_768, window=512, global_every=6, rope_base=1e6,
)  # fmt: skip
_GEMMA_3_LARGE = replace(_GEMMA_3, vocabulary=262_208, context=131_072, window=1024, rope_scaling=8.0)

# Sizes as in the config files of the released checkpoints, google/gemma-*.
RELEASED: dict[str, GemmaConfig] = {
    "gemma-2b": _GEMMA_1,
    "gemma-7b": replace(_GEMMA_1, layers=28, hidden_size=3072, feed_forward=24576, heads=16, kv_heads=16),
    "gemma2-2b": _GEMMA_2,
    "gemma2-9b": replace(_GEMMA_2, layers=42, hidden_size=3584, feed_forward=14336, heads=16, kv_heads=8),
    "gemma2-27b": replace(
        _GEMMA_2, layers=46, hidden_size=4608, feed_forward=36864, heads=32, kv_heads=16, head_dim=128,
        query_scalar=144.0,
    ),
    "gemma3-270m": _GEMMA_3,
    "gemma3-1b": replace(_GEMMA_3, layers=26, hidden_size=1152, feed_forward=6912),
    "gemma3-4b": replace(_GEMMA_3_LARGE, layers=34, hidden_size=2560, feed_forward=10240, heads=8, kv_heads=4),
    "gemma3-12b": replace(_GEMMA_3_LARGE, layers=48, hidden_size=3840, feed_forward=15360, heads=16, kv_heads=8),
    "gemma3-27b": replace(
        _GEMMA_3_LARGE, layers=62, hidden_size=5376, feed_forward=21504, heads=32, kv_heads=16, head_dim=128,
        query_scalar=168.0,
    ),
}  # fmt: skip

# gemma_pytorch's names for the same sizes.
ALIASES: dict[str, str] = {
    "2b": "gemma-2b", "7b": "gemma-7b",
    "2b-v2": "gemma2-2b", "9b": "gemma2-9b", "27b": "gemma2-27b",
    "270m": "gemma3-270m", "1b": "gemma3-1b", "4b": "gemma3-4b", "12b": "gemma3-12b", "27b-v3": "gemma3-27b",
}  # fmt: skip


def released(name: str) -> GemmaConfig:
    """The config of a released model, by its name or gemma_pytorch's. Raises MisuseError for any other name."""
    try:
        return RELEASED[ALIASES.get(name, name)]
    except KeyError:
        raise MisuseError(f"Unknown Gemma size {name!r}; choose one of: {', '.join([*RELEASED, *ALIASES])}.") from None

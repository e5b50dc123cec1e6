"""What the layers of a decoder do, as data: what has to be known, beside the weights, to bound what they make.

Every one of these decoders adds to a residual stream what an attention and a gated MLP make of it behind an RMSNorm.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from stabilitykit.checkpoints import Checkpoint, GemmaConfig

Activation = Literal["gelu", "silu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of one layer; `head_dim` in channels.

    A query sees at most `keys` keys. Scores are multiplied by `scale`, then soft-capped at `softcap`. q and k pass an
    RMSNorm with a gain before RoPE where there is a `query_key_norm`, and v one without a gain where there is a
    `value_norm`. `value` is the projection that makes v, and `source` the layer whose keys and values are looked at.
    """

    heads: int
    kv_heads: int
    head_dim: int
    keys: int
    scale: float
    source: int
    softcap: float | None = None
    query_key_norm: bool = False
    value_norm: bool = False
    value: str = "v_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """How a model names what this kit's recorder sees in it: `tables` of cos and sin, and the gate once `activated`."""

    tables: tuple[str, ...]
    activated: str


OWN = Sites(tables=("", "/cos.0", "/sin.0", "/cast.1"), activated="/gelu.0")
TRANSFORMERS = Sites(tables=("", "[1]"), activated=".act_fn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A decoder, but for its weights.

    `family` is Hugging Face's model type. The gain of an RMSNorm is `added` + w; with `rounds_before_gain` what it
    multiplies was rounded before. `embedding_scale`: what embeddings are multiplied by, None where nothing does.
    `post_norms`: what a sublayer returns is normalised before it is added. `biases`: the projections that have one.
    `own_input`: channels of the input that each layer has of its own (Gemma 4), 0 for none. `layer_scalar`: what a
    layer returns is multiplied by a scalar. `head`: the matrix of the logits. `experts`: beside each MLP runs a mixture
    of experts.
    """

    family: str
    hidden_size: int
    vocabulary: int
    attention: tuple[Attention, ...]
    activation: Activation
    sites: Sites = TRANSFORMERS
    added: float = 0.0
    rounds_before_gain: bool = False
    embedding_scale: float | None = None
    post_norms: bool = False
    biases: tuple[str, ...] = ()
    logit_softcap: float | None = None
    own_input: int = 0
    layer_scalar: bool = False
    head: str = "embed_tokens"
    experts: bool = False

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def settings(self) -> dict[str, object]:
        """What a report says of it: everything that is one number or word for the whole decoder."""
        first = self.attention[0]
        whole = {name: value for name, value in asdict(self).items() if name not in ("attention", "sites", "biases")}
        return whole | {"layers": self.layers, "heads": first.heads, "kv_heads": first.kv_heads}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder to be bounded: its recipe, and its weights by Hugging Face's names without the leading `model.`

    `source`, `sha256` and `notes` are as in a Checkpoint.
    """

    source: str
    sha256: str
    recipe: Recipe
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def of_gemma(checkpoint: Checkpoint) -> Decoder:
    """The kit's own Gemma 1, 2 or 3."""
    return Decoder(
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        recipe=_gemma(checkpoint.config),
        tensors=checkpoint.tensors,
        notes=checkpoint.notes,
    )


def _gemma(config: GemmaConfig) -> Recipe:
    def attention(layer: int) -> Attention:
        window = config.context if config.is_global(layer) else config.window or 1
        return Attention(
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            keys=min(config.context, window),
            scale=config.query_scalar**-0.5,
            source=layer,
            softcap=config.attention_softcap,
            query_key_norm=config.query_key_norm,
        )

    return Recipe(
        family=config.model_type,
        hidden_size=config.hidden_size,
        vocabulary=config.vocabulary,
        attention=tuple(map(attention, range(config.layers))),
        activation="gelu",
        sites=OWN,
        added=1.0,
        embedding_scale=config.hidden_size**0.5,
        post_norms=config.post_norms,
        logit_softcap=config.logit_softcap,
    )

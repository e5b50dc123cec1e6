"""Models that are no decoders of text: T5, Whisper, ViT, SigLIP, an embedding model, and a VAE."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from truth.models import VAE, Embedder, new, siglip, t5, vit, whisper
from truth.plants import Run, answer, lost_places, only_at
from truth.row import Expected, Origin, Planted, Row

SHORT = torch.tensor([[1, 5, 6]])
ENCODED = torch.tensor([[45, 9, 49, 55, 44]])
MEL = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PAIR = torch.tensor([[11, 12, 13, 0, 0], [21, 22, 23, 24, 25]])
KEPT = (PAIR != 0).long()


def dtype_of(m: Any) -> torch.dtype:
    return next(m.parameters()).dtype


def run_t5(m: Any) -> Tensor:
    return m(input_ids=ENCODED, decoder_input_ids=SHORT).logits


def run_whisper(m: Any) -> Tensor:
    return m(input_features=MEL.to(dtype_of(m)), decoder_input_ids=SHORT).logits


def run_pixels(m: Any) -> Tensor:
    return m(PIXELS.to(dtype_of(m))).last_hidden_state


def run_embedder(m: Any) -> Tensor:
    return m(PAIR, KEPT)


def run_vae(m: Any) -> Tensor:
    return m(PIXELS.to(dtype_of(m)))


def short(path: str) -> str:
    return path.removeprefix("model.")


def linear(
    build: Callable[[], Any],
    run: Run,
    path: str,
    at: int | None,
    *,
    place: int | None = None,
    value: float = 80000.0,
    operators: tuple[str, ...] = ("matmul",),
    symptom: bool = True,
    **rest: Any,
) -> Planted:
    """A linear layer's output past the maximum at one place (of all that it is given, joined)."""
    model = new(build)
    answer(model, path, run, {(at or 0) if place is None else place: value})
    model.half()

    def shown(result: Any) -> None:
        assert not lost_places(model, path, run, inputs=True)
        places = lost_places(model, path, run)
        assert places
        if at is not None:
            only_at(places, at, 0)

    return Planted(
        model=model, run=run, symptom=shown if symptom else None,
        expected=Expected(
            sites=(short(path),), operators=operators, kinds=("overflow",),
            **{"channel": 0, "value": value, "step": 0, "row": 0, "position": at, "outcome": "reached",
               "says": ("65,504",)} | rest,
        ),
    )  # fmt: skip


def weight(build: Callable[[], Any], run: Run, path: str, value: float = math.nan, **rest: Any) -> Planted:
    """A weight that is not finite."""
    model = new(build)
    model.get_parameter(path).data.flatten()[3] = value
    model.half()
    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=(f"{short(path).rpartition('.')[0]}*",), kinds=("weight",), step=0,
            origin=Origin(kinds=("weight",), names=(short(path), path), finite=False), outcome="reached",
            says=(path.rpartition(".")[0].rpartition(".")[2],), never=("overflows in", "starts with"), **rest,
        ),
    )  # fmt: skip


def planted_input(build: Callable[[], Any], run: Run, name: str, site: str) -> Planted:
    return Planted(
        model=new(build).half(), run=run,
        expected=Expected(
            sites=(site,), kinds=("input",), step=0, outcome="reached", says=(name,),
            origin=Origin(kinds=("input",), names=(name, f"*{name}*"), finite=False),
            never=("overflows in", "finite operands", "starts with"),
        ),
    )  # fmt: skip


def damaged(values: Tensor) -> Tensor:
    values = values.half().clone()
    values.flatten()[5] = math.nan
    return values


NO_TEXT = ("at token", "starts with")

T5_ENCODER = "encoder.block.1.layer.1.DenseReluDense"
T5_DECODER = "decoder.block.1.layer.2.DenseReluDense"


def t5_clamped() -> Planted:
    """The block clamps what its feed-forward part made infinite: finite in the end, and wrong."""
    model = new(t5)
    path = f"{T5_ENCODER}.wo"
    answer(model, path, run_t5, {2: 80000.0})
    with torch.inference_mode():
        right = run_t5(model)
    model._keep_in_fp32_modules = None
    model.half()

    def symptom(result: Tensor) -> None:
        only_at(lost_places(model, path, run_t5), 2, 0)
        assert bool(result.isfinite().all())

    assert bool(right.isfinite().all())
    return Planted(
        model=model, run=run_t5, symptom=symptom,
        expected=Expected(
            sites=(path,), operators=("matmul",), kinds=("overflow",), row=0, position=2, positions=(2,), channel=0,
            token=int(ENCODED[0, 2]), value=80000.0, step=0, outcome="absorbed", absorbed_by=("clamp",),
            says=("clamp",),
        ),
    )  # fmt: skip


def t5_product(stack: str, at: int, ids: Tensor) -> Planted:
    model = new(t5)
    for part, value in (("wi_0", 30.0), ("wi_1", 3000.0)):
        answer(model, f"{stack}.{part}", run_t5, {at: value})
    model.half()
    return Planted(
        model=model, run=run_t5,
        symptom=lambda result: only_at(lost_places(model, f"{stack}.wo", run_t5, inputs=True), at, 0),
        expected=Expected(
            sites=(f"{stack}/mul.*",), operators=("mul",), kinds=("overflow",), row=0, position=at, positions=(at,),
            token=int(ids[0, at]), channel=0, value=90000.0, step=0, outcome="absorbed", absorbed_by=("clamp",),
        ),
    )  # fmt: skip


def t5_scores() -> Planted:
    """T5 does not scale its scores, so nothing after them would help."""
    model = new(t5)
    attention = "encoder.block.0.layer.0.SelfAttention"
    for part in ("q", "k"):
        model.get_submodule(f"{attention}.{part}").weight.data[:16] = 0
        answer(model, f"{attention}.{part}", run_t5, {3: 300.0})
    model.half()
    return Planted(
        model=model, run=run_t5,
        expected=Expected(
            sites=(f"{attention}/matmul.0",), operators=("matmul",), kinds=("overflow",), row=0, position=3,
            token=int(ENCODED[0, 3]), value=90000.0, step=0, outcome="reached", never=("before (it is|being) scaled",),
        ),
    )  # fmt: skip


class HalfNorm(nn.Module):
    """A layer norm spelled out, in whatever dtype it is given."""

    def __init__(self, like: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, True)
        return d / ((d * d).mean(-1, True) + 1e-5).sqrt() * self.weight + self.bias


def whisper_norm() -> Planted:
    """One frame's square is infinite, and a number by infinity is zero: finite in the end, and wrong."""
    model = new(whisper)
    model.model.encoder.embed_positions.weight.data[3, 0] = 800
    layer = model.model.encoder.layers[1]
    layer.self_attn_layer_norm = HalfNorm(layer.self_attn_layer_norm)
    model.half()
    return Planted(
        model=model, run=run_whisper,
        expected=Expected(
            sites=("encoder.layers.1.self_attn_layer_norm/mul.0",), operators=("mul",), kinds=("overflow",), row=0,
            position=3, positions=(3,), step=0, outcome="absorbed", harmless=False, absorbed_by=("div",),
            never=NO_TEXT, says=("frame",),
        ),
    )  # fmt: skip


def embedder_length() -> Planted:
    """Σ x² of the pooled vector is infinite, and the vector becomes zero."""
    model = new(Embedder)
    model.encoder.get_submodule("encoder.layer.1.output.LayerNorm").weight.data[:] = 200.0
    model.encoder.get_submodule("encoder.layer.1.output.LayerNorm").bias.data[:] = 0.0
    model.half()

    def symptom(result: Tensor) -> None:
        assert bool((result == 0).all())

    return Planted(
        model=model, run=run_embedder, symptom=symptom,
        expected=Expected(
            sites=("/sum.*", "/mul.*"), operators=("sum", "mul"), kinds=("overflow",), step=0, outcome="absorbed",
            harmless=False, absorbed_by=("div",), never=(r"at token \d", "starts with"),
        ),
    )  # fmt: skip


def embedder_empty() -> Planted:
    """A text without a token: its mean is nothing by nothing, in any format."""
    model = new(Embedder).half()
    mask = KEPT.clone()
    mask[0] = 0

    def run(m: Any) -> Tensor:
        return m(PAIR, mask)

    return Planted(
        model=model, run=run,
        symptom=lambda result: only_row(result, 0),
        expected=Expected(
            sites=("/div.0", "encoder*"), operators=("div",), kinds=("invalid",), step=0, row=0, rows=(0,),
            outcome="reached", never=("wider range", "starts with", "overflows in"), no_rounding=True,
        ),
    )  # fmt: skip


def only_row(result: Tensor, row: int) -> None:
    assert (~result.isfinite()).any(-1).nonzero().flatten().tolist() == [row]


def vae_convolution(path: str, site: str = "") -> Planted:
    """A convolution whose first channel is past the maximum."""
    model = new(VAE)
    layer = model.get_submodule(path)
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        run_vae(model)
    hook.remove()
    factor = 80000.0 / float(seen[0][:, 0].abs().max())
    layer.weight.data[0] *= factor
    layer.bias.data[0] *= factor
    model.half()
    assert bool(layer.weight.isfinite().all())
    return Planted(
        model=model, run=run_vae,
        symptom=lambda result: only_first([place[1] for place in lost_places(model, path, run_vae)]),
        expected=Expected(
            sites=(site or path, f"{path}/*"), operators=("convolution", "conv2d", "mkldnn_convolution"),
            kinds=("overflow",), step=0, value=None, outcome="reached", never=("at token", "starts with"),
        ),
    )  # fmt: skip


def only_first(channels: list[int]) -> None:
    assert set(channels) == {0}, channels


def vae_variance() -> Planted:
    """The log variance of one place is 30: exp(15) is past float16's maximum."""
    model = new(VAE)
    model.encoder[2].weight.data[4] = 0
    model.encoder[2].bias.data[4] = 30.0
    model.half()
    return Planted(
        model=model, run=run_vae,
        expected=Expected(
            sites=("/exp.0",), operators=("exp",), kinds=("overflow",), value=math.exp(15.0), step=0,
            outcome="reached", never=("at token", "starts with"),
        ),
    )  # fmt: skip


def vae_residual() -> Planted:
    model = new(VAE)
    block = model.decoder[1]
    for layer in (model.decoder[0], block.conv):
        layer.weight.data[2] = 0
        layer.bias.data[2] = 40000.0
    model.half()
    return Planted(
        model=model, run=run_vae,
        expected=Expected(
            sites=("decoder.1",), operators=("add",), kinds=("overflow",), value=80000.0, step=0, outcome="reached",
            never=("at token", "starts with"), residual=True,
        ),
    )  # fmt: skip


def whisper_features() -> Planted:
    features = damaged(MEL)

    def run(m: Any) -> Tensor:
        return m(input_features=features, decoder_input_ids=SHORT).logits

    return planted_input(whisper, run, "input_features", "encoder.conv1*")


def pixels(build: Callable[[], Any], site: str) -> Planted:
    values = damaged(PIXELS)
    return planted_input(build, lambda m: m(pixel_values=values).last_hidden_state, "pixel_values", site)


def vae_pixels() -> Planted:
    values = damaged(PIXELS)
    return planted_input(VAE, lambda m: m(values), "pixels", "encoder.0*")


def row(name: str, root: int, family: str, make: Callable[[], Planted]) -> Row:
    return Row(name=name, root=root, family=family, make=make)


IMAGES = {"vit": (vit, "layers.1.{}", "mlp.fc1", "mlp.fc2", "attention.o_proj", "attention"),
          "siglip": (siglip, "encoder.layers.1.{}", "mlp.fc1", "mlp.fc2", "self_attn.out_proj",
              "self_attn")}  # fmt: skip


def _images() -> tuple[Row, ...]:
    found = []
    for family, (build, layer, up, down, out, attention) in IMAGES.items():
        for path, root in ((up, 5), (down, 5), (out, 8)):
            make = functools.partial(linear, build, run_pixels, layer.format(path), 2, says=(), never=NO_TEXT)
            found.append(row(f"{path} of one patch", root, family, make))
        lost, large = (layer.format(f"{part}.weight") for part in (down, up))
        found += [
            row("NaN in a weight", 1, family, functools.partial(weight, build, run_pixels, lost)),
            row("weight past the maximum", 4, family, functools.partial(weight, build, run_pixels, large, 70000.0)),
            row("NaN in a pixel", 1, family, functools.partial(pixels, build, "embeddings*")),
            row("the last norm's gain", 5, family, functools.partial(last_norm, build, family)),
            row("scores", 5, family, functools.partial(image_scores, build, layer.format(attention))),
        ]
    return tuple(found)


def last_norm(build: Callable[[], Any], family: str) -> Planted:
    model = new(build)
    path = "layernorm" if family == "vit" else "post_layernorm"
    with torch.inference_mode():
        channel = int(run_pixels(model).abs().amax((0, 1)).argmax())
    model.get_submodule(path).weight.data[channel] = 60000.0
    model.half()
    return Planted(
        model=model, run=run_pixels,
        symptom=lambda result: only_channel(lost_places(model, path, run_pixels), channel),
        expected=Expected(
            sites=(path,), kinds=("overflow",), channel=channel, step=0, outcome="reached", never=NO_TEXT,
        ),
    )  # fmt: skip


def only_channel(places: list[tuple[int, ...]], channel: int) -> None:
    assert {place[-1] for place in places} == {channel}


def image_scores(build: Callable[[], Any], attention: str) -> Planted:
    model = new(build)
    for part in ("q_proj", "k_proj"):
        layer = model.get_submodule(f"{attention}.{part}")
        layer.weight.data[:16] = 0
        layer.bias.data[:16] = 0
        answer(model, f"{attention}.{part}", run_pixels, {2: 300.0})
    model.half()
    return Planted(
        model=model, run=run_pixels,
        expected=Expected(
            sites=(f"{attention}/matmul.0",), operators=("matmul",), kinds=("overflow",), value=90000.0, step=0,
            outcome="reached", never=NO_TEXT,
        ),
    )  # fmt: skip


ROWS: tuple[Row, ...] = (
    row("feed-forward of the encoder, clamped", 3, "t5", t5_clamped),
    row("gate · up of the encoder", 5, "t5", lambda: t5_product(T5_ENCODER, 2, ENCODED)),
    row("gate · up of the decoder", 6, "t5", lambda: t5_product(T5_DECODER, 1, SHORT)),
    row("scores that are not scaled", 5, "t5", t5_scores),
    row("key of the encoder's output", 6, "t5", lambda: linear(
        t5, run_t5, "decoder.block.0.layer.1.EncDecAttention.k", 3, token=int(ENCODED[0, 3]))),
    row("query in the decoder's first layer", 6, "t5", lambda: linear(
        t5, run_t5, "decoder.block.0.layer.0.SelfAttention.q", 2, token=int(SHORT[0, 2]))),
    row("NaN in a weight", 10, "t5", lambda: weight(t5, run_t5, f"{T5_ENCODER}.wi_1.weight")),
    row("logits", 10, "t5", lambda: linear(t5, run_t5, "lm_head", 2, token=int(SHORT[0, 2]))),
    row("a norm spelled out in half", 3, "whisper", whisper_norm),
    row("fc1 of the encoder", 6, "whisper", lambda: linear(
        whisper, run_whisper, "model.encoder.layers.0.fc1", 3, says=("frame",), never=NO_TEXT, outcome="absorbed",
        absorbed_by=("clamp",))),
    row("fc1 of the decoder", 6, "whisper", lambda: linear(
        whisper, run_whisper, "model.decoder.layers.0.fc1", 1, token=int(SHORT[0, 1]))),
    row("key of the encoder's output", 6, "whisper", lambda: linear(
        whisper, run_whisper, "model.decoder.layers.0.encoder_attn.k_proj", 4, never=NO_TEXT)),
    row("value projection", 8, "whisper", lambda: linear(
        whisper, run_whisper, "model.encoder.layers.1.self_attn.v_proj", 5, never=NO_TEXT)),
    row("NaN in a weight", 1, "whisper", lambda: weight(whisper, run_whisper, "model.encoder.conv2.weight")),
    row("NaN in the spectrogram", 1, "whisper", whisper_features),
    row("logits", 10, "whisper", lambda: linear(whisper, run_whisper, "proj_out", 2, token=int(SHORT[0, 2]))),
    *_images(),
    row("unit length", 3, "embedding", embedder_length),
    row("a text of padding", 4, "embedding", embedder_empty),
    row("intermediate layer", 6, "embedding", lambda: linear(
        Embedder, run_embedder, "encoder.encoder.layer.1.intermediate.dense", None, place=7, row=1, position=2,
        token=int(PAIR[1, 2]), channel=0)),
    row("output of the MLP", 5, "embedding", lambda: linear(
        Embedder, run_embedder, "encoder.encoder.layer.0.output.dense", None, place=5, row=1, position=0,
        token=int(PAIR[1, 0]), never=("starts with",))),
    row("padding alone", 6, "embedding", lambda: linear(
        Embedder, run_embedder, "encoder.encoder.layer.0.intermediate.dense", None, place=4, row=0, rows=(0,),
        position=4, token=0, never=("starts with",))),
    row("value projection", 8, "embedding", lambda: linear(
        Embedder, run_embedder, "encoder.encoder.layer.1.attention.self.value", None, place=6, row=1, position=1,
        token=int(PAIR[1, 1]))),
    row("NaN in a weight", 1, "embedding", lambda: weight(
        Embedder, run_embedder, "encoder.encoder.layer.1.output.dense.weight")),
    row("position embedding past the maximum", 4, "embedding", lambda: weight(
        Embedder, run_embedder, "encoder.embeddings.position_embeddings.weight", 70000.0)),
    row("first convolution", 5, "vae", lambda: vae_convolution("encoder.0")),
    row("convolution of a block", 5, "vae", lambda: vae_convolution("decoder.1.conv")),
    row("last convolution", 5, "vae", lambda: vae_convolution("decoder.3")),
    row("log variance", 5, "vae", vae_variance),
    row("residual sum", 5, "vae", vae_residual),
    row("NaN in a weight", 1, "vae", lambda: weight(VAE, run_vae, "encoder.1.conv.weight")),
    row("weight past the maximum", 4, "vae", lambda: weight(VAE, run_vae, "decoder.0.weight", 70000.0)),
    row("NaN in a pixel", 1, "vae", vae_pixels),
)  # fmt: skip

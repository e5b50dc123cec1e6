"""Encoders, with a decoder and without, towers of images, and an image decoder, from released configs made small."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from architectures import DIFFUSERS, OTHERS, TEXT, example
from torch import Tensor, nn

from scaled.decoders import built, down
from scaled.entry import Entry, Plant, Run, planted
from scaled.runs import PAD, answered, called, dtype_of, generated, ids, noise


@functools.cache
def _released(family: str) -> Any:
    model, _, _ = example(TEXT | OTHERS | DIFFUSERS, family)
    return model.config


CLAMPED = 300_000.0  # some families clamp what overflows: it takes more for that to show
_DERIVED = {"is_gated_act", "dense_act_fn"}  # from other settings, which are changed


def other(name: str, family: str, kind: Any, plant: Plant, *, part: str = "", **others: Any) -> Entry:
    """A model of class `kind` from the config of a family in the tables of architectures, or from a `part` of it.

    `others` are fields of the entry, or else settings.
    """
    own = {field: others.pop(field) for field in Entry.__dataclass_fields__ if field in others}

    def config() -> Any:
        return getattr(_released(family), part) if part else _released(family)

    def settings() -> dict[str, Any]:
        return {key: value for key, value in config().to_dict().items() if key not in _DERIVED} | others

    def construct(given: Mapping[str, Any], attention: str) -> nn.Module:
        return built(kind, type(config()).from_dict(dict(given)), attention)

    return Entry(name=name, settings=settings, construct=construct, plant=planted(plant), **own)


def _t5(name: str, **others: Any) -> Entry:
    block = "encoder.block.0.layer.1.DenseReluDense"
    up = "wi_1" if "gated" in others.get("feed_forward_proj", "") else "wi"
    plant = Plant(parameter=f"{block}.wo.weight", at=f"{block}.wo", louder=(f"{block}.{up}.weight",), size=CLAMPED)
    mask = (ids(12, 5) > 20).long()
    mask[:, :3] = 1
    return other(
        name, "T5", transformers.T5ForConditionalGeneration, plant,
        run=answered(ids(7, 2), input_ids=ids(12)),
        unseen={
            "longer": answered(ids(15, 3), input_ids=ids(29, 4)),
            "padded": answered(ids(7, 6), input_ids=ids(12, 5), attention_mask=mask),
            "generated": generated(ids(12, 7)),
        },
        decoder_start_token_id=PAD, num_layers=2, **others,
    )  # fmt: skip


def _whisper() -> Entry:
    return other(
        "Whisper", "Whisper", transformers.WhisperForConditionalGeneration,
        down(mlp="model.encoder.layers.{}", up="fc1", down="fc2", size=CLAMPED),
        run=answered(ids(7, 2), input_features=noise(2, 8, 64)), obstacle=("model.encoder.layers.0/add.1",),
    )  # fmt: skip


def _images(batch: int, seed: int) -> Tensor:
    return noise(batch, 3, 32, 32, seed=seed)


def _coded(images: Tensor, latents: Tensor) -> Run:
    """The latents that an autoencoder makes of images, and the images that it makes of other latents."""

    def run(model: Any) -> tuple[Tensor, ...]:
        dtype = dtype_of(model)
        return model.encode(images.to(dtype)).latent_dist.mode(), model.decode(latents.to(dtype)).sample

    return run


def _autoencoder() -> Entry:
    resnet = "decoder.mid_block.resnets.0"

    def construct(given: Mapping[str, Any], attention: str) -> nn.Module:
        import diffusers

        model: nn.Module = diffusers.AutoencoderKL.from_config(dict(given))
        return model

    return Entry(
        name="AutoencoderKL",
        settings=lambda: dict(_released("VAE")),
        construct=construct,
        plant=planted(
            Plant(parameter=f"{resnet}.conv2.weight", at=f"{resnet}.conv2", louder=(f"{resnet}.norm2.weight",))
        ),
        run=_coded(_images(1, 3), noise(1, 4, 8, 8)),
        unseen={"larger": _coded(_images(3, 4), noise(2, 4, 12, 16, seed=9))},
        attentions=("sdpa",),
        obstacle=("norm1", "1e-06 is added to it, which no setting"),
    )


def _tokens(output: str) -> dict[str, Any]:
    mask = (ids(12, 5) > 20).long()
    mask[:, :3] = 1
    return {
        "run": called(output, input_ids=ids(12)),
        "unseen": {
            "longer": called(output, input_ids=ids(29, 77)),
            "padded": called(output, input_ids=ids(12, 5), attention_mask=mask),
        },
    }


def _looks(output: str) -> dict[str, Any]:
    return {
        "run": called(output, pixel_values=_images(2, 3)),
        "unseen": {"other images": called(output, pixel_values=_images(3, 8))},
    }


_BERT = "encoder.layer.0"
_VISION: Callable[..., Plant] = functools.partial(down, up="fc1", down="fc2")
_LOGITS = "logits_per_image"

OTHER = (
    _t5("T5 relu"),
    _t5("T5 gated gelu", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    _whisper(),
    other("ViT", "ViT", transformers.ViTForImageClassification, _VISION(mlp="vit.layers.{}.mlp"), num_labels=10,
          **_looks("logits")),
    other("SigLIP vision", "SigLIP", transformers.SiglipVisionModel, _VISION(mlp="encoder.layers.{}.mlp"),
          part="vision_config", obstacle=("the model's output keeps its scale",), **_looks("pooler_output")),
    other("SigLIP", "SigLIP", transformers.SiglipModel, _VISION(mlp="vision_model.encoder.layers.{}.mlp"),
          run=called(_LOGITS, input_ids=ids(7), pixel_values=_images(2, 3)),
          unseen={"others": called(_LOGITS, input_ids=ids(12, 6), pixel_values=_images(3, 8))}),
    other("BERT", "BERT", transformers.BertForMaskedLM,
          Plant(parameter=f"bert.{_BERT}.output.dense.weight", at=f"bert.{_BERT}.output.dense",
                louder=(f"bert.{_BERT}.intermediate.dense.weight",)),
          obstacle=("LayerNorm", "follows layer_norm_eps"), **_tokens("logits")),
    other("BERT without a head", "BERT", transformers.BertModel,
          Plant(parameter=f"{_BERT}.output.dense.weight", at=f"{_BERT}.output.dense",
                louder=(f"{_BERT}.intermediate.dense.weight",)),
          **_tokens("last_hidden_state")),
    _autoencoder(),
)  # fmt: skip

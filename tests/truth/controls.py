"""Runs in which nothing is wrong, so nothing may be said."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truth.decoders import IDS, forward
from truth.models import DECODERS, VAE, Embedder, decoder, mamba, new, siglip, t5, vit, whisper
from truth.row import Planted, Row

PIXELS = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
SHORT = torch.tensor([[1, 5, 6]])


def _plain(name: str) -> Planted:
    return Planted(model=decoder(name).half(), run=forward, expected=None)


def _padded(name: str) -> Planted:
    """A batch in which the first row is padded on the left, as generation wants it."""
    ids = torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])
    mask = (ids != 0).long()

    def run(m: Any) -> Tensor:
        return m(ids, attention_mask=mask).logits

    return Planted(model=decoder(name).half(), run=run, expected=None)


def _sampled(name: str) -> Planted:
    """Top-k and top-p put -inf in the place of logits that are not to be drawn."""

    def run(m: Any) -> Tensor:
        out = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=True, top_k=5, top_p=0.8,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    return Planted(model=decoder(name).half(), run=run, expected=None)


def _generated(how: dict[str, Any]) -> Planted:
    """Ways to generate that move and crop the cache."""

    def run(m: Any) -> Tensor:
        ids = torch.tensor([[10, 11, 12, 13, 10, 11]])
        out = m.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, return_dict_in_generate=True,
            output_logits=True, **how,
        )  # fmt: skip
        return torch.cat(out.logits)

    return Planted(model=decoder("llama").half(), run=run, expected=None)


GENERATED: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "drafts from the prompt": {"prompt_lookup_num_tokens": 2},
    "beams": {"num_beams": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "tokens suppressed": {"suppress_tokens": list(range(20, 100)), "min_new_tokens": 2},
    "sampling by min-p": {"do_sample": True, "min_p": 0.1, "temperature": 0.7},
    "sampling by typicality": {"do_sample": True, "typical_p": 0.6, "epsilon_cutoff": 1e-3},
}


def _other(build: Callable[[], Any], run: Callable[[Any], Any]) -> Callable[[], Planted]:
    return lambda: Planted(model=new(build).half(), run=run, expected=None)


def _mel(m: Any) -> Tensor:
    mel = torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16).half()
    return m(input_features=mel, decoder_input_ids=SHORT).logits


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "t5": (t5, lambda m: m(input_ids=IDS, decoder_input_ids=SHORT).logits),
    "whisper": (whisper, _mel),
    "vit": (vit, lambda m: m(PIXELS.half()).last_hidden_state),
    "siglip": (siglip, lambda m: m(PIXELS.half()).last_hidden_state),
    "mamba": (mamba, forward),
    "embedding": (Embedder, lambda m: m(IDS, torch.ones_like(IDS))),
    "vae": (VAE, lambda m: m(PIXELS.half())),
}

ROWS: tuple[Row, ...] = (
    *(Row(name="control, forward", root=10, family=name, make=partial(_plain, name)) for name in DECODERS),
    *(Row(name="control, left padding", root=2, family=name,
        make=partial(_padded, name)) for name in DECODERS),
    *(Row(name="control, sampling", root=7, family=name, make=partial(_sampled, name)) for name in DECODERS),
    *(Row(name=f"control, {name}", root=7, family="llama", make=partial(_generated, how)) for name,
        how in GENERATED.items()),
    *(Row(name="control, forward", root=10, family=name, make=_other(*how)) for name, how in OTHERS.items()),
)  # fmt: skip

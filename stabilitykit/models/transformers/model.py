"""A model of transformers' as a run wants it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.errors import CheckpointError, MisuseError, SamplingError
from stabilitykit.models.gemma.sampler import Sampler
from stabilitykit.models.subject import Continuation, Saw
from stabilitykit.models.transformers.tokenizer import HuggingFaceTokenizer


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A model of transformers' with its tokenizer, where it has one: what `stabilitykit profile hf:FOLDER` runs.

    `module` is the PreTrainedModel, or the PeftModel around it where there is an adapter.
    """

    module: Any
    tokenizer: HuggingFaceTokenizer | None
    source: str
    sha256: str
    notes: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("source", "sha256", "notes"):  # where a recorder reads them, as off the kit's own model
            setattr(self.module, name, getattr(self, name))

    @cached_property
    def causal(self) -> Any:
        """The model that makes the logits, without what an adapter wraps around it."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    @property
    def config(self) -> Any:
        return self.causal.config.get_text_config()

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers: the longest list of modules there is."""
        lists = [m for m in self.causal.modules() if isinstance(m, nn.ModuleList)]
        return list(max(lists, key=len, default=()))

    @property
    def device(self) -> torch.device:
        return torch.device(self.causal.device)

    @property
    def context(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", 1 << 62))

    @property
    def pad(self) -> int:
        return 0 if self.tokenizer is None else self.tokenizer.pad

    @cached_property
    def generates(self) -> bool:
        """Whether it continues a text; an encoder reads one, and what it returns is judged."""
        can = getattr(self.causal, "can_generate", None)
        return can is not None and bool(can())

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.causal.config, "is_encoder_decoder", False))

    def arguments(self, ids: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        """A model with an encoder and a decoder is given the ids to encode, and decodes its start token."""
        takes = inspect.signature(self.causal.forward).parameters
        given: dict[str, Any] = {"input_ids": ids}
        if padding is not None:
            given["attention_mask"] = padding.long()
            if "position_ids" in takes and self.generates:
                given["position_ids"] = (padding.long().cumsum(-1) - 1).clamp(min=0)
        if self.is_encoder_decoder and "decoder_input_ids" in takes:
            start = getattr(self.causal.config, "decoder_start_token_id", None)
            given["decoder_input_ids"] = ids.new_full((len(ids), 1), self.pad if start is None else start)
        return given

    def piece(self, token: int) -> str:
        return f"<row {token}>" if self.tokenizer is None else self.tokenizer.piece(token)

    def blank(self, dtype: torch.dtype) -> nn.Module | None:
        """None where something in the model is none of transformers' own: an adapter, quantised weights."""
        if self.causal is not self.module or getattr(self.causal.config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            model: nn.Module = type(self.causal)(self.causal.config)
        return model.to(dtype).eval()

    def decode(self, ids: Tensor, how: Continuation, saw: Saw) -> list[list[int]]:
        """transformers' own `generate`, with `saw` looking at each step's logits; torch's generators stay as they were.

        Logits are those of the last position. Where they are not finite, sampling raises torch's RuntimeError on a CPU
        and SamplingError elsewhere, before the device asserts; greedy decoding ends after that token. `every_logit`
        takes one pass and a draw instead of `generate`, and so does a model that only reads, without the draw. Raises
        MisuseError for a mask of one's own, and for more tokens than that one pass makes.
        """
        self._check(ids, how)
        if not self.generates or how.every_logit:
            return self._read(ids, how, saw)
        sampling, drawn = how.sampling, bool(how.sampling.temperature)
        from transformers import GenerationConfig, StoppingCriteriaList

        told = self.causal.generation_config
        draw: dict[str, Any] = {"do_sample": False}
        if drawn:
            draw = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")} | {"do_sample": True}
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=how.new_tokens, pad_token_id=self.pad, eos_token_id=told.eos_token_id, **draw
        )
        ended = False

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal ended
            ended = saw(output.logits)
            if ended and drawn and output.logits.device.type != "cpu":
                raise SamplingError("probability tensor contains either `inf`, `nan` or element < 0")

        def stop(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(so_far),), ended, device=so_far.device)

        attention = torch.ones_like(ids) if how.padding is None else how.padding.long()
        handle = self.causal.register_forward_hook(look, with_kwargs=True)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                made = self.module.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        finally:
            handle.remove()
        new: list[list[int]] = made[:, 1 if self.is_encoder_decoder else ids.shape[1] :].tolist()
        return new

    def _check(self, ids: Tensor, how: Continuation) -> None:
        sampling = how.sampling
        if how.mask is not None:
            raise MisuseError("transformers' models make their own masks; leave out mask.")
        if how.every_logit and how.new_tokens > 1:
            raise MisuseError(
                "transformers' generate() has no place for the logits of all positions; leave out every_logit."
            )
        if how.new_tokens > 1 and not self.generates:
            raise MisuseError(
                f"{type(self.causal).__name__} reads a text and writes none, so nothing can be generated; it runs "
                "once, and what it returns is judged. Leave out --generate (in Python, new_tokens)."
            )
        if sampling.temperature and not (0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise MisuseError(
                "transformers needs a top_p above 0 and at most 1, and a top_k of at least 0 (0 keeps every token); "
                f"got {sampling.top_p} and {sampling.top_k}."
            )
        rows = self.causal.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= rows:
            raise CheckpointError(
                f"{self.source}: the tokenizer gave the id {int(ids.max()):,}, but the embedding has {rows:,} rows. Is "
                "it another checkpoint's tokenizer?"
            )

    def _read(self, ids: Tensor, how: Continuation, saw: Saw) -> list[list[int]]:
        """One pass with the logits of all positions, and a draw from the last where a text is continued."""
        output = run_on(self.module, self.arguments(ids, how.padding))
        if not self.generates:
            return [[] for _ in ids]
        ended = saw(output.logits)
        last, sampling = output.logits[:, -1].float(), how.sampling
        if ended and sampling.temperature and last.device.type != "cpu":
            raise SamplingError("probability tensor contains either `inf`, `nan` or element < 0")
        generator = None if sampling.seed is None else torch.Generator(last.device).manual_seed(sampling.seed)
        drawn: Tensor = Sampler()(
            last,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            generator=generator,
        )
        return [[token] for token in drawn.tolist()]


def run_on(module: nn.Module, given: Mapping[str, Any]) -> Any:
    """One forward pass. Raises MisuseError for arguments that the model cannot be called with."""
    try:
        return module(**given)
    except (TypeError, ValueError, AttributeError) as error:  # an argument too many, or too few
        raise MisuseError(
            f"{type(module).__name__} cannot be called with {', '.join(given)}: {error}. Give it what its forward "
            "takes, in a file of tensors by name (.safetensors, .npz or .pt)."
        ) from error

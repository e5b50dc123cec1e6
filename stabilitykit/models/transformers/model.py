"""A model of transformers' as a run wants it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.errors import CheckpointError, MisuseError, SamplingError
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
        and SamplingError elsewhere, before the device asserts; greedy decoding ends after that token. Raises
        MisuseError for a mask of one's own and for `every_logit`, which `generate` has no place for.
        """
        sampling = how.sampling
        if how.mask is not None or how.every_logit:
            raise MisuseError(
                "transformers' generate() makes its own masks and only the last logits; leave out mask and every_logit."
            )
        drawn = bool(sampling.temperature)
        if drawn and not (0 < sampling.top_p <= 1 and sampling.top_k >= 0):
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
        new: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return new

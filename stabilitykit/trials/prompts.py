"""Prompts on a checkpoint, run as often as needed: in each dtype, shortened, or with its weights scaled."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stabilitykit.commands import again
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.sampler import Sampler
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.subject import Continuation, Sampling, Subject
from stabilitykit.models.transformers import HuggingFaceModel
from stabilitykit.run.batch import Asked
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.inputs import Tensors
from stabilitykit.run.source import Source, SourceOptions, open_source
from stabilitykit.scaling.subjects import fitted

_MOST = 1 << 27  # logits: half a gigabyte in float32
_SAMPLING = Sampling()
_OPENED: "WeakKeyDictionary[nn.Module, Subject]" = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnCheckpoint:
    """A run on a checkpoint in `dtype`. `name` is the checkpoint's, as the user gave it."""

    name: str
    opened: Source
    dtype: str
    device: str = "cpu"
    kind: str | None = None  # how 16-bit products are summed
    progress: Progress | None = field(default=None, compare=False)
    grad: bool = False
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return self.name

    @property
    def matmul(self) -> str | None:
        return self.kind or preferred_matmul(self.dtype, self.device)

    @property
    def text(self) -> Callable[[int], str]:
        return self.opened.piece

    def in_dtype(self, dtype: str) -> str:
        return again("profile", self.name, "--dtype", dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted(_OnCheckpoint):
    """`tokens` of each row, continued by `new_tokens` as `sampling` says; shorter rows are padded on the left."""

    tokens: tuple[tuple[int, ...], ...]
    new_tokens: int = 1
    sampling: Sampling = _SAMPLING

    def with_tokens(self, rows: Sequence[Sequence[int]]) -> "Prompted":
        """The same on other tokens."""
        return replace(self, tokens=tuple(map(tuple, rows)))

    def model(self, dtype: str) -> nn.Module:
        subject = self.opened.subject_in(dtype, stage(f"preparing weights in {dtype}", self.progress))
        _OPENED[subject.module] = subject
        return subject.module

    def run(self, model: nn.Module) -> Any:
        subject = _OPENED[model]
        width = max(map(len, self.tokens))
        if width + self.new_tokens - 1 > subject.context:
            raise MisuseError(
                f"The prompt does not fit the model's context of {subject.context:,} tokens: it has {width:,}. Shorten "
                "it."
            )
        starts = [width - len(row) if subject.generates else 0 for row in self.tokens]  # what goes on ends in its text
        rows = [
            [subject.pad] * at + list(row) + [subject.pad] * (width - len(row) - at)
            for at, row in zip(starts, self.tokens, strict=True)
        ]
        ids = torch.tensor(rows, device=subject.device)
        real = torch.tensor(
            [[at <= n < at + len(row) for n in range(width)] for at, row in zip(starts, self.tokens, strict=True)],
            device=ids.device,
        )
        padding = None if bool(real.all()) else real
        if self.new_tokens == 1 and isinstance(subject, HuggingFaceModel):
            return self._prefill(subject, ids, padding)
        how = Continuation(
            new_tokens=self.new_tokens,
            sampling=self.sampling,
            padding=padding,
            every_logit=not isinstance(subject, HuggingFaceModel) and self._fits(ids, model),
        )
        return subject.decode(ids, how, lambda logits: False)

    def _prefill(self, subject: HuggingFaceModel, ids: Tensor, padding: Tensor | None) -> Any:
        """One pass, as `generate` begins, but with the logits of all positions, and a draw from the last; of a model
        that only reads what it returns.
        """
        given = subject.arguments(ids, padding)
        if "logits_to_keep" in inspect.signature(subject.causal.forward).parameters and not self._fits(
            ids, subject.module
        ):
            given["logits_to_keep"] = 1
        output = subject.module(**given)
        if not subject.generates:
            return output
        logits = output.logits
        how = self.sampling
        generator = None if how.seed is None else torch.Generator(logits.device).manual_seed(how.seed)
        drawn: Tensor = Sampler()(
            logits[:, -1].float(),
            temperature=how.temperature or None,
            top_p=how.top_p,
            top_k=how.top_k,
            generator=generator,
        )
        return drawn

    def _fits(self, ids: Tensor, model: nn.Module) -> bool:
        """Whether the logits of all positions are few enough to be kept beside those of another run."""
        rows = max((one.shape[0] for one in model.parameters() if one.ndim == 2), default=0)
        return ids.numel() * rows <= _MOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed(_OnCheckpoint):
    """One forward pass on tensors by the names of the model's arguments, floating ones in its dtype."""

    given: Mapping[str, Tensor]

    def model(self, dtype: str) -> nn.Module:
        return self.opened.subject_in(dtype, stage(f"preparing weights in {dtype}", self.progress)).module

    def run(self, model: nn.Module) -> Any:
        return model(**fitted(self.given, model))


def fed(
    checkpoint: str,
    given: Tensors,
    *,
    dtype: str = "float16",
    matmul: str | None = None,
    progress: Progress | None = None,
    **how: Any,
) -> "Fed | Prompted":
    """Opens a checkpoint for these tensors, and for a prompt where they are a row of tokens alone; `how` are options of
    `profile`. Raises as that does.
    """
    options: SourceOptions = {**how}  # type: ignore[typeddict-item]
    opened = open_source(checkpoint, given, matmul=matmul, progress=progress, **options)
    device = str(how.get("device", "cpu"))
    if opened.given is None:
        return Prompted(
            name=checkpoint, opened=opened, tokens=(tuple(opened.tokens),), dtype=dtype, device=device, kind=matmul,
            progress=progress,
        )  # fmt: skip
    return Fed(
        name=checkpoint, opened=opened, given=opened.given, dtype=dtype, device=device, kind=matmul, progress=progress
    )


def prompted(
    checkpoint: str,
    prompts: Sequence[Asked],
    *,
    dtype: str = "float16",
    new_tokens: int = 1,
    sampling: Sampling | None = None,
    matmul: str | None = None,
    progress: Progress | None = None,
    **how: Any,
) -> Prompted:
    """Opens a checkpoint for these prompts; `how` are options of `profile` but for chats. Raises as that does."""
    first, *rest = prompts
    options: SourceOptions = {**how, "chat": first.chat, "system": first.system}  # type: ignore[typeddict-item]
    opened = open_source(
        checkpoint, first.text, matmul=matmul, more_tokens=new_tokens - 1, progress=progress, **options
    )
    rows = [opened.read(one) for one in prompts] if rest or first.earlier else [opened.tokens]
    return Prompted(
        name=checkpoint,
        opened=opened,
        tokens=tuple(map(tuple, rows)),
        dtype=dtype,
        device=str(how.get("device", "cpu")),
        new_tokens=new_tokens,
        sampling=sampling or _SAMPLING,
        kind=matmul,
        progress=progress,
    )

"""One prompt in one dtype or several, recorded: where, and why, numbers leave the range."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from stabilitykit.diagnosis import document
from stabilitykit.errors import MisuseError
from stabilitykit.files import check_new, new_folder
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.matmul import check_matmul
from stabilitykit.models.subject import Sampling, Subject
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records import Level, Recording
from stabilitykit.run.case import Progress, Run, reference_of, run_dtypes
from stabilitykit.run.source import SourceOptions, counting, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What `profile` recorded: the same prompt in each dtype, in the order asked for.

    `tokens` are the prompt's ids, `pieces` what they stand for, and `runs` hold a recording each, with the error that
    sampling raised, if any.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def recordings(self) -> list[Recording]:
        return [run.recording for run in self.runs]

    @property
    def reference(self) -> Recording | None:
        """The recording of the widest run, in float64 or else in float32; None where neither ran."""
        name = reference_of([recording.header.dtype for recording in self.recordings])
        return None if name is None else self[name]

    def __getitem__(self, dtype: str) -> Recording:
        """The recording in `dtype`. Raises KeyError for one that did not run."""
        return {recording.header.dtype: recording for recording in self.recordings}[dtype]

    def documents(self) -> list[dict[str, Any]]:
        """The findings of each run, as `stabilitykit profile --json` prints them."""
        return [document(recording, self.reference) for recording in self.recordings]

    def save(self, folder: str | Path) -> None:
        """Writes DTYPE.parquet for each run, and findings.json, into a new or empty folder.

        Raises MisuseError where the folder holds something already, or cannot be written.
        """
        check_new(Path(folder))
        found = self.documents()
        with new_folder(Path(folder)) as aside:
            for recording in self.recordings:
                recording.save(aside / f"{recording.header.dtype}.parquet")
            text = json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False, allow_nan=False, indent=2)
            (aside / "findings.json").write_text(text + "\n", encoding="utf-8")


def profile(
    checkpoint: str | Path | Gemma | Subject,
    prompt: str,
    *,
    dtypes: Sequence[str] | None = None,
    new_tokens: int = 1,
    left_padding: int = 0,
    sampling: Sampling | None = None,
    level: Level = "operators",
    fused_softmax: bool = True,
    matmul: str | None = None,
    redact: bool = False,
    progress: Progress | None = None,
    **how: Unpack[SourceOptions],
) -> Profile:
    """Runs `prompt` in each dtype and records every tensor of each forward pass and of the sampling after it.

    Args:
        checkpoint: what `open_model` takes: `gemma3-270m`, a folder, a file, `random:SIZE`, `hf:NAME`; or a model that
            `open_model` or `load` opened, which runs in its own dtype.
        prompt: the text.
        dtypes: of float16, bfloat16, float32 and float64; float16 unless given. The widest of float32 and float64 runs
            last, and tells what the elements that overflowed in the others should have been, and how far every tensor
            of theirs is from its own: the records' `deviation`.
        new_tokens: tokens to generate, at least 1. Each is a forward pass and a draw; generation ends at the first
            step whose logits are not finite.
        left_padding: pad tokens before the prompt.
        sampling: `Sampling(temperature, top_p, top_k, seed)`, gemma_pytorch's defaults unless given; a temperature of
            None decodes greedily.
        level: operators records every operator and module, modules and layers less.
        fused_softmax: recompute the softmax inside fused attention kernels, for its statistics.
        matmul: how 16-bit products are summed: native, float32-accumulate, or float16-accumulate:K (rounded to
            float16 every K terms). None is float32-accumulate on a CPU, native elsewhere.
        redact: keep the prompt and its tokens out of the recordings.
        progress: called with (what is being done, how much of it is done, out of how much).
        bos: begin with <bos>; True unless given.
        chat: wrap the prompt in Gemma's turn template, or in the template of an `hf:` tokenizer.
        system: a system text for the template.
        special_tokens: read <bos> and the like in the prompt as tokens; as text unless given.
        device, rounding, rescale, attention, adapter, trust_remote_code, stream: as in `open_model`.

    Returns:
        A Profile: `profile(...)["float16"]` is a Recording, which `verdict` and `chain` explain.

    Raises:
        MisuseError: for what cannot be meant: an unknown dtype or device, an empty prompt, one that does not fit the
            model's context, options that contradict each other.
        CheckpointError: for a checkpoint that is damaged, or is not what it was taken for.

    >>> tiny = "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"
    >>> found = profile(tiny, "Hi", dtypes=["float16", "float32"], rescale=65536.0)
    >>> found.pieces
    ('<bos>', 'H', 'i')
    >>> found["float16"].first_break().label, found["float32"].first_break()
    ('embedding, scaled', None)
    """
    for name in dtypes or ():
        parse_dtype(name)
    if matmul is not None:
        check_matmul(matmul)
    for what, value, least in (("new_tokens", new_tokens, 1), ("left_padding", left_padding, 0)):
        if value < least:
            raise MisuseError(f"{what} must be at least {least}, got {value}.")
    source = open_source(
        checkpoint, prompt, matmul=matmul, more_tokens=left_padding + new_tokens - 1, progress=progress, **how
    )
    chosen = tuple(dtypes or source.dtypes)
    weights = check_weights(
        source.tensors, list(dict.fromkeys(chosen)), counting(progress, source.bytes), blocks=source.blocks
    )
    runs = run_dtypes(
        source.subject_in,
        source.tokens,
        chosen,
        new_tokens=new_tokens,
        left_padding=left_padding,
        sampling=sampling,
        level=level,
        fused_softmax=fused_softmax,
        matmul=matmul,
        redact=redact,
        weights=weights,
        progress=progress,
    )
    return Profile(tokens=tuple(source.tokens), pieces=tuple(map(source.piece, source.tokens)), runs=tuple(runs))

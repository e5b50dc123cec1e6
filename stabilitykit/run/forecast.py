"""What other formats would make of a prompt, from one run in a dtype that holds all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

from stabilitykit.choices import WideDtype, check_choice
from stabilitykit.diagnosis.forecast import Forecast, prediction
from stabilitykit.diagnosis.forecast import forecast as judge
from stabilitykit.formats import number_format
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import DEFAULT_FORMATS
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records import Recording
from stabilitykit.records.document import to_document
from stabilitykit.run.batch import Asked
from stabilitykit.run.case import Progress, run_case, stage
from stabilitykit.run.inputs import Tensors
from stabilitykit.run.source import SourceOptions, counting, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasts:
    """What `forecast` found: one Forecast for each format, all of the same `recording`.

    `tokens` are the prompt's ids, and `pieces` what they stand for.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    recording: Recording
    formats: tuple[Forecast, ...]

    def __getitem__(self, name: str) -> Forecast:
        """Raises KeyError for a format that was not asked for."""
        return {one.format: one for one in self.formats}[name]

    def document(self) -> dict[str, Any]:
        """What `stabilitykit forecast --json` prints."""
        header = self.recording.header
        return {
            "checkpoint": header.checkpoint,
            "dtype": header.dtype,
            "tokens": None if header.tokens is None else list(header.tokens[0]),
            "formats": [self._document(one) for one in self.formats],
        }

    def _document(self, one: Forecast) -> dict[str, Any]:
        return {
            "format": one.format,
            "breaks": one.breaks,
            "saturating": one.saturating,
            "forecast": prediction(self.recording, one),
            "first": None if one.first is None else one.first.site,
            "layer": None if one.first is None else one.first.layer,
            "overflow": one.overflow,
            "judged": one.judged,
            "elements": one.elements,
            "past": one.past,
            "subnormal": one.subnormal,
            "zero": one.zero,
            "closest": None if one.closest is None else one.closest.site,
            "amax": None if one.closest is None else one.closest.amax,
            "headroom": one.headroom,
            "weights": to_document(one.weights),
        }


def forecast(
    checkpoint: str | Path | Gemma | Subject,
    prompt: str | Asked | Tensors,
    *,
    formats: Sequence[str] = (),
    saturating: bool = False,
    dtype: WideDtype = "float32",
    redact: bool = False,
    progress: Progress | None = None,
    **how: Unpack[SourceOptions],
) -> Forecasts:
    """Runs `prompt` once, up to its logits, and says what storing its tensors in other formats would come to.

    Only tensors that a float16 run stores in 16 bits are judged: Gemma computes norms and softmax in float32 in every
    dtype. Rounding is to nearest, ties to even, and counts are exact.

    Args:
        checkpoint: as in `profile`; a model that is open is to run in `dtype`.
        prompt: as in `profile`.
        formats: names in FORMATS; float16, bfloat16, float8_e4m3fn and float8_e5m2 unless given.
        saturating: casts to 8 bits clamp to the format's maximum instead of making NaN or infinity.
        dtype: of the run that the forecast is made from: float32, bfloat16 for half the memory, or float64.
        redact: keep the prompt and its tokens out of the recording.
        progress: as in `profile`.
        bos, chat, system, special_tokens, device, rounding, rescale, attention, adapter, trust_remote_code, stream: as
            in `profile`.

    Returns:
        Forecasts: `forecast(...)["float16"]` says by `breaks` whether it overflows, by `first` where, by `headroom` how
        many bits are left.

    Raises:
        MisuseError, CheckpointError: as `profile` does, and for an unknown format.

    >>> tiny = "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"
    >>> found = forecast(tiny, "Hi", formats=["float16", "bfloat16"], rescale=65536.0)
    >>> [(one.format, one.breaks) for one in found.formats]
    [('float16', True), ('bfloat16', False)]
    """
    check_choice("dtype", dtype, get_args(WideDtype))
    names = list(dict.fromkeys(number_format(name).name for name in formats)) or list(DEFAULT_FORMATS)
    source = open_source(checkpoint, prompt, progress=progress, **how)
    weights = check_weights(source.tensors, names, counting(progress, source.bytes), blocks=source.blocks)
    subject = source.subject_in(dtype, stage("preparing weights", progress))
    run = run_case(
        subject,
        source.tokens,
        given=source.given,
        matmul=preferred_matmul(dtype, subject.device.type),
        formats=names,
        position_peaks=True,
        redact=redact,
        progress=progress,
    )
    return Forecasts(
        tokens=tuple(source.tokens),
        pieces=tuple(map(source.piece, source.tokens)),
        recording=run.recording,
        formats=tuple(judge(run.recording, name, weights[name], saturating=saturating) for name in names),
    )

"""A repair: γ from measured peaks, every remedy ranked on other texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.choices import ExportDtype, check_choice
from stabilitykit.diagnosis.forecast import forecast
from stabilitykit.errors import MisuseError
from stabilitykit.files import check_new
from stabilitykit.formats import FLOAT16
from stabilitykit.models.devices import parse_device
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import provenance_of
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records.remedies import Ranking, Small
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.export import export
from stabilitykit.remedies.float32_islands import Islands, float32_islands, overflowing
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.proved import prove
from stabilitykit.remedies.ranking import rank
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.repaired import Repair
from stabilitykit.remedies.rescale import Rescaled, choose_gamma, refuse_folder, rescale, rescaling
from stabilitykit.run import windows
from stabilitykit.run.case import Progress, run_case, stage
from stabilitykit.run.dry_run import dry_run
from stabilitykit.run.source import checkpoint_of, local_path
from stabilitykit.run.windows import Texts

PLAIN = Remedy(name="float16", summary="Plain float16, as it is.")


def repair(
    checkpoint: str | Path | Checkpoint,
    texts: Texts | None = None,
    *,
    prompts: Sequence[str | Path] = (),
    bos: bool = True,
    margin: float = 1.0,
    proved: bool = False,
    out: str | Path | None = None,
    dtype: ExportDtype = "float16",
    device: str = "cpu",
    command: str | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Chooses a rescale γ that keeps a Gemma finite in float16, and ranks it and other remedies on held-out texts.

    Everything that a norm reads is scaled by γ, a power of two: float32 logits keep every bit.

    Args:
        checkpoint: what `open_checkpoint` takes or returned; `hf:NAME` for a folder in the local Hugging Face cache.
        texts: the windows of tokens that choose γ and those that rank; the kit's own unless given.
        prompts: more UTF-8 files whose text has to stay finite; they choose γ and rank nothing.
        bos: `prompts` begin with <bos>.
        margin: bits of headroom to leave above the largest magnitude seen, at least 0.
        proved: choose by bounds from the weights instead, so that no prompt of any length overflows.
        out: a new folder for the repaired checkpoint, which plain transformers loads. It is written only where the
            result is `finite`.
        dtype: in which the folder's weights are written, float16 or float32; both run in float16.
        device: cpu, cuda or mps.
        command: the command line to name in the result, if there was one.
        progress: called with (what is being done, how much of it is done, out of how much).

    Returns:
        A Repair: `ranking` with a score for each remedy, the best first; `finite` says whether the repaired checkpoint
        is.

    Raises:
        MisuseError: where no γ leaves the margin, naming the tensor that stands in the way; for a folder that exists
            already, a family that a rescale would change, a file that cannot be read.
        CheckpointError: for a checkpoint that is damaged, or is no Gemma 1, 2 or 3.

    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> found = repair(tiny)
    >>> found.finite, found.ranking.gamma  # with γ = 1 nothing had to be changed
    (True, 1.0)
    """
    check_choice("dtype", dtype, get_args(ExportDtype))
    if margin < 0:
        raise MisuseError(f"margin must be at least 0 bits, got {margin:g}.")
    device = str(parse_device(device))
    if out is not None:
        check_new(Path(out))
    opened = checkpoint_to_repair(checkpoint, progress)
    if texts is None:
        texts = windows.texts(opened.config, Tokenizer(opened.vocabulary), [Path(one) for one in prompts], bos=bos)
    found = _repair(opened, texts, margin, proved, device, command, progress)
    if out is not None and found.finite:
        export(opened, found, Path(out), dtype, progress=stage("writing", progress))
    return found


def checkpoint_to_repair(checkpoint: str | Path | Checkpoint, progress: Progress | None = None) -> Checkpoint:
    """As `checkpoint_of`, but a family whose function a rescale would change is refused by name."""
    if not isinstance(checkpoint, Checkpoint):
        refuse_folder(local_path(checkpoint))
    return checkpoint_of(checkpoint, progress)


def _repair(
    checkpoint: Checkpoint,
    texts: Texts,
    margin: float,
    proved: bool,
    device: str,
    command: str | None,
    progress: Progress | None,
) -> Repair:
    """With `proved` the checkpoint to be carried is the one whose bounds say that no prompt makes it overflow; the
    measured one is ranked beside it.
    """
    model = build(checkpoint, device=device)
    seen = _look(model, texts.choosing, stage("choosing texts", progress))
    proof = prove(checkpoint, progress=progress) if proved else None
    measured = _choose(checkpoint, seen, texts.choosing, margin, device, progress)
    rescaled = measured if proof is None else proof.rescaled
    remedies = [PLAIN, *REMEDIES]
    if seen.islands.sites:
        dry = dry_run(GemmaSubject(model), 1, len(texts.choosing[0]))
        assert dry is not None  # of the kit's own model
        remedies.append(float32_islands(seen.islands, dry))
    del model  # the ranking has one of its own
    carried = PLAIN
    if measured.gamma != 1:
        carried = rescaling(measured.gamma)
        remedies += [carried, carried + FLOAT32_RESIDUAL]
    if proof is not None:
        carried = rescaling(rescaled.gamma, rescaled.inner)
        remedies.append(carried)
    scores = rank(checkpoint, remedies, texts.held_out, device=device, progress=progress)
    ranking = Ranking(
        gamma=rescaled.gamma,
        margin=margin,
        peak=seen.peak,
        site=seen.site,
        islands=tuple(sorted(seen.islands.sites)),
        gains_rounded=dict(rescaled.rounded),
        before=_small(checkpoint),
        after=_small(rescaled.checkpoint),
        carried=carried.name,
        scores=tuple(scores),
        **provenance_of(checkpoint, command, device),
        inner=rescaled.inner,
        measured=None if proof is None else _small(measured.checkpoint),
    )
    return Repair(rescaled=rescaled, ranking=ranking, bounds=() if proof is None else proof.bounds)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of float32 runs: the largest value that float16 would have to store, where it is, that of the final norm, and
    what float16 could not hold.
    """

    peak: float
    site: str
    final_norm: float
    islands: Islands


def _look(model: Gemma, windows: Sequence[Sequence[int]], announce: Callable[[int, int], None]) -> _Seen:
    largest, site, final, islands = 0.0, "", 0.0, Islands("float16", frozenset(), 0)
    for done, window in enumerate(windows):
        announce(done, len(windows))
        recording = run_case(model, list(window), formats=("float16",)).recording
        closest = forecast(recording, "float16").closest
        if closest is not None and (closest.amax or 0.0) > largest:
            largest, site = closest.amax or 0.0, closest.site
        final = max(final, recording.at("norm").amax or 0.0)
        islands |= overflowing(recording, "float16")
    return _Seen(largest, site, final, islands)


def _choose(
    checkpoint: Checkpoint,
    seen: _Seen,
    windows: Sequence[Sequence[int]],
    margin: float,
    device: str,
    progress: Progress | None,
) -> Rescaled:
    """The rescaled checkpoint, once it has been seen to leave the margin."""
    gamma = choose_gamma(FLOAT16.headroom(seen.peak), FLOAT16.headroom(seen.final_norm), margin)
    rescaled = rescale(checkpoint, gamma)
    if gamma == 1:
        return rescaled
    model = build(rescaled.checkpoint, device=device)
    after = _look(model, windows, stage("checking the choice", progress))
    if FLOAT16.headroom(after.peak) < margin:
        raise MisuseError(
            f"A rescale reduces only what norms read: with γ = {gamma:g} the largest magnitude stored in float16 is "
            f"{after.peak:,.0f}, in {after.site}, which leaves {FLOAT16.headroom(after.peak):.1f} bits of headroom "
            f"instead of {margin:g}. Try a smaller --margin, or run it in bfloat16."
        )
    return rescaled


def _small(checkpoint: Checkpoint) -> Small:
    found = check_weights(checkpoint.tensors.items(), ("float16",))["float16"]
    return Small(subnormal=found.subnormal, zero=found.zero)

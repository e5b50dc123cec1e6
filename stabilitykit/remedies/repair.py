"""A repair: γ from measured peaks, every remedy ranked on other texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis.forecast import forecast
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FLOAT16
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.machine import machine, versions
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records.bounds import SiteBound
from stabilitykit.records.remedies import Ranking, Small
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.float32_islands import Islands, float32_islands, overflowing
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.proved import prove
from stabilitykit.remedies.ranking import rank
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.rescale import Rescaled, choose_gamma, rescale, rescaling
from stabilitykit.remedies.texts import Texts
from stabilitykit.run.case import Progress, run_case, stage
from stabilitykit.run.dry_run import dry_run

PLAIN = Remedy(name="float16", summary="Plain float16, as it is.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """The rescaled checkpoint, how it and the other remedies rank, and if it was proved its bounds."""

    rescaled: Rescaled
    ranking: Ranking
    bounds: Sequence[SiteBound] = ()


def repair(
    checkpoint: Checkpoint,
    texts: Texts,
    *,
    margin: float = 1.0,
    proved: bool = False,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Repair:
    """Chooses γ so that float16 keeps `margin` bits of headroom over `texts.choosing`, and ranks it on the others.

    With `proved` the checkpoint to be carried is instead the one whose bounds say that no prompt can break it; the
    measured one is ranked beside it. Raises MisuseError where no γ does, naming the tensor that stands in the way.
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
        checkpoint=checkpoint.source,
        sha256=checkpoint.sha256,
        notes=checkpoint.notes,
        command=command,
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
        versions=versions(),
        machine=machine(device),
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
            f"A rescale reaches what norms read and no more; scaled by {gamma:g} the largest value that float16 has "
            f"to store is {after.peak:,.0f} in {after.site}, which leaves {FLOAT16.headroom(after.peak):.1f} bits and "
            f"not {margin:g}. Ask for a smaller --margin, or run it in bfloat16."
        )
    return rescaled


def _small(checkpoint: Checkpoint) -> Small:
    found = check_weights(checkpoint.tensors.items(), ("float16",))["float16"]
    return Small(subnormal=found.subnormal, zero=found.zero)

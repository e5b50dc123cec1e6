"""A repair: γ from measured peaks, every remedy ranked on other texts, and what to say of the best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis.forecast import forecast
from stabilitykit.errors import MisuseError
from stabilitykit.experiment.case import run_case
from stabilitykit.formats import FLOAT16
from stabilitykit.gemma import build
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.ranking import Progress, Score, rank
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.rescale import Rescaled, choose_gamma, rescale, rescaling
from stabilitykit.remedies.texts import Texts

PLAIN = Remedy(name="float16", summary="Plain float16, as it is.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What was chosen, `peak` being the largest value of the choosing texts that float16 would have to store, in
    float32, and `site` where it was; and how everything ranks.
    """

    rescaled: Rescaled
    peak: float
    site: str
    margin: float
    scores: Sequence[Score]

    @property
    def score(self) -> Score:
        """Of the rescaled checkpoint in float16."""
        name = rescaling(self.rescaled.gamma).name
        return next(score for score in self.scores if score.name == name)


def repair(checkpoint: Checkpoint, texts: Texts, *, margin: float = 1.0, progress: Progress | None = None) -> Repair:
    """Chooses γ so that float16 keeps `margin` bits of headroom over `texts.choosing`, and ranks it on the others.

    Raises MisuseError where no γ does, naming the tensor that stands in the way.
    """
    rescaled, top, site = _choose(checkpoint, texts.choosing, margin, progress)
    remedies = [PLAIN, *REMEDIES, rescaling(rescaled.gamma)]
    scores = rank(checkpoint, remedies, texts.held_out, progress=progress)
    return Repair(rescaled=rescaled, peak=top, site=site, margin=margin, scores=scores)


def _choose(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], margin: float, progress: Progress | None
) -> tuple[Rescaled, float, str]:
    """The rescaled checkpoint, the largest value that float16 would have to store without it, and where that was."""
    largest, site, final = _peaks(checkpoint, windows, _named("choosing texts", progress))
    gamma = choose_gamma(FLOAT16.headroom(largest), FLOAT16.headroom(final), margin)
    rescaled = rescale(checkpoint, gamma)
    after, where, _ = _peaks(rescaled.checkpoint, windows, _named("checking the choice", progress))
    if FLOAT16.headroom(after) < margin:
        raise MisuseError(
            f"A rescale reaches what norms read and no more; scaled by {gamma:g} the largest value that float16 has "
            f"to store is {after:,.0f} in {where}, which leaves {FLOAT16.headroom(after):.1f} bits and not {margin:g}. "
            "Ask for a smaller --margin, or run it in bfloat16."
        )
    return rescaled, largest, site


def _peaks(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], announce: Callable[[int, int], None]
) -> tuple[float, str, float]:
    """The largest value that float16 would have to store over all windows, where it is, and that of the final norm."""
    model = build(checkpoint)
    largest, site, final = 0.0, "", 0.0
    for done, window in enumerate(windows):
        announce(done, len(windows))
        recording = run_case(model, list(window), formats=("float16",)).recording
        closest = forecast(recording, "float16").closest
        if closest is not None and (closest.amax or 0.0) > largest:
            largest, site = closest.amax or 0.0, closest.site
        final = max(final, recording.at("norm").amax or 0.0)
    return largest, site, final


def _named(what: str, progress: Progress | None) -> Callable[[int, int], None]:
    def announce(done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    return announce

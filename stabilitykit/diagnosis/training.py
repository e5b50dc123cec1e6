"""What became of a training step, and what cures it, in sentences."""

from stabilitykit.diagnosis.gradients import pole, scale_of
from stabilitykit.formats import FORMATS
from stabilitykit.records.training import Failure, TrainingDiagnosis, TrainingTrial
from stabilitykit.words import counted, listed, number

_SHOWN = 3  # of what cures it, and of what does not
_MUCH = 0.01


def advice(found: TrainingDiagnosis) -> str:
    """One paragraph: where the step fails, the numbers, what was tried that cures it, and what did not."""
    parts = [_happened(found), _weights(found), _clipped(found), _small(found.plain, found.dtype)]
    if found.plain.cured and not _is_small(found.plain):
        return " ".join(part for part in [*parts, _nearness(found)] if part)
    parts += [_twice(found), _cures(found), _in_vain(found)]
    if not found.cures and found.kind in ("invalid", "division-by-zero"):
        parts.append(pole(found.operator))
    return " ".join(part for part in parts if part)


def _happened(found: TrainingDiagnosis) -> str:
    peak = "" if found.peak is None else f": it peaks at {number(found.peak)}, in {found.peak_site}"
    forward = f"The forward pass is finite{peak}." if found.forward else "The forward pass is not finite."
    if found.plain.then:
        return f"{forward} The step raises {found.plain.then}."
    at = f" at loss scale {scale_of(found.loss_scale)}" if found.loss_scale != 1 else ""
    if found.site is None:
        return f"{forward} Every gradient is finite{at}."
    reaches = "" if found.reference is None else f"; in float32 it reaches {number(found.reference)}"
    form = FORMATS.get(found.dtype)
    most = "" if form is None or found.reference is None else f", and {found.dtype} ends at {number(form.largest)}"
    verb = "overflows" if found.kind in ("overflow", "reduction") else "is the first that is not finite"
    return f"{forward} The gradient of {found.site} {verb}{at}{reaches}{most}."


def _weights(found: TrainingDiagnosis) -> str:
    plain = found.plain
    if found.lost:
        return f"{counted(len(found.lost), 'weight gradient is', 'weight gradients are')} lost."
    if not plain.weights and not plain.then:
        return (
            "After the optimiser's step weights are not finite, although every gradient is: it divides by what is 0 in "
            f"{found.dtype}."
        )
    if "far" in plain.failures and plain.move is not None:
        times = number(float(f"{plain.move:.2g}"))
        return (
            f"The optimiser's step moves weights up to {times} times as far as in float32: it divides by what is too "
            f"small for {found.dtype}."
        )
    return ""


def _twice(found: TrainingDiagnosis) -> str:
    """That no single change in the dtype will do, and which two do."""
    if not found.pairs:
        return ""
    pair = found.pairs[0]
    alone = [f"with {one.name}{_at(one)} alone {_leaves(one)}" for one in (found[name] for name in pair.together)]
    return f"It fails twice over: {listed(alone)}. Both are needed: {pair.name}."


def _leaves(trial: TrainingTrial) -> str:
    """What still fails with a change."""
    words: dict[Failure, str] = {
        "gradients": "gradients are not finite",
        "weights": "weights are not finite after the optimiser's step",
        "far": "the optimiser moves weights too far",
        "other gradients": "gradients are others than float32's",
    }
    return listed([words[one] for one in words if one in trial.failures])


def _clipped(found: TrainingDiagnosis) -> str:
    """Clipping that makes zeros of finite gradients, because their norm is not."""
    norm, form = found.plain.norm, FORMATS.get(found.dtype)
    if found.clip is None or norm is None or form is None or not found.plain.gradients or not form.overflows(norm):
        return ""
    return (
        f"The norm of all gradients, {number(norm)}, overflows {found.dtype}, though none of them does: clipping "
        "multiplies them by 1 / inf, which is 0."
    )


def _is_small(trial: TrainingTrial) -> bool:
    return trial.distance is not None and trial.distance.underflow > _MUCH


def _small(trial: TrainingTrial, dtype: str) -> str:
    one = trial.distance
    if one is None or (one.underflow <= _MUCH and one.unscaled <= _MUCH):
        return ""
    said = []
    if one.underflow > _MUCH:
        said.append(f"{one.underflow:.1%} of the weights' gradients are 0 in {dtype} and not in float32")
    if one.unscaled > _MUCH:
        said.append(f"{one.unscaled:.1%} become 0 when they are divided by the loss scale in {dtype}")
    text = listed(said)
    return f"{text[0].upper()}{text[1:]}."


def _nearness(found: TrainingDiagnosis) -> str:
    one = found.plain.distance
    if one is None or one.error_mean is None:
        return ""
    return f"Gradients are {one.error_mean:.1e} from float32's in the mean, in parts of each weight's largest."


def _cures(found: TrainingDiagnosis) -> str:
    cures = [trial for trial in found.cures if trial.name != "float32"]
    if not cures:
        wide = any(trial.name == "float32" for trial in found.cures)
        return "Of what was tried only float32 cures it." if wide else "Nothing that was tried cures it."
    return f"Tried: {listed([_told(trial) for trial in cures[:_SHOWN]])}."


def _told(trial: TrainingTrial) -> str:
    one = trial.distance
    far = "" if one is None or one.error_mean is None else f", {one.error_mean:.1e} from float32's gradients"
    small = "" if one is None or one.underflow <= _MUCH else f", {one.underflow:.1%} lost to underflow"
    return f"{trial.name}{_at(trial)}: finite{far}{small}"


def _at(trial: TrainingTrial) -> str:
    """A loss scale that the name does not say."""
    return f" ({scale_of(trial.loss_scale)})" if "loss scale" in trial.name and not trial.together else ""


def _in_vain(found: TrainingDiagnosis) -> str:
    failed = [trial.name for trial in found.trials if not trial.cured]
    return f"Without success: {listed(failed, most=_SHOWN)}." if failed else ""
